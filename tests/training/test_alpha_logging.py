"""Alphas in TensorBoard and Weights & Biases, against the checkpoint and the gradients."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from event_curves import curves
from launch import load_checkpoint, start, train, wait
from wandb.proto.wandb_internal_pb2 import Record

from megatron_xielu.features import tp_sync
from megatron_xielu.features.alpha_logging import elements_in_shard
from megatron_xielu.megatron_activations import MegatronXIELU

LAST = 6  # iteration
LAYOUTS = {
    "pp2-virtual": "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2",
    # Ranks get the other shard's parameters only in the next forward pass.
    "dp2-overlap": "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_curves_are_the_alphas_of_the_checkpoint(layout, tmp_path):
    train(
        tmp_path,
        f"--xielu {LAYOUTS[layout]} --save checkpoints "
        "--tensorboard-dir events --tensorboard-log-interval 2",
        ranks=2,
    )
    found = curves(tmp_path / "events")
    saved = load_checkpoint(tmp_path / "checkpoints" / f"iter_{LAST:07d}")
    softplus = torch.nn.functional.softplus
    for name, floor in (("alpha_p", 0.0), ("alpha_n", 0.5)):
        raw = saved[f"decoder.layers.mlp.activation_func.{name}"].double().flatten()
        for layer in range(4):
            steps, values = zip(*found[f"{name}_raw/layer_{layer:02d}"], strict=True)
            assert steps == (2, 4, LAST)
            assert values[-1] == raw[layer].item()
            _, effective = found[f"{name}/layer_{layer:02d}"][-1]
            assert effective == pytest.approx(floor + softplus(raw[layer]).item(), rel=1e-6)
    assert sum(tag.startswith("alpha_p/") for tag in found) == 4

    if layout == "dp2-overlap":
        train(tmp_path / "plain", "--xielu --tensorboard-dir events", ranks=2)
        plain = curves(tmp_path / "plain" / "events")
        for layer in range(4):
            tag = f"alpha_grad_norm/layer_{layer:02d}"
            expected = [value for step, value in plain[tag] if step % 2 == 0]
            assert [value for _, value in found[tag]] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("start_at", "count"), [(0, 1), (3, 1), (5, 7), (6, 4), (0, 20), (11, 9)])
@pytest.mark.parametrize("shard", [4, 5, 10, 20])
def test_each_element_is_in_the_shard_of_its_place(start_at, count, shard):
    bucket = torch.arange(20).split(shard)  # as a reduce-scatter deals it out
    for rank, places in enumerate(bucket):
        owned = elements_in_shard(start_at, count, shard=shard, rank=rank)
        assert [start_at + e for e in owned] == [
            place for place in places.tolist() if start_at <= place < start_at + count
        ]


def test_experts_in_one_tensor_that_ranks_share(tmp_path):
    """Cut by the shards of the distributed optimizer, over expert-parallel ranks, and frozen."""
    log = tmp_path / "log.txt"
    script = str(Path(__file__).with_name("alpha_table_two_ranks.py"))
    assert wait(start([], ranks=2, log=log, command=[script])) == [0, 0], log.read_text()
    assert "megatron_xielu: xIELU in 1 MLP and 200 grouped experts, αp 0.8" in log.read_text()


def test_copies_of_experts_that_differ_are_named(monkeypatch):
    module, group = MegatronXIELU(), Mock(**{"size.return_value": 2})
    module.alpha_p, module.alpha_n = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    module.tp_group = group
    model = torch.nn.ModuleDict({"experts": torch.nn.ModuleDict({"activation_func": module})})

    def gather(modules, of):
        assert list(modules) == [module] and of is group
        values = torch.zeros(2, 6)
        values[1, 4] = 0.5  # of [three alpha_p, three alpha_n]
        return values, [False] * 4 + [True, False]

    monkeypatch.setattr(tp_sync, "gather_alphas", gather)
    said = r"by rank\): experts\.activation_func\.alpha_n\[1\]: \[0.0, 0.5\]$"
    with pytest.raises(RuntimeError, match=said):
        tp_sync.check_tp_sync(model, 1)


def offline_records(path: Path) -> Iterator[bytes]:
    """Records of the file of an offline run: LevelDB's log format behind a header of 7 bytes."""
    data, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no room for a header in this block
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def test_weights_and_biases_offline(tmp_path):
    train(
        tmp_path,
        "--xiprelu --tensorboard-dir events --wandb-project p --wandb-exp-name e "
        "--wandb-save-dir wandb --tensor-model-parallel-size 2 --sequence-parallel",
        ranks=2,
        environment={"WANDB_MODE": "offline"},
    )
    (path,) = tmp_path.glob("wandb/wandb/offline-run-*/run-*.wandb")
    history: dict[int, dict[str, float]] = {}
    for data in offline_records(path):
        record = Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = {
                "/".join(item.nested_key) or item.key: json.loads(item.value_json)
                for item in record.history.item
            }
            history[items["_step"]] = items
    expected = curves(tmp_path / "events")
    for tag in ("alpha_p/layer_00", "alpha_n_raw/layer_03", "alpha_grad_norm/layer_02"):
        assert [(s, history[s][tag]) for s in range(1, 7)] == [
            (s, pytest.approx(v, rel=1e-6)) for s, v in expected[tag]
        ]


def test_the_last_validation_reaches_the_event_file(tmp_path):
    """After Megatron's last flush, and where the writer's thread is slower than the exit."""
    flags = "--xielu --tensorboard-dir events --train-iters 4 --eval-iters 1 --eval-interval 100"
    run = train(tmp_path, flags, command=("-m", "slow_events_entry"))
    assert "validation loss at iteration 4 on validation set" in run.output
    # Of the test set, too, which Megatron writes under the same name.
    assert [step for step, _ in curves(tmp_path / "events")["lm loss validation"]] == [4, 4]
