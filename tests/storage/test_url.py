"""URLs of repositories, taken apart and put to use."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import icechunk
from icechunk.errors import ErrorKind, InvalidInputError
from icechunk.storage.local.storage import LocalStorage
from icechunk.storage.port import Storage
from icechunk.storage.s3.storage import S3Storage
from icechunk.storage.url import RepositoryUrl, parse_url, storage_from_url
from tests.raising import raises

SNAPSHOT = "1CECHNKREP0F1RSTCMT0"
REFUSALS = {ErrorKind.CANNOT_PARSE_URL, ErrorKind.INVALID_SETTING, ErrorKind.STORAGE_CONFIG, ErrorKind.BAD_PREFIX}


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("s3://b/p", RepositoryUrl(place="s3://b/p")),
        ("/data/repo", RepositoryUrl(place="/data/repo")),
        ("s3://b/p|icechunk:", RepositoryUrl(place="s3://b/p")),
        ("s3://b/p|icechunk://@tag.v1/", RepositoryUrl(place="s3://b/p", tag="v1")),
        ("s3://b/p|icechunk://tag.v1/a", RepositoryUrl(place="s3://b/p", tag="v1", path="a")),
        ("s3://b/p|icechunk:@tag.v1/a/b/", RepositoryUrl(place="s3://b/p", tag="v1", path="a/b")),
        ("s3://b/p|icechunk:a/b|zarr3:c", RepositoryUrl(place="s3://b/p", path="a/b/c")),
        ("s3://b/p|icechunk:@branch.x%2Fy", RepositoryUrl(place="s3://b/p", branch="x/y")),
        ("s3://b/p|icechunk:@branch.v1.2|zarr3:", RepositoryUrl(place="s3://b/p", branch="v1.2")),
        (f"s3://b/p|icechunk:@{SNAPSHOT}/a", RepositoryUrl(place="s3://b/p", snapshot_id=SNAPSHOT, path="a")),
        ("s3://b/p|icechunk:%40branch.main", RepositoryUrl(place="s3://b/p", path="@branch.main")),
    ],
)
def test_a_url_is_taken_apart(url: str, expected: RepositoryUrl) -> None:
    assert parse_url(url) == expected


def test_the_version_is_main_where_none_is_named() -> None:
    assert parse_url("x").version == {"branch": "main"}
    assert not parse_url("x").names_version
    assert parse_url("x|icechunk:@tag.v1").version == {"tag": "v1"}
    assert parse_url("x|icechunk:@tag.v1").names_version


@pytest.mark.parametrize(
    "url",
    [
        "",
        "|icechunk:",
        "s3://b/p|icechunk",
        "s3://b/p|zarr3:",
        "s3://b/p|icechunk:|icechunk:",
        "s3://b/p|icechunk:|zarr2:",
        "s3://b/p|zip:x|icechunk:",
        "s3://b/p|icechunk:@branch.",
        "s3://b/p|icechunk:@v1",
        "s3://b/p|icechunk:@tag.v1/../x",
        "s3://b/p|icechunk:|zarr3:|zarr3:",
    ],
)
def test_a_wrong_url_is_refused(url: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        parse_url(url)
    assert caught.value.kind == ErrorKind.CANNOT_PARSE_URL


@pytest.mark.parametrize(
    "url",
    [
        "ftp://x/y",
        "s3://",
        "gs://",
        "file://host/x",
        "file:///",
        "memory://",
        "az://c/p",
        "https:///x",
        "s3://b/p#frag",
        "s3://[b/p",
        "memory://a]b",
        "http://[x/y",
        "file:///folder?region=x",
        "memory://name?region=x",
        "s3://localhost:9000/b/p",
        "gs://b:1/p",
        "s3://b/p/../q",
        "gs://b/.",
        "az://c/%2E%2E/q?account=a",
        " s3://b/p",
        "my-scheme://b/p",
    ],
)
def test_a_place_that_is_none_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InvalidInputError) as caught:
        storage_from_url(url)
    assert caught.value.kind == ErrorKind.CANNOT_PARSE_URL


def test_places_give_their_storages(tmp_path: Path) -> None:
    for url in (tmp_path, str(tmp_path), f"file://{tmp_path}"):
        storage = storage_from_url(url)
        assert isinstance(storage, LocalStorage)
        assert str(tmp_path) in repr(storage)
    azure = storage_from_url("az://c/p?account=an-account")
    assert "an-account" in repr(azure)
    s3 = storage_from_url("s3://b/p/q?region=eu-west-1&force_path_style=true", {"anonymous": True})
    assert isinstance(s3, S3Storage)
    assert "eu-west-1" in repr(s3)
    assert storage_from_url("memory://a-name") is storage_from_url("memory://a-name")


@pytest.mark.parametrize("name", ["memory:x", "s3:x", "data:2026", "x:y:z", "a b?c#d"])
def test_a_path_object_is_a_plain_path_whatever_its_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    icechunk.Repository.create(Path(name) / "repo")
    assert (tmp_path / name / "repo").is_dir()
    assert icechunk.open(Path(name) / "repo").branch is None
    assert parse_url(tmp_path / name).place == str(tmp_path / name)


@given(
    st.text(max_size=30), st.sampled_from(["s3://", "gs://b", "memory://", "file://", "http://h", "az://c?account=a"])
)
def test_any_place_gives_a_storage_or_is_refused(text: str, begin: str) -> None:
    found: Storage | ErrorKind
    try:
        found = storage_from_url(begin + text)
    except InvalidInputError as error:
        found = ErrorKind(error.kind)
    assert isinstance(found, Storage) or found in REFUSALS


def test_options_that_do_not_fit_are_refused_by_name() -> None:
    with raises(InvalidInputError, "invalid-setting", "colour"):
        storage_from_url("s3://b/p", {"colour": "red"})
    with pytest.raises(InvalidInputError) as caught:
        storage_from_url("memory://x", {"region": "y"})
    assert caught.value.kind == "invalid-setting"
    with pytest.raises(InvalidInputError):
        storage_from_url("s3://b/p?allow_http=perhaps")


@given(st.text(max_size=40))
def test_any_text_is_a_url_or_refused(text: str) -> None:
    with contextlib.suppress(InvalidInputError):
        assert parse_url(text).place


@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=8).filter(lambda n: n not in (".", "..")))
def test_every_name_can_be_written(name: str) -> None:
    from urllib.parse import quote

    assert parse_url(f"x|icechunk:@branch.{quote(name, safe='')}").branch == name
    assert parse_url(f"x|icechunk:{quote(name, safe='')}").path == name


@pytest.mark.parametrize(
    "url", ["s3://KEY:SECRET@b/x", "s3a://KEY@b/x", "gs://KEY:SECRET@b/x", "file://KEY:SECRET@b/x"]
)
def test_a_key_before_a_bucket_is_refused_and_not_shown(url: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        storage_from_url(url)
    assert caught.value.kind == ErrorKind.CANNOT_PARSE_URL
    assert "SECRET" not in str(caught.value)
    assert "KEY" not in str(caught.value)


@pytest.mark.parametrize("options", [{"region": 5}, "x", 5])
def test_options_of_a_wrong_type_are_refused_like_unknown_ones(options: Any) -> None:
    with pytest.raises(InvalidInputError) as caught:
        storage_from_url("s3://b/x", options)
    assert caught.value.kind == ErrorKind.INVALID_SETTING
    assert isinstance(caught.value, TypeError)
