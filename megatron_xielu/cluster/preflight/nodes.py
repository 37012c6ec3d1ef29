"""Preflight checks of what nodes must have in common: versions, time of day, run directory.

Each check is a function of the board and the arguments, called on all ranks: the first rank of
every node measures, all see the answers, and rank 0 prints. See `megatron_xielu.cluster.preflight`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.util
import os
import platform
import time
from argparse import Namespace
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import megatron_xielu
from megatron_xielu.cluster.preflight.exchange import GIB, MIB, Answers, Board, Problem, most_common
from megatron_xielu.common import fp8

IMAGE_VARIABLE, IMAGE_LABEL = "MEGATRON_XIELU_IMAGE", Path("/etc/megatron_xielu-image")
CLOCK_WARN, CLOCK_FAIL = 2.0, 30.0  # seconds from rank 0; up to one may be the measurement's
_SEEN_WITHIN = 5.0  # seconds until another node's file must be visible


# --- versions -----------------------------------------------------------------------------------


def _installed(name: str) -> str:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(name)
    return "-"


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip() or "-"
    except OSError:
        return "-"


def _nccl() -> str:
    try:
        return ".".join(map(str, torch.cuda.nccl.version()))
    except (AttributeError, RuntimeError, ImportError):  # a PyTorch without NCCL
        return "-"


def _package_hash() -> str:
    """Of every source file of this package: a commit would not show what is not committed."""
    folder = Path(megatron_xielu.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _has_apex() -> str:
    """NVIDIA's; an unrelated package of that name has no optimizers."""
    spec = importlib.util.find_spec("apex")
    folders = (spec.submodule_search_locations or []) if spec else []
    return "yes" if any((Path(folder) / "optimizers").is_dir() for folder in folders) else "-"


def versions_here() -> dict[str, str]:
    """What runs on this node; "-" for what it has not."""
    import megatron.core

    megatron_version = _installed("megatron-core")
    if megatron_version == "-":  # a checkout on the path; its version names the commit
        megatron_version = str(megatron.core.__version__)
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA": torch.version.cuda or "-",
        "NCCL": _nccl(),
        "driver": _read(Path("/sys/module/nvidia/version")),
        "megatron-core": megatron_version,
        "transformer-engine": fp8.installed_engine() or "-",
        "apex": _has_apex(),
        "megatron_xielu": f"{megatron_xielu.__version__}+{_package_hash()}",
        "image": os.environ.get(IMAGE_VARIABLE) or _read(IMAGE_LABEL),
    }


def versions(board: Board, args: Namespace) -> None:
    """The same software on every node."""
    # Megatron is imported here, from a file system that may be cold.
    found = board.ask("versions", versions_here, only=board.one_per_node(), limit=3 * board.limit)
    if not found:
        return
    for rank, item, mine, usual, count in odd_ones_out(found):
        board.fail(
            "versions",
            f"{item} is {mine}, and {usual} on {count} of {len(found)} nodes; start every node "
            "from the same image or checkout",
            rank=rank,
        )
    for rank, node in found.items() if args.fp8_recipe else ():
        engine = node["transformer-engine"]
        if fault := fp8.engine_fault(args.fp8_recipe, None if engine == "-" else engine):
            board.fail("versions", fault, rank=rank)
    shown = ", ".join(f"{item} {value}" for item, value in found[min(found)].items())
    board.done("versions", f"the same on {len(found)} nodes: {shown}")


def odd_ones_out(found: Answers) -> Iterable[tuple[int, str, str, str, int]]:
    """Rank, item, its value, the usual value, and how many nodes have that."""
    for item in found[min(found)]:
        values = {rank: node[item] for rank, node in found.items()}
        usual = most_common(values)
        count = sum(value == usual for value in values.values())
        for rank, value in values.items():
            if value != usual:
                yield rank, item, value, usual, count


# --- clocks -------------------------------------------------------------------------------------


def clocks(board: Board, args: Namespace) -> None:
    """Every node's time of day against rank 0's: logs and file times are compared across nodes.

    All look at their clocks as the stage before ends, a fraction of a second apart.
    """
    times = board.ask("clocks", time.time, only=board.one_per_node())
    if 0 not in times:
        return
    offsets = {rank: told - times[0] for rank, told in times.items()}
    for rank, offset in offsets.items():
        text = f"clock is {offset:+.1f} s from rank 0's; start chrony or ntpd"
        if abs(offset) > CLOCK_FAIL:
            board.fail("clocks", text, rank=rank)
        elif abs(offset) > CLOCK_WARN:
            board.warn("clocks", text, rank=rank)
    worst = max(map(abs, offsets.values()))
    board.done("clocks", f"at most {worst:.1f} s apart from rank 0's, of {len(times)} nodes")


# --- the run directory --------------------------------------------------------------------------


