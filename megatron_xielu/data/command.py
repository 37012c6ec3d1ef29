"""The command line of ``tools/prepare_data.py``: flags, and the way from them to finished data."""

from __future__ import annotations

import argparse
import fcntl
import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, NoReturn

from megatron_xielu.common.flags import Limits, flag_of
from megatron_xielu.common.text import is_utf8, without_secrets
from megatron_xielu.data.errors import DataError

if TYPE_CHECKING:
    from megatron_xielu.data.executors import Request
    from megatron_xielu.data.recipe import Recipe
    from megatron_xielu.data.sources import Group
    from megatron_xielu.data.tokenizer_files import TokenizerInfo

_TASK_BYTES = 512e6  # input of a task, where there are files enough
_LEAST_TASK_BYTES = 8e6  # Megatron wants documents of each split in every shard
_PARTS = 4  # that a task has of large files: tasks differ by one of them, a quarter
_FEW_DOCUMENTS = 200
_SHARDS = 64  # docs/benchmarks/data.md has what each costs Megatron
# More than anybody has; Slurm and Ray would wait for it without end.
_TASKS, _GIGABYTES = Limits(1, 10**6), Limits(1, 10**5)
_TOKENS = Limits(1, 10**18, whole=False)
_SHARE = Limits(0, 1, whole=False, below=True)
# Flags that mean nothing to another executor.
_OF_EXECUTORS = {
    "memory_gb": ("slurm", "ray"),
    "ray_address": ("ray",),
    "slurm_partition": ("slurm",),
    "slurm_time": ("slurm",),
    "slurm_option": ("slurm",),
}
_ENTRIES = Limits(257, 10**6)  # a token for every byte, and one that ends a document


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(without_secrets(message))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags."""
    parser = _Parser(
        prog="prepare_data.py",
        description="Text to Megatron's .bin/.idx. The same command goes on where it stopped.",
        epilog="docs/data.md leads from a folder on a laptop to 125B tokens on a cluster.",
    )
    parser.add_argument("--output", required=True, type=Path, help="folder of the result")
    group = parser.add_argument_group("text")
    group.add_argument(
        *("--source", "-s"),
        nargs="+",
        default=[],
        help="files, folders, URLs (s3://, gs://, hf://, …), or names of Hub datasets",
    )
    group.add_argument("--subset", help="configuration of a Hub dataset: sample-350BT")
    group.add_argument(
        "--format", choices=("parquet", "jsonl", "text"), help="default: by the files' names"
    )
    group.add_argument("--glob", nargs="+", help="which files below a folder: '**/*.md' '**/*.rst'")
    group.add_argument("--text-key", default="text", help="column of the text [text]")
    group.add_argument(
        "--skip-bad-rows", action="store_true", help="count and log bad rows, do not stop at them"
    )
    group = parser.add_argument_group("tokens")
    tokenizer = group.add_mutually_exclusive_group()
    tokenizer.add_argument("--tokenizer", help="tokenizer.json, its folder, or a name on the Hub")
    tokenizer.add_argument(
        "--train-tokenizer",
        type=_ENTRIES.read,
        metavar="ENTRIES",
        help="where you have none: train one of so many entries on the text; 32768 for example",
    )
    group.add_argument("--eod-token", help="end of document, where the tokeniser does not say it")
    group.add_argument(
        "--special-tokens-as-text",
        action="store_true",
        help="a text's own <|endoftext|> is text, not the end of a document",
    )
    group.add_argument(
        "--max-tokens", type=_TOKENS.read, help="stop at so many training tokens: 125e9"
    )
    group.add_argument(
        "--valid-fraction", type=_SHARE.read, default=0.01, help="documents held out [0.01]"
    )
    group.add_argument(
        "--split-sentences", action="store_true", help="a sequence a sentence: BERT, T5"
    )
    group.add_argument("--language", default="english", help="of --split-sentences [english]")
    group = parser.add_argument_group("work")
    group.add_argument("--executor", choices=("local", "slurm", "ray"), default="local")
    group.add_argument(
        "--workers", type=_TASKS.read, default=os.cpu_count(), help="tasks at a time"
    )
    group.add_argument("--tasks", type=_TASKS.read, help="[one per 512 MB of input]")
    group.add_argument(
        "--shards",
        type=_TASKS.read,
        help=f"merge those of more tasks into so many, of each split [{_SHARDS}]",
    )
    group.add_argument("--memory-gb", type=_GIGABYTES.read, help="of a Slurm or Ray task [2]")
    group.add_argument("--ray-address", help="[a Ray of its own on this machine]")
    group.add_argument("--slurm-partition")
    group.add_argument("--slurm-time", help="limit of a task [24:00:00]")
    group.add_argument("--slurm-option", action="append", metavar="NAME=VALUE", help="for sbatch")
    group.add_argument("--no-disk-check", action="store_true")
    group = parser.add_argument_group("instead of the work")
    group.add_argument(
        "--blend",
        nargs="+",
        metavar="WEIGHT:FOLDER",
        help="list prepared folders by their share of a run's tokens: 0.7:web 0.3:code",
    )
    group.add_argument(
        "--train-tokens", type=_TOKENS.read, help="of that run: how often it reads each folder"
    )
    group.add_argument("--dry-run", action="store_true", help="say what it would be")
    group.add_argument("--verify", action="store_true", help="check finished data")
    options = parser.parse_args(arguments)
    for name, value in vars(options).items():
        for word in value if isinstance(value, list) else [str(value)]:
            if not is_utf8(word):
                parser.error(f"{flag_of(name)} {word!a} is not UTF-8")
    if options.blend and (options.source or options.tokenizer or options.train_tokenizer):
        parser.error("--blend is of data prepared already; leave out --source and the tokenizer")
    if options.train_tokens and not options.blend:
        parser.error("--train-tokens is of --blend; --max-tokens ends the data")
    if not (options.verify or options.blend) and not (
        options.source and (options.tokenizer or options.train_tokenizer)
    ):
        parser.error(
            "--source and --tokenizer (or --train-tokenizer, where you have none) are needed, but "
            "for --verify and --blend"
        )
    for name, executors in _OF_EXECUTORS.items():
        if getattr(options, name) is not None and options.executor not in executors:
            parser.error(
                f"{flag_of(name)} is of --executor {' and '.join(executors)}, this is --executor "
                f"{options.executor}: leave it out, or say --executor {executors[0]}"
            )
    if any("=" not in option for option in options.slurm_option or ()):
        parser.error("--slurm-option takes NAME=VALUE, account=me for example")
    if any(option.startswith("export=") for option in options.slurm_option or ()):
        parser.error(
            "--slurm-option export: jobs have this command's environment, and all can read their "
            "script: leave it out, and export the variables before"
        )
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; exit status 1 and one message when it cannot."""
    options = parse(arguments)
    try:
        _go_offline(options)
        if options.verify:
            from megatron_xielu.data.verify import verify

            print(verify(options.output, workers=options.workers))
        elif options.blend:
            _blend(options)
        else:
            _prepare(options)
    except (DataError, OSError) as error:
        sys.exit(f"prepare_data.py: error: {without_secrets(str(error))}")
    except KeyboardInterrupt:
        sys.exit("\nstopped; the same command goes on")


