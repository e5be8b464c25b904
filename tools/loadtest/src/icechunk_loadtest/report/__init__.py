"""What a load test found, for people: text for a terminal, and one HTML file."""

from __future__ import annotations
