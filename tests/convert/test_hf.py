"""Hugging Face: xIPReLU's remote code, its registration, and our kernels in a loaded model."""

import copy
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from hostile import damaged, damaged_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from launch import start, wait
from safetensors.torch import load_file, save, save_file
from torch.nn import ModuleDict
from transformers import (
    ApertusConfig,
    ApertusForCausalLM,
    ArceeConfig,
    ArceeForCausalLM,
    AutoModelForCausalLM,
)

from megatron_xielu import hf
from megatron_xielu.hf import modeling_xiprelu, remote_code
from megatron_xielu.hf.fused import FusedActivation
from megatron_xielu.kernels import reference

TINY = {
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
    **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
# Not representable in bfloat16, where neighbours are 1.0 apart.
ALPHA = 130.3
# Of the xIELU models.
STORED = {torch.tensor(value).item() for value in (0.3, -1.1)}
INDEX = "model.safetensors.index.json"
TOKENS = torch.arange(3, 27).reshape(2, 12)

XIPRELU = {
    "arcee": (modeling_xiprelu.ArceeXIPReLUConfig, modeling_xiprelu.ArceeXIPReLUForCausalLM),
    "apertus": (modeling_xiprelu.ApertusXIPReLUConfig, modeling_xiprelu.ApertusXIPReLUForCausalLM),
}
XIELU = {
    "arcee": (ArceeConfig, ArceeForCausalLM),
    "apertus": (ApertusConfig, ApertusForCausalLM),
}


def alphas(model) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if "alpha" in name}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """bfloat16 xIPReLU models with float32 alphas, in the form that the export writes."""
    return {name: write_xiprelu(name, tmp_path_factory.mktemp(name)) for name in XIPRELU}


@pytest.fixture(params=["arcee", "apertus"])
def folder(request, folders) -> Path:
    return folders[request.param]


def write_xiprelu(name: str, path: Path) -> Path:
    config, model = XIPRELU[name]
    torch.manual_seed(0)
    built = model(config(**TINY, xiprelu_beta=0.3)).to(torch.bfloat16)
    for alpha in alphas(built).values():
        torch.nn.init.constant_(alpha, ALPHA)
    built.save_pretrained(path)
    described = json.loads((path / "config.json").read_text())
    fields = remote_code.config_fields(qk_layernorm=name == "apertus")
    (path / "config.json").write_text(json.dumps({**described, **fields}))
    for file in remote_code.files():
        shutil.copy(file, path)
    return path


def test_what_travels_into_models_names_its_licence():
    """Their folders have no LICENSE of this package."""
    assert all(
        "# SPDX-License-Identifier: Apache-2.0\n" in f.read_text() for f in remote_code.files()
    )


