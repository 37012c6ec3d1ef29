"""The host memory that a plan counts, against the caches that Megatron writes."""

import pytest
from dataset_files import write_dataset
from launch import TINY_LLAMA, train

from megatron_xielu.plan import host
from megatron_xielu.plan.run import Cluster, Plan

COMMAND = (
    "--xielu --num-layers 24 --hidden-size 1536 --num-attention-heads 16 --seq-length 4096 "
    "--vocab-size 131072 --bf16 --use-distributed-optimizer --micro-batch-size 5 "
    "--global-batch-size 440 --train-samples 30800000 --eval-interval 1000 --eval-iters 20 "
    "--save out --save-interval 1000"
)


def node(flags: str = "", nodes: int = 11) -> host.Host:
    return host.of(Plan(f"{COMMAND} {flags}".split(), cluster=Cluster(nodes=nodes)))


def test_the_caches_that_megatron_writes(tmp_path):
    """Of a blend of two data sets, of which documents are read in several epochs."""
    model = [word for word in TINY_LLAMA if word != "--mock-data"]
    data = []
    for name, length in (("a", 40), ("b", 90)):
        write_dataset(tmp_path / name, [length] * 50)
        data.append(str(tmp_path / name))
    flags = "--train-iters 40 --eval-iters 2 --eval-interval 20 --split 8,1,1 "
    flags += f"--data-path 1 {data[0]} 3 {data[1]}"
    train(tmp_path, f"{flags} --data-cache-path {tmp_path}/cache --exit-interval 1", model=model)
    written = sum(file.stat().st_size - 128 for file in (tmp_path / "cache").glob("*.npy"))
    indices = host.of(Plan([*model, *flags.split()], cluster=Cluster(1, 1))).indices
    files = 20 * 100  # of the .idx files, which are mapped as well
    assert indices.documents is not None
    # Samples are rounded up, and documents are shuffled whole, for each data set and split.
    assert indices.total - files == pytest.approx(written, rel=0.25)


def test_batches_in_data_workers():
    per_sample = 28 * 4096 + 4096**2
    whole = node()
    assert whole.workers == 8 * 3 * 2 and whole.batches == whole.workers * 2 * 5 * per_sample
    plain = node("--no-create-attention-mask-in-dataloader --num-workers 1 --eval-iters 0")
    assert plain.workers == 8 and plain.batches == 8 * 2 * 5 * 28 * 4096
    tensor = node("--tensor-model-parallel-size 2 --sequence-parallel")
    assert tensor.workers == whole.workers / 2


def test_what_is_known_of_documents(tmp_path):
    unread = node().indices
    assert (unread.documents, unread.seconds) == (None, None) and unread.samples > 22 * 30_800_000
    assert node("--mock-data").indices.total == 0
    write_dataset(tmp_path / "text", [500] * 1000)
    read = node(f"--data-path {tmp_path}/text").indices
    assert read.samples == pytest.approx(12 * 30_800_000, rel=0.05)
    assert read.epochs == pytest.approx(30_800_000 * 4096 / 500_000, rel=0.05)
    assert read.documents == 1000 * (4 * read.epochs + 20)
    assert read.seconds == pytest.approx(1000 * read.epochs * 2.6 / 7.5e6)
    assert node(f"--data-path {tmp_path}/text {tmp_path}/gone").indices.documents is None


def test_copies_of_a_save():
    saved = node()
    part = 14 * Plan(COMMAND.split()).model.parameters() / 88
    assert saved.save == pytest.approx(8 * part)
    assert node("--no-save-optim").save == 0
    assert saved.total == saved.save + saved.batches + saved.indices.total
