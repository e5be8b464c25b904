"""Savepoints of a session."""

from __future__ import annotations

import numpy as np
import pytest
import zarr

import icechunk
from icechunk.errors import ReadOnlyError, SessionStateError
from tests.raising import raises


def session_with_array() -> icechunk.Session:
    session = icechunk.Repository.create(icechunk.in_memory_storage()).writable_session("main")
    zarr.create_array(session.store, name="a", shape=(4,), chunks=(1,), dtype="i4", fill_value=-1)[:] = 1
    return session


def values(session: icechunk.Session) -> list[int]:
    array = zarr.open_array(session.store, path="a", mode="r")
    return [int(value) for value in np.asarray(array[:])]


def test_rollback_undoes_the_changes_after_the_savepoint_and_no_others() -> None:
    session = session_with_array()
    before = session.savepoint()
    array = zarr.open_array(session.store, path="a")
    array[1:3] = 2
    between = session.savepoint()
    array.resize((6,))
    zarr.create_group(session.store, path="g")
    session.rollback(between)
    assert values(session) == [1, 2, 2, 1]
    assert "/g" not in session.status().new_groups
    session.rollback(before)
    assert values(session) == [1, 1, 1, 1]
    session.commit("only what was before")
    assert values(session) == [1, 1, 1, 1]


def test_rolled_back_savepoints_are_refused_and_change_nothing() -> None:
    session = session_with_array()
    first = session.savepoint()
    zarr.open_array(session.store, path="a")[0] = 7
    second = session.savepoint()
    session.rollback(first)
    with raises(SessionStateError, "not-allowed", "savepoint"):
        session.rollback(second)
    assert values(session) == [1, 1, 1, 1]


def test_read_only_session_has_no_savepoints() -> None:
    session = session_with_array()
    session.commit("done")
    with pytest.raises(ReadOnlyError):
        session.savepoint()
