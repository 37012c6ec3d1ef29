"""The modules on their own, plain and Megatron's: parameters, precision, what is asked of them."""

import copy
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from launch import REPOSITORY, start, wait
from megatron.core import parallel_state
from megatron.core.transformer.module import MegatronModule
from torch.testing._internal.distributed.fake_pg import FakeStore

import megatron_xielu
from megatron_xielu import XIELU, MegatronXIELU, MegatronXIPReLU, XIPReLU, functional
from megatron_xielu.hf.fused import FusedActivation
from megatron_xielu.hf.modeling_xiprelu import XIPReLUActivation
from megatron_xielu.kernels import reference
from megatron_xielu.megatron_activations import ActivationBuilder

BOTH = pytest.mark.parametrize("activation", [XIELU, XIPReLU])
ALL = pytest.mark.parametrize("activation", [XIELU, XIPReLU, MegatronXIELU, MegatronXIPReLU])


def test_importing_patches_nothing_and_needs_nothing():
    code = (
        "import sys, megatron_xielu, megatron_xielu.functional\n"
        "loaded = {m.split('.')[0] for m in sys.modules}\n"
        "assert not loaded & {'megatron', 'triton', 'transformer_engine', 'apex'}, loaded\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'GELU'"):
        _ = megatron_xielu.GELU


@ALL
def test_without_any_configuration(activation):
    module = activation(alpha_p_init=0.8, alpha_n_init=0.8, beta=0.5)
    if isinstance(module, MegatronModule):
        assert module.tp_group is None
    assert [a.shape for a in module.parameters()] == [(1,), (1,)]  # 1-D: no weight decay
    assert [a.dtype for a in module.parameters()] == [torch.float32] * 2
    assert [a.item() for a in module.effective_alphas()] == pytest.approx([0.8, 0.8])
    x = torch.randn(5, 7)
    formula = reference.xielu if activation.name == "xielu" else reference.xiprelu
    torch.testing.assert_close(
        module(x).double(), formula(x, module.alpha_p, module.alpha_n), rtol=1e-6, atol=1e-7
    )


@ALL
@pytest.mark.parametrize("initial", [1e-6, 0.3, 30.0, 166.0])
def test_initial_alphas(activation, initial):
    floor = 0.5 if activation.name == "xielu" else 0.0
    module = activation(alpha_p_init=initial, alpha_n_init=floor + initial)
    alpha_p, alpha_n = module.effective_alphas()
    assert alpha_p.item() == pytest.approx(initial, rel=1e-5)
    assert alpha_n.item() - floor == pytest.approx(initial, rel=1e-5)


@ALL
@pytest.mark.parametrize("cast", ["half", "bfloat16"])
def test_alphas_stay_fp32_in_a_16_bit_model(activation, cast):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), activation(alpha_p_init=166.3))
    before = [a.clone() for a in model[1].parameters()]
    getattr(model, cast)()
    assert model[0].weight.dtype in (torch.half, torch.bfloat16)
    assert all(
        a.dtype == torch.float32 and torch.equal(a, b)
        for a, b in zip(model[1].parameters(), before, strict=True)
    )
    out = model(torch.randn(3, 4, dtype=model[0].weight.dtype))
    out.float().sum().backward()
    assert out.dtype == model[0].weight.dtype
    assert all(a.grad.dtype == torch.float32 for a in model[1].parameters())


@ALL
def test_other_casts_and_moves(activation):
    module = activation()
    for one in (module, FusedActivation(XIPReLUActivation(), functional.xiprelu, {})):
        original = one.alpha_p.item()
        for cast, dtype in (
            ("bfloat16", torch.float32),
            ("double", torch.float64),
            ("half", torch.float32),
            ("double", torch.float64),
            ("float", torch.float32),
        ):
            getattr(one, cast)()
            assert (one.alpha_p.dtype, one.alpha_p.item()) == (dtype, original)
        one(torch.randn(3)).sum().backward()
    with torch.device("meta"):
        on_meta = activation()
    assert on_meta.alpha_n.is_meta
    materialised = on_meta.to_empty(device="cpu")
    materialised.reset_parameters()
    assert torch.equal(materialised.alpha_p, module.alpha_p)
    assert torch.equal(materialised.alpha_n, module.alpha_n)
    other = activation(alpha_p_init=3.0)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.alpha_p, module.alpha_p)


