"""What a Megatron command will train, hold in memory, write and cost, before it is started.

``python -m megatron_xielu.plan``: its options, and a `Plan` as text or JSON, from the command's
arguments alone. It ends with status 2 and one line a problem where the cluster would end the run
(`checks`). Standard library only, Python 3.9 and newer: it runs on a
login node.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from megatron_xielu.catalog import ACTIVATIONS, GPUS, NUMBERS
from megatron_xielu.checkpoints.optimizer_format import DP, FULL
from megatron_xielu.common.flags import Limits
from megatron_xielu.common.text import ready_output
from megatron_xielu.plan import checks, flags, host
from megatron_xielu.plan import layouts as fit
from megatron_xielu.plan.experts import Experts
from megatron_xielu.plan.flags import PlanError
from megatron_xielu.plan.gpus import BY_NAME, H100, Gpu
from megatron_xielu.plan.host import Host
from megatron_xielu.plan.run import GIB, MEMORY_MARGIN, Cluster, Plan
from megatron_xielu.plan.variables import in_variables

_BEST = 3  # layouts that a plan lists


def main(argv: Sequence[str] | None = None) -> None:
    """Print the plan; end with status 2 and one line a problem where there are any."""
    words = list(sys.argv[1:] if argv is None else argv)
    split = words.index("--") if "--" in words else len(words)
    options, command = _options().parse_args(words[:split]), words[split + 1 :]
    launcher = options.from_variables is not None

    def said(lines: Sequence[str]) -> list[str]:
        """In the words of who called: pretrain.sh's variables, or flags."""
        typed = flags.given(command[options.from_variables :])
        return [in_variables(line, typed) if launcher else line for line in lines]

    unknown = flags.unknown(command, others=("--dry-run", "--help") if launcher else ())
    problems, warnings = ([], unknown) if options.other_entry else (unknown, [])
    plan, files = None, not options.no_files
    try:
        plan = Plan(
            command,
            cluster=Cluster(
                options.nodes,
                options.gpus_per_node,
                _gpu(options),
                options.mfu,
                options.node_network,
                options.host_copy,
                gpu_is_given=options.gpu is not None,
            ),
            vocab_size=options.vocab_size,
            keep_checkpoints=options.keep_checkpoints,
            keep_every=options.keep_every,
        )
        faults, doubts = checks.data(plan) if files else ([], [])
        problems += checks.problems(plan, check_files=False) + faults
        made_for = options.made_for and (int(options.made_for[0]), options.made_for[1])
        warnings += doubts + checks.warnings(plan, made_for=made_for)
    except PlanError as error:
        problems += error.problems
    problems, warnings = said(problems), said(warnings)
    if plan is not None and not options.check:
        if options.json:
            findings: dict[str, Any] = {"problems": problems, "warnings": warnings}
            found = fit.fitting(plan) if options.layouts and not plan.args.cpu else []
            findings["layouts"] = [asdict(layout) for layout in found]
            print(json.dumps({**as_dict(plan, read_files=files), **findings}, indent=2))
        else:
            most = None if options.layouts else _BEST
            report = text(
                plan, problems=len(problems), warnings=warnings, read_files=files, layouts=most
            )
            print(report, flush=True)
    for problem in problems:
        print(f"megatron_xielu: error: {problem}", file=sys.stderr)
    if problems:
        sys.exit(2)


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_xielu.plan",
        description="What a Megatron command will train, hold in memory, write and cost.",
        usage="%(prog)s [options] -- <megatron arguments>",
        allow_abbrev=False,
    )
    default = Cluster()
    add = parser.add_argument
    size = NUMBERS["--vocab-size"].read
    speed = Limits(0.001, 1e6, whole=False).read
    add("--nodes", type=GPUS.read, default=default.nodes)
    add("--gpus-per-node", type=GPUS.read, default=default.gpus_per_node)
    add(
        "--gpu",
        choices=BY_NAME,
        help=f"sets the next two, and which FP8 it has (default: {default.gpu.name}, any FP8)",
    )
    add("--gpu-memory", type=speed, metavar="GIB", help="as PyTorch reports it")
    add("--peak-tflops", type=speed, help="of a GPU, bf16 without sparsity")
    add(
        "--mfu",
        type=Limits(0.001, 1, whole=False).read,
        help="share of the peak that the model's FLOPs reach (default: as published for its size)",
    )
    add(
        "--node-network",
        type=speed,
        metavar="GB/S",
        help="into a node (default: one card a GPU, of the speed that is built with it)",
    )
    add(
        "--host-copy",
        type=speed,
        default=default.host_copy,
        metavar="GB/S",
        help="that one thread copies in host memory; an assumption (default: %(default)s)",
    )
    add("--vocab-size", type=size, help="entries of the tokenizer, where Megatron reads them")
    add("--keep-checkpoints", type=size, metavar="K", help="the last K checkpoints are kept")
    every = Limits(0, 2**31 - 1).read
    add("--keep-every", type=every, metavar="N", help="and those of every N-th iteration; 0: none")
    add("--no-files", action="store_true", help="do not look whether files exist")
    add("--check", action="store_true", help="print nothing but problems")
    add("--json", action="store_true")
    add(
        "--layouts",
        action="store_true",
        help=f"every layout that fits, not only the {_BEST} that are fastest by estimate",
    )
    add(
        "--made-for",
        type=Limits(0, 1e30, whole=False).read,
        nargs=2,
        metavar=("TOKENS", "LR"),
        help="tokens a step, and the learning rate that was chosen for them; another size is told",
    )
    add(
        "--from-variables",
        type=every,
        metavar="N",
        help="for pretrain.sh: the first N arguments come from its variables, which are then named",
    )
    add(
        "--other-entry",
        action="store_true",
        help="the script is not Megatron's or this package's, and may have flags of its own",
    )
    return parser


