"""Which of several runs is best, by which loss, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_xielu.catalog import ABLATIONS
from megatron_xielu.report.description import (
    ARGUMENTS,
    DATA,
    SEQUENCE,
    VOCABULARY,
    apart,
    differences,
    facts,
    names,
)
from megatron_xielu.report.run import Run
from megatron_xielu.report.settings import real_path, settings
from megatron_xielu.report.summary import MISSING, decimal

FEW = 12  # runs, or groups, that pictures can name one by one
_TOLD = 3  # settings that tell a group apart; of more their number


@dataclass(frozen=True)
class Ranking:
    """``rows``: best first; ``title`` says by what, ``certainty`` how sure it is."""

    title: str
    rows: list[str]
    certainty: str


def rank(runs: Sequence[Run]) -> Ranking | None:
    """The runs in order, those that differ in nothing but their seed as one; None of one run.

    By the seeds that all of these entries have: a difference of seeds is none of trainings.
    """
    if len(runs) < 2:
        return None
    entries = [(name, {_seed(run): run for run in members}) for name, members in groups(runs)]
    shared = set.intersection(*(set(by_seed) for _, by_seed in entries))
    if not shared:
        return _unranked(
            f"There is no seed that all entries have ({_with_seeds(entries)}): train them with the "
            "same seeds."
        )
    kept = [
        (name, [run for seed, run in by_seed.items() if seed in shared])
        for name, by_seed in entries
    ]
    measure = _measure([run for _, members in kept for run in members])
    if measure is None:
        return _unranked(
            "There is no loss that all runs have and that can be compared between them."
        )
    title, of = measure
    ranked = []
    for name, members in kept:
        good = [float(of(run) or 0.0) for run in members if _ended_well(run, of)]
        ranked.append((len(good) < len(members), _mean(good), name, _said(members, good), good))
    ranked.sort(key=lambda entry: entry[:2])  # who diverged comes last
    rows = [f"{name}: {said}" for _, _, name, said, _ in ranked]
    sentences = _certainty(len(shared), [name for *_, name, _, good in ranked if len(good) == 1])
    others = [(name, by_seed.keys() - shared) for name, by_seed in entries]
    if left_out := [(name, seeds) for name, seeds in others if seeds]:
        sentences.append(
            f"Ranked by {_seeds(shared)} alone, which all entries have; left out: "
            f"{_with_seeds(left_out)}."
        )
    return Ranking(f"Best first, by {title}", rows, " ".join(sentences))


def _unranked(why: str) -> Ranking:
    return Ranking("Which is best cannot be said", [], why)


def _seed(run: Run) -> str:
    return facts(run).get("seed", MISSING)


def _seeds(seeds: Collection[str]) -> str:
    if set(seeds) == {MISSING}:
        return "a seed that is not known"
    return (
        f"seed{'s' * (len(seeds) > 1)} {names(sorted(seeds, key=lambda seed: (len(seed), seed)))}"
    )


def _with_seeds(entries: Sequence[tuple[str, Collection[str]]]) -> str:
    parts = [f"{name}: {_seeds(seeds)}" for name, seeds in entries]
    return "; ".join(parts[:FEW] + [f"{len(parts) - FEW} more"] * (len(parts) > FEW))


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


def shown_closely(runs: Sequence[Run]) -> list[Run]:
    """Those with layers to show one by one; of many runs the first of each group, and not all."""
    if len(runs) <= FEW:
        return [run for run in runs if run.alpha_p is not None]
    firsts = (next((run for run in of if run.alpha_p is not None), None) for _, of in groups(runs))
    return [run for run in firsts if run is not None][:FEW]


def groups(runs: Sequence[Run]) -> list[tuple[str, list[Run]]]:
    """Runs that differ in their seed alone, with a name for them; runs of one seed stand alone."""
    alike: dict[str, dict[str, list[Run]]] = {}  # by settings, by seed
    for run in runs:
        of = settings(run)
        key = str(run.folder) if of is None else repr((run.label, sorted(of.items())))
        alike.setdefault(key, {}).setdefault(_seed(run), []).append(run)
    found: list[tuple[list[Run], str]] = []
    for seeds in alike.values():
        if once := [same[0] for same in seeds.values() if len(same) == 1]:
            found.append((once, ""))
        for seed, same in seeds.items():
            if len(same) > 1:
                found += [([run], f"one of {len(same)} runs of seed {seed}") for run in same]
    firsts = [group[0] for group, _ in found]
    return [(_name(group, firsts, said), group) for group, said in found]


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
        return group[0].short
    if len(rivals) == 1:
        return label
    told = []
    for setting in dict.fromkeys(setting for of in rivals for setting in of):
        values = {of.get(setting, MISSING): None for of in rivals}
        if len(values) > 1:
            _, word = ABLATIONS.get(setting, ("", setting))
            told.append(f"{word} {apart(setting, values)[own.get(setting, MISSING)]}")
    if (more := len(told) - _TOLD) > 0:
        told[_TOLD:] = [f"{more} more"]
    told += [said] if said else []
    name = f"{label}, {names([run.short for run in group])}"
    return f"{name} ({'; '.join(told)})" if told else name


def _ended_well(run: Run, of: Callable[[Run], float | None]) -> bool:
    return run.diverged is None and math.isfinite(of(run) or 0.0)


def _said(members: Sequence[Run], good: Sequence[float]) -> str:
    """The losses of those that ended well, and how many did not."""
    bad = len(members) - len(good)
    word = (
        "diverged" if any(run.diverged is not None for run in members) else "without a finite loss"
    )
    if not bad:
        return _spread(good)
    if not good:
        return word if bad == 1 else f"all {bad} seeds {word}"
    return f"{bad} of {len(members)} seeds {word}; the others {_spread(good)}"


def _spread(values: Sequence[float]) -> str:
    mean = decimal(_mean(values), 4)
    if len(values) == 1:
        return mean
    return f"{mean} ± {decimal(float(np.std(values, ddof=1)), 4)} ({len(values)} seeds)"


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.inf


def _certainty(seeds: int, single: Sequence[str]) -> list[str]:
    """How sure the order is, in sentences.

    Args:
        seeds: of each entry.
        single: entries of which one run alone ended well.
    """
    if seeds < 2:
        return [
            "With one run each, whether a difference is more than chance cannot be said; "
            "train with three seeds or more."
        ]
    found = [
        "Mean ± sample standard deviation over the seeds. Differences of about that size may be "
        "chance; tools/compare_activations.py tests them seed by seed."
    ]
    if single:
        found.append(
            f"Of {names(single)} one run alone ended well: whether a difference from others is "
            "more than chance cannot be said."
        )
    return found
