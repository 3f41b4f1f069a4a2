"""Errors that sessions raise."""

from __future__ import annotations


class ContextWindowError(ValueError):
    """Raised if the conversation and its answer exceed the context window. The session does not change."""
