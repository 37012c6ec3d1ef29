"""The plan's command refuses what makes no sense, in lines that name the flag."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import pytest
from hostile import damaged, damaged_bytes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_xielu.catalog import NUMBERS
from megatron_xielu.common import data_lists
from megatron_xielu.plan import __main__ as plan
from megatron_xielu.plan import variables

COMMAND = """
    --xielu --num-layers 24 --hidden-size 1536 --num-attention-heads 16 --ffn-hidden-size 9216
    --seq-length 4096 --max-position-embeddings 4096 --vocab-size 131072 --bf16
    --use-distributed-optimizer --micro-batch-size 5 --global-batch-size 440
    --train-samples 30800000 --save out --save-interval 1000
"""


def run(flags: str, options: str = "--nodes 11", command: str = COMMAND) -> list[str]:
    """What the command writes to standard error; nothing if it succeeds."""
    error = io.StringIO()
    words = [*options.split(), "--", *command.split(), *flags.split()]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(error):
        try:
            plan.main(words)
        except SystemExit as end:
            assert end.code == 2
            return error.getvalue().splitlines()
    assert not error.getvalue()
    return []


def test_the_command_itself_is_good():
    assert run("") == []
    # As `checkpoints watch` takes it.
    assert run("", "--nodes 11 --keep-checkpoints 3 --keep-every 0") == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--make-vocab-size-divisible-by 0", "must be 1 or more, not 0"),
        ("--num-query-groups 0", "must be 1 or more, not 0"),
        ("--num-query-groups 0 --group-query-attention", "must be 1 or more, not 0"),
        ("--ffn-hidden-size 0", "must be 1 or more, not 0"),
        ("--micro-batch-size -1", "must be 1 or more, not -1"),
        (f"--micro-batch-size {10**29}", f"must be at most 2147483647, not {10**29}"),
        (f"--train-samples {10**29}", "must be at most 9223372036854775807"),
        ("--save-interval -1", "must be 0 or more, not -1"),
        ("--save-retain-interval 0", "must be 1 or more, not 0"),
        ("--lr-warmup-samples -5", "must be 0 or more, not -5"),
        ("--lr-warmup-fraction 2", "must be below 1, not 2.0"),
        ("--lr-warmup-fraction nan", "must be a number, not nan"),
        ("--hidden-dropout inf", "must be at most 1, not inf"),
        ("--lr nan", "must be a number, not nan"),
        ("--lr inf", "must be at most 1e+30, not inf"),
        ("--adam-beta2 1", "must be below 1, not 1.0"),
        ("--xielu-alpha-p-init 1e4", "must be at most 1000, not 10000.0"),
        ("--xielu-alpha-n-init 0.5", "of --xielu must be above 0.5"),
        ("--straggler-ratio 0.9", "must be above 1, or 0, not 0.9"),
        ("--straggler-ratio 1", "must be above 1, or 0, not 1.0"),
        ("--xielu-beta 0", "must be 1.2e-38 or more, not 0.0"),
        ("--xielu-alpha-p-init 1e-45", "must be 1.2e-38 or more, not 1e-45"),
        ("--xielu-check-tp-sync -1", "must be 0 or more, not -1"),
        ("--moe-use-upcycling", "does not work with xIELU and xIPReLU; drop it"),
    ],
)
def test_number(flags, message):
    [line] = run(flags)
    assert line.startswith(f"megatron_xielu: error: {flags.split()[0]} {message}")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--async-save --ckpt-format torch", "--ckpt-format torch does not go with --async-save"),
        ("--deterministic-mode --cross-entropy-loss-fusion", "--deterministic-mode does not go"),
        ("--deterministic-mode --tp-comm-overlap", "--deterministic-mode does not go with --tp-c"),
        ("--mock-data --data-path 1 x", "give one of --mock-data and --data-path"),
        ("--data-path x --train-data-path y", "give one of --data-path and --train-data-path"),
        ("--load /nowhere/checkpoints", "--load /nowhere/checkpoints: there is no checkpoint in"),
    ],
)
def test_flags_that_end_a_job_which_has_begun(flags, message):
    lines = [line for line in run(flags) if "does not exist" not in line]
    assert lines and lines[0].startswith(f"megatron_xielu: error: {message}")


def test_a_checkpoint_may_come_from_elsewhere(tmp_path):
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("5")
    assert run(f"--load {tmp_path}") == [] == run("--load out")
    assert run("--load here --pretrained-checkpoint " + str(tmp_path)) == []


@pytest.mark.parametrize(
    "flags", ["--xielu-beta 0.5", "--xielu-alpha-n-init 0.7", "--xielu-frozen-alphas"]
)
def test_a_setting_of_no_activation(flags):
    [line] = run(flags, command=COMMAND.replace("--xielu ", ""))
    assert line == f"megatron_xielu: error: {flags.split()[0]} needs --xielu or --xiprelu"


def test_wrong_types_and_missing_values():
    error = "megatron_xielu: error: argument"
    for word in ("0.5", "many", "nan"):
        [line] = run(f"--lr-warmup-samples {word}")
        assert line == f"{error} --lr-warmup-samples: invalid int value: '{word}'"
    assert run("--num-layers") == [f"{error} --num-layers: expected one argument"]


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        ("--num-layer 3", ["--num-layer is no flag of Megatron's or this package's; did you mean"]),
        ("--learning-rate=3", ["--learning-rate is no flag of Megatron's or this package's; did"]),
        ("-lr 3 --qwertz", ["-lr is no flag", "--qwertz is no flag of Megatron's or this"]),
        # Megatron's, the entry's, and a number.
        ("--fp8-format hybrid --cpu --lr -1e-5 --data-path 1 -x.y", ["-x.y is no flag of"]),
    ],
)
def test_flags_that_no_release_knows(words, lines):
    found = [line for line in run(words) if "is no flag" in line]
    for line, start in zip(found, lines, strict=True):
        assert line.startswith(f"megatron_xielu: error: {start}")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--lr-warmup-fraction must be below 1", "--lr-warmup-fraction must be below 1"),
        ("--micro-batch-size 1, or --nodes 2 (5 GiB)", "MICRO_BATCH=1, or NNODES=2 (5 GiB)"),
        ("--split 9,1,0: none", "SPLIT=9,1,0: none"),
        ("--tokenizer-model /a/b-1 is not there", "TOKENIZER=/a/b-1 is not there"),
        ("--data-path /a.b: /a.b.bin", "DATA=/a.b: /a.b.bin"),
        ("give --tokenizer-model D/tok-1 and --lr", "give TOKENIZER=D/tok-1 and LR"),
        ("--data-path ../text: ../text.bin", "DATA=../text: ../text.bin"),
        ("shorten --lr-wsd-decay-samples", "shorten DECAY_STEPS"),
        ("--ffn-hidden-size 7 is odd", "--ffn-hidden-size 7 (GATED_FFN_SIZE) is odd"),
        ("--tensor-model-parallel-size 2 --sequence-parallel (3.0 GiB)", "TP=2 (3.0 GiB)"),
        ("--xielu does not work with --sft", "ACTIVATION=xielu does not work with --sft"),
        # Given by hand.
        ("--seed 1 --lr 1e-3 --global-batch-size 4", "--seed 1 LR=1e-3 GLOBAL_BATCH=4"),
    ],
)
def test_in_the_variables_of_the_launcher(line, words):
    assert variables.in_variables(line, typed=["--seed"]) == words


def test_all_problems_are_said():
    lines = run("--num-layers 0 --seq-length 0 --spec other spec --data-path 1 x y z")
    assert [line.split()[2] for line in lines] == ["--num-layers", "--seq-length"]
    lines = run("--spec other spec --xielu-alpha-n-init 0.1 --data-path 1 x y z")
    assert [line.split()[2] for line in lines] == [
        "--xielu",
        "--xielu-alpha-n-init",
        "--data-path:",
    ]
    assert "does not work with --spec other spec; put" in lines[0]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--nodes 0", "must be 1 or more, not '0'"),
        ("--nodes 1.5", "must be a whole number, not '1.5'"),
        (f"--nodes {10**29}", "must be at most 100000"),
        ("--gpus-per-node x", "must be a whole number, not 'x'"),
        ("--gpu v100", "invalid choice: 'v100' (choose from"),
        ("--gpu-memory nan", "must be a number, not 'nan'"),
        ("--gpu-memory 0", "must be 0.001 or more"),
        ("--peak-tflops inf", "must be at most 1000000.0"),
        ("--mfu 40", "must be at most 1, not '40'"),
        ("--host-copy -1", "must be 0.001 or more"),
        ("--node-network text", "must be a number, not 'text'"),
        ("--vocab-size -1", "must be 1 or more"),
        ("--keep-checkpoints 0", "must be 1 or more"),
        ("--keep-every nan", "must be a whole number, not 'nan'"),
        ("--nodes", "expected one argument"),
    ],
)
def test_own_options(option, message):
    usage, line = run("", option)
    assert usage.startswith("usage: ")
    assert f"error: argument {option.split()[0]}: {message}" in line


_WORDS = st.sampled_from(
    ["0", "1", "-1", "7", "64", "0.5", "nan", "inf", "-inf", str(10**29), str(2**31 - 1), "x", ""]
)


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(st.sampled_from(sorted(NUMBERS)), _WORDS, max_size=3),
    st.dictionaries(
        st.sampled_from(["nodes", "gpus-per-node", "gpu-memory", "mfu", "host-copy", "keep-every"]),
        _WORDS,
        max_size=1,
    ),
)
def test_any_number_is_planned_or_refused(flags, options):
    lines = run(
        " ".join(f"{flag}={word}" for flag, word in flags.items()),
        "--nodes 11 --keep-checkpoints 2 --json "
        + " ".join(f"--{option}={word}" for option, word in options.items()),
    )
    assert all("error: " in line or line.startswith("usage: ") for line in lines)


# Files


def refusal(flag: str, path: Path, content: bytes | str | None, more: str = "") -> str:
    """The one line about a flag's file, which has this content: none is no file, or a folder."""
    if content == "folder":
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    [line] = run(f"{flag} {path}{more}")
    assert f"error: {flag} {path}" in line
    return line


