"""Fixtures of the tests of the repository log."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.log.repository.world import World


@pytest.fixture
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    """A world of the log layout, or of the test module's own ``new_world``."""
    a_world: World = getattr(request.module, "new_world", World)()
    yield a_world
    await a_world.aclose()
