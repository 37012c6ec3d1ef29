"""Runs the real training entry in real processes, for the tests of all rooms.

`train` starts one process per rank (gloo, CPU), as torchrun would, and returns what it left behind.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import random
import re
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from warm_python import Process, WarmPython

REPOSITORY = Path(__file__).parents[2]

# A Llama small enough for a step of 50 ms, with four attention heads so that TP=4 can split it.
TINY_LLAMA = """
    --num-layers 4 --hidden-size 32 --ffn-hidden-size 96 --num-attention-heads 4
    --seq-length 32 --max-position-embeddings 32 --position-embedding-type rope
    --normalization RMSNorm --disable-bias-linear --untie-embeddings-and-output-weights
    --attention-dropout 0 --hidden-dropout 0 --init-method-std 0.2
    --mock-data --tokenizer-type NullTokenizer --vocab-size 127 --make-vocab-size-divisible-by 32
    --micro-batch-size 2 --global-batch-size 8 --train-iters 6
    --lr 1e-2 --lr-decay-style cosine --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0
    --log-interval 1 --eval-iters 0 --eval-interval 1000 --save-interval 1000
    --ckpt-format torch_dist --ckpt-assume-constant-structure
""".split()


# Commands that turn CPU mode on and import Megatron before they do anything with it, and what they
# import then. A script that knows nothing of this package finds nothing of it imported.
_ENTRIES = {
    *("entry", "document_entry", "logits_entry", "checkpoint_bytes"),
    *("megatron_xielu.pretrain_gpt", "megatron_xielu.evaluate"),
}
_SCRIPTS = {
    *("audit_cases", "other_model_cases", "recompute_cases", "grouped_cases", "walk_layouts"),
    *("measure_activation_memory", "plan_cases"),
}
_SCRIPT_IMPORTS = """
    megatron.training megatron.core.datasets.gpt_dataset megatron.core.datasets.helpers
    megatron.core.datasets.blended_megatron_dataset_builder megatron.core.tokenizers.text
""".split()
_ENTRY_IMPORTS = """
    megatron.core.models.mimo megatron.core.tokenizers.text.models megatron_xielu.startup
    megatron_xielu.layer_specs megatron_xielu.training_step
    megatron_xielu.features.alpha_logging megatron_xielu.features.tp_sync
""".split()
_LM_EVAL_IMPORTS = "lm_eval._cli.run lm_eval.evaluator lm_eval.models.huggingface".split()
# Those that import it as it is.
_CHECKS = {"megatron_xielu.cluster.preflight", "preflight_faults"}  # and the self-test


def _imports(command: Sequence[str], environment: dict[str, str]) -> tuple[Sequence[str], dict]:
    """What a process may find imported, and in which environment that is."""
    first = environment.get("PYTHONPATH", "").split(":")[0]
    package = (REPOSITORY / "megatron_xielu").resolve()
    is_ours = first and Path(first, "megatron_xielu").resolve() == package
    as_entry = [*_SCRIPT_IMPORTS, *_ENTRY_IMPORTS] if is_ours else ()
    match command:
        case _ if torch.cuda.is_available():  # which CPU mode refuses
            pass
        case ["-m", "megatron_xielu.cpu", script, *_] if Path(script).name == "stock_script.py":
            return _SCRIPT_IMPORTS, environment
        case ["-m" | "-c", what, *_] if what in _CHECKS or "selftest" in what:
            return ["megatron.core"], _environment()
        case ["-m", "megatron_xielu.checkpoint_walk", *_]:
            return as_entry, _environment()
        case ["-m", "lm_eval", *_]:
            return _LM_EVAL_IMPORTS, environment
        case ["-m", module, *_] if module in _ENTRIES:
            return as_entry, environment
        case [script, *_] if Path(script).stem in _SCRIPTS:
            return as_entry, environment
        case ["-c", code, *_] if "pretrain_gpt" in code or "megatron_xielu.evaluate" in code:
            return as_entry, environment
    return (), environment


@dataclass
class Run:
    """What a finished training left behind."""

    returncodes: list[int]
    output: str
    dumps: list[dict] = field(default_factory=list)  # by rank; only of tests/helpers/entry.py

    @property
    def losses(self) -> list[float]:
        """Training loss of every iteration; the second of a run is Megatron's mean of two."""
        return [
            float(x) for x in re.findall(r"iteration +\d+/.*?\| lm loss: (\S+) \|", self.output)
        ]

    @property
    def grad_norms(self) -> list[float]:
        """Gradient norm of every iteration."""
        return [
            float(x) for x in re.findall(r"iteration +\d+/.*?\| grad norm: (\S+) \|", self.output)
        ]


