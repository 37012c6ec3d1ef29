"""The plan of a command against Megatron: real models, real checkpoints, its own formulas."""

import ast
import json
import re
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import plan_cases
import pytest
from dataset_files import write_dataset
from launch import REPOSITORY, TINY_LLAMA, load_checkpoint, train
from megatron_arguments import parse as parse_as_megatron

from megatron_xielu.checkpoints.optimizer_format import DP, FULL
from megatron_xielu.plan import __main__ as plan_report
from megatron_xielu.plan import checks as plan_checks
from megatron_xielu.plan.flags import PlanError, parse
from megatron_xielu.plan.gpus import BY_NAME, H100
from megatron_xielu.plan.model import Model
from megatron_xielu.plan.run import GIB, Cluster, Plan

SHARED = """
    --seq-length 4096 --max-position-embeddings 4096 --position-embedding-type rope
    --normalization RMSNorm --disable-bias-linear --attention-dropout 0 --hidden-dropout 0
    --bf16 --use-distributed-optimizer --micro-batch-size 5
    --lr-decay-style WSD --lr-wsd-decay-style minus_sqrt
"""
# The authors' public configurations; --ffn-hidden-size and the activation are added.
PAPER_1B = f"""{SHARED} --num-layers 24 --hidden-size 1536 --num-attention-heads 16
    --vocab-size 131072 --global-batch-size 440 --train-samples 30800000
    --lr-warmup-samples 880000 --lr-wsd-decay-samples 6380000"""
PAPER_3B = f"""{SHARED} --num-layers 36 --hidden-size 2048 --num-attention-heads 16
    --vocab-size 131072 --untie-embeddings-and-output-weights --tensor-model-parallel-size 2
    --sequence-parallel --global-batch-size 640 --train-samples 30720000
    --lr-warmup-samples 1280000 --lr-wsd-decay-samples 6400000"""
APERTUS_8B = f"""{SHARED} --xielu --num-layers 32 --hidden-size 4096 --ffn-hidden-size 21504
    --num-attention-heads 32 --group-query-attention --num-query-groups 8 --qk-layernorm
    --vocab-size 131072 --untie-embeddings-and-output-weights --global-batch-size 512
    --micro-batch-size 1 --train-samples 51200 --lr-wsd-decay-samples 5120"""
NODES_1B = Cluster(nodes=11)


def plan_1b(flags: str = "", cluster: Cluster = NODES_1B, **options) -> Plan:
    command = f"{PAPER_1B} --xielu --ffn-hidden-size 9216 {flags}"
    return Plan(command.split(), cluster=cluster, **options)


# Real trainings

CHOICES = ("--disable-bias-linear", "--untie-embeddings-and-output-weights")
TINY = [word for word in TINY_LLAMA if word not in CHOICES]
EXPERTS = (
    "--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 48 "
    "--moe-token-dispatcher-type alltoall"
)
# flags, tensor parallel size, pipeline parallel size
TRAININGS = {
    # Two processes each, and what is special about experts: layers of two kinds, an expert-TP of
    # their own, prediction layers with or without a table to share.
    "xielu-experts-shared-predictions": (
        f"--xielu --disable-bias-linear {EXPERTS} --moe-layer-freq [0]+[1]*3 --mtp-num-layers 1 "
        "--moe-shared-expert-intermediate-size 32 --moe-shared-expert-gate --no-save-optim "
        "--untie-embeddings-and-output-weights",
        1,
        2,
    ),
    "swiglu-experts-bias-ep2": (
        f"--swiglu --no-bias-swiglu-fusion {EXPERTS} --moe-layer-freq 2 "
        "--expert-model-parallel-size 2 --expert-tensor-parallel-size 1 --sequence-parallel "
        "--mtp-num-layers 2 --use-distributed-optimizer --dist-ckpt-optim-fully-reshardable --bf16",
        2,
        1,
    ),
    "xielu-untied-bf16": (
        "--xielu --disable-bias-linear --untie-embeddings-and-output-weights --bf16 "
        "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable",
        2,
        1,
    ),
    "xiprelu-tied-bias-positions": (
        "--xiprelu --position-embedding-type learned_absolute --normalization LayerNorm "
        "--use-distributed-optimizer",
        1,
        2,
    ),
    "swiglu-untied-bias-qknorm": (
        "--swiglu --untie-embeddings-and-output-weights --qk-layernorm --normalization LayerNorm "
        "--no-save-optim",
        1,
        1,
    ),
    "relu2-tied-groups": (
        "--squared-relu --disable-bias-linear --add-qkv-bias --group-query-attention "
        "--num-query-groups 2 --kv-channels 16",
        1,
        1,
    ),
}


@pytest.mark.parametrize("case", TRAININGS)
def test_parameters_and_checkpoint_are_those_of_a_real_training(case, tmp_path):
    flags, tensor, pipeline = TRAININGS[case]
    flags += f" --tensor-model-parallel-size {tensor} --pipeline-model-parallel-size {pipeline}"
    flags += " --train-iters 1 --save checkpoints --save-interval 1"
    ranks = tensor * pipeline
    run = train(
        tmp_path,
        flags,
        ranks=ranks,
        model=TINY,
        command=("-m", "megatron_xielu.pretrain_gpt"),
    )
    plan = Plan([*TINY, *flags.split()], cluster=Cluster(nodes=1, gpus_per_node=ranks))
    assert plan_checks.problems(plan, environment={}) == []
    found = re.findall(r"parallel rank \((\d+), \d+, (\d+)\): (\d+)", run.output)
    assert len(found) == ranks
    for _, stage, parameters in found:
        assert plan.parameters_on(int(stage)) == int(parameters)
    if ranks == 1:
        assert plan.model.parameters() == int(found[0][2])

    tensors = load_checkpoint(tmp_path / "checkpoints" / "iter_0000001")
    model = sum(t.numel() for key, t in tensors.items() if not key.startswith("optimizer."))
    assert model == plan.model.parameters()
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    # In its default format the distributed optimizer writes whole buffers: padding, norms once a
    # tensor-parallel rank, and a tied table twice under pipeline parallelism.
    buffers = "--use-distributed-optimizer" in flags and "reshardable" not in flags
    twice = plan.model.embedding * 12 if buffers and pipeline > 1 else 0
    within = 0.05 if buffers else 1e-4
    assert plan.checkpoints().bytes == pytest.approx(size - twice, rel=within)


