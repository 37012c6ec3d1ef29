"""docs/versions.md: every way into every release, on the real wheels, with TP=2 and on the CPU.

All of them are compared with this package's entry on the installed 0.19: from the same seed they
train the same model, to the last printed digit. `--spec` on 0.19 is in test_stock_script.py, what
the patching itself may and may not do in test_patches.py.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from event_curves import alpha_curves
from launch import REPOSITORY, Run, train
from megatron_wheels import RELEASES, patched, train_stock, unpack

from megatron_xielu import patch
from megatron_xielu.kernels import reference
from megatron_xielu.workarounds import releases

TP2 = "--tensor-model-parallel-size 2"
WITH_EVENTS = f"{TP2} --tensorboard-dir events"
SUMMARY = "megatron_xielu: xIELU in 4 MLPs, αp 0.8, αn 0.8, β 0.5; alphas fp32, summed over TP=2\n"


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> tuple[Run, dict]:
    """This package's entry, the way in that the others are compared with; and its curves."""
    folder = tmp_path_factory.mktemp("ours")
    run = train(folder, f"--xielu {WITH_EVENTS}", ranks=2)
    assert run.output.count(SUMMARY) == run.output.count("megatron_xielu: xIELU") == 1
    return run, alpha_curves(folder / "events")


def contents(tree) -> dict:
    """Mode and bytes of every file, but for what running it leaves."""
    files = (file for file in tree.rglob("*") if file.is_file() and file.suffix != ".pyc")
    return {file: (file.stat().st_mode, file.read_bytes()) for file in files}


def assert_trained_as(ours: tuple[Run, dict], run: Run, folder: Path) -> None:
    """The same losses, and on all ranks the same bits in alphas that have moved; and it says so."""
    ours, expected = ours
    assert run.output.count(SUMMARY) == run.output.count("megatron_xielu: xIELU") == 1
    curves = alpha_curves(folder / "events")
    assert len(curves) == 5 * 4 and curves.keys() == expected.keys()
    for tag, values in curves.items():
        assert values == [(step, pytest.approx(value, rel=1e-6)) for step, value in expected[tag]]
    assert len(run.losses) == 6 and run.losses == ours.losses
    alphas, others = run.dumps[0]["alphas"], run.dumps[1]["alphas"]
    assert alphas == others
    # Scripts differ in how many wrappers stand before the name.
    assert sorted(alphas.values()) == sorted(ours.dumps[0]["alphas"].values())
    for name, (value,) in alphas.items():
        effective = 0.8 if name.endswith("alpha_p") else 0.8 - 0.5
        start = reference.inverse_softplus(torch.tensor(effective, dtype=torch.double))
        assert abs(value - start) > 1e-4, f"{name} has not moved"


@pytest.mark.parametrize("version", RELEASES)
def test_patch(version, ours, tmp_path):
    tree = unpack(version, tmp_path / "megatron")
    before = contents(tree)
    patch.apply(tree)
    run = train_stock(
        tmp_path / "run", version, tree, f"--xielu --xielu-check-tp-sync 1 {WITH_EVENTS}", ranks=2
    )
    assert_trained_as(ours, run, tmp_path / "run")
    patch.revert(tree)
    assert contents(tree) == before


@pytest.mark.parametrize("version", [v for v in RELEASES if not v.startswith("0.19")])
def test_spec(version, ours, tmp_path):
    tree = unpack(version, tmp_path / "megatron")
    flags = "--spec megatron_xielu.layer_specs xielu_layer_spec --use-te-activation-func"
    run = train_stock(tmp_path / "run", version, tree, f"{flags} {WITH_EVENTS}", ranks=2)
    assert_trained_as(ours, run, tmp_path / "run")


def test_patch_and_checkpoints(tmp_path):
    """Saved, restored by --use-checkpoint-args bit for bit, and not loaded into a GELU model."""
    half = "--bf16 --use-distributed-optimizer --ckpt-fully-parallel-save"
    straight = train_stock(
        tmp_path / "straight",
        "0.18.2",
        patched("0.18.2"),
        f"--xielu {half} --save {tmp_path}/saved --save-interval 3",
    )
    latest = tmp_path / "saved" / "latest_checkpointed_iteration.txt"
    latest.write_text("3")
    load = f"{half} --load {tmp_path}/saved"
    resumed = train_stock(
        tmp_path / "resumed", "0.18.2", patched("0.18.2"), f"{load} --use-checkpoint-args"
    )
    assert resumed.dumps == straight.dumps
    # The second loss that a run prints is Megatron's mean of two.
    assert [resumed.losses[i] for i in (0, 2)] == [straight.losses[i] for i in (3, 5)]

    refused = train_stock(tmp_path / "refused", "0.18.2", patched("0.18.2"), load, succeeds=False)
    assert "was trained with --xielu, but this run asks for GELU; add --xielu" in refused.output


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--xielu --swiglu", "--xielu does not work with --swiglu"),
        ("--xielu --yaml-cfg x.yaml", "--xielu does not work with --yaml-cfg"),
    ],
)
def test_patch_refuses(flags, message, tmp_path):
    run = train_stock(tmp_path, "0.18.2", patched("0.18.2"), flags, succeeds=False)
    assert f"megatron_xielu: error: {message}" in run.output


@pytest.mark.parametrize("version", ["0.17.1", "0.20.0"])
def test_entry_refuses_other_releases(version, tmp_path):
    core = tmp_path / "megatron" / "core"
    core.mkdir(parents=True)
    (core / "__init__.py").touch()
    major, minor, micro = version.split(".")
    (core / "package_info.py").write_text(f"MAJOR = {major}\nMINOR = {minor}\nPATCH = {micro}\n")
    done = subprocess.run(
        [sys.executable, "-m", "megatron_xielu.pretrain_gpt", "--xielu"],
        env={"PYTHONPATH": f"{tmp_path}:{REPOSITORY}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert (
        f"this entry is for megatron-core 0.19, and {tmp_path}/megatron is {version}; with it"
        in (done.stderr)
    )
    assert "--spec megatron_xielu.layer_specs" in done.stderr


def test_spec_on_untested_releases(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(releases, "installed", lambda: (tmp_path, "0.16.1"))
    with pytest.raises(releases.UnsupportedRelease, match=r"needs megatron-core 0.17 or newer"):
        releases.check_spec()
    monkeypatch.setattr(releases, "installed", lambda: (tmp_path, "0.20.0"))
    releases.check_spec()
    assert "tested up to megatron-core 0.19" in caplog.text
