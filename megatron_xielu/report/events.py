"""Reads TensorBoard event files as a training of several attempts leaves them.

TensorBoard's own reader verifies checksums in Python and keeps an object a number: for the alphas
of 24 layers over 100,000 iterations that is minutes and gigabytes. Here a file is walked record by
record, numbers go into arrays, and of the many alphas a caller may ask for fewer.
"""

from __future__ import annotations

import mmap
import struct
from array import array
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

PATTERN = "*tfevents*"

Curve = list[tuple[int, float]]  # (iteration, value), iterations rising
_Column = tuple[array, array, array]  # of a tag: iterations, values, times

_LOSS, _LOSS_BY_SAMPLES, _CONSUMED = "lm loss", "lm loss vs samples", "consumed samples"
_BY_SAMPLES = " vs samples"
# A record is its length (8 bytes), the length's checksum (4), the event, and its checksum (4).
_LENGTH, _HEADER, _FOOTER = struct.Struct("<Q"), 12, 4
_LARGEST_EVENT = 2**28  # a longer length is no length
_LAST_ITERATION = 2**53  # a later one is none
_WIDE = 500  # bytes; longer events are those of `alpha_logging`, with the numbers of every layer


@dataclass(frozen=True)
class Series:
    """A curve, [t] each: iterations rising, values, and when they were written (seconds, Unix)."""

    steps: NDArray[np.int64]
    values: NDArray[np.float64]
    times: NDArray[np.float64]


@dataclass(frozen=True)
class Events:
    """What event files hold.

    Attributes:
        scalars: by tag. Tags on Megatron's second axis (``… vs samples``) are left out.
        samples: consumed samples by iteration; empty if the files do not say.
        texts: by tag; Megatron writes its arguments there.
        problems: one line for every file that could not be read to its end, and for clocks that
            contradict what they hold.
    """

    scalars: dict[str, Series]
    samples: Series
    texts: dict[str, str]
    problems: list[str]


def read(
    files: Collection[Path], *, wide_limit: int | None = None, keep: Collection[int] = ()
) -> Events:
    """Read the event files of one run.

    Where a resumed training repeats iterations, what an earlier attempt wrote from there on is
    dropped, under every tag: also a validation that the later one has not come to yet. Which came
    later is `_in_order`. Megatron writes the loss on the test set under the tag of the validation
    loss, after it and at the same iteration: the first of them is kept.

    Args:
        files: in any order.
        wide_limit: about how many of a file's events with the alphas of many layers are read,
            evenly spaced, with the last; None for all.
        keep: iterations whose alphas are read all the same.
    """
    problems: list[str] = []
    attempts = [_read(path, wide_limit, keep, problems) for path in sorted(files)]
    attempts = _in_order(attempts, problems)
    starts = [attempt.start for attempt in attempts]
    later = np.minimum.accumulate([_LAST_ITERATION + 1, *starts[:0:-1]])[::-1]
    tags = dict.fromkeys(tag for attempt in attempts for tag in attempt.columns)
    scalars = {tag: _last_attempt([a.columns.get(tag) for a in attempts], later) for tag in tags}
    consumed = scalars.pop(_CONSUMED, None) or _last_attempt([], later)
    left = {tag: series for tag, series in scalars.items() if len(series.steps)}
    texts = {tag: text for attempt in attempts for tag, text in attempt.texts.items()}
    return Events(left, consumed, texts, problems)


def read_events(folder: Path) -> dict[str, Curve]:
    """All scalars of a folder by tag, as the last attempt of a resumed training has them."""
    scalars = read(list(folder.glob(PATTERN))).scalars
    return {
        tag: list(zip(series.steps.tolist(), series.values.tolist(), strict=True))
        for tag, series in scalars.items()
    }


@dataclass
class _Attempt:
    """What one file holds; times are of the clock of the node that wrote it."""

    path: Path
    columns: dict[str, _Column]
    texts: dict[str, str]
    began: float = 0.0
    ended: float = 0.0

    @property
    def losses(self) -> _Column | None:
        """Of the training; None in a file that has none."""
        return self.columns.get(_LOSS)

    @property
    def start(self) -> int:
        """Its first iteration that was logged; beyond all where there is none."""
        return min(self.losses[0]) if self.losses else _LAST_ITERATION + 1