@functools.cache
def _ports() -> Iterator[int]:
    """Every second one of 3000 which Linux gives nobody by itself; other ones in the other worker.
    From anywhere on: there may be another run of the tests.
    """
    first = 10000 + 3000 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
    start = first + 2 * random.SystemRandom().randrange(1500)
    return itertools.cycle([*range(start, first + 3000, 2), *range(first, start, 2)])


def free_port() -> int:
    """A port that nobody listens on, nor on the next one; none that this has given out lately."""
    for port in _ports():
        with contextlib.suppress(OSError), socket.socket() as one, socket.socket() as other:
            one.bind(("", port))
            other.bind(("", port + 1))
            return port
    raise AssertionError


def _environment() -> dict[str, str]:
    """Of every process, but for what one run sets."""
    paths = f"{REPOSITORY}:{REPOSITORY / 'tests/helpers'}:{REPOSITORY / 'tools/bench'}"
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


@functools.cache
def _warm_python() -> WarmPython:
    return WarmPython(_imports)


def python() -> str:
    """A Python for what starts one, in place of ``sys.executable``: `WarmPython.executable`."""
    return _warm_python().executable


def start(
    arguments: Sequence[str],
    *,
    ranks: int,
    log: Path,
    command: Sequence[str] = ("-m", "megatron_xielu.pretrain_gpt"),
    environment: dict[str, str] | None = None,
) -> list[Process]:
    """Start one process per rank; all write to ``log``."""
    variables = {
        **_environment(),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()) if ranks > 1 else "0",
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        **(environment or {}),
    }
    log.touch()
    return [
        _warm_python().start(
            [*command, *arguments],
            environment={**variables, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            folder=log.parent,
            output=log,
        )
        for rank in range(ranks)
    ]


def wait(processes: list[Process], *, timeout: float = 180) -> list[int]:
    """Wait for all ranks; when one fails, end the others, as torchrun does."""
    end = time.monotonic() + timeout
    try:
        while any(p.poll() is None for p in processes):
            if any(p.poll() not in (None, 0) for p in processes):
                end = min(end, time.monotonic() + 3)  # let the others say why they failed
            if time.monotonic() > end:
                for process in processes:
                    process.kill()
            time.sleep(0.05)
    except BaseException:  # the test's own limit, or Ctrl-C
        for process in processes:
            process.kill()
        raise
    return [p.wait() for p in processes]


@functools.cache
def _mock_data() -> tempfile.TemporaryDirectory:
    """What Megatron builds anew for every training else: the order of 100,000 documents."""
    return tempfile.TemporaryDirectory()


def train(
    folder: Path,
    arguments: Sequence[str] | str,
    *,
    ranks: int = 1,
    succeeds: bool = True,
    model: Sequence[str] = TINY_LLAMA,
    command: Sequence[str] = ("-m", "entry"),
    environment: dict[str, str] | None = None,
) -> Run:
    """Train to the end with ``model`` and then ``arguments`` on the command line.

    The default command is entry.py: the package's own entry, which also dumps the alphas.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(arguments, str):
        arguments = arguments.split()
    if "--mock-data" in model:
        arguments = ["--data-cache-path", _mock_data().name, *arguments]
    log = folder / "log.txt"
    for old in (log, *folder.glob("dump_*.json")):
        old.unlink(missing_ok=True)
    returncodes = wait(
        start(
            [*model, *arguments],
            ranks=ranks,
            log=log,
            command=command,
            environment={"DUMP_FOLDER": str(folder), **(environment or {})},
        )
    )
    run = Run(returncodes, log.read_text(errors="replace"))
    if succeeds:
        assert not any(returncodes), f"{returncodes}\n{run.output[-6000:]}"
    else:
        assert any(returncodes), run.output[-3000:]
    run.dumps = [json.loads(p.read_text()) for p in sorted(folder.glob("dump_*.json"))]
    return run


def load_checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a ``torch_dist`` checkpoint (``iter_…`` folder), whole, by its key."""
    reader = dcp.FileSystemReader(folder)
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in reader.read_metadata().state_dict_metadata.items()
        if hasattr(entry, "size")
    }
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors
