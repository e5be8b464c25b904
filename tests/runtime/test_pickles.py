"""Pickles that other versions made: they load, or the error names the version."""

from __future__ import annotations

import pickle
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import icechunk
from icechunk.errors import ErrorKind, FormatError
from icechunk.runtime import pickles
from icechunk.storage import s3
from tests.raising import raises

OLD = Path(__file__).parent / "fixtures" / "unversioned_pickles"
"""Made at d2bc7af, when no version was in them and modules had other names."""
LOADED = {
    "config",
    "conflict_error",
    "container",
    "credentials",
    "diff",
    "error",
    "error2",
    "gcs",
    "preload",
    "rebase_error",
    "snapshot",
    "solver",
    "split",
    "update",
}


@pytest.mark.parametrize("path", sorted(OLD.glob("*.pickle")), ids=lambda path: path.stem)
def test_a_pickle_without_a_version_loads_or_is_refused_as_a_pickle(path: Path) -> None:
    data = path.read_bytes()
    if path.stem in LOADED:
        value = pickle.loads(data)
        assert repr(pickle.loads(pickle.dumps(value))) == repr(value)
    else:
        with pytest.raises(FormatError) as caught:
            pickle.loads(data)
        assert caught.value.kind == ErrorKind.PICKLE


def test_old_pickles_load_with_equal_values() -> None:
    config = pickle.loads((OLD / "config.pickle").read_bytes())
    expected = icechunk.RepositoryConfig(inline_chunk_threshold_bytes=7)
    expected.set_virtual_chunk_container(
        icechunk.VirtualChunkContainer("s3://b/", icechunk.s3_store(region="us-east-1"))
    )
    assert config == expected
    credentials = pickle.loads((OLD / "credentials.pickle").read_bytes())
    assert credentials == icechunk.s3_credentials(access_key_id="k", secret_access_key="s")


def test_the_version_is_looked_at_before_any_module_that_the_other_version_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = icechunk.Repository.create(icechunk.local_filesystem_storage(str(tmp_path)))
    session = repository.readonly_session("main")
    with monkeypatch.context() as other:
        other.setattr(pickles, "VERSION", "77.5.3")
        data = [pickle.dumps(value) for value in (repository, session, session.store, repository.storage)]
    for pickled in data:
        renamed = pickled
        for room in (b"config", b"session", b"store", b"repository", b"storage"):
            renamed = renamed.replace(b"icechunk." + room, b"icechunk." + b"x" * len(room))
        with raises(FormatError, "pickle", "77.5.3"):
            pickle.loads(renamed)


def test_modules_that_never_existed_are_missing_as_usual() -> None:
    assert find_spec("icechunk.nothing") is None
    with pytest.raises(ModuleNotFoundError):
        __import__("icechunk.status")
    with pytest.raises(AttributeError):
        s3.nothing  # noqa: B018
    assert "icechunk.status" not in sys.modules
