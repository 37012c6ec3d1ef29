"""What a run was trained with, as far as its losses depend on it: what seeds of one training share.

All saved arguments count, new ones of Megatron's too, but for a list of those that may differ.
"""

from __future__ import annotations

import os
import re
from argparse import Namespace
from fnmatch import translate
from pathlib import Path
from typing import Any

from megatron_xielu.catalog import ALPHA_GROUP
from megatron_xielu.report.run import Run

_MAY_DIFFER = (
    # What seeds are there to vary.
    "seed",
    # How far the run had come when they were saved; `settings` has how far it came.
    *("iteration", "curr_iteration", "consumed_*", "skipped_train_samples", "do_*"),
    *("num_floating_point_operations_so_far", "exit_*"),
    # Where it writes, how often it saves, logs and validates, and who watches it. What is
    # validated on counts, and at which iterations losses are written.
    *("save", "save_*", "no_save_*", "ckpt_*", "dist_ckpt_*", "use_dist_ckpt*", "async_*"),
    *("non_persistent_*", "use_persistent_ckpt_worker", "data_cache_path", "tensorboard_dir"),
    *("tensorboard_queue_size", "wandb_*", "*one_logger*", "app_tag_*", "log_*", "logging_level"),
    *("timing_log_*", "eval_interval", "start_eval_at_iter", "profile*", "*pytorch_profiler*"),
    *("nvtx_ranges", "record_*", "memory_snapshot_path", "config_logger_dir"),
    *("flight_recorder_*", "inprocess_*", "*straggler*", "distributed_timeout_*"),
    *("xielu_made_with", "xielu_check_tp_sync"),
    # What a resume may take from its checkpoint; the values themselves count.
    *("use_checkpoint_args", "*_opt_param_scheduler"),
    # Which process wrote them, and how many read the data.
    *("rank", "local_rank", "num_workers", "num_dataset_builder_threads", "mmap_bin_files"),
    # Of serving the model.
    "inference_*",
)
# Who computes what: but for rounding and for random numbers, the same comes out. Not with experts,
# whose balance is that of a micro-batch.
_LAYOUT = (
    *("world_size", "data_parallel_size", "tensor_model_parallel_size", "sequence_parallel"),
    *("*pipeline_model_parallel_*", "*pipeline_num_layers", "*virtual_*", "context_parallel_size"),
    *("cp_comm_type", "tensor_parallel_num_weight_shards", "expert_tensor_parallel_*"),
    *("micro_batch_size", "eval_micro_batch_size", "use_distributed_optimizer", "overlap_*"),
    *("tp_comm_*", "recompute_*", "attention_backend"),
)
_PATHS = (
    *("data_path", "train_data_path", "valid_data_path", "test_data_path", "data_args_path"),
    *("per_split_data_args_path", "per_dataset_sequences_path", "tokenizer_model", "vocab_file"),
    "merge_file",
)
_free, _free_with_experts = (
    re.compile("|".join(map(translate, names))).match
    for names in ((*_MAY_DIFFER, *_LAYOUT), _MAY_DIFFER)
)


def settings(run: Run) -> dict[str, str] | None:
    """By name, what runs that differ in their seed alone share; None where that is not known."""
    if run.arguments is None:
        return None
    validated = [int(series.steps[-1]) for series in run.validation.values()]
    return {
        "iterations": str(run.iterations),
        **of_arguments(run.arguments, run.folder),
        "last validation": str(max(validated, default=0)),
    }


def of_arguments(args: Namespace, folder: Path) -> dict[str, str]:
    """Those of them that are arguments, as saved by a run in ``folder``."""
    free = _free_with_experts if getattr(args, "num_experts", None) else _free
    found = {
        name: _text(name, value, folder)
        for name, value in vars(args).items()
        # A version without these flags trained as with their defaults.
        if not free(name) and not (name in ALPHA_GROUP and value == ALPHA_GROUP[name])
    }
    if getattr(args, "load", None) == getattr(args, "save", None):
        found.pop("load", None)  # it resumes itself
    if not getattr(args, "group_query_attention", False):
        found.pop("num_query_groups", None)  # unused; checkpoints have another than event files
    return {name: text for name, text in found.items() if text != "None"}


def real_path(path: str, run: Path) -> str:
    """A path of data or of a tokenizer, absolute and without links where a file of it is found.

    Args:
        path: as a run's arguments have it: relative to the run's folder, to one above, or to where
            this is started.
        run: the run's folder.
    """
    folder = run.resolve()
    for base in (folder, *folder.parents, Path()):
        for ending in (".bin", "", "/tokenizer.json"):
            if os.path.isfile(found := os.path.join(base, path + ending)):
                return os.path.realpath(found).removesuffix(ending)
    return os.path.normpath(path)


def _text(name: str, value: Any, run: Path) -> str:
    if name not in _PATHS or value is None:
        return str(value)
    words = value if isinstance(value, list) else [value]
    return " ".join(real_path(str(word), run) for word in words)