@ALL
def test_alphas_of_a_16_bit_file(activation):
    """Also where the file's own tensors become the parameters: no step would change them."""
    states = {name: alpha.bfloat16() for name, alpha in activation().state_dict().items()}
    for assign in (False, True):
        model = torch.nn.Sequential(activation(alpha_p_init=3.0))
        model.load_state_dict({f"0.{name}": alpha for name, alpha in states.items()}, assign=assign)
        assert [a.dtype for a in model.parameters()] == [torch.float32] * 2
        assert model[0].alpha_p.item() == states["alpha_p"].item()
        assert model(torch.randn(3).bfloat16()).dtype == torch.bfloat16


@ALL
def test_what_is_no_alpha_is_not_taken(activation):
    """From a file, or by a cast: NaN would spread over the model, and half a complex number be
    dropped without a word."""
    model = torch.nn.Sequential(activation())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for alpha, message in (
        (torch.tensor([float("nan")]), r"0\.alpha_n is \[nan\]: take an earlier checkpoint"),
        (torch.tensor([float("-inf")]), r"0\.alpha_n is \[-inf\]"),
        (torch.ones(1) + 1j, r"0\.alpha_n must be a dense tensor of real numbers, not .*complex64"),
        (torch.ones(1).to_sparse(), r"0\.alpha_n must be a dense tensor"),
        (torch.ones(1).int(), r"0\.alpha_n must be .* not torch\.int32"),
    ):
        for assign in (False, True):
            with pytest.raises(RuntimeError, match=message):
                model.load_state_dict(before | {"0.alpha_n": alpha}, assign=assign)
    for one in (model[0], FusedActivation(XIPReLUActivation(), functional.xiprelu, {})):
        for dtype in (torch.complex64, torch.int32):
            with pytest.raises(TypeError, match=f"cannot be cast to {dtype}"):
                one.type(dtype)
    assert all(torch.equal(a, before[name]) for name, a in model.state_dict().items())
    assert model[0].alpha_p.dtype == torch.float32


def test_a_sum_over_ranks_has_one_derivative():
    """A second one would lack the sum."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        module = MegatronXIELU(tp_group=torch.distributed.group.WORLD)
        y = module(torch.randn(3, requires_grad=True)).sum()
        (gradient,) = torch.autograd.grad(y, module.alpha_p, create_graph=True)
        with pytest.raises(RuntimeError, match="marked with @once_differentiable"):
            gradient.sum().backward()
    finally:
        torch.distributed.destroy_process_group()


WITHOUT_MEGATRON = """
import sys, torch

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "megatron":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
exec(sys.argv[1])
assert max(abs(alpha.item() - 0.8) for alpha in (alpha_p, alpha_n)) < 1e-6
from megatron_xielu import XIPReLU