def test_a_layer_keeps_what_a_real_one_keeps(tmp_path):
    run = train(tmp_path, "", model=(), command=[str(Path(__file__).with_name("plan_cases.py"))])
    measured = json.loads(re.search(r"^CASES (.*)$", run.output, re.MULTILINE)[1])
    c = plan_cases
    for positions, flag in {"rope": "rope", "learned": "learned_absolute"}.items():
        plan = plan_1b(
            f"--hidden-size {c.HIDDEN} --ffn-hidden-size {c.FFN} --num-attention-heads {c.HEADS} "
            f"--position-embedding-type {flag}"
        )
        # The inputs of two norms in bf16, and the statistics of a fused softmax: not counted there.
        elsewhere = 2 * 2 * c.HIDDEN + 4 * c.HEADS
        assert plan.layer_bytes_per_token() - elsewhere == measured[positions]
    experts = f"--hidden-size {c.HIDDEN} --num-experts 4 --moe-ffn-hidden-size {c.FFN}"
    plan = plan_1b(f"{experts} --moe-router-topk 1")
    assert plan.experts_bytes_per_token() - 8 * 4 == measured["expert"]  # without the router's


# Megatron's own formulas

SHAPES = {
    "1.1B": f"{PAPER_1B} --xielu --ffn-hidden-size 9216",
    "1.1B-swiglu": f"{PAPER_1B} --swiglu",
    "3B-tp2": f"{PAPER_3B} --squared-relu --ffn-hidden-size 12288",
    "8B-groups": f"{APERTUS_8B} --tensor-model-parallel-size 4 --sequence-parallel",
    "kv-channels": f"{PAPER_1B} --kv-channels 128 --make-vocab-size-divisible-by 1000",
    "experts": f"{PAPER_1B} --swiglu --num-experts 64 --moe-router-topk 6 --moe-layer-freq 3 "
    "--moe-ffn-hidden-size 1408 --moe-shared-expert-intermediate-size 2816 "
    "--expert-model-parallel-size 4",
    "experts-of-the-dense-width": f"{PAPER_3B} --xielu --num-experts 8 --moe-layer-freq "
    "([0]+[1]*2)*12 --expert-tensor-parallel-size 1 --expert-model-parallel-size 8",
    "padded": f"{PAPER_1B} --padded-vocab-size 147456 --swiglu --ffn-hidden-size 4096",
}


def megatron_arguments(command: str) -> Namespace:
    """Megatron's own parser, and what `validate_args` derives."""
    from megatron.training.vocab_utils import calculate_padded_vocab_size

    args = parse_as_megatron(command.split())
    args.kv_channels = args.kv_channels or args.hidden_size // args.num_attention_heads
    default = int(8 * args.hidden_size / 3 / 64) * 64 if args.swiglu else 4 * args.hidden_size
    args.ffn_hidden_size = args.ffn_hidden_size or default
    args.padded_vocab_size = args.padded_vocab_size or calculate_padded_vocab_size(
        args.vocab_size,
        args.make_vocab_size_divisible_by,
        args.tensor_model_parallel_size,
        logging_enabled=False,
    )
    args.expert_tensor_parallel_size = (
        args.expert_tensor_parallel_size or args.tensor_model_parallel_size
    )
    args.moe_ffn_hidden_size = args.moe_ffn_hidden_size or args.ffn_hidden_size
    args.virtual_pipeline_model_parallel_size = None
    return args


@pytest.mark.parametrize("predictions", ["", " --mtp-num-layers 2"])
@pytest.mark.parametrize("shape", SHAPES)
def test_flops_are_megatrons(shape, predictions):
    from megatron.training.training import num_floating_point_operations

    plan = Plan((SHAPES[shape] + predictions).split())
    args = megatron_arguments(SHAPES[shape] + predictions)
    expected = num_floating_point_operations(args, plan.global_batch)
    assert plan.tokens_per_step() * plan.model.flops_per_token() == expected


@pytest.mark.parametrize("pipeline", [1, 2])
@pytest.mark.parametrize("optimizer", ["--use-distributed-optimizer", ""])
@pytest.mark.parametrize("shape", SHAPES)
def test_weights_and_optimizer_are_megatrons(shape, optimizer, pipeline):
    from megatron.training.theoretical_memory_usage import compute_weight_and_optimizer_memory

    command = SHAPES[shape].replace("--use-distributed-optimizer", optimizer)
    command += f" --pipeline-model-parallel-size {pipeline}"
    plan = Plan(command.split(), cluster=Cluster(nodes=4))
    args = megatron_arguments(command)
    args.world_size, args.data_parallel_size = plan.cluster.gpus, plan.data
    memory = plan.memory(stage=0)
    # Megatron's leaves out alphas and qk-layernorm, and spreads the last norm over the stages.
    ours = memory.weights + memory.gradients + memory.optimizer
    assert ours == pytest.approx(compute_weight_and_optimizer_memory(args), rel=2e-5)


def test_layer_activations_are_megatrons():
    from megatron.training.theoretical_memory_usage import compute_activation_memory

    command = f"{SHAPES['3B-tp2']} --hidden-dropout 0.1 --position-embedding-type learned_absolute"
    one, two = (
        compute_activation_memory(megatron_arguments(f"{command} --num-layers {n}"), None)
        for n in (1, 2)
    )
    plan = Plan(command.split())
    tokens = plan.micro_batch * plan.model.sequence
    softmax = 4 * plan.model.heads / plan.tensor
    assert (plan.layer_bytes_per_token() - softmax) * tokens == pytest.approx(two - one, rel=1e-12)


