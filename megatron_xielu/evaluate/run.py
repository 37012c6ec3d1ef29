"""Builds the model, loads the checkpoint and lets Megatron's ``evaluate`` run over the samples."""

from __future__ import annotations

import math
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megatron_xielu import catalog, layer_specs, training_step
from megatron_xielu.common import data_lists, prepared_data
from megatron_xielu.evaluate import data, settings, validation
from megatron_xielu.evaluate.result import Evaluation
from megatron_xielu.evaluate.statistics import Statistics


def evaluate(request: Namespace, iteration: int, prefixes: list[Path] | None) -> Evaluation | None:
    """Evaluate on all ranks.

    Args:
        request: this command's flags.
        iteration: of the checkpoint.
        prefixes: of the data; None for the validation of the training.

    Returns:
        What was found, on rank 0.

    Raises:
        ValueError: the checkpoint cannot be evaluated on this data; names the flag.
    """
    from megatron.core.utils import get_model_config
    from megatron.training.initialize import initialize_megatron
    from megatron.training.training import evaluate as megatron_evaluate

    args, saved = settings.complete(request)
    if request.activation_statistics and (args.num_experts or args.context_parallel_size > 1):
        raise ValueError(
            "--activation-statistics does not work with experts or --context-parallel-size; drop it"
        )
    tokens = None
    if prefixes is None:
        validation.check(args, saved)
    else:
        tokens = data.Tokens(
            prefixes, args.seq_length, documents=args.dataloader_inter_document_masking
        )
    initialize_megatron()
    _check_vocabulary(args, tokens)
    _check_data(args, prefixes)
    model = _load(args)
    iterators, rounds = _samples(args, saved, iteration, tokens, chunks=len(model))
    statistics = Statistics(model, args.num_layers) if request.activation_statistics else None
    watch = _Watch(args, tokens, rounds, statistics)
    found, _, _ = megatron_evaluate(
        watch.forward_step,
        iterators if len(model) > 1 else iterators[0],
        model,
        None,
        get_model_config(model[0]),
        eval_iters=rounds,
    )
    watch.bar.close()
    loss, number = watch.totals()
    if tokens is None:
        loss = _from_last_rank(found["lm loss"] if found else None)
    if not math.isfinite(loss):
        raise ValueError(f"the loss of this checkpoint is {loss}")
    text_bytes, why = _text_bytes(prefixes, tokens)
    layers = statistics.gather() if statistics else None
    if args.rank != 0:
        return None
    return Evaluation(
        checkpoint=str(request.load),
        iteration=iteration,
        activation=catalog.activation_of(args),
        loss=loss,
        tokens=number,
        bytes=text_bytes,
        why_no_bytes=why,
        data=[str(prefix) for prefix in prefixes or _described(args)],
        eval_iters=request.eval_iters,
        sequence_length=args.seq_length,
        layers=layers,
    )


def _described(args: Namespace) -> list[str]:
    names = ("data_path", "data_args_path", "per_split_data_args_path", "valid_data_path")
    found = next((getattr(args, name) for name in names if getattr(args, name)), "mock data")
    return found if isinstance(found, list) else [str(found)]


def _check_vocabulary(args: Namespace, tokens: data.Tokens | None) -> None:
    """Refuse tokens that the embedding has no row for; with tensor parallelism they would be 0."""
    from megatron.training import get_tokenizer

    rows = args.padded_vocab_size
    entries = get_tokenizer().vocab_size
    if entries > rows:
        raise ValueError(
            f"the tokenizer {settings.tokenizer_name(args)} has {entries} entries, "
            f"the model's vocabulary only {rows}; name the one of its training by --tokenizer-model"
        )
    if tokens is None:
        return
    least, largest = tokens.least_and_largest(args.rank, args.world_size)
    found = torch.tensor([-least, largest], device="cuda")
    torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
    least, largest = -int(found[0]), int(found[1])
    fix = "it was prepared with another tokenizer, or is damaged"
    if fault := prepared_data.fault_of_tokens("the data", least, largest, rows, fix):
        raise ValueError(fault)


def _check_data(args: Namespace, prefixes: list[Path] | None) -> None:
    """Refuse data of another tokenizer than the model's; say so where it may be another."""
    if prefixes is None:
        faults, doubts = data_lists.look(args, args.padded_vocab_size)
    else:  # all tokens of which have been looked at
        named = {str(prefix): "data" for prefix in prefixes}
        faults, doubts = prepared_data.look(named, args, None)
    if faults:
        raise ValueError(faults[0])
    for doubt in doubts if args.rank == 0 else ():
        print(f"megatron_xielu: warning: {doubt}", file=sys.stderr, flush=True)


