"""User, password and query of a ``--source`` URL: they give access, and nobody else reads them.

The recipe, the manifest, logs and messages have the URL without them. What is opened is known to
the command alone; tasks, which may be on other machines, find it in work/urls.json, which nobody
but its owner can read, and which goes when the data is finished. So a signed URL that was renewed
is the same source.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from megatron_xielu.common import files, schema
from megatron_xielu.common.text import without_secrets
from megatron_xielu.data.errors import DataError

_real: dict[str, str] = {}  # what this process opens, by what is shown; only where they differ


def hide(source: str) -> str:
    """The source as it may be shown; `real` has the rest."""
    if os.path.lexists(source) or source.startswith("file://"):
        return source
    shown = without_secrets(source)
    _remember(shown, source)
    return shown


def hide_parent(url: str) -> tuple[str, str]:
    """Of a shown URL of a file: its folder, opened by the same user, and its name."""
    folder, _, name = url.rpartition("/")
    _remember(folder, re.split("[?#]", real(url))[0].rpartition("/")[0])
    return folder, name


def real(url: str) -> str:
    """The URL to open."""
    return _real.get(url, url)


def real_path(folder: str, path: str) -> str:
    """The path of a file below its folder, as it is opened."""
    return real(f"{folder}/{path}").removeprefix(f"{real(folder)}/").removeprefix(f"{folder}/")


def _remember(shown: str, url: str) -> None:
    if shown != url and _real.setdefault(shown, url) != url:
        raise DataError(
            f"--source: {shown} is given with two users, passwords or queries; leave one out"
        )


def forget() -> None:
    """Of an earlier command in this process."""
    _real.clear()


def _path(output: Path) -> Path:
    return output / "work" / "urls.json"


def save(output: Path) -> None:
    """For tasks."""
    remove(output)
    if _real:
        with files.whole(_path(output), mode=0o600) as beside:
            beside.write_text(json.dumps(_real) + "\n")


def load(output: Path) -> None:
    """In a task."""
    if _path(output).exists():
        _real.update(schema.load(dict[str, str], _path(output)))


def remove(output: Path) -> None:
    """When there is nothing left to read."""
    _path(output).unlink(missing_ok=True)
