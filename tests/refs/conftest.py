"""Fixtures of the tests of the repository log."""

from __future__ import annotations

import asyncio

import pytest

from tests.refs.world import World


@pytest.fixture
async def world():
    a_world = World()
    yield a_world
    for log in a_world.logs:
        await log.aclose()
    assert asyncio.all_tasks() == {asyncio.current_task()}, "the logs left tasks behind"
