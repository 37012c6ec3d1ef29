"""The layouts in which a plan fits, and how long a step takes in each: an estimate.

Dimension legend: t, p, c, d parallel sizes, v virtual stages, m micro-batches a step; T tokens of a
micro-batch on a GPU (b·s/c), h hidden, L layers.

    compute    FLOPs of a step / (GPUs × peak × MFU), × 4/3 with full recomputation, whose forward
               pass is done again (one of three parts; arXiv 2205.05198)
    bubble     (p − 1)/(v·m) of that: 1F1B and the interleaved schedule (arXiv 2104.04473)
    tensor     m · L/p · n · (t − 1)/t · 2·T·h bytes / rate; n = 10 with sequence parallelism (two
               all-gathers and two reduce-scatters forward, as many backward, and both inputs
               gathered once more), else 8 (four all-reduces); none of it is hidden
    data       (gradient + weight bytes) · parameters of a GPU · (d − 1)/d / rate: hidden behind the
               passes of one micro-batch where --overlap-grad-reduce and --overlap-param-gather are
               given
    rate       NVLink on one node. Beyond it the node's network × the group's ranks there / GPUs of
               the node, and no more than NVLink: a ring passes a group's bytes through each node
               once, and the groups of a node share its cards

The MFU is that of `throughput`, of runs without tensor and pipeline parallelism, so that these
costs come on top. NVLink and network are taken at the rates that `gpus` and `run.Cluster` state,
which no collective reaches in full. Not counted: context parallelism's exchange of keys and values,
which Transformer Engine hides behind attention; what pipeline stages send each other; the
all-to-all of experts; stages that hold a table beside their layers; kernels that a small
micro-batch or slice leaves less busy. None of it has been timed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_xielu.plan import checks
from megatron_xielu.plan.run import Plan

_LONG = 4096  # tokens that a context-parallel rank has at least
_SAME = 1.01  # times that differ by less are the same
_FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"


@dataclass(frozen=True)
class Seconds:
    """Of a step, by what they are spent on."""

    compute: float
    bubble: float
    tensor: float
    data: float

    @property
    def total(self) -> float:
        """Their sum."""
        return self.compute + self.bubble + self.tensor + self.data


@dataclass(frozen=True)
class Layout:
    """One that fits. ``recomputes``: all layers; ``is_this``: the plan's own."""

    tensor: int
    pipeline: int
    context: int
    data: int
    micro_batch: int
    accumulation: int
    recomputes: bool
    gib: float
    seconds: Seconds
    is_this: bool