def _gpu(options: argparse.Namespace) -> Gpu:
    gpu = BY_NAME[options.gpu] if options.gpu else H100
    return replace(
        gpu,
        memory_gib=options.gpu_memory or gpu.memory_gib,
        peak_tflops=options.peak_tflops or gpu.peak_tflops,
    )


def as_dict(plan: Plan, *, read_files: bool = True) -> dict[str, Any]:
    """The plan for programs: counts, bytes, FLOPs and seconds.

    Args:
        plan: the plan.
        read_files: as `host.of` has it.
    """
    on_host = host.of(plan, read_files=read_files)
    model, memory, checkpoints = plan.model, plan.memory(), plan.checkpoints()
    return {
        "model": {
            **asdict(model),
            "parameters": model.parameters(),
            "parameters_active": model.active_parameters(),
            "parameters_without_embeddings": model.parameters(embeddings=False),
        },
        "cluster": {**asdict(plan.cluster), "gpus": plan.cluster.gpus},
        "layout": {
            "tensor": plan.tensor,
            "pipeline": plan.pipeline,
            "context": plan.context,
            "virtual": plan.virtual,
            "data": plan.data,
            "expert": plan.expert,
            "expert_tensor": plan.expert_tensor,
            "expert_data": plan.expert_data,
        },
        "batch": {
            "micro_batch": plan.micro_batch,
            "global_batch": plan.global_batch,
            "accumulation": plan.accumulation,
            "tokens_per_step": plan.tokens_per_step(),
            "tokens": plan.schedule().steps * plan.tokens_per_step(),
        },
        "schedule": asdict(plan.schedule()),
        "compute": {
            "flops_per_token": model.flops_per_token(),
            "flops": plan.flops(),
            **({} if plan.args.cpu else {"mfu": asdict(plan.mfu()), **_time(plan)}),
        },
        "memory": {**asdict(memory), "total": memory.total},
        "host": {**asdict(on_host), "total": on_host.total},
        "checkpoints": checkpoints and {**asdict(checkpoints), "disk": checkpoints.disk},
        "optimizer_format": plan.optimizer_format and _formats(plan),
    }


def _time(plan: Plan) -> dict[str, float]:
    """How long it takes on GPUs."""
    seconds, gpus = fit.seconds_per_step(plan), plan.cluster.gpus
    tokens_per_second = plan.tokens_per_step() / seconds / gpus
    total = seconds * plan.schedule().steps
    return {
        "tokens_per_second_per_gpu": tokens_per_second,
        "tflops_per_gpu": tokens_per_second * plan.model.flops_per_token() / 1e12,
        "seconds_per_step": seconds,
        "seconds": total,
        "gpu_hours": total * gpus / 3600,
    }


