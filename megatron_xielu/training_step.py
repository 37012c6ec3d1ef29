"""What Megatron's training loop asks of a script: data sets, batches, the forward step, the loss.

Megatron must be ready to be imported (`megatron_xielu.startup`).
"""

from __future__ import annotations

from argparse import Namespace
from functools import partial
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.utils import (
    flatten_batch_for_packed_sequences,
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import get_args, get_timers
from megatron.training.training import update_seqlen_stats_from_cu_seqlens
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

from megatron_xielu.common import data_lists
from megatron_xielu.features.tp_sync import check_tp_sync

# A loss this many times the largest seen so far is reported with --check-for-spiky-loss.
_SPIKY_LOSS_FACTOR = 10


def train_valid_test_datasets(num_samples: list[int], vp_stage: int | None = None) -> Any:
    """Build the train, validation and test sets that the data flags describe.

    Args:
        num_samples: how many samples training takes of each.
        vp_stage: virtual pipeline stage.

    Returns:
        One each; None for those of which it takes no sample.
    """
    args = get_args()

    def is_built_here() -> bool:
        return mpu.get_tensor_model_parallel_rank() == 0 and _has_batch(args, vp_stage)

    builder = BlendedMegatronDatasetBuilder(
        MockGPTDataset if args.mock_data else GPTDataset,
        num_samples,
        is_built_here,
        _dataset_config(args),
    )
    try:
        # Megatron has no sampler for the mixture of no samples that --eval-iters 0 asks for.
        return [
            None if samples == 0 else data_set
            for samples, data_set in zip(num_samples, builder.build(), strict=True)
        ]
    except Exception as error:  # Megatron's has no type of its own
        if not isinstance(error.__cause__, OSError):
            raise
        raise SystemExit(
            f"megatron_xielu: error: an index of the data cannot be written: {error.__cause__}; "
            "give --data-cache-path a folder with room that can be written to"
        ) from None


def _has_batch(args: Namespace, vp_stage: int | None) -> bool:
    """Whether this pipeline stage needs anything of a sample: attention, where documents end."""
    return args.dataloader_inter_document_masking or is_first_or_last_pipeline_stage(vp_stage)


def _dataset_config(args: Namespace) -> GPTDatasetConfig:
    tokenizer = build_tokenizer(args)
    if tokenizer.vocab_size > args.padded_vocab_size:
        # A split embedding would take what it has no row for as zeros.
        raise SystemExit(
            f"megatron_xielu: error: --padded-vocab-size {args.padded_vocab_size} is less than the "
            f"tokenizer's {tokenizer.vocab_size} entries; raise it or leave it out"
        )
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    return GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=tokenizer,
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        object_storage_cache_path=args.object_storage_cache_path,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        fast_cache_load=args.dataloader_fast_cache_load,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        sequences_per_dataset=data_lists.sequences_per_dataset(args.per_dataset_sequences_path),
        context_parallel_size=args.context_parallel_size,
        data_parallel_size=args.data_parallel_size,
        sequence_parallel_size=args.tensor_model_parallel_size if args.sequence_parallel else 0,
        inter_document_masking=args.dataloader_inter_document_masking,
    )


def get_batch(data_iterator: Any, vp_stage: int | None) -> dict[str, Any]:
    """The next micro-batch, as this rank needs it.

    Returns:
        ``tokens``, ``labels``, ``loss_mask``, ``position_ids`` of shape [micro-batch, sequence /
        context-parallel size] and ``attention_mask``; None where this pipeline stage needs none.
        With ``--dataloader-inter-document-masking`` of shape [1, micro-batch · sequence], and
        ``cu_seqlens`` [1, documents + 1] and ``max_seqlen`` [1]: where its documents begin and end,
        and the tokens of the longest.
    """
    args = get_args()
    keys = ["tokens", "labels", "loss_mask", "position_ids", "attention_mask"]
    keys += ["cu_seqlens", "max_seqlen"]
    if not _has_batch(args, vp_stage):
        return dict.fromkeys(keys)
    tp_rank = mpu.get_tensor_model_parallel_rank()
    batch: dict[str, Any] = {}
    if tp_rank == 0:
        sample = next(data_iterator)
        for key in keys:
            tensor = sample.get(key)
            batch[key] = None if tensor is None else tensor.cuda(non_blocking=True)
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=args.dataloader_inter_document_masking,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=bool(args.mtp_num_layers) and mpu.is_pipeline_last_stage(),
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    batch = flatten_batch_for_packed_sequences(batch)
    batch = get_batch_on_this_cp_rank(
        batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group()
    )
    return {key: batch[key] for key in keys}


def loss_func(loss_mask: torch.Tensor, token_losses: torch.Tensor) -> tuple:
    """Sum of the unmasked token losses, with what Megatron needs to average it over ranks.

    Args:
        loss_mask: [micro-batch, sequence], 1 where a token counts.
        token_losses: the same shape, the model's output.

    Returns:
        The summed loss, the number of tokens in it (int), and the pair for logging.
    """
    args = get_args()
    mask = loss_mask.view(-1).float()
    loss = torch.sum(token_losses.view(-1).float() * mask)
    num_tokens = mask.sum().detach().to(torch.int)

    machine = get_rerun_state_machine()
    if args.check_for_nan_in_loss_and_grad:
        for rejected, what in ((torch.isnan, "NaN"), (torch.isinf, "Inf")):
            machine.validate_result(
                result=loss,
                rejection_func=rejected,
                message=f"{what} in the local loss",
                tolerance=0.0,
                fatal=True,
            )
    if args.check_for_spiky_loss:
        machine.validate_result(
            result=loss,
            rejection_func=partial(
                machine.is_unexpectedly_large, threshold=_SPIKY_LOSS_FACTOR, context="loss"
            ),
            message="spiky loss",
            tolerance=0.0,
            fatal=False,
        )
    report = torch.cat([loss.detach().view(1), num_tokens.view(1)])
    return loss, num_tokens, {"lm loss": report}


_checked_iterations: dict[int, int] = {}  # virtual pipeline stage -> last iteration checked


def _check_tp_sync(model: torch.nn.Module, vp_stage: int | None) -> None:
    """Run the alpha check in the first micro-batch of every N-th iteration."""
    args = get_args()
    every = args.xielu_check_tp_sync
    iteration = getattr(args, "curr_iteration", 0)
    if every and iteration % every == 0 and _checked_iterations.get(vp_stage or 0) != iteration:
        check_tp_sync(model, iteration)
        _checked_iterations[vp_stage or 0] = iteration


def _documents(batch: dict[str, Any]) -> PackedSeqParams | None:
    """The documents of a micro-batch, as attention and rotary positions take them; None for one
    of samples that are attended to as a whole."""
    if batch["cu_seqlens"] is None:
        return None
    ends, longest = batch["cu_seqlens"].squeeze(0), int(batch["max_seqlen"].item())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        tokens_per_sample=get_args().seq_length,
    )


def forward_step(data_iterator: Any, model: torch.nn.Module) -> tuple:
    """Run the model on the next micro-batch.

    Returns:
        The model's output and the function that turns it into a loss.
    """
    vp_stage = get_attr_wrapped_model(model, "vp_stage")
    _check_tp_sync(model, vp_stage)
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    batch = get_batch(data_iterator, vp_stage)
    documents = _documents(batch)
    # Megatron counts FLOPs with it, from one training step to the next, once for each rank.
    if documents is not None and model.training and not vp_stage:
        update_seqlen_stats_from_cu_seqlens(documents.cu_seqlens_q)
    timers("batch-generator").stop()
    output = model(
        batch["tokens"],
        batch["position_ids"],
        batch["attention_mask"],
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
        packed_seq_params=documents,
    )
    return output, partial(loss_func, batch["loss_mask"])
