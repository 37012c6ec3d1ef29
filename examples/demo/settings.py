"""What the demo trains: the activations, the sizes, and the Megatron flags that say so.

Every size is as small as it can be while the losses still fall visibly in a minute on two CPU
cores; proportions and schedule follow the paper's runs (ungated ffn 6 × hidden, gated 2/3 of that,
tied embeddings, warm-up, constant, 1-sqrt decay to 0).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from prepare_text import VOCAB_SIZE

# The vocabulary as Megatron pads it: the same for one and for two tensor-parallel ranks.
_PADDED_VOCAB_SIZE = 264

_CHECK_TP_SYNC_EVERY = 50


@dataclass(frozen=True)
class Activation:
    """One of the compared activations.

    ``label`` is what people read; ``flag`` selects it; ``gated`` MLPs have a third matrix;
    ``trainable`` activations have two alphas per layer.
    """

    label: str
    flag: str
    gated: bool = False
    trainable: bool = False


ACTIVATIONS = {
    "xielu": Activation("xIELU", "--xielu", trainable=True),
    "xiprelu": Activation("xIPReLU", "--xiprelu", trainable=True),
    "squared_relu": Activation("ReLU²", "--squared-relu"),
    "swiglu": Activation("SwiGLU", "--swiglu", gated=True),
}


@dataclass(frozen=True)
class Settings:
    """Sizes and lengths of a run; the same for every activation."""

    layers: int
    hidden: int
    heads: int
    ffn: int  # ungated; a multiple of 3, so that the gated one has as many parameters
    sequence: int
    batch: int
    iterations: int
    warmup: int
    decay: int
    learning_rate: float
    save_every: int
    validate_every: int  # no divisor of `iterations`: after the last, Megatron validates anyway
    validation_batches: int
    seed: int = 42

    @property
    def tokens_per_iteration(self) -> int:
        """Tokens in one global batch."""
        return self.batch * self.sequence

    def ffn_of(self, activation: Activation) -> int:
        """Width of the MLP: a gated one has three matrices in place of two."""
        return self.ffn * 2 // 3 if activation.gated else self.ffn

    def parameters_of(self, activation: Activation) -> int:
        """Parameter count, by formula; what is reported is counted in the checkpoint."""
        attention = 4 * self.hidden**2
        mlp = (3 if activation.gated else 2) * self.hidden * self.ffn_of(activation)
        norms, alphas = 2 * self.hidden, 2 * activation.trainable
        layer = attention + mlp + norms + alphas
        return _PADDED_VOCAB_SIZE * self.hidden + self.layers * layer + self.hidden


FULL = Settings(
    layers=4,
    hidden=128,
    heads=4,
    ffn=768,
    sequence=128,
    batch=16,
    iterations=240,
    warmup=20,
    decay=48,
    learning_rate=2e-3,
    save_every=24,
    validate_every=70,
    validation_batches=8,
)

# Exercises everything in a minute or two; its losses mean nothing at all.
QUICK = Settings(
    layers=2,
    hidden=48,
    heads=4,
    ffn=288,
    sequence=64,
    batch=8,
    iterations=30,
    warmup=4,
    decay=6,
    learning_rate=2e-3,
    save_every=10,
    validate_every=16,
    validation_batches=2,
)


def megatron_flags(
    settings: Settings, activation: Activation, *, tensor_parallel: int, text: Path, folder: Path
) -> list[str]:
    """Command-line flags of one training.

    Args:
        settings: sizes and lengths.
        activation: what to train with.
        tensor_parallel: ranks; must divide the heads and the padded vocabulary.
        text: folder that `prepare_text` wrote.
        folder: where this training keeps its checkpoints and event files.
    """
    values = {
        # model: a Llama with an ungated MLP unless the activation is gated
        "num-layers": settings.layers,
        "hidden-size": settings.hidden,
        "num-attention-heads": settings.heads,
        "ffn-hidden-size": settings.ffn_of(activation),
        "seq-length": settings.sequence,
        "max-position-embeddings": settings.sequence,
        "position-embedding-type": "rope",
        "normalization": "RMSNorm",
        "norm-epsilon": 1e-6,
        "init-method-std": 0.025,
        "attention-dropout": 0,
        "hidden-dropout": 0,
        "tensor-model-parallel-size": tensor_parallel,
        # optimizer and schedule
        "micro-batch-size": settings.batch,
        "global-batch-size": settings.batch,
        "train-iters": settings.iterations,
        "lr": settings.learning_rate,
        "min-lr": 0,
        "lr-decay-style": "WSD",
        "lr-wsd-decay-style": "minus_sqrt",
        "lr-warmup-iters": settings.warmup,
        "lr-decay-iters": settings.iterations,
        "lr-wsd-decay-iters": settings.decay,
        "adam-beta1": 0.9,
        "adam-beta2": 0.95,
        "weight-decay": 0.1,
        "clip-grad": 1.0,
        "seed": settings.seed,
        # data
        "train-data-path": text / "train",
        "valid-data-path": text / "valid",
        "data-cache-path": text / "cache",
        "tokenizer-type": "NullTokenizer",
        "vocab-size": VOCAB_SIZE,
        "make-vocab-size-divisible-by": _PADDED_VOCAB_SIZE // tensor_parallel,
        # what is written
        "log-interval": 1,
        "eval-interval": settings.validate_every,
        "eval-iters": settings.validation_batches,
        "tensorboard-dir": folder / "events",
        "save": folder / "checkpoints",
        "load": folder / "checkpoints",
        "save-interval": settings.save_every,
        "ckpt-format": "torch_dist",
    }
    if activation.trainable:
        values["xielu-check-tp-sync"] = _CHECK_TP_SYNC_EVERY
    pairs = [(f"--{name}", str(value)) for name, value in values.items()]
    return [
        activation.flag,
        "--disable-bias-linear",
        "--log-timers-to-tensorboard",
        "--exit-signal-handler",
        *(word for pair in pairs for word in pair),
    ]
