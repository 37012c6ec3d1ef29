"""Reads a run folder into a `Run`.

What cannot be read, or contradicts itself, becomes a note of the run, and the rest is shown.
"""

from __future__ import annotations

import math
import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_xielu.catalog import TRAINABLE, activation_of
from megatron_xielu.checkpoints import saved_arguments
from megatron_xielu.checkpoints.alphas import (
    Alphas,
    count_parameters,
    in_order,
    initial_alphas,
    read_alphas,
)
from megatron_xielu.checkpoints.alphas import beta as beta_of
from megatron_xielu.checkpoints.folder import (
    IN_RUN,
    TwoSaveFolders,
    complete_checkpoints,
    run_folder,
    save_folder,
)
from megatron_xielu.checkpoints.source import Refused
from megatron_xielu.checkpoints.torch_dist import TorchDist
from megatron_xielu.common import data_lists, prepared_data, schema
from megatron_xielu.common.schema import Malformed
from megatron_xielu.common.text import is_number
from megatron_xielu.plan.flags import PlanError
from megatron_xielu.plan.model import Model
from megatron_xielu.report import events, experts
from megatron_xielu.report.errors import NoReport
from megatron_xielu.report.evaluation import Evaluation
from megatron_xielu.report.events import Series
from megatron_xielu.report.nonlinearity import Inputs, Shape, nonlinearity
from megatron_xielu.report.run import History, Layer, Run, depth, name_apart, readable
from megatron_xielu.report.settings import real_path

EVALUATION = "evaluation.json"

_EVENT_FOLDERS = (".", "tensorboard", "events")
_SHOWN_ALPHAS = 1000  # points in time: as many as a picture is wide
_READ_CHECKPOINTS = 50
_AGREEMENT = 1e-5  # event files hold 24 bits, checkpoints too, and softplus rounds between


def find(folder: Path) -> Path:
    """The run's folder, of it or of its checkpoints folder."""
    return folder if folder.is_dir() and _event_files(folder) else run_folder(folder)


def find_all(folders: Sequence[Path]) -> list[Path]:
    """`find` of each, once."""
    return list({os.path.realpath(folder): folder for folder in map(find, folders)}.values())


def load_all(folders: Sequence[Path]) -> list[Run]:
    """Read runs, each once and with a name of its own, and say on standard error which.

    Args:
        folders: of runs, or their checkpoints folders.

    Raises:
        NoReport: a folder is no run.
    """
    runs = []
    for folder in find_all(folders):
        print(f"reading {folder}", file=sys.stderr, flush=True)
        runs.append(load(folder))
    name_apart(runs)
    return runs


def load(folder: Path) -> Run:
    """Read a run.

    Args:
        folder: as `find` gives it.

    Raises:
        NoReport: the folder is none.
    """
    if not folder.is_dir():
        raise NoReport(f"{folder} is not a folder")
    event_files = _event_files(folder)
    try:
        checkpoints = complete_checkpoints(save_folder(folder))
    except TwoSaveFolders as error:
        raise NoReport(str(error)) from None
    evaluation_file = folder / EVALUATION
    if not event_files and not checkpoints and not evaluation_file.exists():
        raise NoReport(_why_no_run(folder))

    notes: list[str] = []
    found = events.read(event_files, wide_limit=_SHOWN_ALPHAS, keep=set(checkpoints))
    notes += found.problems
    if not event_files:
        notes.append("no event files: no curves over time (train with --tensorboard-dir)")
    arguments, parameters = _read_checkpoint(checkpoints, notes)
    if arguments is None:
        arguments = _arguments_of(found.texts, notes)
    if arguments is None:
        notes.append("neither a checkpoint nor its event files have the arguments of the run")
    model = _model(arguments, notes)
    if parameters is None and model is not None:
        parameters = model.parameters()
    evaluation = _read_evaluation(evaluation_file, notes)
    measured = (evaluation.layers if evaluation else None) or []
    run = Run(
        folder=folder,
        name=readable(Path(folder.resolve().name)),
        arguments=arguments,
        scalars=found.scalars,
        samples=found.samples,
        model=model,
        activation=None if arguments is None else activation_of(arguments),
        parameters=parameters,
        evaluation=evaluation,
        bytes_per_token=_bytes_per_token(arguments, evaluation, folder),
        measured={f"layer_{layer.layer:02d}": layer for layer in measured},
        notes=notes,
    )
    if run.train is None and event_files:
        notes.append("no training loss in the event files")
    elif run.diverged is not None:
        notes.append(
            f"diverged: from iteration {run.diverged} on the training loss was not finite, or more "
            "than twice its first"
        )
    elif run.train is not None and not np.isfinite(run.train.values).all():
        count = int((~np.isfinite(run.train.values)).sum())
        notes.append(f"the training loss was not finite in {count} logged iterations")
    if run.activation in TRAINABLE or _rows(run.scalars, "alpha_p"):
        _add_alphas(run, checkpoints)
    return run


