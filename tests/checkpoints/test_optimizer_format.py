"""The two optimizer formats of checkpoints: bytes counted in real trainings, and what a resume may
change."""

import math
from argparse import Namespace

import pytest
import torch
from launch import TINY_LLAMA, load_checkpoint, train

from megatron_xielu.checkpoints.optimizer_format import DP, FULL, check_resume
from megatron_xielu.checkpoints.torch_dist import TorchDist
from megatron_xielu.plan.run import Cluster, Plan

RANKS = 2
FORMATS = {DP: "", FULL: "--dist-ckpt-optim-fully-reshardable"}
# Large enough for its tensors to outweigh what files and messages have besides; several buckets.
MODEL = [
    *TINY_LLAMA,
    *"""--num-layers 2 --hidden-size 256 --ffn-hidden-size 1024 --vocab-size 4095 --squared-relu
    --bf16 --use-distributed-optimizer --overlap-grad-reduce --ddp-bucket-size 500000
    --global-batch-size 4 --train-iters 4""".split(),
]


@pytest.fixture(scope="module", params=FORMATS)
def counted(request, tmp_path_factory):
    """A format, and two runs that load a checkpoint of it and save one at the end."""
    kind = request.param
    folder = tmp_path_factory.mktemp(kind)

    def run(name: str, flags: str) -> dict[str, list[int]]:
        where = folder / name
        entry = ("-m", "checkpoint_bytes")
        flags = f"{FORMATS[kind]} --save {where} {flags}"
        done = train(where, flags, ranks=RANKS, model=MODEL, command=entry)
        names = {name for dump in done.dumps for name in dump}
        return {name: [dump.get(name, 0) for dump in done.dumps] for name in names}

    run("start", "--exit-interval 2")
    runs = {
        parallel: run(str(parallel), f"--load {folder / 'start'} {flag}")
        for parallel, flag in ((False, ""), (True, "--ckpt-fully-parallel-load"))
    }
    return kind, folder, runs


def plan() -> Plan:
    command = [*MODEL, "--save", "out"]
    return Plan(command, cluster=Cluster(nodes=1, gpus_per_node=RANKS))


def test_a_save_moves_what_the_plan_says(counted):
    kind, folder, runs = counted
    expected, save = plan().save(kind), runs[False]
    files = folder.joinpath("False", "iter_0000004").glob("*.distcp")
    for rank in range(RANKS):
        assert save.get("save received", [0, 0])[rank] == expected.received
    written = sum(file.stat().st_size for file in files)
    assert written == pytest.approx(RANKS * expected.written, rel=0.02)
    if kind == DP:
        assert "save held" not in save
        return
    state = 12 * plan().model.parameters()
    share = 2 * plan().model.parameters() / RANKS
    for rank in range(RANKS):
        assert save["save held"][rank] == state
        assert expected.host_memory == state + expected.written
        # Besides the optimizer state only what ranks tell each other, as bytes.
        assert save["save to_host"][rank] == pytest.approx(expected.to_host - share, rel=0.01)


def test_a_load_moves_what_the_plan_says(counted):
    kind, _, runs = counted
    for parallel, load in runs.items():
        expected = plan().load(kind, parallel=parallel)
        assert sum(load["load read"]) == pytest.approx(
            plan().read_by_all(kind, parallel=parallel), rel=0.02
        )
        for rank in range(RANKS):
            assert load["load read"][rank] == pytest.approx(expected.read, rel=0.1)
            assert load.get("load exchanged", [0, 0])[rank] == expected.exchanged
        assert ("load held" in load) == (expected.host_memory > 0)


def test_the_parallel_load_is_the_same_to_the_bit(counted):
    _, folder, runs = counted
    one, other = (load_checkpoint(folder / str(p) / "iter_0000004") for p in runs)
    assert one.keys() == other.keys() and any(key.startswith("optimizer.") for key in one)
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


def test_from_one_layout_to_another_through_the_full_format(tmp_path):
    """DP 3 without gathering, DP 2 with it, then TP 2, then PP 2: as a run that was not stopped."""
    flags = (
        "--squared-relu --use-distributed-optimizer --overlap-grad-reduce --ddp-bucket-size 10000 "
        "--ckpt-fully-parallel-load --global-batch-size 12 "
        "--train-iters 8 --save checkpoints --load checkpoints --save-interval 2"
    )
    whole = train(tmp_path / "whole", flags, ranks=3)
    for stop, ranks, layout in (
        (2, 3, ""),
        (4, 2, FORMATS[FULL]),
        (6, 2, f"{FORMATS[FULL]} --tensor-model-parallel-size 2"),
        (8, 4, "--pipeline-model-parallel-size 2"),
    ):
        part = f"{flags} {layout} --exit-interval {stop}"
        run = train(tmp_path / "parts", part, ranks=ranks)
        assert run.losses[0] == pytest.approx(whole.losses[stop - 2], rel=1e-5)


