"""Saved arguments that Megatron would not save, and a `.metadata` that lacks a part: one line."""

from __future__ import annotations

import pickle
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hostile import damaged, damaged_bytes
from hypothesis import given, settings
from torch.utils.tensorboard import SummaryWriter

from megatron_xielu.catalog import activation_of
from megatron_xielu.checkpoints import saved_arguments
from megatron_xielu.checkpoints.alphas import beta, initial_alphas
from megatron_xielu.checkpoints.legacy import Legacy
from megatron_xielu.checkpoints.source import Refused
from megatron_xielu.checkpoints.torch_dist import TorchDist
from megatron_xielu.convert.megatron_arguments import architecture_of, arguments_of
from megatron_xielu.evaluate import checkpoint as evaluated
from megatron_xielu.evaluate import validation
from megatron_xielu.plan.flags import PlanError
from megatron_xielu.plan.model import Model
from megatron_xielu.report.load import load
from megatron_xielu.report.run import Run

KEY = "decoder.layers.mlp.activation_func.alpha_p"
ARGUMENTS: dict[str, Any] = {
    **{"num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 96, "num_attention_heads": 4},
    **{"kv_channels": 8, "seq_length": 32, "max_position_embeddings": 32, "padded_vocab_size": 128},
    **{"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1},
    **{"position_embedding_type": "rope", "normalization": "RMSNorm", "add_bias_linear": False},
    **{"rotary_base": 10000, "norm_epsilon": 1e-5, "untie_embeddings_and_output_weights": True},
    **{"xielu": True, "xielu_beta": 0.5, "xielu_alpha_p_init": 0.8, "spec": None},
}
WRONG: list[tuple[str, Any]] = [
    ("num_layers", "4"),
    ("num_layers", None),
    ("num_layers", [4]),
    ("num_layers", 2**31),
    ("hidden_size", 10**29),
    ("kv_channels", 0),
    ("seq_length", float("nan")),
    ("global_batch_size", 8.5),
    ("train_iters", "many"),
    ("xielu_beta", float("inf")),
    ("xielu_alpha_p_init", "0.8"),
    ("xielu_alpha_n_init", [0.8, 0.9]),
    ("xielu", "yes"),
    ("rotary_base", 0),
    ("rope_scaling_factor", 0),
    ("norm_epsilon", -1),
    ("spec", "megatron_xielu.layer_specs"),
    ("spec", [1, 2]),
    ("tokenizer_model", 3),
    ("tokenizer_model", "a\0b"),
    ("num_experts", torch.ones(2)),
    ("window_size", {}),
]


@pytest.fixture
def save(tmp_path: Path):
    """Writes a checkpoint with some arguments; its folder."""

    def write(**arguments: Any) -> Path:
        folder = tmp_path / "iter_0000003"
        dcp.save({KEY: torch.zeros(4, 1)}, checkpoint_id=folder, no_dist=True)
        torch.save({"args": Namespace(**ARGUMENTS | arguments)}, folder / "common.pt")
        (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
        return folder

    return write


@pytest.mark.parametrize(("name", "value"), WRONG, ids=lambda x: repr(x)[:20])
def test_a_wrong_argument_is_named(name, value, save, tmp_path):
    assert TorchDist(save()).arguments.num_layers == 4
    folder = save(**{name: value})
    legacy = tmp_path / "legacy/mp_rank_00/model_optim_rng.pt"
    legacy.parent.mkdir(parents=True)
    torch.save({"model": {}, "args": Namespace(**ARGUMENTS | {name: value})}, legacy)
    for read, checkpoint in (
        (TorchDist, folder),
        (Legacy, tmp_path / "legacy"),
        (lambda save_folder: evaluated.check(evaluated.find(save_folder, None)), tmp_path),
    ):
        with pytest.raises(ValueError, match=f": {name}.* (is|must be) .*, not ") as error:
            read(checkpoint)
        assert "\n" not in str(error.value)


def test_full_validation_leaves_a_number_for_each_set(save):
    assert TorchDist(save(eval_iters=[3, 5])).arguments.eval_iters == [3, 5]


@pytest.mark.parametrize(
    ("name", "text"),
    [("num_layers", "4.5"), ("num_layers", "(" * 9999), ("hidden_size", "nan"), ("spec", "3")],
)
def test_a_wrong_argument_of_event_files_is_noted(name, text, tmp_path):
    def report(arguments: dict[str, Any], folder: Path) -> Run:
        with SummaryWriter(str(folder / "tensorboard")) as writer:
            for argument, value in (ARGUMENTS | arguments).items():
                writer.add_text(argument, str(value))
        return load(folder)

    good = report({"tokenizer_model": "123"}, tmp_path / "good")
    assert good.model is not None and good.arguments.tokenizer_model == "123"
    bad = report({name: text}, tmp_path / "bad")
    assert bad.arguments is None and bad.model is None
    assert any(note.startswith(f"the event files: {name}") for note in bad.notes), bad.notes


@pytest.mark.parametrize(
    "change",
    [
        lambda metadata: metadata.__dict__.pop("storage_data"),
        lambda metadata: setattr(metadata, "storage_data", [1]),
        lambda metadata: setattr(metadata, "state_dict_metadata", None),
        lambda metadata: metadata.state_dict_metadata.update({KEY: 1}),
        lambda metadata: metadata.state_dict_metadata.update({KEY + "x": None}),
        lambda metadata: setattr(metadata.state_dict_metadata[KEY], "size", ("a",)),
        lambda metadata: setattr(metadata.state_dict_metadata[KEY], "properties", None),
    ],
    ids="no-places places no-tensors tensor another size properties".split(),
)
def test_metadata_that_lacks_a_part(change, save):
    file = save() / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    change(metadata)
    file.write_bytes(pickle.dumps(metadata))
    with pytest.raises(Refused, match="metadata is not that of a checkpoint"):
        TorchDist(file.parent)


@pytest.mark.parametrize(
    "change",
    [
        lambda metadata: metadata.storage_data.clear(),
        lambda metadata: [setattr(x, "offset", -1) for x in metadata.storage_data.values()],
        lambda metadata: [setattr(x, "relative_path", 3) for x in metadata.storage_data.values()],
        lambda metadata: setattr(metadata.state_dict_metadata[KEY], "chunks", None),
        lambda metadata: setattr(metadata.state_dict_metadata[KEY], "size", (2**50, 2**50)),
        lambda metadata: setattr(metadata.state_dict_metadata[KEY], "size", (5, 1)),
    ],
    ids="no-place offset path chunks huge larger".split(),
)
def test_a_tensor_that_is_not_where_metadata_says(change, save):
    file = save() / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    change(metadata)
    file.write_bytes(pickle.dumps(metadata))
    with pytest.raises(Refused, match=KEY) as error:
        TorchDist(file.parent).read(KEY)
    assert "\n" not in str(error.value)


MODEL = architecture_of(Namespace(**ARGUMENTS), 128)
GOOD = {
    **{k: v for k, v in vars(arguments_of(MODEL, torch.float32)).items() if k != "params_dtype"},
    **ARGUMENTS,
    **{"spec": ["megatron_xielu.layer_specs", "xielu_layer_spec"], "num_query_groups": 2},
}


@given(damaged(GOOD))
@settings(max_examples=150, deadline=None)
def test_what_is_checked_can_be_relied_on(content):
    if not isinstance(content, dict):
        return
    arguments = Namespace(**content)
    try:
        saved_arguments.check(arguments, "x")
        activation_of(arguments)
        beta(arguments)
        initial_alphas(arguments, ["layer_00"])
        Model.of(arguments).parameters()
        architecture_of(arguments, 128)
    except PlanError:
        pass  # a line for each problem
    except Refused as error:
        assert "\n" not in str(error)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    dcp.save({KEY: torch.zeros(4, 1)}, checkpoint_id=folder, no_dist=True)
    torch.save({"args": Namespace(**ARGUMENTS)}, folder / "common.pt")
    return folder


@pytest.mark.parametrize("name", [".metadata", "common.pt"])
def test_any_damage_to_the_files(name, whole):
    good = (whole / name).read_bytes()

    @given(damaged_bytes(good))
    @settings(max_examples=30, deadline=None)
    def check(content: bytes) -> None:
        (whole / name).write_bytes(content)
        try:
            source = TorchDist(whole)
            for key in source.keys():  # noqa: SIM118
                source.shape(key)
                source.read(key)
        except Refused as error:
            assert "\n" not in str(error)

    check()
    (whole / name).write_bytes(good)


def test_full_validation_of_several_sets_is_saved_as_a_list():
    arguments = Namespace(eval_iters=[3, None], full_validation=True)
    assert saved_arguments.check(arguments, "here") is arguments
    with pytest.raises(ValueError, match="validated on several sets"):
        validation.check(Namespace(dataloader_type="single"), Namespace(eval_iters=[3]))
