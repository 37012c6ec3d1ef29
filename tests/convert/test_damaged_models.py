"""Hugging Face models and checkpoints that no release has written: refused in one line."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hostile import damaged, damaged_bytes
from hypothesis import given, settings
from launch import load_checkpoint
from safetensors.torch import load_file, save_file
from small_models import small, write_hf
from transformers import ApertusConfig, ArceeConfig, LlamaConfig

from megatron_xielu.checkpoints.reader import open_source
from megatron_xielu.checkpoints.source import Refused
from megatron_xielu.common.safetensors_index import INDEX
from megatron_xielu.convert import __main__ as cli
from megatron_xielu.convert import from_hf, hf_config, to_hf
from megatron_xielu.convert.architecture import LLAMA3_ROPE
from megatron_xielu.convert.safetensors_files import Reader

SCALING = {"rope_type": "llama3", "factor": 4.0, **LLAMA3_ROPE}
V4 = {"transformers_version": "4.57.6"}
V5 = {"transformers_version": "5.23.0"}


@pytest.mark.parametrize(
    ("model_type", "fields", "expected"),
    [
        # 4: null is no scaling, a missing key is Apertus' own one.
        ("apertus", V4 | {"rope_theta": 5e5, "rope_scaling": None}, (5e5, None)),
        ("apertus", {"rope_theta": 5e5, "rope_scaling": None}, (5e5, None)),
        ("apertus", V4 | {"rope_theta": 5e5}, (5e5, 8.0)),
        ("apertus", V4 | {"rope_scaling": None}, (12e6, None)),
        ("apertus", V4 | {"rope_theta": 5e5, "rope_scaling": SCALING}, (5e5, 4.0)),
        ("apertus", V4 | {"rope_scaling": SCALING | {"type": "llama3"}}, (12e6, 4.0)),
        ("llama", V4 | {"rope_theta": 5e5, "rope_scaling": None}, (5e5, None)),
        ("llama", V4 | {"rope_scaling": SCALING}, (1e4, 4.0)),
        ("arcee", {}, (1e4, None)),
        # 5: both are Apertus' own one.
        ("apertus", V5, (12e6, 8.0)),
        ("apertus", V5 | {"rope_parameters": None}, (12e6, 8.0)),
        ("apertus", V5 | {"rope_parameters": {"rope_theta": 7e5}}, (7e5, None)),
        ("apertus", V5 | {"rope_parameters": SCALING | {"rope_theta": 7e5}}, (7e5, 4.0)),
        ("llama", V5 | {"rope_theta": 5e5, "rope_scaling": None}, (5e5, None)),
        ("arcee", V5 | {"rope_parameters": {"rope_theta": 7e5}}, (7e5, None)),
        # As exported here: for both.
        ("apertus", hf_config.config_of(small(rope_factor=2.0), torch.float32), (1e4, 2.0)),
        ("apertus", hf_config.config_of(small(), torch.float32), (1e4, None)),
    ],
)
def test_rope_is_what_the_writer_meant(model_type, fields, expected):
    act = "silu" if model_type == "llama" else "xielu"
    stored = {"model_type": model_type, "num_attention_heads": 8, "hidden_act": act} | fields
    found = hf_config.architecture_of(stored | {"model_type": model_type}, None)
    assert (found.rope_theta, found.rope_factor) == expected


@pytest.mark.parametrize(
    "fields",
    [
        V5 | {"rope_theta": 5e5, "rope_scaling": None},
        {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 7e5}},
        {"rope_scaling": None, "rope_parameters": SCALING | {"rope_theta": 12e6}},
        V4 | {"rope_scaling": {"factor": 2.0}},
        V4 | {"rope_scaling": {**SCALING, "factor": None}},
        V4 | {"rope_scaling": {**SCALING, "rope_type": "yarn"}},
    ],
)
def test_rope_that_cannot_be_told_is_refused(fields):
    with pytest.raises(Refused, match=r"^config\.json: .*(rope_parameters|rope_type|factor)"):
        hf_config.architecture_of({**fields, "model_type": "apertus"}, None)


@pytest.mark.parametrize("config", [ApertusConfig, ArceeConfig, LlamaConfig])
def test_rope_is_what_transformers_5_makes_of_it(config):
    for theta in ({}, {"rope_theta": 5e5}):
        for scaling in ({}, {"rope_scaling": None}, {"rope_scaling": {**SCALING}}):
            for rope in ({}, {"rope_parameters": {"rope_theta": 7e5}}):
                fields = {**theta, **scaling, **rope}
                built = config(**json.loads(json.dumps(fields)), max_position_embeddings=65536)
                ours = hf_config._rope_of_5({**fields, "model_type": config.model_type})
                assert ours == built.rope_parameters, fields


GOOD = hf_config.config_of(small(rope_factor=8.0, activation="xielu"), torch.float32) | V5


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", None),
        ("num_attention_heads", 0),
        ("num_attention_heads", "2"),
        ("num_attention_heads", 3),
        ("num_key_value_heads", 0),
        ("num_hidden_layers", 10**29),
        ("num_hidden_layers", 2**30),
        ("hidden_size", None),
        ("vocab_size", 1.5),
        ("hidden_act", ["xielu"]),
        ("hidden_act", "a\nb"),
        ("rms_norm_eps", float("nan")),
        ("initializer_range", "0.02"),
        ("tie_word_embeddings", "yes"),
        ("rope_theta", float("inf")),
        ("rope_theta", 0),
        ("rope_theta", 1e300),
        ("rope_parameters", "llama3"),
        ("rope_scaling", {"factor": float("nan")}),
        ("torch_dtype", "banana"),
        ("dtype", "float8_e4m3fn"),
        ("dtype", 3),
        ("transformers_version", 5),
        ("head_dim", -8),
    ],
)
def test_a_wrong_field_of_the_configuration_is_named(field, value, tmp_path):
    folder = write_hf(tmp_path / "hf", small(), **{field: value})
    words = r"no tensor model\.layers\.2" if value == 2**30 else rf"config\.json: .*{field}"
    with pytest.raises(Refused, match=words) as error:
        from_hf.convert(folder, tmp_path / "out", from_hf.Options())
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", "", "{", "\ud800"])
def test_a_configuration_that_is_none(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content.encode(errors="surrogatepass"))
    with pytest.raises(Refused, match=r"config\.json"):
        hf_config.read(tmp_path)


@pytest.fixture(scope="module")
def scratch():
    """A folder for all examples of a test."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@given(content=damaged(GOOD))
