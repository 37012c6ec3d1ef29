"""Who is waited for when a training hangs: from records as gloo's ranks and NCCL's leave them."""

import os
import pickle
import re
import subprocess

import launch
import pytest

from megatron_xielu.cluster import desync, flight_recorder

MEGATRON_GROUPS = {
    "0": ("default_pg", [0, 1, 2, 3]),
    "1": ("TENSOR_MODEL_PARALLEL_GROUP", [0, 1]),
    "2": ("TENSOR_MODEL_PARALLEL_GROUP", [2, 3]),
    "3": ("DATA_PARALLEL_GROUP", [0, 2]),
    "4": ("DATA_PARALLEL_GROUP", [1, 3]),
}


def record(*calls, groups=MEGATRON_GROUPS, forgotten=0):
    """A record of ``(group, number, operation, sizes, state)``; the times are in this order.

    ``forgotten``: how many calls the rank made before, for which the recorder had no room.
    """
    return {
        "pg_config": {
            name: {"name": name, "desc": desc, "ranks": str(ranks)}
            for name, (desc, ranks) in groups.items()
        },
        "entries": [
            {
                "record_id": forgotten + second,
                "process_group": (group, groups[group][0]),
                "collective_seq_id": number,
                "profiling_name": f"nccl:{operation}",
                "input_sizes": sizes,
                "input_dtypes": ["BFloat16"],
                "time_created_ns": (1000 + second) * 10**9,
                "state": state,
                "retired": state == "completed",
                "is_p2p": operation[:4] in ("send", "recv"),
            }
            for second, (group, number, operation, sizes, state) in enumerate(calls)
        ],
    }


DONE = [("1", 1, "all_reduce", [[8]], "completed"), ("3", 1, "all_reduce", [[9]], "completed")]
TP = {0: "1", 1: "1", 2: "2", 3: "2"}
DP = {0: "3", 1: "4", 2: "3", 3: "4"}


def rank(number, *calls):
    done = [(TP[number], *DONE[0][1:]), (DP[number], *DONE[1][1:])]
    return record(*done, *calls)


def test_the_cause_and_not_those_that_wait_for_it():
    """Rank 3 hangs; rank 2 waits for it, and rank 0 for rank 2, in another group."""
    finding = desync.explain(
        {
            0: rank(
                0,
                ("1", 2, "all_reduce", [[8]], "completed"),
                ("3", 2, "all_reduce", [[9]], "started"),
            ),
            1: rank(
                1,
                ("1", 2, "all_reduce", [[8]], "completed"),
                ("4", 2, "all_reduce", [[9]], "started"),
            ),
            2: rank(2, ("2", 2, "all_reduce", [[8]], "started")),
            3: rank(3),
        }
    )
    assert finding.ranks == (3,)
    assert finding.reason == (
        "rank 3 did not enter all_reduce number 2 of TENSOR_MODEL_PARALLEL_GROUP (ranks 2-3), "
        "[[8]] BFloat16, in which rank 2 waits since 00:16:42Z"
    )


def test_a_call_that_some_have_no_room_for():
    """Stages make unequal numbers of calls: the second has forgotten the first one of all ranks."""
    everybody = ("0", 1, "all_reduce", [[1]], "completed")
    busy = ("2", 3000, "all_reduce", [[8]], "completed")
    finding = desync.explain(
        {
            0: record(everybody, ("1", 1, "all_reduce", [[8]], "started")),
            1: record(everybody),
            2: record(busy, ("3", 1, "all_reduce", [[9]], "started"), forgotten=2000),
            3: record(busy, forgotten=2000),
        }
    )
    assert finding.ranks == (1,)
    assert "all_reduce number 1 of TENSOR_MODEL_PARALLEL_GROUP (ranks 0-1)" in finding.reason


def test_a_rank_that_left_no_record():
    calls = (("0", 1, "all_reduce", [[1]], "completed"), ("0", 2, "all_reduce", [[5]], "started"))
    ahead = (*calls, ("0", 3, "all_reduce", [[6]], "scheduled"))
    finding = desync.explain({0: record(*calls), 2: record(*ahead), 3: record(*calls)})
    assert finding.ranks == (1,)
    assert "rank 1 did not enter all_reduce number 2 of default_pg (ranks 0-3)" in finding.reason
    assert "ranks 0, 2-3 wait since" in finding.reason
    assert finding.reason.endswith("no record is left of rank 1")


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (("0", 2, "_all_gather_base", [[5]], "started"), "rank 3 called _all_gather_base [[5]]"),
        (("0", 2, "all_reduce", [[6]], "started"), "rank 3 called all_reduce [[6]]"),
    ],
)
def test_a_call_that_differs(call, told):
    same = record(("0", 2, "all_reduce", [[5]], "started"))
    finding = desync.explain({0: same, 1: same, 2: same, 3: record(call)})
    assert finding.ranks == (3,)
    assert finding.reason == (
        f"call 2 of default_pg (ranks 0-3) differs: {told} BFloat16, "
        "ranks 0-2 called all_reduce [[5]] BFloat16"
    )


