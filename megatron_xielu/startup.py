"""What an entry does before it reads its flags: find Megatron, mend it, go to the CPU if need be.

Nothing of Megatron may be imported before: on a CPU it is imported into a redirected torch.
"""

from __future__ import annotations

import os
import sys

import torch

from megatron_xielu import workarounds
from megatron_xielu.common import torchrun
from megatron_xielu.kernels import choose
from megatron_xielu.workarounds import (
    checkpoint_writer,
    megatron_wheel,
    rejected_results,
    releases,
)

# What torchrun would say to a group of one. Port 0 is one that is free when PyTorch opens it;
# nobody else has to know it.
ALONE = {
    **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"},
    **{"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"},
}
_MEGATRON_HINT = "pip install 'megatron-core[training]>=0.19,<0.20'"


def start() -> None:
    """What comes before the flags: Megatron, imported, on a CPU where it has to be.

    Raises:
        SystemExit: it is missing, or of another release; or an environment variable is wrong.
    """
    _rendezvous_with_itself()
    on_cpu = "--cpu" in sys.argv or not torch.cuda.is_available()
    try:
        torchrun.check(os.environ)
        choose.check_forced("cpu" if on_cpu else "cuda")
    except ValueError as error:
        raise SystemExit(f"megatron_xielu: error: {error}") from None
    try:
        releases.check_entry()
        _prepare_megatron(on_cpu=on_cpu)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "megatron":
            raise
        raise SystemExit(f"megatron_xielu: error: {error}; {_MEGATRON_HINT}") from None
    except releases.UnsupportedRelease as error:
        raise SystemExit(f"megatron_xielu: error: {error}") from None


def _prepare_megatron(*, on_cpu: bool) -> None:
    """Import Megatron, redirected to the CPU where that is asked for or all there is."""
    if on_cpu:
        from megatron_xielu import cpu

        if "--cpu" in sys.argv:
            cpu.hide_gpus()
        sys.argv[1:] = cpu.add_cpu_flags(sys.argv[1:])
        cpu.activate()

    import megatron.training  # noqa: F401  (to say so where it is missing)

    megatron_wheel.prepare()
    checkpoint_writer.watch()
    rejected_results.install()
    workarounds.mend_optimizers()


def _rendezvous_with_itself() -> None:
    """Without torchrun, be a group of one: ``python -m megatron_xielu.pretrain_gpt`` then works."""
    if "RANK" in os.environ:
        return
    if "--inprocess-restart" in sys.argv:
        raise SystemExit("megatron_xielu: error: --inprocess-restart: start with torchrun")
    os.environ |= ALONE
