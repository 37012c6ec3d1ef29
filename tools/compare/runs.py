"""The runs of a comparison: their folders, what they have in common, and how each is trained.

OUT/.lock             held while a comparison runs in OUT
OUT/settings.json     what all runs there have in common
OUT/VARIANT/seed_N/   checkpoints, events, log.txt and, once it is finished, record.json
"""

from __future__ import annotations

import argparse
import fcntl
import os
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from compare.hub_text import HubFile
from compare.package_text import Source
from compare.records import Record, read_record
from compare.settings import PAPER_INPUT_STD, Settings, megatron_flags
from compare.text import Text, write_json
from compare.training import Diverged, train
from compare.variants import Variant
from megatron_xielu import __version__
from megatron_xielu.checkpoints.folder import checkpoints, read_tracker
from megatron_xielu.common import schema
from megatron_xielu.common.schema import Malformed
from megatron_xielu.common.versions import made_with

FIRST_SEED, _MOST_SEEDS = 42, 1000
_REPLACED = ("results", "resume", "report", "text", "corpus", "sweep")  # in OUT


@dataclass(frozen=True)
class Machine:
    """Where it runs: ``device`` is a GPU's name or ``"cpu"``."""

    device: str
    tensor_parallel: int

    @property
    def on_gpu(self) -> bool:
        """Whether the trainings use GPUs."""
        return self.device != "cpu"


@dataclass(frozen=True)
class Run:
    """One training: a variant with a seed, in a folder of its own."""

    variant: Variant
    seed: int
    folder: Path
    flags: list[str]

    @property
    def label(self) -> str:
        """What people read."""
        return f"{self.variant.label}, seed {self.seed}"


def parse_seeds(value: str) -> list[int]:
    """``--seeds``: how many, or which."""
    if not re.fullmatch(r"[0-9]{1,9}(,[0-9]{1,9})*,?", value):
        raise argparse.ArgumentTypeError(
            f"{value[:40]!r} says neither how many seeds nor which: 3, or 1,2,3"
        )
    numbers = [int(word) for word in value.split(",") if word]
    if "," not in value:
        if numbers[0] < 1:
            raise argparse.ArgumentTypeError("one seed at least")
        if numbers[0] > _MOST_SEEDS:
            raise argparse.ArgumentTypeError(f"more than {_MOST_SEEDS} seeds")
        return list(range(FIRST_SEED, FIRST_SEED + numbers[0]))
    if len(set(numbers)) < len(numbers):
        raise argparse.ArgumentTypeError(f"{value} has a seed twice")
    if 0 in numbers:
        raise argparse.ArgumentTypeError("a seed is 1 or more")  # Megatron's rule
    return numbers


def show_seeds(seeds: Sequence[int]) -> str:
    """As `parse_seeds` takes them: which."""
    return ",".join(map(str, seeds)) + "," * (len(seeds) == 1)


def this_machine(settings: Settings, ranks: int | None) -> Machine:
    """The ranks of the preset, or what the user says; on GPUs no more than there are."""
    import torch

    wanted = ranks or settings.tensor_parallel
    if not torch.cuda.is_available():
        if settings.bf16:
            print("this preset is meant for a GPU: on this CPU it will take days", flush=True)
        return Machine("cpu", wanted)
    there = torch.cuda.device_count()
    if ranks and ranks > there:
        raise SystemExit(f"compare: --tensor-parallel {ranks}: there are {there} GPUs")
    return Machine(torch.cuda.get_device_name(0), min(wanted, there))


def context(machine: Machine) -> dict[str, str]:
    """When, where and with what, for the head of results."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": machine.device if machine.on_gpu else f"{_cores()} CPU cores",
        "versions": made_with(__version__),
    }


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_text(settings: Settings, out: Path, folder: Path | None) -> Source:
    """Whose text: the user's folder's, or the preset's; ``out`` is where it is, or will be."""
    if folder or settings.tokenizer != "bpe":
        return folder
    from compare import bpe_text

    return bpe_text.choose(out)


