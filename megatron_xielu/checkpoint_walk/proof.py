"""What a checkpoint of `DistributedOptimizer` must satisfy, checked for the ranks of one group.

Given the optimizer of each rank of a data-parallel group, on tensors whose elements are followed
(`provenance`), and Megatron's own sharded state of them:

``dp_reshardable``     a tensor for each bucket and kind of state (weight, both moments), written in
                       pieces by the ranks
``fully_reshardable``  a tensor for each parameter and kind of state, gathered from all ranks

written exactly once   the pieces cover every tensor of the checkpoint, once, and nothing outside
                       it; every element of every parameter's state is among them, once
in its place           ``fully_reshardable``: where the model's own checkpoint has that element of
                       the parameter, for that is what other parallel sizes go by
read back              after Megatron's load, each rank's weights and moments consist of the
                       elements that they had

For ``fully_reshardable`` Megatron gathers the state of all ranks on every rank. Here each rank's
part is made by Megatron's code for that rank; it puts all of them together on the first and on the
last rank only. What it does on the others is the same work on the same parts.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megatron_xielu.checkpoint_walk.provenance import Piece, Provenance, cut, joined

FORMATS = ("dp_reshardable", "fully_reshardable")

_WEIGHT = "param"  # Megatron's name of the fp32 weight among the kinds of state
_ALL = "all parameters"

# What Megatron raises where a layout breaks it; anything else is a fault of the walk.
_FAILURES = (AssertionError, ValueError, RuntimeError, LookupError)


@dataclass
class Fault:
    """Something that the proof does not hold for, and the ranks that it was seen on."""

    format: str
    parameter: str  # or a tensor of the checkpoint
    text: str
    ranks: set[int] = field(default_factory=set)

    def __str__(self) -> str:
        ranks = f", on {len(self.ranks)} ranks" if len(self.ranks) > 1 else ""
        return f"{self.format}: {self.parameter}: {self.text}{ranks}"


class Parameter(NamedTuple):
    """A parameter of the model: the name of its tensor, and its number of elements."""

    name: str
    numel: int


class _Part(NamedTuple):
    """What one rank writes of a tensor of the checkpoint."""

    start: int
    stop: int
    pieces: list[Piece]


@dataclass
class _Rank:
    rank: int
    optimizer: Any
    template: Any = None  # what it asks of a dp_reshardable checkpoint
    owned: list[tuple[torch.Tensor, list[Piece]]] = field(default_factory=list)
    sent: list[list[Piece]] = field(default_factory=list)  # when the state is gathered


class Proof:
    """Both formats, for one data-parallel group: `add` each of its ranks in order, then `finish`.

    Args:
        trace: active.
        metadata: what Megatron's ``sharded_state_dict`` is given, for each format to be walked.
        parameters: those of this group. The trace knows their elements by ``(key, "param")``.
        become: be the rank of that number.
    """

    def __init__(
        self,
        trace: Provenance,
        metadata: Mapping[str, dict[str, Any]],
        parameters: Mapping[Any, Parameter],
        become: Callable[[int], None],
    ) -> None:
        self._trace, self._metadata, self._parameters = trace, metadata, parameters
        self._become = become
        self._ranks: list[_Rank] = []
        self._faults: dict[tuple[str, str], Fault] = {}
        self._broken: set[str] = set()  # formats in which Megatron itself gives up
        self._kinds = {_WEIGHT}
        # Of the dp_reshardable checkpoint:
        self._parts: dict[str, list[_Part]] = defaultdict(list)
        self._sizes: dict[str, int] = {}
        self._objects: dict[str, Any] = {}

    # --- one rank ---------------------------------------------------------------------------------

    def add(self, rank: int, optimizer: Any, model_state: Any) -> None:
        """Write the part of a checkpoint of the rank that this process is at the moment.

        Args:
            rank: its number.
            optimizer: its optimizer, newly built.
            model_state: the model's sharded state on it.
        """
        here = _Rank(rank, optimizer)
        self._ranks.append(here)
        # Loading comes first, as in a run that is resumed: it allocates the moments.
        if "dp_reshardable" in self._metadata:
            here.template = self._sharded(here, "dp_reshardable", model_state, is_loading=True)
        else:
            optimizer.load_state_dict(optimizer.state_dict())
        here.owned = list(self._owned(optimizer))
        if "dp_reshardable" in self._metadata:
            self._write_buckets(self._sharded(here, "dp_reshardable", model_state), rank)
        if "fully_reshardable" in self._metadata:
            self._send(here)

    def _owned(self, optimizer: Any) -> Iterator[tuple[torch.Tensor, list[Piece]]]:
        """The weights and moments that a rank steps, with what they are."""
        inner = optimizer.optimizer
        for weight in (weight for group in inner.param_groups for weight in group["params"]):
            pieces = self._trace.read(weight)
            if sum(piece.stop - piece.start for piece in pieces) != weight.numel():
                raise NotImplementedError("an optimizer whose weights are no copies of parameters")
            yield weight, pieces
            for kind, moment in inner.state[weight].items():
                if isinstance(moment, torch.Tensor) and moment.shape == weight.shape:
                    self._kinds.add(kind)
                    its = _of_kind(pieces, kind)
                    self._trace.write(moment, its)
                    yield moment, its

    def _sharded(
        self, here: _Rank, form: str, model_state: Any, *, is_loading: bool = False
    ) -> dict | None:
        with self._failures(form, here.rank):
            return here.optimizer.sharded_state_dict(
                model_state, is_loading=is_loading, metadata=self._metadata[form]
            )
        return None

    def _write_buckets(self, state: dict | None, rank: int) -> None:
        from megatron.core.dist_checkpointing.mapping import (
            ShardedObject,
            ShardedTensor,
            is_main_replica,
        )

        for leaf in _leaves(state):
            if isinstance(leaf, ShardedObject):
                self._objects.setdefault(leaf.key, leaf.data)
            elif isinstance(leaf, ShardedTensor) and is_main_replica(leaf.replica_id):
                (start,), (size,) = leaf.global_offset, leaf.global_shape
                (length,) = leaf.local_shape
                if leaf.data.numel() != length or self._sizes.setdefault(leaf.key, size) != size:
                    self._fault("dp_reshardable", leaf.key, "is of another size", rank)
                pieces = [piece.shifted(start) for piece in self._trace.read(leaf.data)]
                self._parts[leaf.key].append(_Part(start, start + length, pieces))

    def _send(self, here: _Rank) -> None:
        def gather(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> None:
            here.sent.append(self._trace.read(tensor))

        with self._failures("fully_reshardable", here.rank), _collective("gather", gather):
            # The first rank also puts together what it gets, which here is nothing: `_reassemble`.
            here.optimizer.get_parameter_state_dp_zero(
                use_gloo_comm=False, return_on_all_ranks=False
            )

    # --- all ranks --------------------------------------------------------------------------------

    def finish(self, model_state: Callable[[], Any]) -> list[Fault]:
        """Check what the ranks have written, load it on each of them, and check that.

        Args:
            model_state: returns the model's sharded state on the rank that this process is.
        """
        loaded = None
        if self._is_whole("dp_reshardable"):
            self._check_buckets()
        if self._is_whole("fully_reshardable"):
            for here in self._ranks[:: max(1, len(self._ranks) - 1)]:  # the first, then the last
                self._become(here.rank)
                loaded = self._reassemble(here, model_state())
        if self._is_whole("dp_reshardable"):
            self._load_buckets()
        if loaded is not None:
            self._load_parameters(loaded)
        return list(self._faults.values())

    def _is_whole(self, form: str) -> bool:
        return form in self._metadata and form not in self._broken

    @property
    def content(self) -> dict[str, list[Piece]]:
        """The tensors of the dp_reshardable checkpoint, and what they are.

        Where it is the same for two data-parallel sizes, each can load what the other wrote.
        """
        return {
            key: joined(piece for part in sorted(parts) for piece in part.pieces)
            for key, parts in self._parts.items()
        }

    def _check_buckets(self) -> None:
        form = "dp_reshardable"
        elements: dict[tuple[Any, str], list[tuple[int, int]]] = defaultdict(list)
        for key, parts in self._parts.items():
            self._check_cover(form, key, [part[:2] for part in parts], self._sizes[key])
            for piece in (piece for part in parts for piece in part.pieces):
                if piece.source[1] != key.rpartition(".")[2]:
                    self._fault(form, self._name(piece.source), f"is written into {key}")
                elements[piece.source].append((piece.first, piece.first + piece.stop - piece.start))
        for source, numel in self._sources():
            self._check_cover(form, self._name(source), elements[source], numel)

    def _sources(self) -> Iterator[tuple[tuple[Any, str], int]]:
        for key, parameter in self._parameters.items():
            for kind in self._kinds:
                yield (key, kind), parameter.numel

    def _check_cover(self, form: str, what: str, parts: list[tuple[int, int]], size: int) -> None:
        """Whether ``parts`` make up 0 to ``size``, each element once."""
        end = 0
        for start, stop in sorted(parts):
            if start > end:
                self._fault(form, what, f"elements {end} to {start} are not written")
            elif start < end:
                self._fault(form, what, f"elements {start} to {min(end, stop)} are written twice")
            end = max(end, stop)
        if end > size:
            self._fault(form, what, f"elements {size} to {end} are written, and it ends before")
        elif end < size:
            self._fault(form, what, f"elements {end} to {size} are not written")

    def _load_buckets(self) -> None:
        from megatron.core.dist_checkpointing.dict_utils import merge
        from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
        from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
        from megatron.core.dist_checkpointing.utils import extract_sharded_base

        content = self.content

        def read(leaf: Any) -> Any:
            if isinstance(leaf, ShardedObject):
                return self._objects[leaf.key]
            if not isinstance(leaf, ShardedTensor):
                return leaf
            (start,), (length,) = leaf.global_offset, leaf.local_shape
            if leaf.global_shape != (self._sizes[leaf.key],):
                raise ValueError(f"{leaf.key} has {self._sizes[leaf.key]} elements")
            tensor = torch.empty(length, dtype=leaf.dtype, device="meta")
            pieces = cut(content[leaf.key], start, start + length)
            self._trace.write(tensor, [piece.shifted(-start) for piece in pieces])
            return tensor

        def load(template: Any) -> Any:
            # As `dist_checkpointing.load` takes a state apart, reads, and puts it together.
            template, kept, _ = load_preprocess(template)
            sharded, common = extract_sharded_base(template)
            return merge(merge(common, kept), _mapped(read, sharded))

        for here in self._ranks:
            self._become(here.rank)
            self._load(here, "dp_reshardable", lambda: load(here.template))  # noqa: B023

    def _reassemble(self, here: _Rank, model_state: Any) -> Any:
        """Check what a rank makes of the parts of all ranks; returns what it then loads."""
        from megatron.core.dist_checkpointing.mapping import is_main_replica

        form = "fully_reshardable"
        calls = zip(*(rank.sent for rank in self._ranks), strict=True)

        def all_gather(everyone: list[torch.Tensor], *args: Any, **kwargs: Any) -> None:
            for tensor, pieces in zip(everyone, next(calls), strict=True):
                self._trace.write(tensor, pieces)

        with _collective("all_gather", all_gather):
            saved = self._sharded(here, form, model_state)
        if saved is None:
            return None
        model = {(leaf.key, leaf.global_offset): leaf for leaf in tensors(model_state)}
        content: dict[tuple[str, tuple[int, ...]], list[Piece]] = {}
        numel: dict[tuple[Any, str], int] = defaultdict(int)
        written = [item for state in saved["param_state"].values() for item in state.items()]
        for kind, leaf in ((kind, leaf) for kind, state in written for leaf in tensors(state)):
            place = leaf.key, leaf.global_offset
            of = model.get((leaf.key.removeprefix(f"optimizer.state.{kind}."), place[1]))
            if of is None or of.local_shape != leaf.local_shape or of.key == leaf.key:
                self._fault(form, leaf.key, "has no counterpart in the model", here.rank)
                continue
            if place in content:
                self._fault(form, leaf.key, "is written twice", here.rank)
            if is_main_replica(leaf.replica_id) != is_main_replica(of.replica_id):
                self._fault(form, leaf.key, "is not written where the weight is", here.rank)
            right = _of_kind(self._trace.read(of.data), kind)
            content[place] = self._trace.read(leaf.data)
            for piece in right:
                numel[piece.source] += piece.stop - piece.start
            self._compare(form, right, content[place], here.rank)
        for source, size in self._sources():
            if numel[source] != size:
                text = f"{numel[source]} of {size} elements are written"
                self._fault(form, self._name(source), text, here.rank)
        return self._loaded(here, model_state, content)

    def _loaded(self, here: _Rank, model_state: Any, content: dict) -> Any:
        from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factory_merges
        from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess

        template = self._sharded(here, "fully_reshardable", model_state, is_loading=True)
        if template is None:
            return None
        template, _, factories = load_preprocess({"param_state": template["param_state"]})

        def read(leaf: Any) -> Any:
            if not isinstance(leaf, ShardedTensor):
                return leaf
            tensor = torch.empty(leaf.local_shape, dtype=leaf.dtype, device="meta")
            self._trace.write(tensor, content[leaf.key, leaf.global_offset])
            return tensor

        with self._failures("fully_reshardable", here.rank):
            return apply_factory_merges(_mapped(read, template), factories)["param_state"]
        return None

    def _load_parameters(self, loaded: Any) -> None:
        form = "fully_reshardable"
        for here in self._ranks:
            self._become(here.rank)
            common = here.optimizer.state_dict()
            state = {**common, "param_state": loaded, "param_state_sharding_type": form}
            self._load(here, form, lambda: state)  # noqa: B023

    def _load(self, here: _Rank, form: str, state: Callable[[], Any]) -> None:
        for tensor, _ in here.owned:
            self._trace.write(tensor, [])
        with self._failures(form, here.rank):
            here.optimizer.load_state_dict(state())
            for tensor, pieces in here.owned:
                self._compare(form, pieces, self._trace.read(tensor), here.rank, "after loading, ")

    # --- faults -----------------------------------------------------------------------------------

    def _compare(
        self, form: str, right: list[Piece], found: list[Piece], rank: int, when: str = ""
    ) -> None:
        """Whether a tensor consists of the elements that it should consist of."""
        right, found = joined(right), joined(found)
        if right == found:
            return
        for piece in right:
            at = piece.start
            end = Piece(piece.stop, piece.stop, None, 0)
            for other in [*cut(found, piece.start, piece.stop), end]:
                element = piece.first + at - piece.start
                text = ""
                if other.start > at:
                    text = f"elements {element} to {element + other.start - at} are nothing of it"
                elif other.source and (other.source, other.first) != (piece.source, element):
                    text = f"element {element} is element {other.first} of "
                    text += self._name(other.source)
                if text:
                    self._fault(form, self._name(piece.source), f"{when}{text}", rank)
                    return
                at = other.stop
        self._fault(form, _ALL, f"{when}there are elements where none should be", rank)

    def _name(self, source: tuple[Any, str]) -> str:
        key, kind = source
        return self._parameters[key].name + (f" ({kind})" if kind != _WEIGHT else "")

    def _fault(self, form: str, what: str, text: str, rank: int | None = None) -> None:
        fault = self._faults.setdefault((form, what), Fault(form, what, text))
        fault.ranks |= set() if rank is None else {rank}

    @contextlib.contextmanager
    def _failures(self, form: str, rank: int) -> Iterator[None]:
        """What Megatron raises is a fault of the layout."""
        try:
            yield
        except _FAILURES as error:
            self._broken.add(form)
            text = " ".join(f"{type(error).__name__}: {error}".split())
            self._fault(form, _ALL, f"Megatron fails: {text[:300]}", rank)


@contextlib.contextmanager
def _collective(name: str, replacement: Callable[..., None]) -> Iterator[None]:
    before = getattr(dist, name)
    setattr(dist, name, replacement)
    try:
        yield
    finally:
        setattr(dist, name, before)


def _of_kind(pieces: list[Piece], kind: str) -> list[Piece]:
    """The same elements of another kind of state."""
    return [piece._replace(source=(piece.source[0], kind)) for piece in pieces]


def _leaves(state: Any) -> Iterator[Any]:
    if isinstance(state, dict | list):
        for value in state.values() if isinstance(state, dict) else state:
            yield from _leaves(value)
    else:
        yield state


def _mapped(function: Callable[[Any], Any], state: Any) -> Any:
    if isinstance(state, dict):
        return {key: _mapped(function, value) for key, value in state.items()}
    if isinstance(state, list):
        return [_mapped(function, value) for value in state]
    return function(state)


def tensors(state: Any) -> Iterator[Any]:
    """The ``ShardedTensor`` objects of a sharded state, as they are written."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    for leaf in _leaves(state):
        if isinstance(leaf, ShardedTensorFactory):
            yield from tensors(leaf.build())
        elif isinstance(leaf, ShardedTensor):
            yield leaf
