"""What this package and Megatron call their activations, which one a model has, the defaults, which
numbers a flag takes, and which flags are refused, with the reason of each: `make docs` writes them
to docs/limits.md.

Every other file asks here. Standard library only, and of Python 3.9: a plan runs on a login node.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_xielu.common import per_layer
from megatron_xielu.common.flags import COUNT, POSITIVE, Limits, argument_of, flag_of

DEFAULT_ALPHA_INIT = 0.8  # effective, of both sides
DEFAULT_BETA = 0.5

# The positive numbers of float32, in which the kernels compute; one that is less is 0 to them.
FLOAT32_LEAST, FLOAT32_MOST = 1.2e-38, 3.4e38

# The arguments that configure one of our activations, and what each is where its flag is not given.
SETTINGS = {
    "xielu_alpha_p_init": DEFAULT_ALPHA_INIT,
    "xielu_alpha_n_init": DEFAULT_ALPHA_INIT,
    "xielu_beta": DEFAULT_BETA,
}
# Those of which each layer may have its own, and what a file calls them.
PER_LAYER = {"xielu_alpha_p_init": "alpha_p", "xielu_alpha_n_init": "alpha_n"}

# What the optimizer does with alphas alone: their learning rate, as a multiple of the model's, and
# their weight decay. With these values they have no parameter group of their own.
ALPHA_GROUP = {"xielu_alpha_lr_mult": 1.0, "xielu_alpha_weight_decay": 0.0}

# All of these, with their defaults.
DEFAULTS = {**SETTINGS, **ALPHA_GROUP}

# By argument, what a change of it is called: in the name of a variant, and for people.
ABLATIONS = {
    "xielu_frozen_alphas": ("frozen", "alphas frozen"),
    "xielu_shared_alphas": ("shared", "one pair for all layers"),
    "xielu_recompute_output": ("recompute", "output recomputed"),
    "xielu_alpha_p_init": ("init-p", "αp from"),
    "xielu_alpha_n_init": ("init-n", "αn from"),
    "xielu_beta": ("beta", "β"),
    "xielu_alpha_lr_mult": ("lr", "learning rate of alphas ×"),
    "xielu_alpha_weight_decay": ("decay", "weight decay of alphas"),
}

SPEC_MODULE = "megatron_xielu.layer_specs"


@dataclass(frozen=True)
class Activation:
    """An activation that a model can have.

    Attributes:
        label: for people.
        argument: Megatron's or ours, of the flag that asks for it; None for the default.
        gated: fc1 makes two tensors of the ffn width, and one scales the other.
        trainable: each MLP has a pair of alphas: one of ours.
    """

    label: str
    argument: str | None
    gated: bool = False
    trainable: bool = False

    @property
    def flag(self) -> str | None:
        """The flag that asks for it."""
        return None if self.argument is None else flag_of(self.argument)


# By the name that results, reports and variants have. The first one that is asked for counts.
ACTIVATIONS = {
    "xielu": Activation("xIELU", "xielu", trainable=True),
    "xiprelu": Activation("xIPReLU", "xiprelu", trainable=True),
    "swiglu": Activation("SwiGLU", "swiglu", gated=True),
    "relu2": Activation("ReLU²", "squared_relu"),
    # Its gate is x·σ(1.702·x), quick_gelu of megatron/core/activations.py, and not GELU, the gate
    # of GEGLU (arXiv 2002.05202), for which Megatron has no flag.
    "quick_geglu": Activation("QuickGEGLU", "quick_geglu", gated=True),
    "gelu": Activation("GELU", None),
}
PRETRAIN_SH = ("xielu", "xiprelu", "relu2", "swiglu", "gelu")  # its values of ACTIVATION
TRAINABLE = tuple(name for name, activation in ACTIVATIONS.items() if activation.trainable)


def activations_of(arguments: Any) -> list[str]:
    """Every activation that arguments ask for, by flag or by ``--spec``, ours first.

    Args:
        arguments: of a command line, a checkpoint or an event file; anything may be missing.
    """
    spec = getattr(arguments, "spec", None)
    named = None
    if isinstance(spec, (list, tuple)) and len(spec) > 1 and spec[0] == SPEC_MODULE:
        named = spec[1]
    return [
        name
        for name, activation in ACTIVATIONS.items()
        if (activation.argument and getattr(arguments, activation.argument, False))
        or (activation.trainable and named == f"{name}_layer_spec")
    ]


def activation_of(arguments: Any) -> str:
    """The activation that arguments mean; GELU, Megatron's default, where they ask for none."""
    return (*activations_of(arguments), "gelu")[0]


