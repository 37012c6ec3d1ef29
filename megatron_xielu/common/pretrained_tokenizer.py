"""What a reader of Hugging Face's tokenizer.json and tokenizer_config.json must know.

Python 3.9 can import it, for the plan on a login node.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from megatron_xielu.common import schema


@dataclass(frozen=True)
class _AddedToken:
    content: str


@dataclass(frozen=True)
class _Config:
    bos_token: _AddedToken | str | None = None
    eos_token: _AddedToken | str | None = None
    unk_token: _AddedToken | str | None = None
    sep_token: _AddedToken | str | None = None
    pad_token: _AddedToken | str | None = None
    cls_token: _AddedToken | str | None = None
    mask_token: _AddedToken | str | None = None


SPECIAL_TOKENS = tuple(field.name for field in fields(_Config))


def read_config(path: Path) -> dict[str, Any]:
    """What tokenizer_config.json says, for a tokenizer that encodes as its tokenizer.json does.

    Of a class such as GPT2Tokenizer or LlamaTokenizer, transformers 5 takes the vocabulary from
    tokenizer.json and builds normalizer and pre-tokenizer anew; this one it takes as it is.

    Returns:
        Its fields with that class; of a file that is not there, the class alone.

    Raises:
        Malformed: it is no such file; names it and the field.
        OSError: it cannot be read.
    """
    config = schema.read_json(path) if path.exists() else {}
    schema.check(_Config, config, path)
    config.pop("auto_map", None)  # of code that comes with another class
    return config | {"tokenizer_class": "PreTrainedTokenizerFast"}


def is_path(name: str) -> bool:
    """Whether ``--tokenizer-model`` can only be a path; the Hub's are ``name`` or ``who/name``."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def text_of(token: str | dict[str, Any] | None) -> str | None:
    """A token's text in a checked tokenizer_config.json."""
    return token["content"] if isinstance(token, dict) else token


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """For the tokenizers library: Rust's panics, at some damaged files, are no Exceptions.

    Raises:
        ValueError: in place of a panic.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(str(error)) from None
