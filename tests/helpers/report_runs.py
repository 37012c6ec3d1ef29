"""Run folders made by hand for the tests of the report: event files as Megatron writes them."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

ARGUMENTS: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 32,
    "ffn_hidden_size": 96,
    "num_attention_heads": 4,
    "kv_channels": 8,
    "seq_length": 32,
    "max_position_embeddings": 32,
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "add_bias_linear": False,
    "untie_embeddings_and_output_weights": True,
    "padded_vocab_size": 128,
    "tensor_model_parallel_size": 2,
    "global_batch_size": 8,
    "train_iters": 400,
    "xielu": True,
    "xielu_beta": 0.5,
    "xielu_alpha_p_init": 0.8,
    "xielu_alpha_n_init": 0.8,
    "spec": None,
}


def alphas(iteration: int, layer: int) -> tuple[float, float]:
    """Effective (αp, αn) of a run made here."""
    return 0.8 + iteration * (1 - 0.4 * layer) / 400, 0.8 + 0.2 * iteration / (layer + 1) / 400


def write_events(
    folder: Path,
    iterations: Iterable[int],
    *,
    layers: int = 4,
    shift: float = 0.0,
    arguments: dict[str, Any] | None = None,
    validate_every: int = 50,
) -> None:
    """One attempt of a training, as an event file.

    Args:
        folder: of event files.
        iterations: rising.
        layers: with alphas; 0 for a run without.
        shift: of the loss, to tell attempts apart.
        arguments: written as texts; `ARGUMENTS` by default, nothing if empty.
        validate_every: iterations between validations.
    """
    writer = SummaryWriter(str(folder))
    for name, value in (ARGUMENTS if arguments is None else arguments).items():
        writer.add_text(name, str(value), global_step=0)
    for iteration in iterations:
        samples, loss = iteration * 8, 2 + 3 * math.exp(-iteration / 60) + shift
        noisy = loss + 0.05 * math.sin(iteration * 12.9898)
        for tag, value in (("lm loss", noisy), ("grad-norm", 1.0 + noisy % 0.1)):
            writer.add_scalar(tag, value, iteration)
            writer.add_scalar(f"{tag} vs samples", value, samples)
        if layers:
            values = {}
            for layer in range(layers):
                row = f"layer_{layer:02d}"
                values[f"alpha_p/{row}"], values[f"alpha_n/{row}"] = alphas(iteration, layer)
                values[f"alpha_grad_norm/{row}"] = 1e-3 / (iteration + layer)
            summary = Summary(
                value=[Summary.Value(tag=t, simple_value=v) for t, v in values.items()]
            )
            writer._get_file_writer().add_summary(summary, iteration)
        if iteration % validate_every == 0:
            writer.add_scalar("lm loss validation", loss + 0.1, iteration)
            writer.add_scalar("lm loss validation vs samples", loss + 0.1, samples)
    writer.close()


def write_checkpoint(
    checkpoints: Path, iteration: int, tensors: dict[str, torch.Tensor], **arguments: Any
) -> None:
    """A ``torch_dist`` checkpoint of these tensors, and the tracker."""
    folder = checkpoints / f"iter_{iteration:07d}"
    dcp.save(tensors, checkpoint_id=folder, no_dist=True)
    torch.save({"args": Namespace(**ARGUMENTS | arguments)}, folder / "common.pt")
    (checkpoints / "latest_checkpointed_iteration.txt").write_text(str(iteration))


def statistics(layers: int = 4) -> list[dict[str, Any]]:
    """``layers`` of an evaluation.json: normal pre-activations, further below 0 with depth."""
    edges = torch.linspace(-6, 6, 121, dtype=torch.float64)
    entries = []
    for layer in range(layers):
        mean = -0.2 * (layer + 1)
        below = 0.5 * (1 + torch.erf((edges - mean) / math.sqrt(2)))
        entries.append(
            {
                "layer": layer,
                "negative_share": 0.5 * (1 + math.erf(-mean / math.sqrt(2))),
                "mean": mean,
                "std": 1.0,
                "histogram": {"edges": edges.tolist(), "counts": (below.diff() * 1e6).tolist()},
            }
        )
    return entries
