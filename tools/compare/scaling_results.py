"""What the same comparison at several sizes showed: ``scaling.md``, ``scaling.json``, a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from compare import scaling_fit
from compare.equal_cost import Cost
from compare.paired import Spread
from compare.records import Records
from compare.scaling_fit import Gap, Line
from compare.settings import Settings
from compare.text import Text, write_json
from compare.variants import Variant
from megatron_xielu.common import files


@dataclass(frozen=True)
class Size:
    """``cost``: the baseline's; the others' is the same but for the alphas."""

    settings: Settings
    cost: Cost

    @property
    def width(self) -> int:
        """What a size is called by."""
        return self.settings.hidden

    @property
    def tokens(self) -> int:
        """Of one run."""
        return self.settings.iterations * self.settings.tokens_per_iteration

    @property
    def flops(self) -> int:
        """Of one run, forward and backward, attention and output layer among them."""
        return self.tokens * self.cost.flops


def write(
    out: Path,
    sizes: Sequence[Size],
    records: Sequence[Records],
    variants: Sequence[Variant],
    baseline: str,
    *,
    text: Text,
    notes: Sequence[str],
    context: Mapping[str, str],
) -> str:
    """Fit, and write everything to ``out``; returns the Markdown.

    Args:
        out: a folder, made if it is missing.
        sizes: from the smallest.
        records: of each size.
        variants: in the order to show them.
        baseline: what gaps are to.
        text: what was trained on.
        notes: what to keep in mind.
        context: what, where and when.
    """
    from compare import plots

    losses = {
        variant.name: [
            {seed: record.valid_loss for seed, record in of_size[variant.name].items()}
            for of_size in records
        ]
        for variant in variants
    }
    flops = [size.flops for size in sizes]
    lines = {
        name: scaling_fit.fit(flops, [list(of_seed.values()) for of_seed in of_size])
        for name, of_size in losses.items()
    }
    gaps = scaling_fit.gaps(flops, losses, baseline)
    labels = {variant.name: variant.label for variant in variants}
    shown = "\n".join(
        [
            "# Activations at equal cost, at several sizes",
            "",
            *(f"- {key}: {value}" for key, value in context.items()),
            "",
            *(f"**{note}**\n" for note in notes),
            *size_lines(sizes, text),
            "",
            *_loss_lines(sizes, losses, lines, labels, text.unit),
            "",
            *(_gap_lines(sizes, gaps, labels, baseline) if gaps else []),
            "![scaling](scaling.png)\n",
        ]
    )
    write_json(
        out / "scaling.json",
        {
            "context": dict(context),
            "notes": list(notes),
            "unit": f"nats per {text.unit}",
            "baseline": baseline,
            "sizes": [
                {
                    **asdict(size.settings),
                    "init_std": size.settings.init_std,
                    "parameters": size.cost.parameters,
                    "parameters_without_embeddings": size.cost.model.parameters(embeddings=False),
                    "tokens": size.tokens,
                    "flops": size.flops,
                }
                for size in sizes
            ],
            "losses": losses,
            "lines": {name: asdict(line) for name, line in lines.items()},
            "gaps": {name: asdict(gap) for name, gap in gaps.items()},
        },
    )
    plots.plot_scaling(
        {f"width {size.width}": size.flops for size in sizes},
        lines,
        {name: gap.line for name, gap in gaps.items()},
        variants,
        out / "scaling.png",
        baseline=labels[baseline],
        caption=f"{context['device']}, {context['date']}",
        unit=text.unit,
    )
    files.write(out / "scaling.md", shown)
    return shown


def size_lines(sizes: Sequence[Size], text: Text) -> list[str]:
    """A table of the ladder, known before anything is trained."""
    return [
        f"| width | layers | parameters | without embeddings | {text.unit}s | passes over the text "
        "| iterations | learning rate | FLOPs a run |",
        "|---|---|---|---|---|---|---|---|---|",
        *(
            f"| {size.width} | {size.settings.layers} | {size.cost.parameters:,} | "
            f"{size.cost.model.parameters(embeddings=False):,} | {size.tokens:,} | "
            f"{size.tokens / text.tokens['train']:.2g} | {size.settings.iterations:,} | "
            f"{size.settings.learning_rate:g} | {size.flops:.3g} |"
            for size in sizes
        ),
    ]


def _widths(sizes: Sequence[Size]) -> str:
    return " | ".join(f"width {size.width}" for size in sizes)


def _loss_lines(
    sizes: Sequence[Size],
    losses: scaling_fit.Losses,
    lines: Mapping[str, Line],
    labels: Mapping[str, str],
    unit: str,
) -> list[str]:
    several = any(line.slope.interval for line in lines.values())
    spread = ", mean ± sample standard deviation over seeds," if several else ""
    return [
        f"Held-out loss in nats per {unit}{spread} and what a factor of ten of FLOPs adds to it on "
        f"the line L = a − b·log10 C{', with a 95 % interval' * several}. “Off” is how far a "
        f"{'mean' if several else 'loss'} lies from the line at most.",
        "",
        f"| | {_widths(sizes)} | per ×10 FLOPs | off |",
        "|---|" + "---|" * (len(sizes) + 2),
        *(
            f"| {labels[name]} | "
            + " | ".join(Spread.of(list(of_seed.values())).show(".4f") for of_seed in losses[name])
            + f" | {line.slope.show('+.4f')} | {line.off:.4f} |"
            for name, line in lines.items()
        ),
    ]


def _gap_lines(
    sizes: Sequence[Size], gaps: Mapping[str, Gap], labels: Mapping[str, str], baseline: str
) -> list[str]:
    several = any(gap.line.slope.interval for gap in gaps.values())
    shown = [
        f"Gap to {labels[baseline]}, paired by seed{', each with a 95 % interval' * several}; "
        f"negative is better than {labels[baseline]}.",
        "",
        f"| | {_widths(sizes)} | per ×10 FLOPs | p, Holm | the gap |",
        "|---|" + "---|" * (len(sizes) + 3),
    ]
    for name, gap in gaps.items():
        p_holm = "–" if gap.p_holm is None else f"{gap.p_holm:.3g}"
        means = " | ".join(mean.show("+.4f") for mean in gap.line.means)
        shown.append(
            f"| {labels[name]} | {means} | {gap.line.slope.show('+.4f')} | {p_holm} | "
            f"{gap.verdict} |"
        )
    bounds = (
        "Nothing is said beyond these sizes, this text, and a learning rate that is tuned for none."
    )
    if not several:
        return [*shown, "", bounds, ""]
    shown += [
        "",
        f"“{scaling_fit.GROWS}” and “{scaling_fit.SHRINKS}” are about the gap's size on its line, "
        "from the smallest model to the largest, where Holm's adjusted p of the slope is below "
        f"0.05; “{scaling_fit.TURNS}” where one is better at one end and the other at the other, "
        f"each by its interval. “{scaling_fit.UNCLEAR}” does not say that it stays. {bounds}",
        "",
    ]
    return shown