GOOD = {"train": ["0.7", "/data/a", 0.3, "/data/b"], "valid": "/data/c", "test": None}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (
            "folder",
            "is a folder, and no prefix of .bin and .idx; of a folder of texts, tools/prepa",
        ),
        (b"\xff\xfe", "is no text: not UTF-8"),
        (b"", "is no JSON: Expecting value"),
        (b"[" * 100_000, "is no JSON: maximum recursion depth"),
        (b"[]", "is not a JSON object of lists"),
        (b"{}", "has no 'train'; where there is none, write null"),
        (b'{"train": [], "valid": null, "test": null}', ": 'train' is [], not a list of prefixes"),
        (b'{"train": [1], "valid": null, "test": null}', ": 'train': 1 is no prefix of files"),
        (b'{"train": 1, "valid": null, "test": null}', ": 'train' is 1, not a list of prefixes"),
    ],
)
def test_data_by_split(tmp_path, content, message):
    path = tmp_path / "splits.json"
    assert message in refusal("--per-split-data-args-path", path, content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (
            "folder",
            "is a folder, and no prefix of .bin and .idx; of a folder of texts, tools/prepa",
        ),
        (b"\xff\xfe", "is no text: not UTF-8"),
        (b" \n", "is [], not a list of prefixes of files"),
        (b"0.5 a b c", "'b' is no weight; one must stand before each prefix, or before none"),
        (b"nan a", "'nan' is no weight"),
        (b"-1 a", "'-1' is no weight"),
    ],
)
def test_data_of_a_list(tmp_path, content, message):
    path = tmp_path / "list.txt"
    assert message in refusal("--data-args-path", path, content, " --split 9,1,0")


