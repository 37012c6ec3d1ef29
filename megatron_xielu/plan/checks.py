"""What would end a planned run on the cluster, found before it is queued: one line each.

Every line names the flag or variable, and what to change. `problems` end the launch, `warnings`
do not.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterator, Mapping

from megatron_xielu import catalog
from megatron_xielu.catalog import TRAINABLE, activations_of
from megatron_xielu.checkpoints import missing, optimizer_format
from megatron_xielu.common import data_lists, fp8, pretrained_tokenizer
from megatron_xielu.common.flags import flag_of
from megatron_xielu.plan import flags
from megatron_xielu.plan.gpus import BY_NAME
from megatron_xielu.plan.run import GIB, MEMORY_MARGIN, Plan
from megatron_xielu.workarounds import releases

# The sizes whose checkpoints docs/checkpoint-walk.md covers.
_WALKED = {"tensor": 8, "pipeline": 4, "data": 512}

# TOKENIZER and TOKENS_… hold no secret.
_SECRET_NAME = re.compile(r"KEY|TOKEN(?!IZ|S)|SECRET|PASSWORD", re.IGNORECASE)
_SECRET_LENGTH = 8

_MOST_LISTED = 64  # of sizes that would work


def problems(
    plan: Plan, *, check_files: bool = True, environment: Mapping[str, str] | None = None
) -> list[str]:
    """Everything that would end the run, one line each; empty for a command that can run.

    Args:
        plan: the plan.
        check_files: whether files of the command are looked at; those by absolute path must exist.
        environment: variables whose secrets must not be on the command line; ours by default.
    """
    found = [*_flags(plan), *_layout(plan), *_batch(plan), *_schedule(plan), *_checkpoints(plan)]
    # Of a layout that cannot run there is no memory to speak of.
    found += [] if found else [*_memory(plan)]
    found += [*_secrets(plan, os.environ if environment is None else environment)]
    return found + (data(plan)[0] if check_files else [])


def warnings(plan: Plan, *, made_for: tuple[int, float] | None = None) -> list[str]:
    """What is worth knowing before the launch, and does not end it.

    Args:
        plan: the plan.
        made_for: tokens a step, and the learning rate that was chosen for them.
    """
    found = []
    schedule, given = plan.schedule(), _given(plan)
    if made_for and plan.args.lr == made_for[1] and plan.tokens_per_step() != made_for[0]:
        ratio = plan.tokens_per_step() / made_for[0]
        found.append(
            f"a step of {plan.tokens_per_step():,} tokens is {ratio:.3g} times the model file's "
            f"{made_for[0]:,}, for which its --lr {plan.args.lr:g} was chosen; rules of thumb, not "
            f"measured here, are × {ratio**0.5:.3g} (square root) or × {ratio:.3g} (linear)"
        )
    if plan.tensor > plan.cluster.gpus_per_node:
        found.append(
            f"--tensor-model-parallel-size {plan.tensor} is more than the "
            f"{plan.cluster.gpus_per_node} GPUs of a node: every layer waits for the network"
        )
    gpu, per_node = plan.cluster.gpu, plan.cluster.gpus_per_node
    if per_node > gpu.per_node and not plan.args.cpu:
        found.append(
            f"a {gpu.title} node has {gpu.per_node} GPUs at most sites; "
            f"--gpus-per-node {gpu.per_node}"
        )
    total, limit = plan.memory().total / GIB, gpu.memory_gib
    if limit * (1 - MEMORY_MARGIN) < total <= limit and not plan.args.cpu:
        found.append(
            f"{total:.1f} of {limit:.0f} GiB leaves less than {MEMORY_MARGIN:.0%} for what is not "
            f"counted; {_fixes(plan)}"
        )
    rest = schedule.samples % plan.global_batch
    if rest:
        found.append(
            f"--train-samples {schedule.samples} is not a multiple of --global-batch-size "
            f"{plan.global_batch}: the last {rest} are not trained on"
        )
    if schedule.warmup + schedule.stable + schedule.decay > schedule.samples:
        found.append(
            "--lr-decay-samples or --lr-decay-iters is longer than the run, which ends before "
            "the learning rate has decayed"
        )
    last = plan.args.profile_step_end
    if plan.args.profile and last > schedule.steps:
        found.append(
            f"the steps up to --profile-step-end {last} are not all in the run, which has "
            f"{schedule.steps:,}"
        )
    if plan.args.fp8_format:
        found.append(
            "--fp8-format: the time is that of bf16, and so is the memory of activations but for "
            "the MLP's output: FP8 is not measured, and no speed-up is counted"
        )
    if catalog.DOCUMENTS_FLAG in given:
        found.append(
            f"{catalog.DOCUMENTS_FLAG}: FLOPs and hours count attention over whole sequences, and "
            "are an upper bound: a document attends to itself alone"
        )
    found += [
        f"{flag} is not modelled: stages and batches are taken to be of equal size"
        for flag in [*optimizer_format.UNEVEN_STAGES, *catalog.NOT_MODELLED]
        if flag in given
    ]
    if _saves_optimizer(plan) and plan.args.optimizer != "adam":
        found.append(
            f"--optimizer {plan.args.optimizer}: later jobs keep the layout, and checkpoints are "
            "not walked: the preflight needs LAYOUT_CHECK=0 (docs/checkpoints.md)"
        )
    beyond = [name for name, size in _WALKED.items() if getattr(plan, name) > size]
    if _saves_optimizer(plan) and beyond:
        found.append(
            f"{', '.join(beyond)} parallel sizes are beyond those whose checkpoints have been "
            "walked (docs/checkpoint-walk.md); the preflight walks this layout before training"
        )
    return found


def _given(plan: Plan) -> set[str]:
    return set(flags.given(plan.argv))


def _flags(plan: Plan) -> Iterator[str]:
    args, given = plan.args, _given(plan)
    ours = [name for name in activations_of(args) if name in TRAINABLE]
    if len(ours) > 1:
        yield "give one activation, not --xielu and --xiprelu"
    if plan.model.activation in TRAINABLE:
        name = f"--{plan.model.activation}"
        excluded = [*catalog.WITH_OURS, *catalog.BY_ENTRY]
        yield from catalog.also_not_with_ours(args, name)
        starts = args.xielu_alpha_n_init
        least = min(starts) if isinstance(starts, list) else starts
        if fault := catalog.alpha_n_fault(plan.model.activation, least, args.xielu_beta):
            yield f"--xielu-alpha-n-init of {name} {fault}"
    else:
        name, excluded = "this entry", [*catalog.BY_ENTRY]
        switches = ("recompute_output", "check_tp_sync", "frozen_alphas", "shared_alphas")
        for argument in (*(f"xielu_{switch}" for switch in switches), *catalog.DEFAULTS):
            if flag_of(argument) in given:
                yield catalog.needs_ours(flag_of(argument))
    if args.xielu_shared_alphas:
        for refusal in catalog.WITH_SHARED_ALPHAS:
            if refusal.is_given(args):
                yield refusal.with_("--xielu-shared-alphas")
    for refusal in excluded:
        if refusal.flag in given:
            yield refusal.with_(name)
    if args.xielu_recompute_output:
        for refusal in catalog.WITH_RECOMPUTE_OUTPUT:
            # The plan's parser knows those that are refused for a value, and no other.
            anyhow = not refusal.values and not refusal.harmless and refusal.flag in given
            if anyhow or refusal.is_given(args):
                yield refusal.with_("--xielu-recompute-output")
    yield from catalog.contradictions(args)
    if args.fp8_format and args.transformer_impl == "local":
        yield fp8.LOCAL
    if args.fp8_format and plan.cluster.gpu_is_given and not args.cpu:
        gpu = plan.cluster.gpu
        fault = fp8.capability_fault(args.fp8_recipe, gpu.capability, gpu.title)
        yield from [fault] if fault else []
    if "--cpu" in given:
        yield from catalog.not_on_cpu(plan.argv)
    elif catalog.DOCUMENTS_FLAG in given and args.transformer_impl == "local":
        yield catalog.DOCUMENTS_NEED_TE
    for refusal in catalog.UNREAD:
        if refusal.flag in given:
            yield refusal.alone()
    known = {refusal.flag for refusal in excluded}
    for refusal in catalog.BY_PLAN:
        if refusal.flag in given and refusal.flag not in known:
            yield f"{refusal.flag} is not known to the plan, which cannot count it; drop it"
    try:
        optimizer_format.check_optimizer(args)
    except ValueError as error:
        yield str(error)
    if args.bf16 and args.fp16:
        yield "give one of --bf16 and --fp16"
    if args.recompute_granularity == "full" and not (
        args.recompute_method and args.recompute_num_layers
    ):
        yield (
            "--recompute-granularity full needs --recompute-method uniform (or block) and "
            "--recompute-num-layers"
        )
    if args.save and not args.save_interval:
        yield "--save needs --save-interval"
    if "--overlap-param-gather" in given and args.optimizer == "adam":
        for switch in ("use_distributed_optimizer", "overlap_grad_reduce"):
            if not getattr(args, switch):
                yield f"--overlap-param-gather needs {flag_of(switch)}"


def _saves_optimizer(plan: Plan) -> bool:
    return bool(plan.args.save) and not plan.args.no_save_optim


def _checkpoints(plan: Plan) -> Iterator[str]:
    """Where it is not proven that checkpoints keep the optimizer's state."""
    if not _saves_optimizer(plan):
        return
    unproven = [r.flag for r in catalog.BY_PLAN_WITH_CHECKPOINTS if r.flag in _given(plan)]
    with contextlib.suppress(ModuleNotFoundError):  # a login node need not have Megatron
        root, version = releases.installed()
        if releases.release(version) < releases.OLDEST_SPEC:
            unproven.append(f"megatron-core {version} of {root}")
    for what in unproven:
        yield (
            f"{what}: it is not proven that checkpoints keep the optimizer's state "
            "(docs/checkpoint-walk.md); drop it, or add --no-save-optim"
        )


