"""Train activations at equal cost, on the same data in the same order, and say what differs.

    tools/compare_activations.py tiny --seeds 3 --out runs/tiny

trains xIELU, xIPReLU, ReLU², SwiGLU and GELU one after another with Megatron, each with every
seed, and writes tables and pictures to ``OUT/results`` and a page to ``OUT/report``. Run it again
after an interruption and it goes on: finished runs are kept, a started one resumes from its last
checkpoint. The settings are kept with the results; a run with others is refused. Presets:

    quick        exercises everything in minutes; its losses mean nothing
    tiny         a small Llama on bytes of Python's standard library, on a CPU (``make demo``)
    overnight    3.6M parameters on almost all of it once: for a night on a CPU
    small        50M parameters on pages of FineWeb-Edu, on one GPU
    minutes      the same, a third as long: for a GPU that is rented by the minute
    paper-1b     the paper's models: prints the commands for a cluster, and runs nothing
    paper-3b

In the place of a preset ``collect RUN...`` has finished runs, of a cluster, too, in the same tables
and pictures, and ``scaling`` does the same at several sizes, and fits the losses.
docs/compare.md has the rest; the code is in tools/compare.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shutil
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from compare import equal_cost, results, resume, sweep
from compare.page import write_page
from compare.records import Record
from compare.runs import (
    FIRST_SEED,
    Machine,
    Run,
    check_settings,
    choose_text,
    context,
    describe_run,
    do_all,
    finished_records,
    folder_of,
    hold_lock,
    parse_seeds,
    plan_runs,
    prepare_text,
    show_seeds,
    show_text,
    this_machine,
)
from compare.settings import PRESETS, Settings
from compare.text import Text
from compare.training import REPOSITORY, Stopped, raise_on_stop_signals, train
from compare.variants import ACTIVATIONS, parse

from megatron_xielu.checkpoints.folder import TRACKER, read_tracker
from megatron_xielu.common import files
from megatron_xielu.common.schema import Malformed
from megatron_xielu.common.text import is_utf8, one_line, ready_output

_DEFAULT_BASELINE = "swiglu"
_CLUSTER_PRESETS = ("paper-1b", "paper-3b")
# In the place of a preset; each is a module of tools/compare with options of its own.
_COMMANDS = {
    "collect": "finished runs, of a cluster, too, into the same tables and pictures",
    "scaling": "the same at several sizes, and whether gaps grow with them",
}
_FETCHED_TEXT = [name for name, settings in PRESETS.items() if settings.tokenizer == "bpe"]


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is not finished yet, then write the results of all that is.

    Raises:
        SystemExit: something is wrong; with what.
    """
    words = sys.argv[1:] if argv is None else argv
    if words and words[0] in _COMMANDS:
        importlib.import_module(f"compare.{words[0]}").main(words[1:])
        return
    options = parse_options(argv)
    try:
        _run(options, Path(os.path.realpath(options.out)))
    except (OSError, Malformed) as error:
        raise SystemExit(f"compare: {one_line(error)}") from None


