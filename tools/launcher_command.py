"""What `examples/pretrain.sh` would give Megatron, for tools that plan or walk its commands."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

_LAUNCHER = Path(__file__).resolve().parents[1] / "examples" / "pretrain.sh"
_ENTRY = "megatron_xielu.pretrain_gpt"


def megatron_arguments(*flags: str, **environment: str) -> list[str]:
    """Of a dry run with these variables alone, and flags of Megatron's that are added.

    Raises:
        SystemExit: pretrain.sh refuses; with what it says.
    """
    done = subprocess.run(
        [str(_LAUNCHER), "--dry-run", *flags],
        env={"PATH": os.environ["PATH"], "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
    )
    command = printed_command(done.stdout)
    if _ENTRY not in command:
        raise SystemExit(f"{_LAUNCHER} --dry-run failed:\n{done.stdout}{done.stderr}")
    return command[command.index(_ENTRY) + 1 :]


def printed_command(dry_run: str) -> list[str]:
    """The words of the command in what a dry run printed."""
    return shlex.split(dry_run.partition("\n\n")[0].replace("\\\n", ""))
