"""A run that goes on from a checkpoint is the run that never stopped, with what large runs have.

Several gradient buckets with padding at their ends, ranks that own nothing of one, and every
optimizer: at toy size by ``--ddp-bucket-size`` and data-parallel sizes that are no power of two.
Real sizes are in test_checkpoint_walk.py.
"""

from pathlib import Path

import pytest
import torch
from launch import REPOSITORY, TINY_LLAMA, Run, load_checkpoint, train
from megatron_wheels import patched, train_stock, unpack

from megatron_xielu.checkpoints.check import check

START, LAST = 4, 8  # iterations: four after the resume

BUCKETS = "--bf16 --overlap-grad-reduce --ddp-bucket-size 10000"
DEFAULT = f"{BUCKETS} --use-distributed-optimizer"
FULL = f"{DEFAULT} --dist-ckpt-optim-fully-reshardable"
EXPERTS = "--num-experts 2 --expert-model-parallel-size 2"
# The alphas, fp32 in a model of 16 bits, alone in a parameter group.
GROUP = "--xielu-alpha-lr-mult 3 --xielu-alpha-weight-decay 0.1"

# What is trained, and its ranks.
CASES = {
    "default": (f"--xielu {DEFAULT}", 3),
    "full": (f"--xielu {FULL}", 3),
    "default-5": (f"--xiprelu {DEFAULT}", 5),
    "full-5": (f"--xiprelu {FULL}", 5),
    "full-gather-to-one": (f"--xielu {FULL} --distrib-optim-fully-reshardable-mem-efficient", 3),
    "full-fp32": (f"--xielu {FULL.replace('--bf16 ', '')}", 3),
    "swiglu": (f"--swiglu {FULL}", 3),
    "dropout": (f"--xielu {DEFAULT} --hidden-dropout 0.1 --attention-dropout 0.1", 2),
    "dropout-gelu": (f"{DEFAULT} --hidden-dropout 0.1 --attention-dropout 0.1", 2),
    "not-distributed": (f"--xielu {BUCKETS}", 2),
    "not-distributed-fp16": (
        f"--xiprelu {GROUP} {BUCKETS.replace('--bf16', '--fp16 --initial-loss-scale 1024')}",
        2,
    ),
    # Ranks that own a part of some buckets of a buffer, and nothing of others before them.
    "default-many-buckets": (f"--xielu {GROUP} {DEFAULT.replace('10000', '1')}", 3),
    "default-tied-pp2": (f"--xielu {DEFAULT} --pipeline-model-parallel-size 2", 4),
    "default-virtual-pp2": (
        f"--xielu {GROUP} {DEFAULT} --pipeline-model-parallel-size 2 "
        "--num-layers-per-virtual-pipeline-stage 1",
        4,
    ),
    "muon": (f"--xielu {GROUP} {BUCKETS} --optimizer muon", 2),
    "muon-distributed": (f"--xielu {DEFAULT} --optimizer muon", 3),
    "muon-lion": (f"--xielu {DEFAULT} --optimizer muon --muon-scalar-optimizer lion", 2),
    "lion": (f"--xiprelu {BUCKETS} --optimizer lion", 2),
    "experts": (f"--xielu {DEFAULT} {EXPERTS}", 4),
    "experts-full": (f"--xielu {GROUP} {FULL} {EXPERTS}", 4),
    "experts-muon": (f"--xielu {BUCKETS} {EXPERTS} --optimizer muon", 2),
}


def flags_of(flags: str, ranks: int, folder: Path, last: int = LAST) -> str:
    return (
        f"{flags} --global-batch-size {4 * ranks} --train-iters {last} --lr-decay-iters {last} "
        f"--save {folder}/checkpoints --save-interval {START}"
    )


def load(folder: Path) -> str:
    return f"--load {folder}/checkpoints --ckpt-step {START}"


