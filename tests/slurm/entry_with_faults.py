"""The package's training entry, which writes every loss down to the last bit and fails on demand.

A training script for ``ENTRY`` of examples/pretrain.sh. Environment:

``RUN_DIR``    ``losses/<rank>-<time>`` gets a line ``iteration micro-batch loss-as-hex`` per
               micro-batch
``STEP_TIME``  seconds that every step takes at least, so that there is time to disturb it; a file
               ``step_time`` in RUN_DIR overrides it at once
``FAULT``      ``KIND@ITERATION[@RANK]`` (rank 0 if none is given), once per run directory;
               ``always-KIND@…`` at every attempt. Kinds: ``nan`` makes the loss NaN, ``hang`` never
               returns, ``crash`` raises
"""

import os
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from megatron_xielu import pretrain_gpt

_RANK = os.environ["RANK"]
_STEP_TIME = os.environ.get("STEP_TIME", "0")
_RUN = Path(os.environ["RUN_DIR"])
_calls: Counter[int] = Counter()  # by iteration; a step that is computed again goes round


def _due(iteration: int) -> str | None:
    kind, _, where = os.environ.get("FAULT", "").partition("@")
    if not where or where not in (f"{iteration}@{_RANK}", f"{iteration}" if _RANK == "0" else ""):
        return None
    if kind.startswith("always-"):
        return kind.removeprefix("always-")
    try:
        (_RUN / f"fault-{kind}").touch(exist_ok=False)
    except FileExistsError:
        return None
    return kind


def main() -> None:
    """Train with eyes and faults."""
    (_RUN / "losses").mkdir(exist_ok=True)
    log = (_RUN / "losses" / f"{_RANK}-{time.time_ns()}").open("w", buffering=1)
    train = pretrain_gpt._train

    def train_with_faults(args: Namespace) -> None:
        from megatron_xielu import training_step  # which imports Megatron

        training_step.loss_func = partial(loss_and_fault, training_step.loss_func)
        train(args)

    def loss_and_fault(
        loss_func: Callable[..., tuple], loss_mask: torch.Tensor, token_losses: torch.Tensor
    ) -> tuple:
        from megatron.core.num_microbatches_calculator import get_num_microbatches
        from megatron.training import get_args

        iteration = get_args().curr_iteration
        if not torch.is_grad_enabled():
            return loss_func(loss_mask, token_losses)
        micro_batch = _calls[iteration] % get_num_microbatches()
        _calls[iteration] += 1
        if micro_batch == 0:
            override = _RUN / "step_time"
            time.sleep(float(override.read_text() if override.exists() else _STEP_TIME))
        fault = _due(iteration)
        if fault == "hang":
            time.sleep(100_000)
        if fault == "crash":
            raise RuntimeError(f"a fault at iteration {iteration}, on purpose")
        if fault == "nan":
            token_losses = token_losses * float("nan")
        result = loss_func(loss_mask, token_losses)
        if fault != "nan":
            log.write(f"{iteration} {micro_batch} {float(result[0]).hex()}\n")
        return result

    pretrain_gpt._train = train_with_faults
    pretrain_gpt.main()


if __name__ == "__main__":
    main()
