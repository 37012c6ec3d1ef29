"""Puts ``--xielu`` and ``--xiprelu`` into a Megatron-LM checkout, and takes them out again.

    python -m megatron_xielu.patch --check PATH | --apply PATH | --revert PATH

PATH is a checkout, or any folder that holds ``megatron/`` (site-packages). The patch is chosen by
the version in ``megatron/core/package_info.py``; ``patches/README.md`` explains every hunk.

A hunk fits where its lines are found exactly, with all of their context: at its line, or, in a file
that has changed elsewhere, at the only place where they are. Everything is worked out in memory
first; files are then written beside and renamed, and put back if that fails half-way. A process
killed between two renames leaves some files patched: ``--check`` says so, ``--apply`` and
``--revert`` finish the job.

Why not ``git apply``: it may be missing, and in a folder inside another repository it skips files
without a word. Other appliers tolerate lines that differ. Needs nothing but Python.

Exit status: 0 done, or nothing to do; 1 the tree does not fit, or could not be written.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_xielu.common.text import one_line, ready_output
from megatron_xielu.workarounds import releases

# Top level in a checkout of this package; its subpackage in an installation (pyproject.toml).
_FOLDERS = (Path(__file__).with_name("patches"), Path(__file__).parents[1] / "patches")


class DoesNotFit(Exception):
    """The tree is none that a patch was made for; the message names file and hunk, or version."""


@dataclass
class Hunk:
    """One change: lines without their ends."""

    start: int  # counted from 0, in the file that the patch was made for
    before: list[bytes] = field(default_factory=list)
    after: list[bytes] = field(default_factory=list)
    header: str = ""


@dataclass
class Patch:
    """One patch file: the Megatron-LM version of its first line, and hunks by file."""

    name: str
    version: str
    files: dict[str, list[Hunk]]


def load_patches() -> list[Patch]:
    """Every patch that comes with this package."""
    folder = next((f for f in _FOLDERS if f.is_dir()), _FOLDERS[0])
    patches = [parse(path.name, path.read_bytes()) for path in sorted(folder.glob("*.patch"))]
    if not patches:
        raise DoesNotFit(f"no patches in {folder}: this package is not installed completely")
    return patches


def parse(name: str, content: bytes) -> Patch:
    """Read a unified diff whose first line names a version (``Megatron-LM 0.19.2 …``).

    Raises:
        ValueError: it is anything more than that; ours are not.
    """
    lines = content.split(b"\n")
    version = re.match(rb"Megatron-LM (\d+\.\d+\.\d+)\b", lines[0])
    if version is None or lines.pop() != b"":
        raise ValueError(f"{name}: its first line names no version, or its last has no end")
    files: dict[str, list[Hunk]] = {}
    hunks: list[Hunk] | None = None
    old = new = 0  # lines still to come in this hunk
    for line in lines[1:]:
        if old or new:
            mark, text = line[:1], line[1:]
            if mark not in (b" ", b"-", b"+") or hunks is None:
                raise ValueError(f"{name}: unexpected line in a hunk: {line!r}")
            if mark != b"+":
                hunks[-1].before.append(text)
                old -= 1
            if mark != b"-":
                hunks[-1].after.append(text)
                new -= 1
        elif line.startswith(b"+++ b/"):
            hunks = files.setdefault(line[6:].decode(), [])
        elif header := re.match(rb"@@ -(\d+),(\d+) \+\d+,(\d+) @@", line):
            if hunks is None:
                raise ValueError(f"{name}: a hunk of no file")
            start, old, new = (int(number) for number in header.groups())
            hunks.append(Hunk(start - 1, header=line.decode()))
    if old or new or not files:
        raise ValueError(f"{name} is cut off")
    return Patch(name, version[1].decode(), files)


def transform(content: bytes, hunks: Sequence[Hunk], *, reverse: bool) -> bytes:
    """``content`` with all hunks applied, or taken out again.

    Inserted lines end as those around them do.

    Raises:
        DoesNotFit: naming the first hunk that has no place, or several.
    """
    *lines, rest = content.split(b"\n")  # each without its line feed; rest is after the last one
    shift = end = 0  # how far the hunks so far have moved what follows, and where they ended
    for hunk in hunks:
        old, new = (hunk.after, hunk.before) if reverse else (hunk.before, hunk.after)
        start = _place(lines, old, hunk.start + shift, end)
        if start is None:
            raise DoesNotFit(f"hunk {hunk.header}: its lines are not there, or more than once")
        same = _common(old, new)  # context keeps its own line ends
        same_after = _common(old[same:][::-1], new[same:][::-1])
        carriage_return = b"\r" if lines[start].endswith(b"\r") else b""
        lines[start + same : start + len(old) - same_after] = [
            line + carriage_return for line in new[same : len(new) - same_after]
        ]
        shift += len(new) - len(old)
        end = start + len(new)
    return b"\n".join([*lines, rest])


def _common(a: list[bytes], b: list[bytes]) -> int:
    """How many lines both start with."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def _place(lines: list[bytes], wanted: list[bytes], expected: int, first: int) -> int | None:
    """Where ``wanted`` is in ``lines``, from ``first`` on: as expected, or else the only place."""
    bare = [line.removesuffix(b"\r") for line in lines]
    last = len(bare) - len(wanted)
    places = [i for i in range(first, last + 1) if bare[i : i + len(wanted)] == wanted]
    if expected in places:
        return expected
    return places[0] if len(places) == 1 else None