def _layout(plan: Plan) -> Iterator[str]:
    args, m, tensor = plan.args, plan.model, plan.tensor
    tp = f"--tensor-model-parallel-size {tensor}"
    split = {f"--num-attention-heads {m.heads}": m.heads}
    if m.moe_layers(0, m.layers) < m.layers:
        split[f"--ffn-hidden-size {m.ffn}"] = m.ffn
    if m.experts and m.experts.shared_ffn:
        split["--moe-shared-expert-intermediate-size"] = m.experts.shared_ffn
    split[f"--padded-vocab-size {m.padded_vocabulary}"] = m.padded_vocabulary
    for what, size in split.items():
        if size % tensor:
            yield f"{tp} does not divide {what}; use one of {_one_of(_divisors(size))}"
    if m.groups % tensor and tensor % m.groups:
        yield f"{tp} neither divides --num-query-groups {m.groups} nor is a multiple of it"
    if m.heads % m.groups:
        yield f"--num-query-groups {m.groups} does not divide --num-attention-heads {m.heads}"
    if not _given(plan).intersection(optimizer_format.UNEVEN_STAGES):
        yield from _pipeline(plan)
    parts = tensor * plan.pipeline * plan.context
    gpus = plan.cluster.gpus
    if gpus % parts:
        yield (
            f"{plan.cluster.nodes} × {plan.cluster.gpus_per_node} = {gpus} GPUs are not a multiple "
            f"of tensor × pipeline × context parallel size {tensor} × {plan.pipeline} × "
            f"{plan.context} = {parts}; change --nodes or one of the sizes"
        )
    if plan.context > 1 and m.sequence % (2 * plan.context):
        yield (
            f"--seq-length {m.sequence} is not a multiple of 2 × --context-parallel-size "
            f"{plan.context}"
        )
    elif plan.sequence_parallel and m.sequence // plan.context % tensor:
        yield f"--sequence-parallel: {tp} does not divide --seq-length {m.sequence} per CP rank"
    if args.fp8_format:
        yield from fp8.size_faults(
            args.fp8_recipe,
            hidden=m.hidden,
            ffn=m.ffn,
            queries=m.query_width,
            keys=m.key_width,
            tokens=plan.micro_batch * m.sequence // plan.context,
            tensor=tensor,
            split_tokens=plan.sequence_parallel,
        )
    yield from _experts(plan)
    positions = args.max_position_embeddings
    if positions is None or positions < m.sequence:
        yield f"--max-position-embeddings must be --seq-length {m.sequence} or more"