def test_mlp_keeps_what_the_docs_measured():
    flags = {
        "SwiGLU": "--swiglu",
        "GELU": "",
        "ReLU²": "--squared-relu",
        "xIELU": "--xielu",
        "xIPReLU": "--xiprelu",
        "xIELU, `--xielu-recompute-output`": "--xielu --xielu-recompute-output",
        "xIPReLU, `--xielu-recompute-output`": "--xiprelu --xielu-recompute-output",
    }
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (REPOSITORY / "docs" / "memory.md").read_text().splitlines()
        if line.startswith(("| 1.1B", "| 3B"))
    ]
    assert len(rows) == 14
    for _, mlp, hidden, ffn, _, measured, _ in rows:
        shape = f"--hidden-size {hidden} --ffn-hidden-size {ffn}"
        plan = Plan(f"{PAPER_1B} {shape} {flags[mlp]}".split())
        kept = plan.mlp_bytes_per_token() + 2 * int(hidden)  # and the MLP's input
        assert kept == int(measured.replace(",", ""))


def test_the_papers_models():
    ungated, gated = (
        [Model.of(parse(f"{paper} {mlp}".split())) for paper, mlp in sizes]
        for sizes in (
            [
                (PAPER_1B, "--xielu --ffn-hidden-size 9216"),
                (PAPER_3B, "--xielu --ffn-hidden-size 12288"),
            ],
            [
                (PAPER_1B, "--swiglu --ffn-hidden-size 6144"),
                (PAPER_3B, "--swiglu --ffn-hidden-size 8192"),
            ],
        )
    )
    for one, other in zip(ungated, gated, strict=True):
        assert one.parameters() == pytest.approx(other.parameters(), rel=1e-3)
        assert one.flops_per_token() == other.flops_per_token()
    assert ungated[0].parameters() == pytest.approx(1.1e9, rel=0.03)
    assert ungated[1].parameters() == pytest.approx(3e9, rel=0.03)
    plan = plan_1b()
    assert plan_checks.problems(plan, environment={}) == []
    assert (plan.data, plan.accumulation) == (88, 1)
    assert plan.tokens_per_step() == 1_802_240
    schedule = plan.schedule()
    assert (schedule.steps, schedule.warmup, schedule.decay) == (70_000, 880_000, 6_380_000)
    assert schedule.steps * plan.tokens_per_step() == pytest.approx(126.2e9, rel=1e-3)
    assert schedule.stable == schedule.samples - schedule.warmup - schedule.decay


# Memory that depends on the layout


def test_chunks_in_flight():
    def chunks(flags: str) -> list[int]:
        plan = plan_1b(f"--micro-batch-size 1 {flags}", Cluster(nodes=5))
        return [plan.chunks_in_flight(stage) for stage in range(plan.pipeline)]

    assert chunks("") == [1]
    assert chunks("--pipeline-model-parallel-size 4") == [4, 3, 2, 1]
    virtual = "--pipeline-model-parallel-size 4 --num-virtual-stages-per-pipeline-rank 2"
    assert chunks(virtual) == [11, 9, 7, 5]
    assert chunks(f"{virtual} --global-batch-size 40") == [8, 8, 7, 5]


def test_fp8_keeps_a_byte_of_an_output_and_copies_of_matrices():
    """As Transformer Engine does, in the layers that compute in FP8: 22 of 24."""
    flags = "--fp8-format hybrid --fp8-recipe tensorwise --first-last-layers-bf16"
    bf16, fp8 = plan_1b(), plan_1b(flags)
    assert fp8.mlp_bytes_per_token() == pytest.approx(9216 * (2 + 2 * 2 / 24 + 1 * 22 / 24))
    copies = fp8.memory().weights - bf16.memory().weights
    assert copies == pytest.approx(2 * 22 * fp8.model.layer_split)
    halves = plan_1b(f"{flags} --pipeline-model-parallel-size 2")
    assert halves.fp8_share == pytest.approx(11 / 12)


def test_what_saves_memory_does():
    def activations(flags: str) -> float:
        return plan_1b(flags).memory().activations

    everything = activations("")
    full = "--recompute-granularity full --recompute-num-layers"
    # 24 inputs of a layer, and one layer that goes backward.
    tokens, layer = 5 * 4096, plan_1b().layer_bytes_per_token()
    last_norm = 4 * 1536
    assert activations(f"{full} 1 --recompute-method uniform") == tokens * (
        24 * 2 * 1536 + layer + last_norm
    )
    assert activations(f"{full} 6 --recompute-method block") == tokens * (
        6 * 2 * 1536 + 18 * layer + layer + last_norm
    )
    saved = everything - activations("--xielu-recompute-output")
    assert saved == tokens * 24 * 2 * 9216
    halved = activations("--tensor-model-parallel-size 2 --sequence-parallel --micro-batch-size 5")
    assert halved == everything / 2
    assert activations("--context-parallel-size 2") == everything / 2
    unfused = plan_1b("--transformer-impl local")
    scores = 16 * 4096 * 2  # bf16, no dropout
    assert unfused.layer_bytes_per_token() == layer + scores
    assert plan_1b("--transformer-impl local --recompute-activations").layer_bytes_per_token() == (
        layer
    )
    # Of bf16 logits, and fp32 ones of which the compiled loss has two in its backward pass.
    loss, logits = "--cross-entropy-loss-fusion", tokens * plan_1b().model.padded_vocabulary
    te = f"{loss} --cross-entropy-fusion-impl te"
    for flags, size in (("", 6), (loss, 10), (te, 2)):
        assert plan_1b(flags).memory().logits == size * logits
    in_bf16 = plan_1b("--grad-reduce-in-bf16").memory()
    assert in_bf16.gradients == plan_1b().memory().gradients / 2


