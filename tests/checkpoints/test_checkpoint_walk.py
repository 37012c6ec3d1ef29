"""Checkpoints at the sizes of real runs, walked without their machines (`checkpoint_walk`).

Megatron's own code lays out and shards the state of every rank; the walk follows each element.
With this package's mends of Megatron nothing may be lost. Without them it must be, and be seen: a
walk that finds nothing wrong with stock Megatron would prove nothing. Many more layouts are walked
by ``tools/walk_checkpoints.py``.
"""

import json
import re
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import pytest
from launch import start, wait
from walk_checkpoints import MODELS, OWN_BUCKETS, Layout, launcher_arguments, split

EXPERTS = "--num-experts 4 --expert-model-parallel-size 2 --moe-router-topk 2"
# An alpha of each expert in one tensor, which ends of a rank's part cut.
GROUPED = "--num-experts 104 --moe-router-topk 2 --moe-grouped-gemm"
UNEVEN = "--decoder-first-pipeline-num-layers 5 --decoder-last-pipeline-num-layers 5"
GROUP = "--xielu-alpha-lr-mult 3 --xielu-alpha-weight-decay 0.1"
FP8 = "--fp8-format hybrid --fp8-recipe tensorwise --first-last-layers-bf16"
NARROW = {"HIDDEN_SIZE": "48", "TIE_EMBEDDINGS": "1"}  # rows that are no multiple of 64 elements

# Models beside those of the tool. In the last one a bucket's end is padding between parameters.
OTHER = {
    "tiny": {"MODEL": "debug"},
    "narrow": {"MODEL": "debug", **NARROW},
}

# With the launcher's bucket size, which does not change with the number of ranks.
BUCKETS = "--ddp-bucket-size 30000"
RESHARDED = [
    *(Layout("tiny", "xielu", 1, 1, data, BUCKETS) for data in (3, 8)),
    Layout("tiny", "xielu", 1, 1, 8, f"{BUCKETS} --ddp-pad-buckets-for-high-nccl-busbw"),
]
WHOLE = [
    Layout("1.1B", "xielu", 1, 1, 88),
    Layout("1.1B", "xielu", 1, 1, 40, OWN_BUCKETS),
    Layout("1.1B", "xielu", 1, 4, 3, UNEVEN),
    Layout("1.1B", "xielu", 1, 2, 3, "--num-layers-per-virtual-pipeline-stage 4"),
    Layout("3B", "xielu", 2, 1, 12, OWN_BUCKETS),
    Layout("8B", "xielu", 1, 1, 9),  # a buffer of more than 2^31 elements
    Layout("tiny", "xielu", 1, 1, 200, "--ddp-bucket-size 100000"),
    Layout("tiny", "xielu", 1, 1, 6, f"{EXPERTS} --ddp-bucket-size 20000"),
    Layout("tiny", "xielu", 1, 1, 12, f"{GROUPED} --ddp-bucket-size 20000"),
    Layout("tiny", "xielu", 1, 1, 6, f"{EXPERTS} --moe-grouped-gemm"),
    Layout("tiny", "xielu", 4, 1, 7, "--ddp-pad-buckets-for-high-nccl-busbw"),
    Layout("tiny", "xielu", 1, 1, 3, "--ddp-bucket-size 1"),  # ranks with a part of some buckets
    Layout("tiny", "xielu", 1, 1, 6, f"--apply-wd-to-norms {GROUP} {FP8}"),  # both move none
    Layout("narrow", "xielu", 1, 2, 3),
    Layout("narrow", "swiglu", 1, 2, 5),
    *RESHARDED,
]

