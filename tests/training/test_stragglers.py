"""--straggler-ratio: a rank that is slow by itself is named, and none that waits for it."""

import re

import pytest
from launch import train

from megatron_xielu.features.stragglers import FLAG, slow_ranks

# Rank 1 takes half a second longer for each loss; all wait for it when gradients are summed.
ONE_IS_SLOW = """
import os, time
from megatron_xielu import pretrain_gpt

train = pretrain_gpt._train

def slow_train(args):
    from megatron_xielu import training_step

    loss_func = training_step.loss_func

    def slow_loss(*given):
        time.sleep(0.5 * (os.environ["RANK"] == "1"))
        return loss_func(*given)

    training_step.loss_func = slow_loss
    train(args)

pretrain_gpt._train = slow_train
pretrain_gpt.main()
"""


def test_the_slow_rank_is_named(tmp_path):
    flags = f"--use-distributed-optimizer --overlap-grad-reduce {FLAG} 5 --xielu"
    run = train(tmp_path, flags, ranks=2, command=("-c", ONE_IS_SLOW))
    told = re.findall(r"\[event\] .* rank=(\d+) event=straggler .*reason=(.*)", run.output)
    assert [rank for rank, _ in told] == ["1"]  # once, though each step is
    times = float(re.search(r" ([\d.]+) times the median", told[0][1])[1])
    assert times > 5


@pytest.mark.parametrize(
    ("times", "stages", "found"),
    [
        ([10, 10, 10, 13], [0, 0, 0, 0], {3: 1.3}),
        ([10, 10, 30, 30], [0, 0, 1, 1], {}),  # stages differ, and may
        ([10, 10, 10, 40, 30, 30], [0, 0, 0, 0, 1, 1], {3: 4.0}),
        ([0, 0], [0, 0], {}),
    ],
)
def test_slow_ranks(times, stages, found):
    assert slow_ranks(times, stages, 1.2) == found