def _run(options: argparse.Namespace, out: Path) -> None:
    if options.preset in _CLUSTER_PRESETS:
        from compare import cluster

        preset, variants = cluster.PRESETS[options.preset], options.variants
        print(cluster.show(preset, variants, options.seeds, options.out, options.baseline))
        return
    begin = time.monotonic()
    raise_on_stop_signals()
    try:
        if options.prepare_text:
            _only_prepare_text(options, out)
            return
        if options.check_resume:
            raise SystemExit(1 if check_resume(options, out).differing else 0)
        records, notes = _compare(options, out)
    except Stopped as stopped:
        print(f"\nstopped; run the same command again to resume (kept in {out})", flush=True)
        raise SystemExit(128 + stopped.signum) from None
    folders = [folder_of(out, name, seed) for name, found in records.items() for seed in found]
    page = write_page(folders, out / "report", notes)
    print(f"{_minutes(time.monotonic() - begin)}; what to open:")
    if page:
        print(f"  {page}: every run, in pictures")
    print(f"  {out / 'results' / 'results.md'}: the comparison; its pictures lie beside it")


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; ``variants`` and ``seeds`` are ready to use."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog=" ".join(f"`{name} --help`: {what}." for name, what in _COMMANDS.items())
        + " docs/compare.md says more.",
    )
    parser.add_argument("preset", choices=[*PRESETS, *_CLUSTER_PRESETS])
    parser.add_argument("--out", type=Path, help="folder for everything [runs/PRESET]")
    parser.add_argument(
        "--activations",
        nargs="+",
        choices=list(ACTIVATIONS),
        default=list(ACTIVATIONS),
        metavar="NAME",
        help=f"which of {', '.join(ACTIVATIONS)} [all]",
    )
    parser.add_argument(
        "--ablation",
        nargs="+",
        default=[],
        metavar="NAME",
        help="also xielu-frozen, xielu-shared, xielu-init-0.4, xielu-beta-0.3, xiprelu-frozen, …",
    )
    parser.add_argument(
        "--seeds",
        type=parse_seeds,
        default=[FIRST_SEED],
        metavar="N",
        help="how many, or which with a comma: 3, or 1,2,3, or 7, [1; 3 or more to tell noise]",
    )
    parser.add_argument(
        "--baseline", help="what the others are compared with [swiglu, else the first]"
    )
    parser.add_argument(
        "--ffn",
        nargs="+",
        type=_width,
        default=[],
        metavar="NAME=WIDTH",
        help="another width of the MLP; refused where the cost is no longer equal",
    )
    parser.add_argument(
        "--lr-sweep",
        type=sweep.parse_rates,
        default=[],
        metavar="RATES",
        help="first train each once at every of these learning rates, 1e-3,2e-3,4e-3, with seed "
        f"{sweep.SEED}; then all seeds at the best one of each [the preset's for all]",
    )
    parser.add_argument("--text", type=Path, help="folder of text files to use instead")
    parser.add_argument(
        "--tensor-parallel",
        type=int,
        help="ranks of a run [what the preset and machine have]",
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--prepare-text",
        action="store_true",
        help=f"of {' and '.join(_FETCHED_TEXT)}: only write OUT/text, which can be carried to a "
        "machine without a network",
    )
    instead.add_argument(
        "--check-resume",
        action="store_true",
        help="only stop a short training of the first activation in its middle, and see whether "
        "it ends with the bits of one that is not stopped",
    )
    options = parser.parse_args(argv)
    names = list(dict.fromkeys([*options.activations, *options.ablation]))
    try:
        options.variants = [parse(name) for name in names]
    except ValueError as error:
        parser.error(f"--ablation {error}")
    if options.baseline is None:
        options.baseline = _DEFAULT_BASELINE if _DEFAULT_BASELINE in names else names[0]
    for flag, name in [("--baseline", options.baseline), *(("--ffn", n) for n, _ in options.ffn)]:
        if name not in names:
            parser.error(f"{flag} {name}: not among what is compared, {', '.join(names)}")
    if options.prepare_text and options.preset not in _FETCHED_TEXT:
        parser.error(
            f"--prepare-text is for {' and '.join(_FETCHED_TEXT)}, whose text is fetched and takes "
            f"minutes; {options.preset} needs no network: leave it out"
        )
    if options.check_resume and options.preset in _CLUSTER_PRESETS:
        parser.error(f"--check-resume: {options.preset} runs nothing here")
    if options.lr_sweep and (
        options.preset in _CLUSTER_PRESETS or options.prepare_text or options.check_resume
    ):
        parser.error("--lr-sweep: nothing is compared here; leave it out")
    if options.lr_sweep and sweep.SEED in options.seeds:
        parser.error(
            f"--seeds {sweep.SEED}: --lr-sweep chooses with that seed, which may not be among the "
            "compared ones"
        )
    if options.out and not is_utf8(str(options.out)):
        parser.error(f"--out {str(options.out)!a} is not UTF-8")
    if options.text and not options.text.is_dir():
        parser.error(f"--text {options.text}: no such folder")
    if options.tensor_parallel is not None and options.tensor_parallel not in (1, 2, 4):
        parser.error("--tensor-parallel must be 1, 2 or 4")
    home = Path() if options.preset in _CLUSTER_PRESETS else REPOSITORY
    options.out = options.out or home / "runs" / options.preset
    return options


