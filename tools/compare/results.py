"""The results of a comparison: tables for the terminal and Markdown, ``results.json``, pictures.

What is written is small enough to be committed: ``results.md``, ``results.json``, ``loss.png``,
``differences.png``, ``alphas.png`` and ``depth.png``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compare import paired
from compare.equal_cost import Cost
from compare.paired import Comparison, Spread
from compare.records import Record, Records, with_alphas
from compare.settings import PAPER_INPUT_STD
from compare.sweep import Sweep
from compare.text import write_json
from compare.variants import Variant
from megatron_xielu.common import files, text

if TYPE_CHECKING:
    from megatron_xielu.report.depth import Adaptation

_QUICK_NOTE = (
    "The preset quick exercises the pipeline: these losses, and differences between them, mean "
    "nothing."
)
_TINY_NOTE = (
    "These are tiny models on very little text, far from the paper's 1.1B parameters and 125B "
    "tokens: they show that each activation trains, and are no evidence for or against the paper's "
    "claim."
)
_ONE_RATE_NOTE = "The learning rate is the same for all and tuned for none (--lr-sweep)."
_CPU_NOTE = (
    "Times and memory are of a CPU and say nothing of GPUs: in Megatron's CPU mode xIELU and "
    "xIPReLU are several PyTorch operations each, and none of this package's kernels runs."
)
_ONE_SEED_NOTE = "One seed shows no noise: whether a difference is one cannot be said; three can."
_FAR = 1.5  # times the paper's inputs, or less than 1/1.5 of them: another regime


@dataclass(frozen=True)
class Setup:
    """What a comparison was: for the captions, and to do it again.

    ``unit`` is what a token is; ``context`` lines say what, where and when.
    """

    preset: str
    unit: str
    baseline: str
    notes: tuple[str, ...]
    context: dict[str, str]
    settings: dict[str, Any]
    sweep: Sweep | None = None

    @property
    def caption(self) -> str:
        """Under every picture's title."""
        return f"{self.preset}, {self.context['device']}, {self.context['date']}"


def other_regime(records: Records) -> tuple[str, ...]:
    """A note where activations start with inputs of another size than in the paper, else none."""
    measured = [
        record.input_std
        for of_seed in records.values()
        for record in of_seed.values()
        if record.input_std
    ]
    means = [sum(layers) / len(layers) for layers in measured]
    apart = max(means, key=lambda mean: abs(math.log(mean / PAPER_INPUT_STD)), default=None)
    if apart is None or 1 / _FAR < apart / PAPER_INPUT_STD < _FAR:
        return ()
    return (
        f"Inputs of an activation start with a standard deviation of {apart:.2f}, and in the "
        f"paper's 1.1B with {PAPER_INPUT_STD:.2f}: this compares another part of the functions.",
    )


def caveats(
    *, tiny: bool, on_gpu: bool, seeds: int, swept: bool = True, quick: bool = False
) -> tuple[str, ...]:
    """What to keep in mind with the results: in the terminal, in results.md and on the page."""
    notes = [
        (_QUICK_NOTE, quick),
        (_TINY_NOTE, tiny),
        (_ONE_RATE_NOTE, not swept),
        (_CPU_NOTE, not on_gpu),
        (_ONE_SEED_NOTE, seeds == 1),
    ]
    return tuple(note for note, holds in notes if holds)


