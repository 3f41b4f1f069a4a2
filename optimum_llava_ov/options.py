"""Options that functions take as `**kwargs`: a misspelt one is an error, as it is for Python where all of them have names."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from difflib import get_close_matches


def check_options(function: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Check that there are no unknown names among the options of a function.

    Raises:
        `TypeError`: there is one; suggests the nearest.
    """
    known = sorted(known)
    for name in given:
        if name not in known:
            nearest = get_close_matches(name, known, n=1)
            advice = f"Did you mean {nearest[0]!r}?" if nearest else f"It takes {', '.join(known)}."
            raise TypeError(f"{function}() got an unknown option {name!r}. {advice}")


def names_of(function: Callable) -> set[str]:
    """Names of the options that a function takes, those of its `**kwargs` left out."""
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return {
        name for name, parameter in inspect.signature(function).parameters.items() if parameter.kind not in kinds
    } - {"self"}
