"""Real Megatron releases for the tests: wheels from the package index, unpacked.

They are kept in ``.cache/wheels`` of the repository, so that one download serves every run.
"""

from __future__ import annotations

import fcntl
import functools
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from launch import REPOSITORY, Run, train

from megatron_xielu import patch

RELEASES = ("0.17.1", "0.18.2", "0.19.2")

_CACHE = REPOSITORY / ".cache" / "wheels"


def unpack(version: str, folder: Path) -> Path:
    """Unpack the wheel of a Megatron release into ``folder``, and return it."""
    with zipfile.ZipFile(_download(version)) as wheel:
        wheel.extractall(folder)
    return folder


@functools.cache
def patched(version: str) -> Path:
    """The tree of a release with the patch applied; not to be changed."""
    tree = unpack(version, Path(_trees().name, version))
    patch.apply(tree)
    return tree


@functools.cache
def _trees() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory()


def _download(version: str) -> Path:
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    pattern = f"megatron_core-{version}-*{tag}*.whl"
    _CACHE.mkdir(parents=True, exist_ok=True)
    with (_CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test files run in several processes
        if not (found := list(_CACHE.glob(pattern))):
            beside = _CACHE / "incomplete"
            shutil.rmtree(beside, ignore_errors=True)
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            command += ["--only-binary", ":all:", "--dest", str(beside)]
            subprocess.run([*command, f"megatron-core=={version}"], check=True)
            for wheel in beside.iterdir():
                wheel.rename(_CACHE / wheel.name)
            found = list(_CACHE.glob(pattern))
        return found[0]


def train_stock(folder: Path, version: str, tree: Path, flags: str, **options) -> Run:
    """Train stock_script.py with the Megatron of ``tree``; it knows nothing of this package.

    See `launch.train` for the rest.
    """
    # In 0.17 the end-of-document token comes on top of --vocab-size: the same data needs one less.
    same_data = "--vocab-size 126 " if version.startswith("0.17.") else ""
    run = train(
        folder,
        same_data + flags,
        command=["-m", "megatron_xielu.cpu", str(REPOSITORY / "tests/helpers/stock_script.py")],
        environment={"PYTHONPATH": f"{tree}:{REPOSITORY}:{REPOSITORY / 'tests/helpers'}"},
        **options,
    )
    assert f"Megatron {version} of {tree}/megatron" in run.output
    return run