def _width(value: str) -> tuple[str, int]:
    name, _, width = value.partition("=")
    if not re.fullmatch("[1-9][0-9]{0,8}", width):
        raise argparse.ArgumentTypeError(f"{value[:40]} is not NAME=WIDTH, xielu=768 for example")
    return name, int(width)


def _compare(
    options: argparse.Namespace, out: Path
) -> tuple[dict[str, dict[int, Record]], tuple[str, ...]]:
    """The records, and what to keep in mind with them."""
    settings = PRESETS[options.preset]
    lock = hold_lock(out)
    before = finished_records(out, options.variants, options.seeds)  # can be read
    machine = this_machine(settings, options.tensor_parallel)
    widths = dict(options.ffn)
    # Before the text, which takes longest: neither depends on it.
    source = choose_text(settings, out / "text", options.text)
    described = describe_run(settings, machine, source, widths)
    if options.lr_sweep:
        described["lr_sweep"] = options.lr_sweep
    check_settings(out, described)
    text = prepare_text(settings, out / "text", source)
    runs = plan_runs(options, out, settings, machine, text)
    costs = equal_cost.costs({run.variant.name: run.flags for run in runs})
    equal_cost.check(costs, options.baseline)
    labels = {variant.name: variant.label for variant in options.variants}
    print(
        f"{text.tokens['train']:,} {text.unit}s of {text.documents['train']:,} documents to train "
        f"on, {text.tokens['valid']:,} of {text.documents['valid']:,} held out\n"
        f"{machine.tensor_parallel} tensor-parallel rank(s) on {machine.device}; "
        f"{settings.iterations} iterations of {settings.tokens_per_iteration:,} {text.unit}s a "
        f"run, {len(runs)} runs\n\n{equal_cost.table(costs, labels, options.baseline)}\n",
        flush=True,
    )
    own = dict.fromkeys(labels, settings)
    swept = None
    if options.lr_sweep:
        said = sweep.cost(options.lr_sweep, options.variants, settings, costs, text.unit)
        print(f"learning rates first: {said}\n", flush=True)
        swept = sweep.train_all(options, out, settings, machine, text, lock, said)
        for name in own:
            own[name] = replace(settings, learning_rate=swept.best(name))
        runs = plan_runs(options, out, settings, machine, text, own)
        sweep.check_rates(runs, before, own)
    rates = "give --lr-sweep lower rates" if swept else "find other learning rates with --lr-sweep"
    do_all(
        [("", run, own[run.variant.name]) for run in runs],
        machine,
        lock,
        instead="leave them out with --seeds, --activations or --ablation, or "
        f"{rates} and another --out",
    )
    records = finished_records(out, options.variants, options.seeds)
    notes = (*(swept.notes(labels) if swept else ()), *results.other_regime(records))
    setup = _setup(options, settings, machine, text, described, swept, notes)
    shown = results.write(out / "results", records, options.variants, costs, setup)
    os.close(lock)
    print("\n" + results.for_terminal(shown))
    return records, setup.notes


def _only_prepare_text(options: argparse.Namespace, out: Path) -> None:
    """Without settings.json, which names the machine: another one is going to train."""
    lock = hold_lock(out)
    settings = PRESETS[options.preset]
    source = choose_text(settings, out / "text", options.text)
    text = prepare_text(settings, out / "text", source)
    os.close(lock)
    size = sum(path.stat().st_size for path in (out / "text").rglob("*"))
    print(
        f"{text.tokens['train']:,} {text.unit}s to train on, {text.tokens['valid']:,} held out; "
        f"{out / 'text'} is {size / 2**20:.0f} MiB, and all that another machine needs in its OUT"
    )


