"""Check options that functions take as `**kwargs`, so that a misspelt option raises an error."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from difflib import get_close_matches


def check_options(function: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Check that a function knows all options that it is given.

    Raises:
        `TypeError`: a name is unknown; suggests the nearest known name.
    """
    known = sorted(known)
    for name in given:
        if name not in known:
            nearest = get_close_matches(name, known, n=1)
            advice = f"Did you mean {nearest[0]!r}?" if nearest else f"It takes {', '.join(known)}."
            raise TypeError(f"{function}() got an unknown option {name!r}. {advice}")


def names_of(function: Callable) -> set[str]:
    """Return the names of the options that a function takes, without those in its `**kwargs`."""
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return {
        name for name, parameter in inspect.signature(function).parameters.items() if parameter.kind not in kinds
    } - {"self"}
