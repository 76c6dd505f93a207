"""Errors that are the user's to mend."""

from __future__ import annotations

__all__ = ["UserError"]


class UserError(ValueError):
    """What the user gave cannot be used; the message stands on its own, without a traceback."""
