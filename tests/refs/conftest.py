"""Fixtures of the tests of the repository log."""

from __future__ import annotations

import pytest

from tests.refs.world import World


@pytest.fixture
async def world():
    a_world = World()
    yield a_world
    await a_world.aclose()