def _blend(options: argparse.Namespace) -> None:
    from megatron_xielu.data import blending

    output = _output(options)
    print(blending.blend(output, options.blend, options.train_tokens))
    _say_how_to_train(output)


def _say_how_to_train(output: Path) -> None:
    print(f"DATA_ARGS={quote(str(output))} examples/pretrain.sh   (tokenizer and vocabulary, too)")


def _output(options: argparse.Namespace) -> Path:
    """The folder, absolute.

    Raises:
        DataError: Megatron would not find data there.
    """
    output: Path = options.output.absolute()
    if str(output).split() != [str(output)] or "::" in str(output):
        raise DataError(
            f"--output {str(output)!r}: choose a path without white space, where Megatron cuts "
            "data_args.txt into words, and without ::"
        )
    return output


def _go_offline(options: argparse.Namespace) -> None:
    """Before any Hub library is imported: nothing remote, no attempt to reach the Hub."""
    names = [*options.source, *([options.tokenizer] if options.tokenizer else [])]
    if all(os.path.lexists(name) or name.startswith("file://") for name in names):
        os.environ["HF_HUB_OFFLINE"] = "1"


def _prepare(options: argparse.Namespace) -> None:
    try:
        import datatrove  # noqa: F401
    except ModuleNotFoundError as error:
        raise DataError(
            f"{error}: install this package's extra, pip install 'megatron_xielu[data]'"
        ) from error
    from megatron_xielu.data import (
        blending,
        credentials,
        estimate,
        manifest,
        merging,
        recipe,
        records,
        scheduler,
        tokenizer_files,
    )

    output = _output(options)
    if options.executor == "slurm" and (odd := re.search(r"[^\w@+=:,./-]", str(output))):
        raise DataError(
            f"--output {output}: choose a path without {odd[0]!r}, for --executor slurm puts it "
            "into a batch script"
        )
    if blending.folders_of(output):
        raise DataError(f"--output {output}: it holds a blend; choose another --output")
    _refuse_overlap(options, output)
    request = _request(options)
    inspect = partial(
        tokenizer_files.inspect,
        eod_token=options.eod_token,
        special_as_text=options.special_tokens_as_text,
    )
    inspected = inspect(options.tokenizer) if options.tokenizer else None
    recipe.make_folder(output)
    with _lock(output):
        work = output / "work"
        begun = any((work / "records").glob("*.json")) or (work / "slurm_job").exists()
        if not inspected:  # one that is there may be in use already
            begun |= (output / "tokenizer" / "tokenizer.json").exists()
        before = recipe.load(output) if begun else None
        groups = _find_groups(options, before)
        info, tokenizer_path, config = inspected or inspect(_train(options, groups, output))
        this = _make_recipe(options, info, groups, before)
        changed = recipe.changed_tasks(before, this) if before else []
        tokenizer = tokenizer_files.load(tokenizer_path)
        if tokenizer_files.leaves_out(tokenizer):
            print(
                f"--tokenizer {options.tokenizer}: it has a token neither for every byte nor for "
                "what is unknown, and leaves such characters out of the text; train it with "
                "initial_alphabet=ByteLevel.alphabet(), or with an unk_token",
                file=sys.stderr,
            )
        expected = estimate.estimate(this, tokenizer)
        files = sum(len(group.files) for group in this.groups)
        print(f"{files} files, {this.input_bytes / 1e6:,.1f} MB; {this.tasks} tasks", flush=True)
        _say_uncut(this)
        if options.no_disk_check:
            print("the disk is not checked (--no-disk-check)")
        else:
            print(estimate.check_disk(this, output, expected), flush=True)
        if options.dry_run:
            return
        for task in changed:
            print(f"task {task}: its input was replaced; it is done again", file=sys.stderr)
            records.forget(output, task)
        credentials.save(output)
        this.save(output)  # first: where there is a tokeniser, it says of what
        tokenizer_files.keep(tokenizer_path, config, output / "tokenizer")
        _forget_damaged(this, output)
        left = scheduler.run(this, output, request, expected.train_tokens)
        if merging.forget_others(this, output, left.used):
            _forget_damaged(this, output)
            left = scheduler.run(this, output, request, expected.train_tokens)
        merged = merging.merge(this, output, left.used, options.workers)
        result = manifest.finish(this, output, left.used, merged)
        credentials.remove(output)
    _report(result, output)


