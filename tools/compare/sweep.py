"""``--lr-sweep``: each variant at its own learning rate, best of k at equal cost.

Every variant is trained once at each rate, with a seed that is not compared: the choice would
flatter one that is. The rate of the lowest held-out loss then trains all seeds. A training whose
loss becomes NaN or Inf has lost.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from compare.equal_cost import Cost
from compare.records import Record
from compare.runs import Machine, Run, do_run, finished_records, plan_runs
from compare.settings import Settings
from compare.text import Text
from compare.training import Diverged
from compare.variants import Variant
from megatron_xielu.catalog import NUMBERS
from megatron_xielu.checkpoints.folder import complete_checkpoints
from megatron_xielu.checkpoints.source import Refused
from megatron_xielu.common import files

SEED = 41


@dataclass(frozen=True)
class Sweep:
    """Held-out losses by variant and rate; None where the training diverged."""

    losses: dict[str, dict[float, float | None]]
    cost: str

    def best(self, variant: str) -> float:
        """The rate of the lowest loss.

        Raises:
            SystemExit: there is none.
        """
        found = {loss: rate for rate, loss in self.losses[variant].items() if loss is not None}
        if not found:
            raise SystemExit(
                f"compare: {variant} diverged at every rate of --lr-sweep; give lower ones, and "
                "another folder with --out"
            )
        return found[min(found)]

    def notes(self, labels: Mapping[str, str]) -> tuple[str, ...]:
        """What to keep in mind: the rates, best ones at an edge, and trainings that diverged."""
        count = len(next(iter(self.losses.values())))
        notes = [f"The learning rate of each is the best of {count}, by one run with seed {SEED}."]
        rates = next(iter(self.losses.values()))
        for edge, what in ((min(rates), "lowest"), (max(rates), "highest")):
            if at_it := [labels[name] for name in self.losses if self.best(name) == edge]:
                notes.append(
                    f"The best learning rate of {', '.join(at_it)} is the {what} of the sweep, "
                    f"{edge:g}: one beyond it may be better."
                )
        for name, losses in self.losses.items():
            diverged = ", ".join(f"{rate:g}" for rate, loss in losses.items() if loss is None)
            if diverged:
                notes.append(f"{labels[name]} diverged at the learning rate {diverged}.")
        return tuple(notes)

    def markdown(self, labels: Mapping[str, str], unit: str) -> list[str]:
        """A table of loss by rate."""
        rates = list(next(iter(self.losses.values())))
        lines = [
            f"Held-out loss in nats per {unit} by learning rate, of one run at each with seed "
            f"{SEED}; the seeds above are trained at the best.",
            "",
            "| | " + " | ".join(f"{rate:g}" for rate in rates) + " | best |",
            "|---" * (len(rates) + 2) + "|",
        ]
        for name, losses in self.losses.items():
            cells = ["diverged" if loss is None else f"{loss:.4f}" for loss in losses.values()]
            lines.append(f"| {labels[name]} | {' | '.join(cells)} | {self.best(name):g} |")
        return lines


def parse_rates(value: str) -> list[float]:
    """Two rates or more, in order.

    Raises:
        argparse.ArgumentTypeError: they are none.
    """
    try:
        rates = sorted(float(word) for word in value.split(","))
    except ValueError:
        rates = []
    limits = NUMBERS["--lr"]
    if len(rates) < 2 or any(limits.fault(rate) or not rate for rate in rates):
        raise argparse.ArgumentTypeError(
            f"{value[:40]!r} is not two or more learning rates above 0: 1e-3,2e-3,4e-3"
        )
    if len(set(rates)) < len(rates):
        raise argparse.ArgumentTypeError(f"{value[:40]} has a rate twice")
    return rates


def cost(
    rates: Sequence[float],
    variants: Sequence[Variant],
    settings: Settings,
    costs: Mapping[str, Cost],
    unit: str,
) -> str:
    """What the sweep takes, beside the runs that are compared."""
    tokens = len(rates) * settings.iterations * settings.tokens_per_iteration
    flops = sum(costs[variant.name].flops for variant in variants) * tokens
    return (
        f"{len(rates) * len(variants)} runs with seed {SEED}, at "
        f"{', '.join(f'{rate:g}' for rate in rates)}: {tokens * len(variants):,} {unit}s, "
        f"{flops:.3g} FLOPs, beside the compared runs"
    )


def train_all(
    options: argparse.Namespace,
    out: Path,
    settings: Settings,
    machine: Machine,
    text: Text,
    lock: int,
    cost: str,
) -> Sweep:
    """Train each variant once at every rate, in ``out/sweep/RATE``; see `cost` for the last."""
    losses: dict[str, dict[float, float | None]] = {one.name: {} for one in options.variants}
    once = argparse.Namespace(**{**vars(options), "seeds": [SEED]})
    for rate in options.lr_sweep:
        at, folder = replace(settings, learning_rate=rate), out / "sweep" / repr(rate)
        for run in plan_runs(once, folder, at, machine, text):
            name, diverged = run.variant.name, run.folder / "diverged.txt"
            try:
                if not diverged.exists():
                    do_run(run, f"[learning rate {rate:g}]", at, machine, lock)
            except Diverged as error:
                files.write(diverged, f"{error}\n")
                print(f"{run.label} diverged at the learning rate {rate:g}", flush=True)
            found = finished_records(folder, [run.variant], once.seeds).get(name)
            losses[name][rate] = found[SEED].valid_loss if found else None
    return Sweep(losses, cost)


def check_rates(
    runs: Sequence[Run], finished: Mapping[str, Mapping[int, Record]], own: Mapping[str, Settings]
) -> None:
    """Refuse runs that another choice has trained: on a GPU a sweep that is repeated may differ.

    Args:
        runs: those that are compared.
        finished: their records, by variant and seed; of the others a checkpoint says the rate.
        own: settings by variant.

    Raises:
        SystemExit: there is one; names its folder and both rates.
    """
    for run in runs:
        record, best = finished.get(run.variant.name, {}).get(run.seed), own[run.variant.name]
        rate = record.learning_rate if record else _rate_of_checkpoint(run.folder)
        if rate not in (None, best.learning_rate):
            raise SystemExit(
                f"compare: {run.folder} was trained at the learning rate {rate:g}, and the sweep "
                f"now has {best.learning_rate:g} as the best; delete it, and the same command "
                "makes it again"
            )


def _rate_of_checkpoint(folder: Path) -> float | None:
    """Of the last one of a run; None where there is none that can be read."""
    from megatron_xielu.checkpoints.torch_dist import TorchDist  # needs PyTorch

    checkpoints = list(complete_checkpoints(folder / "checkpoints").values())
    try:
        rate = getattr(TorchDist(checkpoints[-1]).arguments, "lr", None)
    except (IndexError, OSError, Refused):
        return None
    return rate if isinstance(rate, float) else None
