"""What a run was, as facts with a name; and in which of them runs differ that are compared."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence

from megatron_xielu.catalog import ABLATIONS, DEFAULTS, PER_LAYER, TRAINABLE
from megatron_xielu.common.flags import flag_of
from megatron_xielu.common.per_layer import in_words
from megatron_xielu.report.run import Run, shortened
from megatron_xielu.report.settings import real_path
from megatron_xielu.report.summary import MISSING, size

_NAMED = 3  # runs in a line; of more their number


def facts(run: Run) -> dict[str, str]:
    """By name, in the order to show them; of arguments, so none where those are not known."""
    args = run.arguments
    if args is None:
        return {}
    return {
        "model": _model(args),
        "MLP": f"ffn {_of(args, 'ffn_hidden_size')}",
        "batch": _batch(args),
        "rates": _rates(args),
        "layout": _layout(args),
        "data": _data(run, args),
        "tokenizer": _tokenizer(run, args),
        "seed": _of(args, "seed"),
        "made with": _of(args, "xielu_made_with"),
    }


def alike(runs: Sequence[Run]) -> dict[str, str]:
    """The facts that all runs share."""
    first, *others = [facts(run) for run in runs]
    return {
        name: text for name, text in first.items() if all(of.get(name) == text for of in others)
    }


def unlike(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """The names of the other facts, then flags of ours, and each run's texts of them."""
    of_runs = [facts(run) for run in runs]
    shared = alike(runs)
    heads = [name for name in dict.fromkeys(n for of in of_runs for n in of) if name not in shared]
    rows = [[of.get(name, MISSING) for name in heads] for of in of_runs]
    for name in ABLATIONS:
        values = [_setting(run, name) for run in runs]
        texts = apart(name, [value for value in values if value is not None])
        if len(texts) > 1:
            heads.append(flag_of(name))
            for row, value in zip(rows, values, strict=True):
                row.append(MISSING if value is None else texts[value])
    return heads, rows


def apart(name: str, values: Iterable[str]) -> dict[str, str]:
    """A short text for each value that a setting has, unlike those of all others."""
    short = {value: shortened(_in_words(name, value)) for value in values}
    same: dict[str, list[str]] = {}
    for value, text in short.items():
        same.setdefault(text, []).append(value)
    found = {}
    for value, text in short.items():
        of = same[text]
        number = f", no. {of.index(value) + 1} of {len(of)} such" if len(of) > 1 else ""
        found[value] = text + number
    return found


def _in_words(name: str, value: str) -> str:
    """One number for each layer by the least and the greatest."""
    if name in PER_LAYER and value.startswith("["):
        return in_words([float(word) for word in value.strip("[]").split(",")])
    return value


def _setting(run: Run, name: str) -> str | None:
    """One of ours, as `settings` has it; None of a run without our activations."""
    if run.arguments is None or run.activation not in TRAINABLE:
        return None
    value = getattr(run.arguments, name, DEFAULTS.get(name, False))
    if value is None:  # of a model from elsewhere
        return "not known"
    return ("no", "yes")[value] if isinstance(value, bool) else str(value)


