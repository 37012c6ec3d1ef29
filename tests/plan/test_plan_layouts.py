"""The layouts that fit: each is a plan that can run, and its time the sum of documented terms."""

import re

import pytest
from launch import REPOSITORY
from test_plan import APERTUS_8B, PAPER_1B, PAPER_3B

from megatron_xielu.plan import __main__ as plan_report
from megatron_xielu.plan import checks, layouts
from megatron_xielu.plan.gpus import BY_NAME
from megatron_xielu.plan.run import GIB, Cluster, Plan

LAUNCHED = "--overlap-grad-reduce --overlap-param-gather --cross-entropy-loss-fusion"
# As examples/models and docs/multi-node.md have them.
MODELS = {
    "1.1B": f"{PAPER_1B} --xielu --ffn-hidden-size 9216 --padded-vocab-size 147456",
    "3B": f"{PAPER_3B} --xielu --ffn-hidden-size 12288 --padded-vocab-size 147456",
    "8B": f"{APERTUS_8B}",
}


def plan(model: str, flags: str = "", nodes: int = 8) -> Plan:
    command = f"{MODELS[model]} {LAUNCHED} {flags}"
    return Plan(command.split(), cluster=Cluster(nodes=nodes))


def test_each_layout_fits_and_can_run():
    asked = plan("8B")
    found = layouts.fitting(asked)
    times = [layout.seconds.total for layout in found]
    assert len(found) > 5 and times == sorted(times)
    assert [layout.is_this for layout in found].count(True) == 1
    for layout in found:
        other = asked.with_(
            f"--tensor-model-parallel-size {layout.tensor} --sequence-parallel "
            f"--pipeline-model-parallel-size {layout.pipeline} "
            f"--context-parallel-size {layout.context} --micro-batch-size {layout.micro_batch}"
        )
        assert checks.problems(other, environment={}, check_files=False) == []
        assert layout.gib <= 0.9 * asked.cluster.gpu.memory_gib
        assert layout.seconds == layouts.seconds(other)


def test_the_network_of_a_node_follows_its_gpus():
    gh200 = Cluster(nodes=64, gpus_per_node=4, gpu=BY_NAME["gh200"])
    assert (Cluster().network, gh200.network) == (400, 100)
    assert Cluster(node_network=80.0).network == 80


def test_recomputation_only_where_nothing_else_fits():
    long = plan("8B", "--seq-length 65536 --max-position-embeddings 65536 --global-batch-size 64")
    found = layouts.fitting(long)
    assert any(layout.recomputes for layout in found)
    assert any(layout.context > 1 for layout in found)
    assert not any(layout.recomputes for layout in layouts.fitting(plan("1.1B", nodes=11)))


def test_the_terms_of_a_step():
    alone = layouts.seconds(plan("1.1B", nodes=11))
    assert alone.total == alone.compute == plan("1.1B", nodes=11).seconds_per_step()
    full = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    again = layouts.seconds(plan("1.1B", full, nodes=11))
    assert again.compute == pytest.approx(alone.compute * 4 / 3)
    # Four stages, 20 micro-batches.
    staged = "--pipeline-model-parallel-size 4 --micro-batch-size 1"
    piped = plan("1.1B", staged, nodes=11)
    assert layouts.seconds(piped).bubble == pytest.approx(alone.compute * 3 / 20)
    virtual = plan("1.1B", f"{staged} --num-virtual-stages-per-pipeline-rank 2", nodes=11)
    assert layouts.seconds(virtual).bubble == pytest.approx(alone.compute * 3 / 40)
    # Two micro-batches, 24 layers, ten transfers of half of 5 × 4096 × 1536 bf16 at 450 GB/s.
    split = plan("1.1B", "--tensor-model-parallel-size 2 --sequence-parallel", nodes=11)
    moved = 2 * 24 * 10 * 0.5 * 5 * 4096 * 1536 * 2
    assert layouts.seconds(split).tensor == pytest.approx(moved / 450e9)
    # Six bytes a parameter over 87/88, hidden where it overlaps. A ring over all eight GPUs of a
    # node passes them through its cards once; of two rings each has half of the cards.
    bare = Plan(MODELS["1.1B"].split(), cluster=Cluster(nodes=11))
    sent = 6 * bare.model.parameters() * 87 / 88
    assert layouts.seconds(bare).data == pytest.approx(sent / 400e9)
    assert alone.data == 0
    halves = bare.with_("--tensor-model-parallel-size 2")
    sent = 6 * halves.parameters_on(0) * 43 / 44
    assert layouts.seconds(halves).data == pytest.approx(sent / 200e9)
    # No faster than NVLink, which it passes on the way.
    fast = Plan(bare.argv, cluster=Cluster(nodes=11, node_network=8000))
    sent = 6 * bare.model.parameters() * 87 / 88
    assert layouts.seconds(fast).data == pytest.approx(sent / 450e9)


def test_they_are_listed_where_the_asked_one_does_not_divide_the_batch():
    flags = f"{MODELS['3B']} {LAUNCHED} --tensor-model-parallel-size 1 --micro-batch-size 2"
    asked = Plan(flags.split(), cluster=Cluster(64, 4, BY_NAME["gh200"]))
    [problem] = checks.problems(asked, environment={})
    # Not only more nodes than there are.
    assert "these work: --nodes 80, or --nodes 40, or" in problem
    report = plan_report.text(asked, problems=1)
    assert "CANNOT RUN" in report and "100 GB/s into a node" in report
    assert re.search(r"TP 2 PP 1 CP 1 +5 × 1, ", report)
    # Where it is not the layout, there is nothing to choose.
    fits = asked.with_("--tensor-model-parallel-size 2 --micro-batch-size 5")
    assert "TP 2" not in plan_report.text(fits, problems=1).partition("memory")[2]


def test_hours_have_the_costs_of_the_layout():
    """But where the user says what MFU they saw, which has them in it."""
    tensor = plan("1.1B", "--tensor-model-parallel-size 2 --sequence-parallel", nodes=11)
    assert layouts.seconds_per_step(tensor) == layouts.seconds(tensor).total
    given = Plan(tensor.argv, cluster=Cluster(nodes=11, mfu=0.3))
    assert layouts.seconds_per_step(given) == given.seconds_per_step()


def test_the_table_of_the_docs():
    text = (REPOSITORY / "docs" / "multi-node.md").read_text()
    cell = re.compile(r"(\d+) × (\d+), (\d+) → (\d+), ([\d.]+), ([\d.]+)")
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", text, re.MULTILINE)
    assert len(rows) == 7
    for gpus, cells in rows:
        for model, said in zip(MODELS, cells.split(" | "), strict=True):
            if said == "–":
                continue
            tensor, micro, batch, accumulation, gib, days = cell.match(said).groups()
            flags = f"--tensor-model-parallel-size {tensor} --micro-batch-size {micro} "
            flags += "--sequence-parallel --global-batch-size " + batch
            made = plan(model, flags, nodes=int(gpus) // 8)
            assert checks.memory_of(made) == made.memory().total / GIB, (gpus, model)
            tokens = 126.2e9 if model == "1.1B" else 125.8e9
            steps = tokens / made.tokens_per_step()
            time = layouts.seconds(made).total * steps / 86400
            assert made.accumulation == int(accumulation), (gpus, model)
            assert made.memory().total / GIB == pytest.approx(float(gib), abs=0.051), (gpus, model)
            assert f"{time:.2g}" == days, (gpus, model)