def _event_files(run: Path) -> list[Path]:
    """Of the folders that are there, each once."""
    places = {p.resolve(): p for p in map(run.joinpath, _EVENT_FOLDERS) if p.is_dir()}
    return [file for place in places.values() for file in place.glob(events.PATTERN)]


def _why_no_run(folder: Path) -> str:
    inside = [
        path
        for path in sorted(folder.iterdir())
        if path.is_dir() and (_event_files(path) or complete_checkpoints(path / IN_RUN))
    ]
    if inside and {path.name for path in inside} - set(_EVENT_FOLDERS):
        return f"{folder} holds runs but is none; name them: {' '.join(map(str, inside))}"
    return (
        f"{folder} is no run: it has neither event files (in tensorboard/ or events/), nor a "
        f"complete checkpoint (in checkpoints/), nor {EVALUATION}"
    )


def _read_checkpoint(
    checkpoints: dict[int, Path], notes: list[str]
) -> tuple[Namespace | None, int | None]:
    """(arguments, parameters) of the last one."""
    if not checkpoints:
        notes.append("no complete checkpoint in the torch_dist format")
        return None, None
    try:
        last = checkpoints[max(checkpoints)]
        return TorchDist(last).arguments, count_parameters(last)
    except (Refused, OSError) as error:
        notes.append(str(error))
        return None, None


def _arguments_of(texts: dict[str, str], notes: list[str]) -> Namespace | None:
    """The arguments that Megatron wrote into event files."""
    if "num_layers" not in texts:
        return None
    try:
        return saved_arguments.of_texts(texts, "the event files")
    except Refused as error:
        notes.append(str(error))
        return None


def _model(arguments: Namespace | None, notes: list[str]) -> Model | None:
    if arguments is None:
        return None
    for name in ("multi_latent_attention", "hybrid_layer_pattern", "moe_latent_size"):
        if getattr(arguments, name, None):
            notes.append(f"FLOPs are not counted for a model with {name}")
            return None
    try:
        return Model.of(arguments)
    except PlanError as error:
        notes.append(f"FLOPs are not known: {error.problems[0]}")
        return None


def _read_evaluation(path: Path, notes: list[str]) -> Evaluation | None:
    if not path.exists():
        return None
    try:
        return schema.load(Evaluation, path)
    except (OSError, Malformed) as error:
        notes.append(f"{EVALUATION} cannot be read: {error}")
        return None


def _bytes_per_token(
    arguments: Namespace | None, evaluation: Evaluation | None, folder: Path
) -> float | None:
    """Of the training data, by their manifests; else of the text that was evaluated."""
    for argument in data_lists.ARGUMENTS:
        if (value := getattr(arguments, argument, None)) and "test" not in argument:
            if found := _described(argument, value, folder):
                return found
            break
    if evaluation and evaluation.loss and evaluation.bits_per_byte:
        return evaluation.loss / math.log(2) / evaluation.bits_per_byte
    return None


def _described(argument: str, value: Any, folder: Path) -> float | None:
    """Bytes per token of data that Megatron's ``argument`` lists, weighted as there."""
    if argument in data_lists.FILES:
        value = real_path(str(value), folder)
    try:
        listed = data_lists.words(argument, value)
    except ValueError:
        return None
    weights = [float(word) for word in listed if is_number(word)]
    prefixes = [real_path(word, folder) for word in listed if not is_number(word)]
    described = prepared_data.by_folder(prefixes).values()
    shards = {prefix: shard for _, some in described for prefix, shard in some.items()}
    if not all(prefix in shards and shards[prefix].tokens for prefix in prefixes):
        return None
    weights = weights or [float(shards[prefix].tokens) for prefix in prefixes]
    of_each = [shards[prefix].text_bytes / shards[prefix].tokens for prefix in prefixes]
    return float(np.average(of_each, weights=weights)) or None


# Alphas


def _add_alphas(run: Run, checkpoints: dict[int, Path]) -> None:
    name = str(run.activation)
    written = {side: experts.one_a_layer(_rows(run.scalars, f"alpha_{side}")) for side in "pn"}
    saved = _saved_alphas(checkpoints, name, run.notes) if name in TRAINABLE else None
    if saved is not None:
        run.experts = experts.of_last(saved, name, beta_of(run.arguments))
        saved = experts.means(saved)
    if single := written["p"].keys() ^ written["n"].keys():
        run.notes.append(f"event files have only one alpha of {', '.join(sorted(single)[:3])}")
    names = in_order(written["p"].keys() & written["n"].keys()) or (saved.names if saved else [])
    if not names:
        run.notes.append("no alphas: neither in event files nor in checkpoints")
        return
    histories = {side: _history(written[side], names) for side in "pn"}
    if saved is not None and saved.names == names:
        for side, values in (("p", saved.positive), ("n", saved.negative)):
            of_checkpoints = History(np.array(saved.iterations), np.array(values))
            histories[side] = _merged(histories[side], of_checkpoints, run.notes, f"alpha_{side}")
    elif saved is not None:
        run.notes.append("event files and checkpoints have alphas of different layers")
    _keep_pairs(histories, run.notes)
    if not len(histories["p"].iterations):
        run.notes.append("no alphas: at no iteration are all of them known")
        return
    is_new = run.arguments is not None and 0 not in checkpoints  # 0: a converted model
    start = initial_alphas(run.arguments, names) if is_new else None
    if start is not None:
        for side, row in zip("pn", start, strict=True):
            old = histories[side]
            histories[side] = History(
                np.concatenate([[0], old.iterations]),
                np.concatenate([[row], old.values]),
            )
    if run.experts is None and experts.has_experts(names):
        run.notes.append("no checkpoint has the alphas of each expert: no maps of them")
    run.alpha_names, run.alpha_p, run.alpha_n = names, histories["p"], histories["n"]
    norms = _rows(run.scalars, "alpha_grad_norm")
    if set(names) <= set(norms):
        run.alpha_grad_norm = _history(norms, names)
    if run.activation in TRAINABLE:
        run.layers = _layers(run, start)


