"""``python -m megatron_xielu.evaluate`` on real trainings, in other layouts than they had.

Judged by what training printed of its own validations, and by transformers' Llama, which computes
loss and pre-activations of the same tokens on its own.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from launch import REPOSITORY, TINY_LLAMA, Run, train
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.tokenizers import MegatronTokenizer
from tokenizers import ByteLevelBPETokenizer

from megatron_xielu.checkpoints.reader import open_source
from megatron_xielu.convert import to_hf
from megatron_xielu.evaluate import checkpoint, data, result, validation

EOD = "<|endoftext|>"
DOCUMENTS = "--dataloader-inter-document-masking"
SEQUENCE = 32  # of TINY_LLAMA
LAYERS, FFN = 4, 96


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """Data of tools/prepare_data.py: sources of the standard library, a third held out."""
    folder = tmp_path_factory.mktemp("text")
    library = Path(sysconfig.get_path("stdlib"))
    texts = [(library / f"{name}.py").read_text() for name in ("abc", "bisect", "copy", "heapq")]
    (folder / "texts").mkdir()
    for text in (part for whole in texts for part in whole.split("\ndef ")):
        (folder / "texts" / f"{len(list((folder / 'texts').iterdir()))}.txt").write_text(text)
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=400, special_tokens=[EOD])
    tokenizer.save(str(folder / "tokenizer.json"))
    subprocess.run(
        [
            *(sys.executable, REPOSITORY / "tools" / "prepare_data.py", "--workers", "1"),
            *("--source", folder / "texts", "--tokenizer", folder / "tokenizer.json"),
            *("--eod-token", EOD, "--output", folder / "data", "--valid-fraction", "0.3"),
            *("--tasks", "2"),
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return folder / "data"


def _model(prepared: Path, *, bias: bool) -> list[str]:
    """TINY_LLAMA on the prepared data."""
    replaced = ("--mock-data", "--vocab-size", "127", "--tokenizer-type", "NullTokenizer")
    dropped = (*replaced, *(["--disable-bias-linear"] if bias else []))
    return [
        *(word for word in TINY_LLAMA if word not in dropped),
        *("--per-split-data-args-path", str(prepared / "per_split_data_args.json")),
        *("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model"),
        str(prepared / "tokenizer"),
    ]


@pytest.fixture(scope="module")
def xielu(prepared, tmp_path_factory) -> tuple[Path, Run]:
    """Trained with biases, QK-norm and three validations; checkpoints at iterations 2, 4 and 5."""
    folder = tmp_path_factory.mktemp("xielu")
    run = train(
        folder,
        "--xielu --qk-layernorm --norm-epsilon 1e-3 --train-iters 5 --eval-interval 2 "
        "--eval-iters 3 --save checkpoints --save-interval 2",
        model=_model(prepared, bias=True),
    )
    return folder, run


@pytest.fixture(scope="module")
def swiglu(prepared, tmp_path_factory) -> Path:
    """Trained on one rank."""
    folder = tmp_path_factory.mktemp("swiglu")
    train(
        folder,
        "--swiglu --train-iters 2 --eval-iters 1 --save checkpoints",
        model=_model(prepared, bias=False),
        command=("-m", "megatron_xielu.pretrain_gpt"),
    )
    return folder


def evaluate(folder: Path, flags: str, **options) -> Run:
    """The command, on the checkpoints in a folder; writes the folder's evaluation.json."""
    command = ("-m", "megatron_xielu.evaluate", "--load", "checkpoints")
    run = train(folder, flags, model=(), command=command, **options)
    assert "Traceback" not in run.output, run.output
    return run


def read(folder: Path) -> dict:
    return json.loads((folder / "evaluation.json").read_text())


def _files(folder: Path) -> dict[str, tuple[int, int]]:
    stats = {str(path): path.stat() for path in folder.rglob("*")}
    return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}


def _printed(run: Run, when: str) -> str:
    found = re.search(rf"validation loss at iteration {when} \| lm loss value: (\S+) ", run.output)
    assert found, run.output[-3000:]
    return found[1]


