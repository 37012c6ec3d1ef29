"""One page with pictures of one or many training runs: losses, alphas and activations by depth.

``python -m megatron_xielu.report RUN``
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_xielu.common import files
from megatron_xielu.common.text import one_line, print_coloured, ready_output
from megatron_xielu.report.errors import NoReport

if TYPE_CHECKING:
    from megatron_xielu.report.run import Run

PAGE = "report.html"

_PLOTS = ("matplotlib", "tensorboard", "numpy", "google", "PIL", "jinja2")


def main(argv: Sequence[str] | None = None) -> None:
    """Write a report; exit with one line on standard error if there is nothing to report on."""
    args = _parser().parse_args(argv)
    try:
        write(args.runs, args.output)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _PLOTS:
            raise
        raise SystemExit(
            f"megatron_xielu.report: error: {error}; pip install 'megatron_xielu[plots]'"
        ) from None
    except (NoReport, OSError) as error:
        raise SystemExit(f"megatron_xielu.report: error: {one_line(error)}") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_xielu.report",
        description="One HTML page with pictures of one or many training runs: losses, alphas and "
        "activations by depth, speed; from event files, checkpoints and evaluation.json.",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="a run's folder, or its checkpoints folder; several are compared",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help=f"where to write {PAGE} and the pictures (default: RUN/report, of several runs "
        "./report)",
    )
    return parser


def write(
    folders: Sequence[Path],
    output: Path | None,
    notes: Sequence[str] = (),
    runs: Sequence[Run] | None = None,
) -> None:
    """Write a report.

    Args:
        folders: of runs.
        output: a folder to be; None for the default.
        notes: about all runs, for the page.
        runs: those in ``folders``, where they are read already.

    Raises:
        NoReport: there is nothing to report on, or nowhere to write; or what would be replaced is
            not of a report.
    """
    from megatron_xielu.report import (
        depth,
        depth_plots,
        description,
        layer_plots,
        page,
        run_plots,
        terminal,
    )
    from megatron_xielu.report.load import find_all, load_all
    from megatron_xielu.report.ranking import FEW, shown_closely
    from megatron_xielu.report.run import readable

    if output is None:
        own = find_all(folders)
        output = own[0] / "report" if len(own) == 1 else Path("report")
    if output.exists() and not output.is_dir():
        raise NoReport(f"--output {output} is a file; name a folder")
    runs = load_all(folders) if runs is None else runs
    _make_folder(output)

    together, closely = run_plots.pictures(runs), shown_closely(runs)
    layers = [
        layer_plots.pictures(run, _prefix(number, run.name) if len(runs) > 1 else "")
        if any(run is one for one in closely)
        else []
        for number, run in enumerate(runs, 1)
    ]
    if others := sum(run.alpha_p is not None for run in runs) - len(closely):
        notes = [
            *notes,
            f"layer by layer there is the first run of each entry; {others} more have alphas, and "
            "a page of its own shows those of a run",
        ]
    adapted = depth.of_runs(runs)[:FEW]
    by_depth = depth_plots.pictures(adapted)
    made = (together, by_depth, *layers)
    files = {picture.file: picture.png for pictures in made for picture in pictures}
    _write(output, files, page.render(runs, together, layers, notes, (adapted, by_depth)))

    colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    print_coloured(terminal.render(runs, colours=colours))
    for one in adapted:
        print(one.sentence)
    for name, lines in description.notes(runs).items():
        for line in lines:
            print(f"note: {name}: {line}", file=sys.stderr)
    print(f"\n{readable(output / PAGE)}")


def _make_folder(output: Path) -> None:
    """Before pictures are drawn, which takes longest."""
    try:
        files.make_folder(output)
    except OSError as error:
        raise NoReport(f"--output {output} cannot be written to: {error.strerror}") from None
    _check_replaced(output, PAGE)


def _prefix(number: int, name: str) -> str:
    """Of a run's pictures: unlike any other's, and a file name everywhere."""
    return f"{number}-{re.sub(r'[^A-Za-z0-9._-]+', '-', name)[-60:]}-"


def _write(output: Path, pictures: dict[str, bytes], html: str) -> None:
    """Each file at once; the page, which needs no other, last. Pictures of an old page go."""
    for name in (PAGE, *pictures):
        _check_replaced(output, name)
    page = output / PAGE
    old = page.read_text(errors="replace") if page.is_file() else ""
    for name, content in {**pictures, PAGE: html.encode(errors="replace")}.items():
        files.write(output / name, content)
    for name in set(re.findall(r'data-file="([\w.-]+\.png)"', old)) - set(pictures):
        if _made_here(output / name):
            (output / name).unlink()


def _check_replaced(output: Path, name: str) -> None:
    path = output / name
    if os.path.lexists(path) and not _made_here(path):
        raise NoReport(
            f"--output {output}: {name} there is not of a report, and would be replaced; move it "
            "away, or name another folder"
        )


def _made_here(path: Path) -> bool:
    from megatron_xielu.report.drawing import MADE_BY

    if not path.is_file():
        return False
    with path.open("rb") as file:
        return MADE_BY.encode() in file.read(1024)


if __name__ == "__main__":
    ready_output()
    main()