def write(
    out: Path,
    records: Records,
    variants: Sequence[Variant],
    costs: Mapping[str, Cost],
    setup: Setup,
) -> str:
    """Write everything to ``out``; returns the Markdown.

    Args:
        out: a folder, made if it is missing.
        records: by variant and seed; a variant with no record is left out.
        variants: in the order to show them.
        costs: by variant.
        setup: what to say of it.
    """
    from compare import plots  # not before: the paper's presets print commands, and draw nothing

    out.mkdir(parents=True, exist_ok=True)
    variants = [variant for variant in variants if records.get(variant.name)]
    comparisons = _compare(records, setup.baseline)
    adapted = adaptations(records, variants)
    found = (records, variants, costs, comparisons, adapted, setup)
    shown = markdown(*found)
    write_json(out / "results.json", _json(*found))
    plots.plot_losses(records, variants, out / "loss.png", caption=setup.caption, unit=setup.unit)
    if comparisons:
        plots.plot_differences(
            comparisons,
            variants,
            out / "differences.png",
            caption=setup.caption,
            unit=setup.unit,
        )
    if setup.sweep:
        plots.plot_sweep(
            setup.sweep, variants, out / "sweep.png", caption=setup.caption, unit=setup.unit
        )
    if with_alphas(records, variants):
        plots.plot_alphas(records, variants, out / "alphas.png", caption=setup.caption)
    if adapted:
        plots.plot_depth(adapted, out / "depth.png", caption=setup.caption)
    files.write(out / "results.md", shown)
    return shown


def for_terminal(markdown: str) -> str:
    """The report of `markdown` as plain text: its tables in columns, without its pictures."""
    lines: list[str] = []
    rows: list[list[str]] = []
    for line in [*markdown.splitlines(), ""]:
        if line.startswith("|"):
            if line.strip("|-"):
                rows.append([cell.strip() for cell in line.strip("|").split("|")])
            continue
        if rows:
            lines.append(text.table(rows, left=(0,)))
            rows = []
        if line.startswith("![") or (not line and lines[-1:] == [""]):
            continue
        lines.append(line.removeprefix("# ").replace("**", ""))
    return "\n".join(lines)


def _compare(records: Records, baseline: str) -> list[Comparison]:
    if not records.get(baseline):
        return []
    losses = {
        name: {seed: record.valid_loss for seed, record in of_seed.items()}
        for name, of_seed in records.items()
        if of_seed
    }
    return paired.compare(losses, baseline)


def spreads(records: Records, name: str) -> dict[str, Spread]:
    """Of every quantity that is reported, over the seeds of a variant, and known of all."""
    found = list(records[name].values())
    values: dict[str, list[float | None]] = {
        "validation_loss": [record.valid_loss for record in found],
        "perplexity": [record.perplexity for record in found],
        "step_seconds": [record.step_seconds for record in found],
        "tokens_per_second": [record.tokens_per_second for record in found],
        "memory_bytes": [record.memory for record in found],
    }
    return {
        quantity: Spread.of([one for one in each if one is not None])
        for quantity, each in values.items()
        if None not in each
    }