def check_resume(options: argparse.Namespace, out: Path) -> resume.Outcome:
    """Train in ``out/resume``, anew each time, and write ``out/results/resume.md``.

    Raises:
        SystemExit: a training fails, or was over before it could be stopped.
    """
    settings, lock = resume.shortened(PRESETS[options.preset]), hold_lock(out)
    machine = this_machine(settings, options.tensor_parallel)
    source = choose_text(settings, out / "text", options.text)
    text = prepare_text(settings, out / "text", source)
    shutil.rmtree(out / "resume", ignore_errors=True)
    folders = [out / "resume" / name for name in ("whole", "stopped")]
    whole, stopped = (plan_runs(options, at, settings, machine, text)[0] for at in folders)

    def go(run: Run, what: str, stop_after: int | None = None) -> None:
        train(
            f"{run.label}, {what}:",
            [*run.flags, resume.FLAG],
            ranks=machine.tensor_parallel,
            on_gpu=machine.on_gpu,
            tokens_per_iteration=settings.tokens_per_iteration,
            log=run.folder / "log.txt",
            keep_open=lock,
            stop_after=stop_after,
        )

    go(whole, "in one go")
    go(stopped, "to be stopped", resume.STOP_AFTER)
    at = read_tracker(stopped.folder / "checkpoints")
    if not isinstance(at, int) or at >= settings.iterations:
        raise SystemExit(
            f"compare: the training was not stopped on its way: {TRACKER} says {at}; its log is "
            f"{stopped.folder / 'log.txt'}"
        )
    go(stopped, "again")
    found = resume.compare(
        whole.folder, stopped.folder, stopped_at=at, iterations=settings.iterations
    )
    title = f"{options.preset}, {whole.label}"
    shown = found.markdown(title, context(machine))
    files.write(out / "results" / "resume.md", shown)
    os.close(lock)
    print("\n" + results.for_terminal(shown))
    return found


def _setup(
    options: argparse.Namespace,
    settings: Settings,
    machine: Machine,
    text: Text,
    described: dict[str, Any],
    swept: sweep.Sweep | None,
    notes: Sequence[str],
) -> results.Setup:
    if swept:
        rates = {variant.name: swept.best(variant.name) for variant in options.variants}
        described = {**described, "settings": {**described["settings"], "learning_rate": rates}}
    return results.Setup(
        preset=options.preset,
        unit=text.unit,
        baseline=options.baseline,
        notes=(
            *results.caveats(
                tiny=options.preset in ("tiny", "overnight"),
                quick=options.preset == "quick",
                on_gpu=machine.on_gpu,
                seeds=len(options.seeds),
                swept=bool(options.lr_sweep),
            ),
            *notes,
        ),
        context={
            "command": " ".join(["tools/compare_activations.py", *_words(options)]),
            **context(machine),
            "text": show_text(described["text"]),
            "run": f"{settings.iterations} iterations of {settings.tokens_per_iteration:,} "
            f"{text.unit}s, {settings.iterations * settings.tokens_per_iteration:,} in all, of "
            f"{text.tokens['train']:,} there are; tensor parallel {machine.tensor_parallel}",
            "model": f"{settings.layers} layers of width {settings.hidden}, sequences of "
            f"{settings.sequence:,}, batches of {settings.batch}; initial weights of "
            f"{settings.init_std:g}, {'bf16' if settings.bf16 else 'fp32'}",
            "schedule": f"learning rate {'as swept' if swept else f'{settings.learning_rate:g}'}, "
            f"{settings.warmup} iterations of warm-up and {settings.decay} of decay",
            "held out": f"{settings.validation_batches * settings.tokens_per_iteration:,} "
            f"{text.unit}s a validation, of {text.tokens['valid']:,} there are",
            **({"learning rates": swept.cost} if swept else {}),
        },
        settings=described,
        sweep=swept,
    )


def _words(options: argparse.Namespace) -> list[str]:
    """The options that give these results again."""
    words = [options.preset, "--seeds", show_seeds(options.seeds)]
    if options.activations != list(ACTIVATIONS):
        words += ["--activations", *options.activations]
    words += ["--ablation", *options.ablation] if options.ablation else []
    if options.baseline != _DEFAULT_BASELINE:
        words += ["--baseline", options.baseline]
    words += ["--ffn", *(f"{name}={width}" for name, width in options.ffn)] if options.ffn else []
    if options.lr_sweep:
        words += ["--lr-sweep", ",".join(f"{rate:g}" for rate in options.lr_sweep)]
    words += ["--text", "FOLDER"] if options.text else []
    if options.tensor_parallel:
        words += ["--tensor-parallel", str(options.tensor_parallel)]
    return words


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60} min {int(seconds) % 60} s"


if __name__ == "__main__":
    ready_output()
    # Megatron warns of every optional package at import, here and again in each log.
    warnings.filterwarnings("ignore")
    main()
