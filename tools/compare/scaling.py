"""``compare_activations.py scaling``: the same comparison at several sizes of models.

    tools/compare_activations.py scaling --seeds 3

A ladder of models of one shape: heads and layers in proportion to the width, MLPs 6 × as wide (2/3
of that with a gate), as many tokens for each parameter of the layers at every size. Each size is a
comparison as any other, in ``OUT/width_N/VARIANT/seed_N``: interrupted, the same command goes on.
`scaling_fit` says what becomes of the losses, `scaling_results` writes it to ``OUT/results``.
"""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compare import equal_cost, results, runs, scaling_results
from compare.scaling_results import Size
from compare.settings import SMALL, TINY, Settings
from compare.training import REPOSITORY, Stopped, raise_on_stop_signals
from compare.variants import ACTIVATIONS, Variant, parse
from megatron_xielu.common.schema import Malformed
from megatron_xielu.common.text import is_utf8, one_line

_FEWEST_ITERATIONS = 10  # warm-up, constant and decay are none below


@dataclass(frozen=True)
class Ladder:
    """Models of one shape.

    ``preset`` has all that does not depend on the width, and the learning rate at its own.
    ``seconds_to_start`` and ``flops_per_second`` are for the estimate of what it takes.
    """

    preset: Settings
    widths: tuple[int, ...]
    head: int  # width of a head; as many layers as heads
    tokens_per_parameter: float
    seconds_to_start: float
    flops_per_second: float

    def settings(self, width: int, tokens_per_parameter: float) -> Settings:
        """Of one size. The learning rate goes with 1/√width, as from `TINY` to `SMALL`."""
        preset, layers = self.preset, width // self.head
        tokens = tokens_per_parameter * layers * 16 * width**2  # attention 4h², MLP 12h²
        iterations = round(tokens / preset.tokens_per_iteration)
        return replace(
            preset,
            layers=layers,
            hidden=width,
            heads=layers,
            ffn=6 * width,
            iterations=iterations,
            warmup=math.ceil(iterations * preset.warmup / preset.iterations),
            decay=math.ceil(iterations * preset.decay / preset.iterations),
            learning_rate=float(f"{preset.learning_rate * math.sqrt(preset.hidden / width):.3g}"),
            save_every=math.ceil(iterations / 4),
            # Once, at the end: the same held-out text for every size, however long it trains.
            validate_every=iterations + 1,
        )


LADDERS = {
    # On a CPU, on bytes. Batches are small, so that the smallest model has a hundred iterations.
    "cpu": Ladder(
        replace(
            TINY, sequence=64, batch=8, micro_batch=8, validation_batches=64, tensor_parallel=1
        ),
        widths=(32, 48, 64),
        head=16,
        tokens_per_parameter=1.5,
        seconds_to_start=13,  # of one core, as is the speed: xIELU and SwiGLU, a busy machine
        flops_per_second=1.5e10,
    ),
    # On one GPU: 8M to 76M parameters. The largest reads the 24M tokens of text four times, from
    # where on repeated text begins to be worth less than new (Muennighoff et al., 2023).
    "gpu": Ladder(
        replace(SMALL, batch=16, validation_batches=16),
        widths=(256, 384, 512, 640),
        head=64,
        tokens_per_parameter=1.4,
        seconds_to_start=20,  # assumed, as is the speed: 10 % of an H100
        flops_per_second=1e14,
    ),
}


def main(argv: Sequence[str]) -> None:
    """Train what is not finished yet, then fit and write.

    Raises:
        SystemExit: something is wrong; with what.
    """
    options = parse_options(argv)
    out = Path(os.path.realpath(options.out))
    raise_on_stop_signals()
    try:
        lock = runs.hold_lock(out)
        try:
            _run(options, out, lock)
        finally:
            os.close(lock)
    except Stopped as stopped:
        print(f"\nstopped; run the same command again to resume (kept in {out})", flush=True)
        raise SystemExit(128 + stopped.signum) from None
    except (OSError, Malformed) as error:
        raise SystemExit(f"compare: {one_line(error)}") from None