def test_experts_keep_activations_of_the_tokens_sent_to_them():
    """By estimate: under balanced routing each rank computes top-k copies of its own tokens."""
    flags = "--num-experts 8 --moe-ffn-hidden-size 1024"
    one, two = (
        plan_1b(f"{flags} --moe-router-topk {k} --expert-model-parallel-size 8") for k in (1, 2)
    )
    dense = plan_1b().layer_bytes_per_token()
    without = dense - plan_1b().mlp_bytes_per_token() + 8 * 8
    # An expert's input, and what its MLP keeps, the output also times the router's probability.
    expert = 2 * 1536 + 2 * 2 * 1024 + 2 * 1024
    assert one.layer_bytes_per_token(experts=True) == without + expert
    assert two.layer_bytes_per_token(experts=True) == without + 2 * expert
    tokens = 5 * 4096
    assert two.memory().activations - one.memory().activations == tokens * 24 * expert
    assert one.expert_optimizer_shards() == 11 and one.optimizer_shards() == 88
    ahead = plan_1b(f"{flags} --mtp-num-layers 1").memory()
    assert ahead.logits == 2 * one.memory().logits


@pytest.mark.parametrize(
    ("flags", "kept"),  # of the ffn width, 16-bit numbers a token copy
    [
        ("--xielu", 3),
        ("--xielu --moe-grouped-gemm", 2),
        ("--xielu --moe-grouped-gemm --transformer-impl local", 3),  # which ignores it
        ("--xielu --moe-grouped-gemm --recompute-activations --recompute-modules moe_act", 1),
        ("--xielu --recompute-activations --recompute-modules moe_act", 3),  # of grouped ones alone
        ("--xielu --xielu-recompute-output", 2),
        ("--xielu --xielu-recompute-output --moe-grouped-gemm", 1),
        ("--squared-relu", 3),
        ("--squared-relu --moe-grouped-gemm", 3),
        ("--swiglu", 3),  # gate and up, and the weighted product of both
        ("--swiglu --moe-grouped-gemm", 3),
        ("--swiglu --moe-grouped-gemm --recompute-activations --recompute-modules moe_act", 2),
    ],
)
def test_what_a_routed_expert_keeps(flags, kept):
    """And nothing else changes with experts in one grouped layer."""
    command = f"{PAPER_1B} --num-experts 8 --moe-router-topk 2 --moe-ffn-hidden-size 1024"
    plan = Plan([*command.split(), *flags.split()], cluster=Cluster(nodes=22))
    assert plan.experts_bytes_per_token() == 2 * (2 * 1536 + 2 * 1024 * kept) + 8 * 8
    alone = Plan([*command.split(), flags.split()[0]], cluster=Cluster(nodes=22))
    assert plan.model == alone.model and plan.model.parameters() == alone.model.parameters()
    assert plan.expert_parameters_on(0) == alone.expert_parameters_on(0)


def test_a_pipeline_stage_has_its_own_experts():
    command = "--num-experts 8 --pipeline-model-parallel-size 4 --moe-layer-freq [0]*6+[1]*18"
    plan = plan_1b(command, Cluster(nodes=2))
    held = [plan.expert_parameters_on(stage) for stage in range(4)]
    assert held[0] == 0 and held[1] == held[2] == held[3] > 0
    chunks = plan_1b(f"{command} --num-virtual-stages-per-pipeline-rank 2", Cluster(nodes=2))
    assert sum(map(chunks.expert_parameters_on, range(4))) == sum(held)
    assert chunks.expert_parameters_on(0) == held[1] / 2
    # More micro-batches in flight than the later ones, and experts, unlike the first.
    assert plan.memory().stage == 1
    report = plan_report.text(plan_1b("--num-experts 8"))
    assert max(map(len, report.splitlines())) <= 100
    assert "2 of 8 a token" in report and "as if dense" in report and "active" in report


def test_proposed_fixes_fit():
    cluster = Cluster(nodes=8)
    flags = "--micro-batch-size 8 --tensor-model-parallel-size 2 --sequence-parallel"
    command = f"{APERTUS_8B} {flags}"
    [problem] = plan_checks.problems(Plan(command.split(), cluster=cluster), environment={})
    fixes = re.findall(r"(--[^()]*?) \(([\d.]+) GiB\)", problem)
    assert len(fixes) == 3
    for fix, gib in fixes:
        plan = Plan(f"{command} {fix}".split(), cluster=cluster)
        assert plan_checks.problems(plan, environment={}) == []
        assert plan.memory().total / GIB == pytest.approx(float(gib), abs=0.06)
        assert plan_checks.warnings(plan) == []


# Checks