def markdown(
    records: Records,
    variants: Sequence[Variant],
    costs: Mapping[str, Cost],
    comparisons: Sequence[Comparison],
    adapted: Sequence[Adaptation],
    setup: Setup,
) -> str:
    """The report, for people."""
    labels = {variant.name: variant.label for variant in variants}
    seeds = sorted({seed for of_seed in records.values() for seed in of_seed})
    several = len(seeds) > 1
    lines = [f"# Activations at equal cost: {setup.preset}", ""]
    lines += [f"- {key}: {value}" for key, value in setup.context.items()]
    lines += [f"- seeds: {', '.join(map(str, seeds))}", ""]
    lines += [f"**{note}**\n" for note in setup.notes]
    spread = ", mean ± sample standard deviation over n seeds" if several else ""
    found = {variant.name: spreads(records, variant.name) for variant in variants}
    known = {quantity for of in found.values() for quantity in of}
    columns = [column for column in _columns(setup.unit) if column[1] in known]
    said = f"Held-out loss in nats per {setup.unit} after the last iteration{spread}."
    if "memory_bytes" in known:
        measured = (one for of_seed in records.values() for one in of_seed.values())
        said += f" Memory: {next(one.memory_of for one in measured if one.memory is not None)}."
    if "step_seconds" in known:
        said += " Step time: the median over a run's iterations."
    heads = ["", "n", "ffn", "parameters", "FLOPs per token", *(head for head, *_ in columns)]
    lines += [said, "", f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for variant in variants:
        of, cost = found[variant.name], costs[variant.name]
        cells = [
            _scaled(of[quantity], by).show(form) if quantity in of else "–"
            for _, quantity, form, by in columns
        ]
        lines.append(
            f"| {variant.label} | {of['validation_loss'].n} | {cost.model.ffn:,} | "
            f"{cost.parameters:,} | {cost.flops:,} | {' | '.join(cells)} |"
        )
    if comparisons:
        lines += ["", *_comparison_lines(comparisons, labels, setup)]
    if setup.sweep:
        lines += ["", *setup.sweep.markdown(labels, setup.unit), "", "![sweep](sweep.png)"]
    lines += ["", "![losses](loss.png)"]
    lines += ["", "![paired differences](differences.png)"] if comparisons else []
    lines += ["", *_input_lines(records, variants)]
    if with_alphas(records, variants):
        lines += ["", *_alpha_lines(records, variants), "", "![alphas](alphas.png)"]
    if adapted:
        lines += ["", *_depth_lines(adapted), "![nonlinearity by depth](depth.png)"]
    return "\n".join(lines) + "\n"


def _columns(unit: str) -> list[tuple[str, str, str, float]]:
    """(head, quantity of `spreads`, format, factor) of each."""
    return [
        ("held-out loss", "validation_loss", ".4f", 1),
        ("perplexity", "perplexity", ".3f", 1),
        ("step [ms]", "step_seconds", ",.1f", 1e3),
        (f"{unit}s/s", "tokens_per_second", ",.0f", 1),
        ("memory [MiB]", "memory_bytes", ",.0f", 2**-20),
    ]


def _comparison_lines(
    comparisons: Sequence[Comparison], labels: Mapping[str, str], setup: Setup
) -> list[str]:
    baseline = labels[setup.baseline]
    lines = [
        f"Paired with {baseline}: the same seed has the same data in the same order. Negative is "
        f"better than {baseline}.",
        "",
        *paired.table(comparisons, labels, "+.4f"),
    ]
    if all(one.interval for one in comparisons):
        number = max(len(one.differences) for one in comparisons)
        count = len(comparisons)
        about = f"all {count} comparisons" if count > 1 else "this one"
        lines += [
            "",
            f"Student's t with n − 1 degrees of freedom, n = {number} seeds. An interval stands "
            f"for one comparison alone. The verdict is about {about}: a difference is "
            "one where Holm's adjusted p is below 0.05, so that the chance of any false one "
            "here is at most 5 %. Few seeds find large differences only, and “within noise” does "
            "not say that two are equal. Seeds vary the initial weights, the order of the "
            "data and, of a validation during training, the part of the held-out text that it is "
            "taken on: ± has all of that, and a paired difference the same part on both sides. "
            "Another text or size is not covered.",
        ]
    return lines


def _input_lines(records: Records, variants: Sequence[Variant]) -> list[str]:
    lines = [
        "Inputs of the activation with the initial weights, standard deviation, mean over seeds, "
        f"layer 0 to the last; in the paper's 1.1B {PAPER_INPUT_STD:.2f}:",
        "",
    ]
    measured = False
    for variant in variants:
        found = [r.input_std for r in records[variant.name].values() if r.input_std]
        shown = _by_layer(found) if found else "not measured"
        of_all = len(found) in (0, len(records[variant.name]))
        lines.append(f"- {variant.label}: {shown}{'' if of_all else f' (n = {len(found)})'}")
        measured |= bool(found)
    return lines if measured else []


def _by_layer(of_seed: Sequence[Sequence[float]]) -> str:
    """The mean over seeds of every layer."""
    layers = zip(*of_seed, strict=True)
    return "  ".join(f"{sum(layer) / len(layer):.3f}" for layer in layers)


def _alpha_lines(records: Records, variants: Sequence[Variant]) -> list[str]:
    lines = ["Effective alphas after the last iteration, mean over seeds, layer 0 to the last:", ""]
    for variant in variants:
        alphas = [record.alphas for record in records[variant.name].values() if record.alphas]
        for symbol, side in (("αp", "positive"), ("αn", "negative")) if alphas else ():
            shown = _by_layer([getattr(one, side)[-1] for one in alphas])
            lines.append(f"- {variant.label} {symbol}: {shown}")
    return lines


def adaptations(records: Records, variants: Sequence[Variant]) -> list[Adaptation]:
    """Nonlinearity by depth of every variant that trained alphas of each layer's own."""
    from megatron_xielu.report import depth  # needs PyTorch

    found = []
    for variant in variants:
        alphas = [record.alphas for record in records[variant.name].values() if record.alphas]
        layers = {len(one.positive[0]) for one in alphas}
        if len(layers) != 1:
            continue
        found.append(
            depth.of_seeds(
                variant.label,
                variant.name.partition("-")[0],
                variant.beta,
                [one.iterations for one in alphas],
                [one.positive for one in alphas],
                [one.negative for one in alphas],
            )
        )
    return [one for one in found if one is not None]


def _depth_lines(adapted: Sequence[Adaptation]) -> list[str]:
    from megatron_xielu.report.depth import COLUMNS

    lines = [
        "Nonlinearity by depth (1 − R² of the best straight line, on standard normal inputs). "
        "Alphas that did not train, or are one pair for all layers, have no trend and are left out."
    ]
    for one in adapted:
        lines += ["", one.sentence, "", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
        lines += [f"| {' | '.join(row)} |" for row in one.rows()]
    return [*lines, ""]


def _scaled(spread: Spread, by: float) -> Spread:
    sd = None if spread.sd is None else spread.sd * by
    return Spread(spread.mean * by, sd, spread.n)


def _json(
    records: Records,
    variants: Sequence[Variant],
    costs: Mapping[str, Cost],
    comparisons: Sequence[Comparison],
    adapted: Sequence[Adaptation],
    setup: Setup,
) -> dict[str, Any]:
    return {
        "preset": setup.preset,
        "notes": list(setup.notes),
        "unit": f"nats per {setup.unit}",
        "context": setup.context,
        "settings": setup.settings,
        "variants": {
            variant.name: {
                "label": variant.label,
                "ffn": costs[variant.name].model.ffn,
                "parameters": costs[variant.name].parameters,
                "flops_per_token": costs[variant.name].flops,
                **{key: asdict(spread) for key, spread in spreads(records, variant.name).items()},
                "seeds": {
                    str(seed): _run_json(record)
                    for seed, record in sorted(records[variant.name].items())
                },
            }
            for variant in variants
        },
        "sweep": setup.sweep and setup.sweep.losses,
        "baseline": setup.baseline,
        "comparisons": [asdict(comparison) for comparison in comparisons],
        "depth": [
            {
                "label": one.label,
                "verdict": one.verdict,
                "trend_by_seed": one.trends[:, -1].tolist(),
                # [seed, start and end, layer]
                "nonlinearity": one.nonlinearity[:, [0, -1]].tolist(),
            }
            for one in adapted
        ],
    }


def _run_json(record: Record) -> dict[str, Any]:
    found: dict[str, Any] = {
        "parameters": record.parameters,
        "tokens": record.tokens,
        "validation": record.valid,
        "perplexity": record.perplexity,
    }
    if record.input_std:
        found["activation_input_std"] = record.input_std
    if record.step_seconds is not None:
        found["step_seconds"] = record.step_seconds
        found["tokens_per_second"] = record.tokens_per_second
    if record.memory is not None:
        found |= {"memory_bytes": record.memory, "memory_of": record.memory_of}
    if record.alphas:
        found["alpha_p"] = record.alphas.positive[-1]
        found["alpha_n"] = record.alphas.negative[-1]
    return found
