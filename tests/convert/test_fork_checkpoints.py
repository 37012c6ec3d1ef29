"""Legacy checkpoints and those of the research fork: merged, put right, and told about."""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from launch import Run, load_checkpoint, train

from megatron_xielu.checkpoints import fork
from megatron_xielu.checkpoints.alphas import read_alphas
from megatron_xielu.checkpoints.legacy import Legacy, open_legacy
from megatron_xielu.checkpoints.reader import open_source
from megatron_xielu.checkpoints.source import Refused
from megatron_xielu.checkpoints.torch_dist import TorchDist
from megatron_xielu.convert import __main__ as cli
from megatron_xielu.kernels import reference

LAYERS = 4
ALPHAS = ("alpha_p", "alpha_n")
# TP=2, PP=2, without the sum over tensor-parallel ranks: what the fork ships.
TRAINING = (
    "--xielu --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --train-iters 3 "
    "--qk-layernorm --group-query-attention --num-query-groups 2 "
    "--save checkpoints --save-interval 3 "
)
UNSUMMED = {"BREAK_TP_SUM": "1"}


def alpha_key(layer: int, alpha: str) -> str:
    return f"decoder.layers.{layer}.mlp.activation_func.{alpha}"


@pytest.fixture(scope="module")
def drifted(tmp_path_factory) -> tuple[Run, Path]:
    """A legacy checkpoint whose replicas drifted: the run, and its iter_ folder."""
    folder = tmp_path_factory.mktemp("drifted")
    run = train(folder, f"{TRAINING} --ckpt-format torch", ranks=4, environment=UNSUMMED)
    return run, folder / "checkpoints" / "iter_0000003"


@pytest.fixture(scope="module")
def same_in_torch_dist(tmp_path_factory) -> Path:
    """The same training in the other format: the same weights, and rank 0's alphas."""
    folder = tmp_path_factory.mktemp("torch_dist")
    train(folder, TRAINING, ranks=4, environment=UNSUMMED)
    return folder / "checkpoints" / "iter_0000003"


