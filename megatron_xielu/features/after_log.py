"""A call after each step that Megatron's training loop has logged, or passed over: no callback of
Megatron's (0.17 to 0.19) is there."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any


def call_after_training_log(call: Callable[[int], None]) -> None:
    """Wrap ``megatron.training.training.training_log``, which has the step, in this process.

    The loop looks it up when it comes to it.

    Args:
        call: with the iteration, on every rank.
    """
    from megatron.training import training

    training_log = training.training_log
    place = list(inspect.signature(training_log).parameters).index("iteration")

    @functools.wraps(training_log)  # whoever wraps it next looks for that place, too
    def log_and_call(*given: Any, **named: Any) -> Any:
        result = training_log(*given, **named)
        call(given[place])
        return result

    training.training_log = log_and_call
