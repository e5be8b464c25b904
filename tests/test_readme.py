"""The README's commands are one line each, and its Python examples run."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

README = Path(__file__).resolve().parent.parent / "README.md"
ENDPOINT = "http://127.0.0.1:9000"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.fixture
def s3_endpoint() -> Iterator[str]:
    server_module = pytest.importorskip("moto.server", reason="the embedded S3 of the demo extra")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    opener.open(urllib.request.Request(f"{endpoint}/my-bucket", method="PUT"), timeout=10).close()
    yield endpoint
    server.stop()


def test_the_first_two_shell_blocks_hold_one_command_line_each() -> None:
    demo, tests = blocks("sh")[:2]
    for command in (demo, tests):
        assert command.strip().count("\n") == 0
        assert command.startswith("python3 -m venv ")
    assert demo.strip().endswith("icechunk demo")
    assert "pytest" in tests


PRINTED = ["correct the third time step", "[7 7 0 0]", "59", "", ""]
"""Part of each example's output. The others assert, or only open a repository."""


@pytest.mark.parametrize(
    ("source", "printed"),
    list(zip(blocks("python"), PRINTED, strict=True)),
    ids=[source.strip().splitlines()[0][:30] for source in blocks("python")],
)
def test_the_python_examples_run(
    source: str, printed: str, s3_endpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "xarray" in source:
        pytest.importorskip("xarray", reason="the xarray extra")
    exec(compile(source.replace(ENDPOINT, s3_endpoint), str(README), "exec"), {"__name__": "__main__"})
    assert printed in capsys.readouterr().out
