"""The variables of examples/pretrain.sh: the flags that they set, and names mistaken for theirs.

``python -m megatron_xielu.plan.variables SCRIPT [MODEL_FILE]`` looks for such names in the
environment, for SCRIPT to end with status 2 before it does anything. Standard library only, Python
3.9 and newer.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from megatron_xielu.common.flags import argument_of
from megatron_xielu.common.text import ready_output

OUR_ENTRY = "-m megatron_xielu.pretrain_gpt"

# Flag, of Megatron or of the plan: the variable that has the same value.
_SAME = {
    "--nodes": "NNODES",
    "--gpus-per-node": "GPUS_PER_NODE",
    "--gpu-memory": "GPU_MEMORY_GIB",
    "--mfu": "MFU",
    "--peak-tflops": "PEAK_TFLOPS",
    "--keep-checkpoints": "KEEP_LAST",
    "--keep-every": "KEEP_EVERY",
    "--tensor-model-parallel-size": "TP",
    "--pipeline-model-parallel-size": "PP",
    "--context-parallel-size": "CP",
    "--micro-batch-size": "MICRO_BATCH",
    "--global-batch-size": "GLOBAL_BATCH",
    "--num-layers": "NUM_LAYERS",
    "--hidden-size": "HIDDEN_SIZE",
    "--num-attention-heads": "NUM_HEADS",
    "--num-query-groups": "NUM_KV_HEADS",
    "--seq-length": "SEQ_LENGTH",
    "--rotary-base": "ROTARY_BASE",
    "--vocab-size": "VOCAB_SIZE",
    "--padded-vocab-size": "PADDED_VOCAB_SIZE",
    "--lr": "LR",
    "--seed": "SEED",
    "--split": "SPLIT",
    "--data-path": "DATA",
    "--data-args-path": "DATA_ARGS",
    "--per-split-data-args-path": "DATA_ARGS",
    "--tokenizer-model": "TOKENIZER",
    "--ddp-bucket-size": "BUCKET_SIZE",
    "--distributed-timeout-minutes": "TIMEOUT_MINUTES",
    "--save-interval": "SAVE_INTERVAL",
    "--log-interval": "LOG_INTERVAL",
    "--eval-interval": "EVAL_INTERVAL",
    "--eval-iters": "EVAL_ITERS",
    "--wandb-project": "WANDB_PROJECT",
}
# Flag: the variable that it is computed from.
_FROM = {
    "--train-samples": "TOKENS",
    "--lr-warmup-samples": "WARMUP_STEPS",
    "--lr-wsd-decay-samples": "DECAY_STEPS",
    "--ffn-hidden-size": "GATED_FFN_SIZE",
    "--max-position-embeddings": "SEQ_LENGTH",
    "--save": "RUN_DIR",
    "--load": "RUN_DIR",
}
# Flag: what stands for it.
_CHOICE = {
    "--xielu": "ACTIVATION=xielu",
    "--xiprelu": "ACTIVATION=xiprelu",
    "--squared-relu": "ACTIVATION=relu2",
    "--swiglu": "ACTIVATION=swiglu",
    "--bf16": "PRECISION=bf16",
    "--cpu": "DEVICE=cpu",
    "--mock-data": "MOCK_DATA=1",
    "--dist-ckpt-optim-fully-reshardable": "OPTIMIZER_FORMAT=full",
}
_WITHOUT_A_FLAG = (
    "MODEL STEPS ENTRY TIE_EMBEDDINGS NODE_RANK MASTER_ADDR MASTER_PORT LOCAL_ADDR NETWORK "
    "RENDEZVOUS_TIMEOUT PREFLIGHT LAYOUT_CHECK PYTHON IN_JOB_RESTARTS RESTART_BUDGET "
    "FAULT_TOLERANCE ASYNC_SAVE INPROCESS_RESTART"
).split()

VARIABLES = frozenset(
    [*_SAME.values(), *_FROM.values(), *_WITHOUT_A_FLAG]
    + [choice.partition("=")[0] for choice in _CHOICE.values()]
)

# Names of other programs for the same, and what is written from memory, beside the flags' own in
# capitals and what is one slip of the keyboard away.
_ALIASES = {
    **dict.fromkeys(("N_NODES", "NUM_NODES", "NODE_COUNT"), "NNODES"),
    **dict.fromkeys(
        ("GPUS", "NGPUS", "N_GPUS", "NUM_GPUS", "NGPUS_PER_NODE", "NPROC_PER_NODE"), "GPUS_PER_NODE"
    ),
    **dict.fromkeys(("MASTER", "MASTER_ADDRESS", "MASTER_HOST"), "MASTER_ADDR"),
    **dict.fromkeys(("BATCH_SIZE", "GBS"), "GLOBAL_BATCH"),
    "MBS": "MICRO_BATCH",
    **dict.fromkeys(("TP_SIZE", "TENSOR_PARALLEL", "TENSOR_PARALLEL_SIZE"), "TP"),
    **dict.fromkeys(("PP_SIZE", "PIPELINE_PARALLEL", "PIPELINE_PARALLEL_SIZE"), "PP"),
    **dict.fromkeys(("CP_SIZE", "CONTEXT_PARALLEL"), "CP"),
    "LEARNING_RATE": "LR",
    **dict.fromkeys(("TRAIN_TOKENS", "NUM_TOKENS"), "TOKENS"),
    **{argument_of(flag).upper(): name for flag, name in _SAME.items()},
}
# Set by clusters and profiles for reasons of their own: no cause to refuse a run.
_SET_BY_OTHERS = {"NUM_NODES", "NODE_COUNT", "NUM_GPUS", "NPROC_PER_NODE", "MASTER", "DATA_PATH"}

_VALUE = r"\d+(?:[.,]\d+)*(?:e[+-]?\d+)?|(?:[\w.~][^\s:]*)?/[^\s:]+"  # a path has a slash
_FLAG = re.compile(rf"(?<![\w-])(--[a-z0-9-]+)(?: ({_VALUE})(?![\w/]))?")


def in_variables(line: str, typed: Collection[str]) -> str:
    """A line about flags, in the variables that they come from.

    Args:
        line: a problem or warning of the plan.
        typed: flags that were given by hand, which keep their names.
    """

    def said(found: re.Match[str]) -> str:
        flag, value = found.groups()
        if flag in typed:
            return found[0]
        if flag in _SAME:
            return _SAME[flag] + (f"={value}" if value else "")
        if flag in _FROM:
            return f"{found[0]} ({_FROM[flag]})" if value else _FROM[flag]
        return found[0].replace(flag, _CHOICE.get(flag, flag))

    # The launcher adds sequence parallelism to tensor parallelism itself.
    return re.sub(r"(\bTP=\d+) --sequence-parallel", r"\1", _FLAG.sub(said, line))


def misnamed(
    environment: Mapping[str, str], read_by_others: Collection[str] = ()
) -> Iterator[tuple[str, bool]]:
    """Variables that look like one of ours, which is not set: (one line, whether to refuse it).

    Args:
        environment: name, value.
        read_by_others: names that a model file reads.
    """
    # A script of the user's may read any.
    is_ours = environment.get("ENTRY", OUR_ENTRY) == OUR_ENTRY
    long = [name for name in VARIABLES if "_" in name or len(name) > 8]
    for name in sorted(environment):
        if name in VARIABLES or name in read_by_others:
            continue
        slips = (ours for ours in sorted(long) if _one_slip(name, ours))
        ours = _ALIASES.get(name) or next(slips, None)
        if ours and ours not in environment:
            value = ascii(environment[name])[1:-1][:40]
            yield (
                f"{name}={value} is not read; the variable is {ours}",
                (is_ours and name not in _SET_BY_OTHERS),
            )


def _one_slip(word: str, other: str) -> bool:
    """Whether one letter is missing, too many, or another, or two stand in the wrong order."""
    word, other = _after_the_same(word, other)
    word, other = _after_the_same(word[::-1], other[::-1])
    return max(len(word), len(other)) == 1 or (len(word) == 2 and word[::-1] == other)


def _after_the_same(word: str, other: str) -> tuple[str, str]:
    same = 0
    while word[same : same + 1] == other[same : same + 1] != "":
        same += 1
    return word[same:], other[same:]


def main() -> None:
    """Name them; end with status 2 where one is refused."""
    script, *model_file = sys.argv[1:]
    words = re.findall(r"\w+", "".join(Path(file).read_text() for file in model_file))
    found = list(misnamed(os.environ, words))
    for line, refused in found:
        print(f"{script}: {'error' if refused else 'warning'}: {line}", file=sys.stderr)
    if any(refused for _, refused in found):
        sys.exit(2)


if __name__ == "__main__":
    ready_output()
    main()
