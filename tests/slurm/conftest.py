"""A Slurm cluster and two ssh hosts for every test that asks, fresh ones: they start in seconds."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hosts import TwoHosts
from slurm import SlurmCluster
from trajectory import undisturbed


@pytest.fixture(autouse=True, scope="session")
def _machine() -> None:
    """Skips everything, with the reason, where namespaces or programs are missing."""
    check = [str(Path(__file__).with_name("install.sh")), "--check"]
    done = subprocess.run(check, capture_output=True, text=True, timeout=60)
    if done.returncode:
        pytest.skip(done.stdout.strip() or done.stderr.strip())


@pytest.fixture
def slurm() -> Iterator[SlurmCluster]:
    """Two nodes, n1 and n2."""
    with SlurmCluster() as cluster:
        yield cluster


@pytest.fixture
def hosts() -> Iterator[TwoHosts]:
    """Two hosts, host1 and host2, reached with ssh."""
    with TwoHosts() as two:
        yield two


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two data-parallel ranks are compared with."""
    return undisturbed(tmp_path_factory.mktemp("reference") / "run")
