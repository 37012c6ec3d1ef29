"""Checkpoints of the public research fork (and of any that trained alphas as it does) put right.

Found, told, and converted:

* alphas of global shape (L,), as its first ``torch_dist`` checkpoints have, instead of (L, 1);
* alphas in a 16-bit dtype: widened. The model computed with the rounded values, so they are taken
  rather than the optimizer's fp32 copies;
* replicas that drifted apart, since it does not sum alpha gradients over tensor-parallel ranks:
  the mean effective alpha (see `legacy`). Only legacy checkpoints keep them; in ``torch_dist`` only
  rank 0's is left, and that cannot be told from a healthy one.

Its arguments are Megatron's; those of its own that change the function are refused.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from megatron_xielu.checkpoints.legacy import Legacy
from megatron_xielu.checkpoints.source import Refused, Source
from megatron_xielu.kernels import reference

_ALPHA = re.compile(r"decoder\.layers\.(?:(\d+)\.)?mlp\.activation_func\.(alpha_[pn])")

# The fork's own arguments that change the function, at the value that changes nothing.
_NEUTRAL = {
    "xiprelup": False,
    "attn_layernorm": True,
    "mlp_layernorm": True,
    "final_layernorm": True,
    "post_layer_norm": False,
    "input_embeddings_multiplier": 1.0,
}


def adapt(source: Source, report: Callable[[str], None]) -> Source:
    """``source``, with alphas as this package stores them.

    Args:
        source: an opened checkpoint.
        report: told what was found, a line each; of a checkpoint of this package, nothing.

    Raises:
        Refused: the model is one that only the fork has.
    """
    for name, neutral in _NEUTRAL.items():
        value = getattr(source.arguments, name, neutral)
        if value != neutral:
            raise Refused(f"{source.folder}: only the fork has {name} = {value}")
    if isinstance(source, Legacy):
        _report_drift(source, report)
    alphas = sorted(key for key in source.keys() if _ALPHA.fullmatch(key))  # noqa: SIM118
    narrow = {source.dtype(key) for key in alphas} - {torch.float32, torch.float64}
    flat = [key for key in alphas if _is_flat(source, key)]
    if flat:
        layers = source.shape(flat[0])[0]
        report(f"alphas have the fork's old layout ({layers},): read as ({layers}, 1)")
    if narrow:
        dtypes = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in narrow))
        report(f"alphas are stored in {dtypes}: widened to float32, what rounding took is gone")
    return _Alphas(source) if flat or narrow else source


def _is_flat(source: Source, key: str) -> bool:
    """Whether the alphas of all layers are one 1-D tensor."""
    match = _ALPHA.fullmatch(key)
    return match is not None and match[1] is None and len(source.shape(key)) == 1


class _Alphas:
    """A source whose alphas are float32, of shape (L, 1) stacked and (1,) by layer."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.folder: Path = source.folder
        self.arguments: Namespace = source.arguments

    def keys(self) -> set[str]:
        return self._source.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        shape = self._source.shape(key)
        return (*shape, 1) if _is_flat(self._source, key) else shape

    def dtype(self, key: str) -> torch.dtype:
        return torch.float32 if _ALPHA.fullmatch(key) else self._source.dtype(key)

    def read(self, key: str, layer: int | None = None) -> Tensor:
        tensor = self._source.read(key, layer)
        if not _ALPHA.fullmatch(key):
            return tensor
        return (tensor[..., None] if _is_flat(self._source, key) else tensor).float()


def _report_drift(source: Legacy, report: Callable[[str], None]) -> None:
    drift = source.drift()
    if not drift:
        return
    report(
        "replicas differ between tensor-parallel ranks (gradients were not summed over them); no "
        "single value is what every rank computed with, and their mean is taken:"
    )
    for key in sorted(drift, key=_by_layer):
        match = _ALPHA.fullmatch(key)
        if match is None:
            spread = torch.stack([replica.double() for replica in drift[key]])
            worst = (spread.amax(0) - spread.amin(0)).max().item()
            report(f"  {key}: by up to {worst:.3g}")
            continue
        # xIELU's effective alpha_n has β on top, the same on every rank.
        effective = [reference.softplus(replica).item() for replica in drift[key]]
        mean = sum(effective) / len(effective)
        percent = 100 * (max(effective) - min(effective)) / mean
        values = ", ".join(f"{value:.6g}" for value in effective)
        report(
            f"  layer {match[1]}: softplus({match[2]}) is {values} on ranks 0 to "
            f"{len(effective) - 1}, {percent:.2g}% apart; {mean:.6g} taken"
        )


def _by_layer(key: str) -> tuple[int, str]:
    match = re.search(r"\.layers\.(\d+)\.", key)
    return (int(match[1]) if match else -1, key)
