"""The preflight in real processes: nodes are torchrun agents on this machine, each with its name.

Each node runs examples/preflight.sh of a checkout of its own, so that one can have another version.
Several faults share a run where they can: starting one takes most of the time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from dataset_files import write_dataset
from hostile import damaged, damaged_bytes
from hypothesis import example, given, settings
from launch import TINY_LLAMA, free_port, python

from megatron_xielu.cluster.preflight import __main__ as preflight
from megatron_xielu.cluster.preflight import data_files, exchange, gpus, nodes
from megatron_xielu.common import fp8, indexed_dataset

REPOSITORY = Path(__file__).parents[2]


@dataclass
class Node:
    """A node that has started."""

    process: subprocess.Popen
    log: Path

    def wait(self, timeout: float = 80) -> tuple[int, str]:
        try:
            code = self.process.wait(timeout)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, 9)
        return code, self.log.read_text(errors="replace")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """What a node runs from."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "megatron_xielu").symlink_to(REPOSITORY / "megatron_xielu")
    (folder / "examples").mkdir()
    text = (REPOSITORY / "examples/preflight.sh").read_text()
    module = "-m megatron_xielu.cluster.preflight \\\n"
    assert text.count(module) == 1
    faulty = text.replace(module, "-m preflight_faults \\\n")
    for name, content in (("preflight.sh", text), ("faulty_preflight.sh", faulty)):
        script = folder / "examples" / name
        script.write_text(content)
        script.chmod(0o755)
    return folder


@pytest.fixture
def port() -> int:
    return free_port()


def start(
    checkout: Path,
    folder: Path,
    port: int,
    name: str,
    *flags: str,
    run_dir: Path | None = None,
    fault: str = "",
    **environment: str,
) -> Node:
    """Start node ``name`` (n1 is node 0) of two."""
    log = folder / f"{name}.log"
    script = checkout / "examples/preflight.sh"
    if fault:
        script = script.with_name("faulty_preflight.sh")
    variables = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY / "tests/cluster"),
        "NNODES": "2",
        "GPUS_PER_NODE": "1",
        "NODE_RANK": str(int(name[1:]) - 1),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        # The launcher gives out ranks in the order of addresses: rank 0 is on n1.
        "LOCAL_ADDR": f"127.0.0.{name[1:]}",
        "MEGATRON_XIELU_NODE": name,
        "NODE_LIST": "n1 n2",
        "RUN_DIR": str(run_dir or folder / "run"),
        "DEVICE": "cpu",
        "TP": "2",
        "PYTHON": python(),
        "PREFLIGHT_TIMEOUT": "40",
        "FAULT": fault,
        **environment,
    }
    with log.open("ab") as output:
        process = subprocess.Popen(
            ["bash", str(script), *flags],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=variables,
            cwd=folder,
            start_new_session=True,
        )
    return Node(process, log)


def lines(output: str, level: str, check: str) -> list[str]:
    return re.findall(rf"^{level} +{check} +(.*)$", output, re.MULTILINE)


