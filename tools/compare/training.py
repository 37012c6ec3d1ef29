"""Runs one Megatron training as a child process: its output to a log, its progress to the terminal.

The child stops on SIGTERM with a checkpoint (``--exit-signal-handler``), so an interrupted training
goes on where it was.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from megatron_xielu import startup

REPOSITORY = Path(__file__).resolve().parents[2]

_POLL_SECONDS = 0.2
_GRACE_SECONDS = 120  # to save a checkpoint; torchrun ends deaf ranks after 30
_PLAIN_REPORT_SECONDS = 15  # between lines where the output is no terminal
_LOG_TAIL_LINES = 30
_LAUNCHER_REPORT = "failed (exitcode:"  # begins torchrun's thirty lines about a failed rank

# Megatron's line for an iteration. Results come from the event files; but those reach the disk
# only every two minutes, too late for a progress line.
_ITERATION = re.compile(
    r"iteration +(?P<iteration>\d+)/ *(?P<of>\d+) \|.* per iteration \(ms\): (?P<ms>[\d.]+) \|"
    r".* lm loss: (?P<loss>[\d.E+-]+) \|"
)

# What Megatron's defaults need of Transformer Engine and of NVIDIA Apex, switched off.
_WITHOUT_TRANSFORMER_ENGINE = [
    *("--transformer-impl", "local"),
    "--no-persist-layer-norm",
    "--no-rope-fusion",
]
_WITHOUT_APEX = ["--no-gradient-accumulation-fusion", "--no-masked-softmax-fusion"]


# What Megatron's check of losses and gradients says, and this package's of a loss.
_NOT_A_NUMBER = re.compile(r"(NaN|Inf) in (the )?local (loss|grad)")


class Diverged(SystemExit):
    """A training ended because a loss or a gradient was NaN or Inf."""


class Stopped(BaseException):
    """The user (or the system) asked to stop: SIGINT or SIGTERM."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


def raise_on_stop_signals() -> None:
    """Turn SIGINT and SIGTERM into `Stopped`."""

    def stop(signum: int, frame: object) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):  # once is enough: the rest is a clean exit
            signal.signal(each, signal.SIG_IGN)
        raise Stopped(signum)

    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, stop)


