"""Loss, perplexity and bits per byte of a ``torch_dist`` checkpoint on prepared data.

``python -m megatron_xielu.evaluate --load RUN --data-path DATA``

The model is the one that `megatron_xielu.pretrain_gpt` trains, with the checkpoint's arguments;
torchrun and Megatron's flags split it in any way, whatever layout it was trained in. Two numbers,
which are not the same:

* **Every token of the data once** (the default): the documents one after the other, in the order of
  the file, cut into sequences of ``--seq-length``. A token is predicted from those before it in its
  sequence, the first of all from the data's last token: in prepared data an end-of-document token,
  as in training. What pads the last sequence is not counted. Bits per byte is the sum of all these
  losses over the bytes of the text, so that tokenisers can be compared.
* **Megatron's validation** (``--eval-iters N``): the samples that training took for the validation
  at the iteration of the checkpoint, drawn and shuffled by Megatron from the data and with the
  seed, split and batch sizes of the checkpoint. It equals the ``lm loss value`` that training
  printed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from argparse import Namespace
from pathlib import Path

from megatron_xielu import startup
from megatron_xielu.checkpoints.folder import save_folder
from megatron_xielu.common.text import one_line, ready_output
from megatron_xielu.evaluate import checkpoint, data, result


def main() -> None:
    """Parse the command line and evaluate."""
    request, megatron_flags = _parse(sys.argv[1:])
    # Megatron prints hundreds of lines about training. Errors and warnings go elsewhere.
    printed = io.StringIO()
    try:
        request.load = save_folder(request.load)
        iteration = checkpoint.check(checkpoint.find(request.load, request.ckpt_step))
        output = result.output_file(request.evaluation_output, request.load)
        prefixes = None if request.eval_iters else data.find(request)
        # What Megatron reads.
        sys.argv[1:] = [*megatron_flags, *(["--cpu"] if request.cpu else [])]
        with contextlib.redirect_stdout(printed):
            startup.start()
            from megatron_xielu.evaluate import run

            evaluation = run.evaluate(request, iteration, prefixes)
        if evaluation is not None:
            result.report(evaluation, output)
    except (ValueError, OSError) as error:
        raise SystemExit(f"megatron_xielu: error: {one_line(error)}") from None
    except SystemExit as end:
        if end.code:
            raise
        # Where it cannot read a checkpoint, Megatron prints why and ends without an error.
        raise SystemExit(
            f"megatron_xielu: error: Megatron ended:\n{printed.getvalue()[-1000:]}"
        ) from None


def _parse(words: list[str]) -> tuple[Namespace, list[str]]:
    """This command's flags, and those that are left to Megatron."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_xielu.evaluate",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
        epilog="All other flags are Megatron's: the layout (--tensor-model-parallel-size …), "
        "--micro-batch-size, --seq-length, the tokenizer's, and any that differs from training.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--load",
        type=Path,
        required=True,
        metavar="RUN",
        help="A run's folder, or its checkpoints folder: its last checkpoint …",
    )
    parser.add_argument("--ckpt-step", type=int, metavar="N", help="… or that of iteration N.")
    parser.add_argument(
        "--data-path",
        nargs="+",
        metavar="DATA",
        help="The folder that tools/prepare_data.py wrote, or prefixes of .bin/.idx files. With "
        "--eval-iters: Megatron's flag, in place of the training's data.",
    )
    parser.add_argument("--data-args-path", type=Path, metavar="FILE", help="A file of prefixes.")
    parser.add_argument(
        "--per-split-data-args-path",
        type=Path,
        metavar="FILE",
        help="A JSON file of prefixes by split.",
    )
    parser.add_argument(
        "--data-split",
        choices=("train", "valid", "test", "all"),
        help="Which part of data that has parts (a prepared folder, a file by split); valid if not "
        "given.",
    )
    parser.add_argument(
        "--eval-iters",
        type=int,
        metavar="N",
        help="Megatron's validation number at the checkpoint's iteration, of N batches; as many as "
        "in training give the number that training printed.",
    )
    parser.add_argument(
        "--activation-statistics",
        action="store_true",
        help="Also the share of negative pre-activations of each layer's MLP, their mean, standard "
        "deviation and histogram.",
    )
    parser.add_argument(
        "--evaluation-output",
        type=Path,
        metavar="FILE.json",
        help="Where to write the result (RUN/evaluation.json).",
    )
    parser.add_argument("--cpu", action="store_true", help="Run on the CPU over gloo.")
    request, rest = parser.parse_known_args(words)
    if request.eval_iters is not None and request.eval_iters < 1:
        parser.error("--eval-iters must be 1 or more")
    return request, rest


if __name__ == "__main__":
    ready_output()
    main()
