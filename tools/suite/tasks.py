"""Which tasks of lm-eval, which metric of each, and whether their data are there."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import Any

from megatron_xielu.checkpoints.source import Refused
from megatron_xielu.common.text import reason

# The metric that is usually reported, zero-shot, and what guessing scores, in percent.
USUAL = {
    "arc_easy": ("acc_norm", 25.0),
    "arc_challenge": ("acc_norm", 25.0),
    "hellaswag": ("acc_norm", 25.0),
    "piqa": ("acc_norm", 50.0),
    "winogrande": ("acc", 50.0),
    "openbookqa": ("acc_norm", 25.0),
    "boolq": ("acc", 50.0),
    "lambada_openai": ("acc", 0.0),
}
_METRICS = ("acc_norm", "acc")  # of other tasks, the first that there is


@dataclass(frozen=True)
class Task:
    """A task of lm-eval: its name, what is reported of it, and the sha256 of its configuration."""

    name: str
    metric: str
    sha256: str


@cache
def manager(include_path: str | None) -> Any:
    """lm-eval's, which reads the 14,000 files of its tasks.

    Raises:
        Refused: lm-eval is not installed.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise Refused(f"{error}; pip install '.[hf,eval]'") from None
    return TaskManager(include_path=include_path)


def load(names: Sequence[str], include_path: str | None) -> list[Task]:
    """The tasks, whose data lm-eval has read, or fetched where there is a network.

    Raises:
        Refused: one is none, has no accuracy, or its data are not there.
    """
    found = manager(include_path)
    for name in names:
        if name not in found.all_subtasks:
            raise Refused(_unknown(name, found))
    return [_load(name, found) for name in names]


def _unknown(name: str, found: Any) -> str:
    if name in found.task_index:
        return f"--tasks {name} is a group of tasks; name those that are meant"
    near = difflib.get_close_matches(name, found.all_subtasks, n=1)
    fix = f"did you mean {near[0]}?" if near else "for one of your own add --include-path FOLDER"
    return f"--tasks {name}: lm-eval {version('lm_eval')} has no such task; {fix}"


def _load(name: str, found: Any) -> Task:
    try:
        task = found.load(name)["tasks"][name]
    except Exception as error:  # of the network, the Hub, the files, or a task's own code
        raise Refused(
            f"--tasks {name}: its data cannot be read: {reason(error)}; where there is a network, "
            f"--download --tasks {name} puts them into HF_HOME"
        ) from None
    metrics = task.aggregation()
    wanted = USUAL[name][:1] if name in USUAL else _METRICS
    metric = next((metric for metric in wanted if metric in metrics), None)
    if metric is None:
        raise Refused(
            f"--tasks {name} has no {' or '.join(wanted)}, but {', '.join(metrics)}; leave it out"
        )
    return Task(name, metric, _identity(task.dump_config()))


def _identity(configuration: dict[str, Any]) -> str:
    """The sha256 of a task: its prompts, metrics and functions, from whichever file they come."""
    words = json.dumps(configuration, sort_keys=True, default=str)
    return hashlib.sha256(re.sub(r" at 0x[0-9a-f]+", "", words).encode()).hexdigest()