def seconds(plan: Plan) -> Seconds:
    """How long a step takes, by this file's formulas."""
    args, m, cluster = plan.args, plan.model, plan.cluster
    again = 4 / 3 if args.recompute_granularity == "full" else 1.0
    compute = plan.seconds_per_step() * again
    bubble = compute * (plan.pipeline - 1) / (plan.virtual * plan.accumulation)

    def rate(group: int, *, apart: int = 1) -> float:
        """Bytes a second of a group whose ranks are so many GPUs apart."""
        on_node = min(group, max(1, cluster.gpus_per_node // apart))
        share = cluster.network * on_node / cluster.gpus_per_node
        nvlink = cluster.gpu.nvlink
        return 1e9 * (nvlink if on_node == group else min(nvlink, share))

    size = plan.element * plan.micro_batch * m.sequence / plan.context * m.hidden
    passes = (10 if plan.sequence_parallel else 8) * (1 - 1 / plan.tensor)
    tensor = plan.accumulation * m.layers / plan.pipeline * passes * size / rate(plan.tensor)

    group = plan.data * plan.context
    sent = (plan.gradient + plan.element) * plan.parameters_on(plan.largest_stage())
    data = sent * (1 - 1 / group) / rate(group, apart=plan.tensor)
    if args.overlap_grad_reduce and args.overlap_param_gather:
        data = max(0.0, data - compute / plan.accumulation)
    return Seconds(compute, bubble, tensor, data)


def seconds_per_step(plan: Plan) -> float:
    """What a run's hours are counted with: with these costs, but where the MFU was given, which has
    them in it."""
    return plan.seconds_per_step() if plan.cluster.mfu is not None else seconds(plan).total


def fitting(plan: Plan) -> list[Layout]:
    """The layouts of the plan's GPUs and global batch that fit, the fastest first.

    Of each set of parallel sizes the best micro-batch, the largest where times are the same; and
    full recomputation only where nothing fits without.
    """
    found = []
    for tensor, pipeline, context in _sizes(plan):
        sizes = (
            f"--tensor-model-parallel-size {tensor} --pipeline-model-parallel-size {pipeline} "
            f"--context-parallel-size {context}" + " --sequence-parallel" * (tensor > 1)
        )
        data = plan.cluster.gpus // (tensor * pipeline * context)
        for recompute in ("", _FULL):
            layouts = [
                layout
                for micro in _micro_batches(plan, data)
                if (layout := _layout(plan, f"{sizes} --micro-batch-size {micro} {recompute}"))
            ]
            if layouts:
                fastest = min(layout.seconds.total for layout in layouts)
                as_fast = [one for one in layouts if one.seconds.total <= _SAME * fastest]
                found.append(max(as_fast, key=lambda layout: layout.micro_batch))
                break
    return sorted(found, key=lambda layout: layout.seconds.total)


def _sizes(plan: Plan) -> Iterator[tuple[int, int, int]]:
    m, gpus = plan.model, plan.cluster.gpus
    for tensor in (1, 2, 4, 8):
        for pipeline in (1, 2, 4, 8, 16):
            for context in (1, 2, 4, 8):
                divides = gpus % (tensor * pipeline * context) == 0
                divides = divides and m.layers % pipeline == 0 and m.heads % tensor == 0
                on_node = tensor <= plan.cluster.gpus_per_node
                long = context in (1, plan.context) or m.sequence // context >= _LONG
                if divides and on_node and long:
                    yield tensor, pipeline, context


def _micro_batches(plan: Plan, data: int) -> list[int]:
    sizes = {1, 2, 3, 4, 5, 6, 8, plan.micro_batch}
    return sorted(size for size in sizes if plan.global_batch % (size * data) == 0)


def _layout(plan: Plan, flags: str) -> Layout | None:
    """With these flags; None where it cannot run or does not fit."""
    other = plan.with_(flags)
    gib = checks.memory_of(other)
    if gib > checks.room(plan):
        return None
    same = ("tensor", "pipeline", "context", "micro_batch")
    recomputes = other.args.recompute_granularity == "full"
    is_this = all(getattr(other, name) == getattr(plan, name) for name in same)
    return Layout(
        other.tensor,
        other.pipeline,
        other.context,
        other.data,
        other.micro_batch,
        other.accumulation,
        recomputes,
        gib,
        seconds(other),
        is_this and other.args.recompute_granularity == plan.args.recompute_granularity,
    )


def rows(layouts: list[Layout], most: int | None = None) -> list[tuple[str, str]]:
    """(sizes, what they cost) of the first of them, and of the plan's own."""
    lines = []
    for place, layout in enumerate(layouts):
        if most is None or place < most or layout.is_this:
            time = layout.seconds
            costs = {"bubble": time.bubble, "TP": time.tensor, "DP": time.data}
            more = ", ".join(f"{name} {cost:.2g}" for name, cost in costs.items() if cost)
            size = f"{layout.micro_batch} × {layout.accumulation}, {layout.gib:.1f} GiB, "
            lines.append(
                (
                    f"TP {layout.tensor} PP {layout.pipeline} CP {layout.context}",
                    f"{size}{time.total:.3g} s a step{f' ({more})' if more else ''}"
                    + ", recomputed" * layout.recomputes
                    + "; this one" * layout.is_this,
                )
            )
    return lines
