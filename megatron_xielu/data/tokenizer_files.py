"""The tokeniser: a ``tokenizer.json`` from a file, a folder or the Hub, kept beside the data.

Tasks read the copy, so that they need no Hub. It is also what to train a model on the data with:
``--tokenizer-type HuggingFaceTokenizer --tokenizer-model OUTPUT/tokenizer``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from megatron_xielu.common import files
from megatron_xielu.data.errors import DataError


@dataclass(frozen=True)
class TokenizerInfo:
    """What must stay the same for the data to stay the same."""

    name: str
    sha256: str
    vocab_size: int
    eod_token: str
    eod_id: int
    dtype: str


def is_local(name: str) -> bool:
    """Whether it is a file or folder here."""
    return Path(name).exists()


def load(path: str | Path) -> Tokenizer:
    """The tokeniser without the truncation and padding that a file can carry."""
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def find(name: str) -> tuple[Path, Path | None]:
    """``tokenizer.json``, and ``tokenizer_config.json`` where there is one, as local files."""
    path = Path(name)
    if path.is_dir():
        path = path / "tokenizer.json"
        if not path.is_file():
            raise DataError(f"--tokenizer {name}: the folder has no tokenizer.json")
    if path.is_file():
        config = path.with_name("tokenizer_config.json")
        return path, config if config.is_file() else None
    from huggingface_hub import hf_hub_download

    try:
        path = Path(hf_hub_download(name, "tokenizer.json"))
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"--tokenizer {name}: no such file or folder, and the Hub says: {reason}"
        ) from error
    try:
        return path, Path(hf_hub_download(name, "tokenizer_config.json"))
    except Exception:  # a tokeniser without one is fine: --eod-token then says what it would have
        return path, None


def inspect(name: str, eod_token: str | None) -> tuple[TokenizerInfo, Path, dict]:
    """The tokeniser's facts, its file, and its ``tokenizer_config.json``.

    Raises:
        DataError: it cannot be loaded, or its end-of-document token is unknown.
    """
    path, config_path = find(name)
    try:
        tokenizer = load(path)
    except Exception as error:
        raise DataError(f"--tokenizer {name}: {path} is no tokenizer.json: {error}") from error
    config = json.loads(config_path.read_text()) if config_path else {}
    named = eod_token or config.get("eos_token")
    eod = named["content"] if isinstance(named, dict) else named
    special = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    if eod is None:
        raise DataError(
            f"--tokenizer {name} does not name its end-of-document token; say --eod-token, "
            f"of its special tokens {special[:20]} for example"
        )
    eod_id = tokenizer.token_to_id(eod)
    if eod_id is None:
        raise DataError(f"--eod-token {eod}: {name} has no such token; special are {special[:20]}")
    entries = max(tokenizer.get_vocab().values()) + 1
    info = TokenizerInfo(
        name=name if not is_local(name) else path.name,
        sha256=files.sha256(path),
        vocab_size=entries,
        eod_token=eod,
        eod_id=eod_id,
        # datatrove's and Megatron's rule: what the largest token needs.
        dtype="int32" if tokenizer.get_vocab_size() > 2**16 else "uint16",
    )
    if info.dtype == "uint16" and entries > 2**16:
        raise DataError(f"--tokenizer {name}: token {entries - 1} with only few others below it")
    return info, path, {"tokenizer_class": "PreTrainedTokenizerFast", **config, "eos_token": eod}


def keep(path: Path, config: dict, folder: Path) -> None:
    """Copy the tokeniser into the output."""
    files.write(folder / "tokenizer.json", path.read_bytes())
    files.write(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
