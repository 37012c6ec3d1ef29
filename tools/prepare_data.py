"""Text to Megatron's ``.bin``/``.idx``, from a folder on a laptop to 125B tokens on a cluster.

    python tools/prepare_data.py --source my_texts --tokenizer tokenizer.json --output data

docs/data.md has the rest; the code is in megatron_xielu/data.
"""

from __future__ import annotations

import sys
from pathlib import Path

try:
    from megatron_xielu.data.command import main
except ModuleNotFoundError:  # a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from megatron_xielu.data.command import main

if __name__ == "__main__":
    from megatron_xielu.common import text

    text.ready_output()
    main()