class TestXIPReLU:
    @pytest.mark.parametrize("dtype", ["auto", torch.bfloat16, torch.float16, torch.float32])
    def test_alphas_stay_float32(self, folder: Path, dtype) -> None:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        assert model.lm_head.weight.dtype == (torch.bfloat16 if dtype == "auto" else dtype)
        model.half()
        assert {(a.dtype, a.item()) for a in alphas(model).values()} == {
            (torch.float32, torch.tensor(ALPHA).item())
        }
        assert {layer.mlp.act_fn.beta for layer in model.model.layers} == {0.3}

    @pytest.mark.parametrize("beta", [0, -0.5, float("nan"), float("inf"), "0.5", None, True])
    def test_a_beta_that_is_none(self, beta) -> None:
        for config, _ in XIPRELU.values():
            with pytest.raises(ValueError, match="xiprelu_beta must be a positive number, not"):
                config(xiprelu_beta=beta)

    def test_saves_and_loads_without_loss(self, folder: Path, tmp_path: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert model.state_dict().keys() == again.state_dict().keys()
        for one, other in zip(
            model.state_dict().values(), again.state_dict().values(), strict=True
        ):
            assert one.dtype == other.dtype and torch.equal(one, other)

    def test_without_this_package(self, folders: dict[str, Path], tmp_path: Path) -> None:
        """A process that knows only torch and transformers loads it when told to trust it, and is
        refused with that flag's name otherwise."""
        code = (
            "import sys, torch\n"
            "from transformers import AutoModelForCausalLM\n"
            "for folder in sys.argv[1:]:\n"
            "    try:\n"
            "        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)\n"
            "    except ValueError as error:\n"
            "        assert 'trust_remote_code=True' in str(error), error\n"
            "    else:\n"
            "        raise AssertionError('loaded untrusted')\n"
            "    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)\n"
            "    prompt = torch.tensor([[3, 4]])\n"
            "    tokens = model.generate(prompt, max_new_tokens=4, do_sample=False)\n"
            "    print(tokens.tolist())\n"
            "assert not [name for name in sys.modules if name.startswith('megatron')]\n"
        )
        run = subprocess.run(
            [sys.executable, "-c", code, *map(str, folders.values())],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PATH": os.defpath},
        )
        assert run.returncode == 0, run.stderr[-3000:]
        for line, folder in zip(run.stdout.splitlines(), folders.values(), strict=True):
            model = AutoModelForCausalLM.from_pretrained(folder)
            tokens = model.generate(torch.tensor([[3, 4]]), max_new_tokens=4, do_sample=False)
            assert json.loads(line) == tokens.tolist()

    def test_compiles_whole_and_builds_on_meta(self, folder: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(TOKENS).logits, model(TOKENS).logits)
        with torch.device("meta"):
            meta = AutoModelForCausalLM.from_config(model.config)
        mlp = meta.model.layers[0].mlp
        assert mlp(torch.empty(2, 3, 32, device="meta")).shape == (2, 3, 32)


class TestActivation:
    @pytest.fixture
    def activation(self) -> modeling_xiprelu.XIPReLUActivation:
        return modeling_xiprelu.XIPReLUActivation(beta=0.7)

    def test_float64_values_and_gradients_are_the_oracles(self, activation) -> None:
        activation.alpha_n.data.fill_(-3.0)
        x = torch.linspace(-30, 30, 601, dtype=torch.float64, requires_grad=True)
        dy = torch.linspace(-1, 1, 601, dtype=torch.float64)
        activation.double()
        y = activation(x)
        y.backward(dy)
        exact = reference.xiprelu(x, activation.alpha_p, activation.alpha_n, beta=0.7)
        torch.testing.assert_close(y, exact, rtol=1e-15, atol=1e-15)
        gradients = reference.xiprelu_backward(
            dy, x, activation.alpha_p, activation.alpha_n, beta=0.7
        )
        for ours, oracle in zip(
            (x.grad, activation.alpha_p.grad, activation.alpha_n.grad), gradients, strict=True
        ):
            torch.testing.assert_close(ours, oracle, rtol=1e-13, atol=1e-13)

    def test_bfloat16_is_the_exact_result_rounded_once(self, activation) -> None:
        activation.alpha_p.data.fill_(0.123)
        activation.alpha_n.data.fill_(-0.456)
        x = torch.linspace(-50, 50, 4001).bfloat16()
        exact = reference.xiprelu(x, activation.alpha_p, activation.alpha_n, beta=0.7)
        y = activation(x)
        assert y.dtype == torch.bfloat16
        # float32's rounding before can tip a tie: at most the neighbour, and almost never.
        assert (y != exact.bfloat16()).float().mean() < 1e-3
        torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=0)

    def test_no_nan_from_large_values(self, activation) -> None:
        x = torch.tensor([-torch.inf, -1e30, 0.0, 1e30, torch.inf], requires_grad=True)
        y = activation(x)
        y.backward(torch.ones(5))
        assert y.tolist() == [torch.inf, torch.inf, 0.0, torch.inf, torch.inf]
        assert not x.grad.isnan().any() and not activation.alpha_p.grad.isnan().any()


@pytest.fixture(scope="module", params=["arcee", "apertus"])
def xielu_folder(request, tmp_path_factory) -> Path:
    """A stock xIELU model in float32, alphas as the export writes them."""
    config, model = XIELU[request.param]
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp(f"xielu_{request.param}")
    model(config(**TINY, hidden_act="xielu")).save_pretrained(path)
    tensors = load_file(path / "model.safetensors")
    for name in tensors:
        if "alpha" in name:
            tensors[name] = torch.tensor([0.3 if "alpha_p" in name else -1.1])
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


