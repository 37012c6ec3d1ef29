"""The package's training entry; afterwards it saves the model's logits of fixed tokens.

Run by `launch` in place of ``python -m megatron_xielu.pretrain_gpt``; its command line is
the same. Environment: ``DUMP_FOLDER`` receives ``logits.pt``, [batch, sequence, vocabulary].
"""

import os
from pathlib import Path

import torch

from megatron_xielu import pretrain_gpt

# [batch, sequence]; below the vocabulary of every model of the tests.
TOKENS = torch.randint(0, 120, (2, 32), generator=torch.Generator().manual_seed(0))


def main() -> None:
    """Train, then save logits."""
    chunks: list = []
    train = pretrain_gpt._train

    def train_and_save(args):
        from megatron_xielu import training_step  # which imports Megatron

        step = training_step.forward_step

        def remember(data_iterator, model):
            chunks[:] = [model]
            return step(data_iterator, model)

        training_step.forward_step = remember
        train(args)
        save_logits(chunks, Path(os.environ["DUMP_FOLDER"]))

    pretrain_gpt._train = train_and_save
    pretrain_gpt.main()


def save_logits(chunks: list, folder: Path) -> None:
    """One forward pass through the pipeline; the last stage has the logits, split over TP ranks."""
    from megatron.core import mpu
    from megatron.core.pipeline_parallel import get_forward_backward_func

    batch, sequence = TOKENS.shape
    positions = torch.arange(sequence).expand(batch, -1)
    mask = torch.ones(1, 1, sequence, sequence, dtype=torch.bool).triu(1)

    def forward(data_iterator, model):
        logits = model(TOKENS, positions, mask)
        return logits, lambda output, non_loss_data: output

    for chunk in chunks:
        chunk.eval()
    with torch.no_grad():
        results = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=None,
            model=chunks,
            num_microbatches=1,
            seq_length=sequence,
            micro_batch_size=batch,
            forward_only=True,
            collect_non_loss_data=True,
        )
    if mpu.is_pipeline_last_stage():
        parts = [
            torch.empty_like(results[0]) for _ in range(mpu.get_tensor_model_parallel_world_size())
        ]
        torch.distributed.all_gather(
            parts, results[0].contiguous(), group=mpu.get_tensor_model_parallel_group()
        )
        if mpu.get_tensor_model_parallel_rank() == 0:
            torch.save(torch.cat(parts, dim=-1), folder / "logits.pt")


if __name__ == "__main__":
    main()
