"""A Python that has imported PyTorch, and forks: a process of a test starts in no time.

Most of what a training of these tests costs is the import of PyTorch, of what Megatron brings
along, and of Megatron. `WarmPython.start` is ``subprocess.Popen([sys.executable, *command])`` for
one that has them already. Megatron, whose import depends on the environment, is imported once per
environment, by a second server that the first one forks; and only for a command that says so.

What others start, scripts of this package and torchrun, starts from it as well where they are given
`WarmPython.executable` as their Python: a program that asks for such a process, passes signals on
to it, and ends as it does.

Run as a script this file is the server: it reads one JSON request a line, and answers each.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import functools
import gc
import importlib
import importlib.metadata
import json
import multiprocessing.context
import multiprocessing.managers
import os
import runpy
import select
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

# Nothing of Megatron, whose import depends on the environment.
_MODULES = """
    torch torch._dynamo torch._inductor.standalone_compile torch._inductor.test_operators
    torch.distributed.checkpoint torch.distributed._tensor torch.utils.tensorboard
    torch.utils.cpp_extension omegaconf transformers.models.auto.tokenization_auto
    transformers.tokenization_utils_tokenizers tiktoken sentencepiece psutil wandb
""".split()

# What differs from rank to rank and from run to run, and is read when training, not at import.
_OF_ONE_RUN = """
    RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT PYTEST_CURRENT_TEST
    DUMP_FOLDER BREAK_TP_SUM WITHOUT_MENDS WRITER_SLEEPS KMP_DUPLICATE_LIB_OK KMP_INIT_AT_FORK
    HF_MODULES_CACHE
""".split()

# Its lines of the answer: the process's number, and its exit code. It may be killed, too.
_EXECUTABLE = """#!{python} -IS
import json, os, signal, socket, sys

asked = socket.socket(socket.AF_UNIX)
asked.connect({address!r})
lines = asked.makefile("rw")
fields = (sys.argv[0], sys.argv[1:], dict(os.environ), os.getcwd(), os.getpid())
lines.write(json.dumps(fields) + "\\n")
lines.flush()
started = int(lines.readline())

def pass_on(signum, _):
    for send in (os.killpg, os.kill):  # it may not have its group yet
        try:
            return send(started, signum)
        except ProcessLookupError:
            pass

for name in ("SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGUSR1", "SIGUSR2"):
    signum = getattr(signal, name)
    if signal.getsignal(signum) != signal.SIG_IGN:
        signal.signal(signum, pass_on)
code = int(lines.readline())
if code < 0:
    signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
    os.kill(os.getpid(), -code)
