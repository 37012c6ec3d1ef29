"""The entry refuses numbers, files and an environment that make no sense, in a line, before
anything is built."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from dataset_files import write_dataset, write_prepared
from hostile import damaged, damaged_bytes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from launch import TINY_LLAMA, train
from megatron_arguments import parse, parser

from megatron_xielu import arguments, catalog, run_checks, selftest, startup
from megatron_xielu.catalog import ALPHA_GROUP, NUMBERS, PER_LAYER, SETTINGS
from megatron_xielu.checkpoint_walk import __main__ as checkpoint_walk
from megatron_xielu.common import data_lists
from megatron_xielu.common.flags import flag_of
from megatron_xielu.cpu import __main__ as cpu_command
from megatron_xielu.plan import checks as plan_checks
from megatron_xielu.plan import flags as plan_flags
from megatron_xielu.plan.flags import PlanError
from megatron_xielu.plan.run import Cluster, Plan


def check(flags: str, ranks: int = 1) -> Namespace:
    """The entry's checks and Megatron's, in its order."""
    args = parse([*TINY_LLAMA, "--transformer-impl", "local", "--xielu", *flags.split()])
    args.rank, args.world_size = 0, ranks
    arguments.validate(args)
    arguments.check_layout(args)
    with arguments.megatrons_checks(), contextlib.redirect_stdout(io.StringIO()):
        from megatron.training.arguments import validate_args

        validate_args(args)
    return args


@pytest.fixture(autouse=True)
def connections(monkeypatch):
    """Megatron asks for it with tensor parallelism."""
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def test_ranges_are_of_megatrons_flags():
    """Of the same type, and its defaults are within them; the plan has the same defaults."""
    actions = {flag: action for action in parser()._actions for flag in action.option_strings}
    planned = vars(plan_flags.parse([]))
    for flag, limits in NUMBERS.items():
        action = actions[flag]
        kind = int if limits.whole else float
        assert action.type is (None if action.dest in PER_LAYER else kind)
        assert flag_of(action.dest) == flag
        assert action.nargs is None
        assert action.default is None or limits.fault(action.default) == ""
        if planned[action.dest] is not None:
            assert planned[action.dest] == {**SETTINGS, **ALPHA_GROUP}.get(
                action.dest, action.default
            )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--num-layers 0", "must be 1 or more, not 0"),
        ("--hidden-size 0", "must be 1 or more, not 0"),
        ("--ffn-hidden-size 0", "must be 1 or more, not 0"),
        ("--num-attention-heads 0", "must be 1 or more, not 0"),
        ("--num-query-groups 0", "must be 1 or more, not 0"),
        ("--seq-length 0", "must be 1 or more, not 0"),
        ("--micro-batch-size 0", "must be 1 or more, not 0"),
        ("--global-batch-size 0", "must be 1 or more, not 0"),
        ("--tensor-model-parallel-size 0", "must be 1 or more, not 0"),
        ("--make-vocab-size-divisible-by 0", "must be 1 or more, not 0"),
        ("--train-iters -1", "must be 0 or more, not -1"),
        ("--log-interval 0", "must be 1 or more, not 0"),
        ("--eval-interval 0", "must be 1 or more, not 0"),
        ("--seed 0", "must be 1 or more, not 0"),
        (f"--num-layers {10**29}", "must be at most 2147483647"),
        (f"--exit-duration-in-mins {10**29}", "must be at most 9223372036854775807"),
        ("--lr nan", "must be a number, not nan"),
        ("--lr -1", "must be 0 or more, not -1.0"),
        ("--weight-decay inf", "must be at most 1e+30, not inf"),
        ("--qk-clip-threshold nan", "must be a number, not nan"),
        ("--adam-beta1 1", "must be below 1, not 1.0"),
        ("--lr-warmup-fraction 1", "must be below 1, not 1.0"),
        ("--xielu-alpha-p-init 1e4", "must be at most 1000, not 10000.0"),
        ("--xielu-alpha-n-init 1e4", "must be at most 1000, not 10000.0"),
        ("--xielu-alpha-n-init inf", "of XIELU must be a finite number above 0.5, got inf"),
        ("--xielu-beta nan", "must be a finite number above 0, got nan"),
    ],
)
def test_number(flags, message):
    with pytest.raises(ValueError) as error:
        check(flags)
    assert str(error.value).startswith(f"{flags.split()[0]} {message}")


@pytest.mark.parametrize(
    "flags",
    [
        "--rotary-base 3580165449",  # of a released model
        "--clip-grad -1",  # not clipped
        f"--ddp-bucket-size {10**10}",
        f"--eval-interval {10**10} --log-interval {10**10}",
    ],
)
def test_large_and_negative_numbers_that_mean_something(flags):
    check(flags)


@pytest.mark.parametrize(
    ("flags", "ranks", "message"),
    [
        ("--tensor-model-parallel-size 3", 2, "2 ranks are not a multiple of --tensor-model-par"),
        ("--pipeline-model-parallel-size 2", 1, "1 ranks are not a multiple of --tensor-model-pa"),
        ("--tensor-model-parallel-size 3", 3, "does not divide --num-attention-heads 4"),
        (
            "--tensor-model-parallel-size 2 --ffn-hidden-size 33",
            2,
            "does not divide --ffn-hidden-size 33",
        ),
        ("--group-query-attention --num-query-groups 3", 1, "--num-query-groups 3 does not divide"),
        ("--num-experts 1", 1, "--moe-router-topk 2 must be from 1 to --num-experts 1"),
        ("--num-experts 4 --moe-router-topk 0", 1, "--moe-router-topk 0 must be from 1 to"),
        ("--num-experts 4 --moe-layer-freq 0", 1, "--moe-layer-freq must be 1 or more, not 0"),
        ("--num-experts 4 --moe-layer-freq [1,0]", 1, "lists 2 layers, and --num-layers is 4"),
        (
            "--num-experts 4 --expert-model-parallel-size 2",
            1,
            "1 ranks are not a multiple of --expert-tensor-parallel-size 1 × --expert-model-par",
        ),
        # Of Megatron's own checks.
        ("--seq-length 64", 1, r"max_position_embeddings \(32\) must be greater"),
        (
            "--num-attention-heads 3",
            1,
            r"AssertionError at assert args\.hidden_size % args\.num_",
        ),
        ("--min-lr 1", 1, r"AssertionError at assert args\.min_lr <= args\.lr \(arguments\.py"),
        ("--attention-backend local", 1, r"TypeError .* at assert args\.spec\[0\] == 'local'"),
    ],
)
def test_what_does_not_go_together(flags, ranks, message):
    with pytest.raises(ValueError, match=message) as error:
        check(flags, ranks)
    assert len(str(error.value).splitlines()) == 1


DOCUMENTS = "--dataloader-inter-document-masking"
PIPELINE = "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (f"{PIPELINE} --num-layers-per-virtual-pipeline-stage 1", "give one of --num-layers-per-"),
        ("--recompute-method block --recompute-activations", "--recompute-method goes with"),
        (
            "--cross-entropy-loss-fusion --cross-entropy-fusion-impl te",
            "--cross-entropy-fusion-imp",
        ),
        (
            "--num-experts 4 --recompute-activations --recompute-modules moe_act",
            "--recompute-modules moe_act needs --moe-grouped-gemm",
        ),
        ("--distribute-saved-activations", "--distribute-saved-activations needs --tensor-model"),
        ("--lr-warmup-fraction 1", "--lr-warmup-fraction must be below 1, not 1.0"),
        (
            f"{DOCUMENTS} --context-parallel-size 2",
            f"{DOCUMENTS} does not work with --context-para",
        ),
        (f"{DOCUMENTS} --reset-position-ids", f"{DOCUMENTS} does not work with --reset-position"),
        (f"{DOCUMENTS} --reset-attention-mask", f"{DOCUMENTS} does not work with --reset-attent"),
        (f"{DOCUMENTS} --cuda-graph-impl local", f"{DOCUMENTS} does not work with --cuda-graph-i"),
        (f"{DOCUMENTS} --pipeline-model-parallel-size 2", f"{DOCUMENTS} with --pipeline-model-par"),
    ],
)
def test_the_plan_refuses_it_in_the_same_words(flags, message):
    with pytest.raises(ValueError, match=f"^{message}") as error:
        check(flags, ranks=2)
    words = [*TINY_LLAMA, "--xielu", *flags.split()]
    try:
        found = plan_checks.problems(Plan(words, cluster=Cluster(1, 2)), environment={})
    except PlanError as refused:
        found = refused.problems
    assert str(error.value) in found


def test_grouped_experts_with_biases_in_the_words_of_the_plan():
    """CPU mode drops the fusion; the entry has what it checks for a GPU from the same function."""
    model = [word for word in TINY_LLAMA if word != "--disable-bias-linear"]
    words = [*model, *"--xielu --num-experts 4 --moe-grouped-gemm".split()]

    def found(*more: str) -> list[str]:
        plan = Plan([*words, *more], cluster=Cluster(1, 1))
        return [p for p in plan_checks.problems(plan, environment={}) if "grouped" in p]

    [problem] = found()
    assert problem.startswith("--moe-grouped-gemm with biases does not go with the fusion of bias")
    for fix in ("--disable-bias-linear", "--no-bias-dropout-fusion"):
        assert fix in problem and found(fix) == []
    assert found("--cpu") == []


def test_documents_need_an_attention_that_knows_them():
    """Not on a CPU, which these checks have not gone to."""
    args = check(DOCUMENTS)
    with pytest.raises(ValueError, match="--transformer-impl local: Megatron's own attention has"):
        run_checks._check_step(args)
    args.transformer_impl = "transformer_engine"
    run_checks._check_step(args)
    words = [*TINY_LLAMA, "--xielu", DOCUMENTS, "--transformer-impl", "local"]
    for more, expected in (([], [catalog.DOCUMENTS_NEED_TE]), (["--cpu"], [])):
        plan = Plan([*words, *more], cluster=Cluster(1, 1))
        assert plan_checks.problems(plan, environment={}) == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("no_such_module layer_spec", "no_such_module cannot be imported: No module named"),
        ("megatron_xielu.layer_specs typo", "megatron_xielu.layer_specs has no typo"),
        ("megatron_xielu.layer_specs", "it takes a module and a name in it"),
    ],
)
def test_a_spec_that_is_not_there(words, message):
    """Megatron would train its default layers, which are others."""
    with pytest.raises(ValueError, match=f"^--spec {words}: {message}"):
        arguments.check_supported(parse([*TINY_LLAMA, "--spec", *words.split()]))


def test_a_fault_in_a_frozen_module_is_placed_in_a_file():
    at_join = r"os\.path\.join\(None\) .* \(test_entry_input\.py"
    with pytest.raises(ValueError, match=at_join), arguments.megatrons_checks():
        os.path.join(None)  # type: ignore[call-overload]


def test_flags_with_types_of_their_own(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt", *TINY_LLAMA, "--exit-signal", "x"])
    with pytest.raises(ValueError, match="KeyError 'x' at return"):
        arguments.parse_and_validate_args({})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--learning-rate 1e-3", "--learning-rate is no flag of Megatron's or this package's; did"),
        ("--num-layer=3", "--num-layer is no flag of Megatron's or this package's; did you mean"),
        ("--lr x", "argument --lr: invalid float value: 'x'"),
        ("--lr", "argument --lr: expected one argument"),
    ],
)
def test_what_argparse_refuses_comes_without_its_usage(flags, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt", *TINY_LLAMA, *flags.split()])
    with pytest.raises(ValueError, match=f"^Megatron does not take these arguments: {message}"):
        arguments.parse_and_validate_args({})
    assert not capsys.readouterr().err


_WORDS = st.sampled_from(
    ["0", "1", "-1", "3", "32", "0.5", "nan", "inf", str(10**29), str(2**31 - 1), "x", ""]
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.dictionaries(st.sampled_from(sorted(NUMBERS)), _WORDS, min_size=1, max_size=3))
def test_any_number_is_taken_or_refused(flags):
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            check(" ".join(f"{flag}={word}" for flag, word in flags.items()), ranks=2)
        except SystemExit as end:  # of argparse
            assert end.code == 2
        except ValueError as error:
            assert len(str(error).splitlines()) == 1


# Files

SEQUENCES = {"/data/a": [10, 11], "/data/b": [3, 4]}


@pytest.mark.parametrize(
    ("flags", "content", "message"),
    [
        ("--per-dataset-sequences-path", None, "No such file or directory"),
        ("--per-dataset-sequences-path", b"\xff", "it is no JSON: not UTF-8"),
        ("--per-dataset-sequences-path", b"[]", "it is [], not an object"),
        ("--per-dataset-sequences-path", b'{"a": 3}', "a is 3, not a list"),
        ("--per-dataset-sequences-path", b'{"a": [3, -1]}', "a[1] must be 0 or more, not -1"),
        ("--data-args-path", None, "does not exist"),
        ("--data-args-path", b"", "is [], not a list of prefixes"),
        ("--per-split-data-args-path", b"[]", "is not a JSON object of lists"),
        ("--per-split-data-args-path", b'{"train": ["a"], "valid": ["a"]}', "has no 'test'"),
        (
            "--per-split-data-args-path",
            b'{"train": ["a"], "valid": null, "test": null}',
            "there is nothing to validate on; add --eval-iters 0",
        ),
    ],
)
def test_file(tmp_path, flags, content, message):
    path = tmp_path / "file"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        run_checks.check_files(parse([*TINY_LLAMA, "--eval-iters", "1", flags, str(path)]))
    assert str(error.value).startswith(f"{flags} {path}") and message in str(error.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--data-path", "--data-path is [], not a list of prefixes"),
        ("--data-path 1 a b c", "--data-path: 'b' is no weight"),
        ("--data-path 1 a 0 b", "--data-path: '0' is no weight"),
        ("--split x", "--split must be three shares, such as 969,30,1, not 'x'"),
        ("--split 1,2,3,4", "--split must be three shares"),
        ("--split 100,0,0", "--split 100,0,0: there is nothing to validate on; add --eval-iters 0"),
        ("--train-data-path a", "--train-data-path without --valid-data-path: there is nothing to"),
    ],
)
def test_data_flags(flags, message):
    with pytest.raises(ValueError) as error:
        run_checks.check_files(parse([*TINY_LLAMA, "--eval-iters", "1", *flags.split()]))
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--data-path {0}/text --per-split-data-args-path {0}/splits.json",
            "give one of --data-path and --per-split-data-args-path: Megatron takes its data from",
        ),
        ("--data-args-path {0}/list.txt", "--data-args-path needs --split, such as 969,30,1"),
        (
            "--train-data-path {0}/text --valid-data-path {0}/text --split 9,1,0",
            "--split 9,1,0 does not go with --train-data-path; drop it",
        ),
        ("--per-split-data-args-path {0}/splits.json", ""),
        ("--data-args-path {0}/list.txt --split 9,1,0", ""),
    ],
)
def test_lists_of_data_of_which_megatron_takes_one(tmp_path, flags, message):
    """It would pass over another, or fail with its model built."""
    prefix = str(tmp_path / "text")
    write_dataset(tmp_path / "text", [3] * 600)
    (tmp_path / "list.txt").write_text(prefix)
    splits = {"train": [prefix], "valid": [prefix], "test": None}
    (tmp_path / "splits.json").write_text(json.dumps(splits))
    args = parse([*TINY_LLAMA, *flags.format(tmp_path).split()])
    assert data_lists.fault_of_sources(args).startswith(message)
    if not message:
        return run_checks.check_files(args)
    with pytest.raises(ValueError) as error:
        run_checks.check_files(args)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("lengths", "flags", "message"),
    [
        (None, "", "--data-path {}: {}.idx does not exist"),
        ([3] * 499, "", "--split 969,30,1: of the 499 sequences of {} none is left for test"),
        ([3] * 20, "--split 99,1,0", "--split 99,1,0: of the 20 sequences of {} none is left for"),
        ([], "", "--data-path {}: {}.idx has no sequences"),
        ([3] * 600, "", None),
        ([3] * 20, "--split 9,1,0", None),
    ],
)
def test_data_without_end(tmp_path, lengths, flags, message):
    """Megatron looks for ever for a token in a part that has no sequence."""
    prefix = tmp_path / "text"
    if lengths is not None:
        write_dataset(prefix, lengths)
    args = parse([*TINY_LLAMA, "--data-path", str(prefix), *flags.split()])
    if message is None:
        return run_checks.check_files(args)
    with pytest.raises(ValueError) as error:
        run_checks.check_files(args)
    assert str(error.value).startswith(message.format(prefix, prefix))


@pytest.mark.parametrize(
    ("flag", "path", "message"),
    [
        ("--data-path", "data", "is prepared data; give {by_split}"),
        ("--data-path", "data/manifest.json", "is prepared data; give {by_split}"),
        ("--data-path", "data/train", "is a part of prepared data; give {by_split}"),
        (
            "--data-path",
            "elsewhere",
            "is a folder, and no prefix of .bin and .idx; of a folder of",
        ),
        (
            "--data-path",
            "data/train/00000.bin",
            "is a file of data; give its prefix, --data-path {p}",
        ),
        (
            "--data-path",
            "data/data_args.txt",
            "is no prefix of data; if it lists some, give --data",
        ),
        (
            "--data-path",
            "data/per_split_data_args.json",
            "is no prefix of data; if it names some by",
        ),
        ("--data-args-path", "data", "is prepared data; give {by_split}"),
        (
            "--data-args-path",
            "data/per_split_data_args.json",
            "names data by split; give {by_split}",
        ),
        (
            "--data-args-path",
            "data/train/00000.idx",
            "is a file of data; give its prefix, --data-p",
        ),
        ("--data-args-path", "data/train/00000", "is a prefix of data; give --data-path {p}"),
        ("--per-split-data-args-path", "data", "is prepared data; give {by_split}"),
        ("--per-split-data-args-path", "data/data_args.txt", "is no JSON: Extra data"),
    ],
)
@pytest.mark.parametrize("command", ["entry", "plan"])
def test_a_path_that_another_flag_takes(tmp_path, command, flag, path, message):
    write_prepared(tmp_path / "data", ["a"])
    (tmp_path / "elsewhere").mkdir()
    args = [word for word in TINY_LLAMA if word != "--mock-data"]
    args += ["--eval-iters", "0", flag, f"{tmp_path}/{path}", "--split", "1,0,0"]
    if command == "entry":
        with pytest.raises(ValueError) as error:
            run_checks.check_files(parse(args))
        said = str(error.value)
    else:
        plan = Plan(args, cluster=Cluster(nodes=1, gpus_per_node=1))
        said = plan_checks.problems(plan, environment={})[0]
    by_split = f"--per-split-data-args-path {tmp_path}/data/per_split_data_args.json"
    expected = message.format(by_split=by_split, p=f"{tmp_path}/data/train/00000")
    assert said.startswith(f"{flag} {tmp_path}/{path} {expected}")


def test_folders_of_prepared_data_in_a_list(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    for folder in (a, b):
        write_prepared(folder, ["a"])
    for words in ([a, b], ["1", f"{a}/manifest.json", "2", b]):
        with pytest.raises(ValueError) as error:
            run_checks.check_files(parse([*TINY_LLAMA, "--data-path", *map(str, words)]))
        assert str(error.value) == (
            f"--data-path: {a} and {b} are folders of prepared data; make one list of theirs, cat "
            f"{a}/data_args.txt {b}/data_args.txt > list.txt, and give --data-args-path ./list.txt"
        )


def test_data_of_another_vocabulary(tmp_path, capsys):
    """With tensor parallelism it would train to the end, with a better loss."""
    write_dataset(tmp_path / "text", [3] * 600, {5: 300})
    args = parse([*TINY_LLAMA, "--data-path", f"{tmp_path}/text"])
    args.rank, args.padded_vocab_size = 0, 256
    with pytest.raises(
        ValueError, match=r"text\.bin has token 300, the model's vocabulary only 256"
    ):
        run_checks.check_files(args)
    write_prepared(tmp_path, ["a"], name="who/name")
    flags = ["--per-split-data-args-path", f"{tmp_path}/per_split_data_args.json"]
    args = parse([*TINY_LLAMA, *flags, "--tokenizer-model", "who/else"])
    args.rank, args.tokenizer_type = 0, "HuggingFaceTokenizer"
    run_checks.check_files(args)
    assert capsys.readouterr().err.startswith(
        "megatron_xielu: warning: --per-split-data-args-path "
    )


def test_shares_are_megatrons():
    from megatron.core.datasets import blended_megatron_dataset_config as config

    for split in ("969,30,1", "1", "0.2, .8", "100,0,0", "3,3,3"):
        assert data_lists.shares(split) == config.parse_and_normalize_split(split)


@pytest.mark.parametrize("flag", ["--save", "--data-cache-path"])
@pytest.mark.parametrize("folder", ["file", "file/below"])
def test_a_folder_that_cannot_be(tmp_path, flag, folder):
    """Else Megatron says so at the first save, and what was trained is lost."""
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=f"^{flag} .*{folder} cannot be written to: "):
        run_checks.check_run(parse([*TINY_LLAMA, flag, str(tmp_path / folder)]))


@pytest.mark.parametrize("flag", ["--save", "--load"])
def test_an_object_store_that_would_be_a_folder(tmp_path, monkeypatch, flag):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"^{flag} s3://bucket/run: without --enable-msc"):
        run_checks.check_run(parse([*TINY_LLAMA, flag, "s3://bucket/run"]))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flag", ["--full-validation", "--multiple-validation-sets"])
def test_validation_sets_need_both_flags(flag):
    with pytest.raises(ValueError, match=r"^--full-validation and --multiple-validation-sets need"):
        run_checks.check_run(parse([*TINY_LLAMA, flag]))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--lr-warmup-iters 6", "assert self.lr_warmup_steps < self.lr_decay_steps"),
        ("--lr-decay-style WSD", "assert self.wsd_decay_steps is not None"),
        ("--lr-warmup-init 1", "assert self.init_lr <= self.max_lr"),
        (
            "--override-opt_param-scheduler --use-checkpoint-opt_param-scheduler",
            "both override and use-checkpoint are set",
        ),
    ],
)
def test_a_schedule_that_megatron_does_not_take(monkeypatch, flags, message):
    from megatron.training import training

    args = check(flags)
    monkeypatch.setattr(training, "get_args", lambda: args)
    before = dict(vars(args))
    with pytest.raises(ValueError, match=message):
        run_checks.check_run(args)
    assert vars(args) == before


_OVERRIDE = "--override-opt_param-scheduler"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", ""),
        ("--train-iters 9", f"lr_decay_steps was 48, and is 72 by --train-iters .* {_OVERRIDE} "),
        ("--weight-decay 0.3", "start_wd was 0.1, and is 0.3 by --weight-decay"),
        (f"--train-iters 9 --weight-decay 0.3 {_OVERRIDE}", ""),
        ("--train-iters 9 --use-checkpoint-opt_param-scheduler", ""),
        ("--lr 0.5", "with --lr 0.01, and Megatron .* add --no-load-optim"),
        (f"--lr 0.5 {_OVERRIDE}", "with --lr 0.01, and Megatron .* add --no-load-optim"),
        ("--lr 0.5 --no-load-optim", ""),
        ("--lr 0.5 --finetune", ""),
    ],
)
def test_another_schedule_than_the_checkpoints(monkeypatch, start_checkpoint, flags, message):
    """Megatron would end with a traceback once the model is built."""
    from megatron.training import training

    args = check(f"--load {start_checkpoint} {flags}")
    monkeypatch.setattr(training, "get_args", lambda: args)
    with pytest.raises(ValueError, match=message) if message else contextlib.nullcontext():
        run_checks.check_run(args)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--tensor-model-parallel-size 2 --sequence-parallel --seq-length 31",
            "--sequence-parallel: --tensor-model-parallel-size 2 does not divide --seq-length 31",
        ),
        (
            "--tensor-model-parallel-size 2 --num-experts 2",
            "--num-experts with --tensor-model-parallel-size 2 needs --sequence-parallel",
        ),
        ("--tensor-model-parallel-size 2 --num-experts 2 --sequence-parallel", ""),
        (
            "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 3",
            "--num-virtual-stages-per-pipeline-rank 3 × --pipeline-model-parallel-size 2 does not",
        ),
        (
            "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 "
            "--global-batch-size 6",
            "virtual pipeline stages need a multiple of 2 micro-batches a step, not 3",
        ),
        ("--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1", ""),
    ],
)
def test_layouts_that_end_in_the_first_step(monkeypatch, flags, message):
    from megatron.training import training

    # Which Megatron asks for with tensor parallelism.
    monkeypatch.setattr("megatron.training.arguments.get_device_arch_version", lambda: 10)
    args = check(flags, ranks=2)
    monkeypatch.setattr(training, "get_args", lambda: args)
    if not message:
        return run_checks.check_run(args)
    with pytest.raises(ValueError) as error:
        run_checks.check_run(args)
    assert str(error.value).startswith(message)


def test_flags_that_megatron_reads_nowhere():
    """They are refused, as long as that is so."""
    import megatron.core

    files = Path(megatron.core.__file__).parents[1].rglob("*.py")
    text = "".join(file.read_text() for file in files)
    for refusal in catalog.UNREAD:
        argument = refusal.flag.removeprefix("--").replace("-", "_")
        assert f".{argument}" not in text.replace(f"utils.{argument}", "")
        action = parser()._option_string_actions[refusal.flag]
        args = parse([*TINY_LLAMA, refusal.flag, *["4"] * int(action.nargs or 0)])
        with pytest.raises(ValueError, match=f"^{refusal.flag}: Megatron 0.19 takes it and reads"):
            arguments.check_supported(args)


def test_full_validation_of_a_test_set(tmp_path):
    flags = [*TINY_LLAMA, "--full-validation", "--multiple-validation-sets", "--skip-train"]
    for more in ("", "--train-data-path a --test-data-path b"):
        with pytest.raises(ValueError, match=r"^--full-validation: Megatron fails with it at a"):
            run_checks.check_run(parse([*flags, *more.split()]))
    for more in ("--split 9,1,0", "--train-data-path a --valid-data-path b"):
        run_checks.check_run(parse([*flags, *more.split()]))


def test_no_data():
    args = parse([word for word in TINY_LLAMA if word != "--mock-data"])
    with pytest.raises(ValueError, match=r"^there is no data to train on; give --data-path"):
        run_checks.check_files(args)


def test_no_flags_from_a_file(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        parse(["--yaml-cfg", str(tmp_path / "none.yaml")])
    assert end.value.code == 2
    assert "error: argument --yaml-cfg: this entry has no code for it" in capsys.readouterr().err


def test_a_missing_interval():
    args = parse(TINY_LLAMA)
    args.eval_interval = None
    with pytest.raises(ValueError, match=r"^--eval-interval is missing"):
        run_checks.check_run(args)
    args.skip_train = True
    run_checks.check_run(args)


def test_good_files(tmp_path):
    path = tmp_path / "sequences.json"
    path.write_text(json.dumps(SEQUENCES))
    args = parse([*TINY_LLAMA, "--per-dataset-sequences-path", str(path), "--split", "99,1,0"])
    args.data_args_path = "s3://bucket/list"  # Megatron's to read
    run_checks.check_files(args)
    found = data_lists.sequences_per_dataset(args.per_dataset_sequences_path)
    assert found == {"/data/a": (10, 11), "/data/b": (3, 4)}


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    damaged_bytes(json.dumps(SEQUENCES).encode())
    | damaged(SEQUENCES).map(json.dumps).map(str.encode)
)
def test_any_damage_is_refused_in_a_line(tmp_path, content):
    path = tmp_path / "sequences.json"
    path.write_bytes(content)
    try:
        data_lists.sequences_per_dataset(str(path))
    except ValueError as error:
        assert str(error).startswith("--per-dataset-sequences-path ")
        assert len(str(error).splitlines()) == 1


# The environment


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("RANK", "x", "RANK must be a whole number"),
        ("WORLD_SIZE", "0", "WORLD_SIZE must be a whole number from 1"),
        ("LOCAL_RANK", "5", "LOCAL_RANK 5 must be less than LOCAL_WORLD_SIZE 1"),
        ("MASTER_PORT", "http", "MASTER_PORT must be a whole number"),
        ("MEGATRON_XIELU_BACKEND", "cuda", "MEGATRON_XIELU_BACKEND must be triton, compiled or"),
    ],
)
def test_environment(monkeypatch, name, value, message):
    for variable, good in startup.ALONE.items():
        monkeypatch.setenv(variable, good)
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(startup, "_prepare_megatron", lambda **_: pytest.fail("it went on"))
    with pytest.raises(SystemExit, match=f"^megatron_xielu: error: {message}"):
        startup.start()


@pytest.mark.parametrize(
    ("command", "words"),
    [(selftest.main, []), (cpu_command.main, [__file__])],
)
def test_other_commands_look_at_the_environment(monkeypatch, command, words):
    monkeypatch.setenv("RANK", "x")
    monkeypatch.setattr(sys, "argv", ["command", *words])
    with pytest.raises(SystemExit, match="RANK must be a whole number"):
        command()


@pytest.mark.parametrize("gpus", ["0", "-1", "nan", str(10**29), "many"])
def test_gpus_of_a_walk(capsys, gpus):
    with pytest.raises(SystemExit):
        checkpoint_walk.main([f"--gpus={gpus}", "--", "--xielu"])
    assert "error: argument --gpus: must be " in capsys.readouterr().err


def test_the_entry_ends_with_megatrons_words_in_one_line(tmp_path):
    run = train(tmp_path, "--xielu --num-attention-heads 3", succeeds=False)
    last = run.output.rstrip().splitlines()[-1]
    assert last.startswith("megatron_xielu: error: Megatron does not take these arguments: ")
    assert "args.num_attention_heads" in last and "Traceback" not in run.output


def test_data_whose_index_cannot_be_written(tmp_path):
    """Beside the data, where Megatron writes it by itself."""
    write_dataset(tmp_path / "text", [40] * 600)
    (tmp_path / "text").touch()  # a file in the place of its folder: root cannot write there either
    model = [word for word in TINY_LLAMA if word != "--mock-data"]
    run = train(tmp_path, f"--xielu --data-path {tmp_path}/text", model=model, succeeds=False)
    last = run.output.rstrip().splitlines()[-1]
    assert last.startswith("megatron_xielu: error: an index of the data cannot be written: ")
    assert "--data-cache-path" in last and "Traceback" not in run.output
    flags = f"--xielu --data-path {tmp_path}/text --data-cache-path {tmp_path}/cache"
    assert len(train(tmp_path, f"{flags} --train-iters 1", model=model).losses) == 1


def test_a_mixture_without_validation(tmp_path):
    """Megatron builds a mixture of no samples for --eval-iters 0, and refuses to sample it."""
    for name in ("one", "two"):
        write_dataset(tmp_path / name, [40] * 600)
    model = [word for word in TINY_LLAMA if word != "--mock-data"]
    data = f"--data-path 1 {tmp_path}/one 2 {tmp_path}/two --data-cache-path {tmp_path}/cache"
    run = train(tmp_path, f"--xielu {data} --train-iters 1", model=model)
    assert len(run.losses) == 1


def test_a_rate_that_ends_in_nan_without_a_save_folder(tmp_path):
    """16: Megatron's code for a result that it rejects, and could compute again after a save."""
    run = train(tmp_path, "--xielu --lr 1e25", succeeds=False)
    assert run.returncodes == [16] and "Traceback" not in run.output
    assert "Unexpected result nan" in run.output
