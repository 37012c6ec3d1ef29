"""Runs tasks until none is missing: starts the executor, watches it, and starts it again.

With a token budget the data is the first tasks that together reach it, the last of them cut at the
document that does. How many that takes is known only afterwards: a round runs as many as are
expected to be needed, the next one what is still missing, with the limit of the last task. So the
result depends on neither the number of workers nor on when something was stopped.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from megatron_xielu.common import files, text
from megatron_xielu.data import executors, records
from megatron_xielu.data.errors import DataError
from megatron_xielu.data.executors import Request
from megatron_xielu.data.recipe import Recipe
from megatron_xielu.data.records import Record

_POLL = 0.5  # seconds
_WITHOUT_WORKERS = 120.0  # seconds until an executor without any task is given up
_AFTER_A_DEATH = 3.0  # the same once a worker was killed
_FRUITLESS_ROUNDS = 3
_SLURM_SETTLES = 15.0  # seconds until other nodes' files are seen here


@dataclass(frozen=True)
class Missing:
    """What there is to do; nothing when ``tasks`` is empty."""

    tasks: list[int]
    limits: dict[int, int]
    used: int  # the data is the first so many tasks


def missing(recipe: Recipe, done: dict[int, Record], expected_tokens: float) -> Missing:
    """Compare the records with the recipe.

    Args:
        done: finished tasks.
        expected_tokens: training tokens of all files, as estimated before the start.
    """
    if recipe.max_tokens is None:
        tasks = [t for t in range(recipe.tasks) if t not in done or done[t].limit is not None]
        return Missing(tasks, {}, recipe.tasks)
    left = recipe.max_tokens
    for task in range(recipe.tasks):
        record = done.get(task)
        if record is None or (record.limit is not None and record.limit != left):
            break
        if record.tokens >= left and record.limit != left:
            return Missing([task], {task: left}, task + 1)
        left -= record.tokens
        if left <= 0:
            return Missing([], {}, task + 1)
    else:
        return Missing([], {}, recipe.tasks)  # the input has no more
    whole = [r.tokens for r in done.values() if r.limit is None]
    mean = sum(whole) / len(whole) if whole else max(expected_tokens / recipe.tasks, 1)
    last = min(recipe.tasks, task + max(1, math.ceil(left / max(mean, 1))))
    needed = [
        t for t in range(task, last) if t not in done or (done[t].limit is not None and t == task)
    ]
    # The first missing task may be the last one: then its limit is known already.
    return Missing(needed, {task: left}, last)


def run(recipe: Recipe, output: Path, request: Request, expected_tokens: float) -> Missing:
    """Run until nothing is missing; returns what the data consists of.

    Raises:
        DataError: tasks failed, each with its reason, or nothing advances.
    """
    fruitless = 0
    goal = min(expected_tokens, recipe.max_tokens or math.inf)
    with _progress(goal) as bar:
        while True:
            done = records.load_all(output, recipe.tasks)
            left = missing(recipe, done, expected_tokens)
            _show(bar, output, done)
            if not left.tasks:
                return left
            failures = output / "work" / "failures"
            for failure in failures.glob("[0-9]*"):
                failure.unlink()
            for task in left.tasks:
                records.forget(output, task)
            _tell_datatrove(output, done, left)
            this = replace(request, tasks=max(left.tasks) + 1, limits=tuple(left.limits.items()))
            one_round = _slurm_round if request.executor == "slurm" else _local_round
            one_round(recipe, output, this, bar)
            reasons = [f.read_text(errors="replace") for f in sorted(failures.glob("[0-9]*"))]
            after = records.load_all(output, recipe.tasks)
            if reasons:
                raise DataError(_say_failures(reasons, len(after), output))
            fruitless = 0 if any(task in after for task in left.tasks) else fruitless + 1
            if fruitless == _FRUITLESS_ROUNDS:
                raise DataError(
                    f"{_FRUITLESS_ROUNDS} attempts in a row finished none of {len(left.tasks)} "
                    f"tasks; the reason stands at the end of {_log(output, request)}"
                )
            lost = [task for task in left.tasks if task not in after]
            if lost:
                bar.write(f"tasks {_some(lost)} ended without a result; doing them again")


def _say_failures(reasons: list[str], finished: int, output: Path) -> str:
    shown = [text.first_line(reason) for reason in reasons[:10]]
    if len(reasons) > len(shown):
        shown.append(f"… and {len(reasons) - len(shown)} more in {output / 'work/failures'}")
    return (
        f"{len(reasons)} of {len(reasons) + finished} tasks failed; the others are finished and "
        "stay so, the same command goes on when the cause is gone: " + "\n  ".join(shown)
    )


def _some(tasks: list[int]) -> str:
    return ", ".join(map(str, tasks[:10])) + (" …" if len(tasks) > 10 else "")


def _log(output: Path, request: Request) -> Path:
    return output / "work" / ("slurm" if request.executor == "slurm" else "executor.log")


def _tell_datatrove(output: Path, done: dict[int, Record], left: Missing) -> None:
    """datatrove skips what it has marked as complete; that is made to say what the records say."""
    folder = output / "work" / "logs" / "completions"
    folder.mkdir(parents=True, exist_ok=True)
    complete = {f"{task:05d}" for task in done.keys() - set(left.tasks)}
    for marked in folder.iterdir():
        if marked.name not in complete:
            marked.unlink()
    for name in complete:
        (folder / name).touch()


def _local_round(recipe: Recipe, output: Path, request: Request, bar: tqdm) -> None:
    """One run of the local or Ray executor in a process of its own."""
    records.remove_dead_attempts(output)
    request.save(output)
    with (output / "work" / "executor.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "megatron_xielu.data.executors", str(output)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=executors.local_environment(),
            start_new_session=True,
        )
    try:
        last_seen = time.monotonic()
        while process.poll() is None:
            time.sleep(_POLL)
            _show(bar, output, records.load_all(output, recipe.tasks))
            seen = records.attempts(output)
            if any(attempt.alive for attempt in seen) or request.executor != "local":
                last_seen = time.monotonic()
            patience = _AFTER_A_DEATH if seen else _WITHOUT_WORKERS
            if time.monotonic() - last_seen > patience:
                break
    finally:
        _end(process)
        records.remove_dead_attempts(output)


def _end(process: subprocess.Popen) -> None:
    """Kill a process and all that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _slurm_round(recipe: Recipe, output: Path, request: Request, bar: tqdm) -> None:
    """Submit an array of jobs, or find the one of an earlier start, and wait until it has ended.

    Interrupting the wait leaves the jobs alone: the same command waits for them again.
    """
    if "SLURM_ARRAY_TASK_ID" in os.environ:
        raise DataError("--executor slurm submits jobs, and must not be called inside of one")
    job_file = output / "work" / "slurm_job"
    job = job_file.read_text(errors="replace").strip() if job_file.exists() else ""
    if not (job.isdecimal() and _in_queue(job)):
        executor = executors.make_executor(output, request)
        try:
            executor.run()
        except (FileNotFoundError, subprocess.CalledProcessError) as error:
            raise DataError(f"--executor slurm: sbatch failed: {error}") from error
        job = str(executor.job_id)
        files.write(job_file, job + "\n")
    bar.write(f"Slurm job {job}; logs in {output / 'work/slurm'}")
    while _in_queue(job):
        time.sleep(_POLL)
        _show(bar, output, records.load_all(output, recipe.tasks))
    end = time.monotonic() + _SLURM_SETTLES
    while time.monotonic() < end and _unsettled(output, request):
        time.sleep(_POLL)
    job_file.unlink()