def test_nothing_to_validate_on():
    (line,) = run("--split 100,0,0")
    assert line.endswith("--split 100,0,0: there is nothing to validate on; add --eval-iters 0")
    assert run("--split 100,0,0 --eval-iters 0") == []


def test_paths_that_are_too_long(tmp_path):
    lines = run(f"--data-path /{'x' * 5000} --tokenizer-model /{'x' * 5000}")
    assert [line.split()[-1] for line in lines] == ["exist", "long"]


def test_what_megatron_takes_is_read(tmp_path):
    path = tmp_path / "splits.json"
    path.write_text(json.dumps(GOOD))
    found = data_lists.words("per_split_data_args_path", str(path))
    assert found == ["0.7", "/data/a", "0.3", "/data/b", "/data/c"]
    assert data_lists.words("data_path", ["a", "b"]) == ["a", "b"]
    assert data_lists.words("data_path", ["1", "a"]) == ["1", "a"]


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(damaged_bytes(json.dumps(GOOD).encode()) | damaged(GOOD).map(json.dumps).map(str.encode))
def test_any_damage_is_refused_in_a_line(tmp_path, content):
    path = tmp_path / "splits.json"
    path.write_bytes(content)
    for argument in data_lists.FILES:
        try:
            data_lists.words(argument, str(path))
        except ValueError as error:
            assert str(error).startswith("--") and len(str(error).splitlines()) == 1