# Layouts in which stock Megatron loses state, and where: format, and what is said of it.
SHIFTED = r"element \d+ is element \d+ of "
EMPTY = "empty bucket encountered"
STOCK = {
    Layout("1.1B", "xielu", 1, 1, 40, OWN_BUCKETS): {"fully_reshardable": SHIFTED},
    Layout("1.1B", "xielu", 1, 1, 88, OWN_BUCKETS): {
        "fully_reshardable": SHIFTED,
        "dp_reshardable": EMPTY,
    },
    Layout("3B", "xielu", 2, 1, 12, OWN_BUCKETS): {"fully_reshardable": SHIFTED},
    Layout("3B", "xielu", 2, 1, 60, OWN_BUCKETS): {"fully_reshardable": SHIFTED},
    Layout("1.1B", "swiglu", 1, 1, 40, OWN_BUCKETS): {"fully_reshardable": SHIFTED},
    # A tied embedding has a bucket of its own, which ends the one before wherever it is.
    Layout("narrow", "swiglu", 1, 2, 5): {
        "fully_reshardable": SHIFTED,
        "dp_reshardable": r"elements \d+ to \d+ are written, and it ends before",
    },
}
CLEAN = Layout("1.1B", "xielu", 1, 1, 32, OWN_BUCKETS)


@cache
def arguments(model: str, activation: str) -> list[str]:
    return launcher_arguments(**(MODELS | OTHER)[model], ACTIVATION=activation)


@pytest.fixture(scope="module")
def walked(tmp_path_factory) -> Callable[[tuple[Layout, ...], str], dict[Layout, dict]]:
    """What the walk says of layouts without some mends; in one process for all."""
    return cache(partial(_walk, tmp_path_factory))


def _walk(tmp_path_factory, layouts: tuple[Layout, ...], without: str) -> dict[Layout, dict]:
    asked = [
        (layout.tensor * layout.pipeline * layout.data, split(arguments(*layout[:2]), layout))
        for layout in layouts
    ]
    command = [str(Path(__file__).with_name("walk_layouts.py"))]
    log = tmp_path_factory.mktemp("walk") / "log.txt"
    processes = start([without, json.dumps(asked)], ranks=1, log=log, command=command)
    assert wait(processes, timeout=500) == [0], log.read_text()[-3000:]
    found = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    return dict(zip(layouts, found, strict=True))


@pytest.mark.parametrize("layout", WHOLE, ids=lambda layout: "-".join(map(str, layout[:5])))
def test_every_element_is_saved_once_and_read_back(layout, walked):
    found = walked(tuple(WHOLE), "")[layout]
    assert found["faults"] == []
    assert found["parameters"] > 40_000
    assert found["ranks"] >= layout.data * layout.pipeline


@pytest.mark.parametrize("layout", STOCK, ids=lambda layout: "-".join(map(str, layout[:5])))
def test_what_stock_megatron_loses_is_seen(layout, walked):
    found = walked((*STOCK, CLEAN), "distributed_optimizer_checkpoints")[layout]
    expected = STOCK[layout]
    for form, text in expected.items():
        assert any(f[0] == form and re.search(text, f[2]) for f in found["faults"]), found["faults"]
    if layout.data == 88:  # ranks that own nothing of the buffer of fp32 alphas
        assert [ranks for *_, text, ranks in found["faults"] if EMPTY in text] == [40]


def test_a_layout_that_stock_megatron_keeps_is_clean(walked):
    assert walked((*STOCK, CLEAN), "distributed_optimizer_checkpoints")[CLEAN]["faults"] == []


def test_fp32_parameters_in_the_wrong_order_are_seen(walked):
    layout = Layout("tiny", "xielu", 1, 1, 2)
    found = walked((layout,), "fp32_parameters")[layout]
    assert {fault[0] for fault in found["faults"]} == {"dp_reshardable", "fully_reshardable"}


def test_buckets_can_be_loaded_at_other_data_parallel_sizes(walked):
    """Padded or not."""
    here, *elsewhere = (walked(tuple(WHOLE), "")[layout] for layout in RESHARDED)
    for there in elsewhere:
        assert here["content"] == there["content"]
        assert here["buckets"] == there["buckets"]
    assert len(here["buckets"][0]) > 1


def test_a_damaged_checkpoint_is_not_in_the_way(walked, tmp_path):
    """The ranks set it aside, and they start only once the preflight has passed."""
    (tmp_path / "latest_checkpointed_iteration.txt").touch()  # so Megatron leaves it on a full disk
    layout = Layout("tiny", "xielu", 1, 1, 2, f"--load {tmp_path}")
    assert walked((layout,), "")[layout]["faults"] == []
