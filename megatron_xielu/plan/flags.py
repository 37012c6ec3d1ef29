"""The flags of Megatron's command line that a plan needs, with Megatron's names and defaults.

Standard library only, Python 3.9 and newer, as is all of this room.
"""

from __future__ import annotations

import functools
import re
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from megatron_xielu.catalog import (
    ALPHA_GROUP,
    NUMBERS,
    PER_LAYER,
    SETTINGS,
    out_of_range,
    read_per_layer,
)
from megatron_xielu.common.flags import argument_of, unknown_flag

# The names of all flags of the Megatron releases that docs/versions.md has, and ours: `make docs`.
KNOWN = Path(__file__).with_name("megatron_flags.txt")

# Of `catalog.NUMBERS`; the others are None.
_DEFAULTS = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "context_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "moe_router_topk": 2,
    "num_query_groups": 1,
    "make_vocab_size_divisible_by": 128,
    "num_distributed_optimizer_instances": 1,
    "num_layers_at_start_in_bf16": 1,
    "num_layers_at_end_in_bf16": 1,
    "eval_iters": 100,
    "num_workers": 2,
    "profile_step_end": 12,
    "hidden_dropout": 0.1,
    "attention_dropout": 0.1,
    **SETTINGS,
    **ALPHA_GROUP,
}
_SWITCHES = (
    "xielu xiprelu xielu-recompute-output xielu-frozen-alphas xielu-shared-alphas "
    "swiglu squared-relu quick-geglu bf16 fp16 "
    "group-query-attention qk-layernorm untie-embeddings-and-output-weights "
    "add-qkv-bias sequence-parallel use-distributed-optimizer grad-reduce-in-bf16 "
    "use-rotary-position-embeddings recompute-activations distribute-saved-activations "
    "cross-entropy-loss-fusion no-save-optim no-load-optim finetune no-pad-vocab-size "
    "no-overlap-p2p-communication overlap-grad-reduce overlap-param-gather "
    "dist-ckpt-optim-fully-reshardable "
    "ckpt-fully-parallel-load moe-use-upcycling moe-shared-expert-gate "
    "moe-grouped-gemm first-last-layers-bf16 "
    "cpu async-save mock-data no-create-attention-mask-in-dataloader "
    "dataloader-inter-document-masking reset-attention-mask reset-position-ids "
    "enable-cuda-graph external-cuda-graph deterministic-mode tp-comm-overlap "
    "profile"
).split()
_STRINGS: dict[str, str | int | None] = {
    "normalization": "LayerNorm",
    "position-embedding-type": "learned_absolute",
    "lr-decay-style": "linear",
    "lr-wsd-decay-style": "exponential",
    "optimizer": "adam",
    "ckpt-format": "torch_dist",
    "transformer-impl": "transformer_engine",
    "attention-backend": "auto",
    "cross-entropy-fusion-impl": "native",
    "cuda-graph-impl": "none",
    "moe-layer-freq": 1,
    "recompute-granularity": None,
    "recompute-method": None,
    "fp8-format": None,
    "fp8-recipe": "delayed",
    "save": None,
    "load": None,
    "pretrained-checkpoint": None,
    "non-persistent-ckpt-type": None,
    "tokenizer-type": None,
    "tokenizer-model": None,
    "data-args-path": None,
    "per-split-data-args-path": None,
    "split": None,
}
_LISTS: dict[str, list[str] | None] = {
    "recompute-modules": [],
    "spec": [],
    "data-path": None,
    "train-data-path": None,
    "valid-data-path": None,
    "test-data-path": None,
}


def given(argv: Sequence[str]) -> list[str]:
    """The flags among arguments, as Megatron's parser tells them from values: no abbreviations."""
    words = [word.partition("=")[0] for word in argv]
    return [word for word in words if re.fullmatch(r"--?[A-Za-z][^ ]*", word)]


def unknown(argv: Sequence[str], *, others: Sequence[str] = ()) -> list[str]:
    """One line for each flag at which Megatron's parser would end, whatever the release.

    Args:
        argv: Megatron's arguments.
        others: flags of the caller, which may have been meant.
    """
    known = KNOWN.read_text().split()
    wrong = dict.fromkeys(flag for flag in given(argv) if flag not in known)
    return [unknown_flag(flag, [*known, *others]) for flag in wrong]


class PlanError(ValueError):
    """Arguments of which nothing can be computed. ``problems``: one line each."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)


class _Parser(ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise PlanError([message])


@functools.cache
def _parser() -> _Parser:
    parser = _Parser(allow_abbrev=False, add_help=False)
    for flag, limits in NUMBERS.items():
        per_layer = argument_of(flag) in PER_LAYER
        parser.add_argument(flag, type=str if per_layer else int if limits.whole else float)
    for flag in _SWITCHES:
        parser.add_argument(f"--{flag}", action="store_true")
    parser.add_argument("--disable-bias-linear", dest="add_bias_linear", action="store_false")
    parser.add_argument(
        "--no-bias-dropout-fusion", dest="bias_dropout_fusion", action="store_false"
    )
    for flag, default in _STRINGS.items():
        parser.add_argument(f"--{flag}", default=default)
    for flag, words in _LISTS.items():
        parser.add_argument(f"--{flag}", nargs="*", default=words)
    parser.set_defaults(**_DEFAULTS)
    return parser


def parse(argv: Sequence[str]) -> Namespace:
    """Parse the flags that a plan needs, with Megatron's defaults; others are passed over.

    Raises:
        PlanError: values have the wrong type, or are out of range; names their flags.
    """
    args, _ = _parser().parse_known_args(list(argv))
    try:
        read_per_layer(args)
    except ValueError as error:
        raise PlanError([str(error)]) from None
    problems = out_of_range(args)
    if problems:
        raise PlanError(problems)
    return args