os._exit(code)
"""


class WarmPython:
    """The server's client: it ends when this object's process does.

    Args:
        imports: of a command and its environment: the modules that it imports before any of them
            does anything, so that it may start with them behind it, and the environment to import
            them in. If ``megatron.training`` is the first, that is done in CPU mode.
    """

    def __init__(
        self, imports: Callable[[Sequence[str], dict[str, str]], tuple[Sequence[str], dict]]
    ) -> None:
        self._imports, self._lock = imports, threading.Lock()
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**environment, "OMP_NUM_THREADS": "1"},
            text=True,
        )

    def start(
        self,
        command: Sequence[str],
        *,
        environment: dict[str, str],
        folder: Path,
        output: Path,
        **more: Any,
    ) -> Process:
        """Start ``python COMMAND`` in ``folder``, with its output appended to a file.

        Args:
            command: ``-m MODULE …``, ``-c CODE …`` or ``SCRIPT …``.
            environment: the whole of it; OMP_NUM_THREADS is 1 whatever it says.
            folder: the working directory.
            output: file for what it prints.
            more: of `_Server.become`.
        """
        kind = None
        modules, imported_in = self._imports(command, environment)
        if modules:
            common = {k: v for k, v in sorted(imported_in.items()) if k not in _OF_ONE_RUN}
            kind = json.dumps([common, *modules])
        request = {"environment": environment, "folder": str(folder), "output": str(output), **more}
        pid = self.ask({**request, "command": list(command), "kind": kind})
        return Process(self, pid, kind)

    def ask(self, request: dict[str, Any]) -> Any:
        """Send one request and return its answer."""
        assert self._server.stdin and self._server.stdout
        with self._lock:
            return _ask(self._server.stdin, self._server.stdout, request)

    @functools.cached_property
    def executable(self) -> str:
        """A Python to give to what starts one: it starts ``-m MODULE …`` and so on from here."""
        self._folder = tempfile.TemporaryDirectory(dir="/tmp")  # a socket's address is short
        path = Path(self._folder.name, "python3")
        address = f"{self._folder.name}/socket"
        path.write_text(_EXECUTABLE.format(python=sys.executable, address=address))
        path.chmod(0o755)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(address)
        listener.listen()
        threading.Thread(target=self._accept, args=[listener], daemon=True).start()
        # When all is imported, which no test's own limit is to pay for.
        self.start(["-c", ""], environment={}, folder=Path(), output=Path(os.devnull)).wait()
        return str(path)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=self._start_for, args=[connection], daemon=True).start()

    def _start_for(self, connection: socket.socket) -> None:
        # It may be killed before it has read an answer.
        with contextlib.suppress(OSError), connection, connection.makefile("rw") as lines:
            executable, command, environment, folder, pid = json.loads(lines.readline())
            unbuffered = command[0] == "-u"
            process = self.start(
                command[unbuffered:],
                environment=environment,
                folder=folder,
                output=Path(f"/proc/{pid}/fd/1"),
                errors=f"/proc/{pid}/fd/2",
                executable=executable,
                unbuffered=unbuffered,
            )
            try:
                lines.write(f"{process.pid}\n")
                lines.flush()
                with os.fdopen(os.pidfd_open(process.pid)) as ended:
                    select.select([ended, connection], [], [])
            finally:  # also when the one that asked was killed
                if process.poll() is None:
                    for kill in (os.killpg, os.kill):
                        with contextlib.suppress(ProcessLookupError):
                            kill(process.pid, signal.SIGKILL)
                code = process.wait()
            lines.write(f"{code}\n")
            lines.flush()


class Process:
    """One started process, with the methods of ``subprocess.Popen`` that tests use."""

    def __init__(self, python: WarmPython, pid: int, kind: str | None) -> None:
        self._python, self.pid, self._kind = python, pid, kind
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code (minus the number of the signal that ended it); None while it runs."""
        if self.returncode is None:
            self.returncode = self._python.ask({"poll": self.pid, "kind": self._kind})
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


def _ask(requests: IO[str], answers: IO[str], request: dict[str, Any]) -> Any:
    requests.write(json.dumps(request) + "\n")
    requests.flush()
    return json.loads(answers.readline())


