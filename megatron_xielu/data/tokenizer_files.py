"""The tokeniser: a ``tokenizer.json`` from a file, a folder or the Hub, kept beside the data.

Tasks read the copy, so that they need no Hub. It is also what to train a model on the data with:
``--tokenizer-type HuggingFaceTokenizer --tokenizer-model OUTPUT/tokenizer``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer, models, pre_tokenizers

from megatron_xielu.common import files, pretrained_tokenizer
from megatron_xielu.common.schema import Count, Malformed, Positive
from megatron_xielu.common.text import one_line
from megatron_xielu.data.errors import DataError

_LISTS_OF_TOKENS = ("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens")
_MOST_ENTRIES = {"uint16": 2**16, "int32": 2**31}


@dataclass(frozen=True)
class TokenizerInfo:
    """What must stay the same for the data to stay the same."""

    name: str
    sha256: str
    vocab_size: Positive  # one more than the largest id
    eod_token: str
    eod_id: Count
    dtype: Literal["uint16", "int32"]

    def __post_init__(self) -> None:
        if self.eod_id >= self.vocab_size:
            raise ValueError(f"eod_id {self.eod_id} is beyond vocab_size {self.vocab_size}")


def is_local(name: str) -> bool:
    """Whether it is a file or folder here."""
    return os.path.exists(name)


def load(path: str | Path) -> Tokenizer:
    """The tokeniser without the truncation and padding that a file can carry."""
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def leaves_out(tokenizer: Tokenizer) -> bool:
    """Whether characters can vanish from a text: BPE that has a token neither for every byte of
    UTF-8 nor for what is unknown."""
    model = tokenizer.model
    if not isinstance(model, models.BPE) or model.unk_token or model.byte_fallback:
        return False
    # The pre-tokeniser has these characters for themselves; no UTF-8 holds such bytes.
    never = {chr(byte) for byte in (0xC0, 0xC1, *range(0xF5, 0x100))}
    return any(
        model.token_to_id(byte) is None for byte in {*pre_tokenizers.ByteLevel.alphabet()} - never
    )


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Ids of texts, and nothing around them.

    Raises:
        DataError: it has no token for some of it.
    """
    try:
        with pretrained_tokenizer.panics_as_errors():
            encoded = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [one.ids for one in encoded]
    except Exception as error:
        raise DataError(f"--tokenizer cannot encode the text: {one_line(error)}") from error


def find(name: str) -> tuple[Path, Path]:
    """``tokenizer.json`` and ``tokenizer_config.json`` as local files; there may be no second."""
    path = Path(name)
    if os.path.isdir(name):
        path = path / "tokenizer.json"
        if not os.path.isfile(path):
            raise DataError(f"--tokenizer {name}: the folder has no tokenizer.json")
    elif not is_local(name):
        path = _from_hub(name)
    elif not os.path.isfile(name):  # a pipe can be read once
        raise DataError(f"--tokenizer {name}: it is no file; save it as one")
    return path, path.with_name("tokenizer_config.json")


def _from_hub(name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        path = Path(hf_hub_download(name, "tokenizer.json"))
        with suppress(EntryNotFoundError):  # fine: --eod-token then says what it would have
            hf_hub_download(name, "tokenizer_config.json")
    except Exception as error:
        reason = one_line(error)[:300]
        raise DataError(
            f"--tokenizer {name}: no such file or folder, and the Hub says: {reason}"
        ) from error
    return path


def inspect(
    name: str, eod_token: str | None, *, special_as_text: bool = False
) -> tuple[TokenizerInfo, Path, dict[str, Any]]:
    """The tokeniser's facts, its file, and the ``tokenizer_config.json`` to `keep`.

    Raises:
        DataError: it cannot be loaded or its end-of-document token is unknown, or that is a word
            even where special tokens are text.
    """
    path, config_path = find(name)
    try:
        with pretrained_tokenizer.panics_as_errors():
            tokenizer = load(path)
            tokenizer.encode_special_tokens = special_as_text
            vocabulary = tokenizer.get_vocab()
            entries = max(vocabulary.values(), default=-1) + 1
    except Exception as error:
        reason = one_line(error)
        raise DataError(f"--tokenizer {name}: {path} is no tokenizer.json: {reason}") from error
    if getattr(tokenizer.model, "dropout", None):
        raise DataError(
            f"--tokenizer {name}: {path} encodes at random (dropout of its model), each time "
            "otherwise; set it to null"
        )
    try:
        config = pretrained_tokenizer.read_config(config_path)
    except (Malformed, OSError) as error:
        raise DataError(f"--tokenizer {name}: {error}") from error
    eod = eod_token or pretrained_tokenizer.text_of(config.get("eos_token"))
    special = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    if not eod:
        raise DataError(
            f"--tokenizer {name} does not name its end-of-document token; say --eod-token, "
            f"of its special tokens {special[:20]} for example"
        )
    eod_id = vocabulary.get(eod)
    if eod_id is None:
        raise DataError(
            f"--eod-token {eod!r}: {name} has no such token; special are {special[:20]}"
        )
    if special_as_text and eod_id in encode(tokenizer, [eod])[0]:
        raise DataError(
            f"--special-tokens-as-text: {name} encodes the text {eod!r} as its end-of-document "
            f"token even so; have {path} mark that token as special and no merges lead to it"
        )
    # datatrove's and Megatron's rule: what the largest token needs.
    dtype: Literal["int32", "uint16"] = (
        "int32" if len(vocabulary) > _MOST_ENTRIES["uint16"] else "uint16"
    )
    if entries > _MOST_ENTRIES[dtype]:
        raise DataError(f"--tokenizer {name}: token {entries - 1} with only few others below it")
    info = TokenizerInfo(
        name=name if not is_local(name) else path.name,
        sha256=files.sha256(path),
        vocab_size=entries,
        eod_token=eod,
        eod_id=eod_id,
        dtype=dtype,
    )
    return info, path, {**_of_marked(config, special), "eos_token": eod}


def _of_marked(config: dict[str, Any], marked: Collection[str]) -> dict[str, Any]:
    """A configuration without the tokens that tokenizer.json has not marked.

    Transformers would mark them, and encode texts with them otherwise than the data.
    """
    kept = {name: value for name, value in config.items() if name not in _LISTS_OF_TOKENS}
    for use in pretrained_tokenizer.SPECIAL_TOKENS:
        token = pretrained_tokenizer.text_of(kept.pop(use, None))
        if token in marked:
            kept[use] = token
    return kept


def keep(path: Path, config: dict, folder: Path) -> None:
    """Copy the tokeniser into the output."""
    files.write(folder / "tokenizer.json", path.read_bytes())
    files.write(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