class TestFusedActivation:
    def test_equals_stock_with_the_same_alphas(self, xielu_folder: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(xielu_folder, dtype=torch.float32)
        model.float()  # Arcee's alphas are bfloat16 even so, and stay rounded
        stock = model(TOKENS).logits
        stock.square().mean().backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        model.zero_grad()
        keys = model.state_dict().keys()

        assert hf.use_fused_activation(model) == 2
        fused = model(TOKENS).logits
        fused.square().mean().backward()
        torch.testing.assert_close(fused, stock, rtol=1e-5, atol=1e-5)
        assert model.state_dict().keys() == keys
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad, gradients[name], rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_alphas_as_stored(self, xielu_folder: Path, dtype, tmp_path: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(xielu_folder, dtype=dtype)
        hf.use_fused_activation(model, alphas_from=xielu_folder)
        model.to(torch.bfloat16)
        assert {(a.dtype, a.item()) for a in alphas(model).values()} == {
            (torch.float32, value) for value in STORED
        }
        model(TOKENS).logits.float().mean().backward()
        assert all(a.grad is not None for a in alphas(model).values())
        model.generate(TOKENS, max_new_tokens=2)
        model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        hf.use_fused_activation(again, alphas_from=tmp_path)
        for name, alpha in alphas(model).items():
            assert torch.equal(again.get_parameter(name), alpha)

    def test_stock_rounds_alphas(self, xielu_folder: Path) -> None:
        """Why `alphas_from` exists; if this fails, transformers has changed for the better."""
        model = AutoModelForCausalLM.from_pretrained(xielu_folder, dtype=torch.bfloat16)
        assert {a.dtype for a in alphas(model).values()} == {torch.bfloat16}

    def test_xiprelu(self, folder: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        plain = model(TOKENS).logits
        hf.use_fused_activation(model, alphas_from=folder)
        torch.testing.assert_close(model(TOKENS).logits, plain, rtol=1e-5, atol=1e-5)

    def test_refusals(self, xielu_folder: Path, tmp_path: Path) -> None:
        relu2 = ArceeForCausalLM(ArceeConfig(**TINY))
        with pytest.raises(ValueError, match="ArceeForCausalLM has no xIELU"):
            hf.use_fused_activation(relu2)
        model = AutoModelForCausalLM.from_pretrained(xielu_folder)
        with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
            hf.use_fused_activation(model, alphas_from=tmp_path)
        relu2.save_pretrained(tmp_path)
        with pytest.raises(KeyError, match=r"act_fn\.alpha_p is not in the safetensors"):
            hf.use_fused_activation(model, alphas_from=tmp_path)
        activation = model.model.layers[1].mlp.act_fn
        for name, value in (("alpha_n", float("nan")), ("beta", -0.5)):
            before = getattr(activation, name).item()
            getattr(activation, name).data.fill_(value)
            with pytest.raises(
                ValueError, match=rf"layers\.1\.mlp\.act_fn\.{name} is {value}: load"
            ):
                hf.use_fused_activation(model)
            getattr(activation, name).data.fill_(before)
        hf.use_fused_activation(model)
        with pytest.raises(ValueError, match="no xIPReLU activation but fused ones"):
            hf.use_fused_activation(model, alphas_from=xielu_folder)
        with torch.device("meta"):
            meta = AutoModelForCausalLM.from_config(model.config)
        for alphas_from in (None, xielu_folder):
            with pytest.raises(ValueError, match=r"act_fn.alpha_p is on the meta device: load"):
                hf.use_fused_activation(meta, alphas_from=alphas_from)

    @pytest.mark.parametrize(
        "wrap",
        [
            lambda model: torch.compile(model, backend="eager"),
            # PEFT's names
            lambda model: ModuleDict({"base_model": ModuleDict({"model": model})}),
        ],
    )
    def test_within_another_model(self, xielu_folder: Path, wrap) -> None:
        model = AutoModelForCausalLM.from_pretrained(xielu_folder)
        model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
        wrapped = wrap(model)
        optimizer = torch.optim.SGD(wrapped.parameters(), 1.0)  # before, against the advice
        assert hf.use_fused_activation(wrapped, alphas_from=xielu_folder) == 2
        assert {alpha.item() for alpha in alphas(model).values()} == STORED
        model(TOKENS).logits.square().mean().backward()
        optimizer.step()
        assert not {alpha.item() for alpha in alphas(model).values()} & STORED

    def test_a_module_of_two_mlps_and_gradients_that_are_there(self, xielu_folder: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(xielu_folder, dtype=torch.bfloat16)
        mlps = [layer.mlp for layer in model.model.layers]
        mlps[1].act_fn = mlps[0].act_fn
        model(TOKENS).logits.square().mean().backward()
        assert hf.use_fused_activation(model) == 1
        assert mlps[0].act_fn is mlps[1].act_fn
        assert isinstance(mlps[0].act_fn, FusedActivation)
        assert mlps[0].act_fn.alpha_p.grad.dtype == torch.float32

    @pytest.mark.parametrize("offload", ["cpu", "disk", "map"])
    @pytest.mark.parametrize("from_files", [False, True])
    def test_offloaded(
        self, xielu_folder: Path, tmp_path: Path, offload: str, from_files: bool
    ) -> None:
        """The alphas stay where the activation is computed."""
        model = AutoModelForCausalLM.from_pretrained(xielu_folder)
        model.float()
        hf.use_fused_activation(model, alphas_from=xielu_folder if from_files else None)
        expected = model(TOKENS).logits
        device_map = {"lm_head": "cpu", **{f"model.{name}": "cpu" for name in model.model._modules}}
        del device_map["model.layers"]
        device_map |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
        offloaded = AutoModelForCausalLM.from_pretrained(
            xielu_folder,
            dtype=torch.float32,
            device_map=device_map if offload == "map" else None,
            offload_folder=tmp_path,
        )
        if offload == "cpu":
            cpu_offload(offloaded, torch.device("cpu"))
        if offload == "disk":
            disk_offload(offloaded, tmp_path, torch.device("cpu"))
        hf.use_fused_activation(offloaded, alphas_from=xielu_folder if from_files else None)
        torch.testing.assert_close(offloaded(TOKENS).logits, expected)
        alpha = next(iter(alphas(offloaded).values()))
        alpha.data += 1  # its own memory, not a file's

    def test_all_that_is_done_with_a_model(self, folders: dict[str, Path]) -> None:
        model = AutoModelForCausalLM.from_pretrained(folders["arcee"], dtype=torch.float32)
        hf.use_fused_activation(model)
        copies = [copy.deepcopy(model) for _ in range(3)]
        copies[1].train().gradient_checkpointing_enable()
        copies[2] = torch.compile(copies[2], backend="aot_eager", fullgraph=True)
        gradients = []
        for one in (model, *copies):
            one(TOKENS).logits.square().mean().backward()
            gradients.append([p.grad for p in alphas(one).values()])
        for others in gradients[1:]:
            torch.testing.assert_close(others, gradients[0])

    @pytest.mark.parametrize(
        "file",
        [3, "../x.safetensors", "..", "", "/etc/passwd", "absent.safetensors", INDEX, "a\n", "\0"],
    )
    def test_a_damaged_index(self, xielu_folder: Path, tmp_path: Path, file) -> None:
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": file}}))
        model = AutoModelForCausalLM.from_pretrained(xielu_folder)
        with pytest.raises(ValueError, match=f"{tmp_path}.*") as raised:
            hf.use_fused_activation(model, alphas_from=tmp_path)
        assert "\n" not in str(raised.value)

    @pytest.mark.parametrize(
        "wrong",
        [torch.zeros(2), torch.zeros(1, 0), torch.tensor([float("nan")])],
    )
    def test_a_stored_alpha_that_is_none(self, xielu_folder: Path, tmp_path: Path, wrong) -> None:
        tensors = load_file(xielu_folder / "model.safetensors")
        tensors["model.layers.1.mlp.act_fn.alpha_n"] = wrong
        save_file(tensors, tmp_path / "model.safetensors")
        model = AutoModelForCausalLM.from_pretrained(xielu_folder)
        before = [(name, id(module)) for name, module in model.named_modules()]
        with pytest.raises(ValueError, match=r"layers\.1\.mlp\.act_fn\.alpha_n holds no number"):
            hf.use_fused_activation(model, alphas_from=tmp_path)
        assert [(name, id(module)) for name, module in model.named_modules()] == before

    @settings(max_examples=50, deadline=None)
    @given(data=st.data())
    def test_damaged_files(self, data: st.DataObject) -> None:
        good = save({f"act_fn.alpha_{side}": torch.zeros(1) for side in "pn"})
        index = {"metadata": {"total_size": 8}, "weight_map": {"act_fn.alpha_p": "a.safetensors"}}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder)
            if data.draw(st.booleans()):
                (path / INDEX).write_text(json.dumps(data.draw(damaged(index))))
                (path / "a.safetensors").write_bytes(good)
            else:
                (path / "model.safetensors").write_bytes(data.draw(damaged_bytes(good)))
            model = torch.nn.ModuleDict({"act_fn": modeling_xiprelu.XIPReLUActivation()})
            try:
                hf.use_fused_activation(model, alphas_from=path)
            except (ValueError, KeyError) as error:
                assert folder in str(error) and "\n" not in str(error)


def test_two_ranks(tmp_path: Path) -> None:
    """The recipe of docs/huggingface.md for FSDP2; DDP; what is refused."""
    log = tmp_path / "log.txt"
    script = Path(__file__).with_name("hf_two_ranks.py")
    assert wait(start([], ranks=2, log=log, command=[str(script)])) == [0, 0], log.read_text()
