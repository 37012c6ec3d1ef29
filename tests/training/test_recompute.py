"""--xielu-recompute-output: the same training bit for bit, and less memory."""

from pathlib import Path

import pytest
import torch
from launch import REPOSITORY, load_checkpoint, train

FLAG = "--xielu-recompute-output"
STEPS = 3
# Between two of the steps, and after the last.
EVALUATION = "--eval-interval 2 --eval-iters 1"
# On two ranks each.
LAYOUTS = {
    "tp2-chunks": (
        f"--xielu --tensor-model-parallel-size 2 --mlp-chunks-for-training 2 {EVALUATION}"
    ),
    "tp2-sp-overlap-bf16": (
        "--xiprelu --tensor-model-parallel-size 2 --sequence-parallel --bf16 "
        # Its other form saves the padding between parameters too, which nothing initialises.
        "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable "
        "--overlap-grad-reduce --overlap-param-gather"
    ),
    # Two model chunks a rank and several micro-batches in flight.
    "pp2-virtual": (
        "--xielu --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 "
        f"--recompute-granularity selective --recompute-modules core_attn {EVALUATION}"
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_trains_bitwise_like_without_it(layout, tmp_path):
    flags = f"{LAYOUTS[layout]} --train-iters {STEPS} --save checkpoints --no-save-rng"
    kept = train(tmp_path / "kept", flags, ranks=2)
    recomputed = train(tmp_path / "recomputed", f"{flags} {FLAG}", ranks=2)

    assert recomputed.losses == kept.losses and recomputed.grad_norms == kept.grad_norms
    expected, actual = (
        load_checkpoint(tmp_path / run / "checkpoints" / f"iter_{STEPS:07}")
        for run in ("kept", "recomputed")
    )
    assert actual.keys() == expected.keys()
    assert any("alpha_p" in key for key in actual) and any("exp_avg" in key for key in actual)
    for key in expected:
        assert torch.equal(actual[key], expected[key]), key
    for before, after in zip(kept.dumps, recomputed.dumps, strict=True):
        assert after["alphas"] == before["alphas"] and after["grads"] == before["grads"]
        assert after["alpha_collectives"] == before["alpha_collectives"]
        # Once more per layer of the rank, chunk, micro-batch and step; never for an evaluation.
        layers_and_chunks = 2 if "pipeline" in flags else 4 * 2 if "chunks" in flags else 4
        recomputations = after["formula_calls"] - before["formula_calls"]
        assert recomputations == layers_and_chunks * 4 * STEPS


def test_on_the_real_mlp(tmp_path):
    train(tmp_path, "", model=(), command=[str(Path(__file__).with_name("recompute_cases.py"))])


def test_memory_table_is_the_one_in_the_docs(tmp_path):
    script = str(REPOSITORY / "tools/bench/measure_activation_memory.py")
    train(tmp_path, "--output table.md", model=(), command=[script])
    table = (tmp_path / "table.md").read_text()
    assert table in (REPOSITORY / "docs" / "memory.md").read_text()
    bytes_per_token = {
        tuple(cells[:2]): int(cells[5].replace(",", ""))
        for line in table.splitlines()[2:]
        if (cells := [cell.strip() for cell in line.strip("|").split("|")])
    }
    for model in ("1.1B", "3B"):
        swiglu, recomputed = (bytes_per_token[model, mlp] for mlp in ("SwiGLU", f"xIELU, `{FLAG}`"))
        assert recomputed <= swiglu * 2 / 3


def test_a_missing_compiler_is_said_at_the_start(tmp_path):
    run = train(
        tmp_path,
        f"--xielu {FLAG} --tensor-model-parallel-size 2",
        ranks=2,
        environment={"CXX": "no-such-compiler", "TORCH_EXTENSIONS_DIR": str(tmp_path / "cache")},
        succeeds=False,
    )
    errors = [line for line in run.output.splitlines() if "error: --" in line]
    # torchrun ends the other rank as soon as one has said it.
    assert errors, run.output[-3000:]
    for error in errors:
        assert error.startswith(f"megatron_xielu: error: {FLAG} needs a C++ compiler and ninja")
    assert "Traceback" not in run.output
