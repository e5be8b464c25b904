"""Reports of a load test: text for a terminal, and one HTML file."""

from __future__ import annotations
