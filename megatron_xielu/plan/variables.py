"""The variables of examples/: what each may be, the flags they set, and names mistaken for theirs.

``python -m megatron_xielu.plan.variables SCRIPT [MODEL_FILE [NAME=VALUE …]]`` judges the
environment, and then what the model file makes of it and of what SCRIPT has set by itself, for
SCRIPT to end with status 2 before it does anything: where the shell expects a number, it would run
what stands there. Standard library only, Python 3.9 and newer.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

from megatron_xielu.catalog import NUMBERS
from megatron_xielu.common.flags import argument_of
from megatron_xielu.common.text import first_line, ready_output
from megatron_xielu.plan import gpus

OUR_ENTRY = "-m megatron_xielu.pretrain_gpt"

# Flag, of Megatron or of the plan: the variable that has the same value.
_SAME = {
    "--nodes": "NNODES",
    "--gpus-per-node": "GPUS_PER_NODE",
    "--gpu": "GPU",
    "--gpu-memory": "GPU_MEMORY_GIB",
    "--mfu": "MFU",
    "--peak-tflops": "PEAK_TFLOPS",
    "--node-network": "NODE_NETWORK",
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
    "--fp8-recipe": "FP8_RECIPE",
    "--data-cache-path": "DATA_CACHE",
    "--straggler-ratio": "STRAGGLER_RATIO",
    "--manual-gc-interval": "GC_INTERVAL",
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
    "--profile-step-end": "PROFILE_STEPS",
    "--distributed-timeout-seconds-after-init": "TIMEOUT_MINUTES",
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
    "--dataloader-inter-document-masking": "DOCUMENT_MASK=1",
    "--dist-ckpt-optim-fully-reshardable": "OPTIMIZER_FORMAT=full",
    "--apply-wd-to-norms": "DECAY_NORMS=1",
    "--fp8-format": "PRECISION=fp8",
    "--cross-entropy-loss-fusion": "LOSS_FUSION=1",
    "--no-check-for-nan-in-loss-and-grad": "NAN_CHECK=0",
}

# A value, and what is wrong with it; "" if nothing is.
_Kind = Callable[[str], str]
# What is no line of text would be two lines of a log, of a list or of a command.
_TEXT = r"[^\x00-\x1f\x7f]*"
# Nor an option of ssh, a second command or a pattern of files.
_HOST = r"(?![-.])[\w.:%-]+"


def _like(pattern: str, fault: str) -> _Kind:
    return lambda value: "" if re.fullmatch(pattern, value, re.ASCII) else fault


def _one_of(*words: str) -> _Kind:
    fault = f": choose {', '.join(words[:-1])} or {words[-1]}"
    return lambda value: "" if value in words else fault


def _positive(value: str) -> str:
    return _whole(value) or (" must be above 0" if value == "0" else "")


def _ratio(value: str) -> str:
    if fault := _number(value):
        return fault
    fault = NUMBERS["--straggler-ratio"].fault(float(value))
    return f" {fault}" if fault else ""


def _port(value: str) -> str:
    below = " must be below 65535: the preflight takes the next"
    return _positive(value) or ("" if int(value) < 65535 else below)


def _text(value: str) -> str:
    if not value.isascii() and re.search("[\ud800-\udfff]", value):  # as os.environ has it
        return " is not UTF-8"
    return _line(value)


def _path(value: str) -> str:
    return _text(value) or (
        f" looks like an option; write ./{value}" if value.startswith("-") else ""
    )


# Of 64 bits, and decimal to the shell as well.
_whole = _like(r"0|[1-9][0-9]{0,17}", " is not a whole number")
_DECIMAL = r"\+?([0-9]+\.?[0-9]*|\.[0-9]+)"
_number = _like(rf"{_DECIMAL}([eE][+-]?[0-9]+)?", " is not a number")
_tokens = _like(rf"{_DECIMAL}([eE]\+?[0-9]+)?", " is not a number such as 125e9")
_shares = _like(r"[0-9.]+([,/ ]+[0-9.]+){0,2}", " is not shares such as 990,10,0")
_line = _like(_TEXT, " has a line end or another control character")


def _steps(value: str) -> str:
    words = re.fullmatch(r"([1-9][0-9]{0,11})-([1-9][0-9]{0,11})", value, re.ASCII)
    is_range = words is not None and int(words[1]) <= int(words[2])
    return "" if is_range else " is not steps such as 100-103"


_any: _Kind = lambda value: ""  # noqa: E731 (lists, which white space of any kind parts)
_host = _like(_HOST, " is not a host's name or address")
_host_of_url = _like(rf"{_HOST}|\[{_HOST}\]", " is not a host's name or address")
_name = _like(rf"({_HOST}@)?{_HOST}", " is not a host's name")
_switch = _one_of("0", "1")

# Those of a model file, which has to set them where the environment does not.
_OF_A_MODEL: dict[str, _Kind] = {
    **dict.fromkeys(("NUM_LAYERS", "HIDDEN_SIZE", "NUM_HEADS", "NUM_KV_HEADS"), _positive),
    **dict.fromkeys(("GATED_FFN_SIZE", "SEQ_LENGTH"), _positive),
    **dict.fromkeys(("ROTARY_BASE", "LR"), _number),
    "TIE_EMBEDDINGS": _switch,
    **dict.fromkeys(("GLOBAL_BATCH", "MICRO_BATCH", "TP", "PP", "CP", "STEPS"), _positive),
    "TOKENS": _tokens,
    **dict.fromkeys(("WARMUP_STEPS", "DECAY_STEPS"), _whole),
}
_OF_A_RUN: dict[str, _Kind] = {
    **dict.fromkeys(("MODEL", "DATA_ARGS", "TOKENIZER", "RUN_DIR", "DATA_CACHE"), _path),
    **dict.fromkeys(("DATA", "ENTRY"), _any),
    **dict.fromkeys(("PYTHON", "WANDB_PROJECT", "NETWORK"), _text),  # network.env.sh has its words
    "ACTIVATION": _one_of("xielu", "xiprelu", "relu2", "swiglu", "gelu"),
    "PRECISION": _one_of("bf16", "fp32", "fp8"),
    "FP8_RECIPE": _one_of("tensorwise", "blockwise", "mxfp8"),
    "DEVICE": _one_of("gpu", "cpu"),
    "GPU": _one_of(*gpus.BY_NAME),
    "OPTIMIZER_FORMAT": _one_of("dp", "full"),
    "ASYNC_SAVE": _one_of("nvrx", "mcore", "0"),
    **dict.fromkeys(("MOCK_DATA", "PREFLIGHT", "LAYOUT_CHECK", "DECAY_NORMS"), _switch),
    **dict.fromkeys(("FAULT_TOLERANCE", "INPROCESS_RESTART", "DOCUMENT_MASK"), _switch),
    **dict.fromkeys(("LOSS_FUSION", "NAN_CHECK"), _switch),
    "NUMA_BINDING": _one_of("node", "socket", "exclusive", "core-complex"),
    **dict.fromkeys(("NNODES", "GPUS_PER_NODE", "BUCKET_SIZE", "SAVE_INTERVAL"), _positive),
    **dict.fromkeys(("VOCAB_SIZE", "PADDED_VOCAB_SIZE", "TIMEOUT_MINUTES"), _positive),
    **dict.fromkeys(("RENDEZVOUS_TIMEOUT", "KEEP_LAST"), _positive),
    **dict.fromkeys(("NODE_RANK", "SEED", "KEEP_EVERY", "LOG_INTERVAL"), _whole),
    **dict.fromkeys(("EVAL_INTERVAL", "EVAL_ITERS", "GC_INTERVAL"), _whole),
    **dict.fromkeys(("IN_JOB_RESTARTS", "RESTART_BUDGET"), _whole),
    **dict.fromkeys(("GPU_MEMORY_GIB", "PEAK_TFLOPS", "MFU", "NODE_NETWORK"), _number),
    "STRAGGLER_RATIO": _ratio,
    "SPLIT": _shares,
    "PROFILE_STEPS": _steps,
    "MASTER_PORT": _port,
    "MASTER_ADDR": _host_of_url,
    "LOCAL_ADDR": _host,
}
# The preflight's own, and those that the scripts read but nobody is to confuse with another.
_OF_OTHERS: dict[str, _Kind] = {
    **dict.fromkeys(("NEED_GIB", "MIN_DISK_MBPS", "MIN_BANDWIDTH"), _number),
    "PREFLIGHT_TIMEOUT": _positive,
    "MEGATRON_XIELU_NODE": _name,
    "CUDA_DEVICE_MAX_CONNECTIONS": _whole,
    **dict.fromkeys(("NVTE_FWD_LAYERNORM_SM_MARGIN", "NVTE_BWD_LAYERNORM_SM_MARGIN"), _whole),
    **dict.fromkeys(("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "HF_HUB_OFFLINE"), _text),
    **dict.fromkeys(("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"), _path),
    **dict.fromkeys(("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "NCCL_GRAPH_REGISTER"), _text),
    "SRUN_ARGS": _line,  # of pretrain.sbatch
    "OMP_NUM_THREADS": _like(r" *[0-9]+( *, *[0-9]+)* *", " is not a whole number"),
}
_KINDS = {**_OF_A_MODEL, **_OF_A_RUN, **_OF_OTHERS}

VARIABLES = frozenset([*_OF_A_MODEL, *_OF_A_RUN])

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
_WORDS = {"TOKEN", "MODELS", "DEVICES"}
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
    for name in sorted(environment):
        if name in _KINDS or name in read_by_others or name in _WORDS:
            continue
        slips = (ours for ours in sorted(_KINDS) if len(ours) > 4 and _one_slip(name, ours))
        ours = _ALIASES.get(name) or next(slips, None)
        if not ours or ours in environment:
            continue
        # Another program's variable may look like a short one, and hold what is not to be printed.
        if name not in _ALIASES and "_" not in ours and len(ours) < 9:
            yield f"{name} is not read; the variable is {ours}", False
        else:
            value = ascii(environment[name])[1:-1][:40]
            yield (
                f"{name}={value} is not read; the variable is {ours}",
                is_ours and name not in _SET_BY_OTHERS,
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


def faults(values: Mapping[str, str]) -> Iterator[str]:
    """What is wrong with variables, one line each; an empty one is as good as none.

    Args:
        values: name, value.
    """
    good = {}
    for name, kind in _KINDS.items():
        value = values.get(name, "")
        fault = kind(value) if value else ""
        if fault:
            yield f"{name}={_printable(value)}{_printable(fault)}"
        else:
            good[name] = value
    if "NODE_RANK" in good and "NNODES" in good:
        rank, nodes = int(good["NODE_RANK"] or 0), int(good["NNODES"] or 1)
        if rank >= nodes:
            yield f"NODE_RANK={rank} must be below NNODES={nodes}"


def _printable(value: str) -> str:
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in value)


# A shell of its own, so that whatever the file does (a wrong line, exit) is seen, not suffered.
# Its output is no place for the file's own.
_SOURCE = """
exec 3>&1 >&2
set -aeuo pipefail
source "$1"
exec env -0 >&3
"""


def of_model_file(file: str, environment: Mapping[str, str]) -> tuple[dict[str, str], str]:
    """The variables that a model file makes of an environment, and what is wrong with it or "".

    Args:
        file: its path, with a slash in it.
        environment: name, value.
    """
    command = ["bash", "-c", _SOURCE, "bash", file]
    done = subprocess.run(
        command, env=dict(environment), stdin=subprocess.DEVNULL, capture_output=True
    )
    pairs = done.stdout.decode(errors="surrogateescape").split("\0")
    values = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
    if done.returncode or not values:
        said = first_line(done.stderr.decode(errors="replace")).replace(f"{file}: ", "", 1)
        return {}, f"model file {file}: {said or f'it ends the script, with {done.returncode}'}"
    missing = [name for name in _OF_A_MODEL if not values.get(name)]
    return values, f"model file {file} does not set {', '.join(missing)}" if missing else ""


def main() -> None:
    """Name what is wrong; end with status 2 where something is refused."""
    script, *rest = sys.argv[1:]
    model_file, own = rest[:1], dict(pair.split("=", 1) for pair in rest[1:])
    text = "".join(Path(file).read_text(errors="replace") for file in model_file)
    errors = list(faults(os.environ))
    for line, refused in misnamed(os.environ, re.findall(r"\w+", text)):
        if refused:
            errors.append(line)
        else:
            print(f"{script}: warning: {line}", file=sys.stderr)
    if model_file and not errors:
        values, fault = of_model_file(model_file[0], {**os.environ, **own})
        errors = [fault] if fault else list(faults(values))
    for line in errors:
        print(f"{script}: error: {line}", file=sys.stderr)
    if errors:
        sys.exit(2)


if __name__ == "__main__":
    ready_output()
    main()
