"""A Python that has imported PyTorch, and forks: a process of a test starts in no time.

Most of what a training of these tests costs is the import of PyTorch and of what Megatron brings
along. `WarmPython.start` is ``subprocess.Popen([sys.executable, *command])`` for one that has
them already; Megatron and this package are imported by each process, under its own environment.

Run as a script this file is the server: it reads one JSON request a line, and answers each.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Nothing of Megatron, whose import depends on the environment and the command line.
_MODULES = """
    torch torch._dynamo torch._inductor.standalone_compile torch._inductor.test_operators
    torch.distributed.checkpoint torch.distributed._tensor torch.utils.tensorboard
    torch.utils.cpp_extension omegaconf transformers.models.auto.tokenization_auto
    transformers.tokenization_utils_tokenizers tiktoken sentencepiece psutil wandb
""".split()


class WarmPython:
    """The server's client: it ends when this object's process does."""

    def __init__(self) -> None:
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**environment, "OMP_NUM_THREADS": "1"},
            text=True,
        )

    def start(
        self, command: Sequence[str], *, environment: dict[str, str], folder: Path, output: Path
    ) -> Process:
        """Start ``python COMMAND`` in ``folder``, with its output appended to a file.

        Args:
            command: ``-m MODULE …``, ``-c CODE …`` or ``SCRIPT …``.
            environment: the whole of it; OMP_NUM_THREADS is 1 whatever it says.
            folder: the working directory.
            output: file for what it prints.
        """
        request = {"environment": environment, "folder": str(folder), "output": str(output)}
        return Process(self, self.ask({**request, "command": list(command)}))

    def ask(self, request: dict[str, Any]) -> Any:
        """Send one request and return its answer."""
        assert self._server.stdin and self._server.stdout
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())


class Process:
    """One started process, with the methods of ``subprocess.Popen`` that tests use."""

    def __init__(self, python: WarmPython, pid: int) -> None:
        self._python, self.pid = python, pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code (minus the number of the signal that ended it); None while it runs."""
        if self.returncode is None:
            self.returncode = self._python.ask({"poll": self.pid})
        return self.returncode

    def wait(self) -> int:
        """The same, when it has ended."""
        while (code := self.poll()) is None:
            time.sleep(0.02)
        return code

    def send_signal(self, signum: int) -> None:
        """Send a signal, unless it is known to have ended."""
        if self.returncode is None:
            os.kill(self.pid, signum)

    def kill(self) -> None:
        """End it."""
        self.send_signal(signal.SIGKILL)


def _serve() -> dict[str, Any]:
    """Answer requests; returns only in a new process, with what it has to run."""
    while line := sys.stdin.readline():
        request = json.loads(line)
        if pid := request.get("poll"):
            ended, status = os.waitpid(pid, os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if ended else None
        elif not (answer := os.fork()):
            return request
        print(json.dumps(answer), flush=True)
    os._exit(0)


def _become(environment: dict[str, str], folder: str, output: str, command: list[str]) -> None:
    """Run ``command`` as a Python of its own would."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    log = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    first, *rest = command
    paths = [path for path in environment.get("PYTHONPATH", "").split(":") if path]
    sys.path[:1] = [str(Path(first).parent) if not first.startswith("-") else folder, *paths]
    if first == "-c":
        code, *arguments = rest
        sys.argv = ["-c", *arguments]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(code, "<string>", "exec"), main.__dict__)
    elif first == "-m":
        module, *arguments = rest
        sys.argv = ["-m", *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    for name in _MODULES:
        importlib.import_module(name)
    _become(**_serve())