# Refusals

RUN = dict(
    world_size=64,
    ckpt_format="torch_dist",
    use_distributed_optimizer=True,
    overlap_grad_reduce=True,
    tensor_model_parallel_size=1,
    pipeline_model_parallel_size=1,
)
REFUSED = {  # what the checkpoint had, what the run has: words of the message
    "tensor": ({"tensor_model_parallel_size": 2}, {}, "--tensor-model-parallel-size 2"),
    "pipeline": ({}, {"pipeline_model_parallel_size": 4}, "--pipeline-model-parallel-size 1"),
    "experts": ({}, {"expert_model_parallel_size": 2}, "--expert-model-parallel-size 1"),
    "virtual stages": (
        {"num_layers_per_virtual_pipeline_stage": 2},
        {},
        "--pipeline-model-parallel-size 1 --num-layers-per-virtual-pipeline-stage 2, and",
    ),
    "stages": (
        {},
        {"decoder_first_pipeline_num_layers": 3, "account_for_loss_in_pipeline_split": True},
        "not with --pipeline-model-parallel-size 1 --decoder-first-pipeline-num-layers 3 "
        "--account-for-loss-in-pipeline-split;",
    ),
    "grouped experts": (
        {"num_experts": 4},
        {"num_experts": 4, "moe_grouped_gemm": True},
        "not with --expert-model-parallel-size 1 --moe-grouped-gemm;",
    ),
    "tensor-parallel experts": (
        {"expert_tensor_parallel_size": 1},
        {"expert_tensor_parallel_size": 2},
        "not with --expert-model-parallel-size 1 --expert-tensor-parallel-size 2;",
    ),
    "node count": ({}, {"world_size": 88}, "give --overlap-grad-reduce --ddp-bucket-size 64000000"),
    "bucket size": (
        {"ddp_bucket_size": 5_000},
        {},
        "give --overlap-grad-reduce --ddp-bucket-size 5000",
    ),
    "buckets": ({"ddp_num_buckets": 5}, {}, "give --overlap-grad-reduce --ddp-num-buckets 5"),
    "no overlap": (
        {},
        {"overlap_grad_reduce": False},
        "with no --overlap-grad-reduce (one gradient bucket); give --overlap-grad-reduce --ddp-",
    ),
}


@pytest.fixture(scope="module")
def several_buckets(tmp_path_factory):
    """A checkpoint of one rank with several buckets, and one with a single one."""
    folder = tmp_path_factory.mktemp("buckets")
    flags = (
        "--squared-relu --use-distributed-optimizer --overlap-grad-reduce --save-interval 1 "
        "--train-iters 1 --save"
    )
    for name, more in (("several", "--ddp-bucket-size 10000"), ("one", "")):
        train(folder, f"{flags} {name} {more}")
    return folder


@pytest.mark.parametrize("case", REFUSED)
def test_a_layout_that_cannot_be_read_is_refused(case, several_buckets):
    then, now, words = REFUSED[case]
    saved, args = Namespace(**{**RUN, **then}), Namespace(**{**RUN, **now})
    folder = str(several_buckets / "several")
    with pytest.raises(ValueError) as refused:
        check_resume(args, saved, folder)
    message = str(refused.value)
    assert words in message and "--no-load-optim" in message and "\n" not in message
    for harmless in (
        {"no_load_optim": True},
        {"finetune": True},
        {"pretrained_checkpoint": folder},
    ):
        check_resume(Namespace(**{**RUN, **now, **harmless}), saved, folder)
    check_resume(args, Namespace(**vars(saved), dist_ckpt_optim_fully_reshardable=True), folder)


@pytest.mark.parametrize("more", [{}, {"dist_ckpt_optim_fully_reshardable": True}])
@pytest.mark.parametrize(
    ("apart", "flags"),
    [
        ({"expert_model_parallel_size": 2}, "--expert-model-parallel-size 2"),
        (
            {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1},
            "--expert-model-parallel-size 1 --expert-tensor-parallel-size 1",
        ),
    ],
)
def test_experts_get_or_lose_an_optimizer_of_their_own(apart, flags, more, several_buckets):
    """In either format Megatron would end with a traceback."""
    folder = str(several_buckets / "several")
    together = Namespace(**{**RUN, **more, "num_experts": 4})
    args = Namespace(**{**vars(together), **apart})
    own = rf"{flags}, where \S+ have an optimizer of their own"
    with pytest.raises(ValueError, match=rf"saved with {own}, and .*--no-load-optim"):
        check_resume(together, args, folder)
    with pytest.raises(ValueError, match=rf"this run has {own}.*--no-load-optim"):
        check_resume(args, together, folder)
    check_resume(Namespace(**vars(args), no_load_optim=True), together, folder)
    more_of_them = Namespace(**{**vars(args), "expert_model_parallel_size": 4})
    check_resume(more_of_them, Namespace(**vars(args), no_save_optim=True), folder)


