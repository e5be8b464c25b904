"""How a command says that it could not do what it was asked for."""

from __future__ import annotations

__all__ = ["Failure"]


class Failure(Exception):
    """Ends the command with exit code 1 and this one line."""
