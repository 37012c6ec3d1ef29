"""The tokenizer and generation_config.json that go with an exported model.

A model must come with the tokenizer that its data had. tools/prepare_data.py encodes as
tokenizer.json says, so that file travels byte for byte, and the exported folder is tried on a
sample of texts before it is in place.
"""

from __future__ import annotations

import json
import os
import shlex
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from megatron_xielu.checkpoints.source import Refused
from megatron_xielu.common import pretrained_tokenizer
from megatron_xielu.common.schema import Malformed
from megatron_xielu.common.text import reason

_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_TOKENIZER, _CONFIG = "tokenizer.json", "tokenizer_config.json"
_OTHERS = (
    *("special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "additional_chat_templates/*.jinja"),
)
FILES = (_TOKENIZER, _CONFIG, *_OTHERS)
_ON_THE_HUB = (*FILES, "config.json", "*.model", "vocab.*", "merges.txt")

# What pipelines differ in: spaces, case, digits, contractions, code, accents (composed and not),
# scripts with and without spaces, right to left, joined emoji, what stands for a space.
_SAMPLE = [
    *("", " ", "a  b   c\td\n\n\ne\r\n  f", "def f(x):\n    return x**2  # a_b != c->d\n"),
    *"""  Hello World, leading spaces
CamelCase HTTPServer iPhone ALLCAPS
1 12 123 1234 12345678 3.14 1,000,000 ½ ٣
don't we'll I'VE “quoted” — so…
café cafe\u0301 naïve ﬁne Ⅳ ① Straße İstanbul ŒUVRE
{"k": [1, null]} <a href="/x?y=z&amp;"> https://example.org/a_b-c?d=1#e
Привет, мир! Ёж
Γειά σου Κόσμε
你好，世界。今天是2024年
日本語のテキスト
한국어 문장입니다
สวัสดีชาวโลก
नमस्ते दुनिया
مرحبا بالعالم
שלום עולם
👩\u200d👩\u200d👧 👍🏽 🇨🇭 ∑ α² ≠ ∞
\u00a0no\u2003break\u200bzero ▁under Ġbyte ##word""".split("\n"),
]


@dataclass(frozen=True)
class Words:
    """A tokenizer to export.

    Attributes:
        name: as the user knows it.
        files: contents by path below the model's folder.
        entries: one more than the largest id.
        sample: ids by text, as in the training data.
    """

    name: str
    files: dict[str, bytes]
    entries: int
    sample: dict[str, list[int]]


def load(
    name: str | None, arguments: Namespace, vocabulary: int, report: Callable[[str], None]
) -> Words | None:
    """The tokenizer to export; None, with a note, if none is named.

    A local path is never looked up on the hub; a name that is no path is, because it was asked for.
    What the checkpoint names was not: whoever wrote it would choose which files are opened here.

    Args:
        name: what the user named.
        arguments: the checkpoint's.
        vocabulary: rows of the embedding.
        report: told what was chosen, and what the training may have seen otherwise.

    Raises:
        Refused: there is none by that name, or it has more tokens than the model.
    """
    if name is None:
        kind, model = (getattr(arguments, f"tokenizer_{x}", None) for x in ("type", "model"))
        fix = "add a Hugging Face tokenizer with --tokenizer"
        if kind == "HuggingFaceTokenizer" and model and model.isprintable():
            fix = f"if you trust it, add --tokenizer {shlex.quote(model)}"
        report(f"no tokenizer: the checkpoint was trained with {kind!a} ({model!a}); {fix}")
        return None
    try:
        return _load(name, vocabulary, report)
    except (Malformed, OSError) as error:
        raise Refused(f"--tokenizer {name}: {reason(error)}") from None


def _load(name: str, vocabulary: int, report: Callable[[str], None]) -> Words:
    folder = _find(name)
    with TemporaryDirectory() as converted:
        kept = folder
        if not (folder / _TOKENIZER).is_file():
            kept = Path(converted)
            _open(folder, name).save_pretrained(kept)
            if not (kept / _TOKENIZER).is_file():
                raise Refused(
                    f"--tokenizer {name} has no {_TOKENIZER}, and transformers can make none of "
                    "it; copy the tokenizer into the exported folder yourself"
                )
        files = {
            str(path.relative_to(kept)): path.read_bytes()
            for pattern in (_TOKENIZER, *_OTHERS)
            for path in kept.glob(pattern)
        }
        config = pretrained_tokenizer.read_config(kept / _CONFIG)
    words = _words(name, files)
    if words.entries > vocabulary:
        raise Refused(
            f"--tokenizer {name} has {words.entries} tokens, the model {vocabulary} rows; it is "
            "not the one that the model was trained with"
        )
    try:
        loaded = _open(folder, name)
    except Refused:  # so that Megatron has not read it either
        pass
    else:
        _compare_with_megatron(loaded, words, kept == folder, report)
        config = _special_tokens(loaded, words) | config
    if not config.get("eos_token"):
        report(
            f"note: {name} names no eos_token, so that generation does not end by itself; the "
            "folder that tools/prepare_data.py keeps beside the data names it"
        )
    files[_CONFIG] = (json.dumps(config, indent=2) + "\n").encode()
    return words


def _find(name: str) -> Path:
    """Its folder, on this machine."""
    if os.path.exists(name):
        return Path(name).parent if Path(name).name == _TOKENIZER else Path(name)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise Refused(f"--tokenizer {name}: there is no such folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(_ON_THE_HUB)))
    except Exception as error:
        raise Refused(
            f"--tokenizer {name}: there is no such folder, and the hub says: {reason(error)}"
        ) from None


def _open(folder: Path, name: str) -> Any:
    """What transformers makes of a folder, and Megatron with it."""
    from transformers import AutoTokenizer

    with _refused(f"--tokenizer {name} cannot be loaded"):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


@contextmanager
def _refused(message: str) -> Iterator[None]:
    """At a wrong file, transformers and tokenizers raise whatever comes first."""
    try:
        with pretrained_tokenizer.panics_as_errors():
            yield
    except Exception as error:
        raise Refused(f"{message}: {reason(error)}") from None


def _encode(tokenizer: Any, texts: list[str], name: str, **options: Any) -> list[list[int]]:
    """By a tokenizer of transformers."""
    with _refused(f"--tokenizer {name} is loaded, and cannot encode"):
        return tokenizer(texts, **options)["input_ids"]


def _words(name: str, files: dict[str, bytes]) -> Words:
    from tokenizers import Tokenizer

    with _refused(f"--tokenizer {name}: its {_TOKENIZER} cannot be used"):
        tokenizer = Tokenizer.from_str(files[_TOKENIZER].decode())
        tokenizer.no_truncation()
        tokenizer.no_padding()
        entries = max(tokenizer.get_vocab().values(), default=-1) + 1
        if not entries:
            raise ValueError("its vocabulary is empty")
        added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    sample = {}
    for text in [*_SAMPLE, *added, *(f"a{token} B{token}{token}" for token in added)]:
        with suppress(Exception), pretrained_tokenizer.panics_as_errors():  # unknown to it
            sample[text] = tokenizer.encode(text, add_special_tokens=False).ids
    return Words(name, files, entries, sample)


def _different(tokenizer: Any, words: Words) -> list[str]:
    """Texts of the sample that a tokenizer of transformers encodes otherwise."""
    found = _encode(tokenizer, list(words.sample), words.name, add_special_tokens=False)
    return [
        text
        for (text, expected), ids in zip(words.sample.items(), found, strict=True)
        if ids != expected
    ]


def _special_tokens(loaded: Any, words: Words) -> dict[str, str]:
    """Those of tokenizer.json, by use: GPT-2's folder names none, its class does, and that is not
    the class of the export."""
    ids = loaded.get_vocab()
    named = loaded.special_tokens_map.items()
    return {use: x for use, x in named if ids.get(x, words.entries) < words.entries}


def _compare_with_megatron(
    loaded: Any, words: Words, has_file: bool, report: Callable[[str], None]
) -> None:
    """Data that Megatron's own tool tokenised is as transformers loads the folder."""
    different = _different(loaded, words)
    if not different:
        return
    what = (
        f"transformers, and so Megatron, loads {words.name} as {type(loaded).__name__}, which "
        f"encodes {len(different)} of {len(words.sample)} sample texts otherwise than"
    )
    if not has_file:
        raise Refused(f"--tokenizer: {what} the {_TOKENIZER} that transformers makes of it")
    report(
        f"note: {what} its {_TOKENIZER}, which tools/prepare_data.py follows and so does this "
        "export; for data of Megatron's own tool, --tokenizer a folder that "
        "AutoTokenizer.from_pretrained(…).save_pretrained(…) wrote of it"
    )


def write(
    folder: Path, words: Words | None, vocabulary: int, report: Callable[[str], None]
) -> dict[str, int | None]:
    """Write both; returns the ids that config.json names, too.

    Rows beyond the tokenizer's last token were padding in training and mean nothing: generation
    is told to suppress them.

    Args:
        folder: the model's, with a config.json, by which transformers chooses a tokenizer's class.
        words: or None.
        vocabulary: rows of the exported embedding.
        report: told what the tokenizer adds to a text.

    Raises:
        Refused: transformers would encode otherwise than the data was encoded.
    """
    loaded = None
    config: dict[str, Any] = {}
    if words is not None:
        for path, content in words.files.items():
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_bytes(content)
        loaded = _open(folder, words.name)
        if different := _different(loaded, words):
            raise Refused(
                f"--tokenizer {words.name}: exported, transformers would encode "
                f"{different[0][:40]!a} otherwise than {_TOKENIZER}, and so than the training "
                f"data; see what its {_CONFIG} changes (added_tokens_decoder, "
                "split_special_tokens, …)"
            )
        entries = max(loaded.get_vocab().values()) + 1
        if entries > vocabulary:
            raise Refused(
                f"--tokenizer {words.name}: its {_CONFIG} adds tokens up to id {entries - 1}, and "
                f"the model has {vocabulary} rows; remove them there"
            )
        if padding := list(range(entries, vocabulary)):
            config["suppress_tokens"] = padding
        if added := _encode(loaded, [""], words.name)[0]:
            shown = " ".join(loaded.convert_ids_to_tokens(added))
            report(
                f"note: the tokenizer adds {shown} to every text, which tools/prepare_data.py does "
                "not; add_special_tokens=False leaves it out"
            )
    ids = {name: getattr(loaded, name, None) for name in _IDS}
    config |= {name: value for name, value in ids.items() if value is not None}
    (folder / "generation_config.json").write_text(json.dumps(config) + "\n")
    return ids