@contextlib.contextmanager
def tiny_disk(folder: Path) -> Iterator[None]:
    """A file system of 8 MiB."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("cannot mount a small file system here")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_good_nodes_pass(checkout, tmp_path, port):
    write_dataset(tmp_path / "corpus", [3, 5])
    (tmp_path / "data_args.txt").write_text(f"0.5 {tmp_path}/corpus\n")
    (tmp_path / "tokenizer.json").write_text("{}")
    settings = {
        "DATA_ARGS": f"{tmp_path}/data_args.txt",
        "TOKENIZER": f"{tmp_path}/tokenizer.json",
        "NEED_GIB": "0.001",
        "MIN_DISK_MBPS": "0.01",
        "MIN_BANDWIDTH": "0.00001",
        "SECRET_TOKEN": "do-not-print-me",
    }
    # Not asked for, a layout that Megatron refuses does not matter.
    settings["LAYOUT_CHECK"] = "0"
    flags = ("--", *TINY_LLAMA, "--no-such-flag")
    nodes = [start(checkout, tmp_path, port, name, *flags, **settings) for name in ("n1", "n2")]
    (code, output), (other_code, other) = (node.wait() for node in nodes)
    assert (code, other_code) == (0, 0), output + other
    assert "LAYOUT_CHECK=0" in lines(output, "ok", "layout")[0]
    for check in (
        "ranks",
        "versions",
        "clocks",
        "run-dir",
        "data",
        "gpus",
        "collectives",
        "alphas",
    ):
        assert len(lines(output, "ok", check)) == 1, output
    assert "FAIL" not in output + other
    assert "n1, n2" in lines(output, "ok", "ranks")[0]
    assert "GB/s" in lines(output, "ok", "collectives")[0]
    assert "of 2 ranks" in lines(output, "ok", "alphas")[0]
    assert "do-not-print-me" not in output + other
    assert not list((tmp_path / "run/preflight").glob(".*"))  # the probes are removed


def test_every_fault_of_a_node_is_named(checkout, tmp_path, port):
    """Another version, a directory not shared, slow and small, damaged data, a wrong clock; FP8
    without Transformer Engine; and a layout that Megatron refuses."""
    other = tmp_path / "other"
    shutil.copytree(checkout, other, ignore=shutil.ignore_patterns("__pycache__"))
    init = other / "megatron_xielu/__init__.py"
    init.write_text(re.sub(r'__version__ = ".*"', '__version__ = "9.9.9"', init.read_text()))
    for node in ("n1", "n2"):
        (tmp_path / node).mkdir()
        write_dataset(tmp_path / node / "corpus", [3, 5])
        write_dataset(tmp_path / node / "short", [7])
    index = tmp_path / "n2/corpus.idx"
    index.write_bytes(b"GARBAGE!!" + index.read_bytes()[9:])
    (tmp_path / "n2/short.bin").write_bytes(bytes(10))
    nodes = [
        start(
            *(where, tmp_path, port, name, "--disk-mib", "1", "--", *TINY_LLAMA, "--no-such-flag"),
            run_dir=tmp_path / f"run_{name}",
            fault=fault,
            MIN_DISK_MBPS="1e9",
            NEED_GIB="1e9",
            FP8_RECIPE="tensorwise",
            DATA=f"{tmp_path}/{name}/corpus 0.3 {tmp_path}/{name}/short {tmp_path}/n1/absent",
        )
        for name, where, fault in (("n1", checkout, "none"), ("n2", other, "clock:60"))
    ]
    (code, output), (other_code, _) = (node.wait(timeout=200) for node in nodes)
    assert (code, other_code) == (1, 1), output
    (layout,) = lines(output, "FAIL", "layout")
    assert "--no-such-flag is no flag of Megatron's" in layout and "LAYOUT_CHECK" not in layout
    version, *engines = lines(output, "FAIL", "versions")
    assert version.startswith("n2 (rank 1): megatron_xielu is 9.9.9+")
    if fp8.installed_engine() is None:
        assert [line[:11] for line in engines] == ["n1 (rank 0)", "n2 (rank 1)"]
        assert all("needs Transformer Engine 2.2 or newer, and none is" in e for e in engines)
    (clock,) = lines(output, "FAIL", "clocks")
    assert re.match(r"n2 \(rank 1\): clock is \+(59|60)\.\d+ s from rank 0's", clock)
    disk = lines(output, "FAIL", "run-dir")
    for name in ("n1 (rank 0)", "n2 (rank 1)"):
        assert any(f"{name}: writes" in d and "below --min-disk-mbps" in d for d in disk)
        assert any(d.startswith(name) and "GiB free" in d for d in disk)
    (shared,) = [line for line in disk if "here is not the directory" in line]
    assert shared.startswith(f"n2 (rank 1): {tmp_path}/run_n2 here is not the directory of n1:")
    damaged = lines(output, "FAIL", "data")
    assert any(f"n2 (rank 1): {index} is damaged: it starts with b'GARBAGE" in d for d in damaged)
    assert any(
        "n2 (rank 1)" in d and "short.bin is damaged: it has 10 bytes where its .idx says 28" in d
        for d in damaged
    )
    assert sum("absent.bin" in d for d in damaged) == 2  # on either node
    assert lines(output, "ok", "collectives")  # all checks run
    assert lines(output, "ok", "alphas")
    assert "preflight: FAIL" in output
    assert "Traceback" not in output


def test_disks_and_wrong_sum(checkout, tmp_path, port):
    """A full disk on n1; on n2 a path that cannot be a directory, and a wrong collective."""
    (tmp_path / "file").write_text("")
    with tiny_disk(tmp_path / "tiny"):
        nodes = [
            start(checkout, tmp_path, port, name, run_dir=run_dir, fault=fault)
            for name, run_dir, fault in (
                ("n1", tmp_path / "tiny", "none"),
                ("n2", tmp_path / "file/run", "sum"),
            )
        ]
        (code, output), (other_code, _) = (node.wait() for node in nodes)
        assert not list((tmp_path / "tiny/preflight").glob("*.speed"))
    assert (code, other_code) == (1, 1), output
    full, unwritable = lines(output, "FAIL", "run-dir")
    assert full.startswith(
        f"n1 (rank 0): {tmp_path}/tiny: No space left on device; the file system"
    )
    assert unwritable.startswith(f"n2 (rank 1): {tmp_path}/file/run: Not a directory")
    (wrong,) = lines(output, "FAIL", "collectives")
    assert re.match(r"n2 \(rank 1\): all-reduce over 2 ranks: 1 of \d+ elements", wrong)
    assert lines(output, "FAIL", "alphas")


def test_rank_that_hangs_and_rank_that_is_killed(checkout, tmp_path):
    """n2's rank is named, the other checks run. Two runs at a time: they mostly wait."""
    runs = {}
    for fault in ("hangs", "dies"):
        folder = tmp_path / fault
        folder.mkdir()
        port = free_port()
        runs[fault] = [
            start(checkout, folder, port, name, "--disk-mib", "1", "--limit", "6", fault=kind)
            for name, kind in (("n1", "none"), ("n2", fault))
        ]
    (code, output), (other_code, other) = (node.wait() for node in runs["hangs"])
    assert (code, other_code) == (1, 1)
    assert lines(output, "ok", "run-dir")
    assert lines(output, "FAIL", "data")[0].startswith("n2 (rank 1): no answer")
    assert lines(output, "ok", "gpus")
    assert "not every rank answers" in lines(output, "FAIL", "collectives")[0]
    assert "preflight_faults.py" in other  # where it hangs
    assert "FAIL join" not in output + other

    (code, output), (other_code, other) = (node.wait() for node in runs["dies"])
    assert (code, other_code) == (1, 1)
    assert any(f.startswith("n2 (rank 1): no answer") for f in lines(output, "FAIL", "collectives"))
    assert lines(output, "FAIL", "alphas")
    assert "exitcode: -9" in other
    assert "FAIL join" not in output + other


