"""`megatron_xielu.patch`: what it does to a tree, and what it leaves alone.

On the real files of the three wheels; that the patched trees train is in test_versions.py.
"""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from launch import REPOSITORY
from megatron_wheels import RELEASES, unpack

from megatron_xielu import patch

PATCHES = {p.name: p for p in patch.load_patches()}
MAIN = "megatron-lm-main-d98e8a64.patch"
FILES = list(PATCHES[MAIN].files)


@pytest.fixture(scope="module", params=RELEASES)
def release(request, tmp_path_factory):
    """A wheel's version and the files that a patch looks at."""
    folder = tmp_path_factory.mktemp("release")
    wheel = unpack(request.param, folder / "wheel")
    for name in [*FILES, "megatron/core/package_info.py"]:
        (folder / "small" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(wheel / name, folder / "small" / name)
    shutil.rmtree(wheel)
    return request.param, folder / "small"


@pytest.fixture
def tree(release, tmp_path):
    """A copy to change."""
    return Path(shutil.copytree(release[1], tmp_path / "megatron-lm"))


@pytest.fixture
def run(capsys):
    """The command: its exit status, and what it printed."""

    def main(option: str, tree: Path) -> tuple[int, str]:
        status = patch.main([option, str(tree)])
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return main


def contents(tree: Path) -> dict[str, tuple[int, bytes]]:
    """Mode and bytes of every file, also of hidden ones."""
    return {
        str(file.relative_to(tree)): (file.stat().st_mode, file.read_bytes())
        for file in tree.rglob("*")
        if file.is_file()
    }


def replace(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def test_apply_and_revert(release, tree, run):
    name = f"megatron-lm-{release[0]}.patch"
    (tree / FILES[0]).chmod(0o755)
    before = contents(tree)
    assert run("--check", tree) == (0, f"not applied: {name} fits\n")
    assert run("--revert", tree) == (0, f"not applied, nothing to revert: {name}\n")
    assert contents(tree) == before

    assert run("--apply", tree) == (0, f"applied: {name}\n")
    patched = contents(tree)
    assert {file for file in patched if patched[file] != before[file]} == set(FILES)
    assert all(patched[file][0] == before[file][0] for file in before)
    assert run("--check", tree) == (0, f"applied: {name}\n")
    assert run("--apply", tree) == (0, f"already applied: {name}\n")
    assert contents(tree) == patched

    assert run("--revert", tree) == (0, f"reverted: {name}\n")
    assert contents(tree) == before


def test_as_git_does(release, tree, tmp_path):
    by_git = shutil.copytree(tree, tmp_path / "by_git")
    file = REPOSITORY / "patches" / f"megatron-lm-{release[0]}.patch"
    subprocess.run(["git", "apply", str(file)], cwd=by_git, check=True)
    patch.apply(tree)
    assert contents(tree) == contents(by_git)


def test_own_changes_elsewhere_stay(tree):
    for name in FILES:
        (tree / name).write_text("# ours\n" * 7 + (tree / name).read_text() + "# ours")
    before = contents(tree)
    patch.apply(tree)
    patch.revert(tree)
    assert contents(tree) == before


def test_windows_line_ends_and_links_stay(tree, tmp_path):
    for name in FILES:
        (tree / name).write_bytes((tree / name).read_bytes().replace(b"\n", b"\r\n"))
    linked = tmp_path / "elsewhere.py"
    (tree / FILES[0]).rename(linked)
    (tree / FILES[0]).symlink_to(linked)
    before = contents(tree)
    patch.apply(tree)
    assert all(
        line.endswith(b"\r") for name in FILES for line in contents(tree)[name][1].split(b"\n")[:-1]
    )
    assert (tree / FILES[0]).is_symlink()
    patch.revert(tree)
    assert contents(tree) == before


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        # A context line that is another; the lines twice, and neither where they were.
        ("megatron/training/checkpointing.py", "_set_arg('num_layers')", "_set_arg('layers')"),
        ("megatron/training/arguments.py", "# Prep for", "# Prepare for"),
        ("megatron/core/models/gpt/gpt_model.py", None, None),
    ],
)
def test_refuses_what_does_not_fit(name, old, new, tree, run):
    if old == "# Prep for" and old not in (tree / name).read_text():  # 0.17
        old, new = "    # Temporary\n", "    # For now\n"
    if old is None:
        text = (tree / name).read_text()
        (tree / name).write_text("#\n" + text + text)
    else:
        replace(tree / name, old, new)
    before = contents(tree)
    for option in ("--check", "--apply", "--revert"):
        status, printed = run(option, tree)
        assert status == 1 and printed.count("\n") == 1
        assert f"does not fit {tree}" in printed and f"{name}: hunk @@ -" in printed
        assert contents(tree) == before


def test_refuses_what_it_does_not_know(tree, run):
    file = tree / "megatron/core/package_info.py"
    replace(file, "MINOR = ", "MINOR = 1")
    status, printed = run("--apply", tree)
    assert status == 1 and "there are patches for 0.17.1 (megatron-lm-0.17.1.patch), " in printed
    file.unlink()
    status, printed = run("--apply", tree)
    assert status == 1 and "no megatron/core/package_info.py" in printed


