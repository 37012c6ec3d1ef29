"""Which of several runs is best, by which loss, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_xielu.report.description import (
    ARGUMENTS,
    DATA,
    SEQUENCE,
    VOCABULARY,
    differences,
    facts,
    names,
)
from megatron_xielu.report.drawing import shortened
from megatron_xielu.report.run import Run
from megatron_xielu.report.settings import real_path, settings
from megatron_xielu.report.summary import MISSING, decimal

_TOLD = 3  # settings that tell a group apart; of more their number


@dataclass(frozen=True)
class Ranking:
    """``rows``: best first; ``title`` says by what, ``certainty`` how sure it is."""

    title: str
    rows: list[str]
    certainty: str


def rank(runs: Sequence[Run]) -> Ranking | None:
    """The runs in order, those that differ in nothing but their seed as one; None of one run."""
    if len(runs) < 2:
        return None
    measure = _measure(runs)
    if measure is None:
        return Ranking(
            "Which is best cannot be said",
            [],
            "There is no loss that all runs have and that can be compared between them.",
        )
    title, of = measure
    groups = [(name, [_number(of(run)) for run in members]) for name, members in _groups(runs)]
    groups.sort(key=lambda group: _order(_mean(group[1])))
    rows = [f"{name}: {_spread(values)}" for name, values in groups]
    return Ranking(f"Best first, by {title}", rows, _certainty([v for _, v in groups]))


def _measure(runs: Sequence[Run]) -> tuple[str, Callable[[Run], float | None]] | None:
    """The best that all runs have and that means the same in all: a name, and how to get it."""
    apart = differences(runs).keys()
    one_text = _at_end(runs) and _one([run.evaluation and run.evaluation.bytes for run in runs])
    of_training = not apart & {ARGUMENTS, VOCABULARY, DATA, SEQUENCE}
    for title, of, comparable in (
        (
            "the loss of megatron_xielu.evaluate",
            lambda run: run.evaluated_loss,
            evaluated_alike(runs) and not apart & {ARGUMENTS, VOCABULARY},
        ),
        (
            "bits per byte of megatron_xielu.evaluate",
            lambda run: run.bits_per_byte,
            one_text,
        ),
        (
            "the last validation loss during training",
            lambda run: run.final_validation_loss,
            of_training,
        ),
        ("the training loss at the end", lambda run: run.final_train_loss, of_training),
    ):
        if comparable and all(of(run) is not None for run in runs):
            return title, of
    return None


def evaluated_alike(runs: Sequence[Run]) -> bool:
    """Whether ``megatron_xielu.evaluate`` was run at the end of each, and on the same data."""
    return _at_end(runs) and _one([_evaluated_on(run) for run in runs])


def _at_end(runs: Sequence[Run]) -> bool:
    return all(run.evaluation and run.evaluation.iteration == run.iterations for run in runs)


def _one(values: Sequence[object]) -> bool:
    return values[0] is not None and all(value == values[0] for value in values)


def _evaluated_on(run: Run) -> tuple[object, ...] | None:
    of = run.evaluation
    if of is None or not of.data:
        return None
    data = [real_path(path, run.folder) for path in of.data]
    return data, of.eval_iters, of.sequence_length


def _groups(runs: Sequence[Run]) -> list[tuple[str, list[Run]]]:
    """Runs that differ in their seed alone, with a name for them; runs of one seed stand alone."""
    alike: dict[str, dict[str, list[Run]]] = {}  # by settings, by seed
    for run in runs:
        of = settings(run)
        key = str(run.folder) if of is None else repr((run.label, sorted(of.items())))
        alike.setdefault(key, {}).setdefault(facts(run).get("seed", MISSING), []).append(run)
    groups: list[tuple[list[Run], str]] = []
    for seeds in alike.values():
        if once := [same[0] for same in seeds.values() if len(same) == 1]:
            groups.append((once, ""))
        for seed, same in seeds.items():
            if len(same) > 1:
                groups += [([run], f"one of {len(same)} runs of seed {seed}") for run in same]
    firsts = [group[0] for group, _ in groups]
    return [(_name(group, firsts, said), group) for group, said in groups]


def _name(group: Sequence[Run], firsts: Sequence[Run], said: str) -> str:
    """By its activation; where other groups have that, too, by what tells it apart.

    Args:
        group: runs alike.
        firsts: a run of each group.
        said: what else there is to say of it.
    """
    own, label = settings(group[0]), group[0].label
    rivals = [of for run in firsts if run.label == label and (of := settings(run)) is not None]
    if own is None:
        return group[0].name
    if len(rivals) == 1:
        return label
    told = [
        f"{name} {shortened(own.get(name, MISSING))}"
        for name in dict.fromkeys(name for of in rivals for name in of)
        if len({of.get(name) for of in rivals}) > 1
    ]
    if (more := len(told) - _TOLD) > 0:
        told[_TOLD:] = [f"{more} more"]
    told += [said] if said else []
    name = f"{label}, {names([run.name for run in group])}"
    return f"{name} ({'; '.join(told)})" if told else name


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _order(value: float) -> tuple[bool, float]:
    return not math.isfinite(value), value  # a loss that is no number comes last


def _spread(values: Sequence[float]) -> str:
    mean = decimal(_mean(values), 4)
    if len(values) == 1:
        return mean
    with np.errstate(all="ignore"):
        deviation = float(np.std(values, ddof=1))
    return f"{mean} ± {decimal(deviation, 4)} ({len(values)} seeds)"


def _mean(values: Sequence[float]) -> float:
    with np.errstate(all="ignore"):  # of a run that diverged
        return float(np.mean(values))


def _certainty(values: Sequence[Sequence[float]]) -> str:
    if min(map(len, values)) < 2:
        return (
            "With one run each, whether a difference is more than chance cannot be said; "
            "train with three seeds or more."
        )
    return (
        "Mean ± sample standard deviation over the seeds. Differences of about that size may be "
        "chance; tools/compare_activations.py tests them seed by seed."
    )
