"""Runs any Megatron training script on the CPU.

``python -m megatron_xielu.cpu SCRIPT.py …``
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

from megatron_xielu.common import text, torchrun
from megatron_xielu.cpu import activate, add_cpu_flags, hide_gpus
from megatron_xielu.kernels import choose


def main() -> None:
    """Run the script named on the command line with the redirections and CPU flags in place."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        raise SystemExit("usage: python -m megatron_xielu.cpu SCRIPT.py [MEGATRON ARGUMENTS …]")
    script = Path(sys.argv[1])
    if not script.is_file():
        raise SystemExit(f"megatron_xielu.cpu: no such script: {script}")
    try:
        torchrun.check(os.environ)
        choose.check_forced("cpu")
    except ValueError as error:
        raise SystemExit(f"megatron_xielu.cpu: {error}") from None
    sys.argv = [str(script), *add_cpu_flags(sys.argv[2:])]
    # As for `python SCRIPT.py`: a Megatron-LM checkout beside the script is the one to import.
    sys.path.insert(0, str(script.resolve().parent))
    hide_gpus()
    activate()
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    text.ready_output(colours=True)
    main()