ERRORS = {
    "--optimizer soap --save out --save-interval 5": "--optimizer soap cannot be resumed",
    "--save out --save-interval 5 --swiglu --fp8-param-gather": "--fp8-param-gather: it is not",
    "--cross-entropy-loss-fusion --cross-entropy-fusion-impl te": "has refused it since 0.18.1",
    "--optimizer sgd": "--use-distributed-optimizer; drop that",
    "--num-attention-heads 12 --tensor-model-parallel-size 8": "--num-attention-heads 12",
    "--group-query-attention --num-query-groups 6 --tensor-model-parallel-size 4 "
    "--num-attention-heads 12": "--num-query-groups 6",
    "--group-query-attention --num-query-groups 5": "--num-query-groups 5 does not divide",
    "--ffn-hidden-size 9217 --tensor-model-parallel-size 2": "--ffn-hidden-size 9217",
    "--padded-vocab-size 131073 --tensor-model-parallel-size 2": "--padded-vocab-size 131073",
    "--pipeline-model-parallel-size 5": "--num-layers 24; use one of 1, 2, 3, 4, 6, 8, 12, 24",
    "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 5": "the 12 layers",
    "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 5": "× --pipeline",
    "--num-virtual-stages-per-pipeline-rank 2": "--pipeline-model-parallel-size 2 or more",
    "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 "
    "--global-batch-size 660": "2 micro-batches a step, not 3",
    "--tensor-model-parallel-size 16": "11 × 8 = 88 GPUs",
    "--context-parallel-size 3 --seq-length 4096": "2 × --context-parallel-size 3",
    "--tensor-model-parallel-size 8 --sequence-parallel --seq-length 4092": "--seq-length 4092 per",
    "--max-position-embeddings 2048": "--max-position-embeddings",
    "--global-batch-size 500": "work: --global-batch-size 528 --micro-batch-size 6, or --global",
    "--global-batch-size 400": "these work: --nodes 10, or --global-batch-size 440, or --global-"
    "batch-size 352 --micro-batch-size 4",
    "--micro-batch-size 3": "these work: --micro-batch-size 5",
    "--global-batch-size 40": "fewer samples than the 88 data-parallel ranks; these work: "
    "--nodes 1, or --global-batch-size 88 --micro-batch-size 1",
    "--lr-wsd-decay-samples 30000000": "--lr-wsd-decay-samples, or train longer",
    "--lr-decay-samples 440": "shorten --lr-warmup-samples",
    "--lr-warmup-iters 5": "give --lr-warmup-samples",
    "--lr-warmup-fraction 0.1": "give one of --lr-warmup-fraction",
    "--train-iters 5": "give one of --train-samples and --train-iters",
    "--train-samples 5": "less than one step",
    "--save out": "--save needs --save-interval",
    "--xiprelu": "give one activation",
    "--swiglu": "--xielu does not work with --swiglu",
    "--sft": "--xielu does not work with --sft",
    "--multi-latent-attention": "--multi-latent-attention is not known",
    "--moe-latent-size 64": "--moe-latent-size is not known to the plan",
    "--xielu-shared-alphas --num-experts 8": "shared-alphas does not work with --num-experts",
    "--mtp-num-layers 1 --pipeline-model-parallel-size 2 --save out --save-interval 5": (
        "--mtp-num-layers with --pipeline-model-parallel-size 2 needs --untie-embeddings"
    ),
    "--expert-model-parallel-size 2": "--expert-model-parallel-size 2 needs --num-experts",
    "--num-experts 8 --expert-model-parallel-size 3": "does not divide --num-experts 8",
    "--num-experts 8 --tensor-model-parallel-size 2": "size 2 needs --sequence-parallel",
    "--num-experts 8 --moe-ffn-hidden-size 99 --expert-tensor-parallel-size 2": "hidden-size 99",
    "--num-experts 32 --expert-model-parallel-size 16": "88 GPUs are not a multiple of --expert-t",
    "--num-experts 8 --moe-shared-expert-intermediate-size 99 --tensor-model-parallel-size 2": (
        "--moe-shared-expert-intermediate-size; use one of 1, 3"
    ),
    "--transformer-impl inference_optimized": "--transformer-impl inference_optimized",
    "--rampup-batch-size 16 8 100": "reads it nowhere; drop it, or give --step-batch-size-schedule",
    "--use-distributed-optimizer --overlap-param-gather": "gather needs --overlap-grad-reduce",
    "--lr 1e-3 --min-lr 1": "--min-lr 1 is above --lr 0.001",
    "--cpu --distributed-backend=nccl": "--distributed-backend nccl needs a GPU; drop it for a CPU",
    "--fp16": "give one of --bf16 and --fp16",
    "--recompute-granularity full": "needs --recompute-method",
    "--num-experts 8 --recompute-activations --recompute-modules moe_act": (
        "--recompute-modules moe_act needs --moe-grouped-gemm"
    ),
    "--xielu-recompute-output --recompute-modules mlp": "--recompute-modules mlp",
    "--xielu-recompute-output --fp8-format hybrid": "--fp8-format",
    "--fp8-format hybrid --cpu": "--fp8-format needs a GPU",
    "--fp8-format hybrid --transformer-impl local": "--fp8-format does not work with --transformer",
    "--fp8-format hybrid --first-last-layers-bf16": "--fp8-recipe delayed, Megatron's default",
    "--fp8-format hybrid --ffn-hidden-size 9224": "--ffn-hidden-size makes 9224; change it",
    "--fp8-format e4m3 --fp8-recipe mxfp8 --tensor-model-parallel-size 4 --num-query-groups 1 "
    "--group-query-attention --kv-channels 12": "32 as widths on a tensor-parallel rank, and --num",
    "--fp8-format e4m3 --seq-length 4088": "needs multiples of 16 tokens on a rank",
    "--micro-batch-size 5 --seq-length 16384 --max-position-embeddings 16384": "do not fit into",
    "--data-path 0.5 /no/such/text": "--data-path /no/such/text: /no/such/text.idx does not exist",
    "--data-args-path /no/such/list --split 9,1,0": "--data-args-path /no/such/list does not exist",
    "--train-data-path a --valid-data-path b --split 9,1,0": "--split 9,1,0 does not go with --tr",
    "--data-args-path list.txt": "--data-args-path needs --split, such as 969,30,1",
    "--tokenizer-model=/no/such/tokenizer": "--tokenizer-model /no/such/tokenizer does not exist",
}


@pytest.mark.parametrize("flags", ERRORS)
def test_problem_names_the_flag(flags):
    found = plan_checks.problems(plan_1b(flags), environment={})
    assert any(ERRORS[flags] in problem for problem in found), found
    assert not any("\n" in problem for problem in found)


def test_layouts_beyond_those_walked_are_named():
    def warnings(nodes, flags=""):
        plan = plan_1b(f"--global-batch-size {40 * nodes} {flags}", Cluster(nodes))
        return [w for w in plan_checks.warnings(plan) if "walked" in w]

    assert warnings(64, "--save out --save-interval 5") == warnings(65) == []
    [warning] = warnings(65, "--save out --save-interval 5")
    assert warning.startswith("data parallel sizes")


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ("--num-layers 24", "--num-layers is required"),
        ("--micro-batch-size 5", "--micro-batch-size is required"),
        ("--vocab-size 131072", "the plan option --vocab-size"),
    ],
)
def test_too_little_is_known(removed, message):
    with pytest.raises(PlanError, match=message):
        Plan(PAPER_1B.replace(removed, "").split())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--moe-router-topk 9", "--moe-router-topk 9 must be from 1 to --num-experts 8"),
        ("--moe-layer-freq 0", "--moe-layer-freq must be 1 or more, not 0"),
        ("--moe-layer-freq [0]+[1]*22", "lists 23 layers, and --num-layers is 24"),
        *(
            (f"--moe-layer-freq {word}", "is neither a number nor a list of 0 and 1")
            for word in (
                *("[2]*24", "x", "[1]*10**9", "[1]*1000000", "1.5", "__import__('os')", "[[1]]"),
                *("(" * 300, "1*1*'a'", "[0]*"),
            )
        ),
    ],
)
def test_experts_that_megatron_does_not_build(flags, message):
    with pytest.raises(PlanError, match=message):
        plan_1b(f"--num-experts 8 {flags}")