def prepare_text(settings: Settings, out: Path, folder: Source) -> Text:
    """The text that `choose_text` has chosen, as the preset tokenises it."""
    if settings.tokenizer == "bpe":
        from compare import bpe_text

        return bpe_text.prepare(folder, out)
    from compare import byte_text

    assert not isinstance(folder, HubFile)
    what = folder or "this Python's standard library"
    print(f"preparing the text: {what}, tokenised by bytes", flush=True)
    return byte_text.prepare(folder or byte_text.stdlib_folder(), out)


def plan_runs(
    options: argparse.Namespace,
    out: Path,
    settings: Settings,
    machine: Machine,
    text: Text,
    own: Mapping[str, Settings] | None = None,
) -> list[Run]:
    """All trainings, seed by seed, so that whole comparisons are there early.

    ``own``: settings by variant, where those are other ones.
    """
    widths = dict(options.ffn)
    return [
        Run(
            variant,
            seed,
            folder := folder_of(out, variant.name, seed),
            megatron_flags(
                (own or {}).get(variant.name, settings),
                variant,
                seed=seed,
                ffn=widths.get(variant.name, settings.ffn_of(variant)),
                tensor_parallel=machine.tensor_parallel,
                text=text,
                folder=folder,
            ),
        )
        for seed in options.seeds
        for variant in options.variants
    ]


def folder_of(out: Path, variant: str, seed: int) -> Path:
    """Where a run keeps everything."""
    return out / variant / f"seed_{seed}"


def hold_lock(out: Path) -> int:
    """Lock ``out`` until this process and the training it started have ended.

    Returns:
        The descriptor that holds the lock.

    Raises:
        SystemExit: another process holds it, or it cannot be written, or is somebody else's:
            what is in it would be replaced.
    """
    mark = out / ".lock"
    try:
        out.mkdir(parents=True, exist_ok=True)
        there = [name for name in _REPLACED if (out / name).exists()]
        if any((out / "text" / name).is_file() for name in ("source.json", "manifest.json")):
            there.remove("text")  # carried here
        if there and not mark.exists():
            raise SystemExit(
                f"compare: --out {out} has {there[0]}, which would be replaced, and no .lock, as "
                "comparisons leave it; name a new folder, or make that file if one made this folder"
            )
        lock = os.open(mark, os.O_RDWR | os.O_CREAT)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SystemExit(
            f"compare: another comparison is running in {out}, or its last training is still "
            "stopping; wait for it, or choose another folder with --out"
        ) from None
    except OSError as error:
        raise SystemExit(f"compare: --out {out} cannot be written to: {error.strerror}") from None
    return lock


def describe_run(
    settings: Settings, machine: Machine, folder: Source, widths: dict[str, int]
) -> dict[str, Any]:
    """Everything that results must have in common to be shown together."""
    from compare import byte_text, package_text

    if settings.tokenizer == "bpe":
        text = package_text.describe(folder)
    else:
        assert not isinstance(folder, HubFile)
        text = byte_text.describe(folder or byte_text.stdlib_folder()).to_json()
    return {
        "settings": {**asdict(settings), "init_std": settings.init_std},
        "machine": asdict(machine),
        "text": text,
        "ffn": widths,
        "megatron-core": version("megatron-core"),
        "torch": version("torch"),
    }


def show_text(described: Mapping[str, Any]) -> str:
    """Of the ``text`` of `describe_run`, whose it is."""
    if "source" in described:
        described = {described["source"]: described["sha256"]}
    return ", ".join(
        f"{name} (sha256 {digest[:12]}…)"
        for name, digest in described.items()
        if isinstance(digest, str)
    )


def check_settings(out: Path, wanted: dict[str, Any]) -> None:
    """Keep ``wanted`` in ``out/settings.json``, or refuse if that holds something else.

    Raises:
        SystemExit: it does, or is damaged; names what differs and what to do.
    """
    path = out / "settings.json"
    if not path.exists():
        write_json(path, wanted)
        return
    try:
        there = _flatten(schema.check(dict[str, Any], schema.read_json(path), path))
    except Malformed as error:
        raise SystemExit(
            f"compare: {error}; delete that file if the runs beside it were made by this command"
        ) from None
    here = _flatten(wanted)
    differing = [
        f"  {key}: {there.get(key)} there, {here.get(key)} now"
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key)
    ]
    if differing:
        raise SystemExit(
            "\n".join([f"compare: {out} holds runs with other settings:", *differing])
            + "\nDelete that folder to start over, or choose another with --out."
        )


