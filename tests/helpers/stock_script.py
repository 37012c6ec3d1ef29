"""A Megatron training script that knows nothing of this package, in the shape of Megatron-LM's own.

`--spec megatron_xielu.layer_specs xielu_layer_spec --use-te-activation-func` must be all it takes,
or a patched Megatron and `--xielu`. Runs on every release from 0.17 on: what a script has to do
itself differs, as it does between the releases' own pretrain_gpt.py.

It says which Megatron it runs on. With ``DUMP_FOLDER`` set, each rank writes its one-element
parameters there as ``dump_<rank>.json`` after training.
"""

import json
import os
from functools import partial
from pathlib import Path

import megatron.core
import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.package_info import MAJOR, MINOR
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.training import get_args, pretrain

RELEASE = (MAJOR, MINOR)


def datasets(num_samples, vp_stage=None):
    """Megatron's mock data, as --mock-data gives."""
    args = get_args()
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        split=args.split,
        num_dataset_builder_threads=1,
        tokenizer=build_tokenizer(args),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
    )

    def on_this_rank():
        return mpu.get_tensor_model_parallel_rank() == 0

    return BlendedMegatronDatasetBuilder(MockGPTDataset, num_samples, on_this_rank, config).build()


def loss_func(loss_mask, losses):
    """Summed loss, token count, and the pair to log."""
    loss = (losses.view(-1).float() * loss_mask.view(-1)).sum()
    tokens = loss_mask.sum().to(torch.int)
    return loss, tokens, {"lm loss": torch.cat([loss.detach().view(1), tokens.view(1)])}


def next_batch(data_iterator):
    """A micro-batch on every tensor-parallel rank, without pipeline or context parallelism."""
    if RELEASE < (0, 18):
        from megatron.training.utils import get_batch_on_this_tp_rank

        return get_batch_on_this_tp_rank(data_iterator)
    from megatron.core.utils import get_batch_on_this_tp_rank

    args = get_args()
    batch = {}
    if mpu.get_tensor_model_parallel_rank() == 0:
        batch = {k: v.cuda(non_blocking=True) for k, v in next(data_iterator).items()}
    return get_batch_on_this_tp_rank(
        batch,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=1,
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=False,
        is_pipeline_first_stage=True,
        is_pipeline_last_stage=True,
        **{"is_sft" if RELEASE < (0, 19) else "has_cu_seqlens": False},
    )


trained = []  # the model, once it has been


def forward_step(data_iterator, model):
    """One micro-batch."""
    trained[:] = [model]
    batch = next_batch(data_iterator)
    output = model(
        batch["tokens"], batch["position_ids"], batch["attention_mask"], labels=batch["labels"]
    )
    return output, partial(loss_func, batch["loss_mask"])


def model_provider(pre_process=True, post_process=True, vp_stage=None, config=None, **kwargs):
    """The model, where a script builds it: before 0.19."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.spec_utils import import_module
    from megatron.training.arguments import core_transformer_config_from_args

    args = get_args()
    spec = (
        get_gpt_layer_local_spec(normalization=args.normalization)
        if args.spec is None
        else import_module(args.spec)
    )
    return GPTModel(
        config=config or core_transformer_config_from_args(args),
        transformer_layer_spec=spec,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        vp_stage=vp_stage,
        **kwargs,
    )


def train():
    """As the script of each release does."""
    datasets.is_distributed = True
    if RELEASE < (0, 18):
        pretrain(datasets, model_provider, ModelType.encoder_or_decoder, forward_step)
        return

    from megatron.training import argument_utils
    from megatron.training.arguments import parse_and_validate_args

    args = parse_and_validate_args()
    if RELEASE < (0, 19):
        config = argument_utils.pretrain_cfg_container_from_args(args)
        pretrain(config, datasets, model_provider, ModelType.encoder_or_decoder, forward_step)
        return
    model_config = argument_utils.gpt_config_from_args(args)
    config = argument_utils.pretrain_cfg_container_from_args(args, model_config)
    pretrain(config, datasets, ModelType.encoder_or_decoder, forward_step)


def dump(folder):
    """What one rank holds that other tensor-parallel ranks must hold too."""
    scalars = {
        name: parameter.double().tolist()
        for name, parameter in trained[0].named_parameters()
        if parameter.numel() == 1
    }
    Path(folder, f"dump_{os.environ['RANK']}.json").write_text(json.dumps({"alphas": scalars}))


if __name__ == "__main__":
    print(f"Megatron {megatron.core.__version__} of {Path(megatron.core.__file__).parents[1]}")
    train()
    if "DUMP_FOLDER" in os.environ:
        dump(os.environ["DUMP_FOLDER"])