def _refuse_overlap(options: argparse.Namespace, output: Path) -> None:
    """Input that is output, too: the next start would read what this one wrote, or write over it.

    Raises:
        DataError: names the flag.
    """
    there = output.resolve()
    for source in options.source:
        place = Path(source.removeprefix("file://"))
        if not os.path.lexists(place):
            continue
        place = place.resolve()
        if place == there or place in there.parents or there in place.parents:
            raise DataError(
                f"--output {output} and --source {source}: one is within the other, and data would "
                "be read as text; choose another --output"
            )
    if (there / "work" / "records").exists() or (there / "manifest.json").exists():
        return  # of an earlier start: its tokeniser and its shards may be written again
    kept, given = there / "tokenizer", options.tokenizer or ""
    if os.path.lexists(given) and Path(given).resolve() in (kept, kept / "tokenizer.json"):
        raise DataError(
            f"--tokenizer {options.tokenizer}: a part of --output {output}, which would be written "
            "over; choose another --output"
        )
    for split in ("train", "valid"):
        for shard in (there / split).glob("*.bin"):
            raise DataError(
                f"--output {output}: {shard} is not of this command; choose another --output"
            )


@contextmanager
def _lock(output: Path) -> Iterator[None]:
    """One command at a time for a folder. Ends with the process, and children do not inherit it."""
    with (output / "work" / "lock").open("w") as stream:
        try:
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(f"--output {output}: another prepare_data.py works on it") from error
        yield