@settings(max_examples=200, deadline=None)
def test_any_damage_to_the_configuration(content, scratch):
    (scratch / "config.json").write_text(json.dumps(content))
    try:
        hf_config.architecture_of(hf_config.read(scratch), None)
    except Refused as error:
        assert "\n" not in str(error)


INDEXED = {
    "metadata": {"total_size": 4},
    "weight_map": {"a": "1.safetensors", "b": "2.safetensors"},
}


@given(content=damaged(INDEXED))
@settings(max_examples=100, deadline=None)
def test_any_damage_to_the_index(content, scratch):
    folder = scratch / "index"
    folder.mkdir(exist_ok=True)
    (folder / INDEX).write_text(json.dumps(content))
    try:
        assert not Reader(folder).names
    except Refused as error:
        assert "\n" not in str(error)


@pytest.fixture(scope="module")
def safetensors(tmp_path_factory) -> bytes:
    folder = tmp_path_factory.mktemp("good")
    save_file({"a": torch.ones(2, 3), "b": torch.ones(1).bfloat16()}, folder / "x")
    return (folder / "x").read_bytes()


def test_any_damage_to_weights(safetensors, scratch):
    @given(damaged_bytes(safetensors))
    @settings(max_examples=200, deadline=None)
    def check(content: bytes) -> None:
        (scratch / "model.safetensors").write_bytes(content)
        try:
            reader = Reader(scratch)
            for name in reader.names:
                reader.read(name)
        except Refused as error:
            assert "\n" not in str(error)

    check()


def test_a_tensor_in_two_files(tmp_path):
    for name in ("1.safetensors", "2.safetensors"):
        save_file({"a": torch.ones(1)}, tmp_path / name)
    (tmp_path / INDEX).write_text(
        json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}})
    )
    with pytest.raises(Refused, match=r"a is in 1\.safetensors, too"):
        Reader(tmp_path)