def alpha_group_of(arguments: Any) -> list[str]:
    """What arguments ask for of `ALPHA_GROUP`, in words."""
    lr_mult, decay = (getattr(arguments, name, None) for name in ALPHA_GROUP)
    words = [] if lr_mult in (None, 1) else [f"learning rate × {lr_mult:g}"]
    return words + ([f"weight decay {decay:g}"] if decay else [])


def ablations_of(arguments: Any) -> list[str]:
    """What arguments ask for of `ABLATIONS` that is not the default, in words."""
    found = []
    for name, (_, said) in ABLATIONS.items():
        value = getattr(arguments, name, None)
        if value not in (None, False, DEFAULTS.get(name)):
            found.append(f"{said} {per_layer.in_words(value)}".strip())
    return found


def needs_ours(flag: str) -> str:
    """The error where ``flag`` is given for an activation that is not there."""
    return f"{flag} needs --xielu or --xiprelu"


def read_per_layer(arguments: Any) -> None:
    """Replace what `PER_LAYER` flags were given, a list or a file, by its numbers.

    Raises:
        ValueError: it cannot be read, or is of another number of layers or another β; names the
            flag.
    """
    layers, beta = (getattr(arguments, name, None) for name in ("num_layers", "xielu_beta"))
    beta = DEFAULT_BETA if beta is None else beta
    for name, side in PER_LAYER.items():
        value = per_layer.read(getattr(arguments, name, None), flag_of(name), side, layers, beta)
        setattr(arguments, name, value)


def alpha_n_floor(name: str, beta: float) -> float:
    """What the effective αn always stays above: αn = floor + softplus(alpha_n).

    β for xIELU, whose slope tends to β − αn for x → −∞ and must stay negative there.
    """
    return beta if name == "xielu" else 0.0


def alpha_n_fault(name: str, alpha_n: float, beta: float) -> str:
    """What an initial effective αn must be instead; "" if its raw value is a number of float32."""
    floor = alpha_n_floor(name, beta)
    return f"must be above {floor}" if alpha_n - floor < FLOAT32_LEAST else ""


GPUS = Limits(1, 100_000)  # of a job, or its nodes: beyond any cluster that there is

_SIZE = Limits(1, 2**31 - 1)
_FROM_0 = Limits(0, 1e30, whole=False)
_SHARE = Limits(0, 1, whole=False)
# The largest that has been learned is 174, in a released model; 16 bits end at 65504.
_ALPHA = Limits(FLOAT32_LEAST, 1000, whole=False)