def _keep_pairs(histories: dict[str, History], notes: list[str]) -> None:
    """Iterations that both sides have, with numbers that alphas can be."""
    iterations = np.intersect1d(histories["p"].iterations, histories["n"].iterations)
    values = np.hstack([history.at(iterations).values for history in histories.values()])
    good = (np.isfinite(values) & (values >= 0)).all(axis=1)
    if not good.all():
        notes.append(
            f"alphas below 0 or not finite from iteration {iterations[~good][0]} on are left out, "
            f"{(~good).sum()} points in time"
        )
    for side, history in histories.items():
        histories[side] = history.at(iterations[good])


def _rows(scalars: dict[str, Series], tag: str) -> dict[str, Series]:
    return {
        name.removeprefix(f"{tag}/"): series
        for name, series in scalars.items()
        if name.startswith(f"{tag}/")
    }


def _saved_alphas(checkpoints: dict[int, Path], name: str, notes: list[str]) -> Alphas | None:
    """Of at most `_READ_CHECKPOINTS`, evenly spaced, with the last."""
    chosen = list(checkpoints)
    stride = -(-len(chosen) // _READ_CHECKPOINTS) or 1
    readable = {i: checkpoints[i] for i in chosen[::-stride][::-1]}
    if not readable:
        return None
    try:
        alphas = read_alphas(readable, name)
    except (Refused, OSError) as error:
        notes.append(f"alphas of checkpoints are left out: {error}")
        return None
    if any(len(row) != len(alphas.names) for row in (*alphas.positive, *alphas.negative)):
        notes.append("alphas of checkpoints are left out: they are of different layers")
        return None
    return alphas if alphas.names else None


def _history(rows: dict[str, Series], names: Sequence[str]) -> History:
    """The iterations that every row has."""
    if not rows:
        return History(np.zeros(0, np.int64), np.zeros((0, len(names))))
    iterations = rows[names[0]].steps
    for name in names[1:]:
        if not np.array_equal(rows[name].steps, iterations):
            iterations = np.intersect1d(iterations, rows[name].steps)
    columns = [rows[name].values[np.isin(rows[name].steps, iterations)] for name in names]
    return History(iterations, np.stack(columns, axis=1))


def _merged(written: History, saved: History, notes: list[str], what: str) -> History:
    """Event files, and checkpoints at iterations that those lack; told where they differ."""
    both, here, there = np.intersect1d(
        written.iterations, saved.iterations, assume_unique=True, return_indices=True
    )
    expected = saved.values[there]
    apart = ~np.isclose(written.values[here], expected, rtol=_AGREEMENT, atol=0).all(axis=1)
    if apart.any():
        notes.append(
            f"{what} at iteration {', '.join(map(str, both[apart][:3]))} is another in the event "
            "files than in the checkpoint: are they of one run?"
        )
    new = ~np.isin(saved.iterations, both)
    iterations = np.concatenate([written.iterations, saved.iterations[new]])
    order = np.argsort(iterations, kind="stable")
    return History(iterations[order], np.concatenate([written.values, saved.values[new]])[order])


def _layers(run: Run, start: tuple[list[float], list[float]] | None) -> list[Layer]:
    assert run.alpha_p is not None and run.alpha_n is not None
    normal, beta = Inputs.standard_normal(), beta_of(run.arguments)
    last = getattr(run.arguments, "num_layers", 0)
    layers = []
    for column, name in enumerate(run.alpha_names):
        alpha_p, alpha_n = (float(h.values[-1, column]) for h in (run.alpha_p, run.alpha_n))
        shape = Shape(str(run.activation), alpha_p, alpha_n, beta)
        measured = run.measured.get(name)
        inputs = measured.inputs if measured else None
        layers.append(
            Layer(
                name=name,
                depth=depth(name, last),
                shape=shape,
                start=(start[0][column], start[1][column]) if start else None,
                by_normal=nonlinearity(shape.value, normal),
                by_measured=None if inputs is None else nonlinearity(shape.value, inputs),
            )
        )
    return layers
