"""Hypothesis as a source of examples, by a seed and without a store of its own."""

from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as with_seed
from hypothesis.strategies import SearchStrategy


def try_examples(function: Callable[[Any], None], strategy: SearchStrategy, count: int, seed: str) -> None:
    """Call a function with that many examples. If one fails, raise the error of the simplest that fails."""

    @with_seed(seed)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    @given(strategy)
    def run(example):
        function(example)

    run()
