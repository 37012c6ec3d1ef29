"""Proves of a layout that checkpoints keep the optimizer's state, without its machines.

``python -m megatron_xielu.checkpoint_walk --gpus N -- <megatron arguments>`` prints a line.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence

from megatron_xielu.catalog import GPUS
from megatron_xielu.checkpoint_walk.proof import FORMATS
from megatron_xielu.checkpoint_walk.walk import CannotWalk, Refused, prepare, walk
from megatron_xielu.common import text


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one line about the layout that the command line describes.

    Returns:
        0: the proof holds; 1: it does not; 2: the arguments are refused; 3: it cannot be made.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    split = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(
        prog="python -m megatron_xielu.checkpoint_walk",
        usage="%(prog)s --gpus N [options] -- <the training's arguments>",
        description="Prove of a layout that checkpoints keep the optimizer's state.",
        epilog="Exit status 0: they do; 1: they do not; 2: refused arguments; 3: no proof of them.",
    )
    parser.add_argument(
        "--gpus", type=GPUS.read, required=True, metavar="N", help="GPUs of the whole job"
    )
    parser.add_argument("--both-formats", action="store_true", help="default: that of the training")
    parser.add_argument("--json", action="store_true", help="all that was found, for programs")
    options = parser.parse_args(words[:split])
    if not words[split + 1 :]:
        parser.error("give the training's arguments after --")
    warnings.simplefilter("ignore")
    try:
        prepare()
        result = walk(words[split + 1 :], options.gpus, FORMATS if options.both_formats else None)
    except Refused as error:
        print(f"FAIL: {text.one_line(error)}")
        return 2
    except Exception as error:  # of Megatron, too, on something that it does not do without a GPU
        said = text.one_line(error) or type(error).__name__
        kind = "" if isinstance(error, CannotWalk) else f"{type(error).__name__}: "
        print(f"FAIL: {options.gpus} GPUs: no proof that checkpoints keep the state: {kind}{said}")
        return 3
    if options.json:
        shown = {**vars(result), "faults": [str(fault) for fault in result.faults]}
        del shown["content"]
        print(json.dumps(shown))
    else:
        print(result.line)
    return 1 if result.faults else 0


if __name__ == "__main__":
    text.ready_output()
    sys.exit(main())