# By flag, Megatron's and ours, each of which is a number or not given. What is not here may be any
# number but NaN.
NUMBERS = {
    **dict.fromkeys(
        (
            "--num-layers --hidden-size --ffn-hidden-size --num-attention-heads --num-query-groups "
            "--kv-channels --seq-length --encoder-seq-length --decoder-seq-length "
            "--max-position-embeddings --vocab-size --padded-vocab-size "
            "--make-vocab-size-divisible-by --micro-batch-size --global-batch-size "
            "--eval-micro-batch-size --eval-global-batch-size --tensor-model-parallel-size "
            "--pipeline-model-parallel-size --context-parallel-size --expert-model-parallel-size "
            "--expert-tensor-parallel-size --num-layers-per-virtual-pipeline-stage "
            "--num-virtual-stages-per-pipeline-rank --decoder-first-pipeline-num-layers "
            "--decoder-last-pipeline-num-layers --recompute-num-layers "
            "--num-distributed-optimizer-instances --num-dataset-builder-threads "
            "--distributed-timeout-minutes --moe-ffn-hidden-size "
            "--moe-shared-expert-intermediate-size"
        ).split(),
        _SIZE,
    ),
    # Models have a base of 3,580,165,449; a huge bucket is one bucket, a huge interval is never.
    **dict.fromkeys(
        (
            "--rotary-base --ddp-num-buckets --ddp-bucket-size --log-interval "
            "--tensorboard-log-interval --eval-interval --save-retain-interval"
        ).split(),
        POSITIVE,
    ),
    **dict.fromkeys(
        (
            "--train-iters --train-samples --lr-warmup-iters --lr-warmup-samples --lr-decay-iters "
            "--lr-decay-samples --lr-wsd-decay-iters --lr-wsd-decay-samples --save-interval "
            "--eval-iters --exit-interval --num-workers --xielu-check-tp-sync --num-experts "
            "--log-activation-inputs "
            "--moe-router-topk --mtp-num-layers --profile-step-end "
            "--num-layers-at-start-in-bf16 --num-layers-at-end-in-bf16"
        ).split(),
        COUNT,
    ),
    "--seed": Limits(1, 2**32 - 1),  # NumPy's
    **dict.fromkeys(
        (
            "--lr --min-lr --lr-warmup-init --weight-decay --adam-eps --init-method-std "
            "--loss-scale --xielu-alpha-weight-decay"
        ).split(),
        _FROM_0,
    ),
    "--straggler-ratio": Limits(1, 1e30, whole=False, above=True, or_0=True),
    # Infinity: measured, and not clipped. 0 and less: neither.
    "--clip-grad": Limits(-math.inf, whole=False),
    "--rope-scaling-factor": Limits(0, 1e30, whole=False, above=True),
    "--rotary-percent": Limits(0, 1, whole=False, above=True),
    # Megatron's schedule ends with an assertion at a warm-up as long as itself.
    **dict.fromkeys(
        ("--adam-beta1", "--adam-beta2", "--lr-warmup-fraction"),
        Limits(0, 1, whole=False, below=True),
    ),
    **dict.fromkeys(("--hidden-dropout", "--attention-dropout"), _SHARE),
    **dict.fromkeys(map(flag_of, SETTINGS), _ALPHA),
    "--xielu-alpha-lr-mult": Limits(0, 1e6, whole=False, above=True),
}


def out_of_range(arguments: Any) -> list[str]:
    """One line for each of Megatron's arguments that is a number its flag does not take."""
    found = []
    for name, value in vars(arguments).items():
        limits = NUMBERS.get(flag_of(name))
        if limits is None:
            is_nan = isinstance(value, float) and math.isnan(value)
            fault = "must be a number" if is_nan else ""
            if isinstance(value, int) and abs(value) > COUNT.most:
                fault = f"must be at most {COUNT.most}"
        else:
            values = value if isinstance(value, list) and name in PER_LAYER else [value]
            faults = (limits.fault(one) for one in values if one is not None)
            fault = next(filter(None, faults), "")
        if fault:
            found.append(f"{flag_of(name)} {fault}, not {ascii(value)[:40]}")
    return found


@dataclass(frozen=True)
class Refusal:
    """A flag that is refused.

    Attributes:
        flag: as it is typed.
        reason: for docs/limits.md.
        instead: what to do, where that is known.
        values: which are refused; none for all.
        harmless: values that are not refused.
        argument: where the flag's is not named after it.
        told: the reason is not plain, and stands in the error.
        in_spec: asked of Megatron's configuration too, as a script's ``--spec`` gets it.
    """

    flag: str
    reason: str
    instead: str = ""
    values: tuple[str, ...] = ()
    harmless: tuple[object, ...] = ()
    argument: str = ""
    told: bool = False
    in_spec: bool = False

    @property
    def said(self) -> str:
        """The flag, with its value where one is refused."""
        return " ".join((self.flag, *self.values))

    def is_given(self, settings: Any) -> bool:
        """Whether arguments, or a configuration of Megatron's, ask for it."""
        for name in (self.argument, argument_of(self.flag)):
            value = getattr(settings, name, None)
            if self.values:
                asked = value if isinstance(value, (list, tuple)) else [value]
                if any(refused in asked for refused in self.values):
                    return True
            elif value and value not in self.harmless:
                return True
        return False

    def alone(self) -> str:
        """The error where this is refused whatever else is given."""
        instead = f", or give {self.instead.replace('`', '')}" if self.instead else ""
        return f"{self.said}: {self.reason}; drop it{instead}"

    def with_(self, flag: str) -> str:
        """The error where this stands beside ``flag``."""
        reason = f": {self.reason}" if self.told else ""
        return f"{flag} does not work with {self.said}{reason}; drop one of them"


_ANOTHER = "it is another activation"
_HETEROGENEOUS = "its layers are built from specs of their own"
_FSDP = "it shards parameters itself; fp32 alphas in a 16-bit model are untested there"

