"""``compare_activations.py collect``: real runs of examples/pretrain.sh beside local ones, and run
folders made by hand for every refusal."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import compare_activations as tool
import launch
import pytest
from compare import collect, results
from launcher_command import megatron_arguments
from report_runs import ARGUMENTS, write_events

from megatron_xielu.checkpoints.alphas import read_alphas
from megatron_xielu.checkpoints.folder import complete_checkpoints
from megatron_xielu.report.load import load_all

ITERATIONS = 20
OF_ALL = {
    **{"MODEL": "debug", "DEVICE": "cpu", "PREFLIGHT": "0", "FAULT_TOLERANCE": "0"},
    **{"ASYNC_SAVE": "0", "TOKENS": f"{ITERATIONS * 16 * 64}", "EVAL_INTERVAL": "8"},
}
SWIGLU = {"xielu": False, "swiglu": True, "ffn_hidden_size": 64}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """xIELU by pretrain.sh on two ranks, stopped once, and here with another seed; SwiGLU here."""
    out = tmp_path_factory.mktemp("trained")
    cluster = out / "xielu" / "seed_1"
    variables = {
        **{"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"},
        **OF_ALL,
        **{"GPUS_PER_NODE": "2", "SEED": "1", "RUN_DIR": str(cluster)},
        **{"PYTHON": launch.python(), "PYTHON_EXEC": launch.python()},
        "DATA_CACHE": str(out / "cache"),
    }
    for flags, code in ((["--exit-interval", "10"], 75), ([], 0)):
        command = [str(launch.REPOSITORY / "examples/pretrain.sh"), *flags]
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)
        assert done.returncode == code, done.stderr[-3000:]
    for name, seed in (("xielu", 2), ("swiglu", 1)):
        words = megatron_arguments(**OF_ALL, GPUS_PER_NODE="1", ACTIVATION=name, SEED=str(seed))
        own = ["--save", "checkpoints", "--load", "checkpoints", "--tensorboard-dir", "events"]
        own += ["--data-cache-path", str(out / "cache"), "--log-activation-inputs", "20"]
        entry = ("-m", "megatron_xielu.pretrain_gpt")
        launch.train(out / name / f"seed_{seed}", [*words, *own], model=(), command=entry)
    return out


def run_of(
    folder: Path, *, last: int = 40, shift: float = 0.0, layers: int = 4, **more: Any
) -> Path:
    """A run made by hand: event files alone, of xIELU unless the arguments say otherwise."""
    arguments = {**ARGUMENTS, "train_iters": 40, "mock_data": True, "seed": 1, **more}
    write_events(
        folder / "tensorboard",
        range(1, last + 1),
        layers=layers if arguments["xielu"] else 0,
        shift=shift,
        arguments=arguments,
        validate_every=20,
    )
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """xIELU and SwiGLU with two seeds each."""
    return [
        run_of(tmp_path / f"{name}_{seed}", seed=seed, shift=shift + seed**2 / 100, **of)
        for name, of, shift in (("a", {}, 0.0), ("b", SWIGLU, 0.5))
        for seed in (1, 2)
    ]


def collected(folders: list[Path], baseline: str | None = None) -> tuple[str, dict[str, Any]]:
    """What results.md and results.json would have."""
    records, variants, costs, setup = collect.comparison(load_all(folders), baseline, "command")
    compared = results._compare(records, setup.baseline)
    adapted = results.adaptations(records, variants)
    found = (records, variants, costs, compared, adapted, setup)
    return results.markdown(*found), json.loads(json.dumps(results._json(*found)))


def refusal(capsys: pytest.CaptureFixture[str], folders: list[Path], *options: str) -> str:
    """The one line, less what is said of progress."""
    with pytest.raises(SystemExit) as end:
        tool.main(["collect", *map(str, folders), *options])
    assert end.value.code == 2
    *others, line = capsys.readouterr().err.splitlines()
    assert all(other.startswith("reading ") for other in others)
    assert line.startswith("compare: error: ")
    return line


def test_runs_of_a_cluster_beside_local_ones(trained, tmp_path, capsys):
    """One on two ranks, which was stopped and resumed."""
    folders = [trained / name for name in ("xielu/seed_1", "xielu/seed_2", "swiglu/seed_1")]
    out = tmp_path / "out"
    tool.main(["collect", *map(str, folders), "--out", str(out)])
    assert "warning" not in capsys.readouterr().out
    files = {"results.md", "results.json", "report", *collect._PICTURES}
    assert {path.name for path in out.iterdir()} == files
    shown = (out / "results.md").read_text()
    assert "- held-out loss: of the last validation during training" in shown
    assert "| xIELU | 2 | 192 | 197,192 |" in shown and "| SwiGLU | 1 | 128 | 197,184 |" in shown
    assert "| step [ms] | tokens/s |\n" in shown and "Memory:" not in shown
    assert "**The runs differ in layout (xielu/seed_1: TP 1, PP 1, CP 1, DP 2, bf16; " in shown

    assert re.search(r"- xIELU: \d\.\d+  .* \(n = 1\)\n- SwiGLU: \d\.\d+ ", shown)  # of the inputs

    found = json.loads((out / "results.json").read_text())
    last = {}
    for folder in folders:
        name, seed = folder.parent.name, folder.name.removeprefix("seed_")
        of_seed = found["variants"][name]["seeds"][seed]
        assert [step for step, _ in of_seed["validation"]] == [8, 16, ITERATIONS]
        last[name, seed] = of_seed["validation"][-1][1]
    (comparison,) = found["comparisons"]
    assert found["context"]["run"].startswith(f"{ITERATIONS} iterations, ")
    assert comparison["differences"] == {"1": last["xielu", "1"] - last["swiglu", "1"]}
    saved = read_alphas(complete_checkpoints(folders[0] / "checkpoints"), "xielu")
    assert saved.iterations == [10, ITERATIONS]
    alphas = found["variants"]["xielu"]["seeds"]["1"]["alpha_p"]
    assert alphas == pytest.approx(saved.positive[-1], rel=1e-6)

    # Where the checkpoints are on another file system, all is the same.
    shutil.copytree(trained, tmp_path / "copy", ignore=shutil.ignore_patterns("checkpoints"))
    copies = [tmp_path / "copy" / folder.relative_to(trained) for folder in folders]
    _, again = collected(copies)
    assert again["variants"] == found["variants"] and again["comparisons"] == [comparison]


def test_what_runs_do_not_tell_is_left_out(runs):
    shown, found = collected(runs)
    assert [one["mean"] for one in found["comparisons"]] == [pytest.approx(-0.5)]
    assert "| held-out loss | perplexity |\n" in shown and "Step time" not in shown
    assert "step_seconds" not in found["variants"]["xielu"]["seeds"]["1"]


def test_alphas_that_are_not_known_are_left_out(tmp_path):
    """As in a run of a stock script whose checkpoints lie elsewhere; an older picture goes."""
    folder, out = run_of(tmp_path / "run", layers=0), tmp_path / "out"
    out.mkdir()
    (out / "results.json").write_text(json.dumps({"context": {"command": collect._COMMAND}}))
    (out / "alphas.png").write_text("older")
    tool.main(["collect", str(folder), "--out", str(out)])
    assert {path.name for path in out.iterdir()} == {
        *("results.md", "results.json", "loss.png", "report")
    }
    assert "alphas.png" not in (out / "results.md").read_text()


def test_alphas_of_experts_are_not_those_of_layers(tmp_path):
    folder = run_of(tmp_path / "run")
    (run,) = load_all([folder])
    assert collect._alphas(run) is not None
    run.alpha_names[1] = "layer_01.experts"
    assert collect._alphas(run) is None


def test_the_loss_of_an_evaluation_where_all_have_it(runs):
    for number, folder in enumerate(runs):
        assert collected(runs)[1]["context"]["held-out loss"].startswith("of the last validation")
        evaluation = {"iteration": 40, "loss": 1.0 + number, "data": ["/data/held-out"]}
        (folder / "evaluation.json").write_text(json.dumps(evaluation))
    _, found = collected(runs)
    assert found["context"]["held-out loss"] == "of megatron_xielu.evaluate on /data/held-out"
    assert found["variants"]["swiglu"]["validation_loss"]["mean"] == 3.5


def test_variants_are_told_apart_and_layouts_are_not(runs, tmp_path):
    more = [
        run_of(
            tmp_path / "wide",
            seed=3,
            tensor_model_parallel_size=1,
            xielu_check_tp_sync=1000,
            use_checkpoint_args=True,
            # Of a newer version.
            xielu_frozen_alphas=False,
            xielu_alpha_lr_mult=1.0,
            xielu_alpha_weight_decay=0.0,
        ),
        run_of(tmp_path / "frozen", xielu_frozen_alphas=True),
        run_of(tmp_path / "xielu-low/seed_1", xielu_alpha_p_init=0.4),
        run_of(tmp_path / "fast", xielu_alpha_lr_mult=10.0, xielu_beta=0.3),
        run_of(tmp_path / "own", xielu_alpha_p_init=[0.1, 0.2, 0.3, 0.4]),
        run_of(tmp_path / "gelu", xielu=False, weight_decay=0.0),
        run_of(tmp_path / "slow", lr=0.001),
    ]
    shown, found = collected([*runs, *more], baseline="xielu")
    assert {name: of["label"] for name, of in found["variants"].items()} == {
        "xielu": "xIELU",
        "swiglu": "SwiGLU",
        "xielu-frozen": "xIELU, alphas frozen",
        "xielu-low": "xIELU, αp from 0.4",
        "xielu-lr-10-beta-0.3": "xIELU, learning rate of alphas × 10, β 0.3",
        "xielu-init-p-values-by-layer": "xIELU, αp from values by layer",
        "gelu-weight-decay=0": "GELU, weight decay 0",
        "xielu-lr=0.001": "xIELU, lr 0.001",
    }
    assert list(found["variants"]["xielu"]["seeds"]) == ["1", "2", "3"]
    betas = {name: of.variant.beta for name, of in collect.group(load_all(more)).items()}
    assert betas["xielu-lr-10-beta-0.3"] == 0.3  # of which nonlinearity depends
    assert (
        "Seeds without a partner count in means, and are not paired: xielu 3 (swiglu has none);"
        in shown
    )


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"seed": 2}, "xielu has seed 2 twice: a_2, c"),
        ({"last": 30}, "not finished, or event files are missing: c is at iteration 30 of 40"),
        ({"ffn_hidden_size": 128}, "not at equal cost, 0.1 % at most is allowed: xielu-ffn"),
        ({"mock_data": False, "data_path": ["x"]}, "the runs differ in data (a_1, a_2, b_1 and 1"),
        ({"seq_length": 64}, "the runs differ in sequence length ("),
        ({"global_batch_size": 16}, "the runs differ in batch ("),
        ({"tokenizer_type": "Other"}, "the runs differ in tokenizer or vocabulary ("),
        (
            {"train_iters": 20, "last": 20},
            "the runs differ in --train-iters (a_1, a_2, b_1 and 1 more: 40; c: 20): name those of",
        ),
        ({"last": 45}, "the last iterations that were logged differ ("),
        ({"lr_decay_style": "cosine"}, "the runs differ in --lr-decay-style ("),
        ({"eval_iters": 3}, "the runs differ in --eval-iters ("),
        (
            {"shift": float("nan")},
            "c has no loss that is a number after its last iteration, 40: it diverged",
        ),
        ({"multi_latent_attention": True}, "whether costs are equal is not known; FLOPs are not"),
        ({"num_layers": "many"}, "c: its arguments are not known, neither from a checkpoint nor"),
    ],
)
def test_what_cannot_be_compared_is_refused(runs, tmp_path, capsys, more, said):
    other = run_of(tmp_path / "c", **{"seed": 3, **more})
    line = refusal(capsys, [*runs, other], "--out", str(tmp_path / "out"))
    assert said in line and "c" in line
    assert not list((tmp_path / "out").iterdir())


def test_other_refusals(runs, tmp_path, capsys):
    out = ("--out", str(tmp_path / "out"))
    assert "--baseline gelu: not among what is compared, xielu, swiglu" in refusal(
        capsys, runs, *out, "--baseline", "gelu"
    )
    assert f"{tmp_path / 'none'} is not a folder" in refusal(capsys, [tmp_path / "none"], *out)
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "evaluation.json").write_text("{}")
    assert "its arguments are not known" in refusal(capsys, [alone], *out)

    (tmp_path / "out" / "results.md").write_text("mine")
    for other in ("", '{"context": {"command": "tools/compare_activations.py tiny"}}'):
        (tmp_path / "out" / "results.json").write_text(other)
        assert "results.md there was not made by collect" in refusal(capsys, runs, *out)
    assert (tmp_path / "out" / "results.md").read_text() == "mine"
    assert "cannot be written to" in refusal(capsys, runs, "--out", str(alone / "evaluation.json"))
