"""The tensors of a model under both names, and how one becomes the other; bit for bit, both ways.

Dimensions: g key-value groups, q query heads in a group, d head_dim, h hidden, f ffn.
Megatron keeps one matrix [g·(q + 2)·d, h] of each group's queries, key and value; Hugging Face
three. With a gate Megatron's first matrix is [2·f, h], gate above up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from megatron_xielu.checkpoints.source import Refused
from megatron_xielu.convert.architecture import Architecture

_LAYERS = "decoder.layers."
ALPHAS = ("alpha_p", "alpha_n")
# transformers' XIELUActivation computes expm1(min(x, eps)); Apertus is released with this value.
XIELU_EPS = -1e-6


@dataclass(frozen=True)
class Part:
    """One tensor of Megatron and what Hugging Face has in its place.

    Attributes:
        megatron: its key; in a layer, what follows ``decoder.layers.`` and the layer's number.
        other: another key it may have (Transformer Engine and local layers name norms differently).
        shape: of Megatron's tensor.
        names: Hugging Face's names.
        shapes: and shapes.
        split: Megatron's tensor → Hugging Face's, in the order of ``names``.
        join: the way back.
        layer: its layer; None outside.
        fp32: it stays fp32 in a 16-bit model.
    """

    megatron: str
    other: str | None
    shape: tuple[int, ...]
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    split: Callable[[Tensor], list[Tensor]]
    join: Callable[[list[Tensor]], Tensor]
    layer: int | None = None
    fp32: bool = False

    def key(self, keys: set[str]) -> tuple[str, int | None]:
        """(key, entry of a stacked tensor) of this part in a checkpoint with ``keys``.

        Raises:
            KeyError: it has none; the message is the key that Megatron 0.19 gives it.
        """
        for name in (self.megatron, self.other):
            if name is None:
                continue
            if self.layer is None:
                if name in keys:
                    return name, None
            elif _LAYERS + name in keys:
                return _LAYERS + name, self.layer
            elif f"{_LAYERS}{self.layer}.{name}" in keys:
                return f"{_LAYERS}{self.layer}.{name}", None
        raise KeyError(self.megatron if self.layer is None else _LAYERS + self.megatron)


def parts(architecture: Architecture) -> Iterator[Part]:
    """Every tensor of a model, in the order of the forward pass."""
    a = architecture
    yield _same(
        "embedding.word_embeddings.weight", "model.embed_tokens.weight", (a.vocabulary, a.hidden)
    )
    for layer in range(a.layers):
        yield from _layer(a, layer)
    yield _same("decoder.final_layernorm.weight", "model.norm.weight", (a.hidden,))
    if not a.tied:
        yield _same("output_layer.weight", "lm_head.weight", (a.vocabulary, a.hidden))


def _layer(a: Architecture, layer: int) -> Iterator[Part]:
    prefix = f"model.layers.{layer}."
    apertus = a.family == "apertus"
    same = partial(_same, layer=layer)
    query, key = a.heads * a.head_dim, a.groups * a.head_dim
    yield same(
        "self_attention.linear_qkv.layer_norm_weight",
        prefix + ("attention_layernorm" if apertus else "input_layernorm") + ".weight",
        (a.hidden,),
        other="input_layernorm.weight",
    )
    yield Part(
        "self_attention.linear_qkv.weight",
        None,
        (query + 2 * key, a.hidden),
        tuple(f"{prefix}self_attn.{name}_proj.weight" for name in "qkv"),
        ((query, a.hidden), (key, a.hidden), (key, a.hidden)),
        partial(_split_qkv, a),
        partial(_join_qkv, a),
        layer,
    )
    if a.qk_layernorm:
        for name in "qk":
            yield same(
                f"self_attention.{name}_layernorm.weight",
                f"{prefix}self_attn.{name}_norm.weight",
                (a.head_dim,),
            )
    yield same(
        "self_attention.linear_proj.weight",
        prefix + "self_attn.o_proj.weight",
        (a.hidden, query),
    )
    yield same(
        "mlp.linear_fc1.layer_norm_weight",
        prefix + ("feedforward_layernorm" if apertus else "post_attention_layernorm") + ".weight",
        (a.hidden,),
        other="pre_mlp_layernorm.weight",
    )
    if a.activation == "swiglu":
        yield Part(
            "mlp.linear_fc1.weight",
            None,
            (2 * a.ffn, a.hidden),
            tuple(f"{prefix}mlp.{name}_proj.weight" for name in ("gate", "up")),
            ((a.ffn, a.hidden),) * 2,
            lambda fc1: list(fc1.chunk(2)),
            torch.cat,
            layer,
        )
    else:
        yield same("mlp.linear_fc1.weight", prefix + "mlp.up_proj.weight", (a.ffn, a.hidden))
    if a.trainable:
        for name in ALPHAS:
            yield same(f"mlp.activation_func.{name}", f"{prefix}mlp.act_fn.{name}", (1,), fp32=True)
    yield same("mlp.linear_fc2.weight", prefix + "mlp.down_proj.weight", (a.hidden, a.ffn))


def check_finite(name: str, tensor: Tensor) -> None:
    """Refuse a tensor with NaN or infinite numbers, in the dtype in which it is to be written.

    Raises:
        Refused: it has some; names it.
    """
    if not all(map(torch.isfinite, torch.aminmax(tensor))):  # a NaN is both least and most
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise Refused(
            f"{name} has numbers that are not finite in {dtype}: take an earlier checkpoint if "
            "the training diverged, or another --dtype"
        )


def constants(architecture: Architecture) -> dict[str, Tensor]:
    """Buffers that transformers' xIELU reads from a file and Megatron has as settings."""
    if architecture.activation != "xielu":
        return {}
    return {
        f"model.layers.{layer}.mlp.act_fn.{name}": torch.tensor(value, dtype=torch.float32)
        for layer in range(architecture.layers)
        for name, value in (("beta", architecture.beta), ("eps", XIELU_EPS))
    }


def _same(
    megatron: str,
    name: str,
    shape: tuple[int, ...],
    *,
    other: str | None = None,
    layer: int | None = None,
    fp32: bool = False,
) -> Part:
    return Part(
        megatron, other, shape, (name,), (shape,), lambda x: [x], lambda xs: xs[0], layer, fp32
    )


def _split_qkv(a: Architecture, qkv: Tensor) -> list[Tensor]:
    grouped = qkv.view(a.groups, a.heads // a.groups + 2, a.head_dim, a.hidden)  # [g, q + 2, d, h]
    return [x.reshape(-1, a.hidden) for x in (grouped[:, :-2], grouped[:, -2], grouped[:, -1])]


def _join_qkv(a: Architecture, qkv: list[Tensor]) -> Tensor:
    grouped = [x.view(a.groups, -1, a.head_dim, a.hidden) for x in qkv]
    return torch.cat(grouped, dim=1).view(-1, a.hidden)
