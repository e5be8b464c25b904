"""Calls to functions of ``tools``, by another process: one line of JSON in, one out.

An interpreter with the official library takes seconds to start, so tests keep one: see `tools.oracle.Resident`.
``{"call": "tools.interop.matrix:begin", "arguments": [...]}`` is answered by ``{"result": ...}``, or by
``{"error": text, "type": name}``.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
import warnings

__all__: list[str] = []


def main() -> None:
    # Output of the called functions must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    for line in sys.stdin:
        request = json.loads(line)
        module, _, name = request["call"].partition(":")
        try:
            answer = {"result": getattr(importlib.import_module(module), name)(*request["arguments"])}
        except Exception as error:
            answer = {"error": traceback.format_exc()[-4000:], "type": type(error).__name__}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
    # Not through the interpreter's end, where official 1.1.21 sometimes aborts.
    os._exit(0)
