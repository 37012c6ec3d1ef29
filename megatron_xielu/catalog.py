"""What this package and Megatron call their activations, which one a model has, and the defaults.

Every other file asks here. Standard library only, and of Python 3.9: a plan runs on a login node.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

DEFAULT_ALPHA_INIT = 0.8  # effective, of both sides
DEFAULT_BETA = 0.5

SPEC_MODULE = "megatron_xielu.layer_specs"


@dataclass(frozen=True)
class Activation:
    """An activation that a model can have.

    Attributes:
        label: for people.
        argument: Megatron's or ours, of the flag that asks for it; None for the default.
        gated: fc1 makes two tensors of the ffn width, and one scales the other.
        trainable: each MLP has a pair of alphas: one of ours.
    """

    label: str
    argument: str | None
    gated: bool = False
    trainable: bool = False

    @property
    def flag(self) -> str | None:
        """The flag that asks for it."""
        return None if self.argument is None else flag_of(self.argument)


# By the name that results, reports and variants have. The first one that is asked for counts.
ACTIVATIONS = {
    "xielu": Activation("xIELU", "xielu", trainable=True),
    "xiprelu": Activation("xIPReLU", "xiprelu", trainable=True),
    "swiglu": Activation("SwiGLU", "swiglu", gated=True),
    "relu2": Activation("ReLU²", "squared_relu"),
    # Its gate is x·σ(1.702·x), quick_gelu of megatron/core/activations.py, and not GELU, the gate
    # of GEGLU (arXiv 2002.05202), for which Megatron has no flag.
    "quick_geglu": Activation("QuickGEGLU", "quick_geglu", gated=True),
    "gelu": Activation("GELU", None),
}
TRAINABLE = tuple(name for name, activation in ACTIVATIONS.items() if activation.trainable)


def flag_of(argument: str) -> str:
    """The flag of an argument, as argparse makes the one of the other."""
    return f"--{argument.replace('_', '-')}"


def activations_of(arguments: Any) -> list[str]:
    """Every activation that arguments ask for, by flag or by ``--spec``, ours first.

    Args:
        arguments: of a command line, a checkpoint or an event file; anything may be missing.
    """
    spec = getattr(arguments, "spec", None)
    named = None
    if isinstance(spec, (list, tuple)) and len(spec) > 1 and spec[0] == SPEC_MODULE:
        named = spec[1]
    return [
        name
        for name, activation in ACTIVATIONS.items()
        if (activation.argument and getattr(arguments, activation.argument, False))
        or (activation.trainable and named == f"{name}_layer_spec")
    ]


def activation_of(arguments: Any) -> str:
    """The activation that arguments mean; GELU, Megatron's default, where they ask for none."""
    return (*activations_of(arguments), "gelu")[0]


def alpha_n_floor(name: str, beta: float) -> float:
    """What the effective αn always stays above: αn = floor + softplus(alpha_n).

    β for xIELU, whose slope tends to β − αn for x → −∞ and must stay negative there.
    """
    return beta if name == "xielu" else 0.0
