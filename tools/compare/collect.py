"""Finished trainings, wherever they ran, as one comparison: tables, pictures and a page.

    tools/compare_activations.py collect runs/paper-1b/*/seed_* --out runs/paper-1b/results

reads run folders of examples/pretrain.sh and of local comparisons as `megatron_xielu.report` does.
Runs that differ in nothing but their seed are one variant, and labels say in what variants differ.
Other data, schedules or costs are refused, and so is what has not come to its end. What a run does
not tell is left out.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from compare import equal_cost, results, variants
from compare.equal_cost import Cost
from compare.page import write_page
from compare.records import ALPHA_POINTS, MEMORY, Record, Records, read_input_std
from compare.variants import Variant
from megatron_xielu.catalog import ACTIVATIONS, INPUTS_TAG, SETTINGS
from megatron_xielu.checkpoints.alphas import Alphas, beta
from megatron_xielu.common import files, schema
from megatron_xielu.common.schema import Malformed
from megatron_xielu.common.text import is_utf8, one_line
from megatron_xielu.report import description
from megatron_xielu.report.errors import NoReport
from megatron_xielu.report.events import Curve, Series
from megatron_xielu.report.experts import has_experts
from megatron_xielu.report.load import load_all
from megatron_xielu.report.ranking import evaluated_alike
from megatron_xielu.report.run import Run, readable
from megatron_xielu.report.settings import settings

_COMMAND = "tools/compare_activations.py collect"
_PICTURES = ("loss.png", "differences.png", "alphas.png", "depth.png")
_TINY = 10_000_000  # parameters; the paper's smaller model has 1.1B
_TOLD = 3  # settings in a label; of more their number

# What all runs share, beside what `description.differences` compares.
_SCHEDULE = re.compile(
    "lr_.*|min_lr|train_(iters|samples)|rampup_batch_size|step_batch_size_schedule"
)
# The samples of the last validation depend on how many came before.
_VALIDATION = re.compile(
    "eval_(iters|interval|global_batch_size)|start_eval_at_iter|full_validation|"
    "multiple_validation_sets"
)
# What comes with an activation tells variants of that one apart, and no others.
_OF_ACTIVATION = re.compile(
    r"xielu.*|xiprelu|swiglu|squared_relu|quick_geglu|openai_gelu|spec|use_te_activation_func|"
    r"ffn_hidden_size|bias_\w+_fusion|glu_linear_offset|activation_func_.*"
)


class Refused(ValueError):
    """One line: which runs, or which flag, and what is wrong."""


@dataclass(frozen=True)
class Group:
    """The runs of a variant by seed; ``settings`` are those that they share."""

    variant: Variant
    runs: dict[int, Run]
    settings: dict[str, str]


def main(argv: Sequence[str]) -> None:
    """Read all runs, refuse what cannot be compared, and write the results.

    Raises:
        SystemExit: 2, something is wrong; with what.
    """
    options = _parser().parse_args(argv)
    try:
        _check_out(options.out)
        runs = load_all(options.runs)
        found = comparison(runs, options.baseline, f"{_COMMAND} {readable(shlex.join(argv))}")
        shown = results.write(options.out, *found)
        for name in _PICTURES:
            if name not in shown:  # it is of an older collection
                (options.out / name).unlink(missing_ok=True)
    except (Refused, NoReport, OSError) as error:
        print(f"compare: error: {one_line(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    print(results.for_terminal(shown))
    for run in runs:
        for note in run.notes:
            print(f"note: {run.name}: {note}", file=sys.stderr)
    *_, setup = found
    folders = [run.folder for run in runs]
    if page := write_page(folders, options.out / "report", setup.notes, runs):
        print(f"{page}: every run, in pictures")
    print(f"{options.out / 'results.md'}: the comparison; its pictures lie beside it")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_COMMAND, description=__doc__.splitlines()[0], epilog="docs/compare.md says more."
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="folder of a finished run: of examples/pretrain.sh, or OUT/VARIANT/seed_N",
    )
    parser.add_argument(
        "--baseline",
        metavar="NAME",
        help="variant that the others are compared with [swiglu, else the first]",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/collected"),
        metavar="FOLDER",
        help="for the results [runs/collected]",
    )
    return parser


def _check_out(out: Path) -> None:
    """Make it; what would be replaced in it was collected."""
    if not is_utf8(str(out)):
        raise Refused(f"--out {str(out)!a} is not UTF-8")
    try:
        files.make_folder(out)
    except OSError as error:
        raise Refused(f"--out {out} cannot be written to: {error.strerror}") from None
    there = [
        name for name in ("results.md", "results.json", *_PICTURES) if os.path.lexists(out / name)
    ]
    if there and not _collected(out / "results.json"):
        raise Refused(
            f"--out {out}: {there[0]} there was not made by collect, and would be replaced; move "
            "it away, or name another folder"
        )


def _collected(path: Path) -> bool:
    try:
        return schema.read_json(path)["context"]["command"].startswith(_COMMAND)
    except (OSError, Malformed, LookupError, TypeError, AttributeError):
        return False


def comparison(
    runs: Sequence[Run], baseline: str | None, command: str
) -> tuple[Records, list[Variant], dict[str, Cost], results.Setup]:
    """What `results.write` takes.

    Args:
        runs: with names.
        baseline: a variant; None for SwiGLU, or else the first.
        command: that began it.

    Raises:
        Refused: they cannot be compared.
    """
    _check_finished(runs)
    evaluated = evaluated_alike(runs) and None not in [run.evaluated_loss for run in runs]
    _check_alike(runs, validated=not evaluated)
    groups = group(runs)
    swiglu = [name for name, of in groups.items() if of.variant.activation.argument == "swiglu"]
    baseline = baseline or (swiglu if len(swiglu) == 1 else [*groups])[0]
    if baseline not in groups:
        known = ", ".join(groups)
        raise Refused(f"--baseline {baseline}: not among what is compared, {known}")
    costs = _costs(groups, baseline)
    records = {
        name: {seed: _record(run, name, evaluated=evaluated) for seed, run in of.runs.items()}
        for name, of in groups.items()
    }
    setup = _setup(groups, records, baseline, command, evaluated=evaluated)
    return records, [of.variant for of in groups.values()], costs, setup


def _check_finished(runs: Sequence[Run]) -> None:
    for run in runs:
        if getattr(run.arguments, "seed", None) is None:
            raise Refused(
                f"{run.folder}: its arguments are not known, neither from a checkpoint nor from "
                "event files; copy either there"
            )
        if run.train is None:
            raise Refused(
                f"{run.folder} has no training loss in event files (in tensorboard/ or events/); "
                "copy them there"
            )
    unfinished = [
        f"{run.name} is at iteration {_end(run):,} of {run.planned_iterations:,}"
        for run in runs
        if _end(run) < (run.planned_iterations or 0)
    ]
    if unfinished:
        raise Refused(f"not finished, or event files are missing: {'; '.join(unfinished)}")
    if apart := _apart(runs, [f"{run.train.steps[-1]:,}" for run in runs]):
        if lengths := _apart(runs, [str(run.planned_iterations) for run in runs]):
            raise Refused(f"the runs differ in --train-iters ({lengths}): name those of one length")
        raise Refused(f"the last iterations that were logged differ ({apart}): see --log-interval")


def _end(run: Run) -> int:
    """The last iteration; that of the last training loss may lie before it (--log-interval)."""
    return max([run.iterations, *(int(series.steps[-1]) for series in run.validation.values())])


def _check_alike(runs: Sequence[Run], *, validated: bool) -> None:
    """Refuse runs that differ in what their losses depend on, but for what variants are.

    Args:
        runs: with arguments.
        validated: the losses to compare are those of the validation during training.
    """
    for line in description.differences(runs).values():
        raise Refused(line)
    for name in sorted({name for run in runs for name in vars(run.arguments)}):
        counts = _SCHEDULE.fullmatch(name) or (validated and _VALIDATION.fullmatch(name))
        texts = [str(getattr(run.arguments, name, None)) for run in runs]
        if counts and (apart := _apart(runs, texts)):
            raise Refused(f"the runs differ in --{name.replace('_', '-')} ({apart})")


def _apart(runs: Sequence[Run], texts: Sequence[str]) -> str:
    """Which runs have which text; nothing where all have one."""
    if len(set(texts)) == 1:
        return ""
    by_text: dict[str, list[str]] = {}
    for run, text in zip(runs, texts, strict=True):
        by_text.setdefault(text, []).append(run.name)
    return "; ".join(f"{description.names(of)}: {text}" for text, of in by_text.items())


def group(runs: Sequence[Run]) -> dict[str, Group]:
    """Runs that differ in nothing but their seed, by the name of their variant.

    That is the name of their folder where they lie as comparisons have them
    (``xielu-frozen/seed_42``), else their activation and what they have of their own.

    Raises:
        Refused: a variant has a seed twice.
    """
    alike: dict[str, tuple[dict[str, str], list[Run]]] = {}
    for run in runs:
        # Of an older version that has no such flag, False is not said.
        of = {name: text for name, text in settings(run).items() if text != "False"}
        key = repr((run.activation, sorted(of.items())))
        alike.setdefault(key, (of, []))[1].append(run)
    kinds = [(of[0].activation, shared) for shared, of in alike.values()]
    groups: dict[str, Group] = {}
    for shared, its_runs in alike.values():
        told = _told(its_runs[0].activation, shared, kinds)
        made = "-".join([its_runs[0].activation, *(name for name, _ in told)])
        candidates = (_folder_name(its_runs), made, f"{made}-{len(groups)}")
        name = next(name for name in candidates if name and name not in groups)
        said = [said for _, said in told]
        if (more := len(told) - _TOLD) > 0:
            said[_TOLD:] = [f"{more} more"]
        activation = ACTIVATIONS[its_runs[0].activation]
        label = ", ".join([activation.label, *said])
        if label in [of.variant.label for of in groups.values()]:
            label += f" ({name})"
        variant = Variant(name, label, activation, (), beta=beta(its_runs[0].arguments))
        groups[name] = Group(variant, _by_seed(name, its_runs), shared)
    return groups


def _by_seed(name: str, runs: Sequence[Run]) -> dict[int, Run]:
    found: dict[int, Run] = {}
    for run in runs:
        if (other := found.setdefault(run.arguments.seed, run)) is not run:
            raise Refused(f"{name} has seed {run.arguments.seed} twice: {other.name}, {run.name}")
    return found


def _folder_name(runs: Sequence[Run]) -> str:
    paths = [run.folder.resolve() for run in runs]
    name, *others = {path.parent.name for path in paths}
    are_seeds = all(re.fullmatch("seed_[0-9]+", path.name) for path in paths)
    is_one = not others and re.fullmatch(rf"{runs[0].activation}(-[\w.-]+)?", name)
    return name if are_seeds and is_one else ""


def _told(
    activation: str, own: dict[str, str], kinds: Sequence[tuple[str, dict[str, str]]]
) -> list[tuple[str, str]]:
    """What of a variant's settings is no default of its activation, or differs from others'.

    Args:
        activation: of the variant.
        own: its settings.
        kinds: activation and settings of every variant.

    Returns:
        Each as in a name, and as in a label.
    """
    told = []
    for name, value in sorted(own.items()):
        comes_with_it = _OF_ACTIVATION.fullmatch(name)
        values = {of.get(name) for key, of in kinds if key == activation or not comes_with_it}
        differs = len(values) > 1 and value != str(SETTINGS.get(name))
        if differs or variants.is_change(name, value):
            told.append(variants.told(name, value))
    return told


def _costs(groups: Mapping[str, Group], baseline: str) -> dict[str, Cost]:
    costs = {}
    for name, of in groups.items():
        run = next(iter(of.runs.values()))
        if run.model is None:
            raise Refused(f"{run.name}: whether costs are equal is not known; {run.notes[-1]}")
        costs[name] = Cost(run.model)
    unequal = [
        f"{name} ({description.names([run.name for run in groups[name].runs.values()])}) has "
        f"{' and '.join(problems)}, and --ffn-hidden-size "
        f"{costs[name].ffn_matching(costs[baseline])} would match"
        for name, problems in equal_cost.differences(costs, baseline).items()
    ]
    if unequal:
        allowed = f"{100 * equal_cost.TOLERANCE:g} % at most is allowed"
        raise Refused(f"not at equal cost, {allowed}: {'; '.join(unequal)}")
    return costs


def _record(run: Run, name: str, *, evaluated: bool) -> Record:
    end, train = _end(run), _losses(run.train)
    valid = _losses(next(iter(run.validation.values()), None))
    if evaluated:
        valid = [(end, run.evaluation.loss)]
    if end not in dict(valid) or run.train.steps[-1] not in dict(train):
        raise Refused(
            f"{run.name} has no loss that is a number after its last iteration, {end:,}: it "
            "diverged, or was not validated (--eval-iters 0); leave it out, or have "
            "megatron_xielu.evaluate evaluate all runs on the same data"
        )
    seconds, memory = (run.scalars.get(tag) for tag in ("iteration-time", MEMORY))
    step = np.median(seconds.values) if seconds else 0
    peak = memory.values.max() if memory else 0
    return Record(
        variant=name,
        seed=run.arguments.seed,
        parameters=run.parameters or 0,
        tokens=int(run.total_tokens or 0),
        step_seconds=float(step) if step > 0 else None,
        tokens_per_second=run.tokens_per_second if step > 0 else None,
        memory=float(peak) if peak > 0 else None,
        memory_of="GPU, allocated",
        train=train,
        valid=valid,
        alphas=_alphas(run),
        input_std=read_input_std(
            {tag: _losses(of) for tag, of in run.scalars.items() if tag.startswith(INPUTS_TAG)}
        ),
    )


def _losses(series: Series | None) -> Curve:
    """Those that are numbers."""
    if series is None:
        return []
    good = np.isfinite(series.values)
    return list(zip(series.steps[good].tolist(), series.values[good].tolist(), strict=True))


def _alphas(run: Run) -> Alphas | None:
    """At iterations that all runs share, which event files need not have: between two of theirs.

    None of a model with experts, which has other than one pair a layer.
    """
    p, n, end = run.alpha_p, run.alpha_n, run.train.steps[-1]
    if p is None or p.iterations[-1] < end or has_experts(run.alpha_names):
        return None
    at = np.unique(np.linspace(0, end, ALPHA_POINTS + 1).round().astype(np.int64))
    at = at[at >= p.iterations[0]]
    by_layer = ([np.interp(at, of.iterations, row) for row in of.values.T] for of in (p, n))
    return Alphas(at.tolist(), *(np.stack(rows, axis=1).tolist() for rows in by_layer))


def _setup(
    groups: Mapping[str, Group],
    records: Records,
    baseline: str,
    command: str,
    *,
    evaluated: bool,
) -> results.Setup:
    runs = [run for of in groups.values() for run in of.runs.values()]
    on_gpu = all(getattr(run.arguments, "distributed_backend", "") != "gloo" for run in runs)
    notes = results.caveats(
        tiny=max(run.parameters or 0 for run in runs) < _TINY,
        on_gpu=on_gpu,
        seeds=max(len(of.runs) for of in groups.values()),
    )
    notes += results.other_regime(records)
    for what in ("layout", "made with"):
        if apart := _apart(runs, [description.facts(run).get(what, "") for run in runs]):
            notes += (f"The runs differ in {what} ({apart}): their times and memory may, too.",)
    unpaired = [
        f"{one} {', '.join(map(str, sorted(alone)))} ({other} has none)"
        for name in groups
        for one, other in ((name, baseline), (baseline, name))
        if (alone := groups[one].runs.keys() - groups[other].runs.keys())
    ]
    if unpaired:
        said = "; ".join(unpaired)
        notes += (f"Seeds without a partner count in means, and are not paired: {said}.",)
    loss = "of the last validation during training"
    if evaluated:
        loss = f"of megatron_xielu.evaluate on {' '.join(runs[0].evaluation.data)}"
    facts = description.alike(runs)
    facts.pop("seed", None)
    ranks = sorted({str(getattr(run.arguments, "world_size", None)) for run in runs})
    shared = set.intersection(*(set(of.settings.items()) for of in groups.values()))
    return results.Setup(
        preset=f"{len(runs)} collected runs",
        unit="token",
        baseline=baseline,
        notes=notes,
        context={
            "command": command,
            "date": time.strftime("%Y-%m-%d"),
            "device": f"{' or '.join(ranks)} {'GPUs' if on_gpu else 'processes on CPUs'} a run",
            "run": f"{_end(runs[0]):,} iterations, {runs[0].total_tokens or 0:,.0f} tokens, "
            f"{runs[0].total_flops or 0:.3g} FLOPs",
            "held-out loss": loss,
            **facts,
        },
        settings={
            "arguments": dict(sorted(shared)),
            "runs": {
                name: {str(seed): readable(run.folder) for seed, run in of.runs.items()}
                for name, of in groups.items()
            },
        },
    )