torch.manual_seed(0)
for activation in (XIELU, XIPReLU):
    module = activation(alpha_p_init=166.0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), module, torch.nn.Linear(32, 1)).bfloat16()
    before = [alpha.item() for alpha in module.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    x, losses = torch.randn(64, 8).bfloat16(), []
    for _ in range(5):
        loss = (model(x).float() - x.float().sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0], losses
    for alpha, first in zip(module.parameters(), before):
        assert alpha.dtype == torch.float32 and 0.005 < abs(alpha.item() - first) < 0.06, alpha
    saved = model.state_dict()
    assert saved["1.alpha_p"].dtype == torch.float32
assert "megatron" not in sys.modules
"""


def test_trains_where_there_is_no_megatron():
    """The document's example; and in bf16, where a step of 0.01 would leave an alpha of 166."""
    text = (REPOSITORY / "docs/training.md").read_text()
    (example,) = re.findall(r"```python\n(import torch\n.*?)```", text, re.S)
    command = [sys.executable, "-c", WITHOUT_MEGATRON, example]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_plain_modules_on_two_ranks(tmp_path):
    """DDP, and FSDP2 by the recipe of docs/training.md."""
    log = tmp_path / "log.txt"
    script = str(Path(__file__).with_name("plain_two_ranks.py"))
    assert wait(start([], ranks=2, log=log, command=[script])) == [0, 0], log.read_text()


def test_a_plain_module_has_no_place_in_megatrons_model():
    with pytest.raises(ValueError, match=r"XIELU is a plain PyTorch module.*use MegatronXIELU"):
        XIELU(config=object())
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
        with pytest.raises(ValueError, match=r"XIPReLU is a plain .* drift apart"):
            XIPReLU()
        assert MegatronXIPReLU().tp_group.size() == 2
        parallel_state.destroy_model_parallel()
        assert XIPReLU().effective_alphas()[0].item() == pytest.approx(0.8)
    finally:
        torch.distributed.destroy_process_group()


class Doubled(XIELU):
    """Somebody's own."""


@pytest.mark.parametrize(
    ("given", "built"),
    [(XIELU, MegatronXIELU), (XIPReLU, MegatronXIPReLU), (MegatronXIELU, MegatronXIELU)],
)
def test_the_builder_builds_megatrons(given, built):
    assert type(ActivationBuilder(given)(config=None)) is built
    with pytest.raises(ValueError, match="Doubled is not for Megatron: derive"):
        ActivationBuilder(Doubled)(config=None)


@BOTH
def test_settings_from_numpy(activation):
    module = activation(alpha_n_init=np.float32(2), beta=np.float32(0.75))
    torch.testing.assert_close(
        module(torch.ones(3)), activation(alpha_n_init=2.0, beta=0.75)(torch.ones(3))
    )


def test_a_copy_is_in_the_same_group(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        module = torch.nn.Sequential(MegatronXIELU(tp_group=torch.distributed.group.WORLD))
        copied = copy.deepcopy(module)
        assert copied[0].tp_group is module[0].tp_group is not None
        assert torch.equal(copied[0].alpha_p, module[0].alpha_p)
        assert copied[0].alpha_p is not module[0].alpha_p
        torch.testing.assert_close(copied(torch.ones(3)), module(torch.ones(3)))
    finally:
        torch.distributed.destroy_process_group()


@ALL
def test_compiles_into_one_graph(activation):
    module = activation()
    x = torch.randn(4, 6, requires_grad=True)
    compiled = torch.compile(module, fullgraph=True)
    compiled(x).sum().backward()
    expected = torch.autograd.grad(module(x).sum(), [x, *module.parameters()])
    for grad, wanted in zip(
        [x.grad, *(a.grad for a in module.parameters())], expected, strict=True
    ):
        torch.testing.assert_close(grad, wanted)


@pytest.mark.parametrize(
    ("activation", "settings", "message"),
    [
        (XIELU, {"alpha_n_init": 0.5}, r"alpha_n_init of XIELU must be .* above 0\.5, got 0\.5"),
        (XIELU, {"alpha_n_init": 0.8, "beta": 0.9}, r"above 0\.9"),
        (XIPReLU, {"alpha_n_init": 0.0}, "alpha_n_init of XIPReLU"),
        (XIPReLU, {"alpha_p_init": float("inf")}, "alpha_p_init must be a finite number"),
        (XIELU, {"beta": -1.0}, "beta must be a finite number above 0"),
        (XIPReLU, {"alpha_p_init": 1e39}, "alpha_p_init must be .* got 1e"),  # inf in float32
        (XIELU, {"alpha_n_init": float("nan")}, "alpha_n_init of XIELU must be .* got nan"),
        (XIELU, {"alpha_n_init": "0.8"}, "alpha_n_init of XIELU must be .* got '0.8'"),
        (XIELU, {"alpha_p_init": None}, "alpha_p_init must be .* got None"),
        (XIELU, {"beta": True}, "beta must be .* got True"),
        # 0 in float32
        (XIELU, {"beta": 1e-46}, r"beta must be above 0 by 1\.2e-38 or more \(float32\)"),
        (XIPReLU, {"alpha_p_init": 1e-46}, "alpha_p_init must be above 0 by"),
        (XIPReLU, {"alpha_n_init": 1e-45}, "alpha_n_init of XIPReLU must be above 0.0 by"),
    ],
)
def test_bad_settings(activation, settings, message):
    with pytest.raises(ValueError, match=message):
        activation(**settings)
