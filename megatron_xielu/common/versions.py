"""What a training is made with, in a line: versions, and the commit of this package's checkout."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

_CHECKOUT = Path(__file__).resolve().parents[2]
_SECONDS = 10  # a file system that takes longer shall not hold a training up


def made_with(own_version: str) -> str:
    """``megatron_xielu 0.1.0 (commit 0123abcdef), Megatron-core 0.19.2, PyTorch …, Python …``."""
    commit = _commit()
    own = f"megatron_xielu {own_version}" + (f" (commit {commit})" if commit else "")
    others = [
        f"{label} {metadata.version(name)}"
        for label, name in (("Megatron-core", "megatron-core"), ("PyTorch", "torch"))
        if _is_installed(name)
    ]
    return ", ".join([own, *others, f"Python {platform.python_version()}"])


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:  # a checkout on the path
        return False
    return True


def _commit() -> str:
    """Of the checkout that is imported, ``-dirty`` where files differ; empty outside of one."""
    if not (_CHECKOUT / ".git").exists():
        return ""
    words = ["git", "-C", str(_CHECKOUT), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        done = subprocess.run(
            [*words, "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