def assert_same(whole: Run, resumed: Run, folders: list[Path]) -> None:
    """The same losses to the last digit, the same bits of weights and optimizer state."""
    assert len(whole.losses) == LAST and len(resumed.losses) == LAST - START
    # The second loss that a run prints is Megatron's mean of two.
    assert whole.losses[START] == resumed.losses[0]
    assert whole.losses[START + 2 :] == resumed.losses[2:]
    for folder in folders:  # what each release writes of each optimizer is called good
        check(folder / "checkpoints" / f"iter_{LAST:07}", whole=True)
    one, other = (load_checkpoint(f / "checkpoints" / f"iter_{LAST:07}") for f in folders)
    assert one.keys() == other.keys()
    assert any("optimizer." in key for key in one)
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


@pytest.mark.parametrize(("flags", "ranks"), CASES.values(), ids=CASES)
def test_resume(flags, ranks, tmp_path, request):
    folders = [tmp_path / "whole", tmp_path / "resumed"]
    model = TIED_LLAMA if "tied" in request.node.callspec.id else TINY_LLAMA
    whole, resumed = (
        train(folder, f"{flags_of(flags, ranks, folder)} {more}", ranks=ranks, model=model)
        for folder, more in zip(folders, ("", load(folders[0])), strict=True)
    )
    assert_same(whole, resumed, folders)


@pytest.mark.parametrize(
    ("case", "mend", "message"),
    [
        ("default", "distributed_optimizer_checkpoints", "empty bucket encountered"),
        ("muon", "fp32_parameters", "does not match model shape"),
        ("lion", "fp32_parameters", "does not match model shape"),
        ("not-distributed", "fp32_parameters", "does not match model shape"),
        ("experts-muon", "fp32_parameters", "does not match any model sharded param"),
    ],
)
def test_without_mend(case, mend, message, tmp_path):
    """Megatron as it is: it fails at the first save."""
    flags, ranks = CASES[case]
    run = train(
        tmp_path,
        flags_of(flags, ranks, tmp_path),
        ranks=ranks,
        environment={"WITHOUT_MENDS": mend},
        succeeds=False,
    )
    assert message in run.output and len(run.losses) == START


@pytest.mark.parametrize("flags", [DEFAULT, FULL, BUCKETS])
def test_saved_before_the_first_real_step(flags, tmp_path):
    """fp16 skips steps until its loss scale fits; Adam has no moments until then."""
    flags = f"--xielu {flags.replace('--bf16', '--fp16')} --initial-loss-scale 2e6 --hysteresis 1"
    folders = [tmp_path / "whole", tmp_path / "resumed"]
    states = []
    for folder, more in zip(folders, ("", load(folders[0])), strict=True):
        train(folder, f"{flags_of(flags, 3, folder)} {more}", ranks=3)
        states.append(load_checkpoint(folder / "checkpoints" / f"iter_{LAST:07}"))
    assert not any(t.any() for t in moments(folders[0], START)), "a step was not skipped"
    assert any(t.any() for t in moments(folders[0], LAST))
    assert [key for key in states[0] if not torch.equal(*(s[key] for s in states))] == []


def moments(folder: Path, iteration: int) -> list[torch.Tensor]:
    tensors = load_checkpoint(folder / "checkpoints" / f"iter_{iteration:07}")
    return [tensor for key, tensor in tensors.items() if "exp_avg" in key]


@pytest.mark.parametrize("activation", ["--xielu", "--swiglu"])
def test_shifted_state_is_refused(activation, tmp_path):
    """Megatron as it is writes it without a word, and goes on from it; with the mends it stops."""
    flags, ranks, last = f"{activation} {FULL}", 3, START + 6
    as_it_is = {"WITHOUT_MENDS": "distributed_optimizer_checkpoints shifted_checkpoints"}
    stock, resumed, ours = (tmp_path / name for name in ("stock", "resumed", "ours"))
    whole = train(stock, flags_of(flags, ranks, stock, last), ranks=ranks, environment=as_it_is)
    more = f"{flags_of(flags, ranks, resumed, last)} {load(stock)}"
    wrong = train(resumed, more, ranks=ranks, environment=as_it_is)
    assert wrong.losses[0] == whole.losses[START]  # the 16-bit weights are right
    assert wrong.losses[-1] > whole.losses[-1] + 0.5

    more = f"{flags_of(flags, ranks, ours, last)} {load(stock)}"
    refused = train(ours, more, ranks=ranks, succeeds=False)
    assert "the optimizer state of this checkpoint is not that of its weights" in refused.output
    assert "Traceback" not in refused.output and not refused.losses
    anew = train(ours, f"{more} --no-load-optim", ranks=ranks)
    assert anew.losses[0] == whole.losses[START]
    assert anew.losses[-1] < whole.losses[-1] + 0.1