def _train(options: argparse.Namespace, groups: tuple[Group, ...], output: Path) -> str:
    """The folder of the trained tokeniser: of an earlier start, or of now."""
    from megatron_xielu.data import tokenizer_training

    if (kept := output / "tokenizer" / "tokenizer.json").exists():
        print(f"the tokeniser is there: {kept}")
        return str(kept.parent)
    folder = output / "work" / "tokenizer"
    tokenizer_training.make(
        folder,
        groups,
        options.train_tokenizer,
        options.eod_token or tokenizer_training.END_OF_DOCUMENT,
        valid_fraction=options.valid_fraction,
        text_key=options.text_key,
        skip_bad_rows=options.skip_bad_rows,
    )
    return str(folder)


def _find_groups(options: argparse.Namespace, before: Recipe | None) -> tuple[Group, ...]:
    from megatron_xielu.data import credentials, sources

    credentials.forget()
    groups = tuple(
        group
        for source in options.source
        for group in (
            sources.pinned(source, before.groups if before else ())
            or sources.find(source, subset=options.subset, format=options.format, glob=options.glob)
        )
    )
    sources.refuse_twice(groups)
    return groups


def _make_recipe(
    options: argparse.Namespace,
    info: TokenizerInfo,
    groups: tuple[Group, ...],
    before: Recipe | None,
) -> Recipe:
    from megatron_xielu.data import credentials, sentences, sources
    from megatron_xielu.data.recipe import Recipe

    size = sum(file.size for group in groups for file in group.files)
    by_size = max(
        math.ceil(size / _TASK_BYTES), min(options.workers, math.ceil(size / _LEAST_TASK_BYTES))
    )
    tasks = options.tasks or (before.tasks if before else by_size)
    if before:
        part_bytes = before.part_bytes
    else:
        part_bytes = math.ceil(max(size / tasks, _LEAST_TASK_BYTES) / _PARTS)
    parts = sum(len(sources.parts(group, part_bytes)) for group in groups)
    language = options.language if options.split_sentences else None
    return Recipe(
        sources=tuple(map(credentials.hide, options.source)),
        subset=options.subset,
        groups=groups,
        tasks=min(tasks, parts),
        text_key=options.text_key,
        tokenizer=info,
        valid_fraction=options.valid_fraction,
        max_tokens=int(options.max_tokens) if options.max_tokens else None,
        sentences=language,
        punkt_sha256=sentences.fingerprint(language) if language else None,
        skip_bad_rows=options.skip_bad_rows,
        special_tokens_as_text=options.special_tokens_as_text,
        train_tokenizer=options.train_tokenizer,
        part_bytes=part_bytes,
        shards=options.shards or (before.shards if before else _SHARDS),
    )


