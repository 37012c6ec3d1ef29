"""Tokens of `byte_text` as a Hugging Face tokenizer: a token is a byte, 256 ends a document.

A converted model generates text with it: ``python -m megatron_xielu.convert to-hf … --tokenizer
runs/demo/text/tokenizer``. ``write`` needs the tokenizers package alone.
"""

from __future__ import annotations

import json
from pathlib import Path

END_OF_DOCUMENT = 256
_END_OF_DOCUMENT_TEXT = "<|endoftext|>"


def byte_characters() -> list[str]:
    """What the byte-level pre-tokenizer turns each byte into: itself where that is a visible
    Latin-1 character, else the next character above 255."""
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)}
    visible |= set(range(ord("®"), ord("ÿ") + 1))
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(b if b in visible else 256 + hidden.index(b)) for b in range(256)]


def write(folder: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``, which AutoTokenizer reads."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(_END_OF_DOCUMENT_TEXT, special=True)])
    assert tokenizer.token_to_id(_END_OF_DOCUMENT_TEXT) == END_OF_DOCUMENT
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": _END_OF_DOCUMENT_TEXT,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(described, indent=2) + "\n")