def _formats(plan: Plan) -> dict[str, Any]:
    """Both optimizer formats of checkpoints: bytes of a rank, and seconds by estimate.

    None where training waits for the file system, and on a CPU.
    """
    timed = plan.args.async_save and not plan.args.cpu
    formats: dict[str, Any] = {"chosen": plan.optimizer_format}
    for kind in (DP, FULL):
        formats[kind] = {
            "save": {
                **asdict(plan.save(kind)),
                "seconds": plan.seconds_to_save(kind) if timed else None,
            },
            "load": {
                name: {
                    **asdict(plan.load(kind, parallel=parallel)),
                    "read_by_all": plan.read_by_all(kind, parallel=parallel),
                }
                for name, parallel in (("each_rank", False), ("fully_parallel", True))
            },
        }
    return formats


def text(
    plan: Plan,
    *,
    problems: int = 0,
    warnings: Sequence[str] = (),
    read_files: bool = True,
    layouts: int | None = _BEST,
) -> str:
    """The plan for people, in lines of at most 100 columns.

    Args:
        plan: the plan.
        problems: how many there are; what a run would cost that cannot run is not told.
        warnings: stand at the end.
        read_files: as `host.of` has it.
        layouts: how many are listed; None for all.
    """
    sections, lines = [("model", _model(plan)), ("batch", _batch(plan))], []
    if problems:
        lines.append(f"THIS PLAN CANNOT RUN: {problems} problem{'s' * (problems > 1)}, told below")
    else:
        sections.append(("compute", _compute(plan)))
    if not plan.args.cpu:
        sections.append(("memory per GPU", _memory(plan)))
        found = fit.fitting(plan) if plan.cluster.gpus > 1 else []
        # Of a plan that cannot run they are told where it is its layout that cannot.
        if found and not (problems and any(layout.is_this for layout in found)):
            title = "layouts that fit, fastest first by estimate: micro-batch × accumulation; "
            title += f"{plan.cluster.network:g} GB/s into a node"
            sections.append((title, fit.rows(found, layouts)))
    if not problems:
        sections.append(("host memory per node", _host(host.of(plan, read_files=read_files))))
        sections.append(("checkpoints", _checkpoints(plan)))
    for title, rows in sections:
        lines.append(title)
        lines += [f"  {name:<16} {value}" for name, value in rows]
    lines += [f"warning: {warning}" for warning in warnings]
    return "\n".join(lines)


_Rows = list[tuple[str, str]]


def _model(plan: Plan) -> _Rows:
    m = plan.model
    parts = [
        f"heads {m.heads} × {m.kv_channels}",
        f"query groups {m.groups}",
        f"{m.normalization}{' and qk-layernorm' if m.qk_layernorm else ''}",
        "biases" if m.bias else "no biases",
    ]
    positions = "rope" if m.rope else f"{m.learned_positions:,} learned positions"
    parameters = f"{m.parameters():,}; without embeddings {m.parameters(embeddings=False):,}"
    # That of the tokenizer need not be known, and is then the padded one.
    size = f"{m.vocabulary:,}, " if m.vocabulary != m.padded_vocabulary else ""
    more = []
    if m.experts:
        parameters += f"; active {m.active_parameters():,}"
        more.append(("experts", _experts(plan, m.experts)))
    if m.prediction_layers:
        more.append(("prediction", f"multi-token, {m.prediction_layers} ahead"))
    return [
        ("shape", f"layers {m.layers}, hidden {m.hidden}, ffn {m.ffn}"),
        *more,
        ("attention", ", ".join(parts)),
        ("activation", ACTIVATIONS[m.activation].label),
        (
            "vocabulary",
            f"{size}padded to {m.padded_vocabulary:,}; "
            f"{'tied' if m.tied_embeddings else 'untied'} embeddings, {positions}",
        ),
        ("parameters", parameters),
    ]


def _experts(plan: Plan, e: Experts) -> str:
    layers = plan.model.moe_layers(0, plan.model.layers)
    shared = f", shared ffn {e.shared_ffn}" if e.shared_ffn else ""
    return (
        f"{e.top_k} of {e.count} a token, ffn {e.ffn}{shared}, in {layers} layers; "
        f"EP {plan.expert}, expert-TP {plan.expert_tensor}"
    )