@pytest.mark.parametrize(
    "present, absent, names",
    [("n1", "n2", "n1 n2"), ("n2", "n1", "n1,n2"), ("n2", "not known", "n[1-2]")],
)
def test_node_that_does_not_join_is_named(checkout, tmp_path, port, present, absent, names):
    begin = time.monotonic()
    node = start(checkout, tmp_path, port, present, PREFLIGHT_TIMEOUT="4", NODE_LIST=names)
    code, output = node.wait()
    assert code == 1
    assert f"{present}: not all of 2 nodes joined within 4 s; did not answer: {absent};" in output
    assert "Traceback" not in output
    assert time.monotonic() - begin < 90  # most of it to start, on a busy machine


def test_a_port_that_is_taken_is_named(checkout, tmp_path, port):
    with socket.create_server(("127.0.0.1", port + 1)):
        code, output = start(checkout, tmp_path, port, "n1").wait()
    assert code == 1
    assert f"n1: port {port + 1} is taken by another program; choose another MASTER_PORT" in output
    assert "did not answer" not in output and "Traceback" not in output


def test_rank_0_may_publish_and_end_between_two_questions():
    """A rank that is slow to ask has its answer though rank 0 has given its verdict since."""

    class Store(torch.distributed.HashStore):
        def check(self, keys):
            found = super().check(keys)
            for key in ("last/all", "verdict"):
                self.set(key, "0")
            return found

    board = object.__new__(exchange.Board)
    board.rank, board.store, board._stopped_at = 1, Store(), None
    assert board._get("last/all", time.monotonic() + 5) == b"0"
    with pytest.raises(TimeoutError, match="has ended the preflight"):
        board._get("one more/all", time.monotonic() + 5)


def test_help_and_wrong_usage(checkout, tmp_path):
    script = str(checkout / "examples/preflight.sh")
    environment = {**os.environ, "PYTHON": python()}
    shown = subprocess.run([script, "--help"], capture_output=True, text=True, env=environment)
    assert not shown.returncode
    assert "PREFLIGHT_TIMEOUT" in shown.stdout
    assert "--min-bandwidth" in shown.stdout
    wrong = subprocess.run(
        [script], capture_output=True, text=True, env={**environment, "DEVICE": "tpu"}
    )
    assert wrong.returncode == 2
    assert "DEVICE=tpu" in wrong.stderr


# --- what is judged on GPUs, from figures alone: no GPU is needed to compare them ---


