"""What can be compared: five activations, and xIELU and xIPReLU with one thing changed.

    xielu   xiprelu   relu2   swiglu   gelu
    xielu-frozen            alphas stay where they start
    xielu-shared            one pair for all layers
    xielu-init-0.4          αp starts at 0.4 (0.8 is the default), αn as ever
    xielu-init-0.4-1.2      αp starts at 0.4, αn at 1.2
    xielu-beta-0.3          β is 0.3 (0.5 is the default)
    xielu-lr-10             the alphas' learning rate is 10 times the model's
    xielu-decay-0.1         raw alphas have a weight decay of 0.1 (none is the default)
    xielu-recompute         computed twice, to keep one tensor of the MLP's width less: the same
                            losses with less memory

and the same with xiprelu.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_xielu import catalog
from megatron_xielu.catalog import DEFAULT_ALPHA_INIT, DEFAULT_BETA, Activation
from megatron_xielu.common.flags import argument_of

ACTIVATIONS = {
    name: catalog.ACTIVATIONS[name] for name in ("xielu", "xiprelu", "relu2", "swiglu", "gelu")
}
# Of Megatron's default: its fused form wants the linear biases that these models do not have.
_GELU_FLAG = "--no-bias-gelu-fusion"

# Ablations without a number: what they are called, and the flag.
_SWITCHES = {
    "frozen": ("alphas frozen", "--xielu-frozen-alphas"),
    "shared": ("one pair for all layers", "--xielu-shared-alphas"),
    "recompute": ("output recomputed", "--xielu-recompute-output"),
}
# Those with one: what they are called, and the flag.
_NUMBERED = {
    "beta": ("β", "--xielu-beta"),
    "lr": ("learning rate of alphas ×", "--xielu-alpha-lr-mult"),
    "decay": ("weight decay of alphas", "--xielu-alpha-weight-decay"),
}
# By argument: what a change of it is in a name, and in a label.
_CHANGES = {
    **{
        argument_of(flag): (word, said)
        for word, (said, flag) in [*_SWITCHES.items(), *_NUMBERED.items()]
    },
    "xielu_alpha_p_init": ("init-p", "αp from"),
    "xielu_alpha_n_init": ("init-n", "αn from"),
}
_DEFAULTS = {**catalog.SETTINGS, **catalog.ALPHA_GROUP}
_LONGEST = 40  # characters of a value, in a name and a label
_LIMITS = catalog.NUMBERS["--xielu-beta"]  # and of the initial alphas; within those of the others


@dataclass(frozen=True)
class Variant:
    """An activation as it is trained: ``flags`` choose it, ``init`` is where αp and αn start; β.

    The first flag is of the activation, the others of the ablation.
    """

    name: str
    label: str
    activation: Activation
    flags: tuple[str, ...]
    init: tuple[float, float] = (DEFAULT_ALPHA_INIT, DEFAULT_ALPHA_INIT)
    beta: float = DEFAULT_BETA

    @property
    def has_alphas(self) -> bool:
        """Whether there are alphas to show."""
        return self.activation.trainable


def parse(name: str) -> Variant:
    """The variant of a name as above.

    Raises:
        ValueError: there is none; the message says what there is.
    """
    key, dash, change = name.partition("-")
    activation = ACTIVATIONS.get(key)
    if activation is None:
        raise ValueError(f"{name!r}: no such activation; there are {', '.join(ACTIVATIONS)}")
    label = activation.label
    flags: tuple[str, ...] = (activation.flag or _GELU_FLAG,)
    if not dash:
        return Variant(name, label, activation, flags)
    what, *values = change.split("-")
    if activation.trainable:
        if what in _SWITCHES and not values:
            said, flag = _SWITCHES[what]
            return Variant(name, f"{label}, {said}", activation, (*flags, flag))
        numbers = _numbers(values)
        if what in _NUMBERED and len(numbers) == 1:
            said, flag = _NUMBERED[what]
            beta = numbers[0] if what == "beta" else DEFAULT_BETA
            label, flags = f"{label}, {said} {values[0]}", (*flags, flag, *values)
            return Variant(name, label, activation, flags, beta=beta)
        if what == "init" and len(numbers) in (1, 2):
            return _with_inits(name, activation, flags, numbers)
    raise ValueError(
        f"{name!r} is not a variant; of xielu and xiprelu there are -frozen, -shared, "
        "-recompute, -init-P, -init-P-N, -beta-B, -lr-M and -decay-W with numbers above 0, at most "
        f"{_LIMITS.most}, for P, N, B, M and W: xielu-init-0.4"
    )


def is_change(argument: str, value: str) -> bool:
    """Whether a run's saved argument is one of ours, and not at its default."""
    if argument in _DEFAULTS:
        return value != str(_DEFAULTS[argument])
    return argument.startswith("xielu_") and value == "True"


def told(argument: str, value: str) -> tuple[str, str]:
    """A saved argument of a run as its variant's name has it (``lr-10``), and as the label."""
    plain = re.sub(r"[^\w.+-]+", "_", value)[:_LONGEST].removesuffix(".0")
    if value.startswith("["):
        plain = "values by layer"
    elif value == "True":
        plain = ""
    said = argument.removeprefix("xielu_").replace("_", " ")
    word, label = _CHANGES.get(argument, (said, said))
    return f"{word} {plain}".strip().replace(" ", "-"), f"{label} {plain}".strip()


def _with_inits(
    name: str, activation: Activation, flags: tuple[str, ...], numbers: list[float]
) -> Variant:
    positive, negative = (*numbers, DEFAULT_ALPHA_INIT)[:2]
    if activation is ACTIVATIONS["xielu"] and negative <= DEFAULT_BETA:
        raise ValueError(f"{name!r}: αn of xIELU starts above β = {DEFAULT_BETA}")
    label = f"{activation.label}, αp from {positive:g}"
    flags = (*flags, "--xielu-alpha-p-init", f"{positive:g}")
    if len(numbers) == 2:
        label += f", αn from {negative:g}"
        flags = (*flags, "--xielu-alpha-n-init", f"{negative:g}")
    return Variant(name, label, activation, flags, (positive, negative))


def _numbers(values: list[str]) -> list[float]:
    """All that the flags take; none where one is not."""
    try:
        numbers = [float(value) for value in values]
    except ValueError:
        return []
    return [] if any(map(_LIMITS.fault, numbers)) else numbers
