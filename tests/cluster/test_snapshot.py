"""examples/snapshot.sh: the code that a run goes on with, whatever becomes of the checkout."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launch import REPOSITORY

PARTS = ("megatron_xielu", "examples", "pyproject.toml")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The repository, as far as a run needs it."""
    folder, ignored = tmp_path / "checkout", shutil.ignore_patterns("__pycache__")
    for part in PARTS[:2]:
        shutil.copytree(REPOSITORY / part, folder / part, ignore=ignored)
    shutil.copy(REPOSITORY / PARTS[2], folder)
    return folder


def snapshot(home: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    script = [str(home / "examples/snapshot.sh"), *map(str, arguments)]
    return subprocess.run(script, capture_output=True, text=True, timeout=60)


def taken(home: Path, *arguments: object) -> Path:
    done = snapshot(home, *arguments)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return Path(done.stdout.removesuffix("\n"))


def test_the_copy_runs_wherever_it_is_started(checkout, tmp_path):
    """Neither the folder that it is started in nor a package that is installed, as here by
    `make setup` in place, comes before it."""
    code = taken(checkout, tmp_path / "a run's $folder")
    for file in (checkout / "megatron_xielu").rglob("*.py"):
        file.write_text("raise SystemExit('the code has changed')")
    model = tmp_path / "model.sh"
    where = "import megatron_xielu.plan as p; print(p.__file__)"
    model.write_text(f'source "$here/models/debug.sh"\n"$PYTHON" -c "{where}" >>"{tmp_path}/where"')
    done = subprocess.run(
        [str(code / "examples/pretrain.sh"), "--dry-run"],
        cwd=checkout,
        env={"PATH": os.environ["PATH"], "PYTHON": sys.executable, "MODEL": str(model)}
        | {"MOCK_DATA": "1", "DEVICE": "cpu", "GPUS_PER_NODE": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    imported = {Path(line).resolve() for line in (tmp_path / "where").read_text().splitlines()}
    assert imported == {code / "megatron_xielu/plan/__init__.py"}


def test_links_and_folders_that_nobody_may_write_to(checkout, tmp_path):
    """A model of one's own behind a link; a checkout that is installed for all users."""
    model = tmp_path / "mine.sh"
    model.write_text(": ")
    (checkout / "examples/models/mine.sh").symlink_to(model)
    shutil.move(checkout / "megatron_xielu", tmp_path / "package")
    (checkout / "megatron_xielu").symlink_to(tmp_path / "package")
    for folder in (checkout / "examples", checkout / "examples/models", tmp_path / "package"):
        folder.chmod(0o555)
    code = taken(checkout, tmp_path / "run")
    assert (code / "examples/models/mine.sh").read_text() == ": "
    assert (code / "megatron_xielu/pretrain_gpt.py").is_file()
    assert not any(path.is_symlink() for path in code.rglob("*"))
    assert (code / "examples").stat().st_mode & 0o200
    model.write_text("exit 1")
    assert taken(checkout, tmp_path / "run") != code


def test_same_code_same_copy(checkout, tmp_path):
    run = tmp_path / "run"
    named = taken(checkout, "--dry-run", run)
    assert named.parent == run / "code" and not run.exists()
    (checkout / "megatron_xielu/__pycache__").mkdir()
    (checkout / "megatron_xielu/__pycache__/x.pyc").touch()
    (checkout / ".git").mkdir()
    assert taken(checkout, run) == named == taken(checkout, run) == taken(named, tmp_path / "other")
    assert [path.name for path in run.glob("code/*")] == [named.name]
    copied = {path.name for path in named.iterdir()}
    assert copied == set(PARTS) and not list(named.rglob("__pycache__"))
    (checkout / "examples/models/debug.sh").rename(checkout / "examples/models/other.sh")
    assert taken(checkout, run) != named


def test_what_is_no_copy(checkout, tmp_path):
    """In one line: damaged, lost files, no place for one, no repository."""
    code = taken(checkout, tmp_path / "run")
    (code / "megatron_xielu/catalog.py").unlink()
    for home, run in ((code, "run"), (checkout, "run")):
        done = snapshot(home, tmp_path / run)
        assert f"{code} has been changed, or lost files" in done.stderr
        assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1
    (tmp_path / "file").touch()
    done = snapshot(checkout, tmp_path / "file/run")
    assert done.returncode == 2 and "run cannot be written to" in done.stderr
    done = snapshot(checkout, tmp_path / "a:run")
    assert (done.returncode, done.stdout) == (0, f"{checkout}\n") and "has a colon" in done.stderr
    assert not (tmp_path / "a:run").exists()
    shutil.rmtree(checkout / "megatron_xielu")
    done = snapshot(checkout, tmp_path / "other")
    assert done.returncode == 2 and "is not the whole repository" in done.stderr
    assert done.stderr.count("\n") == 1