VERSION = b"MAJOR = 0\r\nMINOR = 19\r\nPATCH = 2\r\n"


def _loop(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize(
    ("version", "make_file", "message"),
    [
        (b"", Path.touch, "package_info.py names no version"),
        (b"\xff\xfe", Path.touch, "package_info.py names no version"),
        (b"\0" * 9, Path.touch, "package_info.py names no version"),
        (VERSION.replace(b"2", "٢".encode()), Path.touch, "package_info.py names no version"),
        (VERSION.replace(b"19", b"9" * 5000), Path.touch, "package_info.py names no version"),
        (None, Path.touch, "no megatron/core/package_info.py in "),
        *(
            (VERSION, make, f"does not fit {{tree}} (Megatron 0.19.2): {FILES[0]}: {why}")
            for make, why in ((Path.touch, "hunk"), (Path.mkdir, "Is a dir"), (_loop, "Too many"))
        ),
    ],
)
def test_trees_that_are_none(version, make_file, message, tmp_path, run):
    """The version file, and behind a good one (with the line ends of Windows) a file to patch."""
    path = tmp_path / "megatron/core/package_info.py"
    path.parent.mkdir(parents=True)
    path.mkdir() if version is None else path.write_bytes(version)
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        make_file(tmp_path / name)
    for option in ("--check", "--apply", "--revert"):
        status, printed = run(option, tmp_path)
        assert status == 1 and printed.count("\n") == 1
        assert message.format(tree=tmp_path) in printed


@pytest.mark.parametrize("root", ["file", "loop", "x" * 300, "a\nb"])
def test_no_tree(root, tmp_path, run):
    (tmp_path / "file").touch()
    _loop(tmp_path / "loop")
    status, printed = run("--apply", tmp_path / root)
    assert status == 1 and printed.count("\n") == 1
    assert "no megatron/core/package_info.py in" in printed


@pytest.mark.parametrize("action", [patch.apply, patch.revert])
def test_a_failure_leaves_nothing_half_done(action, tree, monkeypatch):
    if action is patch.revert:
        patch.apply(tree)
    before = contents(tree)
    rename = os.replace

    def fail_at_the_third(old, new):
        if Path(new).name == Path(FILES[2]).name:
            raise OSError("the disk is gone")
        rename(old, new)

    monkeypatch.setattr(os, "replace", fail_at_the_third)
    with pytest.raises(OSError, match="the disk is gone"):
        action(tree)
    assert contents(tree) == before


@pytest.mark.parametrize("then", ["--apply", "--revert"])
def test_a_killed_process_is_healed(then, tree, run):
    before = contents(tree)
    killed_at_the_third = (
        "import os, sys; from megatron_xielu import patch; from pathlib import Path; "
        "rename, count = os.replace, iter(range(9)); "
        "os.replace = lambda *a: os._exit(9) if next(count) == 2 else rename(*a); "
        "patch.apply(Path(sys.argv[1]))"
    )
    done = subprocess.run([sys.executable, "-c", killed_at_the_third, tree], cwd=REPOSITORY)
    assert done.returncode == 9
    status, printed = run("--check", tree)
    assert status == 1 and "is half applied" in printed
    assert run(then, tree)[0] == 0
    if then == "--apply":
        assert run("--check", tree)[0] == 0 and run("--revert", tree)[0] == 0
    assert contents(tree) == before


def test_patches_are_small_and_alike():
    """Only under megatron/, only additions, the same in all of them."""
    added = set()
    for one in PATCHES.values():
        assert all(name.startswith("megatron/") for name in one.files)
        hunks = [hunk for hunks in one.files.values() for hunk in hunks]
        lines = (REPOSITORY / "patches" / one.name).read_text().splitlines()
        assert not [line for line in lines if line.startswith("-") and line[:4] != "--- "]
        added.add(tuple(line for line in lines if line.startswith("+") and line[:4] != "+++ "))
        assert len(hunks) == 7
    assert len(added) == 1 and len(added.pop()) == 32
    assert set(PATCHES) == {MAIN, *(f"megatron-lm-{version}.patch" for version in RELEASES)}
    # Applied and trained by hand: patches/README.md.
    assert PATCHES[MAIN].version == "0.20.0"


def test_needs_nothing_but_python():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "megatron_xielu.patch", "--check", "."],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "megatron_xielu.patch" in done.stderr
    assert not any(f" {name}" in done.stderr for name in ("torch\n", "megatron\n", "megatron.core"))


def test_installed_with_the_package():
    """pyproject.toml lists packages, since one of them is a folder elsewhere."""
    setuptools = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]
    there = {
        str(file.parent.relative_to(REPOSITORY)).replace("/", ".")
        for file in (REPOSITORY / "megatron_xielu").rglob("__init__.py")
    }
    assert set(setuptools["packages"]) == there | {"megatron_xielu.patches"}
    assert setuptools["package-dir"]["megatron_xielu.patches"] == "patches"
    template = "megatron_xielu/report/page.html.jinja"
    assert (REPOSITORY / template).exists()
    assert setuptools["package-data"]["megatron_xielu.report"] == ["page.html.jinja"]
    assert "!patches" in (REPOSITORY / ".dockerignore").read_text().split()