def run_directory(board: Board, args: Namespace) -> None:
    """Writable from every node, one and the same, fast enough, with enough space.

    All nodes write at once, as they do for a checkpoint.
    """
    if not args.run_dir:
        board.done("run-dir", "skipped: no --run-dir")
        return
    folder = Path(args.run_dir) / "preflight"
    # Rank 0 of this preflight, and no earlier one, wrote what is looked for.
    nonce = board.ask("run-dir", lambda: os.urandom(8).hex(), stage="nonce", only=lambda r: r == 0)
    token = nonce.get(0, "")
    written = board.ask(
        "run-dir",
        lambda: _write(folder, board.node, token, size=args.disk_mib * MIB),
        stage="write",
        only=board.one_per_node(),
    )
    names = {rank: board.node_of(rank) for rank in written}
    seen = board.ask(
        "run-dir",
        lambda: _not_seen(folder, list(names.values()), token),
        stage="see",
        only=lambda rank: rank in names,
    )
    with contextlib.suppress(OSError):
        if board.is_leader:
            _probe(folder, board.node, token).unlink(missing_ok=True)
    blind = {board.node_of(rank): set(missing) for rank, missing in seen.items()}
    for node, most in strangers(blind):
        board.fail(
            "run-dir",
            f"{written[board.leaders[node]]['path']} here is not the directory of "
            f"{', '.join(most)}: set RUN_DIR to one path on a file system that all nodes mount",
            rank=board.leaders[node],
        )
    for rank, answer in written.items():
        path, speed, free = answer["path"], answer["mbps"], answer["free_gib"]
        if args.min_disk_mbps is not None and speed < args.min_disk_mbps:
            board.fail(
                "run-dir",
                f"writes {speed:.0f} MB/s with fsync to {path}, below --min-disk-mbps "
                f"{args.min_disk_mbps:g}: use a faster file system, or find what loads it",
                rank=rank,
            )
        if free < args.need_gib:
            board.fail(
                "run-dir",
                f"{free:.1f} GiB free for this user in {path}, {args.need_gib:g} needed: "
                "free space there or set RUN_DIR elsewhere",
                rank=rank,
            )
    if written:
        slowest = min(written, key=lambda rank: written[rank]["mbps"])
        free = min(answer["free_gib"] for answer in written.values())
        board.done(
            "run-dir",
            f"shared by {len(written)} nodes, {free:.1f} GiB free, slowest write "
            f"{written[slowest]['mbps']:.0f} MB/s with fsync ({board.node_of(slowest)})",
        )


def _probe(folder: Path, node: str, token: str) -> Path:
    return folder / f".{node}.{token}"


def _write(folder: Path, node: str, token: str, *, size: int) -> dict[str, Any]:
    """Leave a small file for the others; time a large one, in MB/s; tell the free space in GiB."""
    large = folder / f".{node}.{token}.speed"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        space = os.statvfs(folder)
        _write_file(_probe(folder, node, token), [token.encode()])
        block = os.urandom(min(size, 4 * MIB))  # random: some file systems compress
        start = time.monotonic()
        try:
            _write_file(large, [block] * max(1, size // len(block)))
            seconds = time.monotonic() - start
        finally:
            large.unlink(missing_ok=True)
    except OSError as error:
        fixes = {
            errno.ENOSPC: "the file system is full: free space there or set RUN_DIR elsewhere",
            errno.EDQUOT: "the quota is used up: free space there or set RUN_DIR elsewhere",
            errno.EACCES: "not writable: mend its owner and mode, or set RUN_DIR elsewhere",
            errno.EROFS: "mounted read-only: mount it for writing, or set RUN_DIR elsewhere",
        }
        fix = fixes.get(error.errno or 0, "not writable: mend it or set RUN_DIR elsewhere")
        raise Problem(f"{folder.parent}: {error.strerror or error}; {fix}") from error
    return {
        "path": str(folder.parent),
        "mbps": size / 1e6 / seconds,
        "free_gib": space.f_bavail * space.f_frsize / GIB,
    }


def _write_file(path: Path, blocks: list[bytes]) -> None:
    with path.open("wb") as file:
        for block in blocks:
            file.write(block)
        file.flush()
        os.fsync(file.fileno())


def _not_seen(folder: Path, nodes: list[str], token: str) -> list[str]:
    """Nodes whose file is not to be seen here within a few seconds."""
    missing = set(nodes)
    end = time.monotonic() + _SEEN_WITHIN
    while True:
        for node in sorted(missing):
            with contextlib.suppress(OSError):
                if _probe(folder, node, token).read_text() == token:
                    missing.remove(node)
        if not missing or time.monotonic() > end:
            return sorted(missing)
        time.sleep(0.2)


def strangers(blind: Mapping[str, set[str]]) -> list[tuple[str, list[str]]]:
    """Nodes that do not see what most see, or that most do not see, each with those most.

    Args:
        blind: whose files a node does not see, by node, in the order of ranks.
    """
    views = list(blind.values())
    usual = max(views, key=views.count, default=set())  # of a tie the one of the lowest rank
    most = [node for node, unseen in blind.items() if unseen == usual and node not in usual]
    most = most or list(blind)[:1]
    return [(node, most) for node in blind if node not in most]