def _read(
    path: Path, wide_limit: int | None, keep: Collection[int], problems: list[str]
) -> _Attempt:
    columns: dict[str, _Column] = defaultdict(lambda: (array("q"), array("d"), array("d")))
    found = _Attempt(path, columns, {})
    passed_over, last_loss = _passed_over(path, wide_limit), -1
    for start, event in _events(path, problems):
        step, time = event.step, event.wall_time
        found.began = found.began or time
        found.ended = time
        if start in passed_over and step not in keep:
            continue
        for value in event.summary.value:
            tag = value.tag
            if not value.HasField("simple_value"):
                if value.tensor.string_val:
                    text = value.tensor.string_val[0].decode(errors="replace")
                    found.texts[tag.removesuffix("/text_summary")] = text
                continue
            if tag == _LOSS:
                last_loss = step
            elif tag == _LOSS_BY_SAMPLES and last_loss >= 0:
                _append(columns[_CONSUMED], last_loss, step, time)
                continue
            if tag.endswith(_BY_SAMPLES):
                continue
            if " validation" in tag and tag in columns and columns[tag][0][-1] == step:
                continue  # the test set
            _append(columns[tag], step, value.simple_value, time)
    return found


def _append(column: _Column, step: int, value: float, time: float) -> None:
    for part, entry in zip(column, (step, value, time), strict=True):
        part.append(entry)


def _in_order(attempts: list[_Attempt], problems: list[str]) -> list[_Attempt]:
    """Attempts as they came one after the other.

    By their clocks, which may have been set back, or be of different nodes: so one that goes on
    from an iteration that none before it came to stands behind one that can have come first. Where
    the clocks cannot be right, that is a problem of the run.
    """
    left = sorted(attempts, key=lambda attempt: (attempt.began, attempt.path.name))
    gaps = [np.diff(a.losses[0]) for a in left if a.losses and len(a.losses[0]) > 1]
    gap = max((float(np.median(gap)) for gap in gaps), default=np.inf)  # between logged iterations
    order: list[_Attempt] = []
    moved: dict[Path, str] = {}
    reached = 0
    while left:
        can = [a for a in left if a.losses is None or a.start <= reached + gap]
        following = can[0] if can else left[0]
        for skipped in left[: left.index(following)]:
            moved[skipped.path] = (
                f"{skipped.path.name} goes on from about iteration {skipped.start - 1}, which no "
                f"file before it by its clock came to: it is shown as later than "
                f"{following.path.name}"
            )
        last = next((a for a in reversed(order) if a.losses and following.losses), None)
        if last and last.began <= following.began < last.ended:
            problems.append(
                f"{last.path.name} and {following.path.name} are of the same time by their clocks: "
                f"where both have an iteration, the second is shown"
            )
        left.remove(following)
        order.append(following)
        reached = max([reached, *(following.losses[0] if following.losses else ())])
    problems.extend(moved.values())
    return order


def _last_attempt(columns: Sequence[_Column | None], later: NDArray[np.int64]) -> Series:
    """Without what a later attempt, which began at or before it, repeats or has not reached.

    Args:
        columns: of one tag, by attempt.
        later: by attempt, where those after it began to train.
    """
    there = [(number, column) for number, column in enumerate(columns) if column]
    empty = (array("q"), array("d"), array("d"))
    steps, values, times = (
        np.concatenate([np.array(part) for part in parts])
        for parts in zip(empty, *(column for _, column in there), strict=True)
    )
    limit = np.repeat([later[n] for n, _ in there], [len(column[0]) for _, column in there])
    following = np.append(steps[1:], np.iinfo(np.int64).max)
    kept = steps < np.minimum.accumulate(following[::-1])[::-1]
    kept &= steps < limit
    return Series(steps[kept], values[kept], times[kept])


def _frames(content: Any) -> Iterator[tuple[int, int]]:
    """(start, length) of every whole record; the last may still be being written."""
    at, size = 0, len(content)
    while at + _HEADER <= size:
        (length,) = _LENGTH.unpack_from(content, at)
        if length > _LARGEST_EVENT:
            raise ValueError(at)
        if at + _HEADER + length + _FOOTER > size:
            return
        yield at + _HEADER, length
        at += _HEADER + length + _FOOTER


def _open(path: Path) -> Any:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""


def _events(path: Path, problems: list[str]) -> Iterator[tuple[int, Any]]:
    """(where its record starts, event)."""
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event

    start = 0
    try:
        content = _open(path)
        for start, length in _frames(content):
            event = Event.FromString(content[start : start + length])
            if not 0 <= event.step <= _LAST_ITERATION:
                raise ValueError(event.step)
            yield start, event
    except OSError as error:
        problems.append(f"{path} cannot be read: {error.strerror}")
    except (DecodeError, ValueError):
        problems.append(f"{path} is damaged after byte {start}; what follows is not read")


def _passed_over(path: Path, limit: int | None) -> set[int]:
    """Places of the wide events in a file that need not be read."""
    wide = []
    with suppress(ValueError, OSError):  # `_events` says it
        for start, length in _frames(_open(path)):
            if length > _WIDE:
                wide.append(start)
    stride = max(1, -(-len(wide) // limit)) if limit else 1
    return set(wide) - set(wide[::stride]) - set(wide[-1:])
