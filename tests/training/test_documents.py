"""``--dataloader-inter-document-masking``: each document of a sample is trained on as if alone."""

import json
import os
import random
import re
from pathlib import Path

import pytest
from dataset_files import write_dataset
from launch import TINY_LLAMA, Run, train

LENGTHS = [20, 8, 4, 14, 2, 30]  # even: with sequence parallelism each is run alone on two ranks
FLAG = "--dataloader-inter-document-masking"
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
GROUPS = "--group-query-attention --num-query-groups 2"
MOE_AND_MTP = (
    "--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 48 --mtp-num-layers 1 "
    "--moe-token-dispatcher-type alltoall"
)
MODEL = [word for word in TINY_LLAMA if word != "--mock-data"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """The flags of data whose documents are short."""
    folder = tmp_path_factory.mktemp("documents")
    lengths = LENGTHS * 40
    draw = random.Random(0)
    tokens = {place: draw.randrange(1, 120) for place in range(sum(lengths))}
    write_dataset(folder / "data", lengths, tokens)
    return f"--data-path {folder / 'data'} --data-cache-path {folder / 'cache'} --split 80,20,0"


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [(1, ""), (2, f"{TP2} {GROUPS}"), (2, f"{TP2} {MOE_AND_MTP}")],
    ids=["one", "tp2-sp-groups", "tp2-sp-moe-mtp"],
)
def test_every_document_is_trained_on_as_if_alone(ranks, flags, data, tmp_path):
    train(
        tmp_path,
        f"--xielu {FLAG} {data} --train-iters 2 {flags}",
        ranks=ranks,
        model=MODEL,
        command=("-m", "document_entry"),
    )
    seen = [json.loads(p.read_text()) for p in sorted(tmp_path.glob("lengths_*.json"))]
    assert len(seen) == ranks and len(seen[0]) == 2 * 4
    assert all(of_rank == seen[0] for of_rank in seen)
    for documents in seen[0]:
        assert sum(documents) == 2 * 32
        assert max(documents) <= 30 and len(documents) >= 4


@pytest.mark.skipif("MEGATRON_LM_DIR" not in os.environ, reason="a checkout of Megatron-LM")
def test_megatrons_own_script_trains_them_in_the_same_way(data, tmp_path):
    flags = f"{FLAG} {data} --train-iters 3"
    ours = train(tmp_path / "ours", f"--xielu {flags}", model=MODEL)
    script = Path(os.environ["MEGATRON_LM_DIR"], "pretrain_gpt.py")
    theirs = train(
        tmp_path / "theirs",
        f"{flags} --spec megatron_xielu.layer_specs xielu_layer_spec --use-te-activation-func",
        model=MODEL,
        command=("-m", "megatron_xielu.cpu", str(script)),
    )
    assert theirs.losses == ours.losses and len(ours.losses) == 3


# Validations are counted nowhere; stages in the middle need the ends of documents, too.
EVALUATE = "--eval-interval 2 --eval-iters 1"
LAYOUTS = {
    "pp4": (4, f"--pipeline-model-parallel-size 4 --micro-batch-size 1 {EVALUATE}"),
    "pp2-virtual": (
        2,
        "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 "
        "--micro-batch-size 1",
    ),
    "tp2-recompute": (
        2,
        "--tensor-model-parallel-size 2 --recompute-granularity full --recompute-method uniform "
        "--recompute-num-layers 1",
    ),
}


@pytest.fixture(scope="module")
def start(data, start_checkpoint) -> str:
    """The flags of a training of documents, five iterations."""
    return f"--xielu {FLAG} {data} --load {start_checkpoint} --save checkpoints --log-progress"


@pytest.fixture(scope="module")
def one_rank_of_documents(start, tmp_path_factory) -> tuple[Run, str]:
    """One rank, and the FLOPs that Megatron counted."""
    folder = tmp_path_factory.mktemp("one_rank_of_documents")
    run = train(folder, f"{start} {EVALUATE}", model=MODEL)
    return run, counted_flops(folder)


def counted_flops(folder: Path) -> str:
    return re.findall("operations: (.*?)\\t", (folder / "checkpoints/progress.txt").read_text())[-1]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_train_documents_as_one_rank(layout, start, one_rank_of_documents, tmp_path):
    expected, flops = one_rank_of_documents
    ranks, split = LAYOUTS[layout]
    run = train(tmp_path, f"{start} {split}", ranks=ranks, model=MODEL)
    assert run.losses == pytest.approx(expected.losses, rel=2e-6)
    assert run.grad_norms == pytest.approx(expected.grad_norms, rel=1e-3)
    assert counted_flops(tmp_path) == flops
    # The start is of a training of whole samples.
    assert run.output.count(f"was trained without {FLAG}, and this run goes on with it") == 1