def train(
    label: str,
    flags: Sequence[str],
    *,
    ranks: int,
    on_gpu: bool,
    tokens_per_iteration: int,
    log: Path,
    keep_open: int,
    stop_after: int | None = None,
) -> int:
    """Run ``megatron_xielu.pretrain_gpt`` to its end and show how it proceeds.

    Args:
        label: what the progress line calls it.
        flags: Megatron's command line.
        ranks: processes to start.
        on_gpu: whether they use GPUs.
        tokens_per_iteration: to show the speed.
        log: file that the output is appended to.
        keep_open: a file descriptor for the child to hold for as long as it lives.
        stop_after: iteration after which it gets SIGTERM, and ends with a checkpoint.

    Returns:
        Bytes resident at most in any of its processes.

    Raises:
        Stopped: a stop signal came; the child has saved a checkpoint and ended, or was killed.
        Diverged: a loss or gradient was NaN or Inf; what to do about it is the caller's to say.
        SystemExit: the training failed; the message ends with the log's last lines.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    launcher += ["--nproc-per-node", str(ranks)]
    command = [
        *(sys.executable, *(launcher if ranks > 1 else ())),
        *("-m", "megatron_xielu.pretrain_gpt", *flags, *(_gpu_flags() if on_gpu else ("--cpu",))),
    ]
    progress, stopped = _Progress(label, tokens_per_iteration), False
    position = log.stat().st_size if log.exists() else 0
    child = start(command, environment=_environment(ranks), log=log, keep_open=keep_open)
    try:
        with log.open(errors="replace") as lines:
            lines.seek(position)
            while (peak := ended(child)) is None:
                progress.read(lines.read())
                if stop_after and not stopped and progress.iteration >= stop_after:
                    stopped = True
                    child.send_signal(signal.SIGTERM)
                time.sleep(_POLL_SECONDS)
            progress.read(lines.read())
    except BaseException:
        progress.end("stopping (it may take half a minute)")
        stop(child)
        raise
    if child.returncode and not stopped:
        progress.end("failed")
        with log.open(errors="replace") as lines:
            lines.seek(position)
            gained = lines.read()
        if found := _NOT_A_NUMBER.search(gained):
            raise Diverged(
                f"compare: the training of {label.rstrip(':')} diverged: {found[0]}; its whole "
                f"log: {log}"
            )
        raise SystemExit(
            f"{last_words(gained)}\ncompare: the training of {label.rstrip(':')} failed; its whole "
            f"log: {log}\nThe same command tries it again."
        )
    progress.end("stopped" if stopped else "done")
    return peak


def start(
    command: Sequence[str], *, environment: dict[str, str], log: Path, keep_open: int
) -> subprocess.Popen:
    """Start ``command`` with more environment, its output appended to ``log``."""
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C reaches it once, from here
            pass_fds=(keep_open,),
        )


def ended(child: subprocess.Popen) -> int | None:
    """Peak resident bytes of ``child`` and its own children, once it has ended; else None."""
    pid, status, usage = os.wait4(child.pid, os.WNOHANG)
    if not pid:
        return None
    child.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def stop(child: subprocess.Popen) -> None:
    """SIGTERM, and SIGKILL to what has not ended `_GRACE_SECONDS` later."""
    child.send_signal(signal.SIGTERM)
    killed_at = time.monotonic() + _GRACE_SECONDS
    while child.returncode is None and ended(child) is None:
        if time.monotonic() > killed_at:
            os.killpg(child.pid, signal.SIGKILL)
        time.sleep(_POLL_SECONDS)


def last_words(log: str) -> str:
    """The end of a failed training's log, without the launcher's report that follows it."""
    own = log.splitlines()
    for index, line in enumerate(own):
        if _LAUNCHER_REPORT in line:
            own = own[:index]
            break
    return "\n".join(own[-_LOG_TAIL_LINES:])


def _gpu_flags() -> list[str]:
    return [
        *([] if find_spec("transformer_engine") else _WITHOUT_TRANSFORMER_ENGINE),
        *([] if find_spec("apex") else _WITHOUT_APEX),
    ]


def _environment(ranks: int) -> dict[str, str]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # More threads than cores make every matrix product wait for the slowest.
    threads = max(1, (cores or 1) // ranks)
    variables = {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    }
    return variables | (startup.ALONE if ranks == 1 else {})


class _Progress:
    """One line that is rewritten on a terminal, and now and then a new line elsewhere."""

    def __init__(self, label: str, tokens_per_iteration: int) -> None:
        self._label = label
        self._tokens = tokens_per_iteration
        self._recent: deque[float] = deque(maxlen=20)  # milliseconds per iteration
        self._rest = ""
        self._state, self._last = "starting", ""
        self.iteration = 0
        self._live = sys.stdout.isatty()
        self._begin = self._shown = time.monotonic()
        self._show()

    def read(self, text: str) -> None:
        """Take what the log has gained."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            if match := _ITERATION.search(line):
                self._recent.append(float(match["ms"]))
                self._describe(int(match["iteration"]), int(match["of"]), float(match["loss"]))
        now = time.monotonic()
        if self._live or now - self._shown >= _PLAIN_REPORT_SECONDS:
            self._shown = now
            self._show()

    def _describe(self, iteration: int, of: int, loss: float) -> None:
        self.iteration = iteration
        seconds = sum(self._recent) / len(self._recent) / 1000
        left = round((of - iteration) * seconds)
        self._state = (
            f"iteration {iteration:4}/{of}   loss {loss:.3f}   "
            f"{self._tokens / seconds:7,.0f} tokens/s   {left // 60}:{left % 60:02} left"
        )

    def end(self, outcome: str) -> None:
        """Leave the line, with how it ended."""
        spent = round(time.monotonic() - self._begin)
        self._state = f"{self._state.partition('   0:00 left')[0]}   {outcome}"
        self._state += f" after {spent // 60}:{spent % 60:02}"
        self._show()
        if self._live:
            print(flush=True)

    def _show(self) -> None:
        line = f"{self._label} {self._state}"
        if line == self._last and not self._live:  # a start that takes its time is said once
            return
        over = " " * (len(self._last) - len(line))
        self._last = line
        if self._live:
            print(f"\r{line}{over}", end="", flush=True)
        else:
            print(line, flush=True)
