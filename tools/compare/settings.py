"""Sizes and lengths of a comparison, its presets, and the Megatron flags that say so.

Proportions and schedule follow the paper's runs (ungated ffn 6 × hidden, gated 2/3 of that, tied
embeddings, warm-up, constant, 1-sqrt decay to 0). `QUICK` and `TINY` are as small as they can be.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from compare.text import Text
from compare.variants import Variant
from megatron_xielu.catalog import INPUTS_FLAG

# Behind an RMSNorm a pre-activation starts with the standard deviation std × √hidden: 0.98 in the
# paper's 1.1B, 1536 wide with weights of 0.025.
PAPER_INPUT_STD = 0.025 * math.sqrt(1536)

_CHECK_TP_SYNC_EVERY = 50


@dataclass(frozen=True)
class Settings:
    """The same for every activation and seed."""

    layers: int
    hidden: int
    heads: int
    ffn: int  # ungated; a multiple of 3, so that the gated one has as many parameters
    sequence: int
    batch: int
    micro_batch: int
    iterations: int
    warmup: int
    decay: int
    learning_rate: float
    save_every: int
    validate_every: int  # no divisor of `iterations`: after the last, Megatron validates anyway
    validation_batches: int
    tokenizer: str  # "bytes", or "bpe" trained on the text
    tensor_parallel: int  # ranks at most: on a CPU always, on GPUs as many as there are
    bf16: bool = False

    @property
    def tokens_per_iteration(self) -> int:
        """Tokens in one global batch."""
        return self.batch * self.sequence

    @property
    def init_std(self) -> float:
        """Of the initial weights, so that activations get inputs as large as the paper's.

        With 0.025 a narrow model starts where xIELU and GELU are nearly linear (0.28 at 128), and
        compares something else. Logits start at the same scale, since the embedding is tied and has
        this std, too.
        """
        return round(PAPER_INPUT_STD / math.sqrt(self.hidden), 4)

    def ffn_of(self, variant: Variant) -> int:
        """Width of the MLP: a gated one has three matrices in place of two."""
        return self.ffn * 2 // 3 if variant.activation.gated else self.ffn


# Exercises everything in a minute or two; its losses mean nothing at all.
QUICK = Settings(
    layers=2,
    hidden=48,
    heads=4,
    ffn=288,
    sequence=64,
    batch=8,
    micro_batch=8,
    iterations=30,
    warmup=4,
    decay=6,
    learning_rate=2e-3,
    save_every=10,
    validate_every=16,
    validation_batches=2,
    tokenizer="bytes",
    tensor_parallel=2,
)

# Losses fall visibly, in about a minute a run on two CPU cores.
TINY = Settings(
    layers=4,
    hidden=128,
    heads=4,
    ffn=768,
    sequence=128,
    batch=16,
    micro_batch=16,
    iterations=240,
    warmup=20,
    decay=48,
    learning_rate=2e-3,
    save_every=24,
    validate_every=70,
    validation_batches=8,
    tokenizer="bytes",
    tensor_parallel=2,
)

# For a night on a CPU: 3.6M parameters, and 7.4M bytes are almost one pass over the library.
OVERNIGHT = Settings(
    layers=6,
    hidden=192,
    heads=6,
    ffn=1152,
    sequence=256,
    batch=32,
    micro_batch=16,
    iterations=900,
    warmup=60,
    decay=180,
    learning_rate=2e-3,
    save_every=50,
    validate_every=200,
    validation_batches=9,
    tokenizer="bytes",
    tensor_parallel=2,
)

# 50M parameters on one GPU; 21M tokens are no more than one pass over the text.
SMALL = Settings(
    layers=10,
    hidden=512,
    heads=8,
    ffn=3072,
    sequence=1024,
    batch=64,
    micro_batch=16,
    iterations=320,
    warmup=30,
    decay=64,
    learning_rate=1e-3,
    save_every=80,
    validate_every=90,
    validation_batches=4,
    tokenizer="bpe",
    tensor_parallel=1,
    bf16=True,
)

# For a GPU that is rented by the minute: `small`, a third as long.
MINUTES = replace(SMALL, iterations=110, warmup=10, decay=22, save_every=55, validate_every=40)

PRESETS = {
    "quick": QUICK,
    "tiny": TINY,
    "overnight": OVERNIGHT,
    "small": SMALL,
    "minutes": MINUTES,
}


def megatron_flags(
    settings: Settings,
    variant: Variant,
    *,
    seed: int,
    ffn: int,
    tensor_parallel: int,
    text: Text,
    folder: Path,
) -> list[str]:
    """Command-line flags of one training.

    Args:
        settings: sizes and lengths.
        variant: what to train with.
        seed: of the initial weights and of the order of the data.
        ffn: width of the MLP.
        tensor_parallel: ranks; must divide the heads and the padded vocabulary.
        text: what to train on.
        folder: where this training keeps its checkpoints and event files.
    """
    values = {
        # model: a Llama with an ungated MLP unless the activation is gated
        "num-layers": settings.layers,
        "hidden-size": settings.hidden,
        "num-attention-heads": settings.heads,
        "ffn-hidden-size": ffn,
        "seq-length": settings.sequence,
        "max-position-embeddings": settings.sequence,
        "position-embedding-type": "rope",
        "normalization": "RMSNorm",
        "norm-epsilon": 1e-6,
        "init-method-std": settings.init_std,
        "attention-dropout": 0,
        "hidden-dropout": 0,
        "tensor-model-parallel-size": tensor_parallel,
        # optimizer and schedule
        "micro-batch-size": settings.micro_batch,
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
        "seed": seed,
        # data
        "train-data-path": text.train,
        "valid-data-path": text.valid,
        "data-cache-path": text.cache,
        "tokenizer-type": "NullTokenizer",
        "vocab-size": text.vocab_size,
        "make-vocab-size-divisible-by": text.padded_vocab_size // tensor_parallel,
        # what is written
        "log-interval": 1,
        "eval-interval": settings.validate_every,
        "eval-iters": settings.validation_batches,
        "tensorboard-dir": folder / "events",
        INPUTS_FLAG.removeprefix("--"): settings.iterations,  # and at the first
        "save": folder / "checkpoints",
        "load": folder / "checkpoints",
        "save-interval": settings.save_every,
        "ckpt-format": "torch_dist",
    }
    # Where ranks hold one pair, or frozen ones, there is as much to check.
    if variant.has_alphas and tensor_parallel > 1:
        values["xielu-check-tp-sync"] = _CHECK_TP_SYNC_EVERY
    pairs = [(f"--{name}", str(value)) for name, value in values.items()]
    return [
        *variant.flags,
        "--disable-bias-linear",
        "--log-timers-to-tensorboard",
        "--log-memory-to-tensorboard",
        "--exit-signal-handler",
        *(("--bf16", "--use-distributed-optimizer") if settings.bf16 else ()),
        *(word for pair in pairs for word in pair),
    ]
