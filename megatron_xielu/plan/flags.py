"""The flags of Megatron's command line that a plan needs, with Megatron's names and defaults.

Standard library only, Python 3.9 and newer, as is all of this room.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

_INTEGERS = (
    "num-layers hidden-size ffn-hidden-size num-attention-heads kv-channels seq-length "
    "max-position-embeddings micro-batch-size global-batch-size train-iters train-samples "
    "lr-warmup-iters lr-warmup-samples lr-decay-iters lr-decay-samples lr-wsd-decay-iters "
    "lr-wsd-decay-samples save-interval save-retain-interval vocab-size padded-vocab-size "
    "num-layers-per-virtual-pipeline-stage num-virtual-stages-per-pipeline-rank "
    "recompute-num-layers ddp-bucket-size ddp-num-buckets"
).split()
_INTEGERS_WITH_DEFAULTS = {
    "tensor-model-parallel-size": 1,
    "pipeline-model-parallel-size": 1,
    "context-parallel-size": 1,
    "num-query-groups": 1,
    "make-vocab-size-divisible-by": 128,
    "num-distributed-optimizer-instances": 1,
}
_SWITCHES = (
    "xielu xiprelu xielu-recompute-output xielu-frozen-alphas xielu-shared-alphas "
    "swiglu squared-relu quick-geglu bf16 fp16 "
    "group-query-attention qk-layernorm untie-embeddings-and-output-weights "
    "add-qkv-bias sequence-parallel use-distributed-optimizer grad-reduce-in-bf16 "
    "use-rotary-position-embeddings recompute-activations distribute-saved-activations "
    "cross-entropy-loss-fusion no-save-optim no-load-optim finetune no-pad-vocab-size "
    "no-overlap-p2p-communication overlap-grad-reduce dist-ckpt-optim-fully-reshardable "
    "ckpt-fully-parallel-load"
).split()
_STRINGS = {
    "normalization": "LayerNorm",
    "position-embedding-type": "learned_absolute",
    "lr-decay-style": "linear",
    "lr-wsd-decay-style": "exponential",
    "optimizer": "adam",
    "ckpt-format": "torch_dist",
    "transformer-impl": "transformer_engine",
    "attention-backend": "auto",
    "cross-entropy-fusion-impl": "native",
    "recompute-granularity": None,
    "recompute-method": None,
    "save": None,
    "load": None,
    "tokenizer-model": None,
    "data-args-path": None,
    "per-split-data-args-path": None,
}
_LISTS = "recompute-modules data-path train-data-path valid-data-path test-data-path spec".split()


class PlanError(ValueError):
    """Arguments of which nothing can be computed. ``problems``: one line each."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)


class _Parser(ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise PlanError([message])


def parse(argv: Sequence[str]) -> Namespace:
    """Parse the flags that a plan needs, with Megatron's defaults; others are passed over.

    Raises:
        PlanError: a value has the wrong type; the message names the flag.
    """
    parser = _Parser(allow_abbrev=False, add_help=False)
    for flag in _INTEGERS:
        parser.add_argument(f"--{flag}", type=int)
    for flag, integer in _INTEGERS_WITH_DEFAULTS.items():
        parser.add_argument(f"--{flag}", type=int, default=integer)
    for flag in _SWITCHES:
        parser.add_argument(f"--{flag}", action="store_true")
    parser.add_argument("--disable-bias-linear", dest="add_bias_linear", action="store_false")
    for flag, default in _STRINGS.items():
        parser.add_argument(f"--{flag}", default=default)
    for flag in _LISTS:
        parser.add_argument(f"--{flag}", nargs="*", default=[])
    for flag in ("--hidden-dropout", "--attention-dropout"):
        parser.add_argument(flag, type=float, default=0.1)
    parser.add_argument("--lr-warmup-fraction", type=float)
    args, _ = parser.parse_known_args(list(argv))
    for size in ("tensor_model", "pipeline_model", "context"):
        if getattr(args, f"{size}_parallel_size") < 1:
            raise PlanError([f"--{size.replace('_', '-')}-parallel-size must be 1 or more"])
    return args
