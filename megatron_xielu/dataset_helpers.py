"""Lets a pip-installed Megatron start training: skips a build that cannot work there.

At start, Megatron runs ``make`` in ``megatron/core/datasets`` to build its C++ index helpers and
exits the process when that fails. The wheel of megatron-core ships the built ``helpers_cpp`` but no
Makefile, so every training would end there. A Megatron-LM checkout has the Makefile and builds.
"""

from __future__ import annotations

from pathlib import Path


def skip_build_if_shipped() -> None:
    """Make Megatron's ``compile_helpers`` do nothing where the built helpers came with the wheel.

    Changes nothing in a checkout (a Makefile is there), nor where the built module is missing.
    """
    from megatron.core.datasets import utils

    if (Path(utils.__file__).parent / "Makefile").exists():
        return
    try:
        import megatron.core.datasets.helpers_cpp  # noqa: F401
    except ImportError:
        return  # let Megatron report the missing helpers in its own words

    utils.compile_helpers = lambda: None
