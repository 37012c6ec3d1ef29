"""A disk that is soon full: what a checkpoint does then is tested on it."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def small_disk(path: Path, mebibytes: int) -> Iterator[Path]:
    """A tmpfs of ``mebibytes`` MiB at ``path``, a folder that is made when missing; needs root.

    Below the folder of a running `SlurmCluster` or `TwoHosts` it is one disk for all hosts. At the
    end it goes with its files, even those still open.
    """
    path.mkdir(parents=True, exist_ok=True)
    options = ["-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(path)]
    subprocess.run(["mount", *options], check=True, timeout=20)
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True, timeout=20)
