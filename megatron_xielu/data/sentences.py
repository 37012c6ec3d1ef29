"""Sentences of a document, as Megatron's preprocess_data.py splits them: by nltk's Punkt models."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

from megatron_xielu.data.errors import DataError

_SLICE = 1_000_000  # characters that Punkt sees at a time; Megatron's value


def load(language: str) -> Any:
    """nltk's splitter of a language.

    Raises:
        DataError: nltk or the language's Punkt data is missing; says the command that gets it.
    """
    try:
        from nltk.tokenize.punkt import PunktTokenizer
    except ImportError as error:
        raise DataError(
            "--split-sentences needs nltk: pip install 'megatron_xielu[data]'"
        ) from error
    try:
        return PunktTokenizer(language)
    except (LookupError, OSError, ValueError) as error:
        raise DataError(
            f"--split-sentences: the Punkt data for {language!r} is missing; get it with\n"
            f"  {sys.executable} -m nltk.downloader punkt_tab\n"
            "or, on a machine without network, copy it to a folder FOLDER/tokenizers/punkt_tab/"
            f"{language} and set NLTK_DATA=FOLDER"
        ) from error


def fingerprint(language: str) -> str:
    """Hash of the Punkt data: other data, other sentences."""
    import nltk

    load(language)
    digest = hashlib.sha256()
    for path in sorted(Path(str(nltk.data.find(f"tokenizers/punkt_tab/{language}/"))).iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def split(splitter: Any, text: str) -> list[str]:
    """The sentences of a text, in order."""
    return [
        sentence
        for start in range(0, len(text), _SLICE)
        for sentence in splitter.tokenize(text[start : start + _SLICE])
    ]
