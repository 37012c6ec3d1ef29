"""``make demo``: pretrain a small Llama with four activations, at the same size, on local text.

Trains xIELU, xIPReLU, ReLU² and SwiGLU one after another with Megatron, on the GPUs that are
there or else on the CPU, and writes ``results.json`` and two pictures to ``runs/demo``. Run it
again after an interruption and it goes on: finished activations are kept, a started one resumes
from its last checkpoint. The settings are kept with the results; a run with others is refused.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import platform
import shutil
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from prepare_text import describe, prepare, stdlib_folder, write_json
from records import FINAL_ITERATIONS, Record, read_record, saved_iteration
from settings import ACTIVATIONS, FULL, QUICK, Settings, megatron_flags
from training import REPOSITORY, Stopped, raise_on_stop_signals, train

NO_EVIDENCE = (
    "This is a demo: one seed, a tiny model, very little text. Its numbers are no evidence for or "
    "against the paper's claim."
)
_MAX_TENSOR_PARALLEL = 2


@dataclass(frozen=True)
class Machine:
    """Where the demo runs: ``device`` is a GPU's name or ``"cpu"``."""

    device: str
    tensor_parallel: int

    @property
    def on_gpu(self) -> bool:
        """Whether the trainings use GPUs."""
        return self.device != "cpu"


