"""The MFU that a plan counts on: what others have published for models of its size.

A published figure is turned into the FLOPs that `Model.flops_per_token` counts, by the shape of the
published model: Megatron of early 2025, which Swiss AI's runs print, counts attention without the
causal half, and Hugging Face and torchtitan give tokens a second. test_throughput.py does the
arithmetic again.

The size of a model is the weights that a token is multiplied with: its matrices, with the output
layer, and of the experts those it is sent to. Between two published sizes the MFU is interpolated
in the logarithm of the size; beyond them it is that of the nearest, and said to be so. A published
model is named after the software that trained it.

What this leaves out: Swiss AI's and torchtitan's runs have no tensor or pipeline parallelism, and
the others' batches, networks and flags are their own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_xielu.plan.gpus import BY_NAME, Gpu


@dataclass(frozen=True)
class Published:
    """One measurement of others. ``weights``: its size, 1e9. ``tflops``: a GPU, as we count."""

    gpu: str
    who: str
    weights: float
    tflops: float

    @property
    def mfu(self) -> float:
        """Its share of the GPU's peak."""
        return self.tflops / BY_NAME[self.gpu].peak_tflops


# By GPU and size. Swiss AI: pull requests 23, 8, 10 and 29 of swiss-ai/Megatron-LM (140; 450; 493
# and 505; 413 and 430 TFLOP/s as printed, with Transformer Engine and TP 1). Hugging Face: the Smol
# Training Playbook (42,000 tokens/s, nanotron), and its SmolLM3 (14,000, which
# tzafon.ai/blog/breaking-40k-tokens quotes; nanotron, too). torchtitan: its own
# benchmarks/llama3_h100_202412_torchtitan.md, table 3 (6,514 tokens/s on 128 GPUs, compiled).
PUBLISHED = (
    Published("gh200", "Megatron's 300M", 0.558, 129),
    Published("gh200", "Megatron's 1B", 1.242, 410),
    Published("gh200", "Megatron's 3B", 3.222, 454),
    Published("gh200", "Megatron's 8B", 7.516, 375),
    Published("h100", "nanotron's 1B", 1.236, 345),
    Published("h100", "nanotron's 3B", 3.075, 284),
    Published("h100", "torchtitan's 8B", 7.504, 335),
)


@dataclass(frozen=True)
class Mfu:
    """A share of a GPU's peak, and where it is from."""

    value: float
    source: str


def expected(gpu: Gpu, weights: float) -> Mfu:
    """The MFU of a model of this size on this GPU, by what is published.

    Args:
        gpu: of one without a published run the H100's are taken.
        weights: that a token is multiplied with.
    """
    own = [row for row in PUBLISHED if row.gpu == gpu.name]
    rows = own or [row for row in PUBLISHED if row.gpu == "h100"]
    where = f"published on {BY_NAME[rows[0].gpu].title}" + ("" if own else f", not {gpu.title}")
    size = weights / 1e9
    below = [row for row in rows if row.weights <= size]
    above = [row for row in rows if row.weights > size]
    if below and above:
        low, high = below[-1], above[0]
        share = math.log(size / low.weights) / math.log(high.weights / low.weights)
        value = low.mfu + share * (high.mfu - low.mfu)
        return Mfu(value, f"{where}: between {low.who} and {high.who}")
    end, side = (above[0], "smaller") if above else (below[-1], "larger")
    return Mfu(end.mfu, f"{where}: {end.who}; this model is {side}")
