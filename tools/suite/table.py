"""The table: rows and tasks, mean and spread over seeds, and what is a difference."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from compare import paired
from compare.paired import Comparison, Spread

from suite.evaluation import Result
from suite.runs import Run
from suite.tasks import USUAL, Task

Results = Mapping[str, Mapping[int, Result]]  # by row and seed; each has every task


def summary(
    results: Results,
    runs: Sequence[Run],
    tasks: Sequence[Task],
    baseline: str,
    notes: Sequence[str],
    context: Mapping[str, str],
) -> tuple[str, dict[str, Any]]:
    """The Markdown, and the same and more for programs.

    Args:
        results: of the runs that could be evaluated.
        runs: all of them.
        tasks: the columns.
        baseline: a row; without results there are no differences.
        notes: what to keep in mind.
        context: what, where and when.
    """
    averages = {
        row: {seed: _average(result, tasks) for seed, result in of_seed.items()}
        for row, of_seed in results.items()
    }
    comparisons = _compare(averages, baseline)
    by_task = {
        task.name: _compare(
            {
                row: {seed: _score(result, task) for seed, result in of_seed.items()}
                for row, of_seed in results.items()
            },
            baseline,
        )
        for task in tasks
    }
    labels = {run.row: run.label for run in runs}
    lines = ["# Zero-shot accuracy", ""]
    lines += [f"- {key}: {value}" for key, value in context.items()]
    lines += ["", *(f"**{note}**\n" for note in notes)]
    several = any(len(of_seed) > 1 for of_seed in results.values())
    spread = ", mean ± sample standard deviation over n seeds" if several else ""
    lines += [f"Percent of the documents{spread}; the average is of the tasks.", ""]
    lines += _table(results, tasks, averages, labels)
    if comparisons:
        lines += ["", *_comparison_lines(comparisons, labels)]
        lines += ["", *_task_lines(by_task, labels)]
    return "\n".join(lines) + "\n", {
        "context": dict(context),
        "notes": list(notes),
        "tasks": {task.name: task.metric for task in tasks},
        "runs": {
            run.name: {
                "folder": str(run.folder),
                "row": run.row,
                "seed": run.seed,
                "tokens": run.tokens,
                **asdict(results[run.row][run.seed]),
                "average": averages[run.row][run.seed],
                "average_stderr": _average_error(results[run.row][run.seed], tasks),
            }
            for run in runs
            if run.seed in results.get(run.row, {})
        },
        "rows": {
            row: {
                "label": labels[row],
                **{task.name: asdict(_of(of_seed, task)) for task in tasks},
                "average": asdict(Spread.of(list(averages[row].values()))),
            }
            for row, of_seed in results.items()
        },
        "baseline": baseline,
        "comparisons": [asdict(comparison) for comparison in comparisons],
        "differences": {
            name: {one.variant: {"mean": one.mean, "interval": one.interval} for one in of}
            for name, of in by_task.items()
        },
    }


def _compare(values: Mapping[str, Mapping[int, float]], baseline: str) -> list[Comparison]:
    return paired.compare(values, baseline) if baseline in values else []


def _table(
    results: Results,
    tasks: Sequence[Task],
    averages: Mapping[str, Mapping[int, float]],
    labels: Mapping[str, str],
) -> list[str]:
    """Rows by activation; the last two say what a number can mean."""
    lines = [
        f"| | n | {' | '.join(f'{task.name} {task.metric}' for task in tasks)} | average |",
        "|---" * (len(tasks) + 3) + "|",
    ]
    for row, of_seed in results.items():
        cells = [_of(of_seed, task).show(".1f") for task in tasks]
        average = Spread.of(list(averages[row].values())).show(".2f")
        lines.append(f"| {labels[row]} | {len(of_seed)} | {' | '.join(cells)} | {average} |")
    every = [result for of_seed in results.values() for result in of_seed.values()]
    errors = [_shown([_error(result, task) for result in every], ".1f") for task in tasks]
    average = _shown([_average_error(result, tasks) for result in every], ".2f")
    lines.append(f"| *standard error of a run* | | {' | '.join(errors)} | {average} |")
    guesses = [USUAL[task.name][1] if task.name in USUAL else None for task in tasks]
    mean = statistics.fmean(g for g in guesses if g is not None) if None not in guesses else None
    cells = [_shown([guess], ".0f") for guess in guesses]
    lines.append(f"| *guessing* | | {' | '.join(cells)} | {_shown([mean], '.2f')} |")
    lines += [
        "",
        "The standard error of a run is lm-eval's, of the documents that happen to be in a task "
        "(here the mean over runs): all runs answer the same ones, so that a difference between "
        "two has a smaller one. Seeds vary the initial weights and the order of the data. A row "
        "near guessing has learned nothing of a task, and its differences there mean nothing.",
    ]
    return lines


def _comparison_lines(comparisons: Sequence[Comparison], labels: Mapping[str, str]) -> list[str]:
    baseline = labels[comparisons[0].baseline]
    return [
        f"The average, paired with {baseline} by seed, in points of a percent; positive is better.",
        "",
        *paired.table(comparisons, labels, "+.2f"),
        "",
        "Student's paired t; the verdict is by Holm's adjusted p below 0.05 (docs/compare.md). "
        "“Within noise” does not say that two are equal.",
    ]


def _task_lines(
    by_task: Mapping[str, Sequence[Comparison]], labels: Mapping[str, str]
) -> list[str]:
    """By task, without verdicts."""
    lines = [
        "By task, the mean of the differences and its 95 % interval; some of so many miss 0 by "
        "chance, so that they are no verdicts:",
        "",
        f"| | {' | '.join(by_task)} |",
        "|---" * (len(by_task) + 1) + "|",
    ]
    for of_row in zip(*by_task.values(), strict=True):
        cells = [
            f"{one.mean:+.1f}"
            + (" ({:+.1f} to {:+.1f})".format(*one.interval) if one.interval else "")
            for one in of_row
        ]
        lines.append(f"| {labels[of_row[0].variant]} | {' | '.join(cells)} |")
    return lines


def _of(of_seed: Mapping[int, Result], task: Task) -> Spread:
    return Spread.of([_score(result, task) for result in of_seed.values()])


def _score(result: Result, task: Task) -> float:
    return 100 * result.scores[task.name].metrics[task.metric]


def _error(result: Result, task: Task) -> float | None:
    error = result.scores[task.name].metrics.get(f"{task.metric}_stderr")
    return None if error is None else 100 * error


def _average(result: Result, tasks: Sequence[Task]) -> float:
    return statistics.fmean(_score(result, task) for task in tasks)


def _average_error(result: Result, tasks: Sequence[Task]) -> float | None:
    """Of tasks that have no documents in common."""
    errors = [_error(result, task) for task in tasks]
    known = [error for error in errors if error is not None]
    return math.hypot(*known) / len(known) if len(known) == len(errors) else None


def _shown(values: Sequence[float | None], form: str) -> str:
    """Their mean."""
    known = [value for value in values if value is not None]
    return format(statistics.fmean(known), form) if len(known) == len(values) else "–"
