"""`make demo`: its text, settings, results, what it resumes and refuses; and one real quick run."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples" / "demo"))

import plots
import prepare_text
import records
import run
import settings
import training

SETTINGS = {"full": settings.FULL, "quick": settings.QUICK}
CPU = run.Machine("cpu", 2)


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A folder that looks like a standard library, with both splits populated."""
    folder = tmp_path / "library"
    for index in range(80):
        path = folder / ("package" if index % 2 else ".") / f"module_{index}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"# é {index}\n".encode() * (index + 1))
    (folder / "test").mkdir()
    (folder / "test" / "test_module.py").write_text("not part of the text")
    (folder / "notes.txt").write_text("not Python")
    (folder / "empty.py").write_text("")
    return folder


def read_split(out: Path, split: str) -> list[list[int]]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    return [document.tolist() for document in IndexedDataset(str(out / split))]


class TestText:
    def test_round_trip_through_megatrons_reader(self, library: Path, tmp_path: Path) -> None:
        manifest = prepare_text.prepare(library, tmp_path / "text")
        paths = prepare_text.find_documents(library)
        assert len(paths) == 81  # no test, no text file
        for split in prepare_text.SPLITS:
            documents = read_split(tmp_path / "text", split)
            expected = [
                [*(library / path).read_bytes(), prepare_text.END_OF_DOCUMENT]
                for path in paths
                if prepare_text.split_of(path) == split
            ]
            assert documents == expected
            assert manifest.documents[split] == len(documents) > 0
            assert manifest.tokens[split] == sum(map(len, documents))

    def test_end_of_document_is_the_null_tokenizers(self) -> None:
        from megatron.core.tokenizers.text.libraries.null_tokenizer import NullTokenizer

        assert NullTokenizer(prepare_text.VOCAB_SIZE).eod == prepare_text.END_OF_DOCUMENT

    def test_split_of_a_file_does_not_depend_on_the_others(self, library: Path) -> None:
        before = {
            path: prepare_text.split_of(path) for path in prepare_text.find_documents(library)
        }
        (library / "aaa.py").write_text("new")
        after = {path: prepare_text.split_of(path) for path in prepare_text.find_documents(library)}
        assert before.items() <= after.items()
        assert set(before.values()) == set(prepare_text.SPLITS)

    def test_is_written_once_and_again_when_the_source_changes(
        self, library: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "text"
        first = prepare_text.prepare(library, out)
        (out / "cache").mkdir()
        written = (out / "train.bin").stat().st_mtime_ns
        assert prepare_text.prepare(library, out) == first
        assert (out / "train.bin").stat().st_mtime_ns == written
        assert (out / "cache").exists()

        (library / "module_0.py").write_text("changed")
        assert prepare_text.prepare(library, out).sha256 != first.sha256
        assert not (out / "cache").exists()  # Megatron's indices into the old text
        assert not list(out.glob("*.unfinished"))

    def test_refuses_a_folder_without_source(self, tmp_path: Path) -> None:
        with pytest.raises(SystemExit, match=r"no \.py files in"):
            prepare_text.prepare(tmp_path, tmp_path / "text")

    def test_the_running_pythons_library_has_enough(self) -> None:
        manifest = prepare_text.describe(prepare_text.stdlib_folder())
        full = settings.FULL
        assert manifest.tokens["train"] > full.iterations * full.tokens_per_iteration
        validations = full.iterations // full.validate_every + 1
        held_out = validations * full.validation_batches * full.tokens_per_iteration
        assert manifest.tokens["valid"] > held_out


@pytest.mark.parametrize("size", SETTINGS)
class TestSettings:
    def test_parameter_counts_are_equal_but_for_the_alphas(self, size: str) -> None:
        chosen = SETTINGS[size]
        counts = {
            name: chosen.parameters_of(activation) - 2 * chosen.layers * activation.trainable
            for name, activation in settings.ACTIVATIONS.items()
        }
        assert len(set(counts.values())) == 1, counts

    def test_are_consistent(self, size: str) -> None:
        chosen = SETTINGS[size]
        assert chosen.ffn % 6 == 0  # 2/3 of it is a whole number that two ranks share
        assert chosen.heads % 2 == 0
        assert chosen.iterations % chosen.validate_every != 0
        assert chosen.iterations % chosen.save_every == 0
        assert chosen.iterations >= chosen.warmup + chosen.decay

    @pytest.mark.parametrize("ranks", [1, 2])
    def test_flags_name_the_activation_and_the_padded_vocabulary(
        self, size: str, ranks: int
    ) -> None:
        for activation in settings.ACTIVATIONS.values():
            flags = settings.megatron_flags(
                SETTINGS[size], activation, tensor_parallel=ranks, text=Path("t"), folder=Path("f")
            )
            assert activation.flag in flags
            assert ("--xielu-check-tp-sync" in flags) == activation.trainable
            multiple = ranks * int(flags[flags.index("--make-vocab-size-divisible-by") + 1])
            assert math.ceil(prepare_text.VOCAB_SIZE / multiple) * multiple == 264


def make_record(name: str) -> records.Record:
    iterations, layers = list(range(0, 50, 10)), 3
    history = [[0.8 + 0.01 * step * (layer + 1) for layer in range(layers)] for step in iterations]
    return records.Record(
        parameters=1000,
        tokens=2000,
        tokens_per_second=123.4,
        train=[(step, 5.0 - step / 20) for step in range(1, 41)],
        valid=[(20, 4.1), (40, 3.2)],
        alphas=records.Alphas(iterations, history, history)
        if settings.ACTIVATIONS[name].trainable
        else None,
    )


class TestResults:
    def test_files_and_table(self, tmp_path: Path) -> None:
        for name in settings.ACTIVATIONS:
            path = tmp_path / name / "record.json"
            path.parent.mkdir()
            prepare_text.write_json(path, make_record(name).to_json())
        found = run.finished_records(tmp_path)
        assert found == {name: make_record(name) for name in settings.ACTIVATIONS}

        run.write_results(tmp_path, found, settings.QUICK, CPU)
        results = json.loads((tmp_path / "results.json").read_text())
        assert results["note"] == run.NO_EVIDENCE
        assert list(results["activations"]) == list(settings.ACTIVATIONS)
        xielu = results["activations"]["xielu"]
        assert xielu["parameters"] == 1000
        assert xielu["tokens"] == 2000
        assert xielu["train_loss"] == pytest.approx(5.0 - 35.5 / 20)  # mean of the last 10
        assert xielu["validation_loss"] == 3.2
        assert xielu["alpha_p"] == pytest.approx([1.2, 1.6, 2.0])
        assert "alpha_p" not in results["activations"]["swiglu"]
        for picture in ("loss.png", "alphas.png"):
            assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
        assert not list(tmp_path.glob("*.unfinished"))

        table = run.table(found)
        for activation in settings.ACTIVATIONS.values():
            assert activation.label in table
        assert "xIPReLU αn by layer: 1.200  1.600  2.000" in table

    def test_no_alpha_picture_without_alphas(self, tmp_path: Path) -> None:
        run.write_results(tmp_path, {"swiglu": make_record("swiglu")}, settings.QUICK, CPU)
        assert not (tmp_path / "alphas.png").exists()

    def test_running_mean(self) -> None:
        curve = [(1, 1.0), (2, 3.0), (3, 8.0)]
        assert plots.running_mean(curve, 2) == [(2, 2.0), (3, 5.5)]
        assert plots.running_mean(curve, 10) == [(3, 4.0)]

    def test_alphas_and_parameters_come_from_the_checkpoints(self, tmp_path: Path) -> None:
        import torch
        import torch.distributed.checkpoint as dcp

        raw = {4: [0.0, 100.0], 8: [-1.0, 2.0]}
        for iteration, values in raw.items():
            column = torch.tensor(values)[:, None]  # [layers, 1]
            state = {
                "decoder.layers.mlp.activation_func.alpha_p": column,
                "decoder.layers.mlp.activation_func.alpha_n": column,
                "embedding.weight": torch.zeros(3, 5),
                "optimizer.state.exp_avg.embedding.weight": torch.zeros(3, 5),
            }
            dcp.save(state, checkpoint_id=tmp_path / f"iter_{iteration:07}", no_dist=True)
        (tmp_path / "iter_0000012").mkdir()  # a crash while it was written
        (tmp_path / "latest_checkpointed_iteration.txt").write_text("8")

        checkpoints = records.complete_checkpoints(tmp_path)
        assert list(checkpoints) == [4, 8]
        assert records.count_parameters(checkpoints[8]) == 4 + 15
        alphas = records.read_alphas(checkpoints, "xielu")
        assert alphas.iterations == [0, 4, 8]
        softplus = [[math.log1p(math.exp(value)) for value in raw[step]] for step in raw]
        assert alphas.positive == [[0.8, 0.8], *(pytest.approx(values) for values in softplus)]
        assert alphas.negative[1] == pytest.approx([value + 0.5 for value in softplus[0]])

        run.remove_old_checkpoints(tmp_path)
        assert [path.name for path in tmp_path.glob("iter_*")] == ["iter_0000008"]


class TestResume:
    @pytest.fixture
    def trained(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """Labels of the trainings that were started; each leaves a record."""
        started: list[str] = []
        monkeypatch.setattr(run, "train", lambda label, flags, **kwargs: started.append(label))
        monkeypatch.setattr(run, "read_record", lambda folder, *rest: make_record("swiglu"))
        return started

    def run_swiglu(self, out: Path) -> None:
        (out / "swiglu").mkdir(exist_ok=True)
        run.run_activation("swiglu", out, settings.QUICK, CPU, lock=0)

    def test_new_then_finished(self, tmp_path: Path, trained: list[str], capsys) -> None:
        self.run_swiglu(tmp_path)
        assert trained == ["SwiGLU"]
        assert "resumes" not in capsys.readouterr().out
        self.run_swiglu(tmp_path)
        assert trained == ["SwiGLU"]
        assert "finished before" in capsys.readouterr().out

    def test_partial(self, tmp_path: Path, trained: list[str], capsys) -> None:
        checkpoints = tmp_path / "swiglu" / "checkpoints"
        checkpoints.mkdir(parents=True)
        (checkpoints / "latest_checkpointed_iteration.txt").write_text("20")
        self.run_swiglu(tmp_path)
        assert trained == ["SwiGLU"]
        assert "resumes from iteration 20" in capsys.readouterr().out

    def test_changed_settings_are_refused_by_name(self, tmp_path: Path) -> None:
        wanted = run.describe_run(settings.QUICK, CPU)
        run.check_settings(tmp_path, wanted)
        run.check_settings(tmp_path, wanted)
        changed = dataclasses.replace(settings.QUICK, iterations=31)
        with pytest.raises(SystemExit, match=r"settings\.iterations: 30 there, 31 now") as error:
            run.check_settings(tmp_path, run.describe_run(changed, CPU))
        assert "Delete that folder to start over" in str(error.value)
        with pytest.raises(SystemExit, match=r"machine\.tensor_parallel: 2 there, 1 now"):
            run.check_settings(tmp_path, run.describe_run(settings.QUICK, run.Machine("cpu", 1)))

    def test_a_second_demo_in_the_same_folder_is_refused(self, tmp_path: Path) -> None:
        lock = run.hold_lock(tmp_path)
        with pytest.raises(SystemExit, match="another demo is running"):
            run.hold_lock(tmp_path)
        os.close(lock)
        os.close(run.hold_lock(tmp_path))

    def test_a_failure_shows_the_end_of_the_log_and_its_path(self, tmp_path: Path) -> None:
        log = tmp_path / "log.txt"
        lock = run.hold_lock(tmp_path)
        with pytest.raises(SystemExit) as error:
            training.train(
                "xIELU",
                ["--cpu", "--fp8-format", "e4m3"],  # refused before Megatron is imported
                ranks=1,
                on_gpu=False,
                tokens_per_iteration=1,
                log=log,
                keep_open=lock,
            )
        os.close(lock)
        assert str(error.value).endswith(f"the xIELU training failed; its whole log: {log}")
        assert "--fp8-format needs a GPU" in str(error.value)


@dataclasses.dataclass
class Demo:
    """A real quick demo, ended by SIGTERM half-way and run again to its end."""

    out: Path
    first: tuple[int, str]  # return code, output
    stopped_at: int | None
    second: subprocess.CompletedProcess[str]


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(training.REPOSITORY), "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    out = tmp_path_factory.mktemp("demo")
    command = [sys.executable, run.__file__, "--quick", "--activations", "xielu", "--out", str(out)]
    log = out / "xielu" / "log.txt"
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as first:
        deadline = time.monotonic() + 240
        while not (log.exists() and "lm loss:" in log.read_text()):
            assert first.poll() is None and time.monotonic() < deadline, log
            time.sleep(0.05)
        first.send_signal(signal.SIGTERM)
        output, _ = first.communicate(timeout=120)
    assert not (out / "xielu" / "record.json").exists()
    stopped_at = records.saved_iteration(out / "xielu" / "checkpoints")
    second = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    return Demo(out, (first.returncode, output), stopped_at, second)


def test_quick_demo_survives_an_interruption(demo: Demo) -> None:
    """It stops, resumes, and has one history."""
    returncode, output = demo.first
    assert returncode == 128 + signal.SIGTERM
    assert "run the same command again to resume" in output
    assert demo.stopped_at is not None
    second = demo.second
    assert second.returncode == 0, second.stdout + second.stderr
    assert f"resumes from iteration {demo.stopped_at}" in second.stdout
    assert "no evidence" in second.stdout
    record = run.finished_records(demo.out)["xielu"]
    quick = settings.QUICK
    assert [step for step, _ in record.train] == list(range(1, quick.iterations + 1))
    assert [step for step, _ in record.valid] == [quick.validate_every, quick.iterations]
    assert record.parameters == quick.parameters_of(settings.ACTIVATIONS["xielu"])
    assert record.train_loss < record.train[0][1] - 1  # it learns
    assert record.alphas is not None
    assert record.alphas.iterations[-1] == quick.iterations
    for history in (record.alphas.positive, record.alphas.negative):
        assert history[0] == [0.8] * quick.layers != history[-1]
    assert {"results.json", "loss.png", "alphas.png"} <= {path.name for path in demo.out.iterdir()}


@pytest.fixture(scope="module")
def hugging_face(demo: Demo) -> Path:
    """What the demo trained at TP=2, converted."""
    folder = demo.out / "hf"
    command = [sys.executable, "-m", "megatron_xielu.convert", "to-hf"]
    command += [str(demo.out / "xielu" / "checkpoints"), str(folder)]
    command += ["--tokenizer", str(demo.out / "text" / "tokenizer")]
    command += ["--trim-vocab", str(prepare_text.VOCAB_SIZE)]
    converted = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert converted.returncode == 0, converted.stdout + converted.stderr
    return folder


class TestHuggingFace:
    def test_tokenizer_is_the_bytes_of_the_text(self, demo: Demo) -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(demo.out / "text" / "tokenizer")
        text = "".join(map(chr, range(0x300))) + "def f(x):\r\n\treturn  x  # 中 😀"
        ids = tokenizer(text)["input_ids"]
        assert ids == list(text.encode())
        assert tokenizer.decode(ids) == text
        assert len(tokenizer) == prepare_text.VOCAB_SIZE
        assert tokenizer.eos_token_id == prepare_text.END_OF_DOCUMENT

    def test_a_model_trained_at_tp2_generates_text(self, demo: Demo, hugging_face: Path) -> None:
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
        text = Path(dataclasses.__file__).read_text()[: 8 * settings.QUICK.sequence]
        tokens = tokenizer(text, return_tensors="pt")["input_ids"].view(8, -1)
        with torch.no_grad():
            loss = model(tokens, labels=tokens).loss.item()
        assert loss == pytest.approx(run.finished_records(demo.out)["xielu"].valid[-1][1], abs=0.5)

    def test_lm_eval_runs_on_it(self, hugging_face: Path, tmp_path: Path) -> None:
        """A task of its own: which of two continuations is Python?"""
        lines = [("import ", "os", "§¶"), ("    def ", "__init__", "~~~~`~~~"), ("se", "lf", "ØØ")]
        questions = [
            {"text": text, "choices": [right, wrong], "answer": 0} for text, right, wrong in lines
        ]
        data = tmp_path / "data.jsonl"
        data.write_text("".join(json.dumps(question) + "\n" for question in questions))
        (tmp_path / "python_lines.yaml").write_text(
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
        command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu"]
        command += ["--model_args", f"pretrained={hugging_face},dtype=float32"]
        command += ["--tasks", "python_lines", "--include_path", str(tmp_path)]
        command += ["--batch_size", "2", "--output_path", str(tmp_path / "results")]
        environment = {**ENVIRONMENT, "HF_HOME": str(tmp_path / "home")}
        evaluated = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert evaluated.returncode == 0, evaluated.stdout + evaluated.stderr
        (file,) = (tmp_path / "results").rglob("results_*.json")
        results = json.loads(file.read_text())["results"]["python_lines"]
        assert results["acc,none"] == 1.0