def _assert_same_layers(found: dict, expected: dict) -> None:
    """The statistics of two evaluations, but for rounding at the edges of a histogram."""
    assert [layer["layer"] for layer in found["layers"]] == list(range(LAYERS))
    for layer, other in zip(found["layers"], expected["layers"], strict=True):
        for name in ("negative_share", "mean", "std"):
            assert layer[name] == pytest.approx(other[name], abs=1e-5)
        counts, others = (np.array(x["histogram"]["counts"]) for x in (layer, other))
        assert counts.sum() == others.sum() == found["tokens"] * FFN
        assert np.abs(counts - others).sum() < 1e-4 * counts.sum()


def test_grouped_experts_on_another_layout(prepared, tmp_path):
    experts = "--num-experts 4 --moe-router-topk 2 --moe-grouped-gemm --moe-ffn-hidden-size 48"
    flags = f"--xielu {experts} --expert-model-parallel-size 2 --train-iters 2 --eval-iters 3"
    model = _model(prepared, bias=False)
    training = train(tmp_path, f"{flags} --save checkpoints", model=model, ranks=2)
    evaluate(tmp_path, "--eval-iters 3")
    printed = float(_printed(training, "2 on validation set"))
    assert read(tmp_path)["loss"] == pytest.approx(printed, rel=1e-6)


def test_equals_the_validation_that_training_printed(xielu):
    folder, training = xielu
    before = _files(folder / "checkpoints")
    # After the end of training: the samples after those of the earlier validations.
    evaluate(folder, "--eval-iters 3")
    last = read(folder)
    assert f"{last['loss']:.6E}" == _printed(training, "5 on validation set")
    assert (last["iteration"], last["eval_iters"], last["activation"]) == (5, 3, "xielu")
    assert last["tokens"] == 3 * 8 * SEQUENCE
    assert last["bytes"] is None and last["bits_per_byte"] is None and "layers" not in last
    assert last["perplexity"] == pytest.approx(math.exp(last["loss"]))
    # Within training.
    flags = "--eval-iters 3 --ckpt-step 4 --activation-statistics"
    run = evaluate(folder, flags)
    earlier = read(folder)
    assert f"{earlier['loss']:.6E}" == _printed(training, "4")
    assert earlier["loss"] != last["loss"]  # other samples, another model
    assert "evaluate: 100%" in run.output and "iteration 4, xielu" in run.output
    # In a pipeline with virtual stages.
    virtual = "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"
    evaluate(folder, f"{flags} {virtual}", ranks=2)
    pipeline = read(folder)
    assert pipeline["loss"] == pytest.approx(earlier["loss"], abs=1e-6)
    _assert_same_layers(pipeline, earlier)
    assert _files(folder / "checkpoints") == before


def test_documents_are_those_of_training(prepared, tmp_path):
    """A checkpoint of a training with the flag is evaluated with it."""
    model = _model(prepared, bias=False)
    flags = f"--xielu --train-iters 2 --eval-interval 2 --eval-iters 3 {DOCUMENTS}"
    training = train(tmp_path, f"{flags} --save checkpoints", model=model)
    evaluate(tmp_path, "--eval-iters 3 --micro-batch-size 4")
    found = read(tmp_path)
    assert f"{found['loss']:.6E}" == _printed(training, "2")


def test_every_token_once(xielu, prepared):
    """With a last batch that is mostly padding; the bias fused with the activation or not."""
    folder, _ = xielu
    flags = f"--data-path {prepared} --activation-statistics"
    evaluate(folder, f"{flags} --no-bias-gelu-fusion")
    unfused = read(folder)
    evaluate(folder, f"{flags} --micro-batch-size 3", ranks=2)
    found = read(folder)
    manifest = json.loads((prepared / "manifest.json").read_text())
    assert found["tokens"] == unfused["tokens"] == manifest["valid"]["tokens"]
    assert found["tokens"] % SEQUENCE  # so that something is padded
    assert found["bytes"] == manifest["valid"]["text_bytes"]
    assert found["data"] == [str(prepared / "valid" / name) for name in ("00000", "00001")]
    assert found["loss"] == pytest.approx(unfused["loss"], abs=1e-6)
    bits = found["loss"] * found["tokens"] / math.log(2) / found["bytes"]
    assert found["bits_per_byte"] == pytest.approx(bits)
    _assert_same_layers(found, unfused)


