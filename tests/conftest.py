"""What several test files share: backends to run on, and trainings to compare with, run once."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

# OpenMP reads it when torch loads it. Its threads would otherwise spin where they wait, at the cost
# of ten milliseconds of a core's time for a loop over three numbers.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Inductor compiles here, not in processes that import torch for it.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import hypothesis
import torch
from launch import Run, load_checkpoint, train

collect_ignore = ["slurm"]  # needs root and Slurm: make test-cluster

# A shell's background job ignores it, and so would all that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples each time; HYPOTHESIS_PROFILE=default looks for others.
hypothesis.settings.register_profile("repeatable", derandomize=True, database=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined


@pytest.fixture(scope="module", params=["eager", "compiled", "triton"])
def backend(request) -> Iterator[str]:
    """Forces a backend. Tensors are made where it runs: Triton's kernels on the GPU if there is
    one, else on the CPU, in Triton's interpreter."""
    import interpreter

    on_gpu = request.param == "triton" and torch.cuda.is_available()
    with (
        pytest.MonkeyPatch.context() as patch,
        torch.device("cuda") if on_gpu else interpreter.like_hardware(),
    ):
        patch.setenv("MEGATRON_XIELU_BACKEND", request.param)
        yield request.param


# Files that take longest. Two run at a time: begun first, none of them is what is left at the end.
LONGEST = """
    test_functional test_optimizer_checkpoints test_compare test_prepare_data test_text_to_report
    test_grouped test_checkpoint_walk test_moe test_preflight test_layouts test_versions
    test_checkpoints test_backends test_readme test_triton
""".split()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; float64 is the eager backend's alone. `make test-gpu` takes Triton's
    tests beside those that are marked so themselves."""
    items.sort(key=lambda item: (*LONGEST, item.path.stem).index(item.path.stem))
    items[:] = [
        item
        for item in items
        if not (
            (params := getattr(item, "callspec", None) and item.callspec.params)
            and params.get("dtype") == torch.float64
            and params.get("backend", "eager") != "eager"
        )
    ]
    for item in items:
        if getattr(item, "callspec", None) and item.callspec.params.get("backend") == "triton":
            item.add_marker("gpu")


@pytest.fixture(scope="session")
def start_checkpoint(tmp_path_factory):
    """A one-rank xIELU checkpoint after iteration 1: the common start of all layouts."""
    folder = tmp_path_factory.mktemp("start")
    train(folder, "--xielu --save checkpoints --save-interval 1 --exit-interval 1")
    return folder / "checkpoints"


@pytest.fixture(scope="session")
def start_checkpoint_distributed(tmp_path_factory):
    """The same start, with the optimizer state in the distributed optimizer's form."""
    folder = tmp_path_factory.mktemp("start_distributed")
    train(
        folder,
        "--xielu --save checkpoints --save-interval 1 --exit-interval 1 "
        "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable",
    )
    return folder / "checkpoints"


@pytest.fixture(scope="session")
def one_rank(tmp_path_factory, start_checkpoint) -> tuple[Run, dict]:
    """One rank, from iteration 1 to 6: the run, and its checkpoint at the end."""
    folder = tmp_path_factory.mktemp("one_rank")
    run = train(folder, f"--xielu --load {start_checkpoint} --save checkpoints")
    return run, load_checkpoint(folder / "checkpoints" / "iter_0000006")


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A folder of text with both splits populated."""
    folder = tmp_path / "library"
    for index in range(80):
        path = folder / ("package" if index % 2 else ".") / f"module_{index}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"# é {index}\n".encode() * (index + 1))
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "module.py").write_text("not part of the text")
    (folder / "picture.png").write_text("no text")
    (folder / "empty.py").write_text("")
    return folder