@dataclass
class _Server:
    """What a new process finds done, and where the requests for new ones come from."""

    requests: IO[str]
    answers: IO[str]
    path: list[str]  # sys.path, but for what a command and PYTHONPATH put first

    def serve(self) -> dict[str, Any]:
        """Answer requests; returns only in a new process, with what it has to run."""
        kinds: dict[str, tuple[IO[str], IO[str]]] = {}
        gc.collect()
        gc.freeze()  # so that a collection does not copy what is shared with the parent
        while line := self.requests.readline():
            request = json.loads(line)
            kind = request.pop("kind", None)
            if kind is not None:
                if kind not in kinds:
                    down, up = os.pipe(), os.pipe()
                    if not os.fork():
                        self.requests, self.answers = os.fdopen(down[0]), os.fdopen(up[1], "w")
                        for descriptor in (down[1], up[0]):
                            os.close(descriptor)
                        for other in kinds.values():  # each has to end when its own server does
                            other[0].close()
                        kinds.clear()
                        self._import_megatron(*json.loads(kind))
                        gc.collect()
                        gc.freeze()
                        continue
                    for descriptor in (down[0], up[1]):
                        os.close(descriptor)
                    kinds[kind] = os.fdopen(down[1], "w"), os.fdopen(up[0])
                answer = _ask(*kinds[kind], request)
            elif pid := request.get("poll"):
                ended, status = os.waitpid(pid, os.WNOHANG)
                answer = os.waitstatus_to_exitcode(status) if ended else None
            elif not (answer := os.fork()):
                return request
            self.answers.write(json.dumps(answer) + "\n")
            self.answers.flush()
        os._exit(0)

    def _import_megatron(self, environment: dict[str, str], *modules: str) -> None:
        """What `megatron_xielu.pretrain_gpt` does before it reads a flag, but for its mends.

        What a process can tell by is put back, until it turns CPU mode on itself.
        """
        os.environ.clear()
        os.environ.update(environment)
        sys.path[:] = [*_paths(environment), *self.path]
        in_cpu_mode = modules[0] == "megatron.training"
        if in_cpu_mode:
            from megatron_xielu import cpu

        is_available = torch.cuda.is_available
        stderr = os.dup(2)
        with tempfile.TemporaryFile("w+") as log:
            for descriptor in (1, 2):
                os.dup2(log.fileno(), descriptor)
            try:
                if in_cpu_mode:
                    cpu.activate()
                for name in modules:
                    importlib.import_module(name)
                if in_cpu_mode:
                    from megatron.training import arguments

                    _cache_help()
                    arguments.add_megatron_arguments(argparse.ArgumentParser())
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                for descriptor in (1, 2):
                    os.dup2(stderr, descriptor)
            log.seek(0)
            said = log.read()
        if not in_cpu_mode:
            return
        added = {name: os.environ[name] for name in os.environ.keys() - environment.keys()}
        redirected, torch.cuda.is_available = torch.cuda.is_available, is_available

        def activate() -> None:
            torch.cuda.is_available = redirected
            os.environ.update({**added, **os.environ})
            if os.environ.get("RANK", "0") == "0":
                print(said, end="", file=sys.stderr, flush=True)

        cpu.activate = activate

    def become(
        self,
        environment: dict[str, str],
        folder: str,
        output: str,
        command: list[str],
        *,
        errors: str = "",
        executable: str = "",
        unbuffered: bool = False,
    ) -> None:
        """Run ``command`` as a Python of its own would."""
        if executable:
            os.setsid()
            sys.executable = executable
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for descriptor, path in ((1, output), (2, errors or output)):
            log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.dup2(log, descriptor)
            os.close(log)
        # New ones: the old would seek in what is a pipe now, and have wandb's write, which doubles
        # the time of a print.
        sys.stdout, sys.stderr = (open(fd, "w", closefd=False) for fd in (1, 2))  # noqa: SIM115
        sys.stdout.reconfigure(line_buffering=unbuffered, write_through=unbuffered)
        sys.stderr.reconfigure(errors="backslashreplace", line_buffering=True)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        atexit.register(gc.unfreeze)  # else nanobind reports leaks as it ends
        multiprocessing.context.SpawnContext.Manager = _forked_manager  # type: ignore[assignment]
        first, *rest = command
        beside = str(Path(first).parent) if not first.startswith("-") else folder
        sys.path[:] = [beside, *_paths(environment), *self.path]
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


def _cache_help() -> None:
    """Megatron parses the source of its classes for the help of its flags, three times a start."""
    from megatron.training import argument_utils

    factory = argument_utils.ArgumentGroupFactory
    read = functools.cache(
        functools.partial(factory._get_field_docstrings, factory.__new__(factory))
    )
    factory._get_field_docstrings = lambda self, of_class: read(of_class)


def _paths(environment: dict[str, str]) -> list[str]:
    return [path for path in environment.get("PYTHONPATH", "").split(":") if path]


def _forked_manager(self: Any) -> multiprocessing.managers.SyncManager:
    """A manager in a forked process. Megatron asks for a spawned one with the first checkpoint of
    every rank, which imports PyTorch and the entry anew: most of what a save of these tests costs.
    """
    context = multiprocessing.get_context("fork")
    manager = multiprocessing.managers.SyncManager(ctx=context)
    manager.start(_close_sockets)
    return manager


def _close_sockets() -> None:
    """Those of the process that was forked: other ranks have to notice when that one is gone."""
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                os.close(descriptor)


def _end(code: int = 0) -> None:
    """End as Python does, but leave all objects where they are: to take them apart would copy most
    of what is shared with the parent, half the time of a short training.
    """
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    for name in _MODULES:
        importlib.import_module(name)
    import torch

    # It reads a file of every installed package, which PyTorch asks for at every start.
    importlib.metadata.entry_points = functools.cache(importlib.metadata.entry_points)
    importlib.metadata.entry_points(group="torch.distributed.backends")
    server = _Server(sys.stdin, sys.stdout, sys.path[1:])
    try:
        server.become(**server.serve())
    except SystemExit as end:
        if not isinstance(end.code, int | None):
            print(end.code, file=sys.stderr)
        _end(end.code if isinstance(end.code, int) else int(end.code is not None))
    except BaseException as error:
        frames = error.__traceback__
        while frames and frames.tb_frame.f_code.co_filename == __file__:
            frames = frames.tb_next
        traceback.print_exception(error.with_traceback(frames))
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        _end(1)
    _end()
