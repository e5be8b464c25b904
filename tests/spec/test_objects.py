"""``spec/objects.md``: its examples decode with our code, and our objects are what it lists."""

from __future__ import annotations

import re

from icechunk.format import keys
from icechunk.format.envelope import COMPRESSION_ZSTD, HEADER_SIZE, FileType, unseal
from icechunk.format.ids import FIRST_SNAPSHOT, ObjectId, encode_id
from icechunk.format.transaction import decode_transaction_log, encode_transaction_log
from icechunk.format.values import TransactionLog
from icechunk.log.repository.entry import slot_key
from tests.spec.pages import block, hexdump, page, rows

A = ObjectId(bytes([1]) * 12)


def test_the_hex_example_is_a_transaction_log_with_the_envelope_of_this_package() -> None:
    data = hexdump(block("objects.md", "hexdump"))
    log = decode_transaction_log(data, expected_id=FIRST_SNAPSHOT)
    assert log == TransactionLog(id=FIRST_SNAPSHOT)
    ours = encode_transaction_log(log)
    assert (data[:12], data[36:HEADER_SIZE]) == (ours[:12], ours[36:HEADER_SIZE])
    # The version behind the name may have moved on since.
    assert data[12:24] == ours[12:24] == b"aioicechunk-"
    assert f"{len(data)} bytes, as our code writes it" in " ".join(page("objects.md").split())


def test_the_payload_example_is_the_payload_of_the_hex_example() -> None:
    payload = hexdump(block("objects.md", "payload"))
    assert unseal(hexdump(block("objects.md", "hexdump")), FileType.TRANSACTION_LOG) == (2, payload)
    assert unseal(encode_transaction_log(TransactionLog(id=FIRST_SNAPSHOT)), FileType.TRANSACTION_LOG) == (2, payload)


def test_every_kind_of_key_is_listed() -> None:
    listed = " ".join(row[0] for row in rows(page("objects.md"), "| key |"))
    made = {
        keys.REPO_KEY: "`repo`",
        keys.snapshot_key(A): "`snapshots/{id}`",
        keys.manifest_key(A): "`manifests/{id}`",
        keys.transaction_key(A): "`transactions/{id}`",
        keys.chunk_key(A): "`chunks/{id}`",
        keys.CONFIG_KEY: "`config.yaml`",
        keys.REFS_PREFIX: "`refs/",
        keys.overwritten_repo_key(keys.overwritten_repo_name(0, bytes(12))): "`overwritten/repo.{T}.{R}`",
        slot_key("E", 1): "`log/{epoch}/{slot}`",
    }
    for key, text in made.items():
        assert text in listed
        assert key.startswith(text.strip("`").partition("{")[0])


def test_file_types_and_compression_are_those_listed() -> None:
    described = next(row[2] for row in rows(page("objects.md"), "| offset | bytes | field |") if row[0] == "37")
    assert [int(number) for number in re.findall(r"\d+", described)] == [int(kind) for kind in FileType]
    assert COMPRESSION_ZSTD == 1


def test_the_first_snapshots_id_is_the_one_on_the_page() -> None:
    assert f"`{encode_id(FIRST_SNAPSHOT)}`, bytes `{FIRST_SNAPSHOT.hex()}`" in page("objects.md")
