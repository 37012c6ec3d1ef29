"""What writing the alphas costs a training step (`megatron_xielu.alpha_logging`).

Trains a Llama of 24 layers, as many as the paper's 1.1B, for a few steps on mock data, writes at
every step, and prints the time of the writing beside that of the steps. The first step of each is
left out. Further Megatron flags may follow::

    python tools/measure_alpha_logging.py --hidden-size 512 --ffn-hidden-size 3072
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from megatron_xielu import pretrain_gpt

STEPS = 8
FLAGS = f"""
    --xielu --num-layers 24 --hidden-size 256 --ffn-hidden-size 1536 --num-attention-heads 4
    --seq-length 512 --max-position-embeddings 512 --position-embedding-type rope
    --normalization RMSNorm --disable-bias-linear --mock-data --tokenizer-type NullTokenizer
    --vocab-size 1023 --micro-batch-size 1 --global-batch-size 2 --train-iters {STEPS} --lr 1e-4
    --eval-iters 0 --eval-interval 1000 --log-interval 1 --tensorboard-log-interval 1
""".split()


def timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """``function``, keeping how long each call took."""

    def call(*args: Any, **named: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args, **named)
        finally:
            seconds.append(time.perf_counter() - start)

    return call


def main() -> None:
    """Train and print."""
    steps: list[float] = []
    writes: list[float] = []
    train = pretrain_gpt._train

    def train_timed(args: Any) -> None:
        from megatron.training import training

        from megatron_xielu import alpha_logging

        training.train_step = timed(training.train_step, steps)
        alpha_logging.write = timed(alpha_logging.write, writes)
        train(args)

    pretrain_gpt._train = train_timed
    with tempfile.TemporaryDirectory() as folder:
        sys.argv[1:] = [*FLAGS, "--tensorboard-dir", folder, *sys.argv[1:]]
        pretrain_gpt.main()
    step, write = (statistics.median(seconds[1:]) for seconds in (steps, writes))
    print(
        f"median of {len(steps) - 1}: step {step * 1e3:.1f} ms, writing the alphas "
        f"{write * 1e3:.2f} ms ({100 * write / step:.3f} % of a step)"
    )


if __name__ == "__main__":
    main()
