"""The pages of ``spec/``, and what the tests take from them: blocks, tables, bytes."""

from __future__ import annotations

import re
from pathlib import Path

from icechunk.runtime import json_codec

ROOT = Path(__file__).resolve().parents[2]
SPEC = ROOT / "spec"
PAGES = sorted(SPEC.rglob("*.md"))

ZARR_ARRAY = json_codec.dumps(
    {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [5, 4],
        "data_type": "uint8",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [2, 4]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0,
        "codecs": [{"name": "bytes"}],
    }
)
ZARR_GROUP = b'{"zarr_format":3,"node_type":"group"}'


def page(name: str) -> str:
    return (SPEC / name).read_text("utf-8")


def block(name: str, language: str) -> str:
    """The one fenced block of a page that begins with this language."""
    found = re.findall(rf"^```{language}\n(.*?)^```$", page(name), re.MULTILINE | re.DOTALL)
    assert len(found) == 1, f"{name} has {len(found)} blocks of {language!r}"
    return str(found[0])


def rows(text: str, header: str) -> list[list[str]]:
    """The cells of the table whose header line begins so."""
    lines = iter(text.splitlines())
    for line in lines:
        if line.startswith(header):
            break
    else:
        raise AssertionError(f"no table {header!r}")
    next(lines)
    out = []
    for line in lines:
        if not line.startswith("|"):
            break
        out.append([cell.strip() for cell in line.strip().strip("|").split(" | ")])
    return out


def code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def hexdump(text: str) -> bytes:
    return b"".join(bytes.fromhex(line.split("  ", 1)[1]) for line in text.splitlines())
