"""What writing the alphas costs a training step (`megatron_xielu.features.alpha_logging`).

Trains a Llama of 24 layers, as many as the paper's 1.1B, on mock data for three minutes. Of every
two neighbouring steps one, drawn by lot, writes the alphas and the other does not: the difference
is free of what both share, the drift of the machine above all. A step is timed from its start to
that of the next one, so that all of its logging is in it. Further Megatron flags may follow::

    python tools/bench/measure_alpha_logging.py --hidden-size 512 --ffn-hidden-size 3072

What the writing takes depends on the number of layers; the shorter a step, the larger its share.
"""

import math
import random
import statistics
import sys
import tempfile
import time
from typing import Any

from megatron_xielu import pretrain_gpt
from megatron_xielu.common.text import ready_output

WARM_UP = 4  # steps that are left out
FEWEST_PAIRS = 20
FLAGS = """
    --xielu --num-layers 24 --hidden-size 256 --ffn-hidden-size 1536 --num-attention-heads 4
    --seq-length 128 --max-position-embeddings 128 --position-embedding-type rope
    --normalization RMSNorm --disable-bias-linear --mock-data --tokenizer-type NullTokenizer
    --vocab-size 1023 --micro-batch-size 1 --global-batch-size 1 --lr 1e-4
    --train-iters 10000 --exit-duration-in-mins 3
    --eval-iters 0 --eval-interval 100000 --log-interval 1 --tensorboard-log-interval 1
""".split()


class Clock:
    """Seconds at which steps began, and what each did."""

    def __init__(self) -> None:
        self.starts: list[float] = []
        self.writings: list[float] = []  # seconds in it, by step; 0: not written
        self._lot = random.Random(0)
        self._first = False

    def install(self) -> None:
        """Put this clock around Megatron's steps and our writing."""
        from megatron.training import training

        from megatron_xielu.features import alpha_logging

        train_step, write = training.train_step, alpha_logging.write

        def step(*args: Any, **named: Any) -> Any:
            self.starts.append(time.perf_counter())
            return train_step(*args, **named)

        def write_one_of_two(*args: Any) -> None:
            second = len(self.writings) % 2 == 1
            if not second:
                self._first = self._lot.random() < 0.5
            begin = time.perf_counter()
            if self._first != second:
                write(*args)
                self.writings.append(time.perf_counter() - begin)
            else:
                self.writings.append(0.0)

        training.train_step, alpha_logging.write = step, write_one_of_two

    def report(self) -> str:
        """Medians, and the 95 % interval of the difference's, which assumes no distribution.

        Raises:
            SystemExit: there are too few steps.
        """
        seconds = [end - begin for begin, end in zip(self.starts, self.starts[1:], strict=False)]
        without, more = [], []
        for first in range(WARM_UP, len(seconds) - 1, 2):
            plain, written = sorted((first, first + 1), key=lambda step: self.writings[step])
            without.append(seconds[plain])
            more.append(seconds[written] - seconds[plain])
        more.sort()
        count = len(more)
        if count < FEWEST_PAIRS:
            raise SystemExit(
                f"only {count} pairs of steps: give a larger --exit-duration-in-mins, or a smaller "
                "model"
            )
        half_width = 0.98 * math.sqrt(count)  # in ranks: the binomial's standard deviation × 1.96
        step = statistics.median(without)
        middle, low, high = (
            more[min(max(round(rank), 0), count - 1)]
            for rank in (count / 2, count / 2 - half_width, count / 2 + half_width)
        )
        writing = statistics.median(seconds for seconds in self.writings[WARM_UP:] if seconds)
        return (
            f"{count} pairs of steps, medians\n"
            f"a step without the alphas       {step * 1e3:9.2f} ms\n"
            f"more in a step that writes them {middle * 1e3:+9.2f} ms = {middle / step:+.3%} "
            f"(95 % interval {low / step:+.3%} to {high / step:+.3%})\n"
            f"the writing alone               {writing * 1e3:9.2f} ms =  {writing / step:.3%}\n"
            "With --tensorboard-log-interval N, an Nth of this: other steps do nothing."
        )


def main() -> None:
    """Train and print."""
    clock = Clock()
    train = pretrain_gpt._train

    def train_timed(args: Any) -> None:
        clock.install()
        train(args)

    pretrain_gpt._train = train_timed
    with tempfile.TemporaryDirectory() as folder:
        sys.argv[1:] = [*FLAGS, "--tensorboard-dir", folder, *sys.argv[1:]]
        try:
            pretrain_gpt.main()
        except SystemExit as end:  # of Megatron, after the time that it was given
            if end.code:
                raise
    print(clock.report())


if __name__ == "__main__":
    ready_output()
    main()