def _batch(plan: Plan) -> _Rows:
    m, schedule, c = plan.model, plan.schedule(), plan.cluster
    sizes = f"TP {plan.tensor}, PP {plan.pipeline}, CP {plan.context}, DP {plan.data}"
    if plan.virtual > 1:
        sizes += f", {plan.virtual} virtual stages"

    def phase(samples: int) -> str:
        tokens, steps = samples * m.sequence, samples / plan.global_batch
        return f"{samples:>13,} samples {steps:>11,.0f} steps {_amount(tokens):>9} tokens"

    decay = schedule.style
    if decay == "WSD":
        decay = f"WSD, {plan.args.lr_wsd_decay_style}"
    return [
        (
            "ranks" if plan.args.cpu else "GPUs",
            f"{c.nodes} nodes × {c.gpus_per_node} = {c.gpus}: {sizes}",
        ),
        (
            "step",
            f"{plan.global_batch:,} samples × {m.sequence:,} = {plan.tokens_per_step():,} tokens",
        ),
        (
            "accumulation",
            f"{plan.accumulation} × a micro-batch of {plan.micro_batch} on each data-parallel rank",
        ),
        ("run", phase(schedule.samples)),
        ("  warm-up", phase(schedule.warmup)),
        ("  stable", phase(schedule.stable)),
        ("  decay", f"{phase(schedule.decay)} ({decay})"),
    ]


def _compute(plan: Plan) -> _Rows:
    m, c = plan.model, plan.cluster
    per_token, attention = m.flops_per_token(), m.attention_flops_per_token()
    flops = [
        (
            "FLOPs per token",
            f"{per_token:.4g} = 6 × {_amount((per_token - attention) // 6)} matrix weights"
            f" + 6·L·q·s = {attention:.4g}, causal",
        ),
        ("FLOPs of the run", f"{plan.flops():.4g}"),
    ]
    if plan.args.cpu:
        return flops
    mfu, time = plan.mfu(), _time(plan)
    costs = "" if c.mfu is not None else ", plus the layout's costs"
    dense = ", as if dense" if m.experts and c.mfu is None else ""
    hours = time["seconds"] / 3600
    length = f"{hours:.3g} hours" if hours < 48 else f"{hours / 24:.3g} days"
    return [
        *flops,
        (
            "time, estimated",
            f"{time['seconds_per_step']:.3g} s a step, {length}, "
            f"{time['gpu_hours']:,.0f} GPU-hours",
        ),
        (
            "  a GPU",
            f"{time['tflops_per_gpu']:.3g} TFLOP/s, as --log-throughput prints it; "
            f"{time['tokens_per_second_per_gpu']:,.0f} tokens/s",
        ),
        (
            "  if",
            f"MFU {mfu.value:.0%} of {c.gpu.title}'s {c.gpu.peak_tflops:g} TFLOP/s in bf16"
            + dense
            + costs,
        ),
        ("", mfu.source),
    ]


def _memory(plan: Plan) -> _Rows:
    memory, limit = plan.memory(), plan.cluster.gpu.memory_gib
    chunks = plan.chunks_in_flight(memory.stage)
    what = "micro-batch" if plan.virtual == 1 else "chunks of micro-batches"
    notes = {
        "weights": f"{plan.parameters_on(memory.stage):,.0f} parameters",
        "gradients": "16 bits" if plan.gradient == 2 else "fp32",
        "optimizer": f"shared by {plan.optimizer_shards()}",
        "activations": f"{chunks} {what} in flight",
        "logits": "of one micro-batch, with the loss",
    }
    left_out = "CUDA context, NCCL, workspaces"
    if plan.model.experts:
        notes["optimizer"] += f", experts by {plan.expert_optimizer_shards()}"
        notes["activations"] += ", if routing is even (an estimate)"
        left_out += ", all-to-all"
    rows = [
        (name, f"{getattr(memory, name) / GIB:>8.2f} GiB  {note}") for name, note in notes.items()
    ]
    free = limit - memory.total / GIB
    total = f"{memory.total / GIB:>8.2f} GiB  of {limit:g}, {free:.1f} free ({free / limit:.0%})"
    if plan.pipeline > 1:
        total += f", pipeline stage {memory.stage}"
    return [
        *rows,
        ("total", total),
        ("", f"not counted: {left_out}; keep {MEMORY_MARGIN:.0%} free"),
    ]


