"""Checkpoints from Megatron to Hugging Face, and back.

``python -m megatron_xielu.convert``:

to-hf RUN OUT            Megatron → Hugging Face
from-hf MODEL OUT        Hugging Face → Megatron
alphas MODEL OUT.json    of either, for --xielu-alpha-p-init and --xielu-alpha-n-init
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_xielu.checkpoints.source import Refused
from megatron_xielu.common.flags import Limits, output_file
from megatron_xielu.common.text import ready_output, reason

_DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
_ROWS = Limits(1, 9_999_999)  # of a vocabulary
_LEAST_SHARD = 10**3  # bytes
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a conversion; exit with one line on standard error if it is refused."""
    args = _parser().parse_args(argv)
    # As on Ctrl-C, so that what is half written is removed when a job ends.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        args.run(args)
    except (Refused, OSError) as error:
        raise SystemExit(f"megatron_xielu.convert: error: {error}") from None
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("transformers", "safetensors", "tqdm"):
            raise
        raise SystemExit(
            f"megatron_xielu.convert: error: {error}; pip install 'megatron_xielu[hf]'"
        ) from None
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_xielu.convert",
        description="Convert checkpoints between Megatron (torch_dist) and Hugging Face.",
    )
    commands = parser.add_subparsers(required=True, metavar="to-hf | from-hf | alphas")

    export = commands.add_parser("to-hf", help="Megatron → Hugging Face")
    export.set_defaults(run=_to_hf)
    export.add_argument(
        "checkpoint",
        type=_path,
        metavar="RUN",
        help="a run's folder, or its checkpoints folder (its last one), or an iter_… in it",
    )
    export.add_argument("out", type=_path, help="the Hugging Face folder to write")
    export.add_argument(
        "--tokenizer",
        metavar="PATH|NAME",
        help="a Hugging Face tokenizer (default: none; what the checkpoint names is printed)",
    )
    export.add_argument(
        "--max-shard-size", type=_size, default="5GB", metavar="SIZE", help="5GB, 500MB, …"
    )
    export.add_argument(
        "--trim-vocab",
        type=_ROWS.read,
        metavar="N",
        help="keep the first N rows of the vocabulary (default: all, with Megatron's padding)",
    )

    back = commands.add_parser("from-hf", help="Hugging Face → Megatron")
    back.set_defaults(run=_from_hf)
    back.add_argument("model", help="a Hugging Face folder, or with --download a name")
    back.add_argument("out", type=_path, help="the folder to write, for Megatron's --load")
    back.add_argument("--download", action="store_true", help="fetch MODEL from the hub")
    back.add_argument(
        "--make-vocab-size-divisible-by",
        type=_ROWS.read,
        default=1,
        metavar="N",
        help="pad the vocabulary, so that the tensor-parallel size divides it (default: 1)",
    )
    alphas = commands.add_parser("alphas", help="the alphas of a model, for another to start from")
    alphas.set_defaults(run=_alphas)
    alphas.add_argument("model", type=_path, help="a Hugging Face folder, or a run of Megatron's")
    alphas.add_argument("out", type=output_file, help="the JSON file to write")
    for command in (export, back):
        command.add_argument(
            "--dtype", choices=_DTYPES, help="of the weights (default: as stored); alphas are fp32"
        )
    for command in (export, alphas):
        command.add_argument(
            "--trust-pickle",
            action="store_true",
            help="read a legacy checkpoint (mp_rank_*), whose pickles can execute anything",
        )
    for command in (export, back, alphas):
        command.add_argument("--force", action="store_true", help="replace an existing output")
    return parser


def _to_hf(args: argparse.Namespace) -> None:
    from megatron_xielu.checkpoints import before_load
    from megatron_xielu.checkpoints.reader import open_source
    from megatron_xielu.convert import to_hf

    options = to_hf.Options(
        tokenizer=args.tokenizer,
        dtype=_DTYPES.get(args.dtype),
        shard_bytes=args.max_shard_size,
        vocabulary=args.trim_vocab,
        force=args.force,
    )
    source = open_source(args.checkpoint, trust_pickle=args.trust_pickle)
    try:
        fix = "convert another of the run's iter_… folders"
        before_load.read_whole(
            source.folder,
            str(args.checkpoint),
            fix,
            only_model=True,
            trusts_pickles=args.trust_pickle,
        )
    except ValueError as error:
        raise Refused(str(error)) from None
    to_hf.export(source, args.out.absolute(), options)


def _from_hf(args: argparse.Namespace) -> None:
    from megatron_xielu.convert import from_hf

    options = from_hf.Options(
        dtype=_DTYPES.get(args.dtype),
        divisor=args.make_vocab_size_divisible_by,
        force=args.force,
    )
    folder = Path(args.model)
    if not folder.is_dir():
        if not args.download:
            raise Refused(f"{folder} is not a folder; add --download to fetch it from the hub")
        from huggingface_hub import snapshot_download

        patterns = ["*.safetensors", "*.json", "tokenizer*"]
        try:
            folder = Path(snapshot_download(args.model, allow_patterns=patterns))
        except Exception as error:  # of the name, the network or the hub
            raise Refused(f"{args.model} cannot be downloaded: {reason(error)}") from error
    from_hf.convert(folder, args.out.absolute(), options)


def _alphas(args: argparse.Namespace) -> None:
    from megatron_xielu.convert import alphas

    if args.out.exists() and not args.force:
        raise Refused(f"{args.out} exists; choose another file, or replace it with --force")
    alphas.write(args.model, args.out, trust_pickle=args.trust_pickle)


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)\s*([KMG]?B?)", text.upper())
    if not match or match[2] not in _UNITS:
        raise argparse.ArgumentTypeError(f"{text} is not a size such as 5GB or 500MB")
    size = int(float(match[1]) * _UNITS[match[2]])
    if size < _LEAST_SHARD:
        raise argparse.ArgumentTypeError(
            f"{text} is less than 1KB, which would make a file of each tensor; say 5GB or 500MB"
        )
    return size


def _path(text: str) -> Path:
    if "\0" in text:
        raise argparse.ArgumentTypeError("a path cannot have a NUL character")
    return Path(text)


if __name__ == "__main__":
    ready_output()
    main()
