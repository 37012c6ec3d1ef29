"""Prove of a layout that checkpoints keep the optimizer's state: all ranks' parts, in one process.

::

    python -m megatron_xielu.checkpoint_walk --gpus 88 -- --xielu --num-layers 24 …

with the arguments of the training, as `examples/pretrain.sh --dry-run` prints them. The installed
Megatron parses them, builds the model of each pipeline stage, lays out its gradient buffers, and
writes and loads the sharded state of every data-parallel rank; `proof` says what is checked. There
is no GPU, no other rank (`absent_ranks`), and no memory behind the tensors (`provenance`): seconds
for 88 GPUs, a minute for 512, at any size of the model.

What is walked is tensor-parallel (and expert-parallel) rank 0 of each stage. That the others have
the same parameters in the same shapes is checked; their layouts then are the same, since nothing
else goes into a layout. Checked is also that the model's own tensors of all these ranks cover each
tensor of the checkpoint once: with it, so do those of a ``fully_reshardable`` optimizer state.

Not walked: the files. What a rank hands to the writer is what Megatron's writer gets.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import io
import itertools
import math
import os
import sys
import time
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_xielu import cpu
from megatron_xielu.checkpoint_walk.absent_ranks import World
from megatron_xielu.checkpoint_walk.proof import FORMATS, Fault, Parameter, Proof, tensors
from megatron_xielu.checkpoint_walk.provenance import Piece, Provenance
from megatron_xielu.workarounds import releases

# Of parameters: what Megatron sorts them into buffers and buckets by, beside dtype and size.
_MARKS = ("allreduce", "shared_embedding")


class CannotWalk(Exception):
    """The arguments ask for something that this cannot follow."""


class Refused(Exception):
    """Megatron or this package refuses the arguments; a training would not start either."""


@dataclass
class Result:
    """What a walk has found: ``faults``, and how much was walked."""

    layout: str
    formats: Sequence[str]
    faults: list[Fault]
    parameters: int = 0  # of one rank of each stage
    ranks: int = 0  # optimizers that were walked
    # Elements of each bucket without the padding at its end, for each gradient buffer.
    buckets: list[list[int]] = field(default_factory=list)
    seconds: float = 0.0
    # By data-parallel group: `Proof.content`.
    content: list[dict[str, list[Piece]]] = field(default_factory=list)

    @property
    def line(self) -> str:
        """For people, and logs."""
        if not self.faults:
            return (
                f"ok: {self.layout}: each element of {self.parameters:,} parameters (one rank of "
                f"each stage) in {sum(map(len, self.buckets))} buckets is saved once and loaded "
                f"back on {self.ranks} ranks ({' and '.join(self.formats)}; {self.seconds:.0f} s)"
            )
        more = f" (and {len(self.faults) - 1} more)" if len(self.faults) > 1 else ""
        return f"FAIL: {self.layout}: {self.faults[0]}{more}; {self._advice}"

    @property
    def _advice(self) -> str:
        """What to change."""
        formats = {fault.format for fault in self.faults}
        megatron = "use a Megatron that docs/versions.md lists"
        if formats == {"fully_reshardable"}:
            return f"drop --dist-ckpt-optim-fully-reshardable, or {megatron}"
        if formats == {"dp_reshardable"}:
            return f"add --dist-ckpt-optim-fully-reshardable, or {megatron}"
        return megatron


def prepare(*, without: Sequence[str] = ()) -> None:
    """Redirect this process for good, before Megatron is imported: no GPU, no memory.

    Args:
        without: mends of Megatron's optimizers to leave out, by the names of their modules in
            `workarounds`. All others are in place, as in a training.
    """
    cpu.hide_gpus()
    with contextlib.suppress(ImportError):
        import transformer_engine.pytorch  # noqa: F401  (before torch.cuda is redirected)
    with contextlib.redirect_stderr(io.StringIO()):  # it says that Megatron runs on a CPU
        cpu.activate()
    tensor_type = torch.Tensor.type

    def without_meta(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = tensor_type(self, *args, **kwargs)
        return result.replace(".meta.", ".") if isinstance(result, str) else result

    torch.Tensor.type = without_meta  # type: ignore[method-assign]

    from megatron_xielu import workarounds

    # The one about shifted checkpoints looks at values, of which there are none.
    for name in (*without, "shifted_checkpoints"):
        mend: Any = importlib.import_module(f"megatron_xielu.workarounds.{name}")
        mend.install = lambda: None
    workarounds.mend_optimizers()


def parse(arguments: Sequence[str], gpus: int) -> Namespace:
    """Megatron's own view of ``arguments`` for a job of that many GPUs.

    Raises:
        Refused: it does not take them.
        CannotWalk: of this optimizer there is no proof.
    """
    from megatron.training import global_vars

    from megatron_xielu.arguments import parse_and_validate_args

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(gpus))
    argv, set_all = sys.argv, global_vars.set_global_variables
    sys.argv = ["checkpoint_walk", *_flags(), *arguments]
    global_vars.set_global_variables = global_vars.set_args  # no TensorBoard, no signal handlers
    output = io.StringIO()  # not for people
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            # No checkpoint: the preflight walks before damaged ones are set aside.
            args = parse_and_validate_args({"tokenizer_type": "GPT2BPETokenizer"}, resumes=False)
            if args.padded_vocab_size is None:
                global_vars._GLOBAL_TOKENIZER = None  # of arguments parsed before
                global_vars._build_tokenizer(args)
    except (SystemExit, AssertionError, ValueError, RuntimeError, OSError) as error:
        raise Refused(_why(error)) from error
    finally:
        sys.argv, global_vars.set_global_variables = argv, set_all
    if not args.use_distributed_optimizer:
        raise CannotWalk(
            f"only Adam's distributed optimizer is walked, and this is --optimizer {args.optimizer}"
            + " without --use-distributed-optimizer" * (args.optimizer == "adam")
        )
    return args


def _why(error: BaseException) -> str:
    """Some assertions of Megatron say nothing."""
    return str(error).removeprefix("megatron_xielu: error: ") or (
        f"{type(error).__name__} without a word in Megatron's checks; are the arguments complete?"
    )


def _flags() -> list[str]:
    flags = [*cpu.flags.REQUIRED_FLAGS, "--no-initialization"]
    if importlib.util.find_spec("transformer_engine"):
        flags = flags[2:]  # its layers order their parameters in another way than local ones
    return flags


def walk(
    arguments: Sequence[str],
    gpus: int,
    formats: Sequence[str] | None = None,
    *,
    compare_ranks: bool = True,
) -> Result:
    """Walk every pipeline stage of a layout.

    Args:
        arguments: of the training.
        gpus: in the job.
        formats: of `proof.FORMATS`; default: the one that the arguments choose.
        compare_ranks: also those of other tensor- and expert-parallel ranks. It does not depend on
            how many data-parallel ranks there are.

    Raises:
        Refused: Megatron does not take the arguments.
        CannotWalk: they ask for what this cannot follow.
    """
    from megatron.training import global_vars

    started = time.monotonic()
    args = parse(arguments, gpus)
    if not formats:
        formats = [FORMATS[args.dist_ckpt_optim_fully_reshardable]]
    differences = _compare_ranks(arguments, args) if compare_ranks else []
    result = Result(_describe(args), formats, differences)
    global_vars.set_args(args)
    with _on_no_memory() as trace:
        world = World(gpus)
        for rank in _first_ranks(args):
            world.become(rank)
            _initialize_parallel(args)
            _walk_stage(args, trace, world, result)
            gc.unfreeze()
    result.seconds = time.monotonic() - started
    return result


def _describe(args: Namespace) -> str:
    sizes = {
        "TP": args.tensor_model_parallel_size,
        "PP": args.pipeline_model_parallel_size,
        "CP": args.context_parallel_size,
        "EP": args.expert_model_parallel_size,
    }
    used = "".join(f", {name} {size}" for name, size in sizes.items() if size > 1)
    return f"{args.world_size} GPUs{used}, DP {args.data_parallel_size}"


def _compare_ranks(arguments: Sequence[str], args: Namespace) -> list[Fault]:
    """Whether all ranks of a stage have the same parameters, and all stages the whole model.

    In the smallest job that splits it this way: how many replicas there are makes no difference.
    """
    ranks = args.tensor_model_parallel_size * args.pipeline_model_parallel_size
    ranks *= args.context_parallel_size * args.expert_model_parallel_size
    return _differences(parse(arguments, ranks * args.num_distributed_optimizer_instances))


def _differences(args: Namespace) -> list[Fault]:
    from megatron.core import mpu
    from megatron.core.dist_checkpointing.mapping import is_main_replica

    faults: list[Fault] = []
    first: dict[int, list[Any]] = {}
    boxes, sizes = defaultdict(list), {}
    with _on_no_memory():
        world = World(args.world_size)
        for rank in range(args.world_size):
            world.become(rank)
            _initialize_parallel(args)
            model = _model(args, wrap_with_ddp=False)
            stage = mpu.get_pipeline_model_parallel_rank()
            mine = [
                (name, p.shape, p.dtype, p.requires_grad, *(getattr(p, m, None) for m in _MARKS))
                for part in model
                for name, p in part.named_parameters()
            ]
            if mine != first.setdefault(stage, mine):
                text = "other parameters than on the first rank of the stage"
                faults.append(Fault("model", f"stage {stage}", text, {rank}))
            for leaf in (leaf for part in model for leaf in tensors(part.sharded_state_dict())):
                if is_main_replica(leaf.replica_id):
                    shape = (1,) * leaf.prepend_axis_num + leaf.local_shape  # of the layers, say
                    boxes[leaf.key].append((leaf.global_offset, shape))
                    sizes[leaf.key] = leaf.global_shape
    for key, parts in boxes.items():
        if not _tile(parts, sizes[key]):
            faults.append(Fault("model", key, "is not written once by the ranks together"))
    return faults


def _tile(parts: list[tuple[tuple[int, ...], tuple[int, ...]]], size: tuple[int, ...]) -> bool:
    """Whether boxes, given by corner and shape, fill one of that size without overlap."""

    def overlap(one: Any, other: Any) -> bool:
        return all(
            start < other_start + other_length and other_start < start + length
            for start, length, other_start, other_length in zip(*one, *other, strict=True)
        )

    return (
        sum(math.prod(shape) for _, shape in parts) == math.prod(size)
        and not any(overlap(*pair) for pair in itertools.combinations(parts, 2))
        and all(
            start + length <= end
            for part in parts
            for start, length, end in zip(*part, size, strict=True)
        )
    )


def _first_ranks(args: Namespace) -> list[int]:
    """The first rank of each pipeline stage."""
    stages = args.pipeline_model_parallel_size
    step = args.world_size // stages
    if args.use_tp_pp_dp_mapping:
        step = step // args.data_parallel_size
    return [stage * step for stage in range(stages)]


def _initialize_parallel(args: Namespace) -> None:
    from megatron.core import mpu

    mpu.destroy_model_parallel()
    mpu.initialize_model_parallel(
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        args.virtual_pipeline_model_parallel_size,
        context_parallel_size=args.context_parallel_size,
        expert_model_parallel_size=args.expert_model_parallel_size,
        expert_tensor_parallel_size=args.expert_tensor_parallel_size,
        num_distributed_optimizer_instances=args.num_distributed_optimizer_instances,
        order="tp-cp-ep-pp-dp" if args.use_tp_pp_dp_mapping else "tp-cp-ep-dp-pp",
        create_gloo_process_groups=args.use_gloo_process_groups,
    )


def _model(args: Namespace, **options: Any) -> list[Any]:
    """The model of the rank that this process is, with its gradient buffers, as training has it."""
    if releases.release() < releases.ENTRY:
        return _older_model(args, **options)
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.training import get_megatron_ddp_config

    from megatron_xielu.layer_specs import model_config

    config = model_config(args)
    return config.get_builder_cls()(config).build_distributed_models(
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        ddp_config=get_megatron_ddp_config(args),
        overlap_param_gather_with_optimizer_step=args.overlap_param_gather_with_optimizer_step,
        **options,
    )


def _older_model(args: Namespace, **options: Any) -> list[Any]:
    """As Megatron-LM's pretrain_gpt.py of those releases builds it, with ``--spec``."""
    from megatron.core.models.gpt import GPTModel
    from megatron.training.arguments import core_transformer_config_from_args
    from megatron.training.training import get_model

    from megatron_xielu.activation_slot import with_activation
    from megatron_xielu.arguments import activation_builder

    builder, spec = activation_builder(args), releases.dense_layer_spec(args)

    def provide(**stage: Any) -> Any:
        stage.pop("config", None)
        return GPTModel(
            config=core_transformer_config_from_args(args),
            transformer_layer_spec=with_activation(spec, builder) if builder else spec,
            vocab_size=args.padded_vocab_size,
            max_sequence_length=args.max_position_embeddings,
            share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
            position_embedding_type=args.position_embedding_type,
            **stage,
        )

    return get_model(provide, **options)