def this_machine() -> Machine:
    """Two ranks, on the CPU or on two GPUs; one rank where there is one GPU."""
    import torch

    if not torch.cuda.is_available():
        return Machine("cpu", _MAX_TENSOR_PARALLEL)
    gpus = torch.cuda.device_count()
    return Machine(torch.cuda.get_device_name(0), min(_MAX_TENSOR_PARALLEL, gpus))


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is not finished yet, then write the results of all that is."""
    options = _parse(argv)
    out = options.out.resolve()
    begin = time.monotonic()
    raise_on_stop_signals()
    try:
        lock = hold_lock(out)
        settings = QUICK if options.quick else FULL
        machine = this_machine()
        print("preparing the text: this Python's standard library, tokenised by bytes", flush=True)
        check_settings(out, describe_run(settings, machine))
        text = prepare(stdlib_folder(), out / "text")
        print(
            f"{text.tokens['train']:,} bytes in {text.documents['train']} files to train on, "
            f"{text.tokens['valid']:,} in {text.documents['valid']} files held out\n"
            f"{machine.tensor_parallel} tensor-parallel rank(s) on {machine.device}; "
            f"{settings.iterations} iterations of {settings.tokens_per_iteration:,} tokens for "
            "each activation",
            flush=True,
        )
        for name in options.activations:
            run_activation(name, out, settings, machine, lock)
        records = finished_records(out)
        write_results(out, records, settings, machine)
    except Stopped as stopped:
        print(f"\nstopped; run the same command again to resume (kept in {out})", flush=True)
        raise SystemExit(128 + stopped.signum) from None
    print(f"\n{table(records)}\n\n{NO_EVIDENCE}\n")
    print(f"{_minutes(time.monotonic() - begin)}; written to {out}:")
    print("  results.json, loss.png, alphas.png; log, events and checkpoints by activation")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a few iterations of a tiny model, to exercise the pipeline (own default folder)",
    )
    parser.add_argument("--out", type=Path, help="folder for everything (default: runs/demo)")
    parser.add_argument(
        "--activations",
        nargs="+",
        choices=list(ACTIVATIONS),
        default=list(ACTIVATIONS),
        help="run these only (default: all)",
    )
    options = parser.parse_args(argv)
    options.out = options.out or REPOSITORY / "runs" / ("demo-quick" if options.quick else "demo")
    return options


def hold_lock(out: Path) -> int:
    """Lock ``out`` until this process and the training it started have ended.

    Returns:
        The descriptor that holds the lock.

    Raises:
        SystemExit: another process holds it.
    """
    out.mkdir(parents=True, exist_ok=True)
    lock = os.open(out / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SystemExit(
            f"demo: another demo is running in {out}, or its last training is still stopping; "
            "wait for it, or choose another folder with --out"
        ) from None
    return lock


def describe_run(settings: Settings, machine: Machine) -> dict[str, Any]:
    """Everything that results must have in common to be shown together."""
    return {
        "settings": asdict(settings),
        "machine": asdict(machine),
        "text": describe(stdlib_folder()).to_json(),
        "megatron-core": version("megatron-core"),
        "torch": version("torch"),
    }


def check_settings(out: Path, wanted: dict[str, Any]) -> None:
    """Keep ``wanted`` in ``out/settings.json``, or refuse if that holds something else.

    Raises:
        SystemExit: it does; names what differs and what to do.
    """
    path = out / "settings.json"
    if not path.exists():
        write_json(path, wanted)
        return
    there, here = _flatten(json.loads(path.read_text())), _flatten(wanted)
    differing = [
        f"  {key}: {there.get(key)} there, {here.get(key)} now"
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key)
    ]
    if differing:
        raise SystemExit(
            "\n".join([f"demo: {out} holds a run with other settings:", *differing])
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


def run_activation(name: str, out: Path, settings: Settings, machine: Machine, lock: int) -> None:
    """Train one activation to its end and write its record, unless that is there already."""
    activation, folder = ACTIVATIONS[name], out / name
    if (folder / "record.json").exists():
        print(f"{activation.label:8} finished before", flush=True)
        return
    if iteration := saved_iteration(folder / "checkpoints"):
        print(f"{activation.label:8} resumes from iteration {iteration}", flush=True)
    train(
        activation.label,
        megatron_flags(
            settings,
            activation,
            tensor_parallel=machine.tensor_parallel,
            text=out / "text",
            folder=folder,
        ),
        ranks=machine.tensor_parallel,
        on_gpu=machine.on_gpu,
        tokens_per_iteration=settings.tokens_per_iteration,
        log=folder / "log.txt",
        keep_open=lock,
    )
    record = read_record(folder, settings, activation, name)
    write_json(folder / "record.json", record.to_json())
    remove_old_checkpoints(folder / "checkpoints")


def remove_old_checkpoints(checkpoints: Path) -> None:
    """Keep the last one: the record has what the others were for."""
    last = saved_iteration(checkpoints)
    for path in checkpoints.glob("iter_*"):
        if path.name != f"iter_{last:07}":
            shutil.rmtree(path)


def finished_records(out: Path) -> dict[str, Record]:
    """The records in ``out``, in the order of `ACTIVATIONS`."""
    paths = {name: out / name / "record.json" for name in ACTIVATIONS}
    return {
        name: Record.from_json(json.loads(path.read_text()))
        for name, path in paths.items()
        if path.exists()
    }


def write_results(
    out: Path, records: dict[str, Record], settings: Settings, machine: Machine
) -> None:
    """Write ``results.json``, ``loss.png`` and, where alphas were trained, ``alphas.png``."""
    import plots

    write_json(
        out / "results.json",
        {
            "note": NO_EVIDENCE,
            "loss": f"nats per byte; train_loss: mean of the last {FINAL_ITERATIONS} iterations; "
            "validation_loss: held-out files, after the last iteration",
            "machine": {**asdict(machine), "python": platform.python_version()},
            "settings": asdict(settings),
            "activations": {name: _summary(record) for name, record in records.items()},
        },
    )
    plots.plot_losses(records, out / "loss.png")
    if any(record.alphas for record in records.values()):
        plots.plot_alphas(records, out / "alphas.png")


def _summary(record: Record) -> dict[str, Any]:
    summary: dict[str, Any] = {
        "parameters": record.parameters,
        "tokens": record.tokens,
        "train_loss": record.train_loss,
        "validation_loss": record.valid_loss,
        "tokens_per_second": record.tokens_per_second,
    }
    if record.alphas:
        summary["alpha_p"] = record.alphas.positive[-1]
        summary["alpha_n"] = record.alphas.negative[-1]
    return summary


def table(records: dict[str, Record]) -> str:
    """The results for the terminal."""
    lines = [
        f"{'activation':10} {'parameters':>11} {'tokens':>9} {'train loss':>11} "
        f"{'held-out loss':>14} {'tokens/s':>9}"
    ]
    for name, record in records.items():
        lines.append(
            f"{ACTIVATIONS[name].label:10} {record.parameters:11,} {record.tokens:9,} "
            f"{record.train_loss:11.3f} {record.valid_loss:14.3f} {record.tokens_per_second:9,.0f}"
        )
    for name, record in records.items():
        if record.alphas:
            sides = {"αp": record.alphas.positive[-1], "αn": record.alphas.negative[-1]}
            for side, values in sides.items():
                shown = "  ".join(f"{value:.3f}" for value in values)
                lines.append(f"{ACTIVATIONS[name].label} {side} by layer: {shown}")
    return "\n".join(lines)


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60} min {int(seconds) % 60} s"


if __name__ == "__main__":
    # Megatron warns of every optional package at import, here and again in each log.
    warnings.filterwarnings("ignore")
    sys.exit(main())
