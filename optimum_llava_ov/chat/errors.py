"""What a session raises."""

from __future__ import annotations


class ContextWindowError(ValueError):
    """The conversation and room for the answer are more than the context window. The session stays as it was."""
