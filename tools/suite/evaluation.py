"""One run: its export to Hugging Face, lm-eval's process, and what is kept of both.

OUTPUT/ROW/seed_N/result.json   the scores, and of which checkpoint, tokenizer and lm-eval
                  log.txt       what the conversion and lm-eval said
                  lm_eval.json  lm-eval's configuration: lm_eval run --config …
                  model/        the export, until it is evaluated
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from compare import training
from compare.text import write_json

from megatron_xielu.checkpoints.source import Refused
from megatron_xielu.common import files, schema
from megatron_xielu.common.schema import Count, Malformed
from megatron_xielu.common.text import reason
from megatron_xielu.convert import __main__ as convert
from suite.runs import Run
from suite.tasks import Task


@dataclass(frozen=True)
class Score:
    """Of one task: lm-eval's metrics, of how many documents, and the sha256 of the task."""

    metrics: dict[str, float]
    documents: Count
    task: str


@dataclass(frozen=True)
class Result:
    """What is kept of a run: the scores by task, and what they are of."""

    of: dict[str, Any]
    scores: dict[str, Score] = field(default_factory=dict)


class Failed(Exception):
    """A run could not be evaluated; one line says why."""


@dataclass(frozen=True)
class Options:
    """Of every run: see the command's help. ``batch_size``: a number, or lm-eval's ``auto``."""

    device: str
    dtype: str
    batch_size: str
    limit: int | None
    include_path: str | None
    keep: bool


class Evaluation:
    """One run's evaluation, in a folder of its own.

    Raises:
        Refused: what is there cannot be read.
    """

    def __init__(self, run: Run, tasks: Sequence[Task], folder: Path, options: Options) -> None:
        self.run, self._tasks, self._options = run, tasks, options
        self._folder = folder / run.name
        self._model, self._file = self._folder / "model", self._folder / "result.json"
        self.log = self._folder / "log.txt"
        of = {
            "checkpoint": run.checkpoint.name,
            "stamp": run.stamp,
            "tokenizer": _identity(run.tokenizer),
            "dtype": options.dtype,
            "limit": options.limit,
            "lm_eval": version("lm_eval"),
            "transformers": version("transformers"),
        }
        try:
            there = schema.load(Result, self._file) if self._file.exists() else None
        except Malformed as error:
            raise Refused(
                f"{error}; delete {self._folder}, and the run is evaluated again"
            ) from None
        if there is None and self._model.exists():
            raise Refused(
                f"{self._model} has no {self._file.name} beside it, which says of which checkpoint "
                "it is; delete that folder"
            )
        self._is_new = there is None or there.of != of
        self.result = Result(of) if there is None or there.of != of else there

    @property
    def missing(self) -> list[Task]:
        """The tasks that are still to be run."""
        return [task for task in self._tasks if not self._has(task)]

    def _has(self, task: Task) -> bool:
        score = self.result.scores.get(task.name)
        return score is not None and score.task == task.sha256 and task.metric in score.metrics

    @property
    def needs(self) -> int:
        """Bytes of disk that it will take."""
        return self.run.size if self.missing and (self._is_new or not self._is_exported) else 0

    @property
    def _is_exported(self) -> bool:
        return (self._model / "config.json").exists()

    def start(self, environment: dict[str, str]) -> subprocess.Popen:
        """Export the model, unless that is there, and start lm-eval.

        Raises:
            Failed: the model cannot be exported, or another process is at it.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(self._folder / ".lock", os.O_RDWR | os.O_CREAT)
        try:
            self._lock(lock)
            self._export()
            shutil.rmtree(self._folder / "lm_eval", ignore_errors=True)
            configuration = self._folder / "lm_eval.json"
            write_json(configuration, self._configuration())
            return training.start(
                [sys.executable, "-m", "lm_eval", "run", "--config", str(configuration)],
                # Of modeling_xiprelu.py, which several processes at once would copy to one place.
                environment={**environment, "HF_MODULES_CACHE": str(self._folder / "modules")},
                log=self.log,
                keep_open=lock,
            )
        finally:
            os.close(lock)

    def _lock(self, lock: int) -> None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Failed("another process is evaluating it") from None

    def _export(self) -> None:
        if self._is_new:
            shutil.rmtree(self._model, ignore_errors=True)  # of another checkpoint
            write_json(self._file, asdict(self.result))
        if self._is_exported:
            return
        words = ["to-hf", str(self.run.checkpoint), str(self._model)]
        words += ["--tokenizer", self.run.tokenizer]
        with (
            self.log.open("a") as log,
            contextlib.redirect_stdout(log),
            contextlib.redirect_stderr(log),
        ):
            try:
                convert.main(words)
            except SystemExit as error:
                if isinstance(error.code, int):  # it was stopped
                    raise
                raise Failed(str(error)) from None

    def _configuration(self) -> dict[str, Any]:
        options = self._options
        return {
            "model": "hf",
            "model_args": {
                "pretrained": str(self._model),
                "dtype": options.dtype,
                # The only one whose class comes with the folder: this package's, by `convert`.
                "trust_remote_code": self.run.activation == "xiprelu",
            },
            "tasks": [task.name for task in self.missing],
            "device": options.device,
            "batch_size": options.batch_size,
            "limit": options.limit,
            "include_path": options.include_path,
            "output_path": str(self._folder / "lm_eval"),
        }

    def finish(self, returncode: int) -> None:
        """Keep what lm-eval found, and remove the model unless it is to be kept.

        Raises:
            Failed: it found nothing.
        """
        if returncode:
            lines = training.last_words(self.log.read_text(errors="replace")).splitlines()
            raise Failed(f"lm-eval ended with {returncode}: {(lines or ['without a word'])[-1]}")
        try:
            (path,) = (self._folder / "lm_eval").rglob("results_*.json")
            found = schema.read_json(path)
            scores = {task.name: _score(found, task) for task in self.missing}
        except (ValueError, LookupError, TypeError) as error:
            raise Failed(f"lm-eval's results are not as expected: {reason(error)}") from None
        self.result = replace(self.result, scores={**self.result.scores, **scores})
        write_json(self._file, asdict(self.result))
        if not self._options.keep:
            shutil.rmtree(self._model)
        shutil.rmtree(self._folder / "modules", ignore_errors=True)


def _score(found: Any, task: Task) -> Score:
    """Of lm-eval's results; what is no number (``"N/A"``) is left out."""
    metrics = {
        name.removesuffix(",none"): float(value)
        for name, value in found["results"][task.name].items()
        if name.endswith(",none") and isinstance(value, float) and math.isfinite(value)
    }
    if task.metric not in metrics:
        raise ValueError(f"{task.name} has no {task.metric}")
    return Score(metrics, int(found["n-samples"][task.name]["effective"]), task.sha256)


def _identity(tokenizer: str) -> str:
    path = Path(tokenizer) / "tokenizer.json" if Path(tokenizer).is_dir() else Path(tokenizer)
    return files.sha256(path) if path.is_file() else tokenizer