def _load(args: Namespace) -> list:
    """The model with the parameters of the checkpoint: chunks of this rank."""
    from megatron.core.enums import ModelType
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.training import setup_model_and_optimizer

    model, _, _ = setup_model_and_optimizer(
        ModelType.encoder_or_decoder,
        cfg_container=pretrain_cfg_container_from_args(args, layer_specs.model_config(args)),
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    return model


def _samples(
    args: Namespace, saved: Namespace, iteration: int, tokens: data.Tokens | None, *, chunks: int
) -> tuple[list, int]:
    """An iterator of micro-batches for each model chunk, and the number of global batches."""
    from megatron.core import mpu
    from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids
    from megatron.training import get_tokenizer

    stages: list[int | None] = list(range(chunks)) if chunks > 1 else [None]
    if tokens is None:
        found = [validation.samples(args, saved, iteration, stage) for stage in stages]
        return found, args.eval_iters

    def masks(text: torch.Tensor) -> tuple:
        attention_mask, _, position_ids = _get_ltor_masks_and_position_ids(
            text,
            get_tokenizer().eod if args.reset_position_ids or args.reset_attention_mask else -1,
            args.reset_position_ids,
            args.reset_attention_mask,
            False,  # every token counts, also that after an end of document
            args.create_attention_mask_in_dataloader,
        )
        return attention_mask, position_ids

    iterators = [
        tokens.micro_batches(
            masks,
            size=args.micro_batch_size,
            dp_rank=mpu.get_data_parallel_rank(),
            dp_size=mpu.get_data_parallel_world_size(),
        )
        for _ in stages
    ]
    return iterators, -(-tokens.sequences // args.eval_global_batch_size)


def _from_last_rank(value: torch.Tensor | None) -> float:
    """What the last pipeline stage knows."""
    shared = torch.zeros(1, device="cuda") if value is None else value.detach().float().view(1)
    torch.distributed.broadcast(shared, src=torch.distributed.get_world_size() - 1)
    return shared.item()


def _text_bytes(prefixes: list[Path] | None, tokens: data.Tokens | None) -> tuple[int | None, str]:
    """The bytes of the text, or why they are not known."""
    from megatron.training import get_args, get_tokenizer

    if prefixes is None or tokens is None:
        return None, "--eval-iters takes samples of the data"
    described = data.described_text_bytes(prefixes)
    if described is not None:
        return described, ""
    args = get_args()
    if args.tokenizer_type.startswith("Null"):
        return None, "no manifest.json of tools/prepare_data.py, and no --tokenizer-type to decode"
    decoded = torch.tensor(
        tokens.decoded_bytes(get_tokenizer(), args.rank, args.world_size), device="cuda"
    )
    torch.distributed.all_reduce(decoded)
    return int(decoded), ""


class _Watch:
    """The entry's forward step, with the sums of the losses and a progress bar.

    Args:
        args: of Megatron.
        tokens: all tokens of the data, or None for samples of Megatron's.
        rounds: global batches.
        statistics: what looks into the model meanwhile, if anything.
    """

    def __init__(
        self,
        args: Namespace,
        tokens: data.Tokens | None,
        rounds: int,
        statistics: Statistics | None,
    ) -> None:
        from megatron.core import mpu

        self._args, self._tokens, self._statistics = args, tokens, statistics
        self._dp_rank = mpu.get_data_parallel_rank()
        self._dp_size = mpu.get_data_parallel_world_size()
        self._micro_batches: Counter = Counter()  # by virtual pipeline stage
        self._sums = torch.zeros(2, dtype=torch.float64, device="cuda")
        self._counts = (
            mpu.is_pipeline_last_stage(ignore_virtual=True)
            and mpu.get_tensor_model_parallel_rank() == 0
        )
        total = rounds * args.eval_global_batch_size * args.seq_length
        self.bar = tqdm(
            total=min(total, len(tokens)) if tokens else total,
            unit=" tokens",
            unit_scale=True,
            desc="evaluate",
            mininterval=1.0,
            disable=args.rank != 0,
        )

    def forward_step(self, data_iterator: Any, model: torch.nn.Module) -> tuple:
        """As `megatron_xielu.training_step.forward_step`."""
        from megatron.core.utils import get_attr_wrapped_model

        stage = get_attr_wrapped_model(model, "vp_stage") or 0
        number = self._micro_batches[stage]
        self._micro_batches[stage] += 1
        if self._statistics is not None:
            self._statistics.mask = self._mask(number)
        output, loss = training_step.forward_step(data_iterator, model)
        if stage == 0:
            done = self._args.micro_batch_size * self._args.seq_length * self._dp_size
            self.bar.update(min(done, self.bar.total - self.bar.n))
        return output, self._counted(loss)

    def _counted(self, loss: Callable[..., tuple]) -> Callable[..., tuple]:
        def counted(*outputs: Any) -> tuple:
            result = loss(*outputs)
            self._sums += result[-1]["lm loss"]
            return result

        return counted

    def _mask(self, number: int) -> torch.Tensor | None:
        """Which tokens of this rank's micro-batch are of the data: [s, b], of documents [s·b, 1];
        None if all."""
        if self._tokens is None:
            return None
        chosen = self._tokens.micro_batch(
            number,
            size=self._args.micro_batch_size,
            dp_rank=self._dp_rank,
            dp_size=self._dp_size,
        )
        valid = torch.tensor([self._tokens.valid_tokens(sequence) for sequence in chosen])
        if bool((valid == self._args.seq_length).all()):
            return None
        mask = torch.arange(self._args.seq_length)[:, None] < valid[None, :]
        if self._args.dataloader_inter_document_masking:  # one sample after the other
            mask = mask.T.reshape(-1, 1)
        return mask

    def totals(self) -> tuple[float, int]:
        """Mean loss in nats per token, and the number of tokens, over all ranks."""
        sums = self._sums if self._counts else torch.zeros_like(self._sums)
        torch.distributed.all_reduce(sums)
        loss, number = sums.tolist()
        return loss / number, int(number)
