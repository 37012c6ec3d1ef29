"""Lets a checkpoint that is loaded execute nothing.

A pickle calls what it names while it is read. PyTorch's distributed checkpoints unpickle
``.metadata``, and every record that is no tensor, without any restriction; so does Megatron
through them, though it has a list of what its own state may name (`megatron.core.safe_globals`) and
holds ``common.pt`` and the format ``torch`` to it. Here that list holds for the records, too, and
`pickled_names.METADATA` for ``.metadata``. In place of a check before the load: what was checked is
then what is read, wherever Megatron, a script or a plug-in of a file system reads it.

A script whose checkpoints have classes of its own says ``torch.serialization.add_safe_globals``.

In PyTorch 2.6 to 2.15 and Megatron 0.17.1, 0.18.2 and 0.19.2. No upstream change that ends it is
known.
"""

from __future__ import annotations

import functools
import pickle
from typing import Any

from megatron_xielu.common import pickled_names


class _Pickle:
    """Stands for the module `pickle` where ``.metadata`` is read."""

    def __getattr__(self, name: str) -> Any:
        return getattr(pickle, name)

    @staticmethod
    def load(file: Any) -> Any:
        """As `pickle.load`, of a ``.metadata``."""
        return pickled_names.Unpickler(file, pickled_names.metadata_class).load()


@functools.cache
def install() -> None:
    """Restrict what PyTorch's distributed checkpoints of this process unpickle."""
    import torch
    from torch.distributed.checkpoint import default_planner, filesystem

    filesystem.pickle = _Pickle()  # type: ignore[assignment]
    load_bytes = default_planner.DefaultLoadPlanner.load_bytes

    @functools.wraps(load_bytes)
    def load_restricted_bytes(self: Any, read_item: Any, value: Any) -> None:
        with torch.serialization.safe_globals(_numpys()):
            if names := torch.serialization.get_unsafe_globals_in_checkpoint(value):
                raise pickled_names.foreign(min(names), read_item.dest_index.fqn)
            value.seek(0)
            torch.load(value, map_location="cpu", weights_only=True)
        # The same bytes once more, as PyTorch does: what has been read calls nothing else.
        value.seek(0)
        load_bytes(self, read_item, value)

    default_planner.DefaultLoadPlanner.load_bytes = load_restricted_bytes  # type: ignore[method-assign]


def _numpys() -> list[Any]:
    """What numpy 1 and 2 call their own in a pickle; Megatron lists those of the installed one."""
    import numpy

    core = getattr(numpy, "_core", None) or numpy.core
    return [
        (getattr(core.multiarray, name), f"numpy.{module}.multiarray.{name}")
        for module in ("core", "_core")
        for name in ("_reconstruct", "scalar")
    ]
