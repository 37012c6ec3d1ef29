"""Run lm-eval's usual zero-shot tasks on every run of a comparison, and say what differs.

    tools/evaluate_suite.py runs/tiny/*/seed_* --output runs/tiny/suite

exports the last checkpoint of each run to Hugging Face, evaluates it with lm-eval in a process of
its own, one on each GPU at a time, and writes ``suite.md`` and ``suite.json``: activations by
tasks, over seeds. Run it again after an interruption, or with more runs or tasks, and it does what
is missing. A run that fails is told at the end, and the exit status is 1.

    tools/evaluate_suite.py --download

only fetches the tasks' data, where there is a network. docs/evaluation.md says more.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

from compare import training
from compare.results import for_terminal
from compare.text import write_json
from suite import runs as suite_runs
from suite import table, tasks
from suite.evaluation import Evaluation, Failed, Options, Result
from suite.runs import Run
from suite.tasks import Task

from megatron_xielu import __version__
from megatron_xielu.checkpoints.source import Refused
from megatron_xielu.common import files
from megatron_xielu.common.flags import POSITIVE
from megatron_xielu.common.text import one_line, ready_output, size
from megatron_xielu.common.versions import made_with

_BASELINE = "swiglu"
_POLL_SECONDS = 0.2


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate what is not evaluated yet, and write the table of all that is.

    Raises:
        SystemExit: 2 where something is wrong with what is asked, 1 where a run failed.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    begin = time.monotonic()
    try:
        include = options.include_path and str(options.include_path.absolute())
        if options.download:
            found = tasks.load(options.tasks, include)
            print(f"{', '.join(task.name for task in found)}: the data are there")
            return
        if not options.runs or not options.output:
            raise Refused("name runs and --output, or --download")
        runs = suite_runs.read(options.runs, options.tokenizer)
        baseline = _baseline(options.baseline, runs)
        places = _places(options.device)
        chosen = tasks.load(options.tasks, include)
        settings = Options(
            device=options.device or ("cpu" if places == [{}] else "cuda"),
            dtype=options.dtype,
            batch_size=options.batch_size or ("8" if places == [{}] else "auto"),
            limit=options.limit,
            include_path=include,
            keep=options.keep,
        )
        output = Path(os.path.realpath(options.output))
        files.make_folder(output)
        evaluations = [Evaluation(run, chosen, output, settings) for run in runs]
        _check_disk(evaluations, output, len(places), keep=options.keep)
    except (Refused, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {one_line(error)}\n")
    training.raise_on_stop_signals()
    try:
        failures = _evaluate(evaluations, places)
    except training.Stopped as stopped:
        print(f"\nstopped; run the same command again to go on (kept in {output})", flush=True)
        raise SystemExit(128 + stopped.signum) from None
    results = _results(evaluations)
    if results:
        _write(results, evaluations, chosen, baseline, output, settings)
        print(f"{(time.monotonic() - begin) / 60:.1f} min; the table: {output / 'suite.md'}")
    for evaluation, why in failures:
        print(f"failed: {evaluation.run.name}: {why}; its log: {evaluation.log}")
    if failures:
        raise SystemExit(1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="docs/evaluation.md says more."
    )
    parser.add_argument(
        "runs",
        nargs="*",
        type=Path,
        metavar="RUN",
        help="folders of runs; of ROW/seed_N the folder names the row of the table",
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="for everything")
    parser.add_argument(
        "--tasks",
        type=_names,
        default=list(tasks.USUAL),
        metavar="NAME,…",
        help=f"of lm-eval [{','.join(tasks.USUAL)}]",
    )
    parser.add_argument(
        "--include-path", type=_folder, metavar="FOLDER", help="of tasks of your own"
    )
    parser.add_argument(
        "--tokenizer",
        metavar="PATH|NAME",
        help="of the data of all runs [of a comparison the one in OUT/text]",
    )
    parser.add_argument("--baseline", help="row to compare with [swiglu, else the first]")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), help="[cuda, on all GPUs that are visible, else cpu]"
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "bfloat16", "float16", "float32"),
        default="auto",
        help="of the weights [auto: as in the checkpoint]",
    )
    parser.add_argument(
        "--batch-size", type=_batch_size, metavar="N|auto", help="[auto on a GPU, 8 on a CPU]"
    )
    parser.add_argument(
        "--limit", type=POSITIVE.read, metavar="N", help="only N documents a task, for a try"
    )
    parser.add_argument(
        "--keep", action="store_true", help="keep the exported models, in OUTPUT/ROW/seed_N/model"
    )
    parser.add_argument(
        "--download", action="store_true", help="only fetch the tasks' data into HF_HOME"
    )
    return parser


def _names(word: str) -> list[str]:
    names = list(dict.fromkeys(filter(None, word.split(","))))
    if not names:
        raise argparse.ArgumentTypeError("name one task at least")
    return names


def _batch_size(word: str) -> str:
    return word if word == "auto" else str(POSITIVE.read(word))


def _folder(word: str) -> Path:
    if not Path(word).is_dir():
        raise argparse.ArgumentTypeError(f"{word}: no such folder")
    return Path(word)


def _baseline(asked: str | None, runs: Sequence[Run]) -> str:
    rows = list(dict.fromkeys(run.row for run in runs))
    if asked is not None and asked not in rows:
        raise Refused(f"--baseline {asked}: not among the rows, {', '.join(rows)}")
    return asked or (_BASELINE if _BASELINE in rows else rows[0])


def _places(device: str | None) -> list[dict[str, str]]:
    """The environment of each process that runs at the same time: a GPU each, or one on the CPU."""
    import torch

    count = torch.cuda.device_count() if device != "cpu" else 0
    if device == "cuda" and not count:
        raise Refused("--device cuda: PyTorch sees no GPU here; leave it out, or say cpu")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else map(str, range(count))
    return [{"CUDA_VISIBLE_DEVICES": name} for name in names][:count] or [{}]


def _check_disk(
    evaluations: Sequence[Evaluation], output: Path, at_once: int, *, keep: bool
) -> None:
    needs = sorted((evaluation.needs for evaluation in evaluations), reverse=True)
    needed = sum(needs if keep else needs[:at_once])
    free = shutil.disk_usage(output).free
    if needed > free:
        raise Refused(
            f"--output {output}: the exported models take {size(needed)}, {size(free)} are free; "
            "name a folder on another disk" + (", or leave out --keep" if keep else "")
        )


def _evaluate(
    evaluations: Sequence[Evaluation], places: Sequence[dict[str, str]]
) -> list[tuple[Evaluation, str]]:
    """Whatever is missing, one run at each place at a time; those that failed, and why."""
    failures: list[tuple[Evaluation, str]] = []
    waiting = [evaluation for evaluation in evaluations if evaluation.missing]
    print(
        f"{len(evaluations)} runs, {len(evaluations) - len(waiting)} of them evaluated before",
        flush=True,
    )
    free = list(places)
    running: list[tuple[Evaluation, dict[str, str], subprocess.Popen]] = []
    try:
        while waiting or running:
            while waiting and free:
                evaluation, place = waiting.pop(0), free.pop(0)
                _say(evaluation, "begins")
                try:
                    running.append((evaluation, place, evaluation.start(place)))
                except (Failed, OSError) as error:
                    failures.append((evaluation, one_line(error)))
                    _say(evaluation, "failed")
                    free.append(place)
            for entry in running.copy():
                evaluation, place, child = entry
                if training.ended(child) is None:
                    continue
                running.remove(entry)
                free.append(place)
                try:
                    evaluation.finish(child.returncode)
                    _say(evaluation, "done")
                except (Failed, OSError) as error:
                    failures.append((evaluation, one_line(error)))
                    _say(evaluation, "failed")
            time.sleep(_POLL_SECONDS)
    finally:
        for _, _, child in running:
            training.stop(child)
    return failures


def _say(evaluation: Evaluation, what: str) -> None:
    print(f"{evaluation.run.label}, seed {evaluation.run.seed}: {what}", flush=True)


def _results(evaluations: Sequence[Evaluation]) -> dict[str, dict[int, Result]]:
    """By row and seed, of the runs that have every task."""
    results: dict[str, dict[int, Result]] = {}
    for evaluation in evaluations:
        if not evaluation.missing:
            of_seed = results.setdefault(evaluation.run.row, {})
            of_seed[evaluation.run.seed] = evaluation.result
    return results


def _write(
    results: table.Results,
    evaluations: Sequence[Evaluation],
    chosen: Sequence[Task],
    baseline: str,
    output: Path,
    settings: Options,
) -> None:
    """``suite.md`` and ``suite.json``, and the terminal."""
    runs = [evaluation.run for evaluation in evaluations]
    context = {
        "date": time.strftime("%Y-%m-%d"),
        "lm-eval": ", ".join(
            f"{name} {evaluations[0].result.of[name]}" for name in ("lm_eval", "transformers")
        )
        + f", {settings.device}, dtype {settings.dtype}, batch size {settings.batch_size}",
        "versions": made_with(__version__),
    }
    shown, content = table.summary(results, runs, chosen, baseline, _notes(evaluations), context)
    write_json(output / "suite.json", content)
    files.write(output / "suite.md", shown)
    print("\n" + for_terminal(shown))


def _notes(evaluations: Sequence[Evaluation]) -> list[str]:
    notes = []
    if left_out := [one.run.name for one in evaluations if one.missing]:
        notes.append(f"Not evaluated, and left out: {', '.join(left_out)}.")
    if len({one.run.tokens for one in evaluations}) > 1:
        each = ", ".join(f"{one.run.name} {one.run.tokens or 0:,}" for one in evaluations)
        notes.append(f"The runs were not trained on the same number of tokens: {each}.")
    if limit := evaluations[0].result.of["limit"]:
        notes.append(f"Only {limit} documents a task: these numbers are of a try.")
    return notes


if __name__ == "__main__":
    ready_output()
    warnings.filterwarnings("ignore")
    main()
