"""What an evaluation found: as a table, and as ``evaluation.json`` for other programs."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_xielu.checkpoints.folder import run_folder
from megatron_xielu.common import files
from megatron_xielu.common.text import table


@dataclass(frozen=True)
class Layer:
    """Pre-activations of one layer's MLP: what goes into its activation."""

    layer: int  # from 0
    negative_share: float
    mean: float
    std: float
    histogram: dict[str, list]  # "edges" (n + 1) and "counts" (n); the end bins are open


@dataclass(frozen=True)
class Evaluation:
    """Everything that ``evaluation.json`` holds but what follows from it."""

    checkpoint: str
    iteration: int
    activation: str
    loss: float  # nats per token
    tokens: int  # in the loss
    bytes: int | None  # of their text
    why_no_bytes: str
    data: list[str]
    eval_iters: int | None  # None: every token once
    sequence_length: int
    layers: list[Layer] | None

    @property
    def bits_per_byte(self) -> float | None:
        """None where the bytes are not known."""
        return self.loss * self.tokens / math.log(2) / self.bytes if self.bytes else None

    @property
    def perplexity(self) -> float:
        """e to the loss, as large as a float can be."""
        return math.exp(min(self.loss, 700.0))

    def to_json(self) -> dict[str, Any]:
        """As written."""
        content = asdict(self)
        del content["why_no_bytes"]
        if self.layers is None:
            del content["layers"]
        return {
            **content,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
        }


def output_file(asked: Path | None, load: Path) -> Path | None:
    """Where to write: as asked, else ``RUN/evaluation.json`` for RUN/checkpoints, else nowhere.

    Raises:
        ValueError: it cannot be written there.
    """
    run = run_folder(load)
    if asked is None and run == load:
        return None
    path = asked or run.absolute() / "evaluation.json"
    flag = f"--evaluation-output {path}"
    if not path.parent.is_dir():
        raise ValueError(f"{flag}: no folder {path.parent}")
    if path.is_dir():
        raise ValueError(f"{flag} is a folder; name a file in it")
    if files.is_device(path):
        return path
    try:
        files.try_to_write(path)
    except OSError as error:
        raise ValueError(f"{flag} cannot be written: {error.strerror}; name another file") from None
    folder = path.parent.resolve()
    if load.resolve() in (folder, *folder.parents):
        raise ValueError(f"{flag} is among the checkpoints; name another file")
    return path


def report(evaluation: Evaluation, output: Path | None) -> None:
    """Print the table and write the file, whole or not at all. Neither goes with the other.

    Raises:
        OSError: one of them cannot be done.
    """
    where = output or "not written: name a file with --evaluation-output"
    try:
        print(_table(evaluation, str(where)), flush=True)
    finally:
        if output is not None:
            files.write(output, json.dumps(evaluation.to_json(), indent=1) + "\n")


def _table(evaluation: Evaluation, where: str) -> str:
    e = evaluation
    first, more = e.data[0], len(e.data) - 1
    how = (
        "every token once"
        if e.eval_iters is None
        else f"Megatron's validation at iteration {e.iteration}, --eval-iters {e.eval_iters}"
    )
    bits = e.bits_per_byte
    rows = [
        ("checkpoint", f"{e.checkpoint}, iteration {e.iteration}, {e.activation}"),
        ("data", f"{first}{f' and {more} more' if more else ''}"),
        ("tokens", f"{e.tokens:,} ({how}; sequences of {e.sequence_length})"),
        ("loss", f"{e.loss:.6f} nats per token"),
        ("perplexity", f"{e.perplexity:.6g}"),
        (
            "bits per byte",
            f"{bits:.6f} ({e.bytes:,} bytes)" if bits is not None else f"none: {e.why_no_bytes}",
        ),
        ("result", where),
    ]
    text = table(rows, left=(0, 1))
    if e.layers is not None:
        of_layers = [
            (
                str(entry.layer),
                f"{entry.negative_share:.2%}",
                f"{entry.mean:.4f}",
                f"{entry.std:.4f}",
            )
            for entry in e.layers
        ]
        head = ("layer", "negative", "mean", "std")
        text += f"\n\npre-activations of the MLP\n{table([head, *of_layers], left=())}"
    return text
