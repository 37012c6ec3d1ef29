"""Which releases of Megatron this package works with, and what the older ones do differently.

`docs/versions.md` has the table: this package's entry is for 0.19, ``--spec`` works from 0.17 on,
`megatron_xielu.patch` has a patch per release.
"""

from __future__ import annotations

import importlib.util
import logging
import re
from argparse import Namespace
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_xielu.catalog import BEFORE_0_19

ENTRY = (0, 19)
OLDEST_SPEC, NEWEST_SPEC = (0, 17), (0, 19)

_VERSION_FILE = "megatron/core/package_info.py"

_SPEC = "--spec megatron_xielu.layer_specs xielu_layer_spec --use-te-activation-func"
_PATCH = "python -m megatron_xielu.patch --apply CHECKOUT"


class UnsupportedRelease(ValueError):
    """A Megatron that the way it was asked to train by does not work with."""


def installed() -> tuple[Path, str]:
    """Where the Megatron that this process would import is, and its version; imports none of it.

    Raises:
        ModuleNotFoundError: there is none.
    """
    spec = importlib.util.find_spec("megatron.core")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("No module named 'megatron.core'", name="megatron.core")
    root = Path(spec.origin).parents[2]
    return root, version_in(root)


def version_in(root: Path) -> str:
    """The version of the Megatron in ``root``, without importing it.

    Raises:
        UnsupportedRelease: there is none.
    """
    try:
        text = (root / _VERSION_FILE).read_text(errors="replace")
    except OSError:
        raise UnsupportedRelease(
            f"no {_VERSION_FILE} in {root}: give the folder that holds megatron/"
        ) from None
    numbers = [
        re.search(rf"^{n} *= *([0-9]{{1,9}})\b", text, re.M) for n in ("MAJOR", "MINOR", "PATCH")
    ]
    if not all(numbers):
        raise UnsupportedRelease(f"{root / _VERSION_FILE} names no version")
    return ".".join(number[1] for number in numbers if number)


def release(version: str | None = None) -> tuple[int, int]:
    """Major and minor number of ``version``; default: the installed Megatron's."""
    major, minor = (version or installed()[1]).split(".")[:2]
    return int(major), int(minor)


def check_entry() -> None:
    """Refuse a Megatron that this package's entry was not made for.

    Raises:
        UnsupportedRelease: naming it, and what works with it.
        ModuleNotFoundError: there is no Megatron.
    """
    root, version = installed()
    if release(version) != ENTRY:
        raise UnsupportedRelease(
            f"this entry is for megatron-core {_dotted(ENTRY)}, and {root}/megatron is {version}; "
            f"with it, use Megatron-LM's own script and {_SPEC}, or a patch: {_PATCH}"
        )


def check_spec() -> None:
    """Refuse ``--spec`` on a Megatron that is too old, and say so where it is newer than tested.

    Raises:
        UnsupportedRelease: naming the version.
    """
    root, version = installed()
    if release(version) < OLDEST_SPEC:
        raise UnsupportedRelease(
            f"--spec megatron_xielu.layer_specs needs megatron-core {_dotted(OLDEST_SPEC)} or "
            f"newer, and {root}/megatron is {version}"
        )
    if release(version) > NEWEST_SPEC:
        from megatron.core.utils import log_single_rank

        log_single_rank(
            logging.getLogger(__name__),
            logging.WARNING,
            f"megatron_xielu: --spec is tested up to megatron-core {_dotted(NEWEST_SPEC)}; "
            f"{root}/megatron is {version}",
        )


def _dotted(numbers: tuple[int, int]) -> str:
    return ".".join(map(str, numbers))


def lazy_layer_spec(build: Callable[[], Any]) -> Any:
    """A layer spec that ``build`` makes when Megatron first looks at it.

    Megatron 0.19 calls what ``--spec`` names. Before, it takes it for the spec itself, imported at
    a time of its choice; but what is in ours depends on the arguments.
    """
    from megatron.core.transformer.spec_utils import ModuleSpec

    class LazyLayerSpec(ModuleSpec):
        def __init__(self) -> None:
            pass

        @cached_property
        def _spec(self) -> Any:
            return build()

        module = property(lambda self: self._spec.module)
        params = property(lambda self: self._spec.params)
        submodules = property(lambda self: self._spec.submodules)
        metainfo = property(lambda self: self._spec.metainfo)

    return LazyLayerSpec()


def dense_layer_spec(args: Namespace) -> Any:
    """The layer spec that scripts of 0.17 and 0.18 build for a dense model.

    Raises:
        ValueError: they would build another one; names the flag.
    """
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_local_spec,
        get_gpt_layer_with_transformer_engine_spec,
    )

    for refusal in BEFORE_0_19:
        if refusal.is_given(args):
            raise ValueError(
                f"{refusal.flag} with --spec megatron_xielu.layer_specs needs megatron-core "
                f"{_dotted(ENTRY)} or newer"
            )
    attention = {
        "qk_layernorm": args.qk_layernorm,
        "multi_latent_attention": args.multi_latent_attention,
        "qk_l2_norm": args.qk_l2_norm,
    }
    if args.transformer_impl == "transformer_engine":
        return get_gpt_layer_with_transformer_engine_spec(**attention)
    return get_gpt_layer_local_spec(**attention, normalization=args.normalization)