def _unsettled(output: Path, request: Request) -> bool:
    return any(
        not records.path_of(output, task).exists()
        and not (output / "work" / "failures" / f"{task:05d}").exists()
        for task in range(request.tasks)
    )


def _in_queue(job: str) -> bool:
    # %F is the array's number; a line that names the cluster may come before.
    command = ["squeue", "--noheader", "--format=%F", "--jobs", job]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and "Invalid job id" not in done.stderr:
        return True  # the controller does not answer: ask again
    return job in done.stdout.split()


@contextmanager
def _progress(goal: float) -> Iterator[tqdm]:
    with tqdm(
        total=max(goal, 1),
        unit="tok",
        unit_scale=True,
        dynamic_ncols=True,
        desc="tokenising",
        smoothing=0.05,
        # A log file gets a line now and then, not one a second.
        mininterval=0.5 if sys.stderr.isatty() else 30,
    ) as bar:
        yield bar


def _show(bar: tqdm, output: Path, done: dict[int, Record]) -> None:
    """Move the bar to the tokens there are: finished, and in tasks under way."""
    started = bar.n == 0
    tokens = sum(record.tokens for record in done.values())
    tokens += sum(seen.tokens for seen in records.attempts(output) if seen.task not in done)
    if started and tokens:
        bar.initial = tokens  # what an earlier run did says nothing about the speed of this one
    bar.total = max(bar.total, tokens)
    bar.n = tokens
    bar.set_postfix_str(f"{len(done)} tasks done", refresh=False)
    bar.refresh() if sys.stderr.isatty() else bar.update(0)