def _stream(prepared: Path) -> np.ndarray:
    """The held-out tokens, one file after the other."""
    files = [IndexedDataset(str(prepared / "valid" / name)) for name in ("00000", "00001")]
    return np.concatenate([sequence for file in files for sequence in file])


def _assert_by_document(model, inputs, labels, folder: Path, prepared: Path) -> None:
    """With the flag, on one rank and with a last micro-batch that is padded."""
    flags = f"--data-path {prepared} --micro-batch-size 3 --activation-statistics {DOCUMENTS}"
    evaluate(folder, flags)
    loss, begin = 0.0, 0
    with torch.no_grad():
        for end in range(1, len(labels) + 1):
            is_end = end == len(labels) or inputs[end - 1] == 0  # EOD ends a document
            if is_end or end % SEQUENCE == 0:
                logits = model(inputs[None, begin:end]).logits[0]
                loss += torch.nn.functional.cross_entropy(
                    logits, labels[begin:end], reduction="sum"
                ).item()
                begin = end
    found = read(folder)
    assert found["loss"] == pytest.approx(loss / len(labels), abs=1e-5)
    assert sum(found["layers"][0]["histogram"]["counts"]) == len(labels) * FFN


def test_against_transformers(swiglu, prepared, tmp_path):
    """The gated half's pre-activations at TP=2, and the loss, of the same tokens."""
    flags = f"--data-path {prepared} --activation-statistics --tensor-model-parallel-size 2"
    evaluate(swiglu, flags, ranks=2)
    found = read(swiglu)
    assert found["activation"] == "swiglu"

    to_hf.export(open_source(swiglu / "checkpoints"), tmp_path / "hf", to_hf.Options())
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    gates: list[list] = [[] for _ in range(LAYERS)]
    for layer, kept in zip(model.model.layers, gates, strict=True):
        layer.mlp.gate_proj.register_forward_hook(
            lambda m, i, out, kept=kept: kept.append(out.flatten(0, 1))
        )
    labels = torch.from_numpy(_stream(prepared).astype(np.int64))
    inputs = labels.roll(1)  # the first token comes after the last
    _assert_by_document(model, inputs, labels, swiglu, prepared)
    for kept in gates:
        kept.clear()
    loss = 0.0
    with torch.no_grad():
        whole = len(labels) // SEQUENCE * SEQUENCE  # the rest is a shorter sequence
        for part, length in ((slice(whole), SEQUENCE), (slice(whole, None), len(labels) - whole)):
            logits = model(inputs[part].reshape(-1, length)).logits.flatten(0, 1)
            loss += torch.nn.functional.cross_entropy(logits, labels[part], reduction="sum").item()
    assert found["tokens"] == len(labels)
    assert found["loss"] == pytest.approx(loss / len(labels), abs=1e-5)
    for layer, kept in zip(found["layers"], gates, strict=True):
        x = torch.cat(kept).double()
        assert x.shape == (len(labels), FFN)
        assert layer["negative_share"] == pytest.approx((x < 0).double().mean().item(), abs=1e-5)
        assert layer["mean"] == pytest.approx(x.mean().item(), abs=1e-5)
        assert layer["std"] == pytest.approx(x.std(correction=0).item(), abs=1e-5)
        edges = np.array(layer["histogram"]["edges"])
        counts, _ = np.histogram(x.clamp(edges[0], edges[-1]), edges)
        assert (edges[0], edges[-1], len(counts)) == (-8, 8, 64)
        assert np.abs(counts - layer["histogram"]["counts"]).sum() < 1e-4 * counts.sum()


