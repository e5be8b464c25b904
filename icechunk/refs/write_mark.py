"""What ``extra`` of a ``repo`` object says where the object is the truth itself: whose write it is, and the fence.

Pure. The official library drops ``extra`` whenever it rewrites ``repo``; nothing is wrong then, it is only unknown.
"""

from __future__ import annotations

from typing import Any, Final

import orjson

__all__ = ["cutoff_of", "nonce_of", "write_mark"]

_NAME: Final = "aioicechunk-write"


def write_mark(nonce: bytes, touch: bytes = b"", *, gc_cutoff_us: int = 0) -> bytes:
    """The bytes of ``extra``.

    Parameters
    ----------
    nonce
        Of the write.
    touch
        Where the same state is written once more, something to tell it by.
    gc_cutoff_us
        Of the last collection, store time in µs; 0: none is known.
    """
    document: dict[str, Any] = {_NAME: nonce.hex()}
    if touch:
        document["touch"] = touch.hex()
    if gc_cutoff_us:
        document["gc"] = gc_cutoff_us
    return orjson.dumps(document)


def _document(extra: bytes | None) -> dict[str, Any]:
    if extra is None:
        return {}
    try:
        document = orjson.loads(extra)
    except orjson.JSONDecodeError:
        return {}
    return document if isinstance(document, dict) and _NAME in document else {}


def nonce_of(extra: bytes | None) -> bytes | None:
    """The nonce of the write, or None where ``extra`` is absent or somebody else's."""
    try:
        return bytes.fromhex(_document(extra)[_NAME])
    except (KeyError, TypeError, ValueError):
        return None


def cutoff_of(extra: bytes | None) -> int:
    """The cutoff of the last collection, store time in µs; 0 where none is known."""
    cutoff = _document(extra).get("gc", 0)
    return cutoff if type(cutoff) is int and 0 <= cutoff < 1 << 63 else 0
