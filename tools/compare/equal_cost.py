"""Parameters and FLOPs of every variant, and the refusal to compare where they are not equal.

Both are those of ``python -m megatron_xielu.plan``, computed from the command line that trains.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from megatron_xielu.common.text import table as aligned
from megatron_xielu.plan import flags as plan_flags
from megatron_xielu.plan.model import Model

TOLERANCE = 0.001


@dataclass(frozen=True)
class Cost:
    """Of one variant: ``parameters`` of the model, ``flops`` of training on a token."""

    model: Model

    @property
    def parameters(self) -> int:
        """All of the model, alphas included."""
        return self.model.parameters()

    @property
    def flops(self) -> int:
        """Forward and backward."""
        return self.model.flops_per_token()

    def ffn_matching(self, other: Cost) -> int:
        """The ffn width with which this model has as many parameters as ``other``."""
        slope = replace(self.model, ffn=self.model.ffn + 1).parameters() - self.parameters
        return self.model.ffn + round((other.parameters - self.parameters) / slope)


def costs(flags: Mapping[str, list[str]]) -> dict[str, Cost]:
    """Costs by variant, from Megatron's flags by variant."""
    return {name: Cost(Model.of(plan_flags.parse(words))) for name, words in flags.items()}


def check(found: Mapping[str, Cost], baseline: str) -> None:
    """Refuse a comparison at unequal cost.

    Raises:
        SystemExit: it is; names the variants, and the widths that would match.
    """
    if unequal := differences(found, baseline):
        lines = [f"compare: not at equal cost, {100 * TOLERANCE:g} % at most is allowed:"]
        for name, problems in unequal.items():
            width = found[name].ffn_matching(found[baseline])
            lines += [f"  {name} has {problem}" for problem in problems]
            lines.append(f"  --ffn {name}={width} would match (now {found[name].model.ffn})")
        raise SystemExit("\n".join(lines))


def differences(found: Mapping[str, Cost], baseline: str) -> dict[str, list[str]]:
    """What is further from the baseline's than `TOLERANCE`, by variant."""
    wanted, unequal = found[baseline], {}
    for name, cost in found.items():
        problems = [
            f"{here:,} {what}, {100 * (here / there - 1):+.2f} % of {baseline}'s {there:,}"
            for what, here, there in (
                ("parameters", cost.parameters, wanted.parameters),
                ("FLOPs per token", cost.flops, wanted.flops),
            )
            if abs(here / there - 1) > TOLERANCE
        ]
        if problems:
            unequal[name] = problems
    return unequal


def table(found: Mapping[str, Cost], labels: Mapping[str, str], baseline: str) -> str:
    """The costs for the terminal."""
    wanted = found[baseline]
    rows = [("", "ffn", "parameters", "", "FLOPs per token", "")]
    for name, cost in found.items():
        parameters = 100 * (cost.parameters / wanted.parameters - 1)
        flops = 100 * (cost.flops / wanted.flops - 1)
        rows.append(
            (
                labels[name],
                f"{cost.model.ffn:,}",
                f"{cost.parameters:,}",
                f"{parameters:+.4f}%",
                f"{cost.flops:,}",
                f"{flops:+.4f}%",
            )
        )
    return aligned(rows)