def _experts(plan: Plan) -> Iterator[str]:
    e, gpus = plan.model.experts, plan.cluster.gpus
    ep, etp = (
        f"--expert-model-parallel-size {plan.expert}",
        f"--expert-tensor-parallel-size {plan.expert_tensor}",
    )
    if not e:
        if plan.expert > 1:
            yield f"{ep} needs --num-experts"
        return
    if plan.tensor > 1 and not plan.sequence_parallel:
        tp = f"--tensor-model-parallel-size {plan.tensor}"
        yield f"--num-experts with {tp} needs --sequence-parallel"
    if e.count % plan.expert:
        yield f"{ep} does not divide --num-experts {e.count}"
    if e.ffn % plan.expert_tensor:
        yield f"{etp} does not divide --moe-ffn-hidden-size {e.ffn}"
    parts = plan.expert_tensor * plan.expert * plan.pipeline
    if gpus % parts:
        yield (
            f"{gpus} GPUs are not a multiple of {etp} × {ep} × --pipeline-model-parallel-size "
            f"{plan.pipeline} = {parts}; change one of them"
        )


def _pipeline(plan: Plan) -> Iterator[str]:
    args, layers, pipeline = plan.args, plan.model.layers, plan.pipeline
    per_chunk = args.num_layers_per_virtual_pipeline_stage
    if layers % pipeline:
        yield (
            f"--pipeline-model-parallel-size {pipeline} does not divide --num-layers {layers}; "
            f"use one of {_one_of(_divisors(layers))}"
        )
    elif per_chunk and layers // pipeline % per_chunk:
        yield (
            f"--num-layers-per-virtual-pipeline-stage {per_chunk} does not divide the "
            f"{layers // pipeline} layers of a pipeline stage"
        )
    elif layers % (pipeline * plan.virtual):
        yield (
            f"--num-virtual-stages-per-pipeline-rank {plan.virtual} × "
            f"--pipeline-model-parallel-size {pipeline} does not divide --num-layers {layers}"
        )
    if plan.virtual > 1:
        least = 3 if args.no_overlap_p2p_communication else 2
        if pipeline < least:
            yield f"virtual pipeline stages need --pipeline-model-parallel-size {least} or more"
        elif plan.accumulation % pipeline:
            yield (
                f"virtual pipeline stages need a multiple of --pipeline-model-parallel-size "
                f"{pipeline} micro-batches a step, not {plan.accumulation}; change "
                "--global-batch-size or --micro-batch-size"
            )


