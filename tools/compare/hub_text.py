"""A pinned file of FineWeb-Edu, the paper's data, from the Hugging Face Hub.

Revision, size and sha256 as several public projects have recorded them; the sha256 is checked
here, too. It is the last and smallest of the fourteen files of ``sample/10BT``, in which pages of
all crawls are mixed; the first 120 MB of its text are taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_xielu.common import files
from megatron_xielu.common.text import one_line

_SECONDS = 3.0  # each of its two tries; then the Hub is taken for one that does not answer


class NoAnswer(Exception):
    """The Hub does not give the file; with what it or the network says."""


@dataclass(frozen=True)
class HubFile:
    """A parquet file of a dataset with a column ``text``, of which ``most`` bytes are used."""

    dataset: str
    revision: str
    path: str
    size: int
    sha256: str
    licence: str
    most: int

    @property
    def label(self) -> str:
        """Dataset and file."""
        return f"{self.dataset} {self.path}"

    def describe(self) -> dict[str, Any]:
        """What a later run compares, to tell whether its text is the same."""
        return {self.label: self.sha256, "bytes": self.most}

    def fetch(self) -> Path:
        """The file in the Hub's cache (``HF_HOME``), downloaded unless it is there.

        Raises:
            NoAnswer: it cannot be had.
        """
        try:
            import pyarrow.parquet  # noqa: F401  # not after half a gigabyte has been downloaded
            from huggingface_hub import (
                get_hf_file_metadata,
                hf_hub_download,
                hf_hub_url,
                try_to_load_from_cache,
            )

            where: dict[str, Any] = {"repo_type": "dataset", "revision": self.revision}
            if not isinstance(
                found := try_to_load_from_cache(self.dataset, self.path, **where), str
            ):
                # One question without a repetition: the download asks six times.
                url = hf_hub_url(self.dataset, self.path, **where)
                get_hf_file_metadata(url, timeout=_SECONDS)
                found = hf_hub_download(self.dataset, self.path, **where)
        except Exception as error:
            raise NoAnswer(one_line(error)[:200]) from error
        return Path(found)

    def documents(self) -> Iterator[tuple[str, str, str]]:
        """Source, name and text of each page.

        Raises:
            SystemExit: the file cannot be had, or is not the pinned one.
        """
        try:
            path = self.fetch()
        except NoAnswer as error:
            raise SystemExit(
                f"compare: the Hub does not give {self.label}, with which this text was begun; try "
                f"again, or choose another folder with --out: {error}"
            ) from None
        if (found := files.sha256(path)) != self.sha256:
            raise SystemExit(
                f"compare: {path} has sha256 {found}, not {self.sha256}; it is not used: delete it"
            )
        from pyarrow.parquet import ParquetFile

        taken = 0
        for batch in ParquetFile(path).iter_batches(1000, columns=["id", "text"]):
            for page in batch.to_pylist():
                if taken >= self.most:
                    return
                taken += len(page["text"].encode())
                yield self.label, page["id"], page["text"]


SAMPLE = HubFile(
    "HuggingFaceFW/fineweb-edu",
    revision="87f09149ef4734204d70ed1d046ddc9ca3f2b8f9",
    path="sample/10BT/013_00000.parquet",
    size=540_632_672,
    sha256="b393f51fefab26cd6f4c8f65707c1924f6666c4961a0ebebe04bb57f7ec832de",
    licence="ODC-By-1.0",
    most=120_000_000,
)