# A vocabulary that is padded otherwise at TP=2, and an embedding that both ends of a pipeline hold.
TIED_LLAMA = [
    *(word for word in TINY_LLAMA if word != "--untie-embeddings-and-output-weights"),
    *"--vocab-size 130".split(),
]


def test_reshard(tmp_path):
    """From layout to layout, loaded and saved: the state stays the same, bit for bit."""

    def move(name: str, flags: str, ranks: int, source: Path | None = None) -> Path:
        folder = tmp_path / name
        more = f"--xielu --global-batch-size 30 --micro-batch-size 1 --lr-decay-iters {LAST} "
        more += f"--train-iters {START} --save {folder}/checkpoints {flags} "
        more += "--padded-vocab-size 192 "  # Megatron's own is another at another TP
        more += load(source) if source else ""
        train(folder, more, ranks=ranks, model=TIED_LLAMA)
        return folder

    def state(folder: Path) -> dict[str, torch.Tensor]:
        return load_checkpoint(folder / "checkpoints" / f"iter_{START:07}")

    start = move("start", FULL, 3)
    expected = state(start)
    assert len([key for key in expected if "exp_avg_sq" in key]) == len(
        [key for key in expected if not key.startswith("optimizer")]
    )
    folder = start
    for layout, ranks in (
        ("", 2),
        ("", 5),
        ("--tensor-model-parallel-size 2", 2),
        ("--tensor-model-parallel-size 2 --sequence-parallel", 6),
        ("--pipeline-model-parallel-size 2", 2),
        ("--pipeline-model-parallel-size 2", 6),
        ("--ddp-bucket-size 3000", 1),
    ):
        folder = move(f"{layout}{ranks}".replace(" ", ""), f"{FULL} {layout}", ranks, folder)
        found = state(folder)
        assert found.keys() == expected.keys(), layout
        assert [k for k in found if not torch.equal(found[k], expected[k])] == [], layout

    # The default format: other data-parallel sizes, and into the other one.
    folder = move("default3", DEFAULT, 3, start)
    folder = move("default2", DEFAULT, 2, folder)
    folder = move("default5", DEFAULT, 5, folder)
    found = state(move("full4", FULL, 5, folder))
    assert [k for k in expected if not torch.equal(found[k], expected[k])] == []


SPEC = "--spec megatron_xielu.layer_specs xielu_layer_spec --use-te-activation-func"


@pytest.mark.parametrize(
    ("version", "flags"),
    [
        ("0.17.1", f"{SPEC} {FULL}"),
        ("0.18.2", f"--xielu {DEFAULT}"),
        ("0.18.2", f"--swiglu {FULL}"),
        ("0.19.2", f"{SPEC} {BUCKETS} --optimizer muon --use-distributed-optimizer"),
    ],
)
def test_scripts_of_other_releases(version, flags, tmp_path):
    """By ``--spec`` and in a patched tree (where a baseline is mended too)."""
    is_patched = "--spec" not in flags
    tree = patched(version) if is_patched else unpack(version, tmp_path / "megatron")
    folders = [tmp_path / "whole", tmp_path / "resumed"]
    whole, resumed = (
        train_stock(folder, version, tree, f"{flags_of(flags, 3, folder)} {more}", ranks=3)
        for folder, more in zip(folders, ("", load(folders[0])), strict=True)
    )
    assert_same(whole, resumed, folders)


def test_launcher_mends_the_baseline_of_any_script(tmp_path):
    script = str(REPOSITORY / "tests/helpers/stock_script.py")
    command = ["-m", "megatron_xielu.cluster.rank", "-m", "megatron_xielu.cpu", script]
    folders = [tmp_path / "whole", tmp_path / "resumed"]
    whole, resumed = (
        train(folder, f"{flags_of(f'--swiglu {FULL}', 3, folder)} {more}", ranks=3, command=command)
        for folder, more in zip(folders, ("", load(folders[0])), strict=True)
    )
    assert_same(whole, resumed, folders)