def _batch(plan: Plan) -> Iterator[str]:
    batch, micro, data = plan.global_batch, plan.micro_batch, plan.data
    now, parts = plan.cluster.nodes, plan.tensor * plan.pipeline * plan.context
    # Of ranks that are no whole number there is nothing to say.
    if _batch_divides(plan) or plan.cluster.gpus % parts:
        return
    works = []
    for number in dict.fromkeys((batch // data * data, -(-batch // data) * data)):
        # The nearest to what was asked for that fits.
        sizes = _divisors(number // data)
        sizes.sort(key=lambda size: abs(math.log(size / micro)))
        for size in sizes:
            other = f"--global-batch-size {number}" if number != batch else ""
            other += f" --micro-batch-size {size}" if size != micro else ""
            if _memory_with(plan, other) <= room(plan):
                works.append((abs(number - batch), other.strip()))
                break
    divide = [
        nodes
        for nodes in sorted(range(1, 2 * now), key=lambda nodes: abs(nodes - now))
        if (ranks := nodes * plan.cluster.gpus_per_node) % parts == 0
        and batch % (micro * (ranks // parts)) == 0
    ]
    # The nearest; where that is more than there may be, one below, too, if it is not far.
    fewer = [nodes for nodes in divide if now / 2 <= nodes < now]
    works += [(0, f"--nodes {nodes}") for nodes in dict.fromkeys(divide[:1] + fewer[:1])]
    if other := _halved(plan):
        works.append((0, other))
    reason = (
        f"has fewer samples than the {data} data-parallel ranks"
        if batch < data
        else f"is not a multiple of --micro-batch-size {micro} × {data} data-parallel ranks"
    )
    these = ", or ".join(way for _, way in sorted(works, key=lambda found: found[0]))
    yield f"--global-batch-size {batch} {reason}; " + (
        f"these work: {these}" if these else "change one of them, or the layout"
    )


def _halved(plan: Plan) -> str:
    """Flags for twice the tensor parallel size, where the batch divides by what ranks are left."""
    data, rest = divmod(plan.data, 2)
    if rest or plan.global_batch % data:
        return ""
    tensor = f"--tensor-model-parallel-size {2 * plan.tensor}"
    tensor += "" if plan.args.sequence_parallel else " --sequence-parallel"
    sizes = _divisors(plan.global_batch // data)
    # Two GPUs hold what one held.
    micro = min(sizes, key=lambda size: abs(math.log(size / plan.micro_batch / 2)))
    other = tensor + (f" --micro-batch-size {micro}" if micro != plan.micro_batch else "")
    return other if _memory_with(plan, other) <= room(plan) else ""


def _batch_divides(plan: Plan) -> bool:
    divides = plan.global_batch % (plan.micro_batch * plan.data) == 0
    return divides or "--decrease-batch-size-if-needed" in _given(plan)


def _schedule(plan: Plan) -> Iterator[str]:
    args, schedule = plan.args, plan.schedule()
    if (args.train_iters is None) == (args.train_samples is None):
        yield "give one of --train-samples and --train-iters"
        return
    unit, other = ("samples", "iters") if args.train_samples is not None else ("iters", "samples")
    for name in ("lr_warmup", "lr_decay", "lr_wsd_decay"):
        if getattr(args, f"{name}_{other}"):
            flag = flag_of(name)
            yield (f"{flag}-{other} does not go with --train-{unit}; give {flag}-{unit}")
    if args.lr_warmup_fraction is not None and getattr(args, f"lr_warmup_{unit}"):
        yield f"give one of --lr-warmup-fraction and --lr-warmup-{unit}"
    if args.min_lr is not None and args.lr is not None and args.min_lr > args.lr:
        yield f"--min-lr {args.min_lr:g} is above --lr {args.lr:g}"
    if schedule.steps < 1:
        yield f"--train-{unit} is less than one step of --global-batch-size {plan.global_batch}"
        return
    if args.lr_decay_style == "WSD" and not getattr(args, f"lr_wsd_decay_{unit}"):
        yield f"--lr-decay-style WSD needs --lr-wsd-decay-{unit}"
    if schedule.stable < 0 or schedule.decay < 0:
        end = schedule.warmup + schedule.stable + schedule.decay
        yield (
            f"a warm-up of {schedule.warmup} and a decay of {max(0, schedule.decay)} samples are "
            f"longer than the schedule of {end}; shorten --lr-warmup-{unit} or "
            f"--lr-wsd-decay-{unit}, or train longer"
        )


def _memory(plan: Plan) -> Iterator[str]:
    total, gpu = plan.memory().total / GIB, plan.cluster.gpu
    if total > gpu.memory_gib and not plan.args.cpu:
        limit = f"--gpu-memory {gpu.memory_gib:g}"
        if plan.cluster.gpu_is_given and gpu.memory_gib == BY_NAME[gpu.name].memory_gib:
            limit = f"--gpu={gpu.name} ({gpu.memory_gib:g} GiB)"
        yield f"{total:.1f} GiB do not fit into {limit}; {_fixes(plan)}"


def _fixes(plan: Plan) -> str:
    """Three flags, from cheap to dear, with each of which the plan fits; else several together."""
    args, m, cluster = plan.args, plan.model, plan.cluster
    ways: list[list[str]] = []  # of one kind each, the least change first
    if not args.use_distributed_optimizer and plan.data * plan.context > 1:
        ways.append(["--use-distributed-optimizer"])
    if plan.tensor > 1 and not args.sequence_parallel:
        ways.append(["--sequence-parallel"])
    if plan.attention_keeps_scores and args.recompute_granularity is None:
        ways.append(["--recompute-activations"])
    if m.activation in TRAINABLE and not args.xielu_recompute_output:
        ways.append(["--xielu-recompute-output"])
    smaller = range(min(plan.micro_batch - 1, _MOST_LISTED), 0, -1)
    ways.append([f"--micro-batch-size {micro}" for micro in smaller])
    doubled = [plan.tensor * 2**n for n in range(1, 4)]
    ways.append(
        [
            f"--tensor-model-parallel-size {tensor} --sequence-parallel"
            for tensor in doubled
            if tensor <= cluster.gpus_per_node
        ]
    )
    full = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    ways.append([full] if args.recompute_granularity is None else [])

    def size(more: str) -> float:
        return _memory_with(plan, more)

    limit = room(plan)
    fitting = []
    for way in ways:
        sizes = [(more, gib) for more in way if (gib := size(more)) <= limit]
        fitting += [f"{more} ({gib:.1f} GiB)" for more, gib in sizes[:1]]
    if fitting:
        return "add " + ", or ".join(fitting[:3])
    together = ""
    for way in ways:
        possible = [more for one in way if size(more := f"{together} {one}") < float("inf")]
        together = possible[-1] if possible else together
        if size(together) <= limit:
            return f"add{together} ({size(together):.1f} GiB)"
    return "no flags are enough: use more pipeline stages, or GPUs with more memory"


def _memory_with(plan: Plan, more: str) -> float:
    """GiB with these flags added; infinite where they cannot run."""
    return memory_of(plan.with_(more))


def memory_of(plan: Plan) -> float:
    """GiB of a GPU; infinite for a layout or batch that cannot run."""
    wrong = [*_flags(plan), *_layout(plan)] or not _batch_divides(plan)
    return float("inf") if wrong else plan.memory().total / GIB


def room(plan: Plan) -> float:
    """GiB of a GPU that may be planned with."""
    return plan.cluster.gpu.memory_gib * (1 - MEMORY_MARGIN)


def _secrets(plan: Plan, environment: Mapping[str, str]) -> Iterator[str]:
    """Names variables, never values: anyone on a node reads a process's command line."""
    words = {part for word in plan.argv for part in (word, word.partition("=")[2])}
    for name, value in sorted(environment.items()):
        secret = len(value) >= _SECRET_LENGTH and not value.isdigit()
        if secret and _SECRET_NAME.search(name) and value in words:
            yield (
                f"the value of the variable {name} is an argument, which everyone on the node can "
                "read; pass it in the environment, not on the command line"
            )


def data(plan: Plan) -> tuple[list[str], list[str]]:
    """Of the data, the tokenizer and what is loaded: what ends the run, and what may."""
    faults, doubts = data_lists.look(plan.args, plan.model.padded_vocabulary, starts_here=False)
    # Of a certain --ckpt-step the run itself says it.
    if "--ckpt-step" not in _given(plan):
        try:
            with contextlib.suppress(OSError):  # another user's
                missing.check(plan.args)
        except ValueError as error:
            is_here = os.path.isabs(plan.args.load or "/")  # else the run may start elsewhere
            (faults if is_here else doubts).append(str(error))
    name = plan.args.tokenizer_model
    if name and pretrained_tokenizer.is_path(name) and not os.path.exists(name):
        if os.path.isabs(name):
            return [f"--tokenizer-model {name} does not exist", *faults], doubts
        doubts.append(f"--tokenizer-model {name} is not here; does the run start elsewhere?")
    return faults, doubts


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, min(number, _MOST_LISTED) + 1) if number % n == 0]


def _one_of(numbers: list[int]) -> str:
    return ", ".join(str(number) for number in numbers)
