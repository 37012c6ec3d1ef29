"""Mean and spread over seeds, and the paired comparison: what is a difference, what is noise.

Two variants with the same seed see the same data in the same order, so their losses are compared
seed by seed: with d the n differences, mean d ± t₀.₉₇₅,ₙ₋₁ · s/√n is the 95 % interval, and
Student's paired t test gives p. Where several variants are compared with one baseline, a chance
difference somewhere becomes likely: the verdict is by Holm's adjusted p (Scandinavian Journal of
Statistics 6, 1979), which bounds the chance of any false difference in the table by 5 %.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LEVEL = 0.05
DIFFERENCE, NOISE, ONE_SEED = "difference", "within noise", "one seed: cannot say"


@dataclass(frozen=True)
class Spread:
    """``sd``: sample standard deviation, None of a single value."""

    mean: float
    sd: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of one value or more."""
        sd = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), sd, len(values))

    def show(self, form: str) -> str:
        """``mean ± sd``, both in the format ``form``."""
        mean = format(self.mean, form)
        return mean if self.sd is None else f"{mean} ± {format(self.sd, form)}"


@dataclass(frozen=True)
class Comparison:
    """A variant minus the baseline, by seed.

    ``interval``: 95 %, of the mean; ``p`` and ``p_holm`` of the paired t test. All three are None
    with one seed.
    """

    variant: str
    baseline: str
    differences: dict[int, float]
    mean: float
    interval: tuple[float, float] | None
    p: float | None
    p_holm: float | None
    verdict: str


def compare(values: Mapping[str, Mapping[int, float]], baseline: str) -> list[Comparison]:
    """Every variant against ``baseline``, over the seeds that both have.

    Args:
        values: by variant and seed.
        baseline: one of the variants.
    """
    pairs = {
        name: {
            seed: value - values[baseline][seed]
            for seed, value in sorted(of_seed.items())
            if seed in values[baseline]
        }
        for name, of_seed in values.items()
        if name != baseline
    }
    pairs = {name: differences for name, differences in pairs.items() if differences}
    tests = {name: _t_test(list(pair.values())) for name, pair in pairs.items()}
    adjusted = holm({name: test[1] for name, test in tests.items() if test})
    found = []
    for name, differences in pairs.items():
        test, p_holm = tests[name], adjusted.get(name)
        verdict = ONE_SEED
        if p_holm is not None:
            verdict = DIFFERENCE if p_holm < LEVEL else NOISE
        mean = statistics.fmean(differences.values())
        interval, p = test if test else (None, None)
        found.append(Comparison(name, baseline, differences, mean, interval, p, p_holm, verdict))
    return found


def table(comparisons: Sequence[Comparison], labels: Mapping[str, str], form: str) -> list[str]:
    """A Markdown table; differences are in the format ``form``."""
    lines = [
        "| | differences by seed | mean | 95 % interval | p | p, Holm | |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in comparisons:
        by_seed = ", ".join(format(value, form) for value in one.differences.values())
        ends = (format(end, form) for end in one.interval or ())
        p, p_holm = ("–" if p is None else f"{p:.3g}" for p in (one.p, one.p_holm))
        lines.append(
            f"| {labels[one.variant]} | {by_seed} | {one.mean:{form}} | {' to '.join(ends) or '–'} "
            f"| {p} | {p_holm} | {one.verdict} |"
        )
    return lines


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down adjustment: the k-th smallest of m times m − k + 1, never falling."""
    adjusted: dict[str, float] = {}
    floor = 0.0
    for rank, name in enumerate(sorted(p, key=lambda name: p[name])):
        floor = max(floor, min(1.0, (len(p) - rank) * p[name]))
        adjusted[name] = floor
    return adjusted


def _t_test(differences: list[float]) -> tuple[tuple[float, float], float] | None:
    """95 % interval of the mean, and p of mean 0; None of a single difference."""
    from scipy.stats import ttest_1samp

    if len(differences) < 2:
        return None
    if statistics.stdev(differences) == 0:  # the same to the bit on every seed: no t
        mean = differences[0]
        return (mean, mean), 0.0 if mean else 1.0
    result = ttest_1samp(differences, 0.0)
    interval = result.confidence_interval(1 - LEVEL)
    assert math.isfinite(result.pvalue)
    return (float(interval.low), float(interval.high)), float(result.pvalue)