def test_refused_in_one_line(swiglu, prepared, tmp_path):
    """By one process; the last of them once the model's vocabulary is known."""
    shutil.copy(prepared / "valid" / "00000.idx", tmp_path / "other.idx")
    tokens = np.fromfile(prepared / "valid" / "00000.bin", np.uint16)
    tokens[-7] = 416
    tokens.tofile(tmp_path / "other.bin")
    for suffix in ("idx", "bin"):
        (tmp_path / f"empty.{suffix}").touch()
    messages = {
        f"--data-path {prepared} --ckpt-step 9": "--ckpt-step 9: no checkpoints/iter_0000009; ",
        f"--data-path {prepared} --xielu": "the activation is that of the checkpoint; drop --xielu",
        f"--data-path {prepared} --tensor-model-parallel-size 2": "1 ranks are not a multiple of "
        "--tensor-model-parallel-size 2 × --pipeline",
        f"--data-path {prepared} --tensor-model-parallel-size 0": "--tensor-model-parallel-siz",
        f"--data-path {prepared} --num-layers 0": "--num-layers must be 1 or more, not 0",
        f"--data-path {prepared} --distributed-timeout-minutes -1": "--distributed-timeout-minut",
        f"--data-path {prepared} --micro-batch-size -1": "--micro-batch-size must be 1 or more",
        f"--data-path {prepared} --seq-length {10**29}": "--seq-length must be at most 2147483647",
        f"--data-path {prepared} --make-vocab-size-divisible-by 0": "--make-vocab-size-divisible-",
        f"--data-path {tmp_path}/empty": f"--data-path: {tmp_path}/empty.idx is damaged: it ends ",
        f"--data-path {'x' * 300}": "[Errno 36] File name too long: ",
        "--eval-iters 1 --micro-batch-size 3": "--eval-iters: the global batch of 8 does not ",
        f"--data-path {tmp_path}/other": "the data has token 416, the model's vocabulary only 416 ",
    }
    code = (
        "import json, sys; from megatron_xielu.evaluate import __main__ as command\n"
        "for flags in json.loads(sys.argv[1]):\n"
        "    sys.argv[1:] = ['--load', 'checkpoints', *flags.split()]\n"
        "    try: command.main()\n"
        "    except SystemExit as end: print(end.code)\n"
    )
    before = _files(swiglu)
    run = train(swiglu, [json.dumps(list(messages))], model=(), command=("-c", code))
    lines = [line for line in run.output.splitlines() if line.startswith("megatron_xielu: error")]
    assert len(lines) == len(messages)
    for line, message in zip(lines, messages.values(), strict=True):
        assert line.startswith(f"megatron_xielu: error: {message}")
    changed = {path for path, stat in _files(swiglu).items() if before.get(path) != stat}
    assert changed <= {str(swiglu / "log.txt")}


def test_validations_that_are_not_repeated():
    args, saved = Namespace(dataloader_type="single"), Namespace(eval_iters=1, eval_interval=1)
    validation.check(args, saved)
    for name, message in (
        ("full_validation", "--eval-iters does not work with --full-validation"),
        ("multiple_validation_sets", "--eval-iters does not work with --multiple-validation-sets"),
    ):
        with pytest.raises(ValueError, match=message):
            validation.check(args, Namespace(**vars(saved), **{name: True}))
    with pytest.raises(ValueError, match="its training had no validation"):
        validation.check(args, Namespace(eval_iters=0, eval_interval=1))


def _request(**flags) -> Namespace:
    names = ("data_path", "data_args_path", "per_split_data_args_path", "data_split")
    return Namespace(**{**dict.fromkeys(names), **flags})


