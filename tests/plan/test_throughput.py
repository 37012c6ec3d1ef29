"""The published throughput that a plan counts on, against the shapes of the published models."""

import pytest

from megatron_xielu.plan.gpus import BY_NAME, H100
from megatron_xielu.plan.run import Cluster, Plan
from megatron_xielu.plan.throughput import PUBLISHED, expected

# layers, hidden, ffn, heads, query groups, vocabulary, sequence; and what was published: TFLOP/s of
# attention without the causal half, or tokens a second. Each source stands at PUBLISHED.
SHAPES = {
    "Megatron's 300M": ((6, 2048, 6144, 16, 4, 131072, 4096), 140, None),
    "Megatron's 1B": ((16, 2048, 8192, 32, 8, 131072, 4096), 450, None),
    "Megatron's 3B": ((28, 3072, 8192, 24, 8, 131072, 4096), (493 + 505) / 2, None),
    "Megatron's 8B": ((32, 4096, 14336, 32, 8, 131072, 8192), (413 + 430) / 2, None),
    "nanotron's 1B": ((16, 2048, 8192, 32, 8, 128256, 4096), None, 42_000),
    "nanotron's 3B": ((36, 2048, 11008, 16, 4, 128256, 4096), None, 14_000),
    "torchtitan's 8B": ((32, 4096, 14336, 32, 8, 128256, 8192), None, 6_514),
}
FLAGS = (
    "--num-layers {} --hidden-size {} --ffn-hidden-size {} --num-attention-heads {} "
    "--num-query-groups {} --vocab-size {} --seq-length {} --group-query-attention --swiglu "
    "--disable-bias-linear --micro-batch-size 1"
)


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row.who)
def test_published_figures_are_counted_as_the_plan_counts(row):
    shape, printed, tokens = SHAPES[row.who]
    model = Plan(FLAGS.format(*shape).split()).model
    assert row.weights == pytest.approx(model.weights_per_token() / 1e9, rel=1e-3)
    per_token = model.flops_per_token()
    if tokens:
        counted = tokens * per_token / 1e12
    else:
        whole = per_token + 6 * model.layers * model.query_width * model.sequence
        counted = printed * per_token / whole
    assert row.tflops == pytest.approx(counted, abs=0.5)


def test_rows_are_in_the_order_of_their_sizes():
    order = [(row.gpu, row.weights) for row in PUBLISHED]
    gpus = list(dict.fromkeys(gpu for gpu, _ in order))
    assert order == sorted(order, key=lambda row: (gpus.index(row[0]), row[1]))


def test_between_and_beyond_the_published_sizes():
    gh200 = [row for row in PUBLISHED if row.gpu == "gh200"]
    for row in gh200[:-1]:
        assert expected(BY_NAME["gh200"], row.weights * 1e9).value == row.mfu
    between = expected(BY_NAME["gh200"], (1.242e9 * 3.222e9) ** 0.5)
    assert between.value == pytest.approx((410 + 454) / 2 / 989)
    assert between.source == "published on GH200: between Megatron's 1B and Megatron's 3B"
    small, large = expected(H100, 1e8), expected(H100, 70e9)
    assert small.source.endswith("nanotron's 1B; this model is smaller")
    assert large.value == pytest.approx(335 / 989)
    assert large.source.endswith("torchtitan's 8B; this model is larger")
    assert "on H100, not B200" in expected(BY_NAME["b200"], 2e9).source


def test_a_given_mfu_counts():
    command = f"{FLAGS.format(*SHAPES["Megatron's 3B"][0])} --train-iters 5".split()
    plan = Plan(command, cluster=Cluster(gpu=BY_NAME["gh200"], mfu=0.5))
    assert (plan.mfu().value, plan.mfu().source) == (0.5, "as given")
    published = Plan(command, cluster=Cluster(gpu=BY_NAME["gh200"]))
    ratio = published.seconds_per_step() / plan.seconds_per_step()
    assert ratio == pytest.approx(0.5 / (454 / 989), rel=1e-3)
