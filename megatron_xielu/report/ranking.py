"""Which of several runs is best, by which loss, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_xielu.report.description import DATA, SEQUENCE, VOCABULARY, differences, facts
from megatron_xielu.report.run import Run
from megatron_xielu.report.summary import decimal


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
    found = [run.evaluation for run in runs]
    at_end = all(e and e.iteration == run.iterations for e, run in zip(found, runs, strict=True))
    one_loss = at_end and _same(found, "data", "eval_iters", "sequence_length")
    one_text = at_end and found[0] and found[0].bytes and _same(found, "bytes")
    of_training = not apart & {VOCABULARY, DATA, SEQUENCE}
    for title, of, comparable in (
        (
            "the loss of megatron_xielu.evaluate",
            lambda run: run.evaluated_loss,
            one_loss and VOCABULARY not in apart,
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


def _same(evaluations: Sequence[object], *names: str) -> bool:
    return all(
        getattr(one, name) == getattr(evaluations[0], name) for one in evaluations for name in names
    )


def _groups(runs: Sequence[Run]) -> list[tuple[str, list[Run]]]:
    """Runs that differ in their seed alone, with a name for them."""
    found: dict[tuple[object, ...], list[Run]] = {}
    for run in runs:
        alike = tuple((k, v) for k, v in facts(run).items() if k not in ("seed", "made with"))
        found.setdefault((run.label, alike) if alike else (run.name,), []).append(run)
    labels = [members[0].label for members in found.values()]
    named = []
    for members in found.values():
        first = members[0]
        name = first.label if labels.count(first.label) == 1 else first.name
        named.append((name, members))
    return named


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
