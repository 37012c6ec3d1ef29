"""Hands tasks to datatrove's executors: on this machine, to a Ray cluster, or to Slurm.

    python -m megatron_xielu.data.executors OUTPUT    # what scheduler.py starts for the first two

The process is one of its own, so that `scheduler` can end it with all its workers: a killed worker
leaves a multiprocessing pool, datatrove's included, waiting forever.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from shlex import quote
from typing import Any

import multiprocess
from datatrove.executor.base import PipelineExecutor
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.executor.ray import RayPipelineExecutor
from datatrove.executor.slurm import SlurmPipelineExecutor

from megatron_xielu.common import files, schema, text
from megatron_xielu.common.schema import Malformed
from megatron_xielu.data import recipe as recipes
from megatron_xielu.data.errors import DataError
from megatron_xielu.data.readers import make_reader
from megatron_xielu.data.tokenise import OWNER, SplitTokenizer

_PR_SET_PDEATHSIG = 1
_LONGEST_TMPDIR = 70  # bytes; a socket's name has 107 at most, multiprocess adds 32


@dataclass(frozen=True)
class Request:
    """What one round asks of an executor."""

    executor: str
    workers: int
    tasks: int  # the first so many of the recipe
    limits: tuple[tuple[int, int], ...] = ()  # task, and training tokens after which it stops
    memory_gb: int = 2  # a task's
    ray_address: str | None = None
    slurm_partition: str = ""
    slurm_time: str = "24:00:00"
    slurm_options: dict[str, str] = field(default_factory=dict)

    def save(self, output: Path) -> None:
        """For the process that runs it."""
        files.write(output / "work" / "request.json", json.dumps(asdict(self)) + "\n")


class _Slurm(SlurmPipelineExecutor):
    def launch_merge_stats(self) -> None:
        """No job that sums up statistics: the manifest does, and it would wait for failed tasks."""


def make_executor(output: Path, request: Request) -> PipelineExecutor:
    """The executor with readers and tokeniser, ready to run."""
    recipe = recipes.load(output)
    readers = [
        make_reader(
            group,
            tasks=recipe.tasks,
            text_key=recipe.text_key,
            skip_bad_rows=recipe.skip_bad_rows,
            part_bytes=recipe.part_bytes,
        )
        for group in recipe.groups
    ]
    step = SplitTokenizer(
        output,
        eod_token=recipe.tokenizer.eod_token,
        valid_fraction=recipe.valid_fraction,
        language=recipe.sentences,
        limits=dict(request.limits),
        readers=readers,
        special_as_text=recipe.special_tokens_as_text,
        raise_errors=request.executor != "local",
    )
    common: dict[str, Any] = {
        "pipeline": [*readers, step],
        "tasks": request.tasks,
        "logging_dir": str(output / "work" / "logs"),
    }
    if request.executor == "local":
        return LocalPipelineExecutor(workers=min(request.workers, request.tasks), **common)
    if request.executor == "ray":
        return RayPipelineExecutor(
            workers=request.workers, mem_per_cpu_gb=request.memory_gb, **common
        )
    return _Slurm(
        workers=request.workers,
        mem_per_cpu_gb=request.memory_gb,
        time=request.slurm_time,
        partition=request.slurm_partition,
        sbatch_args=request.slurm_options,
        job_name="prepare_data",
        qos="",
        env_command=_environment(),
        slurm_logs_folder=str(output / "work" / "slurm"),
        job_id_retriever=_job_id,
        **common,
    )


def task_environment() -> dict[str, str]:
    """What tasks need: one core each, datatrove's log files only, and no values in tracebacks."""
    return {
        "LOGURU_DIAGNOSE": "NO",
        "TOKENIZERS_PARALLELISM": "false",
        "RAYON_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }


def local_environment() -> dict[str, str]:
    """The whole environment of the process below, and of its workers."""
    environment = {**os.environ, **task_environment()}
    if len(os.fsencode(environment.get("TMPDIR", ""))) > _LONGEST_TMPDIR:
        environment["TMPDIR"] = "/tmp"
    return environment


def _job_id(printed: str) -> str:
    """Of what sbatch printed, for several clusters "Submitted batch job 7 on cluster c2"."""
    if not (found := re.search(r"(?<=batch job )\d+|\d+$", printed.strip())):
        raise DataError(f"--executor slurm: sbatch printed no number of a job: {printed.strip()!r}")
    return found[0]


def _environment() -> str:
    lines = [f"export PATH={quote(str(Path(sys.executable).parent))}:$PATH"]
    lines += [f"export {name}={quote(value)}" for name, value in task_environment().items()]
    return "\n".join(lines)


def die_with_parent() -> None:
    """End this process when the one that started it ends, however that ends (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    output = Path(sys.argv[1])
    die_with_parent()
    os.register_at_fork(after_in_child=die_with_parent)  # datatrove's manager process
    request = schema.load(Request, output / "work" / "request.json")
    if request.executor == "ray":
        import ray

        local = {} if request.ray_address else {"num_cpus": request.workers}
        ray.init(
            address=request.ray_address,
            include_dashboard=False,
            log_to_driver=False,
            runtime_env={"env_vars": task_environment()},
            **local,
        )
    else:
        os.environ[OWNER] = str(os.getpid())
        # Workers are forked from a server: what that has imported they need not.
        multiprocess.set_forkserver_preload(["megatron_xielu.data.executors"])
    make_executor(output, request).run()


if __name__ == "__main__":
    text.ready_output(colours=True)
    try:
        main()
    except (Malformed, DataError) as error:
        sys.exit(str(error))