@pytest.mark.parametrize(
    ("now", "then", "words"),
    [
        ({"optimizer": "muon"}, {}, "saved with --optimizer adam, with --use-dist"),
        ({"use_distributed_optimizer": False}, {}, "not with --optimizer adam, without --use-dist"),
        ({}, {"optimizer": "lion"}, "saved with --optimizer lion,"),
        ({"bf16": False, "fp16": True}, {"bf16": True}, "saved with --bf16,"),
        ({"grad_reduce_in_bf16": True}, {}, "saved with fp32,"),
    ],
)
def test_another_optimizer_or_precision_is_refused(now, then, words, several_buckets):
    saved, args = Namespace(**{**RUN, **then}), Namespace(**{**RUN, **now})
    folder = str(several_buckets / "several")
    with pytest.raises(ValueError, match=words) as refused:
        check_resume(args, saved, folder)
    assert "--no-load-optim" in str(refused.value) and "\n" not in str(refused.value)
    check_resume(Namespace(**vars(args), no_load_optim=True), saved, folder)


def test_a_state_for_each_parameter_goes_anywhere(tmp_path):
    """Muon's, with its own distributed optimizer: nothing in it is a bucket."""
    muon = {**RUN, "optimizer": "muon", "bf16": True, "world_size": 2}
    saved = Namespace(**{**muon, "use_distributed_optimizer": False})
    saved.use_layer_wise_distributed_optimizer = True
    model = [*TINY_LLAMA, *"--bf16 --use-distributed-optimizer --optimizer muon".split()]
    more = "--xielu --train-iters 2 --lr-decay-iters 4"
    train(tmp_path / "one", f"{more} --save {tmp_path}/one", ranks=2, model=model)
    args = Namespace(**{**muon, "load": str(tmp_path / "one"), "tensor_model_parallel_size": 2})
    check_resume(args, saved, args.load)
    train(
        tmp_path / "two",
        f"{more} --load {tmp_path}/one --save {tmp_path}/two --tensor-model-parallel-size 2",
        ranks=2,
        model=model,
    )
    one, two = (load_checkpoint(tmp_path / name / "iter_0000002") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert [key for key in one if not torch.equal(one[key], two[key])] == []
    model_keys = TorchDist(tmp_path / "one/iter_0000002").keys()
    assert model_keys and not any("optimizer" in key for key in model_keys)


def test_the_node_count_may_change_with_the_bucket_size_kept(several_buckets):
    kept = {"ddp_bucket_size": 88_000_000}
    saved = Namespace(**{**RUN, **kept, "world_size": 88})
    check_resume(Namespace(**{**RUN, **kept}), saved, str(several_buckets / "several"))
    # Up to 40 ranks Megatron's own size does not change.
    saved, args = (Namespace(**{**RUN, "world_size": ranks}) for ranks in (8, 40))
    check_resume(args, saved, str(several_buckets / "several"))


def test_another_bucket_size_does_no_harm_to_a_single_bucket(several_buckets):
    folder = str(several_buckets / "one")
    for now in ({"world_size": 88}, {"overlap_grad_reduce": False}):
        check_resume(Namespace(**{**RUN, **now}), Namespace(**RUN), folder)
    small = Namespace(**{**RUN, "ddp_bucket_size": 5_000})
    with pytest.raises(ValueError, match="--ddp-bucket-size 64000000"):
        check_resume(small, Namespace(**RUN), folder)


def test_default_bucket_size_is_megatrons(monkeypatch):
    from megatron.training import training

    from megatron_xielu.checkpoints.optimizer_format import bucket_size

    monkeypatch.setattr(training, "get_pg_size", lambda size: size)  # of a group of that many ranks
    for given in ({}, {"ddp_bucket_size": 7}, {"overlap_grad_reduce": False}):
        for ranks in (1, 40, 88):
            layout = {"world_size": 2 * ranks, "tensor_model_parallel_size": 2}
            args = Namespace(**{**RUN, **layout, **given})
            config = Namespace(num_buckets=None, bucket_size=given.get("ddp_bucket_size"))
            overlap = args.overlap_grad_reduce
            expected = training.resolve_ddp_bucket_size(config, ranks, overlap, 1)
            assert bucket_size(args) == (math.inf if expected is None else expected)