@pytest.mark.parametrize(
    ("recipe", "good", "bad"),
    [
        ("tensorwise", [(8, 9), (9, 0), (12, 1)], [(8, 0), (7, 5)]),
        ("blockwise", [(9, 0), (10, 3)], [(8, 9)]),
        ("mxfp8", [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
    ],
)
def test_gpus_that_have_a_recipe_of_fp8(recipe, good, bad):
    assert [fp8.gpu_fault(recipe, gpu, "12.9") for gpu in good] == [""] * len(good)
    for major, minor in bad:
        fault = fp8.gpu_fault(recipe, (major, minor), "13.0")
        assert f"--fp8-recipe={recipe} needs a GPU of compute capability" in fault
        assert f"this one has {major}.{minor}; take another" in fault and "=bf16" in fault


def test_transformer_engine_and_cuda_for_fp8():
    assert "CUDA 12.9 or newer, and this one is for 12.8" in fp8.gpu_fault(
        "blockwise", (9, 0), "12.8"
    )
    assert fp8.engine_fault("blockwise", "2.3") == fp8.engine_fault("mxfp8", "2.20.2+abc") == ""
    assert "2.3 or newer, and 2.2.1 is installed" in fp8.engine_fault("blockwise", "2.2.1")
    assert "newer, and none is installed; take" in fp8.engine_fault("tensorwise", None)


def test_slow_gpu_is_found():
    speeds = {0: 700.0, 1: 690.0, 2: 590.0, 3: 710.0}
    assert gpus.slow_ones(speeds, gpus.SLOW_GPU) == {2: 590.0}
    assert not gpus.slow_ones({0: 700.0, 1: 600.0}, gpus.SLOW_GPU)


def test_nodes_that_see_another_directory_than_most_are_strangers():
    everyone = {"a", "b", "c", "d"}
    blind = {"a": {"c"}, "b": {"c"}, "c": everyone - {"c"}, "d": {"c"}}
    assert nodes.strangers(blind) == [("c", ["a", "b", "d"])]
    assert nodes.strangers({"a": set(), "b": set()}) == nodes.strangers({}) == []
    # Each its own directory; two that do not share the others'; one whose file nobody sees.
    assert nodes.strangers({n: everyone - {n} for n in "abc"}) == [("b", ["a"]), ("c", ["a"])]
    two = {"a": everyone - {"a"}, "b": {"a", "c"}, "c": everyone - {"c"}, "d": {"a", "c"}}
    assert nodes.strangers(two) == [("a", ["b", "d"]), ("c", ["b", "d"])]
    assert nodes.strangers({"a": {"c"}, "b": {"c"}, "c": set()}) == [("c", ["a", "b"])]
    assert nodes.strangers({"a": {"a", "b"}, "b": {"a", "b"}}) == [("b", ["a"])]  # not even its own


def test_versions_of_the_minority_are_odd():
    found = exchange.Answers({0: {"torch": "1"}, 4: {"torch": "2"}, 8: {"torch": "2"}})
    assert list(nodes.odd_ones_out(found)) == [(0, "torch", "1", "2", 2)]


def test_prefixes_of_all_arguments(tmp_path):
    (tmp_path / "list.txt").write_text("0.3 a\n0.7 b\n")
    (tmp_path / "splits.json").write_text('{"train": ["1", "c"], "valid": "0.5 d", "test": null}')
    args = argparse.Namespace(
        data_path=["2", "x"],
        train_data_path=["x"],
        valid_data_path=["y"],
        test_data_path=[],
        data_args_path=str(tmp_path / "list.txt"),
        per_split_data_args_path=str(tmp_path / "splits.json"),
    )
    assert data_files.prefixes(args) == ["x", "y", "a", "b", "c", "d"]


def test_dataset_written_by_megatron_is_whole(tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "real.bin"), dtype=np.uint16)
    for length in (3, 1, 7):
        builder.add_item(torch.arange(length))
        builder.end_document()
    builder.finalize(str(tmp_path / "real.idx"))
    assert data_files.dataset_sizes(str(tmp_path / "real"))[0] == 22
    index = tmp_path / "real.idx"
    index.write_bytes(index.read_bytes()[:-8])
    with pytest.raises(indexed_dataset.Damaged, match="is damaged"):
        data_files.dataset_sizes(str(tmp_path / "real"))


def arguments(**more) -> argparse.Namespace:
    lists = ("data_path", "train_data_path", "valid_data_path", "test_data_path")
    files = ("data_args_path", "per_split_data_args_path", "tokenizer_model", "padded_vocab_size")
    return argparse.Namespace(**dict.fromkeys(lists, ()) | dict.fromkeys(files) | more)


def finds_or_names(path: Path, args: argparse.Namespace) -> None:
    """What the check of the data says is about the file, in one line."""
    try:
        problems = data_files._data_here(args)["problems"]
    except exchange.Problem as problem:
        problems = [str(problem)]
        assert str(path) in problems[0]
    assert all(len(problem.splitlines()) == 1 for problem in problems)


SPLITS = {"train": ["0.3", "a"], "valid": "0.5 b 0.5 c", "test": None}


@given(damaged(SPLITS).map(json.dumps).map(str.encode) | damaged_bytes(json.dumps(SPLITS).encode()))
@example(b"[]")
@example(b'{"train": 3, "valid": null, "test": null}')
@example(b'{"train": "a"}')
@example(b"\xff")
@settings(max_examples=100, deadline=None)
def test_damaged_lists(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "splits.json")
        path.write_bytes(content)
        finds_or_names(path, arguments(per_split_data_args_path=str(path)))
        finds_or_names(path, arguments(data_args_path=str(path)))


def test_data_of_another_vocabulary(tmp_path, monkeypatch):
    """The size is that of the training's arguments, which follow after --."""
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.setenv(name, "0")
    write_dataset(tmp_path / "text", [3, 5], {7: 300})
    own = ["--data-path", f"{tmp_path}/text", f"{tmp_path}"]
    args = preflight.parse([*own, "--", "--padded-vocab-size", "256", "--num-layers", "2"])
    beyond, folder = reversed(data_files._data_here(args)["problems"])
    assert beyond.startswith(
        f"data {tmp_path}/text: {tmp_path}/text.bin has token 300, the model's"
    )
    assert folder.startswith(f"{tmp_path} is a folder, and no prefix")
    assert data_files._data_here(preflight.parse(own))["problems"] == [folder]


def test_damaged_indices(tmp_path):
    write_dataset(tmp_path / "corpus", [3, 5])
    index = tmp_path / "corpus.idx"
    good = index.read_bytes()

    @given(damaged_bytes(good))
    @settings(max_examples=100, deadline=None)
    def run(content):
        index.write_bytes(content)
        finds_or_names(index, arguments(data_path=[str(tmp_path / "corpus")]))

    run()
    for place, value in ((9, 2), (17, 99), (41, 0x80), (57, 0x80)):
        # The version, the type of tokens; length and offset of the last sequence are negative.
        index.write_bytes(good[:place] + bytes([value]) + good[place + 1 :])
        with pytest.raises(indexed_dataset.Damaged, match=f"{index} is damaged"):
            data_files.dataset_sizes(str(tmp_path / "corpus"))


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *(("--limit", value) for value in ("nan", "0", "-1", "1e300")),
        *(("--need-gib", value) for value in ("nan", "-1")),
        *(("--disk-mib", value) for value in ("0", str(10**29), "²")),
        ("--min-bandwidth", "nan"),
        ("--tensor-model-parallel-size", "0"),
        ("WORLD_SIZE", "two"),
    ],
)
def test_senseless_numbers(flag, value, monkeypatch, capsys):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    if not flag.startswith("--"):
        monkeypatch.setenv(flag, value)
    with pytest.raises(SystemExit):
        preflight.parse([flag, value] if flag.startswith("--") else [])
    told = capsys.readouterr().err.splitlines()[-1]
    assert "error: " in told and flag in told


def test_an_answer_that_is_none():
    board = object.__new__(exchange.Board)
    board.rank, board.world_size, board._lost, board._stopped_at = 0, 4, set(), None
    board.store = torch.distributed.HashStore()
    for rank, answer in enumerate(('{"value": 1}', "[]", "\xff", "nan")):
        board.store.set(f"x/{rank}", answer)
    assert board._collect_or_wait("x", 1) == [{"value": 1}, None, None, None]


def test_tokenizer_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert "every node would download it" in data_files.tokenizer_warning("some/name")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(exchange.Problem, match="HF_HUB_OFFLINE"):
        data_files.tokenizer_warning("some/name")
    snapshot = tmp_path / "hub/models--some--name/snapshots/abc"
    snapshot.mkdir(parents=True)
    (snapshot / "tokenizer.json").write_text("{}")
    assert data_files.tokenizer_warning("some/name") == ""
    with pytest.raises(exchange.Problem, match="no such file"):
        data_files.tokenizer_warning("/absent/tokenizer")
