"""Reads Megatron's legacy checkpoints (``--ckpt-format torch``): a pickle per rank, merged here.

``iter_…/mp_rank_TT[_PPP]/model_optim_rng.pt`` holds what tensor-parallel rank TT of pipeline stage
PPP had. Shards are joined along the dimension that Megatron splits; layers are numbered through the
stages (and the virtual stages, whose chunks alternate). A replicated tensor is in every file: where
training let its replicas drift apart, their mean stands for them, and `Legacy.drift` says so.
"""

from __future__ import annotations

import itertools
import re
import zipfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_xielu.checkpoints import saved_arguments
from megatron_xielu.checkpoints.inert import load
from megatron_xielu.checkpoints.source import Refused
from megatron_xielu.kernels import reference

_FILE = "model_optim_rng.pt"
_FOLDER = re.compile(r"mp_rank_(\d\d)(?:_(\d\d\d))?")
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_NAMED = 4  # of missing files
_ALPHA = re.compile(r".*\.activation_func\.alpha_[pn]")

# End of a name: the dimension that tensor-parallel ranks split; None: each has all of it.
_SPLIT: dict[str, int | None] = {
    "word_embeddings.weight": 0,
    "output_layer.weight": 0,
    "linear_qkv.weight": 0,
    "linear_qkv.bias": 0,
    "linear_fc1.weight": 0,
    "linear_fc1.bias": 0,
    "linear_proj.weight": 1,
    "linear_fc2.weight": 1,
    "linear_proj.bias": None,
    "linear_fc2.bias": None,
    "layernorm.weight": None,
    "layernorm.bias": None,
    "layer_norm_weight": None,
    "layer_norm_bias": None,
    "activation_func.alpha_p": None,
    "activation_func.alpha_n": None,
}


def open_legacy(folder: Path, *, trust_pickle: bool) -> Legacy:
    """Open an ``iter_…`` folder with ``mp_rank_…`` folders in it.

    Args:
        folder: the checkpoint.
        trust_pickle: whether its pickles may be executed.

    Raises:
        Refused: they may not, or the files are not those of one whole dense GPT model.
    """
    if not trust_pickle:
        raise Refused(
            f"{folder} is a legacy checkpoint, of pickles, which can execute anything; if you "
            "trust its origin, add --trust-pickle"
        )
    return Legacy(folder)