# With one of our activations, whichever way Megatron gets its flags.
WITH_OURS = (
    Refusal("--swiglu", _ANOTHER),
    Refusal("--squared-relu", _ANOTHER),
    Refusal("--quick-geglu", _ANOTHER),
    Refusal(
        "--use-transformer-engine-op-fuser",
        "it replaces the MLP by a fused one, which has no slot for an activation",
        in_spec=True,
    ),
    Refusal(
        "--use-grouped-gemm-for-shared-expert",
        "it is a fused kernel for SwiGLU alone",
        in_spec=True,
    ),
    Refusal("--heterogeneous-layers-config-path", _HETEROGENEOUS),
    Refusal("--heterogeneous-layers-config-encoded-json", _HETEROGENEOUS),
    Refusal("--experimental-attention-variant", _HETEROGENEOUS),
    Refusal(
        "--hybrid-layer-pattern",
        "the entry trains GPT models of one kind of layer",
        "`with_activation` in a script of your own: [moe.md](moe.md)",
    ),
    Refusal("--use-kitchen", "it brings layers of its own, which are untested", in_spec=True),
    Refusal(
        "--use-grouped-gemm-for-dense-mlp",
        "it replaces the MLP by a grouped one, which is untested",
        in_spec=True,
    ),
    Refusal("--use-megatron-fsdp", _FSDP, "`--use-distributed-optimizer`"),
    Refusal("--use-torch-fsdp2", _FSDP, "`--use-distributed-optimizer`"),
    Refusal("--yaml-cfg", "it builds the configuration from a file, past these flags"),
    Refusal(
        "--use-precision-aware-optimizer",
        "Transformer Engine's optimizer then keeps the master weights, and fp32 alphas beside "
        "16-bit weights are untested there",
        told=True,
    ),
    Refusal(
        "--optimizer-cpu-offload",
        "loading a checkpoint it looks for a master copy of every parameter, and fp32 alphas have "
        "none (mended in NVIDIA/Megatron-LM #5929, which is in no release)",
        told=True,
    ),
)

UPCYCLING = "--moe-use-upcycling does not work with xIELU and xIPReLU; drop it"


def also_not_with_ours(arguments: Any, flag: str) -> Iterator[str]:
    """What of arguments does not go with one of our activations, beside `WITH_OURS`; a line each.

    Args:
        arguments: of a command line.
        flag: that asks for the activation.
    """
    if arguments.transformer_impl == "inference_optimized":
        yield f"{flag} does not work with --transformer-impl inference_optimized"
    if arguments.spec and arguments.spec[0] != SPEC_MODULE:
        yield (
            f"{flag} does not work with --spec {' '.join(arguments.spec)}; put the activation into "
            "that spec with megatron_xielu.layer_specs.with_activation"
        )
    if arguments.moe_use_upcycling:
        yield UPCYCLING


# By this package's entry, whose training step has no code for them.
_STEP = "the entry has no code for it"
_SCRIPT = "Megatron-LM's own pretrain_gpt.py, with `--spec` or the patch"
BY_ENTRY = (
    Refusal("--sft", _STEP, _SCRIPT),
    Refusal("--fim-data", _STEP, _SCRIPT),
    Refusal("--hybrid-context-parallel", _STEP, _SCRIPT),
    Refusal("--dataloader-type", _STEP, _SCRIPT, values=("external",)),
    Refusal("--logits-load-dir", _STEP, _SCRIPT),
    Refusal(
        "--overlap-moe-expert-parallel-comm",
        "it cuts layers into pieces that run on several streams; untested",
        in_spec=True,
    ),
    Refusal("--perform-rl-step", _STEP, _SCRIPT),
)

# By the entry, too: they would train another model than they say, without a word.
_UNREAD = "Megatron 0.19 takes it and reads it nowhere"
UNREAD = (
    Refusal("--rampup-batch-size", _UNREAD, "`--step-batch-size-schedule`"),
    Refusal("--apply-residual-connection-post-layernorm", _UNREAD),
    Refusal("--openai-gelu", _UNREAD),
)