def replicas(run: Run, layer: int, alpha: str) -> list[float]:
    """A layer's raw alpha on the two tensor-parallel ranks, as they were in memory."""
    stage, local = divmod(layer, LAYERS // 2)
    dumps = run.dumps[2 * stage : 2 * stage + 2]
    return [dump["alphas"][f"0.{alpha_key(local, alpha)}"][0] for dump in dumps]


def written(file: Path) -> dict[str, list[float]]:
    """Raw alphas of a file of `convert alphas`."""
    found = json.loads(file.read_text())
    return {
        alpha: [reference.inverse_softplus(one - floor).item() for one in found[alpha]]
        for alpha, floor in zip(ALPHAS, (0, 0.5), strict=True)
    }


class TestLegacy:
    def test_merges_to_what_torch_dist_has(self, drifted, same_in_torch_dist: Path) -> None:
        _, folder = drifted
        legacy = Legacy(folder)
        whole = load_checkpoint(same_in_torch_dist)
        compared = set()
        for key in legacy.keys() - {alpha_key(i, a) for i in range(LAYERS) for a in ALPHAS}:
            expected = whole.get(key)
            if expected is None:
                _, _, layer, name = key.split(".", 3)
                # Names of norms in layers of Transformer Engine, which torch_dist uses for all.
                name = name.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")
                if name.startswith("input_layernorm."):
                    name = "self_attention.linear_qkv.layer_norm_weight"
                expected = whole[f"decoder.layers.{name}"][int(layer)]
                key_in_whole = f"decoder.layers.{name}"
            else:
                key_in_whole = key
            assert legacy.shape(key) == tuple(expected.shape)
            assert torch.equal(legacy.read(key), expected), key
            compared.add(key_in_whole)
        model = {key for key in whole if not key.startswith("optimizer.")}
        assert model - compared == {f"decoder.layers.mlp.activation_func.{a}" for a in ALPHAS}

    def test_drift_is_reported_and_the_mean_taken(self, drifted) -> None:
        run, folder = drifted
        lines: list[str] = []
        source = fork.adapt(open_legacy(folder, trust_pickle=True), lines.append)
        assert "replicas differ between tensor-parallel ranks" in lines[0]
        assert len(lines) == 1 + LAYERS * len(ALPHAS)
        for layer in range(LAYERS):
            for alpha in ALPHAS:
                raw = replicas(run, layer, alpha)
                effective = [reference.softplus(value).item() for value in raw]
                taken = source.read(alpha_key(layer, alpha))
                assert taken.shape == (1,) and taken.dtype == torch.float32
                mean = sum(effective) / 2
                assert reference.softplus(taken).item() == pytest.approx(mean, rel=1e-6)
                (line,) = (x for x in lines if f"layer {layer}: softplus({alpha})" in x)
                assert f"{effective[0]:.6g}, {effective[1]:.6g} on ranks 0 to 1" in line
                assert f"{mean:.6g} taken" in line

    def test_replicas_that_agree_keep_their_bits(self, drifted, tmp_path: Path) -> None:
        _, folder = drifted
        healthy = tmp_path / folder.name
        shutil.copytree(folder, healthy)
        values = {}
        for stage in range(2):
            first, second = (
                healthy / f"mp_rank_{rank:02}_{stage:03}" / "model_optim_rng.pt" for rank in (0, 1)
            )
            source, target = (torch.load(path, weights_only=False) for path in (first, second))
            for key, value in source["model"].items():
                if "alpha" in key:
                    target["model"][key] = value
                    values[stage, key] = value
            torch.save(target, second)
        lines: list[str] = []
        adapted = fork.adapt(Legacy(healthy), lines.append)
        assert lines == [] and isinstance(adapted, Legacy)
        for layer in range(LAYERS):
            stage, local = divmod(layer, 2)
            value = values[stage, alpha_key(local, "alpha_p")]
            assert torch.equal(adapted.read(alpha_key(layer, "alpha_p")), value)

    def test_is_read_only_when_trusted(self, drifted, tmp_path: Path) -> None:
        _, folder = drifted
        with pytest.raises(SystemExit, match=r"legacy checkpoint.*add --trust-pickle") as error:
            cli.main(["to-hf", str(folder), str(tmp_path / "out")])
        assert "\n" not in str(error.value)
        assert not list(tmp_path.iterdir())

    def test_even_trusted_pickles_are_not_executed_without_need(self, drifted, monkeypatch) -> None:
        """The files of Megatron itself hold nothing that needs it."""
        _, folder = drifted
        load = torch.load

        def only_weights(*args, weights_only: bool, **kwargs):
            assert weights_only
            return load(*args, weights_only=weights_only, **kwargs)

        monkeypatch.setattr(torch, "load", only_weights)
        open_legacy(folder, trust_pickle=True)

    def test_becomes_a_hugging_face_model(self, drifted, tmp_path: Path, capsys) -> None:
        from transformers import AutoModelForCausalLM

        _, folder = drifted
        out = tmp_path / "hf"
        cli.main(["to-hf", str(folder.parent), str(out), "--trust-pickle"])
        assert "replicas differ between tensor-parallel ranks" in capsys.readouterr().out
        model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        assert type(model).__name__ == "ApertusForCausalLM"
        legacy = Legacy(folder)
        for layer, module in enumerate(model.model.layers):
            assert torch.equal(module.mlp.act_fn.alpha_n, legacy.read(alpha_key(layer, "alpha_n")))

    def test_its_alphas_are_written(self, drifted, tmp_path: Path, capsys) -> None:
        _, folder = drifted
        out = tmp_path / "alphas.json"
        with pytest.raises(SystemExit, match=r"legacy checkpoint.*add --trust-pickle"):
            cli.main(["alphas", str(folder.parent), str(out)])
        cli.main(["alphas", str(folder.parent), str(out), "--trust-pickle"])
        assert "replicas differ between tensor-parallel ranks" in capsys.readouterr().out
        legacy, found = Legacy(folder), written(out)
        for alpha in ALPHAS:
            raw = [legacy.read(alpha_key(layer, alpha)).item() for layer in range(LAYERS)]
            assert found[alpha] == pytest.approx(raw, rel=1e-9)

    def test_a_missing_rank_is_named(self, drifted, tmp_path: Path) -> None:
        _, folder = drifted
        broken = tmp_path / folder.name
        shutil.copytree(folder, broken)
        shutil.rmtree(broken / "mp_rank_01_001")
        with pytest.raises(Refused, match="the files of mp_rank_01_001 are missing"):
            Legacy(broken)


def write_legacy(folder: Path, states: dict[str, dict], **arguments) -> Path:
    """A legacy checkpoint of the given chunks by rank folder."""
    values = {
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "untie_embeddings_and_output_weights": True,
        **arguments,
    }
    for name, chunks in states.items():
        (folder / name).mkdir(parents=True)
        torch.save({"args": Namespace(**values), **chunks}, folder / name / "model_optim_rng.pt")
    return folder


FC2 = "decoder.layers.0.mlp.linear_fc2.weight"


def two_ranks(second: dict) -> dict[str, dict]:
    """A sound first tensor-parallel rank, and another."""
    return {"mp_rank_00": {"model": {FC2: torch.ones(1, 1)}}, "mp_rank_01": second}


class TestLegacyLayouts:
    def test_gates_are_joined_before_ups(self, tmp_path: Path) -> None:
        key = "decoder.layers.0.mlp.linear_fc1.weight"
        gate, up = torch.arange(8.0).view(4, 2), 10 + torch.arange(8.0).view(4, 2)
        states = {
            f"mp_rank_0{rank}": {
                "model": {key: torch.cat([gate.chunk(2)[rank], up.chunk(2)[rank]])}
            }
            for rank in range(2)
        }
        write_legacy(tmp_path, states, tensor_model_parallel_size=2, swiglu=True)
        legacy = Legacy(tmp_path)
        assert legacy.shape(key) == (8, 2)
        assert torch.equal(legacy.read(key), torch.cat([gate, up]))

    def test_chunks_of_virtual_stages_alternate(self, tmp_path: Path) -> None:
        key = "decoder.layers.{}.pre_mlp_layernorm.weight"
        states = {
            f"mp_rank_00_00{stage}": {
                f"model{chunk}": {key.format(0): torch.tensor([10.0 * chunk + stage])}
                for chunk in range(2)
            }
            for stage in range(2)
        }
        write_legacy(tmp_path, states, pipeline_model_parallel_size=2)
        legacy = Legacy(tmp_path)
        assert [legacy.read(key.format(i)).item() for i in range(4)] == [0.0, 1.0, 10.0, 11.0]

    def test_a_tied_output_layer_is_the_embedding(self, tmp_path: Path) -> None:
        chunk = {
            "decoder.layers.0.mlp.linear_fc2.weight": torch.zeros(1, 1),
            "output_layer.weight": torch.zeros(2, 1),
        }
        tied = {"untie_embeddings_and_output_weights": False}
        legacy = Legacy(write_legacy(tmp_path, {"mp_rank_00": {"model": chunk}}, **tied))
        assert legacy.keys() == {"decoder.layers.0.mlp.linear_fc2.weight"}

    @pytest.mark.parametrize(
        ("states", "message"),
        [
            ({"mp_rank_00_000_000": {"model": {}}}, "expert-parallel"),
            ({"mp_rank_00": {"optimizer": {}}}, "holds no model"),
            ({"mp_rank_00": {"model": {"language_model.x": torch.ones(1)}}}, "megatron-core"),
            ({"mp_rank_00": {"model": None}}, "not every file of stage 0 has its model"),
            (two_ranks({"model1": {}}), "not every file of stage 0 has its model"),
            (two_ranks({"model": {}}), "linear_fc2.weight has not one shape"),
            (two_ranks({"model": {FC2: torch.ones(2, 1)}}), "linear_fc2.weight has not one shape"),
            (two_ranks({"model": {FC2: 3}}), "linear_fc2.weight has not one shape"),
            ({"mp_rank_00": {"model": {FC2: torch.ones(1)}}}, "linear_fc2.weight is of shape"),
        ],
    )
    def test_refusals(self, tmp_path: Path, states: dict, message: str) -> None:
        with pytest.raises(Refused, match=message):
            Legacy(write_legacy(tmp_path, states, tensor_model_parallel_size=len(states)))


class TestForkTorchDist:
    @pytest.fixture
    def old_layout(self, same_in_torch_dist: Path, tmp_path: Path) -> Path:
        """The checkpoint as the fork wrote it first: alphas of shape (L,), in bfloat16, and the
        arguments in a file of their own."""
        plain = (bool, int, float, str, list, type(None))
        arguments = {
            name: value
            for name, value in vars(TorchDist(same_in_torch_dist).arguments).items()
            if type(value) in plain and name != "xielu_beta"
        }
        tensors = load_checkpoint(same_in_torch_dist)
        for key in tensors:
            if "activation_func.alpha" in key:
                tensors[key] = tensors[key].squeeze(1).bfloat16()
        folder = tmp_path / "iter_0000003"
        dcp.save(tensors, checkpoint_id=folder, no_dist=True)
        torch.save({"args": Namespace(**arguments), "iteration": 3}, folder / "common.pt")
        return folder

    def test_old_layout_is_reported_and_read(
        self, old_layout: Path, same_in_torch_dist: Path
    ) -> None:
        lines: list[str] = []
        source = open_source(old_layout, report=lines.append)
        assert lines == [
            "alphas have the fork's old layout (4,): read as (4, 1)",
            "alphas are stored in bfloat16: widened to float32, what rounding took is gone",
        ]
        saved = load_checkpoint(same_in_torch_dist)
        for alpha in ALPHAS:
            key = f"decoder.layers.mlp.activation_func.{alpha}"
            assert source.shape(key) == (4, 1) and source.dtype(key) == torch.float32
            for layer in range(LAYERS):
                value = source.read(key, layer)
                assert value.shape == (1,) and value.dtype == torch.float32
                assert torch.equal(value, saved[key][layer].bfloat16().float())

    def test_becomes_a_hugging_face_model(self, old_layout: Path, tmp_path: Path) -> None:
        from safetensors.torch import load_file

        cli.main(["to-hf", str(old_layout), str(tmp_path / "hf")])
        tensors = load_file(tmp_path / "hf" / "model.safetensors")
        source = open_source(old_layout, report=lambda line: None)
        for layer in range(LAYERS):
            for alpha in ALPHAS:
                exported = tensors[f"model.layers.{layer}.mlp.act_fn.{alpha}"]
                key = f"decoder.layers.mlp.activation_func.{alpha}"
                assert exported.dtype == torch.float32
                assert torch.equal(exported, source.read(key, layer))

    def test_its_alphas_are_written_and_reported(self, old_layout: Path, tmp_path: Path) -> None:
        out = tmp_path / "alphas.json"
        cli.main(["alphas", str(old_layout), str(out)])
        source, found = open_source(old_layout), written(out)
        for alpha in ALPHAS:
            raw = source.read(f"decoder.layers.mlp.activation_func.{alpha}").flatten().tolist()
            assert found[alpha] == pytest.approx(raw, rel=1e-9)
        saved, file = read_alphas({3: old_layout}, "xielu"), json.loads(out.read_text())
        assert (saved.positive[-1], saved.negative[-1]) == (file["alpha_p"], file["alpha_n"])

    def test_of_this_package_nothing_is_said(self, same_in_torch_dist: Path) -> None:
        lines: list[str] = []
        assert isinstance(open_source(same_in_torch_dist, report=lines.append), TorchDist)
        assert lines == []

    @pytest.mark.parametrize(
        ("name", "value"),
        [("xiprelup", True), ("post_layer_norm", True), ("input_embeddings_multiplier", 2.0)],
    )
    def test_models_that_only_the_fork_has_are_refused(self, same_in_torch_dist, name, value):
        source = TorchDist(same_in_torch_dist)
        setattr(source.arguments, name, value)
        with pytest.raises(Refused, match=f"only the fork has {name} = {value}"):
            fork.adapt(source, print)