@dataclass
class State:
    """What a patch finds in a tree: per file its content, and what it would become."""

    patch: Patch
    unpatched: dict[Path, tuple[bytes, bytes]] = field(default_factory=dict)  # now, patched
    patched: dict[Path, tuple[bytes, bytes]] = field(default_factory=dict)  # now, unpatched


def inspect(root: Path, patch: Patch) -> State:
    """Which files of ``root`` have ``patch`` and which have not.

    Raises:
        DoesNotFit: a file has neither all hunks nor none of them.
    """
    state = State(patch)
    for name, hunks in patch.files.items():
        path = Path(os.path.realpath(root / name))  # of a link, the file is replaced
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DoesNotFit(f"{name}: {error.strerror}") from None
        try:
            state.patched[path] = (content, transform(content, hunks, reverse=True))
            continue
        except DoesNotFit:
            pass
        try:
            state.unpatched[path] = (content, transform(content, hunks, reverse=False))
        except DoesNotFit as error:
            raise DoesNotFit(f"{name}: {error}") from None
    return state


def find_patch(root: Path) -> State:
    """The patch for the Megatron in ``root``: made for its version, or for its release series.

    Raises:
        DoesNotFit: there is none for this version, or it does not match.
    """
    try:
        version = releases.version_in(root)
    except releases.UnsupportedRelease as error:
        raise DoesNotFit(str(error)) from None
    patches = load_patches()
    series = version.rsplit(".", 1)[0]
    candidates = [p for p in patches if p.version.rsplit(".", 1)[0] == series]
    candidates.sort(key=lambda p: p.version != version)
    if not candidates:
        raise DoesNotFit(
            f"{root} is Megatron {version}; there are patches for "
            + ", ".join(f"{p.version} ({p.name})" for p in patches)
        )
    errors = []
    for patch in candidates:
        try:
            return inspect(root, patch)
        except DoesNotFit as error:
            errors.append(f"{patch.name} does not fit {root} (Megatron {version}): {error}")
    raise DoesNotFit(errors[0])


def _write(changes: dict[Path, tuple[bytes, bytes]], state: State) -> None:
    """Give every file its new content (the second of its pair), or leave all as they were.

    Removes what a killed process has left beside any file of the patch.

    Raises:
        OSError: a file could not be written; those written before are back.
    """
    done = []
    try:
        for path, (_, new) in changes.items():
            _write_beside(path, new)
        for path in changes:
            done.append(path)
            os.replace(_beside(path), path)
    except BaseException:
        for path in done:
            _write_beside(path, changes[path][0])
            os.replace(_beside(path), path)
        raise
    finally:
        for path in (*state.patched, *state.unpatched):
            with contextlib.suppress(OSError):
                _beside(path).unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.megatron_xielu")


def _write_beside(path: Path, content: bytes) -> None:
    with _beside(path).open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    shutil.copymode(path, _beside(path))


def check(root: Path) -> str:
    """Say what there is; raises as `find_patch`, and where only some files are patched."""
    state = find_patch(root)
    if state.patched and state.unpatched:
        names = ", ".join(str(path) for path in state.unpatched)
        raise DoesNotFit(
            f"{state.patch.name} is half applied: {names} lacks it; "
            "--apply or --revert finishes the job"
        )
    if state.patched:
        return f"applied: {state.patch.name}"
    return f"not applied: {state.patch.name} fits"


def apply(root: Path) -> str:
    """Patch the tree; raises as `find_patch`, or OSError with nothing changed."""
    state = find_patch(root)
    _write(state.unpatched, state)
    return f"{'applied' if state.unpatched else 'already applied'}: {state.patch.name}"


def revert(root: Path) -> str:
    """Take the patch out; raises as `find_patch`, or OSError with nothing changed."""
    state = find_patch(root)
    _write(state.patched, state)
    done = "reverted" if state.patched else "not applied, nothing to revert"
    return f"{done}: {state.patch.name}"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line above."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_xielu.patch",
        description="Put --xielu and --xiprelu into a Megatron-LM checkout.",
    )
    action = parser.add_mutually_exclusive_group(required=True)
    for name, text in (
        ("check", "say whether a patch fits, or is applied"),
        ("apply", "patch the tree"),
        ("revert", "take the patch out, to the byte"),
    ):
        action.add_argument(f"--{name}", metavar="PATH", type=Path, help=text)
    args = parser.parse_args(argv)
    for function in (check, apply, revert):
        root = getattr(args, function.__name__)
        if root is not None:
            try:
                print(function(root))
                return 0
            except (DoesNotFit, OSError) as error:
                print(f"megatron_xielu.patch: error: {one_line(error)}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    ready_output()
    sys.exit(main())
