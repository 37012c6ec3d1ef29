"""The package's training entry, which compares each micro-batch of documents with each document run
alone: losses of all tokens, and gradients.

Run by `test_documents` in place of ``python -m megatron_xielu.pretrain_gpt``; its command line is
the same, with ``--dataloader-inter-document-masking`` and without pipeline stages. Environment:
``DUMP_FOLDER`` receives ``lengths_<rank>.json``, the lengths of documents of each micro-batch.
"""

import json
import os
from itertools import pairwise
from pathlib import Path

import torch

from megatron_xielu import pretrain_gpt


def main() -> None:
    """Train, and compare at every step."""
    train = pretrain_gpt._train
    seen: list[list[int]] = []

    def observed_train(args) -> None:
        from megatron_xielu import training_step  # which imports Megatron

        step, get_batch = training_step.forward_step, training_step.get_batch

        def compared_step(data_iterator, model):
            batch = get_batch(data_iterator, None)
            training_step.get_batch = lambda *_: batch
            seen.append(compare(step(None, model)[0], batch, model, args))
            return step(None, model)  # again: Megatron follows a loss back only once

        training_step.forward_step = compared_step
        train(args)

    pretrain_gpt._train = observed_train
    pretrain_gpt.main()
    Path(os.environ["DUMP_FOLDER"], f"lengths_{os.environ['RANK']}.json").write_text(
        json.dumps(seen)
    )


def compare(output: torch.Tensor, batch: dict, model, args) -> list[int]:
    """Raises AssertionError at a difference; returns the documents' lengths."""
    from megatron.core import mpu

    ends = batch["cu_seqlens"][0].tolist()
    spans = [slice(begin, end) for begin, end in pairwise(ends)]

    def run(part: slice, shape: tuple[int, int]) -> torch.Tensor:
        tokens, labels, mask = (
            batch[key][:, part].reshape(shape) for key in ("tokens", "labels", "loss_mask")
        )
        positions = torch.arange(shape[1]).expand(shape)
        return model(tokens, positions, None, labels=labels, loss_mask=mask).reshape(1, -1)

    alone = torch.cat([run(span, (1, span.stop - span.start)) for span in spans], dim=1)
    for span in spans:
        assert batch["position_ids"][0, span].tolist() == [*range(span.stop - span.start)]
    torch.testing.assert_close(output, alone, rtol=1e-5, atol=1e-5)
    # The same samples without their documents, which the comparison must tell from them.
    whole = run(slice(None), (args.micro_batch_size, args.seq_length))
    assert (whole - alone).abs().max() > 0.01
    if args.mtp_num_layers:  # its share of the gradients depends on the tokens beside
        return [span.stop - span.start for span in spans]
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    weights = batch["loss_mask"]
    packed, each = (
        torch.autograd.grad((losses * weights).sum(), [p for _, p in named])
        for losses in (output, alone)
    )
    for (name, parameter), ours, expected in zip(named, packed, each, strict=True):
        if getattr(parameter, "sequence_parallel", False):  # each rank's are of its tokens
            for grad in (ours, expected):
                torch.distributed.all_reduce(grad, group=mpu.get_tensor_model_parallel_group())
        size = expected.abs().max().item()
        assert size > 0, name
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5 * size, msg=name)
    return [span.stop - span.start for span in spans]


if __name__ == "__main__":
    main()