def test_the_only_file_comes_before_an_index(tmp_path):
    """As in transformers."""
    folder = write_hf(tmp_path / "hf", small())
    save_file({"a": torch.ones(1)}, folder / "1.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "1.safetensors"}}))
    assert "model.norm.weight" in Reader(folder).names


def test_a_head_in_the_files_of_a_tied_model_is_its_embedding(tmp_path):
    folder = write_hf(tmp_path / "hf", small())
    tensors = load_file(folder / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors | {"lm_head.weight": head}, folder / "model.safetensors")
    from_hf.convert(folder, tmp_path / "tied", from_hf.Options())
    save_file(tensors | {"lm_head.weight": head + 1}, folder / "model.safetensors")
    with pytest.raises(Refused, match="tie_word_embeddings is set"):
        from_hf.convert(folder, tmp_path / "out", from_hf.Options())


def test_a_tensor_that_is_no_weight_is_called_by_its_dtype(tmp_path):
    folder = write_hf(tmp_path / "hf", small())
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.ids": torch.arange(3)}, folder / "model.safetensors")
    with pytest.raises(Refused, match=r"model\.ids is I64; all tensors must be F32, BF16, F16"):
        Reader(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["mlp.act_fn.alpha_n", "mlp.down_proj.weight", "mlp.act_fn.beta"])
def test_no_numbers_among_the_weights(name, value, tmp_path):
    """Refused in both directions, with the layer; nothing is left behind."""
    healthy = write_hf(tmp_path / "hf", small(activation="xielu"))
    tensors = load_file(healthy / "model.safetensors")
    tensors[f"model.layers.1.{name}"] = tensors.get(f"model.layers.1.{name}", torch.zeros(1))
    tensors[f"model.layers.1.{name}"].view(-1)[0] = value
    from_hf.convert(healthy, tmp_path / "megatron", from_hf.Options())
    save_file(tensors, healthy / "model.safetensors")
    with pytest.raises(
        Refused, match="act_fn.beta differs" if "beta" in name else f"layers.1.{name}"
    ):
        from_hf.convert(healthy, tmp_path / "out", from_hf.Options())
    if "beta" not in name:
        saved = tmp_path / "megatron/release"
        whole = load_checkpoint(saved)
        part = "mlp.activation_func.alpha_n" if "alpha" in name else "mlp.linear_fc2.weight"
        whole[f"decoder.layers.{part}"][1].view(-1)[0] = value
        damaged_folder = tmp_path / "iter_0000001"
        dcp.save(whole, checkpoint_id=damaged_folder, no_dist=True)
        (damaged_folder / "common.pt").write_bytes((saved / "common.pt").read_bytes())
        with pytest.raises(Refused, match=f"layers.1.{name} has numbers that are not finite"):
            to_hf.export(open_source(damaged_folder), tmp_path / "out", to_hf.Options())
    assert {path.name for path in tmp_path.iterdir()} <= {"hf", "megatron", "iter_0000001"}


@pytest.mark.parametrize(
    ("activation", "beta", "fault"),
    [("xielu", -0.5, "1.2e-38 or more, not -0.5"), ("xiprelu", 5e37, "at most 1000, not 5e")],
)
def test_what_a_training_would_refuse_is_not_imported(activation, beta, fault, tmp_path):
    folder = write_hf(tmp_path / "hf", small(activation=activation, beta=beta))
    if activation == "xielu":
        tensors = load_file(folder / "model.safetensors")
        of_layers = {f"model.layers.{i}.mlp.act_fn.beta": torch.tensor(beta) for i in (0, 1)}
        save_file(tensors | of_layers, folder / "model.safetensors")
    with pytest.raises(Refused, match=f"a training would refuse it: --xielu-beta must be {fault}"):
        from_hf.convert(folder, tmp_path / "out", from_hf.Options())
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_weight_that_float16_cannot_hold(tmp_path):
    folder = write_hf(tmp_path / "hf", small())
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = 1e5
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(Refused, match=r"model\.norm\.weight .* not finite in float16"):
        from_hf.convert(folder, tmp_path / "out", from_hf.Options(dtype=torch.float16))
    from_hf.convert(folder, tmp_path / "out", from_hf.Options(dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        (("to-hf", "a", "b\0c"), "out"),
        (("from-hf", "a", "b\0c"), "out"),
        (("to-hf", "a", "b", "--max-shard-size", "9" * 400 + "GB"), "--max-shard-size"),
        (("to-hf", "a", "b", "--max-shard-size", "1e400GB"), "--max-shard-size"),
        (("to-hf", "a", "b", "--max-shard-size", "0"), "--max-shard-size"),
        (("to-hf", "a", "b", "--max-shard-size", "5"), "--max-shard-size"),
        (("from-hf", "a", "b", "--make-vocab-size-divisible-by", "9" * 400), "--make-vocab"),
        (("to-hf", "a", "b", "--trim-vocab", "²"), "--trim-vocab"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_a_wrong_command_line_is_named(arguments: tuple[str, ...], flag: str, capsys: Any):
    with pytest.raises(SystemExit):
        cli.main(arguments)
    assert f"argument {flag}" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("name", ["a b", "nobody/none"])
def test_a_model_that_cannot_be_downloaded(name, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit, match=f"error: {name} cannot be downloaded") as error:
        cli.main(["from-hf", name, str(tmp_path / "out"), "--download"])
    assert "\n" not in str(error.value)