DOCUMENTS_FLAG = "--dataloader-inter-document-masking"  # each document attends to itself alone
_ENDS = (
    "documents end where the data say so, whatever their tokens, and positions begin again there"
)
_CUDA_GRAPH = "a captured step has always the same documents"
WITH_DOCUMENTS = (
    Refusal(
        "--context-parallel-size above 1",
        "Megatron 0.19.2 splits the whole sequence over the ranks, while its rotary positions and "
        "Transformer Engine count in parts of each document",
        argument="context_parallel_size",
        harmless=(1,),
        told=True,
    ),
    Refusal("--reset-attention-mask", _ENDS, told=True),
    Refusal("--reset-position-ids", _ENDS, told=True),
    Refusal("--cuda-graph-impl", _CUDA_GRAPH, harmless=("none",), told=True),
    Refusal("--enable-cuda-graph", _CUDA_GRAPH, told=True),
    Refusal("--external-cuda-graph", _CUDA_GRAPH, told=True),
)
# Not on a CPU, where attention is this package's.
DOCUMENTS_NEED_TE = (
    f"{DOCUMENTS_FLAG} does not work with --transformer-impl local: Megatron's own attention has "
    "no code for it; use transformer_engine"
)


_SPLIT_PATHS = ("train_data_path", "valid_data_path", "test_data_path")


def contradictions(arguments: Any) -> Iterator[str]:
    """Which of Megatron's own flags do not go together, as its assertions have it; a line each.

    Args:
        arguments: of a command line, before Megatron derives anything; any may be missing.
    """

    def given(name: str) -> Any:
        return getattr(arguments, name, None)

    stages = [
        flag_of(name)
        for name in (
            "num_layers_per_virtual_pipeline_stage",
            "num_virtual_stages_per_pipeline_rank",
            "pipeline_model_parallel_layout",
        )
        if given(name)
    ]
    if len(stages) > 1:
        yield f"give one of {' and '.join(stages)}"
    selective = given("recompute_activations") or given("recompute_granularity") == "selective"
    if selective and given("recompute_method"):
        yield (
            "--recompute-method goes with --recompute-granularity full, not with selective "
            "recomputation; drop one of them"
        )
    grouped = given("moe_grouped_gemm") and given("num_experts")
    if selective and "moe_act" in (given("recompute_modules") or ()) and not grouped:
        yield "--recompute-modules moe_act needs --moe-grouped-gemm; drop it, or give that"
    fuses = given("bias_dropout_fusion") and not given("cpu")  # which drops it
    if grouped and given("add_bias_linear") and fuses:
        yield (
            "--moe-grouped-gemm with biases does not go with the fusion of bias and dropout; give "
            "--disable-bias-linear, or --no-bias-dropout-fusion"
        )
    # The plan keeps it by the flag's name, Megatron by another.
    is_delayed = (given("fp8") or given("fp8_format")) and given("fp8_recipe") == "delayed"
    if is_delayed and given("first_last_layers_bf16"):
        yield (
            "--first-last-layers-bf16 does not work with --fp8-recipe delayed, Megatron's "
            "default; drop it, or give --fp8-recipe tensorwise"
        )
    if given("cross_entropy_loss_fusion") and given("cross_entropy_fusion_impl") == "te":
        yield (
            "--cross-entropy-fusion-impl te: Megatron has refused it since 0.18.1, as unstable; "
            "give native, or drop --cross-entropy-loss-fusion"
        )
    pipeline = given("pipeline_model_parallel_size") or 1
    is_tied = given("untie_embeddings_and_output_weights") is False
    if given("save") and given("mtp_num_layers") and pipeline > 1 and is_tied:
        yield (
            f"--mtp-num-layers with --pipeline-model-parallel-size {pipeline} needs "
            "--untie-embeddings-and-output-weights: Megatron 0.19 cannot save the two tables"
        )
    if given("distribute_saved_activations") and not (
        given("recompute_granularity") == "full"
        and given("recompute_method")
        and not selective
        and (given("tensor_model_parallel_size") or 1) > 1
        and not given("sequence_parallel")
    ):
        yield (
            "--distribute-saved-activations needs --tensor-model-parallel-size above 1, "
            "--recompute-granularity full and --recompute-method, and no --sequence-parallel; "
            "drop it"
        )
    if given("save") and given("async_save") and given("ckpt_format") == "torch":
        yield (
            "--ckpt-format torch does not go with --async-save: Megatron ends at the first save; "
            "give torch_dist, or drop --async-save (pretrain.sh: ASYNC_SAVE=0)"
        )
    if given("deterministic_mode"):
        for name, variable in (
            ("cross_entropy_loss_fusion", " (pretrain.sh: LOSS_FUSION=0)"),
            ("tp_comm_overlap", ""),
        ):
            if given(name):
                yield (
                    f"--deterministic-mode does not go with {flag_of(name)}; drop one of them"
                    + variable
                )
    for name, default in ALPHA_GROUP.items():
        if given("xielu_frozen_alphas") and given(name) not in (None, default):
            yield (
                f"{flag_of(name)} {given(name):g} with --xielu-frozen-alphas: nothing trains them; "
                f"drop --xielu-frozen-alphas, or give {flag_of(name)} {default:g}"
            )
    scales = given("xielu_alpha_lr_mult") not in (None, ALPHA_GROUP["xielu_alpha_lr_mult"])
    if scales and given("use_mup") and given("optimizer") == "sgd":
        yield (
            "--xielu-alpha-lr-mult does not go with --use-mup and --optimizer sgd, where μP scales "
            "the learning rate of the alphas; drop one of them"
        )
    for name in PER_LAYER:
        if given("xielu_shared_alphas") and isinstance(given(name), list):
            yield f"--xielu-shared-alphas: all layers have one pair; give {flag_of(name)} a number"
    sources = [name for name in ("mock_data", "data_path") if given(name)]
    sources += [name for name in _SPLIT_PATHS if given(name)][:1]
    if len(sources) > 1:
        yield f"give one of {' and '.join(map(flag_of, sources))}"
    if given(argument_of(INPUTS_FLAG)):
        if not given("tensorboard_dir"):
            yield f"{INPUTS_FLAG} writes to TensorBoard: give --tensorboard-dir FOLDER, or drop it"
        for refusal in WITH_INPUTS:
            if refusal.is_given(arguments):
                yield refusal.with_(INPUTS_FLAG)
    if given(argument_of(DOCUMENTS_FLAG)):
        for refusal in WITH_DOCUMENTS:
            if refusal.is_given(arguments):
                yield refusal.with_(DOCUMENTS_FLAG)
        if pipeline > 1 and (given("micro_batch_size") or 1) > 1:
            # Stages receive [s, b, h] where [s·b, 1, h] is sent.
            yield (
                f"{DOCUMENTS_FLAG} with --pipeline-model-parallel-size above 1 needs "
                "--micro-batch-size 1: Megatron joins the samples of a micro-batch into one, and "
                "its pipeline stages expect them apart"
            )


