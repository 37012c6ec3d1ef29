"""Megatron-Bridge: a Hugging Face model becomes a Megatron model at TP=2, and comes back.

Real are Bridge 0.6.2 (its wheel, without its other dependencies), Megatron 0.19.2 with its local
layers, gloo and stock transformers models. Not run: Transformer Engine's layers, a GPU, Bridge's
own checkpoints and training loop.
"""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from launch import REPOSITORY, start, wait
from safetensors.torch import load_file, save_file
from transformers import (
    ApertusConfig,
    ApertusForCausalLM,
    ArceeConfig,
    ArceeForCausalLM,
    AutoModelForCausalLM,
)

from megatron_xielu import hf

WHEELS = ("megatron-bridge==0.6.2", "einops==0.8.1")
LAYERS = 2
SIZES = {
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": LAYERS},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2},
    **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "hidden_act": "xielu"},
}
MODELS = {
    "arcee": lambda: ArceeForCausalLM(
        ArceeConfig(
            **SIZES,
            max_position_embeddings=64,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        )
    ),
    # As released: RoPE with llama3 scaling.
    "apertus": lambda: ApertusForCausalLM(ApertusConfig(**SIZES, max_position_embeddings=65536)),
}


@pytest.fixture(scope="module")
def bridge(tmp_path_factory) -> Path:
    """Megatron-Bridge, unpacked."""
    folder = tmp_path_factory.mktemp("bridge")
    wheels = REPOSITORY / ".cache" / "bridge"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary", ":all:", "--find-links", str(wheels), "--dest", str(wheels)]
    subprocess.run([*command, *WHEELS], check=True)
    for wheel in wheels.glob("*.whl"):
        with zipfile.ZipFile(wheel) as content:
            content.extractall(folder)
    return folder


def write_model(name: str, folder: Path) -> Path:
    """A random model with trained-looking alphas in float32, as released or exported."""
    torch.manual_seed(0)
    MODELS[name]().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for key in tensors:
        if "alpha" in key:
            layer = int(key.split(".")[2])
            tensors[key] = torch.tensor([0.3 + layer if "alpha_p" in key else -1.1 - layer])
        elif "norm" in key:
            tensors[key] = 1 + 0.1 * torch.randn(tensors[key].shape)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def converted(bridge: Path, tmp_path_factory) -> Path:
    """Folder with each model, and what two ranks made of it."""
    folder = tmp_path_factory.mktemp("models")
    log = folder / "log.txt"
    models = [write_model(name, folder / name) for name in MODELS]
    # As transformers 4 writes a model without scaling; 5 reads it with Apertus' own one.
    misread = Path(shutil.copytree(models[-1], folder / "misread"))
    config = json.loads((misread / "config.json").read_text())
    del config["rope_parameters"]
    config |= {"transformers_version": "4.57.6", "rope_theta": 5e5, "rope_scaling": None}
    (misread / "config.json").write_text(json.dumps(config))
    path = f"{REPOSITORY}:{REPOSITORY / 'tests/helpers'}:{bridge}"
    returncodes = wait(
        start(
            [*map(str, models), str(misread)],
            ranks=2,
            log=log,
            command=[str(Path(__file__).with_name("bridge_case.py"))],
            environment={"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        ),
        timeout=400,
    )
    assert returncodes == [0, 0], log.read_text()[-6000:]
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_at_tp2(name: str, converted: Path) -> None:
    folder = converted / name
    result = torch.load(converted / f"{name}.pt")
    original = load_file(folder / "model.safetensors")
    assert result["alpha_dtypes"] == {torch.float32}
    assert result["tensors"].keys() == original.keys()
    for key, tensor in original.items():
        if key.endswith((".beta", ".eps")):
            continue
        assert result["tensors"][key].dtype == tensor.dtype and torch.equal(
            result["tensors"][key], tensor
        ), key
    assert result["config"]["hidden_act"] == "xielu"
    assert result["config"]["model_type"] == name
    assert result["provider"]["xielu_beta"] == 0.5
    assert result["provider"]["rope_scaling"] == (name == "apertus")

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    hf.use_fused_activation(model, alphas_from=folder)
    logits = model(torch.arange(3, 27).reshape(2, 12)).logits
    torch.testing.assert_close(result["logits"], logits, rtol=1e-4, atol=1e-4)
    logits.sin().sum().backward()
    for layer in range(LAYERS):
        for alpha in ("alpha_p", "alpha_n"):
            ours = [
                rank[f"decoder.layers.{layer}.mlp.activation_func.{alpha}"]
                for rank in result["gradients"]
            ]
            assert torch.equal(*ours)
            theirs = model.get_parameter(f"model.layers.{layer}.mlp.act_fn.{alpha}").grad
            torch.testing.assert_close(ours[0], theirs, rtol=1e-3, atol=1e-4)


def test_rope_that_transformers_misreads_is_refused(converted: Path) -> None:
    refused = torch.load(converted / "misread.pt")["refused"]
    assert "config.json means rope_theta 500000 and the llama3 factor None" in refused


def test_without_bridge_the_error_names_it(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "megatron.bridge", None)
    with pytest.raises(ModuleNotFoundError, match="pip install megatron-bridge"):
        import megatron_xielu.bridge  # noqa: F401
