"""The header of a file names the program that wrote it."""

from __future__ import annotations

import pytest

from icechunk.format.envelope import FileHeader, FileType
from icechunk.inspection.description import describe_header


@pytest.mark.parametrize(
    ("written_by", "name", "version"),
    [
        ("ic-2.0.0-alpha.3", "ic", "2.0.0-alpha.3"),
        ("aioicechunk-0.9.0", "aioicechunk", "0.9.0"),
        ("other", "other", ""),
    ],
)
def test_a_prerelease_of_a_program_is_part_of_its_version(written_by: str, name: str, version: str) -> None:
    described = describe_header(FileHeader(written_by=written_by, spec_version=2, file_type=FileType.SNAPSHOT))
    assert (described["app_name"], described["app_version"], described["written_by"]) == (name, version, written_by)