def test_wrong_type_names_the_flag():
    with pytest.raises(PlanError, match="--num-layers: invalid int value: 'many'"):
        plan_1b("--num-layers many")


def test_last_value_wins_and_unknown_flags_are_passed_over():
    plan = plan_1b("--no-such-flag 3 words --num-layers 2 --num-layers=4 --num-laye 7")
    assert plan.model.layers == 4


def test_warnings():
    assert plan_checks.warnings(plan_1b()) == []

    def warn(flags: str, cluster: Cluster = NODES_1B) -> str:
        [warning] = plan_checks.warnings(plan_1b(flags, cluster))
        return warning

    assert "GPUs of a node" in warn(
        "--tensor-model-parallel-size 16 --sequence-parallel", Cluster(nodes=10)
    )
    assert "the last 1 are not trained on" in warn("--train-samples 30800001")
    assert "longer than the run" in warn("--lr-decay-samples 40000000")
    assert "equal size" in warn("--decoder-first-pipeline-num-layers 3")
    assert "an upper bound" in warn("--dataloader-inter-document-masking")
    total = plan_1b().memory().total / GIB
    tight = warn("", Cluster(nodes=11, gpu=replace(H100, memory_gib=total * 1.05)))
    assert "leaves less than 10%" in tight and "--xielu-recompute-output" in tight
    assert plan_checks.problems(plan_1b(), environment={}) == []


def test_data_of_a_list_must_exist(tmp_path):
    write_dataset(tmp_path / "text", [5] * 600)
    listed = tmp_path / "list.txt"
    listed.write_text(f"0.7 {tmp_path}/text\n0.3 {tmp_path}/more\n")
    plan = plan_1b(f"--data-args-path {listed} --split 9,1,0")
    found = plan_checks.problems(plan, environment={})
    assert [Path(problem.split()[-4]).name for problem in found] == ["more.idx"]
    assert plan_checks.problems(plan, environment={}, check_files=False) == []


@pytest.mark.parametrize(
    ("flags", "sequences", "message"),
    [
        ("", 200, "--split 969,30,1: of the 200 sequences of {} none is left for test; give it"),
        ("--split 1,99,0", 4, "--split 1,99,0: of the 4 sequences of {} none is left for train"),
        ("--split x", 200, "--split must be three shares, such as 969,30,1, not 'x'"),
        ("", 0, "--data-path {}: {}.idx has no sequences"),
    ],
)
def test_data_that_a_run_would_look_at_for_ever(tmp_path, flags, sequences, message):
    prefix = tmp_path / "text"
    write_dataset(prefix, [5] * sequences)
    [problem] = plan_checks.problems(plan_1b(f"--data-path {prefix} {flags}"), environment={})
    assert problem.startswith(message.format(prefix, prefix))


def test_data_listed_by_split_must_exist(tmp_path):
    listed = tmp_path / "list.json"
    listed.write_text(json.dumps({"train": [f"{tmp_path}/more"], "valid": None, "test": None}))
    plan = plan_1b(f"--per-split-data-args-path {listed} --eval-iters 0")
    found = plan_checks.problems(plan, environment={})
    assert [Path(problem.split()[-4]).name for problem in found] == ["more.idx"]
    listed.write_text("[]")
    [problem] = plan_checks.problems(plan, environment={})
    assert "is not a JSON object of lists" in problem


def test_data_of_another_vocabulary(tmp_path):
    write_dataset(tmp_path / "text", [3] * 600, {5: 200_000})
    [problem] = plan_checks.problems(plan_1b(f"--data-path {tmp_path}/text"), environment={})
    assert "text.bin has token 200000, the model's vocabulary only 131072 entries" in problem


def test_relative_paths_that_are_not_here_are_warned_of(tmp_path, monkeypatch):
    """The run may start elsewhere. Those that are here are looked at."""
    monkeypatch.chdir(tmp_path)
    paths = {
        "--data-path a/b": "--data-path a/b is not here",
        "--data-args-path list --split 9,1,0": "--data-args-path list is not here",
        "--tokenizer-model ./here": "--tokenizer-model ./here is not here",
        "--tokenizer-model who/name": "",
    }
    for flags, message in paths.items():
        plan = plan_1b(flags)
        assert plan_checks.problems(plan, environment={}) == []
        found = [w for w in plan_checks.data(plan)[1] if "not here" in w]
        assert found == [f"{message}; does the run start elsewhere?"] * bool(message)
        assert plan_checks.warnings(plan) == []
    (tmp_path / "list").write_text("")
    [problem] = plan_checks.problems(plan_1b("--data-args-path list --split 9,1,0"), environment={})
    assert "--data-args-path list is [], not a list of prefixes" in problem


def test_secrets_are_named_and_not_printed():
    secret = "abcdefgh-1234"
    for flags in (f"--wandb-api-key {secret}", f"--wandb-api-key={secret}"):
        plan = plan_1b(flags)
        [problem] = plan_checks.problems(plan, environment={"WANDB_API_KEY": secret})
        assert "WANDB_API_KEY" in problem and secret not in problem
        innocent = {"TOKENIZER": secret, "HOME": secret, "TRAIN_TOKENS": secret}
        assert plan_checks.problems(plan, environment=innocent) == []
    assert plan_checks.problems(plan_1b("--x short"), environment={"KEY": "short"}) == []


