"""The tokenizer and generation_config.json that go with an exported model."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_xielu.checkpoints.source import Refused
from megatron_xielu.common.text import reason

_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def load(
    name: str | None, arguments: Namespace, vocabulary: int, report: Callable[[str], None]
) -> Any:
    """The tokenizer to export; None, with a note, if the checkpoint leads to none.

    A local path is never looked up on the hub; a name that is no path is, because it was asked for.

    Args:
        name: what the user named; by default the checkpoint's own, where that is a local folder.
        arguments: the checkpoint's.
        vocabulary: rows of the embedding.
        report: told what was chosen.

    Raises:
        Refused: there is none by that name, or it has more tokens than the model.
    """
    if name is None:
        kind, model = (getattr(arguments, f"tokenizer_{x}", None) for x in ("type", "model"))
        if kind != "HuggingFaceTokenizer" or not model or not Path(model).is_dir():
            report(
                f"no tokenizer: the checkpoint was trained with {kind} ({model}), which is no "
                "local Hugging Face tokenizer; add one with --tokenizer"
            )
            return None
        name = model
    from transformers import AutoTokenizer

    local = Path(name).exists()
    if not local and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise Refused(f"--tokenizer {name}: there is no such folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=local)
    except Exception as error:  # a wrong folder makes it raise whatever comes first
        raise Refused(f"--tokenizer {name} cannot be loaded: {reason(error)}") from error
    if len(tokenizer) > vocabulary:
        raise Refused(
            f"--tokenizer {name} has {len(tokenizer)} tokens, the model {vocabulary} rows; it is "
            "not the one that the model was trained with"
        )
    return tokenizer


def special_ids(tokenizer: Any) -> dict[str, int | None]:
    """Ids that config.json and generation_config.json name."""
    return {name: getattr(tokenizer, name, None) for name in _IDS}


def write(folder: Path, tokenizer: Any, vocabulary: int) -> None:
    """Write both.

    Rows beyond the tokenizer's last token were padding in training and mean nothing: generation
    is told to suppress them.

    Args:
        folder: the model's.
        tokenizer: or None.
        vocabulary: rows of the exported embedding.
    """
    config: dict[str, Any] = special_ids(tokenizer)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
        padding = list(range(len(tokenizer), vocabulary))
        if padding:
            config["suppress_tokens"] = padding
    config = {name: value for name, value in config.items() if value is not None}
    (folder / "generation_config.json").write_text(json.dumps(config) + "\n")