class Legacy:
    """A legacy checkpoint (a `megatron_xielu.checkpoints.source.Source`): one tensor per layer.

    Args:
        folder: ``iter_…`` or ``release``. Its pickles are executed if they hold anything else than
            tensors and plain values.

    Raises:
        Refused: see `open_legacy`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        states = {rank: _load(path) for rank, path in _files(folder).items()}
        self.arguments = _arguments(folder, states)
        tensor_ranks = self.arguments.tensor_model_parallel_size
        stages = self.arguments.pipeline_model_parallel_size
        wanted = itertools.product(range(tensor_ranks), range(stages))
        missing = (f"mp_rank_{t:02}_{p:03}" for t, p in wanted if (t, p) not in states)
        if names := list(itertools.islice(missing, _NAMED)):
            raise Refused(f"{folder}: the files of {', '.join(names)} are missing")
        chunks = sorted(name for name in states[0, 0] if re.fullmatch(r"model\d*", str(name)))
        self._shards: dict[str, list[Tensor]] = {}  # by tensor-parallel rank
        layers = 0
        for chunk in chunks:
            for stage in range(stages):
                ranks: list[Any] = [states[rank, stage].get(chunk) for rank in range(tensor_ranks)]
                if not all(isinstance(rank, dict) for rank in ranks):
                    raise Refused(f"{folder}: not every file of stage {stage} has its {chunk}")
                layers += self._add(ranks, layers)
        if not layers:
            raise Refused(f"{folder}: no decoder.layers in it; is it from before megatron-core?")
        if not getattr(self.arguments, "untie_embeddings_and_output_weights", False):
            self._shards.pop("output_layer.weight", None)  # the last stage's copy of the embedding

    def _add(self, ranks: list[dict[str, Any]], first_layer: int) -> int:
        """Take in one chunk of one stage; return how many layers it has."""
        layers = 0
        for name, value in ranks[0].items():
            if not isinstance(value, Tensor) or name.endswith("_extra_state"):
                continue
            if match := _LAYER.fullmatch(name):
                layers = max(layers, int(match[1]) + 1)
                key = f"decoder.layers.{first_layer + int(match[1])}.{match[2]}"
            else:
                key = name
            shards: list[Any] = [rank.get(name) for rank in ranks]
            if not all(isinstance(x, Tensor) and x.shape == value.shape for x in shards):
                raise Refused(f"{self.folder}: {name} has not one shape on all tensor ranks")
            self._shards[key] = shards
            if (self._dimension(key) or 0) >= value.dim():
                raise Refused(f"{self.folder}: {name} is of shape {tuple(value.shape)}")
        return layers

    def keys(self) -> set[str]:
        """Keys of the model's tensors, with the layer's number in them."""
        return set(self._shards)

    def shape(self, key: str) -> tuple[int, ...]:
        """Of the merged tensor."""
        shards, dimension = self._shards[key], self._dimension(key)
        shape = list(shards[0].shape)
        if dimension is not None:
            shape[dimension] = sum(shard.shape[dimension] for shard in shards)
        return tuple(shape)

    def dtype(self, key: str) -> torch.dtype:
        """As stored."""
        return self._shards[key][0].dtype

    def read(self, key: str, layer: int | None = None) -> Tensor:
        """The merged tensor; the files are mapped, so that nothing else is read."""
        assert layer is None, key
        shards, dimension = self._shards[key], self._dimension(key)
        if len(shards) == 1:
            return shards[0]
        if dimension is None:
            return shards[0] if _equal(shards) else _mean(key, shards)
        if ".linear_fc1." in key and getattr(self.arguments, "swiglu", False):
            halves = [shard.chunk(2, dim=dimension) for shard in shards]  # gate and up, each rank
            shards = [half[i] for i in (0, 1) for half in halves]
        return torch.cat(shards, dim=dimension)

    def drift(self) -> dict[str, list[Tensor]]:
        """Replicated tensors that differ between tensor-parallel ranks: key → replicas."""
        return {
            key: shards
            for key, shards in self._shards.items()
            if len(shards) > 1 and self._dimension(key) is None and not _equal(shards)
        }

    def _dimension(self, key: str) -> int | None:
        for end, dimension in _SPLIT.items():
            if key.endswith(end):
                return dimension
        if len(self._shards[key]) == 1:
            return None
        raise Refused(f"{self.folder}: how tensor-parallel ranks share {key} is not known")


def _equal(shards: list[Tensor]) -> bool:
    return all(torch.equal(shards[0], shard) for shard in shards[1:])


def _mean(key: str, replicas: list[Tensor]) -> Tensor:
    """The mean replica; of an alpha, the raw value of the mean effective one.

    Each rank applied its own alpha to its own ffn columns, and the activation is linear in the
    effective alpha: the mean is the one alpha nearest to all of them in the least-squares sense, if
    their columns are alike.
    """
    stacked = torch.stack([replica.double() for replica in replicas])
    if not _ALPHA.fullmatch(key):
        return stacked.mean(dim=0).to(replicas[0].dtype)
    return reference.inverse_softplus(reference.softplus(stacked).mean(dim=0)).float()


def _files(folder: Path) -> dict[tuple[int, int], Path]:
    """(tensor-parallel rank, pipeline stage) → file."""
    files = {}
    for path in folder.glob("mp_rank_*"):
        match = _FOLDER.fullmatch(path.name)
        if not match:
            raise Refused(f"{path}: expert-parallel checkpoints are not supported")
        if not (path / _FILE).is_file():
            raise Refused(f"{path / _FILE} is missing")
        files[int(match[1]), int(match[2] or 0)] = path / _FILE
    return files


def _load(path: Path) -> dict[str, Any]:
    """One rank's state; pickled code is executed only if tensors and plain values are not all."""
    try:
        state = load(path, str(path))
    except Refused:
        try:
            mapped = zipfile.is_zipfile(path)
            state = torch.load(path, map_location="cpu", weights_only=False, mmap=mapped)
        except Exception as error:  # whatever a pickle may raise
            raise Refused(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    if not isinstance(state, dict) or not any(str(name).startswith("model") for name in state):
        raise Refused(f"{path} holds no model")
    return state


def _arguments(folder: Path, states: dict[tuple[int, int], dict[str, Any]]) -> Namespace:
    arguments = states.get((0, 0), {}).get("args")
    if not isinstance(arguments, Namespace):
        raise Refused(f"{folder}: mp_rank_00 has no Megatron arguments (args)")
    for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
        if not hasattr(arguments, name):
            raise Refused(f"{folder}: its arguments have no {name}")
    return saved_arguments.check(arguments, f"{folder}: mp_rank_00")
