"""Which rank all others wait for, from what each has recorded of its collectives.

A collective ends when every rank of its group has entered it. Where one rank does not, those that
wait for it are waited for themselves, in other groups: the cause is a rank that is waited for and
waits for nobody. What is read here are the flight recorder's entries, PyTorch's own names; a
group's `number` is their ``collective_seq_id``, which counts the calls of that group.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

# Of these every rank's tensors are of the same size; of the others they may differ.
_OF_EQUAL_SIZES = ("all_reduce", "_all_gather_base", "_reduce_scatter_base", "broadcast")

_SEND_OR_RECEIVE = re.compile(r"(?:send (\d+)->(\d+)|recv (\d+)<-(\d+))")
_SHOWN = 8  # ranks, or runs of them, in a line


@dataclass(frozen=True)
class Call:
    """What a rank has called."""

    rank: int
    group: str
    number: int
    operation: str
    sizes: str
    since: int  # nanoseconds since 1970
    state: str
    is_open: bool  # as far as the backend knows
    peer: int | None = None  # of a send or receive, within the group

    @property
    def compared(self) -> tuple[str, str]:
        """What must be the same on all ranks."""
        return self.operation, self.sizes if self.operation in _OF_EQUAL_SIZES else ""

    @property
    def described(self) -> str:
        """Operation and sizes."""
        return f"{self.operation} {self.sizes}"


@dataclass(frozen=True)
class Finding:
    """Who is at fault, and with what."""

    ranks: tuple[int, ...]
    reason: str


class Records:
    """The calls of all ranks that have left a record.

    Raises:
        KeyError, TypeError, ValueError: a record is none of the flight recorder's.
    """

    def __init__(self, dumps: Mapping[int, Mapping[str, Any]]) -> None:
        self.ranks = set(dumps)
        # The recorder keeps the newest calls. What a rank has done in a group of which it has none
        # is known only if its record goes back to its first.
        self.whole = {
            rank
            for rank, dump in dumps.items()
            if min((int(entry.get("record_id", 0)) for entry in dump["entries"]), default=0) == 0
        }
        self.names: dict[str, str] = {}
        self.members: dict[str, list[int]] = {}
        self.calls: dict[str, dict[int, dict[int, Call]]] = defaultdict(lambda: defaultdict(dict))
        self.transfers: list[Call] = []  # sends and receives
        for dump in dumps.values():
            for name, group in dump["pg_config"].items():
                self.names[name] = str(group["desc"])
                self.members[name] = sorted(map(int, ast.literal_eval(str(group["ranks"]))))
        for rank, dump in dumps.items():
            for entry in dump["entries"]:
                self._add(rank, entry)
        for name, by_rank in self.calls.items():
            self.members.setdefault(name, sorted(by_rank))

    def _add(self, rank: int, entry: Mapping[str, Any]) -> None:
        name, description = map(str, entry["process_group"])
        self.names.setdefault(name, description)
        operation = str(entry["profiling_name"]).partition(":")[2]
        found = _SEND_OR_RECEIVE.search(operation)
        call = Call(
            rank,
            name,
            int(entry["collective_seq_id"]),
            operation,
            f"{entry['input_sizes']} {'/'.join(sorted(set(entry.get('input_dtypes', ()))))}",
            int(entry["time_created_ns"]),
            str(entry["state"]),
            entry["state"] != "completed" and not entry["retired"],
            next((int(word) for word in (found[2], found[4]) if word), None) if found else None,
        )
        if call.peer is not None:
            self.transfers.append(call)
        elif not entry.get("is_p2p"):
            self.calls[name][rank][call.number] = call

    def of_ranks(self) -> dict[int, list[Call]]:
        """All calls of each rank but sends and receives."""
        found: dict[int, list[Call]] = defaultdict(list)
        for by_rank in self.calls.values():
            for rank, calls in by_rank.items():
                found[rank] += calls.values()
        return found

    def last(self, group: str, rank: int) -> int:
        """The number of the last call of a rank in a group."""
        return max(self.calls[group].get(rank, {0: None}))


def explain(dumps: Mapping[int, Mapping[str, Any]]) -> Finding | None:
    """Say who is waited for.

    Args:
        dumps: what the flight recorders of the ranks held; those that left none are missing.

    Raises:
        KeyError, TypeError, ValueError: a record is none of the flight recorder's.
    """
    records = Records(dumps)
    return _different(records) or _missing(records) or _stuck(records)


def _different(records: Records) -> Finding | None:
    """The first call that is not the same on all ranks."""
    found: list[tuple[int, Finding]] = []
    for group, by_rank in records.calls.items():
        for number in sorted(set().union(*by_rank.values())):
            calls = [calls[number] for calls in by_rank.values() if number in calls]
            kinds: dict[tuple[str, str], list[Call]] = defaultdict(list)
            for call in calls:
                kinds[call.compared].append(call)
            if len(kinds) < 2:
                continue
            most, *others = sorted(kinds.values(), key=lambda same: (-len(same), same[0].rank))
            ranks = [call.rank for same in others for call in same]
            told = ", ".join(
                f"{_ranks(c.rank for c in same)} called {same[0].described}"
                for same in (*others, most)
            )
            reason = f"call {number} of {_group(records, group)} differs: {told}"
            found.append((min(call.since for call in calls), Finding(tuple(sorted(ranks)), reason)))
            break  # those after it differ because of it
    return min(found, key=lambda one: one[0])[1] if found else None


def _missing(records: Records) -> Finding | None:
    """Ranks that are waited for and wait for nobody."""
    waits = [*_waits_in_collectives(records), *_waits_for_peers(records)]
    waiting = {call.rank for call, _ in waits}
    ends = [(call, set(late) - waiting) for call, late in waits]
    # All wait for one another: each waits in a group for a rank that waits in another.
    ends = [one for one in ends if one[1]] or [(call, set(late)) for call, late in waits]
    if not ends:
        return None
    first = min((call for call, _ in ends), key=lambda call: call.since)
    same = (first.group, first.number, first.peer)
    late, there = set(), set()
    for call, missing in ends:
        if (call.group, call.number, call.peer) == same:
            late |= missing
            there.add(call.rank)
    reason = (
        f"{_ranks(late)} did not enter {first.operation} number {first.number} of "
        f"{_group(records, first.group)}, {first.sizes}, in which {_ranks(there)} "
        f"wait{'s' if len(there) == 1 else ''} since {_time(first.since)}"
    )
    if silent := late - records.ranks:
        reason += f"; no record is left of {_ranks(silent)}"
    return Finding(tuple(sorted(late)), reason)


def _waits_in_collectives(records: Records) -> Iterator[tuple[Call, Collection[int]]]:
    """The first call of each rank that others of its group have not made, and those others."""
    latest = {
        rank: max(calls, key=lambda call: call.since) for rank, calls in records.of_ranks().items()
    }
    for group, by_rank in records.calls.items():
        members = records.members[group]
        known = by_rank.keys() | records.whole
        last = {rank: records.last(group, rank) for rank in members if rank in known}
        # Nobody knows how far a rank without a record came: not into what is open. Gloo calls no
        # call open once it has failed; it is then the last that the rank has made.
        if pending := [
            call.number
            for rank, calls in by_rank.items()
            for call in calls.values()
            if call.is_open or call is latest[rank]
        ]:
            silent = (rank for rank in members if rank not in records.ranks)
            last |= dict.fromkeys(silent, min(pending) - 1)
        for calls in by_rank.values():
            if ahead := [n for n in calls if any(n > number for number in last.values())]:
                call = calls[min(ahead)]
                yield call, [one for one, number in last.items() if number < call.number]


def _waits_for_peers(records: Records) -> Iterator[tuple[Call, Collection[int]]]:
    for call in records.transfers:
        members = records.members.get(call.group, [])
        if call.is_open and call.peer is not None and call.peer < len(members):
            yield call, [members[call.peer]]


def _stuck(records: Records) -> Finding | None:
    """A collective that all have entered and some have not left; known where some are completed."""
    is_told = any(c.state == "completed" for calls in records.of_ranks().values() for c in calls)
    for calls in sorted(
        (
            [calls[number] for calls in by_rank.values() if number in calls]
            for by_rank in records.calls.values()
            for number in set().union(*by_rank.values())
        ),
        key=lambda calls: min(call.since for call in calls),
    ):
        within = [call.rank for call in calls if call.is_open]
        one = calls[0]
        if within and is_told and len(calls) == len(records.members[one.group]):
            return Finding(
                tuple(sorted(within)),
                f"all ranks entered {one.operation} number {one.number} of "
                f"{_group(records, one.group)}, {one.sizes}, at {_time(one.since)} or later, and "
                f"on {_ranks(within)} it did not end: a GPU that does not get to it, or the "
                "network",
            )
    return None


def _group(records: Records, name: str) -> str:
    description = records.names[name]
    is_named = description not in ("", "undefined")
    return f"{description if is_named else 'group ' + name} ({_ranks(records.members[name])})"


def _ranks(ranks: Iterable[int]) -> str:
    """``ranks 0-3, 7``."""
    every = sorted(set(ranks))
    runs: list[list[int]] = []
    for rank in every:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    shown = [str(a) if a == b else f"{a}-{b}" for a, b in runs[:_SHOWN]]
    more = f" and {sum(b - a + 1 for a, b in runs[_SHOWN:])} more" if runs[_SHOWN:] else ""
    return f"rank{'s' * (len(every) > 1)} {', '.join(shown)}{more}"


def _time(nanoseconds: int) -> str:
    return f"{datetime.fromtimestamp(nanoseconds / 1e9, UTC):%H:%M:%SZ}"