def parse_options(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; ``variants`` and the settings of each width, ``sizes``, are ready."""
    parser = argparse.ArgumentParser(
        prog="compare_activations.py scaling",
        description=__doc__.splitlines()[0],
        epilog="docs/compare.md says more.",
    )
    parser.add_argument(
        "--ladder", choices=LADDERS, default="cpu", help="which sizes and text [cpu]"
    )
    parser.add_argument("--sizes", nargs="+", type=_width, metavar="WIDTH", help="[the ladder's]")
    parser.add_argument(
        "--tokens-per-parameter", type=_ratio, metavar="R", help="at every size [the ladder's]"
    )
    parser.add_argument(
        "--activations",
        nargs="+",
        type=_variant,
        default=[parse(name) for name in ACTIVATIONS],
        dest="variants",
        metavar="NAME",
        help=f"of {', '.join(ACTIVATIONS)}, and ablations of xielu and xiprelu [these five]",
    )
    parser.add_argument(
        "--seeds",
        type=runs.parse_seeds,
        default="3",
        metavar="N",
        help="how many, or which with a comma: 3, or 1,2,3 [3]",
    )
    parser.add_argument("--baseline", help="what gaps are to [swiglu, else the first]")
    parser.add_argument("--text", type=Path, help="folder of text files to use instead")
    parser.add_argument("--out", type=Path, help="folder for everything [runs/scaling-LADDER]")
    parser.add_argument(
        "--prepare-text",
        action="store_true",
        help="only write OUT/text, and say what the trainings will take",
    )
    options = parser.parse_args(argv)
    ladder = LADDERS[options.ladder]
    options.variants = list(dict.fromkeys(options.variants))
    names = [variant.name for variant in options.variants]
    options.baseline = options.baseline or ("swiglu" if "swiglu" in names else names[0])
    if options.baseline not in names:
        parser.error(
            f"--baseline {options.baseline}: not among what is compared, {', '.join(names)}"
        )
    options.ratio = options.tokens_per_parameter or ladder.tokens_per_parameter
    widths = sorted(set(options.sizes or ladder.widths))
    if len(widths) < 2:
        parser.error("--sizes: a line needs two at least, and three to be seen to be none")
    for width in widths:
        if width % ladder.head:
            parser.error(f"--sizes {width}: not a multiple of {ladder.head}, the width of a head")
    options.sizes = {width: ladder.settings(width, options.ratio) for width in widths}
    for width, settings in options.sizes.items():
        if settings.iterations < _FEWEST_ITERATIONS:
            parser.error(
                f"--sizes {width}: {settings.iterations} iterations at --tokens-per-parameter "
                f"{options.ratio:g}, {_FEWEST_ITERATIONS} at least; raise one or the other"
            )
    if options.out and not is_utf8(str(options.out)):
        parser.error(f"--out {str(options.out)!a} is not UTF-8")
    if options.text and not options.text.is_dir():
        parser.error(f"--text {options.text}: no such folder")
    options.out = options.out or REPOSITORY / "runs" / f"scaling-{options.ladder}"
    options.ffn = []  # widths of MLPs are the ladder's
    return options


def _width(value: str) -> int:
    if not re.fullmatch("[1-9][0-9]{0,4}", value):
        raise argparse.ArgumentTypeError(f"{value[:40]!r} is no width of a model: 64")
    return int(value)


def _ratio(value: str) -> float:
    if not re.fullmatch(r"[0-9]{1,4}(\.[0-9]{1,6})?", value) or not float(value):
        raise argparse.ArgumentTypeError(f"{value[:40]!r} is no number above 0 and below 10,000")
    return float(value)


def _variant(name: str) -> Variant:
    try:
        return parse(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _run(options: argparse.Namespace, out: Path, lock: int) -> None:
    ladder = LADDERS[options.ladder]
    for width in options.sizes:
        runs.finished_records(_folder(out, width), options.variants, options.seeds)  # readable
    machine = runs.Machine("cpu", 1)
    source = runs.choose_text(ladder.preset, out / "text", options.text)
    described: dict[str, Any] = {}
    if not options.prepare_text:  # another machine may be going to train
        machine = runs.this_machine(ladder.preset, None)
        for width, settings in options.sizes.items():
            described = runs.describe_run(settings, machine, source, {})
            runs.check_settings(_folder(out, width), described)
    text = runs.prepare_text(ladder.preset, out / "text", source)
    sizes, planned = [], []
    for width, settings in options.sizes.items():
        of_size = runs.plan_runs(options, _folder(out, width), settings, machine, text)
        costs = equal_cost.costs({run.variant.name: run.flags for run in of_size})
        equal_cost.check(costs, options.baseline)
        size = Size(settings, costs[options.baseline])
        sizes.append(size)
        planned += [(size, run) for run in of_size]
    print(results.for_terminal("\n".join(scaling_results.size_lines(sizes, text))))
    left = [size for size, run in planned if not (run.folder / "record.json").exists()]
    flops, each = sum(size.flops for size in left), ladder.seconds_to_start
    minutes = (flops / ladder.flops_per_second + each * len(left)) / 60
    print(
        f"{len(planned)} runs, {len(planned) - len(left)} of them finished; the others take "
        f"{flops:.2g} FLOPs, about {minutes:.0f} min at {ladder.flops_per_second:g} FLOP/s and "
        f"{each:g} s to start one\n",
        flush=True,
    )
    if options.prepare_text:
        return
    runs.do_all(
        [(f" width {size.width},", run, size.settings) for size, run in planned],
        machine,
        lock,
        instead="leave them out with --sizes, --seeds or --activations",
    )
    records = [
        runs.finished_records(_folder(out, width), options.variants, options.seeds)
        for width in options.sizes
    ]
    shown = scaling_results.write(
        out / "results",
        sizes,
        records,
        options.variants,
        options.baseline,
        text=text,
        # Neither times nor memory are shown, of which there is more to say on a CPU.
        notes=(
            *results.caveats(tiny=options.ladder == "cpu", on_gpu=True, seeds=len(options.seeds)),
            *dict.fromkeys(note for of_size in records for note in results.other_regime(of_size)),
        ),
        context={
            "command": " ".join(["tools/compare_activations.py scaling", *_words(options)]),
            "text": runs.show_text(described["text"]),
            "sizes": f"{options.ladder} ladder, {options.ratio:g} {text.unit}s for each parameter "
            "of the layers' matrices, learning rate with 1/√width",
            "seeds": ", ".join(map(str, options.seeds)),
            **runs.context(machine),
        },
    )
    print("\n" + results.for_terminal(shown))
    print(f"what to open: {out / 'results' / 'scaling.md'}; its picture lies beside it")


def _words(options: argparse.Namespace) -> list[str]:
    """The options that give these results again, whatever the ladder's come to be."""
    return [
        *("--ladder", options.ladder, "--sizes", *map(str, options.sizes)),
        *("--tokens-per-parameter", f"{options.ratio:g}"),
        *("--activations", *(variant.name for variant in options.variants)),
        *("--seeds", runs.show_seeds(options.seeds), "--baseline", options.baseline),
        *(["--text", "FOLDER"] if options.text else []),
    ]


def _folder(out: Path, width: int) -> Path:
    return out / f"width_{width}"
