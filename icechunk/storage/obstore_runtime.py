"""Obstore's functions, and an end of the process that its threads survive.

A request is answered by a thread of obstore's runtime, which wakes the event loop while it holds the interpreter, and
has to have it again afterwards to let go of what it held. A program that ends meanwhile takes the interpreter away:
before Python 3.14 (gh-87135) the thread is then made to exit, which compiled code does not survive, and the process
dies of SIGABRT with its work done. Nothing tells when those threads are through, so the end of the process waits for
them a little: without the interpreter, which is then theirs at once.
"""

from __future__ import annotations

import atexit
import sys
import time
from typing import Any, Final

__all__ = ["obstore_module"]

_TURNS: Final = 25
_TURN_S: Final = 0.004

_used = False


def obstore_module() -> Any:
    """The module of obstore's functions; where it is not installed, making a store has said so before."""
    global _used
    import obstore

    _used = True
    return obstore


def _let_threads_finish() -> None:
    # Many short turns: on a machine that is busy each takes longer, and so does what is waited for.
    if _used:
        for _ in range(_TURNS):
            time.sleep(_TURN_S)


if sys.version_info < (3, 14):
    # At import, before anything of the package is in use: hooks run last in, first out, and those of `PerLoop` still
    # make requests.
    atexit.register(_let_threads_finish)
