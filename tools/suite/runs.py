"""The runs to evaluate: which checkpoint, in which row of the table, with which seed."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from compare import variants

from megatron_xielu.catalog import ACTIVATIONS
from megatron_xielu.checkpoints.folder import run_folder, size_and_stamp
from megatron_xielu.checkpoints.reader import open_source
from megatron_xielu.checkpoints.source import Refused
from megatron_xielu.convert import to_hf, tokenizer
from megatron_xielu.report.settings import of_arguments


@dataclass(frozen=True)
class Run:
    """One checkpoint.

    Attributes:
        folder: the run's.
        checkpoint: its last one.
        stamp: changes with the checkpoint's files.
        size: of its model, in bytes.
        row: of the table: runs that differ in their seed alone.
        label: the row's, for people.
        seed: as trained.
        tokens: trained on; None where the checkpoint does not say.
        tokenizer: for the export.
        activation: by the name that it has in `catalog`.
        settings: of the training, as `megatron_xielu.report.settings` has them.
    """

    folder: Path
    checkpoint: Path
    stamp: int
    size: int
    row: str
    label: str
    seed: int
    tokens: int | None
    tokenizer: str
    activation: str
    settings: dict[str, str]

    @property
    def name(self) -> str:
        """Of the run among all, and of its folder."""
        return f"{self.row}/seed_{self.seed}"


def read(folders: Iterable[Path], tokenizer_name: str | None) -> list[Run]:
    """The runs, each of which can be exported.

    Args:
        folders: runs', or their checkpoints folders.
        tokenizer_name: ``--tokenizer``.

    Raises:
        Refused: one cannot be read or exported, or does not belong with the others.
    """
    runs: dict[str, Run] = {}
    for folder in folders:
        run = _read(folder, tokenizer_name)
        if (same := runs.get(run.name)) is not None:
            raise Refused(
                f"{same.folder} and {run.folder} are both {run.label} with seed {run.seed}; name "
                "one of them, or have them in folders ROW/seed_N, each ROW a row of the table"
            )
        for other in runs.values():
            if other.row == run.row and other.settings != run.settings:
                raise Refused(_unlike(other, run))
        runs[run.name] = run
    return list(runs.values())


def _read(named: Path, tokenizer_name: str | None) -> Run:
    folder = run_folder(named)
    source = open_source(named, report=lambda line: None)
    arguments = source.arguments
    try:
        architecture = to_hf.architecture_of(source)
    except Refused as error:
        raise Refused(f"{named} cannot be exported to Hugging Face: {error}") from None
    chosen = tokenizer_name or _tokenizer_of_comparison(folder, arguments)
    tokenizer.load(chosen, arguments, architecture.vocabulary, lambda line: None)
    settings = of_arguments(arguments, folder)
    row, label = _row(folder, settings, architecture.activation)
    keys = source.keys()
    return Run(
        folder=folder,
        checkpoint=source.folder.absolute(),
        stamp=size_and_stamp(source.folder)[1],
        size=sum(math.prod(source.shape(key)) * source.dtype(key).itemsize for key in keys),
        row=row,
        label=label,
        seed=_seed(named, arguments),
        tokens=_tokens(arguments),
        tokenizer=chosen,
        activation=architecture.activation,
        settings={**settings, "tokens": str(_tokens(arguments))},
    )


def _row(folder: Path, settings: dict[str, str], activation: str) -> tuple[str, str]:
    """The folder's name in ROW/seed_N, as comparisons have it, else what the checkpoint says.

    Returns:
        The name, and what people read.
    """
    parent = folder.absolute().parent.name
    changes = [variants.told(*of) for of in sorted(settings.items()) if variants.is_change(*of)]
    words, said = zip((activation, ACTIVATIONS[activation].label), *changes, strict=True)
    if not folder.absolute().name.startswith("seed_"):
        return "-".join(words), ", ".join(said)
    if (named := parent.partition("-")[0]) in ACTIVATIONS and named != activation:
        raise Refused(f"{folder} is {activation}, not {named} as its folder says; rename that")
    try:
        variants.parse(parent)
    except ValueError:  # a name of somebody's own
        return parent, ", ".join(said) if parent in ACTIVATIONS else parent
    return parent, ", ".join(said)


def _seed(named: Path, arguments: Namespace) -> int:
    seed = getattr(arguments, "seed", None)
    if seed is None:
        raise Refused(f"{named}: its checkpoint does not say which seed it was trained with")
    return int(seed)


def _tokens(arguments: Namespace) -> int | None:
    samples, length = (
        getattr(arguments, name, None) for name in ("consumed_train_samples", "seq_length")
    )
    return samples * length if samples and length else None


def _tokenizer_of_comparison(folder: Path, arguments: Namespace) -> str:
    """What tools/compare_activations.py has made in OUT, of OUT/VARIANT/seed_N."""
    text = folder.absolute().parent.parent / "text"
    for path in (text / "tokenizer" / "tokenizer.json", text / "tokenizer.json"):
        if path.is_file():
            return str(path)
    kind, model = (getattr(arguments, f"tokenizer_{name}", None) for name in ("type", "model"))
    raise Refused(
        f"{folder} was trained with {kind!a} ({model!a}); add --tokenizer, the folder or the name "
        "on the hub of the tokenizer of its data"
    )


def _unlike(one: Run, other: Run) -> str:
    both = one.settings.keys() | other.settings.keys()
    names = sorted(n for n in both if one.settings.get(n) != other.settings.get(n))
    first = names[0]
    values = " and ".join(str(run.settings.get(first))[:60] for run in (one, other))
    more = f", and in {len(names) - 1} more" if names[1:] else ""
    return (
        f"{one.folder} and {other.folder} are no two seeds of one training, as their row "
        f"{one.label} would say: they differ in {first} ({values}){more}; evaluate them apart, or "
        "have them in folders ROW/seed_N, each ROW a row of the table"
    )