def tokenizers(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs by their tokenizer; all as one where losses are of the same tokens."""
    if VOCABULARY not in differences(runs):
        return {"": list(runs)}
    groups: dict[str, list[Run]] = {}
    for run in runs:
        of = "unknown" if run.arguments is None else _tokenizer(run, run.arguments)
        groups.setdefault(of, []).append(run)
    return groups


def notes(runs: Sequence[Run]) -> dict[str, list[str]]:
    """What is to be said of single runs, by who they are."""
    by_line: dict[str, list[str]] = {}
    for run in runs:
        for line in run.notes:
            by_line.setdefault(line, []).append(run.short)
    found: dict[str, list[str]] = {}
    for line, of in by_line.items():
        found.setdefault(names(of), []).append(line)
    return found


def differences(runs: Sequence[Run]) -> dict[str, str]:
    """A line for each thing that losses depend on and in which the runs differ, by its name."""
    found = {}
    known = [(run, run.arguments) for run in runs if run.arguments is not None]
    if (unknown := [run.short for run in runs if run.arguments is None]) and len(runs) > 1:
        found[ARGUMENTS] = (
            f"the arguments of {names(unknown)} are not known: whether the losses can be compared "
            "is not known either, and nothing is ranked by them"
        )
    for what, value, means in _COMPARED:
        groups: dict[str, list[str]] = {}
        for run, args in known:
            groups.setdefault(value(run, args), []).append(run.short)
        if what == VOCABULARY and _padding_alone(known):
            continue
        if len(groups) > 1:
            of_groups = "; ".join(f"{names(group)}: {text}" for text, group in groups.items())
            found[what] = f"the runs differ in {what} ({of_groups}): {means}"
    return found


ARGUMENTS = "arguments"  # of some run unknown
VOCABULARY, DATA, SEQUENCE = "tokenizer or vocabulary", "data", "sequence length"


def names(all_names: Sequence[str]) -> str:
    """The first of them, and how many more."""
    more = len(all_names) - _NAMED
    return ", ".join(all_names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _of(args: Namespace, name: str) -> str:
    value = getattr(args, name, None)
    return MISSING if value is None else str(value)


def _model(args: Namespace) -> str:
    text = f"{_of(args, 'num_layers')} layers × {_of(args, 'hidden_size')}"
    text += f", {_of(args, 'num_attention_heads')} heads"
    if getattr(args, "group_query_attention", False):
        text += f" in {_of(args, 'num_query_groups')} groups"
    if getattr(args, "num_experts", None):
        text += f", {args.num_experts} experts"
    tied = not getattr(args, "untie_embeddings_and_output_weights", False)
    return text + f", {'tied' if tied else 'separate'} embeddings"


def _batch(args: Namespace) -> str:
    text = f"{_of(args, 'global_batch_size')} sequences of {_of(args, 'seq_length')} tokens"
    if getattr(args, "rampup_batch_size", None):
        text += f", ramped up: {' '.join(map(str, args.rampup_batch_size))}"
    return text + f" (micro-batches of {_of(args, 'micro_batch_size')})"


def _rates(args: Namespace) -> str:
    unit = "samples" if getattr(args, "train_samples", None) else "iters"
    length = "train_samples" if unit == "samples" else "train_iters"
    decays_norms = getattr(args, "apply_wd_to_norms", False)
    return (
        f"lr {_of(args, 'lr')} to {_of(args, 'min_lr')}, {_of(args, 'lr_decay_style')}, warm-up "
        f"{_of(args, f'lr_warmup_{unit}')} of {_of(args, length)} {unit}, "
        f"{_of(args, 'optimizer')}, weight decay {_of(args, 'weight_decay')}"
        f"{' (of norms too)' if decays_norms else ''}, "
        f"clip {_of(args, 'clip_grad')}"
    )


def _layout(args: Namespace) -> str:
    sizes = (
        f"{letters} {getattr(args, argument)}"
        for letters, argument in (
            ("TP", "tensor_model_parallel_size"),
            ("PP", "pipeline_model_parallel_size"),
            ("CP", "context_parallel_size"),
            ("DP", "data_parallel_size"),
        )
        if getattr(args, argument, None) is not None
    )
    precision = next((name for name in ("bf16", "fp16") if getattr(args, name, False)), "fp32")
    if getattr(args, "fp8", None):
        precision += f" with FP8 ({_of(args, 'fp8_recipe')})"
    return ", ".join([*sizes, precision])


def _data(run: Run, args: Namespace) -> str:
    found = []
    for argument, label in (
        ("data_path", ""),
        ("data_args_path", ""),
        ("per_split_data_args_path", ""),
        ("train_data_path", "train "),
        ("valid_data_path", "valid "),
    ):
        value = getattr(args, argument, None)
        if value:
            words = value if isinstance(value, list) else [str(value)]
            found.append(label + " ".join(real_path(word, run.folder) for word in words))
    if getattr(args, "mock_data", False):
        return "mock data"
    if found and getattr(args, "split", None):
        found.append(f"split {args.split}")
    return ", ".join(found) or MISSING


def _tokenizer(run: Run, args: Namespace) -> str:
    entries, rows = (getattr(args, name, None) for name in ("vocab_size", "padded_vocab_size"))
    text = _tokenizer_file(run, args)
    if entries:
        return f"{text}, {entries:,} entries"
    return f"{text}, {rows:,} entries with padding" if rows else text


def _tokenizer_file(run: Run, args: Namespace) -> str:
    kind = _of(args, "tokenizer_type")
    file = getattr(args, "tokenizer_model", None) or getattr(args, "vocab_file", None)
    return f"{kind} {real_path(file, run.folder)}" if file and not kind.startswith("Null") else kind


def _padding_alone(runs: Sequence[tuple[Run, Namespace]]) -> bool:
    """Whether one vocabulary, padded for other parallel sizes, could be all of theirs."""
    if len({(_tokenizer_file(run, args), _of(args, "vocab_size")) for run, args in runs}) > 1:
        return False
    most, least = math.inf, 0
    for _, args in runs:
        rows = getattr(args, "padded_vocab_size", None) or 0
        multiple = getattr(args, "make_vocab_size_divisible_by", None) or 1
        multiple *= getattr(args, "tensor_model_parallel_size", None) or 1
        most, least = min(most, rows), max(least, rows - multiple + 1)
    return least <= most


def _trained(run: Run, args: Namespace) -> str:
    tokens = run.total_tokens
    return f"{size(tokens)} tokens" if tokens else f"{run.iterations:,} iterations"


_COMPARED: tuple[tuple[str, Callable[[Run, Namespace], str], str], ...] = (
    (
        VOCABULARY,
        _tokenizer,
        "their losses cannot be compared; bits per byte of the same text can "
        "(python -m megatron_xielu.evaluate)",
    ),
    (DATA, _data, "their losses are of different texts, unless these are copies of one"),
    (
        SEQUENCE,
        lambda run, args: _of(args, "seq_length"),
        "longer sequences give more context, and so lower losses",
    ),
    (
        "batch",
        lambda run, args: _of(args, "global_batch_size"),
        "after the same tokens they have taken other numbers of steps",
    ),
    ("length of training", _trained, "the losses at their ends are after more or less of it"),
)
