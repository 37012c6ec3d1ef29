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
from megatron_xielu.common.flags import flag_of

ACTIVATIONS = {
    name: catalog.ACTIVATIONS[name] for name in ("xielu", "xiprelu", "relu2", "swiglu", "gelu")
}
# Of Megatron's default: its fused form wants the linear biases that these models do not have.
_GELU_FLAG = "--no-bias-gelu-fusion"

_CHANGES = catalog.ABLATIONS
_ABLATIONS = {word: (said, flag_of(argument)) for argument, (word, said) in _CHANGES.items()}
# Without a number, and with one: what they are called, and the flag.
_SWITCHES = {word: _ABLATIONS[word] for word in ("frozen", "shared", "recompute")}
_NUMBERED = {word: _ABLATIONS[word] for word in ("beta", "lr", "decay")}
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
    if argument in catalog.DEFAULTS:
        return value != str(catalog.DEFAULTS[argument])
    return argument.startswith("xielu_") and value == "True"


def told(argument: str, value: str) -> tuple[str, str]:
    """A saved argument of a run as its variant's name has it, and as the label.

    What is not among the ablations has ``=`` in its name: ``lr-10`` is of alphas, ``lr=0.001`` the
    model's.
    """
    plain = re.sub(r"[^\w.+-]+", "_", value)[:_LONGEST].removesuffix(".0")
    if value.startswith("["):
        plain = "values by layer"
    elif value == "True":
        plain = ""
    said = argument.removeprefix("xielu_").replace("_", " ")
    word, label = _CHANGES.get(argument, (said, said))
    name = f"{word} {plain}" if argument in _CHANGES else f"{word}={plain or value}"
    return name.strip().replace(" ", "-"), f"{label} {plain}".strip()


def _with_inits(
    name: str, activation: Activation, flags: tuple[str, ...], numbers: list[float]
) -> Variant:
    positive, negative = (*numbers, DEFAULT_ALPHA_INIT)[:2]
    if activation is ACTIVATIONS["xielu"] and negative <= DEFAULT_BETA:
        raise ValueError(f"{name!r}: αn of xIELU starts above β = {DEFAULT_BETA}")
    label = activation.label
    for word, number in zip(("init-p", "init-n"), numbers, strict=False):
        said, flag = _ABLATIONS[word]
        label += f", {said} {number:g}"
        flags = (*flags, flag, f"{number:g}")
    return Variant(name, label, activation, flags, (positive, negative))


def _numbers(values: list[str]) -> list[float]:
    """All that the flags take; none where one is not."""
    try:
        numbers = [float(value) for value in values]
    except ValueError:
        return []
    return [] if any(map(_LIMITS.fault, numbers)) else numbers
