"""Walks layouts in one process and prints, for each, a line of JSON with the faults of each format.

Run by test_checkpoint_walk.py, since a walk changes torch for good. Arguments: the mends to
leave out, with commas; a JSON list of layouts, each a list of GPUs and arguments.
"""

import json
import sys

from megatron_xielu.checkpoint_walk import walk
from megatron_xielu.checkpoint_walk.proof import FORMATS


def main() -> None:
    """Walk them."""
    without = [name for name in sys.argv[1].split(",") if name]
    walk.prepare(without=without)
    for gpus, arguments in json.loads(sys.argv[2]):
        result = walk.walk(arguments, gpus, FORMATS, compare_ranks=not without)
        found = {
            "faults": [(f.format, f.parameter, f.text, len(f.ranks)) for f in result.faults],
            "parameters": result.parameters,
            "ranks": result.ranks,
            "buckets": result.buckets,
            "content": sorted(map(repr, result.content)),
        }
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
