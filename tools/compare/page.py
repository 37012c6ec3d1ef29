"""The page of `megatron_xielu.report` about the runs of a comparison."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from megatron_xielu.common.text import describe, reason
from megatron_xielu.report import __main__ as report
from megatron_xielu.report.run import Run


def write_page(
    folders: Sequence[Path], out: Path, notes: Sequence[str], runs: Sequence[Run] | None = None
) -> Path | None:
    """Have `megatron_xielu.report` write its page of the runs; a failure is only a warning.

    Args:
        folders: of the runs.
        out: for it.
        notes: about all runs.
        runs: those in ``folders``, where they are read already.

    Returns:
        The page, if it was written.
    """
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            report.write(folders, out, notes, runs)
    except (Exception, SystemExit) as error:
        why = reason(error) if isinstance(error, SystemExit) else describe(error)
        print(f"warning: no page in {out}: {why}", flush=True)
        return None
    return out / report.PAGE
