"""User errors: what the user gave cannot be used."""

from __future__ import annotations

__all__ = ["UserError"]


class UserError(ValueError):
    """A user error; its message is shown without a traceback."""