def _optimizers(args: Namespace, model: list[Any]) -> list[Any]:
    from megatron.core.optimizer import get_megatron_optimizer
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.training import training

    from megatron_xielu.features import parameter_groups

    parameter_groups.install_if_asked(args)
    config, overrides = training.get_megatron_optimizer_config(args)
    chain = get_megatron_optimizer(
        config,
        model,
        config_overrides=overrides,
        use_gloo_process_groups=args.use_gloo_process_groups,
    )
    optimizers = getattr(chain, "chained_optimizers", [chain])
    for optimizer in optimizers:
        if not isinstance(optimizer, DistributedOptimizer):
            raise CannotWalk(f"--optimizer {args.optimizer}")
    return optimizers


def _walk_stage(args: Namespace, trace: Provenance, world: World, result: Result) -> None:
    from megatron.training.checkpointing import _build_sharded_state_dict_metadata

    model = _model(args)
    named = {
        parameter: ((chunk, name), Parameter(name.split("module.")[-1], parameter.numel()))
        for chunk, part in enumerate(model)
        for name, parameter in part.named_parameters()
        if parameter.requires_grad
    }

    def know_parameters() -> None:
        for parameter, (key, _) in named.items():
            numel = parameter.numel()
            trace.write(parameter.data, [Piece(0, numel, (key, "param"), 0)] if numel else [])

    metadata = {}
    args.distrib_optim_fully_reshardable_mem_efficient = False  # the first rank gathers either way
    for form in result.formats:
        args.dist_ckpt_optim_fully_reshardable = form == "fully_reshardable"
        metadata[form] = _build_sharded_state_dict_metadata(args)

    def model_state() -> dict[str, Any]:
        return {
            f"model{chunk}": part.sharded_state_dict(metadata=metadata[result.formats[0]])
            for chunk, part in enumerate(model)
        }

    optimizers = _optimizers(args, model)
    groups = [optimizer.data_parallel_group for optimizer in optimizers]
    owned = [
        dict(named[parameter] for buffer in optimizer.buffers for parameter in buffer.params)
        for optimizer in optimizers
    ]
    for key, parameter in named.values():
        if sum(key in parameters for parameters in owned) != 1:
            result.faults.append(Fault("model", parameter.name, "has no optimizer, or several"))
    proofs = [
        Proof(trace, metadata, parameters, lambda rank: setattr(world, "rank", rank))
        for parameters in owned
    ]
    know_parameters()
    gc.collect()
    gc.freeze()  # Megatron collects garbage for each rank; not the model again each time
    state = model_state()
    for rank in dict.fromkeys(rank for group in groups for rank in group.ranks):
        world.rank = rank
        for group, proof, optimizer in zip(groups, proofs, _optimizers(args, model), strict=True):
            if rank in group.ranks:
                proof.add(rank, optimizer, state)
                result.ranks += 1
    for proof in proofs:
        know_parameters()  # loading writes into fp32 parameters
        result.faults += proof.finish(model_state)
        result.content.append(proof.content)
    result.parameters += sum(parameter.numel for _, parameter in named.values())
    result.buckets += [
        [bucket.numel_unpadded for bucket in buffer.buckets]
        for part in model
        for buffer in [*part.buffers, *part.expert_parallel_buffers]
    ]


@contextlib.contextmanager
def _on_no_memory() -> Iterator[Provenance]:
    """Megatron also says what it builds, for each rank: not here."""
    with contextlib.redirect_stdout(io.StringIO()), Provenance() as trace:
        yield trace