def _host(node: Host) -> _Rows:
    indices, built = node.indices, "of samples; documents are not counted, their files not read"
    if indices.documents is not None and indices.seconds is not None:
        epochs = f"{indices.epochs} epoch{'s' * (indices.epochs > 1)}"
        built = f"of {epochs}, built by rank 0 in {indices.seconds:.2g} s (an estimate)"
    elif not indices.samples:
        built = "none, of made-up data"
    notes = {
        "save": (node.save, "copies of what is written"),
        "data workers": (node.batches, f"batches ahead in {node.workers} processes"),
        "index caches": (indices.total, built),
        "total": (node.total, "beside the ranks' own; not counted: NCCL, file caches"),
    }
    return [(name, f"{size / GIB:>8.2f} GiB  {note}") for name, (size, note) in notes.items()]


def _checkpoints(plan: Plan) -> _Rows:
    checkpoints, kind = plan.checkpoints(), plan.optimizer_format
    if checkpoints is None:
        return [("none", "without --save and --save-interval")]
    return [
        ("one", f"{checkpoints.bytes / GIB:,.1f} GiB"),
        ("written", f"{checkpoints.written:,}, every {plan.args.save_interval:,} steps"),
        ("kept", f"{checkpoints.kept:,}"),
        ("disk", f"{checkpoints.disk / GIB:,.1f} GiB at most, one being written"),
        *(_optimizer_format(plan, kind, checkpoints.bytes) if kind else []),
    ]


def _optimizer_format(plan: Plan, chosen: str, size: int) -> _Rows:
    """What a save (of ``size`` bytes) and a load take in host memory, time and reading."""
    c, parallel = plan.cluster, plan.args.ckpt_fully_parallel_load
    node = min(c.gpus, c.gpus_per_node)

    def memory(held: float) -> str:
        return f"{held / GIB:,.2f} GiB of host memory a rank, {node * held / GIB:,.1f} a node"

    speeds = f"{c.host_copy:g} GB/s a thread (an assumption), {c.network:g} GB/s into a node"
    waits: _Rows = []
    if plan.args.async_save and not plan.args.cpu:
        waits = [("  waits", f"an estimate, at {speeds}"), *_stalls(plan, chosen)]
    elif not plan.args.async_save:
        written = f"{size / GIB:,.1f} GiB"
        waits = [("  waits", f"for the file system to take {written}: there is no --async-save")]

    def save(kind: str) -> str:
        wait = f"; waits {plan.seconds_to_save(kind):.2g} s" if len(waits) > 1 else ""
        return memory(plan.save(kind).host_memory) + wait

    now, other = (plan.read_by_all(chosen, parallel=way) for way in (parallel, not parallel))
    unless = f"{'without' if parallel else 'with'} --ckpt-fully-parallel-load"
    keeps = "buckets" if _buckets_are_fixed(plan) else "the node count"
    experts = ", grouped experts or not," if plan.args.num_experts else ""
    note = (
        "a later job may change TP and PP"
        if chosen == FULL
        else f"later jobs keep TP, PP, EP{experts} and {keeps}"
    )
    held = plan.load(chosen, parallel=parallel).host_memory
    return [
        ("optimizer state", f"{chosen}: {note}"),
        ("  save", save(chosen)),
        (
            "  (in dp)" if chosen == FULL else "  (in full)",
            save(DP if chosen == FULL else FULL),
        ),
        *waits,
        *([("  load", memory(held))] if held else []),
        ("  read", f"{now / GIB:,.1f} GiB in all; {other / GIB:,.1f} {unless}"),
    ]


def _stalls(plan: Plan, kind: str) -> _Rows:
    """What the waits for saves add up to."""
    between = plan.args.save_interval * fit.seconds_per_step(plan)
    wait = plan.seconds_to_save(kind)
    an_hour = 3600 * wait / (between + wait)
    return [("  stalls", f"{an_hour:.2g} s an hour, {an_hour / 3600:.2%} of the run")]


def _buckets_are_fixed(plan: Plan) -> bool:
    """Whether gradient buckets stay as they are when the data-parallel size changes."""
    args = plan.args
    return not args.overlap_grad_reduce or bool(args.ddp_bucket_size or args.ddp_num_buckets)


def _amount(number: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.4g} {unit}"
    return f"{number:,.0f}"


if __name__ == "__main__":
    ready_output()
    main()
