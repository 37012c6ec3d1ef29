"""A model as both sides can express it; needs neither Megatron nor transformers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_xielu.catalog import TRAINABLE

# What Megatron's --use-rope-scaling is, besides its factor; Hugging Face's "llama3".
LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@dataclass(frozen=True)
class Architecture:
    """A decoder with RMSNorm and RoPE and without biases.

    Attributes:
        layers, hidden, ffn, heads, groups, head_dim: sizes; ``groups`` counts key-value heads.
        vocabulary: rows of the embedding, padding included.
        positions: longest sequence.
        norm_epsilon, rope_theta: of RMSNorm and RoPE.
        rope_factor: of the llama3 scaling of RoPE (`LLAMA3_ROPE`); None without.
        tied: one matrix is embedding and output layer.
        qk_layernorm: RMSNorm of each head's query and key.
        activation: ``xielu``, ``xiprelu``, ``relu2``, ``gelu`` or ``swiglu``, the one with a gate.
        beta: of xielu and xiprelu.
        init_std: of initial weights.
    """

    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    head_dim: int
    vocabulary: int
    positions: int
    norm_epsilon: float
    rope_theta: float
    rope_factor: float | None
    tied: bool
    qk_layernorm: bool
    activation: str
    beta: float
    init_std: float

    @property
    def trainable(self) -> bool:
        """Whether each MLP has alphas."""
        return self.activation in TRAINABLE

    @property
    def family(self) -> str:
        """The model type of transformers with this shape."""
        if self.activation == "swiglu":
            return "llama"
        return "apertus" if self.qk_layernorm else "arcee"


def describe(architecture: Architecture) -> str:
    """One line for people."""
    a = architecture
    parts: list[Any] = [
        f"{a.layers} layers, hidden {a.hidden}, ffn {a.ffn}, {a.heads} heads",
        f"{a.groups} groups" if a.groups != a.heads else "",
        f"vocabulary {a.vocabulary}",
        a.activation,
        "QK-norm" if a.qk_layernorm else "",
        "tied embeddings" if a.tied else "",
    ]
    return ", ".join(part for part in parts if part)