# Megatron builds these from other specs than the dense one before 0.19; the patch knows the first
# two.
_SPECS = "scripts build it from another spec than the dense one"
EXPERTS_AND_MTP = (Refusal("--num-experts", _SPECS), Refusal("--mtp-num-layers", _SPECS))
BEFORE_0_19 = (
    *EXPERTS_AND_MTP,
    Refusal("--experimental-attention-variant", _SPECS),
    Refusal("--heterogeneous-layers-config-path", _SPECS),
    Refusal("--heterogeneous-layers-config-encoded-json", _SPECS),
    Refusal("--use-kitchen", _SPECS),
    Refusal("--use-legacy-models", _SPECS),
)

_WHOLE = "the whole MLP is recomputed from its input, and its activation's output with it"
_QUANTISED = "fc2 keeps a quantised copy of the output and lets it go: nothing would be saved"
_GRAPH = "Megatron treats the modules that it recomputes itself specially in a capture; not ours"
WITH_RECOMPUTE_OUTPUT = (
    Refusal("--recompute-granularity", _WHOLE, values=("full",)),
    Refusal("--recompute-modules", _WHOLE, values=("mlp",)),
    Refusal("--recompute-modules", _WHOLE, values=("moe",)),
    Refusal("--recompute-modules", _WHOLE, values=("shared_experts",)),
    Refusal("--moe-layer-recompute", _WHOLE),
    Refusal(
        "--moe-shared-expert-overlap",
        "shared experts run in parts, on a stream of their own: untested",
    ),
    Refusal("--fp8-format", _QUANTISED, argument="fp8"),
    Refusal("--fp4-format", _QUANTISED, argument="fp4"),
    Refusal("--te-precision-config-file", _QUANTISED, argument="quant_recipe"),
    Refusal(
        "--cpu-offloading-num-layers",
        "it copies to the host what fc2 saved, while we free it; Megatron refuses it with any "
        "recomputation",
    ),
    Refusal(
        "--fine-grained-activation-offloading",
        "it frees and restores memory of its own choice, on GPUs only: untested together with ours",
    ),
    Refusal(
        "--delay-wgrad-compute",
        "fc2's weight gradient comes after the backward pass, and would hold the output until then",
    ),
    Refusal("--cuda-graph-impl", _GRAPH, harmless=("none",)),
    Refusal("--enable-cuda-graph", _GRAPH),
    Refusal("--external-cuda-graph", _GRAPH),
)

