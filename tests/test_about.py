"""What the package says of itself."""

from __future__ import annotations

import pytest

import icechunk


def test_the_user_agent_names_package_and_version():
    assert icechunk.user_agent() == f"aioicechunk-{icechunk.__version__}"


def test_debug_info_names_what_a_report_needs(capsys: pytest.CaptureFixture[str]):
    icechunk.print_debug_info()
    lines = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines())
    assert {"platform", "python", "icechunk", "zarr", "numcodecs", "numpy"} <= set(lines)
    assert lines["icechunk"].strip() == icechunk.user_agent()
