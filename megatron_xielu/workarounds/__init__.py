"""Faults of Megatron that training with this package would meet: one file, one fault.

Each says which releases have it and which upstream change ends it, and does nothing where it is
gone. `mend_optimizers` applies those that decide what an optimizer writes into a checkpoint, and
lets no checkpoint execute code that is loaded from then on.
"""

from __future__ import annotations

import functools
import sys
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from typing import Any


@functools.cache
def mend_optimizers() -> None:
    """Let Megatron's optimizers save and load their state as it is, whatever the activation.

    Every way in calls this before a checkpoint can be written: this package's entry, ``--spec``,
    patched checkouts, Megatron-Bridge, and the launcher for the ranks of any script.
    """
    from megatron_xielu.workarounds import (
        checkpoint_pickles,
        distributed_optimizer_checkpoints,
        early_checkpoints,
        fp32_parameters,
        shifted_checkpoints,
    )

    checkpoint_pickles.install()
    fp32_parameters.install()
    distributed_optimizer_checkpoints.install()
    early_checkpoints.install()
    shifted_checkpoints.install()


class _AfterImport(MetaPathFinder):
    """Calls `mend_optimizers` when this process has imported Megatron's optimizers."""

    _module = "megatron.core.optimizer"

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != self._module:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_mend(module: Any) -> None:
            execute(module)
            mend_optimizers()

        spec.loader.exec_module = execute_and_mend  # type: ignore[method-assign]
        return spec


def mend_optimizers_when_imported() -> None:
    """`mend_optimizers` for a script that has yet to import Megatron, in its own time and way; what
    it loads is restricted at once."""
    from megatron_xielu.workarounds import checkpoint_pickles

    checkpoint_pickles.install()
    if _AfterImport._module in sys.modules:
        mend_optimizers()
    else:
        sys.meta_path.insert(0, _AfterImport())