def _say_uncut(recipe: Recipe) -> None:
    """Name files at which cores will wait for one of them."""
    from megatron_xielu.data.sources import can_be_cut, is_large

    uncut = [
        f"{group.folder.rstrip('/')}/{file.path}"
        for group in recipe.groups
        for file in group.files
        if recipe.part_bytes and is_large(file, recipe.part_bytes) and not can_be_cut(group, file)
    ]
    if uncut:
        print(
            f"{len(uncut)} files are larger than a task's share and read by one task each, "
            f"{uncut[0]} for one: only .parquet and .jsonl without compression can be cut",
            file=sys.stderr,
        )


def _request(options: argparse.Namespace) -> Request:
    from megatron_xielu.data.executors import Request

    if options.executor == "slurm" and not options.slurm_partition:
        raise DataError("--executor slurm needs --slurm-partition; sinfo lists them")
    if options.executor == "ray":
        try:
            import ray  # noqa: F401
        except ModuleNotFoundError as error:
            raise DataError("--executor ray needs Ray: pip install ray") from error
    return Request(
        executor=options.executor,
        workers=options.workers,
        tasks=0,
        memory_gb=options.memory_gb or 2,
        ray_address=options.ray_address,
        slurm_partition=options.slurm_partition or "",
        slurm_time=options.slurm_time or "24:00:00",
        slurm_options=dict(option.split("=", 1) for option in options.slurm_option or ()),
    )


def _forget_damaged(recipe: Recipe, output: Path) -> None:
    """Have truncated and lost shards made again; --verify finds what their sizes do not show."""
    from megatron_xielu.data import merging, records

    merged = merging.forget_damaged(output)
    for task in range(recipe.tasks):
        if problem := records.damage(output, task, merged=task in merged):
            print(f"{problem}: task {task} is done again", file=sys.stderr)
            records.forget(output, task)


def _report(result: dict, output: Path) -> None:
    train, valid = result["train"], result["valid"]
    entries = result["tokenizer"]["vocab_size"]
    print(
        f"{train['tokens']:,} training tokens in {train['documents']:,} documents, "
        f"{valid['tokens']:,} validation tokens in {valid['documents']:,}; "
        f"{train['text_bytes'] / max(train['tokens'], 1):.2f} bytes a token; "
        f"{result['empty_rows']:,} rows without text"
        + (f", {result['bad_rows']:,} bad rows left out" if result["bad_rows"] else "")
    )
    if special := result["special_tokens"]:
        shown = [f"{number:,} of {token!r}" for token, number in special.items()]
        print(
            f"special tokens within documents: {', '.join(shown[:5])}{' …' if shown[5:] else ''}; "
            "where a text spells them, --special-tokens-as-text makes them text (docs/data.md)"
        )
    budget = result["max_tokens"]
    if budget and train["tokens"] < budget:
        print(f"the input has no more: {budget - train['tokens']:,} tokens below --max-tokens")
    least = min(entry["documents"] for entry in result["shards"] if entry["split"] == "train")
    print(f"--data-args-path {quote(str(output / 'data_args.txt'))}   (training documents)")
    if least < _FEW_DOCUMENTS:
        print(
            f"  the smallest shard has {least} documents; with --split, Megatron loops forever on "
            "one that has none for a part of it: use the next line's, or fewer --tasks"
        )
    both = "both" if valid["documents"] else "training documents; none is held out"
    by_split = quote(str(output / "per_split_data_args.json"))
    print(f"--per-split-data-args-path {by_split}   ({both})")
    print(
        "--tokenizer-type HuggingFaceTokenizer --tokenizer-model "
        f"{quote(str(output / 'tokenizer'))}   ({entries:,} entries)"
    )
    if not valid["documents"]:
        print(
            "examples/pretrain.sh validates: choose a larger --valid-fraction, and another --output"
        )
        return
    _say_how_to_train(output)