_GROUPS = "its alphas are in groups of their own"
WITH_SHARED_ALPHAS = (
    Refusal(
        "--pipeline-model-parallel-size above 1",
        "copies on other stages would need their gradients summed over the pipeline",
        argument="pipeline_model_parallel_size",
        harmless=(1,),
    ),
    Refusal("--num-experts", _GROUPS),
    Refusal("--mtp-num-layers", _GROUPS),
)

INPUTS_FLAG = "--log-activation-inputs"
INPUTS_TAG = "activation_input_std"  # and of which layer: activation_input_std/layer_00
_NO_HOOKS = "the inputs are read by hooks, which a captured step does not run"
WITH_INPUTS = (
    Refusal("--num-experts", "tokens of an expert are not those of a layer; untested"),
    Refusal(
        "--use-transformer-engine-op-fuser", "the fused MLP has no inputs of the activation to read"
    ),
    Refusal("--cuda-graph-impl", _NO_HOOKS, harmless=("none",)),
    Refusal("--enable-cuda-graph", _NO_HOOKS),
    Refusal("--external-cuda-graph", _NO_HOOKS),
)

# By `--cpu`: they need a GPU.
ON_CPU = (
    Refusal("--transformer-impl", "", "`local`", values=("transformer_engine",)),
    Refusal("--transformer-impl", "", "`local`", values=("inference_optimized",)),
    Refusal("--distributed-backend", "", "`gloo`", values=("nccl",)),
    Refusal("--attention-backend", "", values=("flash",)),
    Refusal("--attention-backend", "", values=("fused",)),
    Refusal("--cuda-graph-impl", "", values=("local",)),
    Refusal("--cuda-graph-impl", "", values=("transformer_engine",)),
    *(
        Refusal(flag, "")
        for flag in (
            "--use-flash-attn --use-transformer-engine-op-fuser --fp8-format --fp4-format "
            "--enable-cuda-graph --external-cuda-graph --multi-latent-attention "
            "--tp-comm-overlap --use-megatron-fsdp "
            "--use-torch-fsdp2 --use-nccl-ub --use-precision-aware-optimizer "
            "--optimizer-cpu-offload --cpu-offloading-num-layers"
        ).split()
    ),
)


def not_on_cpu(argv: Sequence[str]) -> Iterator[str]:
    """One line for each of Megatron's arguments that needs a GPU."""
    for position, word in enumerate(argv):
        flag, _, value = word.partition("=")
        if not value and position + 1 < len(argv):
            value = argv[position + 1]
        for refusal in ON_CPU:
            if flag == refusal.flag and (not refusal.values or value in refusal.values):
                yield f"{refusal.said} needs a GPU; drop it for a CPU run"


# By the plan: its arithmetic is for GPT models of plain attention, dense or with experts.
BY_PLAN = tuple(
    Refusal(flag, "the plan has no arithmetic for it")
    for flag in (
        "--multi-latent-attention --hybrid-layer-pattern --moe-latent-size "
        "--heterogeneous-layers-config-path --heterogeneous-layers-config-encoded-json "
        "--experimental-attention-variant --attention-output-gate --use-megatron-fsdp "
        "--use-torch-fsdp2 --yaml-cfg"
    ).split()
)
BY_PLAN_WITH_CHECKPOINTS = tuple(
    Refusal(flag, "it is not proven that checkpoints keep the optimizer's state", "--no-save-optim")
    for flag in (
        "--use-precision-aware-optimizer --optimizer-cpu-offload --fp8-param-gather "
        "--fp4-param-gather"
    ).split()
)

# The plan takes pipeline stages of equal size, and one batch size: it warns of these.
NOT_MODELLED = ("--step-batch-size-schedule",)
