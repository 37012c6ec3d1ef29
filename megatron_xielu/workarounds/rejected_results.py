"""Lets a run without ``--save`` that meets a NaN or Inf end with the word for it.

Megatron's rerun state machine saves a checkpoint before it ends the run, also where there is no
folder to save to: the last line is then a TypeError about a path that is None.

In 0.19.2. No upstream change that ends it is known.
"""

from __future__ import annotations

import functools
from typing import Any


@functools.cache
def install() -> None:
    """Save nothing where nothing is to be saved."""
    from megatron.training import get_args, training

    save = training.save_checkpoint_and_time

    @functools.wraps(save)
    def save_where_there_is_a_folder(*args: Any, **kwargs: Any) -> Any:
        return save(*args, **kwargs) if get_args().save else None

    training.save_checkpoint_and_time = save_where_there_is_a_folder
