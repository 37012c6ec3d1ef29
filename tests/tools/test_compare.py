"""tools/compare_activations.py: cost, statistics, resuming, refusals; real quick runs."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from html import unescape
from importlib.util import find_spec
from pathlib import Path

import compare_activations as tool
import evaluate_suite
import launch
import pytest
import torch
from compare import (
    byte_text,
    cluster,
    equal_cost,
    paired,
    plots,
    records,
    results,
    resume,
    runs,
    settings,
    sweep,
    text,
    training,
    variants,
)
from suite import runs as suite_runs
from suite import tasks as suite_tasks
from suite.evaluation import Evaluation
from warm_python import Process

from megatron_xielu.checkpoints.alphas import Alphas
from megatron_xielu.checkpoints.folder import read_tracker
from megatron_xielu.checkpoints.source import Refused
from megatron_xielu.checkpoints.torch_dist import read_metadata
from megatron_xielu.report.depth import RISES

CPU = tool.Machine("cpu", 2)
ALL = [variants.parse(name) for name in variants.ACTIVATIONS]
SETTINGS = settings.PRESETS


def flags_of(name: str, size: str, *, ranks: int = 1, ffn: int | None = None) -> list[str]:
    variant, chosen = variants.parse(name), SETTINGS[size]
    vocabulary = 16_384 if chosen.tokenizer == "bpe" else byte_text.VOCAB_SIZE
    padded = 16_384 if chosen.tokenizer == "bpe" else 264
    made = text.Text(Path("t"), Path("v"), Path("c"), vocabulary, padded, "token", {}, {})
    return settings.megatron_flags(
        chosen,
        variant,
        seed=7,
        ffn=ffn or chosen.ffn_of(variant),
        tensor_parallel=ranks,
        text=made,
        folder=Path("f"),
    )


class TestVariants:
    @pytest.mark.parametrize(
        ("name", "flags", "init"),
        [
            ("xielu-frozen", "--xielu --xielu-frozen-alphas", (0.8, 0.8)),
            ("xiprelu-shared", "--xiprelu --xielu-shared-alphas", (0.8, 0.8)),
            ("xielu-init-0.4", "--xielu --xielu-alpha-p-init 0.4", (0.4, 0.8)),
            (
                "xiprelu-init-0.4-1.2",
                "--xiprelu --xielu-alpha-p-init 0.4 --xielu-alpha-n-init 1.2",
                (0.4, 1.2),
            ),
            ("xielu-beta-0.3", "--xielu --xielu-beta 0.3", (0.8, 0.8)),
            ("xielu-lr-0.3", "--xielu --xielu-alpha-lr-mult 0.3", (0.8, 0.8)),
            ("xiprelu-decay-0.1", "--xiprelu --xielu-alpha-weight-decay 0.1", (0.8, 0.8)),
            ("xielu-recompute", "--xielu --xielu-recompute-output", (0.8, 0.8)),
        ],
    )
    def test_ablations(self, name: str, flags: str, init: tuple[float, float]) -> None:
        variant = variants.parse(name)
        assert list(variant.flags) == flags.split()
        assert variant.init == init

    @pytest.mark.parametrize(
        "name",
        "relu gelu-frozen relu2-recompute xielu- xielu-frosen xielu-init xielu-beta-x "
        "xielu-init-0.4-0.5 xielu-lr xielu-lr-0 xielu-decay-0.1-0.2".split(),
    )
    def test_what_is_none_is_refused(self, name: str) -> None:
        with pytest.raises(ValueError, match=re.escape(name.partition("-")[0])):
            variants.parse(name)


@pytest.mark.parametrize("size", SETTINGS)
class TestSettings:
    def test_are_consistent(self, size: str) -> None:
        chosen = SETTINGS[size]
        assert chosen.ffn % 6 == 0  # 2/3 of it is a whole number that two ranks share
        assert chosen.heads % 2 == 0
        assert chosen.batch % chosen.micro_batch == 0
        assert chosen.iterations % chosen.validate_every != 0
        assert chosen.iterations % chosen.save_every == 0
        assert chosen.iterations >= chosen.warmup + chosen.decay

    def test_pre_activations_start_as_large_as_the_papers(self, size: str) -> None:
        """1536 wide, std 0.025: behind an RMSNorm 0.98."""
        flags = flags_of("xielu", size)
        std = float(flags[flags.index("--init-method-std") + 1])
        assert std * math.sqrt(SETTINGS[size].hidden) == pytest.approx(0.98, abs=0.001)
        assert "--embedding-init-method-std" not in flags  # the same: logits start as large, too

    def test_costs_are_equal_but_for_the_alphas(self, size: str) -> None:
        names = [*variants.ACTIVATIONS, "xielu-frozen", "xielu-shared", "xiprelu-beta-0.3"]
        names += ["xielu-recompute"]
        costs = equal_cost.costs({name: flags_of(name, size) for name in names})
        equal_cost.check(costs, "swiglu")
        assert len({cost.flops for cost in costs.values()}) == 1
        alphas = {
            name: cost.parameters - costs["swiglu"].parameters for name, cost in costs.items()
        }
        assert alphas["relu2"] == alphas["gelu"] == 0
        assert alphas["xielu"] == alphas["xiprelu"] == 2 * SETTINGS[size].layers
        assert alphas["xielu-shared"] == 2
        labels = {name: variants.parse(name).label for name in names}
        assert f"{costs['xielu'].parameters:,}" in equal_cost.table(costs, labels, "swiglu")

    def test_a_mismatch_is_refused_with_the_width_that_matches(self, size: str) -> None:
        ffn = SETTINGS[size].ffn
        costs = equal_cost.costs(
            {"swiglu": flags_of("swiglu", size), "xielu": flags_of("xielu", size, ffn=ffn + 8)}
        )
        with pytest.raises(SystemExit) as error:
            equal_cost.check(costs, "swiglu")
        assert "xielu has" in str(error.value) and "FLOPs per token" in str(error.value)
        assert f"--ffn xielu={ffn} would match (now {ffn + 8})" in str(error.value)

    @pytest.mark.parametrize("ranks", [1, 2])
    def test_flags_name_the_activation_and_the_padded_vocabulary(
        self, size: str, ranks: int
    ) -> None:
        for name, activation in variants.ACTIVATIONS.items():
            flags = flags_of(name, size, ranks=ranks)
            assert variants.parse(name).flags[0] in flags
            assert ("--xielu-check-tp-sync" in flags) == (activation.trainable and ranks == 2)
            assert flags[flags.index("--seed") + 1] == "7"
            multiple = ranks * int(flags[flags.index("--make-vocab-size-divisible-by") + 1])
            vocabulary = int(flags[flags.index("--vocab-size") + 1])
            assert math.ceil(vocabulary / multiple) * multiple in (264, 16_384)


class TestPaired:
    def test_students_sleep_data(self) -> None:
        """The data of Student's paper of 1908, table I: t = 4.0621, df = 9, p = 0.00283, 95 %
        interval 0.7001 to 2.4599, as R's t.test(extra ~ group, paired = TRUE) prints them."""
        one = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
        two = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
        values = {"a": dict(enumerate(one)), "b": dict(enumerate(two))}
        (found,) = paired.compare(values, "a")
        assert found.mean == pytest.approx(1.58)
        assert found.interval == pytest.approx((0.7001142, 2.4598858), abs=1e-6)
        assert found.p == found.p_holm == pytest.approx(0.002833, abs=1e-6)
        assert found.verdict == paired.DIFFERENCE

    def test_holm(self) -> None:
        p = {"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}
        assert paired.holm(p) == pytest.approx({"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06})
        assert paired.holm({"a": 0.9, "b": 0.8}) == pytest.approx({"b": 1.0, "a": 1.0})

    def test_a_difference_alone_can_be_noise_among_many(self) -> None:
        base = {1: 0.0, 2: 0.0, 3: 0.0}
        far = {1: 1.0, 2: 1.1, 3: 1.25}  # p = 0.0042
        near = {1: 0.10, 2: 0.16, 3: 0.22}  # p = 0.046
        noise = {1: 0.3, 2: -0.3, 3: 0.1}
        alone = paired.compare({"base": base, "near": near}, "base")
        assert [one.verdict for one in alone] == [paired.DIFFERENCE]
        found = paired.compare({"far": far, "near": near, "noise": noise, "base": base}, "base")
        verdicts = {one.variant: one.verdict for one in found}
        assert verdicts == {
            "far": paired.DIFFERENCE,
            "near": paired.NOISE,
            "noise": paired.NOISE,
        }

    def test_one_seed_cannot_say(self) -> None:
        (found,) = paired.compare({"a": {42: 1.0}, "b": {42: 1.5, 43: 9.0}}, "a")
        assert found.differences == {42: 0.5}
        assert (found.interval, found.p, found.verdict) == (None, None, paired.ONE_SEED)

    def test_equal_to_the_bit(self) -> None:
        (found,) = paired.compare({"a": {1: 1.0, 2: 2.0}, "b": {1: 1.0, 2: 2.0}}, "a")
        assert (found.p, found.verdict) == (1.0, paired.NOISE)

    def test_spread(self) -> None:
        spread = paired.Spread.of([1.0, 2.0, 4.0])
        assert (spread.mean, spread.n) == (pytest.approx(7 / 3), 3)
        assert spread.sd == pytest.approx(1.5275, abs=1e-4)
        assert spread.show(".2f") == "2.33 ± 1.53"
        assert paired.Spread.of([2.0]).show(".1f") == "2.0"


def make_record(name: str, seed: int = 42, loss: float = 3.2) -> records.Record:
    iterations, layers = list(range(0, 50, 10)), 3
    history = [[0.8 + 0.01 * step * (layer + 1) for layer in range(layers)] for step in iterations]
    return records.Record(
        variant=name,
        seed=seed,
        parameters=1000,
        tokens=2000,
        step_seconds=0.5,
        tokens_per_second=123.4,
        memory=2**30,
        memory_of="largest process, resident",
        train=[(step, 5.0 - step / 20) for step in range(1, 41)],
        valid=[(20, 4.1), (40, loss)],
        alphas=Alphas(iterations, history, history) if variants.parse(name).has_alphas else None,
    )


SETUP = results.Setup(
    "quick", "byte", "swiglu", ("A note.",), {"device": "cpu", "date": "2026-01-01"}, {}
)
COSTS = equal_cost.costs({variant.name: flags_of(variant.name, "quick") for variant in ALL})


class TestResults:
    def test_files_and_table(self, tmp_path: Path) -> None:
        made = {
            variant.name: {
                seed: make_record(variant.name, seed, 3 + number / 10 + (seed + number) % 3 / 1e3)
                for seed in (1, 2, 3)
            }
            for number, variant in enumerate(ALL)
        }
        for name, of_seed in made.items():
            for seed, record in of_seed.items():
                path = tool.folder_of(tmp_path, name, seed) / "record.json"
                text.write_json(path, record.to_json())
        found = tool.finished_records(tmp_path, ALL, [1, 2, 3, 4])
        assert found == made

        out = tmp_path / "results"
        shown = results.write(out, found, ALL, COSTS, SETUP)
        assert shown == (out / "results.md").read_text()
        for variant in ALL:
            assert f"| {variant.label} | 3 |" in shown
        assert "**A note.**" in shown
        assert "xIPReLU αn: 1.200  1.600  2.000" in shown
        assert shown.count(f"| {paired.DIFFERENCE} |") == 4
        assert f"xIPReLU, 3 seeds: nonlinearity {RISES}: deeper layers are less linear" in shown
        assert "| 2 | 0.3834 |" in shown  # xIELU's last layer, at the start

        written = json.loads((out / "results.json").read_text())
        xielu = written["variants"]["xielu"]
        assert xielu["validation_loss"]["mean"] == pytest.approx(3.001)
        assert xielu["validation_loss"]["sd"] == pytest.approx(0.001)
        assert xielu["seeds"]["1"]["perplexity"] == pytest.approx(math.exp(3.001))
        assert xielu["seeds"]["1"]["alpha_p"] == pytest.approx([1.2, 1.6, 2.0])
        assert "alpha_p" not in written["variants"]["swiglu"]["seeds"]["1"]
        assert [one["variant"] for one in written["comparisons"]] == [
            variant.name for variant in ALL if variant.name != "swiglu"
        ]
        (depth,) = (one for one in written["depth"] if one["label"] == "xIPReLU")
        assert depth["verdict"] == RISES and len(depth["trend_by_seed"]) == 3
        assert (out / "results.json").stat().st_size < 200_000
        for picture in ("loss.png", "differences.png", "alphas.png", "depth.png"):
            assert (out / picture).read_bytes().startswith(b"\x89PNG")
            assert (out / picture).stat().st_size < 150_000
        assert not list(out.glob(".*"))

    @pytest.mark.parametrize(
        ("layers", "said"),
        [
            ([0.9, 1.1], None),
            ([0.5, 0.3], "standard deviation of 0.40, and in the paper's 1.1B with 0.98"),
            ([1.5, 1.7], "standard deviation of 1.60, and"),
            (None, None),
        ],
    )
    def test_another_regime_is_told(
        self, layers: list[float] | None, said: str | None, tmp_path: Path
    ) -> None:
        made = dataclasses.replace(make_record("swiglu"), input_std=layers)
        found = {"swiglu": {42: made}}
        notes = results.other_regime(found)
        assert (said in notes[0]) if said else notes == ()
        shown = results.write(tmp_path, found, ALL, COSTS, SETUP)
        by_layer = "  ".join(f"{std:.3f}" for std in layers or ())
        assert f"- SwiGLU: {by_layer}" in shown if layers else "Inputs of the" not in shown

    def test_one_run(self, tmp_path: Path) -> None:
        found = {"swiglu": {42: make_record("swiglu")}}
        results.write(tmp_path, found, ALL, COSTS, SETUP)
        assert {path.name for path in tmp_path.iterdir()} == {
            *("results.md", "results.json", "loss.png")
        }

    def test_running_mean_and_seeds(self) -> None:
        curve = [(1, 1.0), (2, 3.0), (3, 8.0)]
        assert plots.running_mean(curve, 2) == [(2, 2.0), (3, 5.5)]
        assert plots.running_mean(curve, 10) == [(3, 4.0)]
        assert plots.over_seeds([curve, [(2, 5.0), (3, 9.0)]]) == [(2, 4, 3, 5), (3, 8.5, 8, 9)]

    def test_what_a_kill_took_from_the_events_is_in_the_log(self, tmp_path: Path) -> None:
        log = tmp_path / "log.txt"
        log.write_text(
            " [2026] iteration        1/      30 | consumed samples:  8 | "
            "elapsed time per iteration (ms): 9.5 | learning rate: 1E-03 | "
            "lm loss: 5.500000E+00 | loss scale: 1.0 |\n"
            " [2026] iteration        2/      30 | elapsed time per iteration (ms): 9.5 | "
            "lm loss: 4.500000E+00 | loss scale: 1.0 |\n"
            " validation loss at iteration 16 on validation set | lm loss value: 4.250000E+00 | x\n"
        )
        events = {"lm loss": [(2, 4.4999), (3, 4.0)], "lm loss validation": [(30, 3.0)]}
        train = records.complete(events, log, "lm loss")
        assert train == [(1, 5.5), (2, 4.4999), (3, 4.0)]
        assert records.complete(events, log, "lm loss validation") == [(16, 4.25), (30, 3.0)]


class TestOptions:
    def test_seeds(self) -> None:
        assert tool.parse_options(["tiny"]).seeds == [42]
        assert tool.parse_options(["tiny", "--seeds", "3"]).seeds == [42, 43, 44]
        assert tool.parse_options(["tiny", "--seeds", "7,9"]).seeds == [7, 9]

    def test_baseline(self) -> None:
        assert tool.parse_options(["tiny"]).baseline == "swiglu"
        options = ["tiny", "--activations", "xielu", "--ablation", "xielu-frozen"]
        assert tool.parse_options(options).baseline == "xielu"
        assert [v.name for v in tool.parse_options(options).variants] == ["xielu", "xielu-frozen"]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ("tiny --ablation gelu-frozen", "--ablation 'gelu-frozen' is not a variant"),
            ("tiny --activations xielu --baseline gelu", "--baseline gelu: not among"),
            ("tiny --ffn xielu-frozen=8", "--ffn xielu-frozen: not among"),
            ("tiny --ffn xielu", "not NAME=WIDTH"),
            ("tiny --seeds 1,1", "has a seed twice"),
            ("tiny --seeds 0", "one seed at least"),
            ("tiny --text /nowhere", "--text /nowhere: no such folder"),
            ("paper-1b --check-resume", "--check-resume: paper-1b runs nothing here"),
            ("tiny --check-resume --prepare-text", "not allowed with argument"),
            ("quick --prepare-text", "--prepare-text is for small and minutes"),
            ("tiny --lr-sweep 1e-3", "'1e-3' is not two or more learning rates above 0"),
            ("tiny --lr-sweep 1e-3,nan", "is not two or more learning rates above 0"),
            ("tiny --lr-sweep 1e-3,0.001", "has a rate twice"),
            ("tiny --lr-sweep 1e-3,2e-3 --seeds 40,41", "--seeds 41: --lr-sweep chooses with that"),
            ("paper-1b --lr-sweep 1e-3,2e-3", "--lr-sweep: nothing is compared here"),
        ],
    )
    def test_refusals(self, options: str, message: str, capsys) -> None:
        with pytest.raises(SystemExit):
            tool.parse_options(options.split())
        assert message in capsys.readouterr().err

    def test_unequal_cost_is_refused_before_anything_is_trained(
        self, library: Path, tmp_path: Path
    ) -> None:
        command = ["quick", "--text", str(library), "--ffn", "xielu=300", "--out", str(tmp_path)]
        with pytest.raises(SystemExit, match=r"--ffn xielu=288 would match \(now 300\)"):
            tool.main(command)
        assert not list(tmp_path.glob("*/seed_*"))

    def test_the_cluster_presets_print_a_command_a_run(self, capsys) -> None:
        command = "paper-3b --activations xielu swiglu --ablation xielu-frozen --seeds 2"
        tool.main(command.split())
        shown = capsys.readouterr().out
        assert shown.count("\nMODEL=llama_3b ") == 6
        assert (
            "MODEL=llama_3b TP=2 MICRO_BATCH=5 ACTIVATION=xielu SEED=43 "
            'DATA_ARGS="$DATA_ARGS" '
            "RUN_DIR=runs/paper-3b/xielu-frozen/seed_43 sbatch --nodes 32 --gpus-per-node 8 "
            "--time 24:00:00 examples/slurm/pretrain.sbatch --xielu-frozen-alphas "
            "--log-activation-inputs\n"
        ) in shown
        assert "48,000 steps of 2,621,440 tokens" in shown
        assert "3,020,048,384" in shown  # SwiGLU's parameters
        assert set(cluster.PRESETS) == {"paper-1b", "paper-3b"}
        *folders, _, baseline, _, out = shlex.split(shown.splitlines()[-1])[3:]
        assert len(folders) == 6 and folders[-1] == "runs/paper-3b/xielu-frozen/seed_43"
        assert (baseline, out) == ("swiglu", "runs/paper-3b/results")


def make_run(out: Path, name: str = "swiglu", seed: int = 42, flags: list[str] | None = None):
    return tool.Run(variants.parse(name), seed, tool.folder_of(out, name, seed), flags or [])


class TestResume:
    @pytest.fixture
    def trained(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """Labels of the trainings that were started; each leaves a record."""
        started: list[str] = []
        monkeypatch.setattr(runs, "train", lambda label, flags, **rest: started.append(label) or 0)
        monkeypatch.setattr(runs, "read_record", lambda *rest, **more: make_record("swiglu"))
        return started

    def test_new_then_finished(self, tmp_path: Path, trained: list[str], capsys) -> None:
        run = make_run(tmp_path)
        runs.do_run(run, "[1/1]", settings.QUICK, CPU, 0)
        assert trained == ["[1/1] SwiGLU, seed 42:"]
        assert "resumes" not in capsys.readouterr().out
        runs.do_run(run, "[1/1]", settings.QUICK, CPU, 0)
        assert len(trained) == 1
        assert "finished before" in capsys.readouterr().out

    def test_partial(self, tmp_path: Path, trained: list[str], capsys) -> None:
        run = make_run(tmp_path)
        (run.folder / "checkpoints").mkdir(parents=True)
        (run.folder / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("20")
        runs.do_run(run, "[1/1]", settings.QUICK, CPU, 0)
        assert len(trained) == 1
        assert "resumes from iteration 20" in capsys.readouterr().out

    def test_one_that_diverges_ends_no_other(
        self, tmp_path: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch, capsys
    ) -> None:
        def diverge(label: str, flags: list[str], **rest: object) -> int:
            trained.append(label)
            if "seed 43" in label:
                raise training.Diverged(f"compare: {label} diverged")
            return 0

        monkeypatch.setattr(runs, "train", diverge)
        planned = [("", make_run(tmp_path, seed=seed), settings.QUICK) for seed in (42, 43, 44)]
        with pytest.raises(SystemExit) as end:
            runs.do_all(planned, CPU, 0, instead="leave them out with --seeds")
        assert end.value.code == (
            "compare: 1 of 3 runs diverged (SwiGLU, seed 43), and there are no results without "
            "them; leave them out with --seeds"
        )
        assert trained == [f"[{n}/3] SwiGLU, seed {41 + n}:" for n in (1, 2, 3)]
        assert "compare: [2/3] SwiGLU, seed 43: diverged\n" in capsys.readouterr().out

    def test_changed_settings_are_refused_by_name(self, library: Path, tmp_path: Path) -> None:
        wanted = tool.describe_run(settings.QUICK, CPU, library, {})
        tool.check_settings(tmp_path, wanted)
        tool.check_settings(tmp_path, wanted)
        changed = dataclasses.replace(settings.QUICK, iterations=31)
        with pytest.raises(SystemExit, match=r"settings\.iterations: 30 there, 31 now") as error:
            tool.check_settings(tmp_path, tool.describe_run(changed, CPU, library, {}))
        assert "Delete that folder to start over" in str(error.value)
        one_rank = tool.describe_run(settings.QUICK, tool.Machine("cpu", 1), library, {})
        with pytest.raises(SystemExit, match=r"machine\.tensor_parallel: 2 there, 1 now"):
            tool.check_settings(tmp_path, one_rank)
        with pytest.raises(SystemExit, match=r"ffn\.xielu: None there, 8 now"):
            tool.check_settings(
                tmp_path, tool.describe_run(settings.QUICK, CPU, library, {"xielu": 8})
            )

    def test_another_init_std_is_refused(self, library: Path, tmp_path: Path) -> None:
        """It is computed and no field; results from before it was have none."""
        before = tool.describe_run(settings.QUICK, CPU, library, {})
        del before["settings"]["init_std"]
        tool.check_settings(tmp_path, before)
        with pytest.raises(SystemExit, match=r"settings\.init_std: None there, 0\.1414 now"):
            tool.check_settings(tmp_path, tool.describe_run(settings.QUICK, CPU, library, {}))

    def test_a_second_comparison_in_the_same_folder_is_refused(self, tmp_path: Path) -> None:
        lock = tool.hold_lock(tmp_path)
        with pytest.raises(SystemExit, match="another comparison is running"):
            tool.hold_lock(tmp_path)
        os.close(lock)
        os.close(tool.hold_lock(tmp_path))

    def test_a_failure_shows_the_end_of_the_log_and_its_path(self, tmp_path: Path) -> None:
        log = tmp_path / "log.txt"
        lock = tool.hold_lock(tmp_path)
        with pytest.raises(SystemExit) as error:
            training.train(
                "xIELU",
                ["--cpu", "--fp8-format", "e4m3"],  # refused before Megatron is imported
                ranks=2,
                on_gpu=False,
                tokens_per_iteration=1,
                log=log,
                keep_open=lock,
            )
        os.close(lock)
        assert f"the training of xIELU failed; its whole log: {log}" in str(error.value)
        assert "--fp8-format needs a GPU" in str(error.value)


def test_a_start_is_said_once(capsys, monkeypatch) -> None:
    """However long it takes; where the output is no terminal, each line stays."""
    monkeypatch.setattr(training, "_PLAIN_REPORT_SECONDS", 0)
    progress = training._Progress("[1/2] xIELU, seed 42:", 100)
    for gained in ("", "loading\n", "more\n"):
        progress.read(gained)
    assert capsys.readouterr().out == "[1/2] xIELU, seed 42: starting\n"


class TestCheckResume:
    """``--check-resume`` with real trainings, in Megatron's deterministic mode."""

    OPTIONS = ("quick", "--check-resume", "--tensor-parallel", "1", "--out")

    @pytest.fixture(scope="class")
    def checked(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        out = tmp_path_factory.mktemp("check")
        with warm_trainings(), pytest.raises(SystemExit) as end:
            tool.main([*self.OPTIONS, str(out)])
        assert end.value.code == 0, (out / "results" / "resume.md").read_text()
        return out

    def test_says_what_was_compared(self, checked: Path) -> None:
        shown = (checked / "results" / "resume.md").read_text()
        assert "# Stopped and resumed: quick, xIELU, seed 42" in shown
        stopped_at = int(re.search(r"SIGTERM after iteration (\d+) of 16", shown)[1])
        assert resume.STOP_AFTER <= stopped_at < 16
        assert "**the same bits**" in shown
        assert not (checked / "settings.json").exists()  # these are no runs to compare
        log = (checked / "resume/stopped/xielu/seed_42/log.txt").read_text()
        assert f"at iteration {stopped_at}" in log and "deterministic_mode" in log

    @pytest.mark.parametrize("part", ["linear_fc1.weight", "exp_avg_sq", "alpha_p"])
    def test_finds_one_changed_bit(
        self, checked: Path, part: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of weights, moments, alphas; the smallest change that a float can have."""
        folders = [checked / "resume" / name / "xielu/seed_42" for name in ("whole", "stopped")]
        read, changed = resume._tensors, []

        def read_and_change(checkpoint: Path) -> dict:
            tensors = read(checkpoint)
            if "stopped" in str(checkpoint):
                key = sorted(key for key in tensors if part in key)[0]
                tensors[key].reshape(-1)[:1].view(torch.int32).add_(1)
                changed.append(key)
            return tensors

        monkeypatch.setattr(resume, "_tensors", read_and_change)
        found = resume.compare(*folders, stopped_at=4, iterations=16)
        assert list(found.differing) == changed
        assert changed[0] in found.markdown("quick", {})

    def test_finds_another_loss(self, checked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folders = [checked / "resume" / name / "xielu/seed_42" for name in ("whole", "stopped")]
        read = resume.read_events

        def read_and_change(folder: Path) -> dict:
            events = read(folder)
            if "whole" in str(folder):
                events["lm loss"] = [*events["lm loss"][:-1], (16, 1.0)]
            return events

        monkeypatch.setattr(resume, "read_events", read_and_change)
        found = resume.compare(*folders, stopped_at=4, iterations=16)
        assert found.differing == ("lm loss",)

    def test_a_training_that_was_over_is_refused(
        self, checked: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        shutil.copytree(checked / "text", tmp_path / "text")
        done = tmp_path / "resume/stopped/xielu/seed_42/checkpoints"

        def train(*args: object, **rest: object) -> int:
            done.mkdir(parents=True, exist_ok=True)
            (done / "latest_checkpointed_iteration.txt").write_text("16")
            return 0

        monkeypatch.setattr(tool, "train", train)
        with pytest.raises(SystemExit, match=r"was not stopped on its way: .*\.txt says 16;"):
            tool.main([*self.OPTIONS, str(tmp_path)])


class TestSweep:
    LABELS = {"xielu": "xIELU", "gelu": "GELU"}  # noqa: RUF012

    def test_the_lowest_loss_chooses_and_edges_are_told(self) -> None:
        losses = {
            "xielu": {1e-3: 2.0, 2e-3: 1.0, 4e-3: None},
            "gelu": {1e-3: 2.0, 2e-3: 3.0, 4e-3: 4.0},
        }
        found = sweep.Sweep(losses, "")
        assert (found.best("xielu"), found.best("gelu")) == (2e-3, 1e-3)
        assert found.notes(self.LABELS)[1:] == (
            "The best learning rate of GELU is the lowest of the sweep, 0.001: one beyond it may "
            "be better.",
            "xIELU diverged at the learning rate 0.004.",
        )
        shown = "\n".join(found.markdown(self.LABELS, "byte"))
        assert "| xIELU | 2.0000 | 1.0000 | diverged | 0.002 |" in shown

    def test_a_variant_that_always_diverges_is_refused(self) -> None:
        found = sweep.Sweep({"gelu": {1e-3: None, 2e-3: None}}, "")
        with pytest.raises(SystemExit, match="gelu diverged at every rate of --lr-sweep"):
            found.best("gelu")

    def test_a_rate_that_diverged_is_at_the_upper_edge(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        drawn: list[plots.Drawing] = []
        monkeypatch.setattr(plots.Drawing, "png", lambda self: drawn.append(self) or b"")
        kinds = [variants.parse(name) for name in self.LABELS]
        for last in (None, 1.5):
            losses = {"xielu": {1e-3: 2.0, 4e-3: last}, "gelu": {1e-3: 2.1, 4e-3: last}}
            found = sweep.Sweep(losses, "")
            plots.plot_sweep(found, kinds, tmp_path / "sweep.png", caption="", unit="byte")
        diverged, none = drawn
        edges = [line for line in diverged.axes.lines if line.get_clip_on() is False]
        assert [line.get_xydata().tolist() for line in edges] == [[[4e-3, 1]]] * 2
        (x, y), (other_x, other_y) = (
            line.get_transform().transform(line.get_xydata()[0]) for line in edges
        )
        assert y == other_y == diverged.axes.bbox.ymax and x + 5 < other_x
        assert "diverged" in diverged.figure.get_suptitle()
        assert "diverged" not in none.figure.get_suptitle()

    def test_runs_that_another_choice_has_trained_are_refused(self, tmp_path: Path) -> None:
        own = {"swiglu": dataclasses.replace(settings.QUICK, learning_rate=4e-3)}
        planned = [make_run(tmp_path)]
        sweep.check_rates(planned, {}, own)
        for rate in (None, 4e-3):
            made = dataclasses.replace(make_record("swiglu"), learning_rate=rate)
            sweep.check_rates(planned, {"swiglu": {42: made}}, own)
        made = dataclasses.replace(make_record("swiglu"), learning_rate=1e-3)
        with pytest.raises(SystemExit, match=r"seed_42 was trained at the learning rate 0\.001"):
            sweep.check_rates(planned, {"swiglu": {42: made}}, own)

    def test_trains_at_each_rate_then_all_seeds_at_the_best(self, tmp_path: Path) -> None:
        """Of the rates the last is so high that the loss is NaN in the third step."""
        options = ["quick", "--tensor-parallel", "1", "--activations", "swiglu", "--out"]
        options += [str(tmp_path), "--lr-sweep", "4e-3,1e-3,1e25"]
        shown = []
        for _ in range(2):
            with warm_trainings(), contextlib.redirect_stdout(io.StringIO()) as output:
                tool.main(options)
            shown.append(output.getvalue())
        first, again = shown
        said = "3 runs with seed 41, at 0.001, 0.004, 1e+25: 46,080 bytes, "
        assert first.count(said) == 2  # before, and in the results
        assert "starting" in first and "starting" not in again
        trained = records.read_events(tool.folder_of(tmp_path, "swiglu", 42) / "events")
        assert max(rate for _, rate in trained["learning-rate"]) == pytest.approx(4e-3)

        written = json.loads((tmp_path / "results" / "results.json").read_text())
        losses = written["sweep"]["swiglu"]
        assert list(losses) == ["0.001", "0.004", "1e+25"]
        assert losses["0.004"] < losses["0.001"] and losses["1e+25"] is None
        assert "SwiGLU diverged at the learning rate 1e+25." in written["notes"]
        assert not any("tuned for none" in note for note in written["notes"])
        assert re.search(r"SwiGLU +3\.\d+ +2\.\d+ +diverged +0\.004\n", again)
        assert (tmp_path / "results" / "sweep.png").stat().st_size < 150_000

        assert written["settings"]["settings"]["learning_rate"] == {"swiglu": 4e-3}
        results_md = (tmp_path / "results" / "results.md").read_text()
        assert "- schedule: learning rate as swept, 4 iterations of warm-up" in results_md
        folder = tool.folder_of(tmp_path / "sweep" / "1e+25", "swiglu", 41)
        assert (folder / "diverged.txt").read_text() == (
            "compare: the training of [learning rate 1e+25] SwiGLU, seed 41 diverged: NaN in local "
            f"grad; its whole log: {folder / 'log.txt'}\n"
        )

        with pytest.raises(SystemExit, match=r"lr_sweep: \[0\.001, 0\.004, 1e\+25\] there, None"):
            tool.main(options[:-2])

        # Another rate is the best, and of the compared run there is a checkpoint alone.
        copy = shutil.copytree(tmp_path, tmp_path.with_name(f"{tmp_path.name}-copy"))
        record = tool.folder_of(copy / "sweep" / "0.004", "swiglu", 41) / "record.json"
        content = json.loads(record.read_text())
        content["valid"][-1][1] = 9.0
        record.write_text(json.dumps(content))
        (tool.folder_of(copy, "swiglu", 42) / "record.json").unlink()
        said = r"seed_42 was trained at the learning rate 0\.004, and the sweep now has 0\.001 as "
        with warm_trainings(), pytest.raises(SystemExit, match=said):
            tool.main([*options, "--out", str(copy)])


NAMES, SEEDS = ("xielu", "swiglu", "xielu-shared"), (42, 43)


@dataclasses.dataclass
class Comparison:
    """A real quick comparison, ended by SIGTERM in its first run, and run again to its end."""

    out: Path
    first: tuple[int, str]  # return code, output
    stopped_at: int | None
    second: str  # output

    @property
    def records(self) -> dict[str, dict[int, records.Record]]:
        return tool.finished_records(self.out, [variants.parse(name) for name in NAMES], SEEDS)


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    out = tmp_path_factory.mktemp("comparison")
    options = ["quick", "--out", str(out), "--seeds", "2", "--tensor-parallel", "1"]
    options += ["--activations", "xielu", "swiglu", "--ablation", "xielu-shared"]
    folder = tool.folder_of(out, "xielu", 42)
    log, first_log = folder / "log.txt", out / "first.txt"
    (first,) = launch.start(options, ranks=1, log=first_log, command=[tool.__file__])
    deadline = time.monotonic() + 240
    while not (log.exists() and "lm loss:" in log.read_text()):
        assert first.poll() is None and time.monotonic() < deadline, first_log.read_text()
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    launch.wait([first], timeout=120)
    assert not (folder / "record.json").exists()
    stopped_at = read_tracker(folder / "checkpoints")
    with warm_trainings(), contextlib.redirect_stdout(io.StringIO()) as second:
        tool.main(options)
    return Comparison(out, (first.returncode, first_log.read_text()), stopped_at, second.getvalue())


@contextlib.contextmanager
def warm_trainings() -> Iterator[None]:
    """Trainings of one rank start from a process that has imported PyTorch and Megatron."""

    def start(command: list[str], *, log: Path, **rest: object) -> Process:
        (process,) = launch.start(command[3:], ranks=1, log=log, command=command[1:3])
        return process

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "start", start)
        patch.setattr(training, "ended", lambda child: None if child.poll() is None else 2**29)
        yield


@pytest.fixture(scope="module", autouse=True)
def process_state() -> Iterator[None]:
    """One thread, since beside other tests a second would wait for a core in every operation; and
    the tool's signal handlers end with these tests."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def train_xielu(out: Path, prepared: Path, *, ranks: int, name: str = "xielu") -> records.Record:
    """The quick preset's xIELU with seed 42 in one go, on the text of ``prepared``."""
    machine = tool.Machine("cpu", ranks)
    options = tool.parse_options(["quick", "--activations", "xielu", "--out", str(out)])
    options.variants = [variants.parse(name)]
    made = tool.prepare_text(settings.QUICK, prepared / "text", None)
    (run,) = tool.plan_runs(options, out, settings.QUICK, machine, made)
    lock = tool.hold_lock(out)
    runs.do_run(run, "[1/1]", settings.QUICK, machine, lock)
    os.close(lock)
    return tool.finished_records(out, [run.variant], [42])[name][42]


class TestQuick:
    def test_survives_an_interruption(self, comparison: Comparison) -> None:
        """It stops, resumes, and has one history."""
        returncode, output = comparison.first
        assert returncode == 128 + signal.SIGTERM
        assert "run the same command again to resume" in output
        assert comparison.stopped_at is not None
        assert f"resumes from iteration {comparison.stopped_at}" in comparison.second
        quick = settings.QUICK
        for name in NAMES:
            for seed in SEEDS:
                record = comparison.records[name][seed]
                assert [step for step, _ in record.train] == list(range(1, quick.iterations + 1))
                assert [step for step, _ in record.valid] == [
                    quick.validate_every,
                    quick.iterations,
                ]
                assert record.train[-1][1] < record.train[0][1] - 1  # it learns
                cost = equal_cost.costs({name: flags_of(name, "quick")})[name]
                assert record.parameters == cost.parameters

    def test_has_the_results_of_one_without_interruption(
        self, comparison: Comparison, tmp_path: Path
    ) -> None:
        with warm_trainings():
            whole = train_xielu(tmp_path / "whole", comparison.out, ranks=1)
        resumed = comparison.records["xielu"][42]
        assert resumed.train == whole.train
        assert resumed.valid == whole.valid
        assert resumed.alphas == whole.alphas

    def test_a_recomputed_output_gives_the_same_bits(
        self, comparison: Comparison, tmp_path: Path
    ) -> None:
        """As recomputed as the name says, and as ``xielu`` in all that is not speed or memory."""
        with warm_trainings():
            found = train_xielu(tmp_path, comparison.out, ranks=1, name="xielu-recompute")
        log = (tool.folder_of(tmp_path, "xielu-recompute", 42) / "log.txt").read_text()
        assert re.search(r"xielu_recompute_output \.+ True", log)
        xielu = comparison.records["xielu"][42]
        assert found.train == xielu.train
        assert found.valid == xielu.valid
        assert found.alphas == xielu.alphas

    def test_memory_of_a_gpu_is_the_most_that_was_allocated(
        self, comparison: Comparison, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The tag is that of the allocator's peak in Megatron, which may fall after a restart."""
        source = Path(find_spec("megatron.training").origin).with_name("training.py").read_text()
        assert re.search(
            r'"mem-max-allocated-bytes", mem_stats\["allocated_bytes\.all\.peak"\]', source
        )
        folder = tool.folder_of(comparison.out, "swiglu", 42)
        events = records.read_events(folder / "events")
        assert {step for step, _ in events["mem-max-allocated-bytes"]} == set(range(1, 31))
        events["mem-max-allocated-bytes"] = [(1, 5.0), (2, 9.0), (3, 7.0)]
        monkeypatch.setattr(records, "read_events", lambda folder: events)
        record = records.read_record(
            folder, settings.QUICK, variants.parse("swiglu"), 42, peak_rss=1, on_gpu=True
        )
        assert (record.memory, record.memory_of) == (9.0, "GPU, allocated")

    def test_a_seed_has_its_own_data_and_variants_share_it(self, comparison: Comparison) -> None:
        """Megatron's index of the order of the data: one a seed, named by what it depends on."""
        cache = comparison.out / "text" / "cache"
        assert len(list(cache.rglob("*-train-shuffle_index.npy"))) == len(SEEDS)

    def test_alphas(self, comparison: Comparison) -> None:
        own, shared = (comparison.records[name][42].alphas for name in ("xielu", "xielu-shared"))
        assert own is not None and shared is not None
        assert own.iterations[0] == 0 and own.iterations[-1] == settings.QUICK.iterations
        for history in (own.positive, own.negative, shared.positive):
            assert history[0] == [0.8] * settings.QUICK.layers != history[-1]
        assert len(set(own.positive[-1])) == settings.QUICK.layers
        assert len(set(shared.positive[-1])) == 1

    def test_inputs_of_activations_start_as_large_as_the_papers(
        self, comparison: Comparison
    ) -> None:
        for name in NAMES:
            for record in comparison.records[name].values():
                assert len(record.input_std) == settings.QUICK.layers
                assert record.input_std == pytest.approx([0.98] * 2, rel=0.05)
        shown = comparison.second
        said = r"SwiGLU, seed 42: its inputs start with a standard deviation of 0\.9\d \(0\.9"
        assert re.search(said, shown)
        assert "in the paper's 1.1B 0.98:" in shown

    def test_results_and_the_page(self, comparison: Comparison) -> None:
        shown = comparison.second
        assert "mean nothing" in shown and "Paired with SwiGLU" in shown
        assert "warning" not in shown
        files = {path.name for path in (comparison.out / "results").iterdir()}
        assert files == {
            *("results.md", "results.json", "loss.png", "differences.png", "alphas.png"),
            "depth.png",
        }
        page = comparison.out / "report" / "report.html"
        assert f"  {page}: " in shown
        written = comparison.out / "results" / "results.md"
        assert f"  {written}: " in shown
        caveats = results.caveats(tiny=False, on_gpu=False, seeds=2, swept=False, quick=True)
        assert "tuned for none" in caveats[1] and "say nothing of GPUs" in caveats[2]
        html = page.read_text()
        for said in (shown, written.read_text(), unescape(html)):
            assert all(caveat in said for caveat in caveats)
        assert "Best first, by the last validation loss" in html


@pytest.fixture(scope="module")
def trained_at_tp2(
    comparison: Comparison, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, records.Record]:
    out = tmp_path_factory.mktemp("tp2") / "out"
    return out, train_xielu(out, comparison.out, ranks=2)


@pytest.fixture(scope="module")
def hugging_face(comparison: Comparison, trained_at_tp2: tuple[Path, records.Record]) -> Path:
    """What was trained at TP=2, converted."""
    out, _ = trained_at_tp2
    folder = out / "hf"
    command = ("-m", "megatron_xielu.convert", "to-hf")
    words = [str(tool.folder_of(out, "xielu", 42) / "checkpoints"), str(folder)]
    words += ["--tokenizer", str(comparison.out / "text" / "tokenizer")]
    words += ["--trim-vocab", str(byte_text.VOCAB_SIZE)]
    offline = {"HF_HUB_OFFLINE": "1"}
    launch.train(out / "convert", words, model=(), command=command, environment=offline)
    return folder


def python_lines(folder: Path) -> None:
    """A task for lm-eval: which of two continuations is Python?"""
    lines = [("import ", "os", "§¶"), ("    def ", "__init__", "~~~~`~~~"), ("se", "lf", "ØØ")]
    questions = [
        {"text": text, "choices": [right, wrong], "answer": 0} for text, right, wrong in lines
    ]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in questions))
    (folder / "python_lines.yaml").write_text(
        "task: python_lines\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: '{data}'}}}}\n"
        "test_split: test\n"
        "output_type: multiple_choice\n"
        "doc_to_text: '{{text}}'\n"
        "doc_to_choice: choices\n"
        "doc_to_target: answer\n"
        "metric_list: [{metric: acc}]\n"
    )


def offline(folder: Path) -> dict[str, str]:
    """The environment of a process that uses Hugging Face's libraries."""
    return {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")}


class TestHuggingFace:
    def test_tokenizer_is_the_bytes_of_the_text(self, comparison: Comparison) -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(comparison.out / "text" / "tokenizer")
        written = "".join(map(chr, range(0x300))) + "def f(x):\r\n\treturn  x  # 中 😀"
        ids = tokenizer(written)["input_ids"]
        assert ids == list(written.encode())
        assert tokenizer.decode(ids) == written
        assert len(tokenizer) == byte_text.VOCAB_SIZE
        assert tokenizer.eos_token_id == byte_text.END_OF_DOCUMENT

    def test_a_model_trained_at_tp2_generates_text(
        self, trained_at_tp2: tuple[Path, records.Record], hugging_face: Path
    ) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(hugging_face)
        tokenizer = AutoTokenizer.from_pretrained(hugging_face)
        assert type(model).__name__ == "ArceeForCausalLM"
        assert model.config.hidden_act == "xielu"

        prompt = tokenizer("def main(self):\n", return_tensors="pt")
        ids = model.generate(**prompt, max_new_tokens=20, do_sample=False)
        assert tokenizer.decode(ids[0]).startswith("def main(self):\n")
        assert ids.shape[1] > prompt["input_ids"].shape[1]

        # The loss that Megatron printed, on other text of the same kind.
        source = Path(dataclasses.__file__).read_text()[: 8 * settings.QUICK.sequence]
        tokens = tokenizer(source, return_tensors="pt")["input_ids"].view(8, -1)
        with torch.no_grad():
            loss = model(tokens, labels=tokens).loss.item()
        assert loss == pytest.approx(trained_at_tp2[1].valid_loss, abs=0.5)
        assert 2**27 < trained_at_tp2[1].memory < 2**34

    def test_lm_eval_runs_on_it(self, hugging_face: Path, tmp_path: Path) -> None:
        """On a task of its own."""
        python_lines(tmp_path)
        command = [launch.python(), "-m", "lm_eval", "--model", "hf", "--device", "cpu"]
        command += ["--model_args", f"pretrained={hugging_face},dtype=float32"]
        command += ["--tasks", "python_lines", "--include_path", str(tmp_path)]
        command += ["--batch_size", "2", "--output_path", str(tmp_path / "results")]
        environment = {**os.environ, **offline(tmp_path), "PYTHONPATH": str(training.REPOSITORY)}
        evaluated = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert evaluated.returncode == 0, evaluated.stdout + evaluated.stderr
        (file,) = (tmp_path / "results").rglob("results_*.json")
        results = json.loads(file.read_text())["results"]["python_lines"]
        assert results["acc,none"] == 1.0


def flip_a_bit(run: Path, key: str) -> None:
    """In a tensor of its checkpoint."""
    (metadata,) = run.rglob(".metadata")
    stored = read_metadata(metadata).storage_data
    place = next(place for index, place in stored.items() if index.fqn == key)
    with (metadata.parent / place.relative_path).open("r+b") as file:
        file.seek(place.offset + place.length // 2)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


@dataclasses.dataclass
class Suite:
    """lm-eval on two activations with two seeds, and on a run whose checkpoint is damaged."""

    out: Path
    tasks: Path
    runs: list[str]
    code: int
    output: str

    def again(self, *runs: str) -> tuple[int, str]:
        """The same command, with more runs; its exit status and what it prints."""
        words = [*self.runs, *runs, "--output", str(self.out), "--tasks", "python_lines"]
        words += ["--include-path", str(self.tasks), "--device", "cpu"]
        with contextlib.redirect_stdout(io.StringIO()) as output:
            try:
                evaluate_suite.main(words)
            except SystemExit as end:
                return int(end.code), output.getvalue()
        return 0, output.getvalue()


class TestSuite:
    @pytest.fixture(scope="class")
    def suite(
        self, comparison: Comparison, tmp_path_factory: pytest.TempPathFactory
    ) -> Iterator[Suite]:
        import datasets

        folder = tmp_path_factory.mktemp("suite")
        python_lines(folder)
        damaged = folder / "damaged" / "seed_42"
        shutil.copytree(tool.folder_of(comparison.out, "xielu", 42), damaged)
        (folder / "text").symlink_to(comparison.out / "text")
        flip_a_bit(damaged, "embedding.word_embeddings.weight")
        runs = [
            str(tool.folder_of(comparison.out, name, seed))
            for name in ("swiglu", "xielu")
            for seed in SEEDS
        ]
        suite = Suite(folder / "out", folder, runs, 0, "")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "executable", launch.python())
            patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "home" / "datasets")
            patch.setenv("PYTHONPATH", str(training.REPOSITORY))
            for name, value in offline(folder).items():
                patch.setenv(name, value)
            suite.code, suite.output = suite.again(str(damaged))
            yield suite

    def test_tasks_and_metrics_are_lm_evals(self, suite: Suite) -> None:
        index = suite_tasks.manager(str(suite.tasks)).task_index
        for name, (metric, _) in suite_tasks.USUAL.items():
            assert metric in [one["metric"] for one in index[name].cfg["metric_list"]], name
        for name, said in (("arc_eazy", "did you mean arc_easy?"), ("ai2_arc", "a group of tasks")):
            with pytest.raises(Refused, match=re.escape(said)):
                suite_tasks.load([name], str(suite.tasks))

    def test_table(self, suite: Suite) -> None:
        content = json.loads((suite.out / "suite.json").read_text())
        assert content["runs"].keys() == {
            f"{n}/seed_{s}" for n in ("swiglu", "xielu") for s in SEEDS
        }
        for run in content["runs"].values():
            assert run["scores"]["python_lines"]["documents"] == 3
            assert run["average"] == 100 * run["scores"]["python_lines"]["metrics"]["acc"]
        assert content["rows"]["xielu"]["average"]["n"] == 2
        assert [one["variant"] for one in content["comparisons"]] == ["xielu"]
        shown = (suite.out / "suite.md").read_text()
        assert re.search(r"\| SwiGLU \| 2 \| [\d.]+ ± [\d.]+ \| [\d.]+ ± [\d.]+ \|", shown)
        assert "| *standard error of a run* | |" in shown
        assert not list(suite.out.rglob("model"))

    def test_a_run_that_fails_is_told_and_ends_no_other(self, suite: Suite) -> None:
        assert suite.code == 1
        assert re.search(r"failed: damaged/seed_42: .*is damaged: .*; its log: ", suite.output)
        assert "left out: damaged/seed_42." in (suite.out / "suite.md").read_text()

    def test_what_is_there_is_not_run_again(self, suite: Suite) -> None:
        times = {path: path.stat().st_mtime_ns for path in suite.out.rglob("result.json")}
        code, output = suite.again()
        assert code == 0 and "4 runs, 4 of them evaluated before" in output
        assert "left out" not in (suite.out / "suite.md").read_text()
        assert all(path.stat().st_mtime_ns == time for path, time in times.items())

    def test_what_it_is_of_counts(self, suite: Suite) -> None:
        """Another checkpoint, and another file of the task."""
        (run,) = suite_runs.read([Path(suite.runs[0])], None)
        tasks = suite_tasks.load(["python_lines"], str(suite.tasks))
        options = evaluate_suite.Options("cpu", "auto", "8", None, str(suite.tasks), keep=False)
        assert not Evaluation(run, tasks, suite.out, options).missing
        resaved = dataclasses.replace(run, stamp=run.stamp + 1)
        changed = [dataclasses.replace(task, sha256="0" * 64) for task in tasks]
        for one, of in ((resaved, tasks), (run, changed)):
            assert Evaluation(one, of, suite.out, options).missing == of


def test_the_terminal_has_no_markdown():
    shown = "# Title\n\n**note**\n\n| | n |\n|---|---|\n| xIELU | 3 |\n\n![loss](loss.png)\n\nend\n"
    assert results.for_terminal(shown) == "Title\n\nnote\n\n       n\nxIELU  3\n\nend\n"