def test_checkpoints():
    def counts(flags: str, **keep) -> tuple[int, int]:
        plan = plan_1b(f"--save out --save-interval 3000 {flags}", **keep).checkpoints()
        return plan.written, plan.kept

    # 3000 … 69000, and the end of the run at 70000.
    assert counts("") == (24, 24)
    assert counts("", keep_checkpoints=2) == (24, 2)
    assert counts("", keep_checkpoints=2, keep_every=30_000) == (24, 4)
    assert counts("--save-retain-interval 30000") == (24, 3)
    checkpoints = plan_1b("--save out --save-interval 3000", keep_checkpoints=2).checkpoints()
    assert checkpoints.bytes == 14 * plan_1b().model.parameters()
    assert checkpoints.disk == 3 * checkpoints.bytes
    assert plan_1b().checkpoints() is None


def test_optimizer_formats():
    """At 88 ranks of the 1.1B; test_optimizer_format.py counts the bytes of real trainings."""
    plan = plan_1b("--save out --save-interval 1000")
    parameters = plan.model.parameters()
    part = 14 * parameters / 88
    dp, full = plan.save(DP), plan.save(FULL)
    assert (dp.received, dp.host_memory, dp.to_host, dp.written) == (0, part, part, part)
    assert full.received == pytest.approx(12 * parameters * 87 / 88)
    assert full.received_by_node == pytest.approx(12 * parameters * 10 / 11)
    assert full.host_memory == 12 * parameters + part and full.written == part
    # Four passes over host memory; the network is fast beside them.
    assert plan.seconds_to_save(FULL) == pytest.approx(4 * 12 * parameters / 5e9, rel=0.01)
    assert plan.seconds_to_save(DP) == pytest.approx(part / 5e9)
    fast = plan_1b("--save out", Cluster(nodes=11, host_copy=50.0, node_network=4.0))
    assert fast.seconds_to_save(FULL) == pytest.approx(
        (full.received_by_node / 4 + (48 + 2 / 88) * parameters / 50) / 1e9
    )
    read = {
        (kind, parallel): plan.read_by_all(kind, parallel=parallel) / parameters
        for kind in (DP, FULL)
        for parallel in (False, True)
    }
    assert read == pytest.approx(
        {(DP, False): 2 * 88 + 12, (FULL, False): 14 * 88, (DP, True): 14, (FULL, True): 14}
    )
    assert plan.load(DP, parallel=True).host_memory == 0
    assert plan.load(FULL, parallel=False).host_memory == 12 * parameters
    assert plan.load(FULL, parallel=True).host_memory == 24 * parameters


def test_optimizer_formats_under_model_parallelism():
    """A node has all tensor-parallel slices of a stage, and fewer ranks of each."""
    command = f"{PAPER_3B} --xielu --ffn-hidden-size 12288"
    plan = Plan(command.split(), cluster=Cluster(nodes=32))
    held = 12 * plan.parameters_on(0)
    save = plan.save(FULL)
    assert save.received == pytest.approx(held * 127 / 128)
    assert save.received_by_node == pytest.approx(2 * held * 31 / 32)
    assert plan.read_by_all(DP, parallel=True) == pytest.approx(2 * 14 * plan.parameters_on(0))
    staged = Plan([*command.split(), "--pipeline-model-parallel-size", "4"], cluster=plan.cluster)
    assert staged.read_by_all(FULL, parallel=True) == pytest.approx(
        2 * 14 * sum(staged.parameters_on(stage) for stage in range(4))
    )
    # Alone on its node a rank receives nothing from others there.
    wide = Plan([*command.split(), "--tensor-model-parallel-size", "8"], cluster=plan.cluster)
    assert wide.save(FULL).received_by_node == pytest.approx(8 * wide.save(FULL).received)
    assert plan_1b("--save out", Cluster(nodes=1)).save(FULL).received_by_node == 0


def test_what_ties_a_run_to_its_layout_is_said():
    def said(flags: str) -> str:
        report = plan_report.text(plan_1b(f"--save out --save-interval 1000 {flags}"))
        assert max(map(len, report.splitlines())) <= 100
        return "".join(re.findall(r"optimizer state +(.*)", report))

    assert said("") == "dp_reshardable: later jobs keep TP, PP, EP and buckets"
    assert said("--overlap-grad-reduce") == (
        "dp_reshardable: later jobs keep TP, PP, EP and the node count"
    )
    for fixed in ("--ddp-bucket-size 88000000", "--ddp-num-buckets 20"):
        assert said(f"--overlap-grad-reduce {fixed}") == said("")
    assert said("--num-experts 8 --expert-model-parallel-size 8") == (
        "dp_reshardable: later jobs keep TP, PP, EP, grouped experts or not, and buckets"
    )
    assert said("--dist-ckpt-optim-fully-reshardable") == (
        "fully_reshardable: a later job may change TP and PP"
    )
    assert said("--no-save-optim") == ""


def report(flags: str) -> str:
    lines = plan_report.text(plan_1b(flags)).splitlines()
    assert max(map(len, lines)) <= 100
    return "\n".join(lines)


def test_a_save_that_training_does_not_write_beside_itself():
    """It waits for the file system, whose speed nobody has told the plan."""
    saved = "--save out --save-interval 1000"
    waits = re.findall(r"waits +(.*)", report(saved))
    assert waits == ["for the file system to take 14.4 GiB: there is no --async-save"]
    assert "stalls" not in report(saved)
    assert "stalls" in report(f"{saved} --async-save")
    formats = plan_report.as_dict(plan_1b(saved))["optimizer_format"]
    assert formats[DP]["save"]["seconds"] is None


def test_a_vocabulary_of_which_only_the_padded_size_is_known():
    command = f"{PAPER_1B.replace('--vocab-size 131072', '')} --padded-vocab-size 147456"
    assert "147,456, padded" not in plan_report.text(Plan(command.split()))
    assert re.search("vocabulary +padded to 147,456; tied", plan_report.text(Plan(command.split())))
    assert "131,072, padded to 147,456" in report("--padded-vocab-size 147456")