def test_a_collective_that_does_not_end():
    """All are in it: on rank 1's GPU something before it does not end."""
    calls = [("0", n, "all_reduce", [[5]], "completed") for n in (1, 2)]
    ended = record(*calls)
    finding = desync.explain(
        {0: ended, 1: record(calls[0], (*calls[1][:4], "scheduled")), 2: ended, 3: ended}
    )
    assert finding.ranks == (1,)
    assert "all ranks entered all_reduce number 2" in finding.reason
    assert "on rank 1 it did not end" in finding.reason


def test_a_stage_that_waits_for_another():
    """In the groups of a pipeline a peer has the number of its place in the group."""
    groups = {"7": ("PIPELINE_MODEL_PARALLEL_GROUP", [4, 12])}
    finding = desync.explain(
        {
            12: record(("7", 0, "recv 1<-0", [[4, 2]], "scheduled"), groups=groups),
            4: record(groups=groups),
        }
    )
    assert finding.ranks == (4,)
    assert "rank 4 did not enter recv 1<-0" in finding.reason and "rank 12 waits" in finding.reason


def test_nothing_to_say():
    """All ranks ended for reasons of their own."""
    assert desync.explain({0: rank(0), 2: rank(2)}) is None
    assert desync.explain({0: record(groups={})}) is None


@pytest.fixture
def now(tmp_path, monkeypatch):
    monkeypatch.setenv("MEGATRON_XIELU_EVENTS", str(tmp_path / "events"))
    monkeypatch.setenv(flight_recorder.FOLDER, str(tmp_path / "flight_recorder"))
    folder = tmp_path / "flight_recorder/now"
    folder.mkdir(parents=True)
    return folder


def test_records_of_nccl(now, tmp_path):
    """Pickles, as its threads write them; one is half written, one wants to run something."""

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    groups = {"0": ("default_pg", [0, 1, 2, 3])}
    for number, calls in enumerate((1, 2)):
        made = [("0", n + 1, "all_reduce", [[5]], "started") for n in range(calls)]
        (now / f"rank_{number}").write_bytes(pickle.dumps(record(*made, groups=groups), 2))
    (now / "rank_2").write_bytes(pickle.dumps(record(groups=groups), 2)[:-9])
    (now / "rank_3").write_bytes(pickle.dumps(Payload(), 2))
    flight_recorder.report(4)
    told = (tmp_path / "events").read_text()
    assert " rank=2,3 event=desync " in told and "no record is left of ranks 2-3" in told
    assert not (tmp_path / "executed").exists()
    (kept,) = now.parent.iterdir()
    assert str(kept) in told and len(list(kept.iterdir())) == 4


@pytest.mark.parametrize(
    "content", [pickle.dumps(x) for x in ({}, {"entries": 1, "pg_config": {}}, [1])] + [b"", b"{"]
)
def test_what_is_no_record(now, content):
    (now / "rank_0").write_bytes(content)
    flight_recorder.report(1)
    assert not now.exists()


def test_only_the_newest_are_kept(now):
    for day in range(1, 8):
        (now.parent / f"2026010{day}T000000Z").mkdir()
    (now.parent / "notes").mkdir()
    (now / "rank_0").write_bytes(pickle.dumps({}))
    flight_recorder.report(1)
    kept = sorted(path.name for path in now.parent.iterdir())
    assert kept[:4] == [f"2026010{day}T000000Z" for day in (4, 5, 6, 7)]
    assert len(kept) == 6 and kept[-1] == "notes"


HANG = """
import os, time, datetime, faulthandler, signal, torch
import torch.distributed as dist
wait = datetime.timedelta(seconds=4)
dist.init_process_group("gloo", timeout=wait)
group = dist.new_group([0, 1], timeout=wait, group_desc="TENSOR_MODEL_PARALLEL_GROUP")
for _ in range(3):
    dist.all_reduce(torch.ones(4, 5), group=group)
def is_here_for_ever():
    time.sleep(1000)
if os.environ["RANK"] == "1":
    is_here_for_ever()
faulthandler.unregister(signal.SIGUSR2)  # as Python does at its end
os.kill(os.getpid(), signal.SIGUSR2)
dist.all_reduce(torch.ones(7), group=group)
"""


def test_a_rank_that_hangs(now, tmp_path):
    """Real ranks and a real launcher: its line names rank and collective; the stack is kept."""
    (tmp_path / "script.py").write_text(HANG)
    command = [launch.python(), "-m", "megatron_xielu.cluster.launcher", "--standalone"]
    command += ["--nproc-per-node", "2", "--max-restarts", "0"]
    command += ["-m", "megatron_xielu.cluster.rank", str(tmp_path / "script.py")]
    done = subprocess.run(
        command, cwd=launch.REPOSITORY, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1, done.stdout + done.stderr
    (line,) = re.findall(".*event=desync.*", (tmp_path / "events").read_text())
    assert " rank=1 " in line
    assert (
        "rank 1 did not enter all_reduce number 4 of TENSOR_MODEL_PARALLEL_GROUP (ranks 0-1),"
        in (line)
    )
    assert "[[7]] Float, in which rank 0 waits since" in line
    (kept,) = (path for path in now.parent.iterdir())
    analyser = [launch.python(), "-m", "torch.distributed.flight_recorder.fr_trace", str(kept)]
    subprocess.run([*analyser, "-p", "rank_", "--allow-incomplete-ranks"], check=True, timeout=60)
    assert pickle.loads((kept / "rank_0").read_bytes())["entries"]
    assert "is_here_for_ever" in (kept / "stack_1").read_text()
