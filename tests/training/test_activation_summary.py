"""The line that says which activation is in the model; trainings: test_layouts, test_versions."""

import io
import sys
from argparse import Namespace

import pytest
import torch
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_xielu.features import activation_summary
from megatron_xielu.features.activation_summary import Found, found_in
from megatron_xielu.megatron_activations import MegatronXIELU, MegatronXIPReLU

ARGUMENTS = Namespace()


def line(*activations, args=ARGUMENTS) -> str:
    """What is said of these activations, each in a dense MLP."""
    mlps = {("decoder", str(i)): found_in(one, args) for i, one in enumerate(activations)}
    return activation_summary.line(mlps).removeprefix("megatron_xielu: ")


def test_ours():
    said = "xIELU in 2 MLPs, αp 0.8, αn 0.9, β 0.5; alphas fp32"
    ours = [MegatronXIELU(alpha_n_init=0.9) for _ in range(2)]
    assert line(*ours) == said
    shared = line(*ours, args=Namespace(xielu_shared_alphas=True))
    assert shared == f"{said}, one pair for all MLPs"
    group = Namespace(xielu_alpha_lr_mult=3.0, xielu_alpha_weight_decay=0.1)
    assert line(*ours, args=group) == f"{said}, learning rate × 3, weight decay 0.1"
    assert line(*ours, args=Namespace(xielu_alpha_lr_mult=1.0, xielu_alpha_weight_decay=0)) == said
    assert line(MegatronXIPReLU(frozen_alphas=True), args=Namespace(load="there")) == (
        "xIPReLU in 1 MLP, αp 0.8, αn 0.8 (or as loaded from a checkpoint), β 0.5; "
        "alphas fp32, frozen"
    )


def test_megatrons():
    gelu = torch.nn.functional.gelu
    said = "GELU (Megatron's) in 1 MLP: neither --xielu nor --xiprelu is given"
    assert line(gelu) == said
    swiglu = line(torch.nn.functional.silu, args=Namespace(swiglu=True))
    assert swiglu == "SwiGLU (Megatron's) in 1 MLP"
    # Somebody's own module, in a spec of theirs.
    assert line(torch.nn.Mish(), gelu) == f"Mish in 1 MLP; {said}"


def test_experts_sum_over_ranks_of_their_own():
    kinds = ((4, "MLP"), (2, "expert"), (2, "expert"))
    ours = (Found("xIELU", "; alphas fp32", *found) for found in kinds)
    names = ("layer_00", "layer_01.experts.000", "layer_01.experts.001")
    mlps = {("decoder", name): found for name, found in zip(names, ours, strict=True)}
    assert activation_summary.line(mlps) == (
        "megatron_xielu: xIELU in 1 MLP and 2 experts; alphas fp32, summed over TP=4, those of "
        "experts summed over TP=2"
    )


@pytest.fixture
def one_rank():
    """A process group that does nothing."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_once_and_where_the_output_is_ascii(monkeypatch, one_rank):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(activation_summary, "_said", False)
    for _ in range(2):
        activation_summary.say({("decoder", "0"): found_in(MegatronXIELU(), ARGUMENTS)})
    said = stream.buffer.getvalue()
    assert said.startswith(b"megatron_xielu: xIELU in 1 MLP, \\u03b1p 0.8")
    assert said.count(b"\n") == 1
