"""Walk layouts of the paper's models and of an 8B: do checkpoints keep the optimizer's state?

::

    python tools/walk_checkpoints.py --minutes 20 --log runs/walk.json

Each layout is what `examples/pretrain.sh` would train, walked by `megatron_xielu.checkpoint_walk`
with the installed Megatron, in both formats of its distributed optimizer. The paper's own layouts
come first, at all data-parallel sizes; then the others, until the time is up. What ``--log`` has
of an earlier run is not walked again. ``--out docs/checkpoint-walk.md`` writes the page.
``--stock`` walks without this package's mends, to see where they are needed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import platform
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from launcher_command import megatron_arguments

from megatron_xielu.common import files, schema
from megatron_xielu.common.flags import Limits, output_file
from megatron_xielu.common.text import ready_output

# Name: what pretrain.sh takes from the environment. The 8B has Llama 3's sizes.
MODELS = {
    "1.1B": {"MODEL": "llama_1b"},
    "3B": {"MODEL": "llama_3b"},
    "8B": {
        "MODEL": "llama_3b",
        "NUM_LAYERS": "32",
        "HIDDEN_SIZE": "4096",
        "NUM_HEADS": "32",
        "NUM_KV_HEADS": "8",
        "GATED_FFN_SIZE": "14336",
        "PADDED_VOCAB_SIZE": "128256",
    },
}
_LAYERS = {"1.1B": 24, "3B": 36, "8B": 32}

# Data-parallel sizes: multiples of a node's 8 GPUs, and what TP 2 to 8 leaves of them.
SMALL_SIZES = (8, 9, 10, 12, 14, 16, 20, 22, 24, 28, 32, 36, 40, 44, 48, 56, 60, 64, 72, 80, 88)
MIDDLE_SIZES = (96, 104, 112, 120, 128, 136, 160, 176, 192, 200)
LARGE_SIZES = (224, 256, 320, 352, 384, 400, 448, 512)
FEW_SIZES = (8, 12, 20, 44)

_HEADING = "## Walked\n"

# In place of more arguments: the bucket size that Megatron chooses without the launcher's flag.
OWN_BUCKETS = "no --ddp-bucket-size"


class Layout(NamedTuple):
    """One that is walked."""

    model: str
    activation: str
    tensor: int
    pipeline: int
    data: int
    more: str = ""  # arguments


def layouts() -> Iterator[Layout]:
    """All of them, the most important first."""
    for data in (40, 72, 80, 88, 104):  # where stock Megatron loses state of the 1.1B
        yield Layout("1.1B", "xielu", 1, 1, data, OWN_BUCKETS)
    for data in (12, 20, 24, 40, 44, 48, 60, 128):  # and of the 3B
        yield Layout("3B", "xielu", 2, 1, data, OWN_BUCKETS)
    for data in FEW_SIZES:
        yield Layout("1.1B", "swiglu", 1, 1, data)
    variants = (
        ("1.1B", 1, 1, 88, "--ddp-pad-buckets-for-high-nccl-busbw"),
        ("1.1B", 1, 1, 88, "--ddp-bucket-size 10000000"),
        ("1.1B", 1, 1, 88, "--ddp-num-buckets 7"),
        ("1.1B", 1, 4, 22, "--num-layers-per-virtual-pipeline-stage 3"),
        ("1.1B", 2, 4, 11, _uneven("1.1B", 4)),
        ("3B", 2, 4, 15, _uneven("3B", 4)),
        ("8B", 8, 4, 12, "--num-layers-per-virtual-pipeline-stage 2"),
    )
    for model, tensor, pipeline, data, more in variants:
        yield Layout(model, "xielu", tensor, pipeline, data, more)
    for way in _ways():
        yield from (way._replace(data=data) for data in FEW_SIZES)
    for sizes in (SMALL_SIZES, MIDDLE_SIZES, LARGE_SIZES):
        for model, tensor in (("1.1B", 1), ("3B", 2), ("8B", 4)):
            for data in sizes:
                yield Layout(model, "xielu", tensor, 1, data)
    # Each split at one large size, each large size at several splits.
    for way, data in zip(_ways(), itertools.cycle((88, 512, 120, 256, 400)), strict=False):
        yield way._replace(data=data)


def _ways() -> Iterator[Layout]:
    for model in MODELS:
        for pipeline in (1, 2, 3, 4):
            more = "" if _LAYERS[model] % pipeline == 0 else _uneven(model, pipeline)
            for tensor in (1, 2, 4, 8):
                yield Layout(model, "xielu", tensor, pipeline, 0, more)


def _uneven(model: str, pipeline: int) -> str:
    first = _LAYERS[model] // pipeline - 1
    while (_LAYERS[model] - first) % (pipeline - 1):
        first -= 1
    return f"--decoder-first-pipeline-num-layers {first}"


def launcher_arguments(**environment: str) -> list[str]:
    """What pretrain.sh would give Megatron; `split` adds a layout."""
    return megatron_arguments(**{"TP": "1", "PP": "1", "MOCK_DATA": "1", **environment})


def split(arguments: list[str], layout: Layout) -> list[str]:
    """The arguments with which the model is trained in that layout."""
    words = ["--tensor-model-parallel-size", str(layout.tensor)]
    words += ["--sequence-parallel"] * (layout.tensor > 1)
    words += ["--pipeline-model-parallel-size", str(layout.pipeline)]
    # Divisible by every data-parallel size, and enough micro-batches for every pipeline schedule.
    words += ["--micro-batch-size", "1", "--global-batch-size", str(layout.data * 12)]
    if layout.more == OWN_BUCKETS or "--ddp-num-buckets" in layout.more:
        size = arguments.index("--ddp-bucket-size")
        arguments = [*arguments[:size], *arguments[size + 2 :]]
    return [*arguments, *words, *layout.more.removeprefix(OWN_BUCKETS).split()]


@dataclass
class Walked:
    """What came out."""

    layout: Layout
    verdict: str
    seconds: float
    buckets: int = 0
    failed: dict[str, str] = field(default_factory=dict)  # format: the first fault


_deadline = 0.0
_arguments: dict[tuple[str, str], list[str]] = {}
_compared: set[Layout] = set()


def walk(layout: Layout) -> Walked | None:
    """In a worker; None if the time is up."""
    from megatron_xielu.checkpoint_walk.proof import FORMATS
    from megatron_xielu.checkpoint_walk.walk import walk as walk_layout

    if time.monotonic() > _deadline:
        return None
    gpus = layout.tensor * layout.pipeline * layout.data
    arguments = split(_arguments[layout.model, layout.activation], layout)
    way = layout._replace(data=0)
    started = time.process_time()
    try:
        result = walk_layout(arguments, gpus, FORMATS, compare_ranks=way not in _compared)
    except Exception as error:  # Megatron's, too
        return Walked(layout, f"cannot be walked: {error}", 0.0)
    _compared.add(way)
    failed: dict[str, str] = {}
    for fault in result.faults:
        failed.setdefault(fault.format, str(fault))
    seconds = time.process_time() - started
    return Walked(layout, result.line, seconds, sum(map(len, result.buckets)), failed)


def _start_worker(without: tuple[str, ...], deadline: float, arguments: dict) -> None:
    from megatron_xielu.checkpoint_walk import walk

    global _deadline
    _deadline = deadline
    _arguments.update(arguments)
    walk.prepare(without=without)


def _runs(sizes: list[int]) -> str:
    return ", ".join(map(str, sorted(sizes)))


def report(done: list[Walked], made_with: str) -> str:
    """The page."""
    rows: dict[tuple, list[Walked]] = defaultdict(list)
    for walked in done:
        rows[walked.layout[:4] + walked.layout[5:]].append(walked)
    ranks = sum(walked.layout.data * walked.layout.pipeline for walked in done)
    lines = [
        f"{time.strftime('%Y-%m-%d')}: {len(done)} layouts, {ranks:,} optimizers, both formats; "
        f"{made_with}; {sum(walked.seconds for walked in done) / 60:.0f} minutes of a core.",
        "",
        "| model | TP | PP | arguments beside | data-parallel sizes | buckets | fails |",
        "|---|---|---|---|---|---|---|",
    ]
    for (model, activation, tensor, pipeline, more), walks in rows.items():
        buckets = [walked.buckets for walked in walks]
        failed: dict[str, list[int]] = defaultdict(list)
        for walked in walks:
            if not walked.buckets:
                failed[walked.verdict].append(walked.layout.data)
            for form in walked.failed:
                failed[form].append(walked.layout.data)
        name = model if activation == "xielu" else f"{model}, {activation}"
        fails = "; ".join(f"{form}: {_runs(sizes)}" for form, sizes in failed.items()) or "none"
        lines.append(
            f"| {name} | {tensor} | {pipeline} | {f'`{more}`' if more else ''} "
            f"| {_runs([walked.layout.data for walked in walks])} "
            f"| {_range(buckets)} | {fails} |"
        )
    return "\n".join(lines) + "\n"


def _range(numbers: Sequence[int]) -> str:
    least, most = min(numbers), max(numbers)
    return str(most) if least == most else f"{least} to {most}"


def _made_with(*, stock: bool) -> str:
    import torch
    from megatron.core import __version__ as megatron

    import megatron_xielu

    return (
        f"megatron-core {megatron.partition('+')[0]}, megatron_xielu {megatron_xielu.__version__}"
        f"{' without its mends of checkpoints' if stock else ''}, PyTorch "
        f"{torch.__version__.partition('+')[0]}, Python {platform.python_version()}"
    )


@dataclass
class _Logged(Walked):
    """As JSON has it."""

    layout: tuple[str, str, int, int, int, str]  # type: ignore[assignment]


def _read(log: Path, made_with: str) -> list[Walked]:
    if not log.exists():
        return []
    try:
        content = schema.load(dict[str, Any], log)
        if content.get("made with") != made_with:
            raise schema.Malformed(f"{log} is of {content.get('made with')!a}, not {made_with}")
        walked = schema.check(list[_Logged], content.get("walked"), log)
    except (OSError, schema.Malformed) as error:
        raise SystemExit(f"{error}; give another --log") from None
    return [Walked(**{**vars(one), "layout": Layout(*one.layout)}) for one in walked]


def _write(log: Path, made_with: str, done: list[Walked]) -> None:
    content = {"made with": made_with, "walked": [asdict(walked) for walked in done]}
    files.write(log, json.dumps(content))


def main() -> int:
    """Walk until the time is up, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add(
        "--minutes",
        type=Limits(0, 1e6, whole=False).read,
        default=20.0,
        help="start no layout after so many (20)",
    )
    add("--processes", type=Limits(1, 1024).read, default=2, help="that walk at a time (2)")
    add("--stock", action="store_true", help="without this package's mends")
    add("--log", type=output_file, help="what was walked, written as it goes")
    add(
        "--out",
        type=output_file,
        help="a page; all after its heading Walked is replaced",
    )
    options = parser.parse_args()
    without = ("distributed_optimizer_checkpoints",) if options.stock else ()
    models = sorted({layout[:2] for layout in layouts()})
    arguments = {
        (model, activation): launcher_arguments(**MODELS[model], ACTIVATION=activation)
        for model, activation in models
    }
    made_with = _made_with(stock=options.stock)
    started, done = time.monotonic(), _read(options.log, made_with) if options.log else []
    walked_before = {walked.layout for walked in done}
    todo = [layout for layout in dict.fromkeys(layouts()) if layout not in walked_before]
    workers = ProcessPoolExecutor(
        options.processes,
        multiprocessing.get_context("spawn"),
        _start_worker,
        (without, started + 60 * options.minutes, arguments),
    )
    with workers:
        for walked in filter(None, workers.map(walk, todo)):
            done.append(walked)
            if options.log:
                _write(options.log, made_with, done)
            print(*walked.layout, walked.verdict, f"{walked.seconds:.1f} s", sep="\t", flush=True)
    page = report(done, made_with)
    print(page, flush=True)
    if options.out:
        before = options.out.read_text().partition(_HEADING)[0] if options.out.exists() else ""
        files.keep(options.out, f"{before}{_HEADING}\n{page}")
    return 0 if options.stock or not any(w.failed or not w.buckets for w in done) else 1


if __name__ == "__main__":
    ready_output()
    sys.exit(main())