def _flatten(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= (
            _flatten(value, f"{prefix}{key}.")
            if isinstance(value, dict)
            else {f"{prefix}{key}": value}
        )
    return flat


def do_all(
    planned: Sequence[tuple[str, Run, Settings]], machine: Machine, lock: int, *, instead: str
) -> None:
    """`do_run` of each; one that diverges keeps none after it from being trained.

    Args:
        planned: runs, each with what to say before its label, and its settings.
        machine: where they run.
        lock: that they hold.
        instead: what else can be done about runs that diverge.

    Raises:
        SystemExit: some diverged; names them, and what to leave out.
    """
    diverged = []
    for number, (before, run, settings) in enumerate(planned, 1):
        try:
            do_run(run, f"[{number}/{len(planned)}]{before}", settings, machine, lock)
        except Diverged as error:
            print(error, flush=True)
            diverged.append(f"{before} {run.label}".strip())
    if diverged:
        raise SystemExit(
            f"compare: {len(diverged)} of {len(planned)} runs diverged ({'; '.join(diverged)}), "
            f"and there are no results without them; {instead}"
        )


def do_run(run: Run, place: str, settings: Settings, machine: Machine, lock: int) -> None:
    """Train to the end and write the record, unless that is there already."""
    if (run.folder / "record.json").exists():
        print(f"{place} {run.label}: finished before", flush=True)
        return
    iteration = read_tracker(run.folder / "checkpoints")
    if isinstance(iteration, int):
        print(f"{place} {run.label}: resumes from iteration {iteration}", flush=True)
    peak_rss = train(
        f"{place} {run.label}:",
        run.flags,
        ranks=machine.tensor_parallel,
        on_gpu=machine.on_gpu,
        tokens_per_iteration=settings.tokens_per_iteration,
        log=run.folder / "log.txt",
        keep_open=lock,
    )
    record = read_record(
        run.folder, settings, run.variant, run.seed, peak_rss=peak_rss, on_gpu=machine.on_gpu
    )
    if stds := record.input_std:
        print(
            f"{place} {run.label}: its inputs start with a standard deviation of "
            f"{sum(stds) / len(stds):.2f} ({min(stds):.2f} to {max(stds):.2f} by layer), the "
            f"paper's with {PAPER_INPUT_STD:.2f}",
            flush=True,
        )
    write_json(run.folder / "record.json", record.to_json())
    remove_old_checkpoints(run.folder / "checkpoints")


def remove_old_checkpoints(save_dir: Path) -> None:
    """Keep the last one: the record has the rest."""
    last = read_tracker(save_dir)
    for iteration, path in checkpoints(save_dir).items():
        if isinstance(last, int) and iteration != last:
            shutil.rmtree(path)


def finished_records(
    out: Path, variants: Sequence[Variant], seeds: Sequence[int]
) -> dict[str, dict[int, Record]]:
    """The records in ``out`` by variant and seed.

    Raises:
        SystemExit: one is damaged, or of another run.
    """
    found: dict[str, dict[int, Record]] = {}
    for variant in variants:
        for seed in seeds:
            path = folder_of(out, variant.name, seed) / "record.json"
            if path.exists():
                record = _finished(path, variant, seed)
                found.setdefault(variant.name, {})[seed] = record
    return found


def _finished(path: Path, variant: Variant, seed: int) -> Record:
    try:
        record = schema.load(Record, path)
        if (record.variant, record.seed) != (variant.name, seed):
            raise Malformed(f"{path}: it is of {record.variant} with seed {record.seed}")
        if (record.alphas is None) == variant.has_alphas:
            raise Malformed(f"{path}: it has {'no ' * variant.has_alphas}alphas")
    except Malformed as error:
        raise SystemExit(
            f"compare: {error}; delete it, and the same command makes it again"
        ) from None
    return record
