"""The decoders of the format, and how files are mutated: see `tools.fuzz`. Only FormatError may come out, quickly.

Seeds are the official library's files in ``tests/format/fixtures`` and a few FlexBuffers. Most
mutations are of the decompressed payload, sealed again, since a mutated zstd frame seldom gets past
the frame.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from icechunk.errors import FormatError, InvalidInputError
from icechunk.format.envelope import FileType, seal, unseal
from icechunk.format.flat import flexbuffers
from icechunk.format.manifest import decode_manifest
from icechunk.format.repo import snapshot_encoding, update_encoding
from icechunk.format.repo.codec import decode_repo, encode_repo
from icechunk.format.snapshot.codec import decode_snapshot
from icechunk.format.transaction import decode_transaction_log

FIXTURES = Path(__file__).parent.parent.parent / "tests/format/fixtures"
SLOW_S = 5.0
"""No input may take longer."""
MEMORY_MB = 2048
"""The whole run may not grow beyond."""


def read_repo(data: bytes) -> None:
    """Decode a repo info and all that is in it, whichever way it is asked for; what can be read can be written."""
    info = decode_repo(data)
    for id in itertools.islice(info.snapshots, 100):
        assert info.snapshots[id].id == id
    read = [*info.snapshots.values(), *info.updates]
    try:
        again = encode_repo(info)
    except InvalidInputError:
        return
    try:
        same = decode_repo(again)
        assert len([*same.snapshots.values(), *same.updates]) == len(read)
    except FormatError as error:
        raise AssertionError(f"what was written cannot be read: {error}") from error


def copy_repo(data: bytes) -> None:
    """Decode a repo info and write it again without a look at what is in it."""
    with (
        contextlib.suppress(InvalidInputError),
        mock.patch.object(snapshot_encoding, "_FEW", 0),
        mock.patch.object(update_encoding, "_FEW", 0),
    ):
        encode_repo(decode_repo(data))


DECODERS: dict[FileType, Callable[[bytes], Any]] = {
    FileType.SNAPSHOT: decode_snapshot,
    FileType.MANIFEST: decode_manifest,
    FileType.TRANSACTION_LOG: decode_transaction_log,
    FileType.REPO_INFO: read_repo,
}

_NUMBERS = (0, 1, 2, 3, 4, 7, 8, 0x7F, 0xFF, 0x100, 0x7FFF, 0xFFFF, 2**20, 2**28, 2**31 - 1, 2**31, 2**32 - 1, 2**60)

FLEXBUFFERS = [
    flexbuffers.dumps(value)
    for value in (
        None,
        [1, -2, 2.5, "text", b"blob", True, None, [], {}],
        {"a": {"b": {"c": [{"d": 1}] * 3}}, "z": 2**60, "long": "x" * 300},
        [[[[[[[[[[1]]]]]]]]]],
    )
]


def fixtures(file_type: FileType) -> list[bytes]:
    """Every fixture file of one type."""
    paths = sorted(path for path in FIXTURES.rglob("*") if path.is_file())
    files = [path.read_bytes() for path in paths if path.suffix not in (".json", ".yaml", ".md")]
    return [data for data in files if len(data) > 39 and data[37] == file_type]


def mutate(chance: random.Random, data: bytes) -> bytes:
    """A few random changes: bits, bytes, numbers, cuts, repeats."""
    octets = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 3, 8))):
        if not octets:
            break
        at = chance.randrange(len(octets))
        match chance.randrange(7):
            case 0:
                octets[at] ^= 1 << chance.randrange(8)
            case 1:
                octets[at] = chance.choice((0, 1, 4, 0x7F, 0x80, 0xFF, chance.randrange(256)))
            case 2:
                width = chance.choice((1, 2, 4, 4, 4, 8))
                at -= at % width
                number = chance.choice(_NUMBERS) & ((1 << 8 * width) - 1)
                octets[at : at + width] = number.to_bytes(width, "little")
            case 3:
                at -= at % 4
                number = int.from_bytes(octets[at : at + 4], "little") + chance.choice((-8, -4, -1, 1, 4, 8, 64))
                octets[at : at + 4] = (number & 0xFFFFFFFF).to_bytes(4, "little")
            case 4:
                del octets[at:]
            case 5:
                other = chance.randrange(len(octets))
                size = chance.randrange(1, 64)
                octets[at : at + size] = octets[other : other + size]
            case 6:
                del octets[at : at + chance.randrange(1, 16)]
    return bytes(octets)


def mutate_file(chance: random.Random, data: bytes) -> bytes:
    """A mutated file: usually within its payload, sometimes in its header or frame."""
    if chance.randrange(20) == 0:
        return mutate(chance, data)
    try:
        file_type = FileType(data[37])
        version, payload = unseal(data, file_type)
    except (FormatError, IndexError, ValueError):
        return mutate(chance, data)  # it was mutated before
    return seal(file_type, version, mutate(chance, payload[:]), level=1)


def targets() -> dict[str, tuple[Callable[[bytes], Any], Callable[[random.Random, bytes], bytes], Sequence[bytes]]]:
    """Decoder, mutation and seeds of each target, by name."""
    found: dict[str, Any] = {
        file_type.name.lower(): (decoder, mutate_file, fixtures(file_type)) for file_type, decoder in DECODERS.items()
    }
    found["repo_info copied"] = (copy_repo, mutate_file, fixtures(FileType.REPO_INFO))
    found["flexbuffers"] = (flexbuffers.loads, mutate, FLEXBUFFERS)
    return found


def attempt(decoder: Callable[[bytes], Any], data: bytes) -> str | None:
    """The fault of a decoder on ``data``; None if there is none."""
    start = time.perf_counter()
    try:
        decoder(data)
    except FormatError:
        pass
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"{type(error).__name__}: {error}"
    elapsed = time.perf_counter() - start
    return f"took {elapsed:.1f} s" if elapsed > SLOW_S else None