def test_on_a_cpu_nothing_is_said_of_gpus():
    said = report("--cpu --save out --save-interval 1000 --async-save")
    for words in ("H100", "MFU", "days", "hours", "a step,", "79.1", "layouts", "GPU", "waits"):
        assert words not in said, words
    numbers = plan_report.as_dict(plan_1b("--cpu --save out --save-interval 1000 --async-save"))
    assert set(numbers["compute"]) == {"flops_per_token", "flops"}
    # No GPU has the memory for it.
    big = plan_1b(
        "--cpu --micro-batch-size 5 --global-batch-size 440 --seq-length 16384 "
        "--max-position-embeddings 16384"
    )
    assert plan_checks.problems(big, environment={}) == []


def test_a_gpu_that_was_named():
    def problems(gpu: str, flags: str) -> list[str]:
        error = run_plan(f"--nodes 11 --check {gpu}", f"{COMMAND_1B} {flags}").stderr
        return [line.partition("error: ")[2] for line in error.splitlines()]

    fp8 = "--fp8-format hybrid --fp8-recipe"
    [fault] = problems("--gpu a100", f"{fp8} tensorwise")
    assert fault.startswith("--fp8-recipe=tensorwise needs a GPU of compute capability 8.9 or more")
    assert "and A100 has 8.0; " in fault
    [fault] = problems("--gpu gh200", f"{fp8} mxfp8")
    assert "10.0 or more (Blackwell of a data centre), and GH200 has 9.0; " in fault
    # The default may not be the GPU of the run.
    for gpu in ("", "--gpu b200", "--gpu gb200"):
        assert problems(gpu, f"{fp8} mxfp8") == []
    long = "--micro-batch-size 5 --seq-length 16384 --max-position-embeddings 16384"
    for gpu, limit in {
        "--gpu gh200": "--gpu=gh200 (94.5 GiB)",
        "--gpu gh200 --gpu-memory 90": "--gpu-memory 90",
        "": "--gpu-memory 79.1",
    }.items():
        [fault] = problems(gpu, long)
        assert f"do not fit into {limit}; " in fault


def test_nodes_of_more_gpus_than_they_have():
    def said(name: str, gpus: int) -> list[str]:
        cluster = Cluster(1, gpus, BY_NAME[name])
        warnings = plan_checks.warnings(plan_1b("", cluster))
        return [warning for warning in warnings if "node has" in warning]

    assert said("gh200", 8) == ["a GH200 node has 4 GPUs at most sites; --gpus-per-node 4"]
    assert said("gb200", 4) == said("gh200", 4) == said("h100", 8) == []


# The command

COMMAND_1B = f"{PAPER_1B} --xielu --ffn-hidden-size 9216"


def run_plan(options: str, command: str) -> subprocess.CompletedProcess:
    words = [sys.executable, "-m", "megatron_xielu.plan", *options.split(), "--", *command.split()]
    return subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True)


def test_command():
    command = f"{PAPER_1B} --xielu --ffn-hidden-size 9216 --save out --save-interval 1000"
    command += " --async-save"
    done = run_plan("--nodes 11 --keep-checkpoints 3", command)
    assert done.returncode == 0 and done.stderr == ""
    assert max(map(len, done.stdout.splitlines())) <= 100
    for words in ("1,107,371,568", "1,802,240 tokens", "published on H100", "xIELU", "rope"):
        assert words in done.stdout
    assert re.search(r"s a step, \d\.\d+ hours, ", done.stdout)  # of less than two days
    # What Megatron prints: the FLOPs of a step, by seconds and GPUs.
    tflops, tokens = re.search(r"a GPU +(\d+) TFLOP/s.*; ([\d,]+) tokens/s", done.stdout).groups()

    numbers = json.loads(run_plan("--nodes 11 --json", command).stdout)
    assert numbers["model"]["parameters"] == 1_107_371_568
    assert numbers["problems"] == numbers["warnings"] == []
    compute = numbers["compute"]
    speed = compute["flops"] / compute["seconds"] / 88 / 1e12
    assert f"{speed:.0f}" == tflops and speed == compute["tflops_per_gpu"]
    assert f"{1_802_240 / compute['seconds_per_step'] / 88:,.0f}" == tokens
    formats = numbers["optimizer_format"]
    assert formats["chosen"] == DP
    assert formats[FULL]["save"]["seconds"] > 100 * formats[DP]["save"]["seconds"]
    assert formats[FULL]["load"]["fully_parallel"]["host_memory"] == 24 * 1_107_371_568
    slow = json.loads(run_plan("--nodes 11 --json --host-copy 2.5", command).stdout)
    slow_save = slow["optimizer_format"][DP]["save"]["seconds"]
    assert slow_save == pytest.approx(2 * formats[DP]["save"]["seconds"])

    # The GPU sets its memory and peak; each may be given besides.
    grace = json.loads(run_plan("--gpu gh200 --peak-tflops 900 --json", command).stdout)
    gpu = grace["cluster"]["gpu"]
    assert (gpu["memory_gib"], gpu["peak_tflops"]) == (94.5, 900)
    assert "published on GH200" in grace["compute"]["mfu"]["source"]

    done = run_plan("--nodes 11 --check", command)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = run_plan("--nodes 12 --check", f"{command} --seq-length 4097")
    assert done.returncode == 2 and done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 2 and all(line.startswith("megatron_xielu: error: --") for line in lines)


def test_runs_on_a_login_node():
    code = (
        "import sys, megatron_xielu.plan.__main__; "
        "sys.exit({'torch', 'numpy', 'megatron'} & set(sys.modules) or print(*("
        "m.__file__ for name, m in sys.modules.items() if name.startswith('megatron_xielu'))))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    sources = done.stdout.split()
    assert {"checks.py", "optimizer_format.py"} < {Path(source).name for source in sources}
    for source in sources:
        ast.parse(Path(source).read_text(), feature_version=(3, 9))