def test_which_data(prepared):
    """Every form in which prepared data is named."""
    valid = [prepared / "valid" / name for name in ("00000", "00001")]
    train_files = [prepared / "train" / name for name in ("00000", "00001")]
    for flags, expected in (
        ({"data_path": [str(prepared)]}, valid),
        ({"data_path": [str(prepared / "manifest.json")], "data_split": "train"}, train_files),
        ({"data_path": [str(prepared)], "data_split": "all"}, train_files + valid),
        ({"data_path": ["0.3", str(valid[1]), "7", str(valid[0])]}, valid[::-1]),
        ({"data_path": [str(valid[0]), str(valid[0])]}, valid[:1]),
        ({"data_args_path": prepared / "data_args.txt"}, train_files),
        ({"per_split_data_args_path": prepared / "per_split_data_args.json"}, valid),
    ):
        assert data.find(_request(**flags)) == expected
    manifest = json.loads((prepared / "manifest.json").read_text())
    assert data.described_text_bytes(valid) == manifest["valid"]["text_bytes"]
    for flags, message in (
        ({}, "say what to evaluate on with --data-path"),
        ({"data_path": ["a"], "data_args_path": Path("b")}, "give one of --data-path and"),
        ({"data_path": ["a"]}, "--data-path: no a.idx"),
        ({"data_path": [str(valid[0])], "data_split": "valid"}, "--data-split needs data"),
        ({"data_path": [str(prepared)], "data_split": "test"}, "--data-path: no data in it"),
        ({"data_args_path": Path("b")}, "--data-args-path b does not exist"),
        ({"per_split_data_args_path": prepared / "data_args.txt"}, "data_args.txt is no JSON"),
    ):
        with pytest.raises(ValueError, match=message):
            data.find(_request(**flags))


def test_tokens_in_sequences(prepared, tmp_path):
    tokens = data.Tokens([prepared / "valid" / name for name in ("00000", "00001")], SEQUENCE)
    stream = _stream(prepared)
    assert len(tokens) == len(stream)
    samples = [
        tokens.sample(i, lambda text: (None, torch.arange(len(text))))
        for i in range(tokens.sequences + 1)
    ]
    labels = torch.cat([x["labels"][x["loss_mask"].bool()] for x in samples])
    inputs = torch.cat([x["tokens"][x["loss_mask"].bool()] for x in samples])
    assert labels.tolist() == stream.tolist() and inputs.tolist() == np.roll(stream, 1).tolist()
    assert not samples[-1]["loss_mask"].any()
    ends = [tokens.least_and_largest(part, 3) for part in range(3)]
    assert max(largest for _, largest in ends) == stream.max()
    assert {least for least, _ in ends} == {0}

    tokenizer = MegatronTokenizer.from_pretrained(
        tokenizer_path=str(prepared / "tokenizer"), metadata_path={"library": "huggingface"}
    )
    decoded = sum(tokens.decoded_bytes(tokenizer, part, 3) for part in range(3))
    assert decoded == json.loads((prepared / "manifest.json").read_text())["valid"]["text_bytes"]

    for suffix in (".idx", ".bin"):
        shutil.copy(prepared / "valid" / f"00000{suffix}", tmp_path / f"cut{suffix}")
    with (tmp_path / "cut.bin").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(
        ValueError, match=r"cut\.bin is damaged: it has 100 bytes where its \.idx says"
    ):
        data.Tokens([tmp_path / "cut"], SEQUENCE)


def test_which_checkpoint(tmp_path):
    for folder, message in (
        (tmp_path / "no", "no such folder"),
        (tmp_path, "there is no checkpoint in it$"),
    ):
        with pytest.raises(ValueError, match=message):
            checkpoint.find(folder, None)
    folder = tmp_path / "checkpoints"
    (folder / "iter_0000003").mkdir(parents=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("3")
    with pytest.raises(ValueError, match="not a complete checkpoint of the format torch_dist"):
        checkpoint.find(folder, None)
    (folder / "iter_0000003" / ".metadata").touch()
    assert checkpoint.find(folder, None) == checkpoint.find(folder, 3) == folder / "iter_0000003"
    with pytest.raises(ValueError, match=r"--ckpt-step 4: no .*; there is iter_0000003"):
        checkpoint.find(folder, 4)


def test_where_the_result_goes(tmp_path):
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    assert result.output_file(None, checkpoints) == tmp_path / "evaluation.json"
    assert result.output_file(None, tmp_path) is None
    for asked, message in (
        (tmp_path / "no" / "x.json", "no folder"),
        (tmp_path, "is a folder"),
        (checkpoints / "x.json", "is among the checkpoints"),
    ):
        with pytest.raises(ValueError, match=message):
            result.output_file(asked, checkpoints)


def test_a_device_is_an_output_though_its_folder_is_not_writable(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert result.output_file(Path("/dev/null"), tmp_path) == Path("/dev/null")
