"""What may stand in a variable: one table says so, every script before it does anything.

A wrong setting is one line and exit status 2, which no front end starts again.
"""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from launch import REPOSITORY
from test_pretrain_script import LAUNCHER, SBATCH, SMALL, output, run

from megatron_xielu.plan import variables as table
from megatron_xielu.plan.variables import VARIABLES

PRETRAIN, PREFLIGHT = "examples/pretrain.sh", "examples/preflight.sh"
# What the shell runs where it expects a number.
COMMAND = "a[$(touch PWNED)]"
TEXTS = {"PYTHON", "WANDB_PROJECT", "NETWORK"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--dryrun",
            "--dryrun is no flag of Megatron's or this package's; did you mean --dry-",
        ),
        ("--learning-rate 1e-3", "did you mean LR?"),
        ("--micro-batch 2 --no-such-thing", "did you mean MICRO_BATCH?"),
    ],
)
def test_a_flag_that_nobody_knows(flags, message, tmp_path):
    """Before anything is started; with a script that may have flags of its own a warning."""
    small = SMALL | {"RUN_DIR": f"{tmp_path}/run", "PREFLIGHT": "1"}
    result = run(f"examples/pretrain.sh {flags}", **small)
    assert result.returncode == 2 and message in result.stderr
    assert len(result.stderr.splitlines()) == len(re.findall("--", flags))
    assert not (tmp_path / "run").exists()
    other = output(f"{LAUNCHER} {flags}", **SMALL, ENTRY="script.py")
    assert "warning: --" in other and message in other


@pytest.mark.parametrize("flag", ["--fp8-recipe=blockwise", "--fp8-recipe blockwise"])
def test_the_recipe_of_fp8_is_a_variable(flag):
    """By hand it would leave what goes with the other recipe, and the preflight look for that."""
    result = run(f"{LAUNCHER} {flag}", MODEL="llama_1b", PRECISION="fp8")
    assert result.returncode == 2 and not result.stdout
    (line,) = result.stderr.splitlines()
    assert line.startswith("pretrain.sh: error: give FP8_RECIPE=…, not --fp8-recipe: ")


def test_names_that_a_cluster_may_set_are_warned_of():
    result = run(LAUNCHER, **SMALL, NUM_NODES="4", TOKEN="secret", TZ="UTC", MODELS="/models")
    assert result.returncode == 0
    assert result.stderr == (
        "pretrain.sh: warning: NUM_NODES=4 is not read; the variable is NNODES\n"
    )
    assert not run(LAUNCHER, **SMALL, NUM_NODES="4", NODES="4", NNODES="2").stderr


def test_short_names_may_be_others():
    """And hold what is not to be printed."""
    result = run(LAUNCHER, **SMALL, NNODE="11", TOKNES="5e9")
    assert result.returncode == 0
    assert result.stderr == (
        "pretrain.sh: warning: NNODE is not read; the variable is NNODES\n"
        "pretrain.sh: warning: TOKNES is not read; the variable is TOKENS\n"
    )


def test_names_that_others_read(tmp_path):
    """A model file, or a script, of the user's own."""
    model = tmp_path / "model.sh"
    debug = f"source {REPOSITORY}/examples/models/debug.sh"
    model.write_text(f': "${{GBS:=64}}"; GLOBAL_BATCH=$GBS; {debug}\n')
    variables = SMALL | {"GBS": "32"}
    assert "--global-batch-size 32" in output(LAUNCHER, **variables | {"MODEL": str(model)})
    assert run(LAUNCHER, **variables).returncode == 2
    result = run(LAUNCHER, **variables, ENTRY="script.py")
    assert result.returncode == 0 and "warning: GBS=32 is not read" in result.stderr


@pytest.mark.parametrize(
    "variables, words",
    [
        ({"MODEL": "llama_9b"}, "MODEL=llama_9b: no file"),
        ({"ACTIVATION": "selu"}, "ACTIVATION=selu: choose"),
        ({"TOKENS": "125 billion"}, "TOKENS=125 billion is not a number"),
        ({"TP": "two"}, "TP=two is not a whole number"),
        ({"TP": "010"}, "TP=010 is not a whole number"),
        ({"RESTART_BUDGET": "9" * 30}, f"RESTART_BUDGET={'9' * 30} is not a whole number"),
        ({"GATED_FFN_SIZE": "wide"}, "GATED_FFN_SIZE=wide is not a whole number"),
        ({"EVAL_ITERS": "-1"}, "EVAL_ITERS=-1 is not a whole number"),
        ({"GLOBAL_BATCH": "0"}, "GLOBAL_BATCH=0 must be above 0"),
        ({"FAULT_TOLERANCE": "yes"}, "FAULT_TOLERANCE=yes: choose 0 or 1"),
        ({"PREFLIGHT": "yes"}, "PREFLIGHT=yes: choose 0 or 1"),
        ({"PRECISION": "fp16"}, "PRECISION=fp16: choose bf16, fp32 or fp8"),
        (
            {"MOCK_DATA": "1", "PRECISION": "fp8", "DEVICE": "cpu"},
            "PRECISION=fp8 needs a GPU; drop it for a CPU run",
        ),
        (
            {"MOCK_DATA": "1", "PRECISION": "fp8", "GATED_FFN_SIZE": "6148"},
            "FP8_RECIPE=tensorwise needs multiples of 16 as widths on a tensor-parallel rank, and "
            "GATED_FFN_SIZE makes 9222; change it, or TP=1, or drop PRECISION=fp8",
        ),
        ({"FP8_RECIPE": "delayed"}, "FP8_RECIPE=delayed: choose tensorwise, blockwise or mxfp8"),
        ({"FP8_RECIPE": "mxfp8"}, "FP8_RECIPE=mxfp8 needs PRECISION=fp8"),
        ({"DECAY_NORMS": "yes"}, "DECAY_NORMS=yes: choose 0 or 1"),
        (
            {"DECAY_NORMS": "1", "ENTRY": "script.py"},
            "DECAY_NORMS=1 needs this package's entry, not ENTRY=script.py",
        ),
        ({"DEVICE": "tpu"}, "DEVICE=tpu: choose"),
        ({"OPTIMIZER_FORMAT": "tp"}, "OPTIMIZER_FORMAT=tp: choose"),
        ({"BUCKET_SIZE": "88M"}, "BUCKET_SIZE=88M is not a whole number"),
        ({"NODE_RANK": "1"}, "NODE_RANK=1 must be below NNODES=1"),
        ({"MASTER_PORT": "65535"}, "MASTER_PORT=65535 must be below 65535"),
        ({"RUN_DIR": "-run"}, "RUN_DIR=-run looks like an option; write ./-run"),
        ({"TOKENIZER": "null"}, "TOKENIZER=null needs VOCAB_SIZE"),
        ({"TOKENS": "0"}, "TOKENS is less than one step of GLOBAL_BATCH=440\n"),
        ({}, "no data: set DATA_ARGS"),
        ({"MOCK_DATA": "1", "NNODES": "11"}, "NNODES=11 needs MASTER_ADDR, the address of node 0"),
        (
            {"MOCK_DATA": "1", "NNODES": "8"},
            "GLOBAL_BATCH=440 is not a multiple of MICRO_BATCH=5 × 64 data-parallel ranks; these "
            "work: NNODES=11, or GLOBAL_BATCH=448 MICRO_BATCH=1, or GLOBAL_BATCH=384 MICRO_BATCH=3",
        ),
        (
            {"MOCK_DATA": "1", "MODEL": "llama_3b", "NNODES": "32"},
            "these work: NNODES=40, or NNODES=20, or TP=2 MICRO_BATCH=5, or GLOBAL_BATCH=512",
        ),
        ({"MOCK_DATA": "1"}, "libcuda.so.1"),
        ({"NVTE_FWD_LAYERNORM_SM_MARGIN": "x"}, "NVTE_FWD_LAYERNORM_SM_MARGIN=x is not a whole"),
        ({"NUMA_BINDING": "all"}, "NUMA_BINDING=all: choose node, socket, exclusive or core-"),
        ({"NUMA_BINDING": "node", "FAULT_TOLERANCE": "1"}, "add FAULT_TOLERANCE=0, or drop it"),
        ({"NUMA_BINDING": "node", "MOCK_DATA": "1"}, "NUMA_BINDING=node needs numactl, which"),
        ({"NUMA_BINDING": "node", "DEVICE": "cpu"}, "NUMA_BINDING=node needs GPUs; drop it"),
        ({"MOCK_DATA": "1", "DATA": "x"}, "give one of MOCK_DATA=1, DATA_ARGS and DATA"),
        ({"NNODES": "0"}, "NNODES=0 must be above 0"),
        ({"NETWORK": "ib"}, "NETWORK=ib is not one of"),
        ({"NODES": "11"}, "NODES=11 is not read; the variable is NNODES"),
        ({"MIN_BANDWITH": "9"}, "MIN_BANDWITH=9 is not read; the variable is MIN_BANDWIDTH"),
        ({"MOCK_DATA": "1", "ENTRY": "/nowhere.py"}, "ENTRY=/nowhere.py: there is no /nowhere.py"),
        ({"GLOBAL_BACTH": "8"}, "GLOBAL_BACTH=8 is not read; the variable is GLOBAL_BATCH"),
        ({"NUM_LAYERS": "many"}, "NUM_LAYERS=many is not a whole number"),
        ({"LR": "nan"}, "LR=nan is not a number"),
        ({"GPU_MEMORY_GIB": "all"}, "GPU_MEMORY_GIB=all is not a number"),
        ({"STRAGGLER_RATIO": "1"}, "STRAGGLER_RATIO=1 must be above 1, or 0"),
        ({"STRAGGLER_RATIO": "often"}, "STRAGGLER_RATIO=often is not a number"),
        ({"PROFILE_STEPS": "103-100"}, "PROFILE_STEPS=103-100 is not steps such as 100-103"),
        ({"PROFILE_STEPS": "0-3"}, "PROFILE_STEPS=0-3 is not steps such as 100-103"),
        ({"PROFILE_STEPS": "2-3", "MOCK_DATA": "1"}, "PROFILE_STEPS=2-3 needs nsys"),
        ({"SPLIT": "most"}, "SPLIT=most is not shares such as 990,10,0"),
        ({"RENDEZVOUS_TIMEOUT": "0"}, "RENDEZVOUS_TIMEOUT=0 must be above 0"),
        ({"PREFLIGHT_TIMEOUT": "soon"}, "PREFLIGHT_TIMEOUT=soon is not a whole number"),
        ({"MASTER_ADDR": "a;b"}, "MASTER_ADDR=a;b is not a host's name or address"),
        ({"LOCAL_ADDR": "a b"}, "LOCAL_ADDR=a b is not a host's name or address"),
        ({"MEGATRON_XIELU_NODE": "a/b"}, "MEGATRON_XIELU_NODE=a/b is not a host's name"),
        ({"RUN_DIR": "a\nb"}, "RUN_DIR=a\\nb has a line end"),
        ({"RUN_DIR": "a\udcff"}, "RUN_DIR=a\\udcff is not UTF-8"),
        ({"MODEL": "1\nb"}, "MODEL=1?b: no file"),
        ({"PYTHON": "1\nb"}, "PYTHON=1?b: there is no such program"),
        ({"TOKENIZER": "-x"}, "TOKENIZER=-x looks like an option; write ./-x"),
        ({"PYTHON": "/no/such"}, "PYTHON=/no/such: there is no such program"),
        ({"PYTHON": "false"}, "PYTHON=false does not work, or is older than 3.9"),
    ],
)
def test_bad_settings_name_the_variable_and_leave_nothing(variables, words, tmp_path):
    result = run("examples/pretrain.sh", **{"RUN_DIR": str(tmp_path / "run"), **variables})
    assert result.returncode == 2
    assert words in result.stderr and len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("value", "may_have_it"),
    [
        (COMMAND, {*TEXTS, "MODEL", "DATA_ARGS", "TOKENIZER", "RUN_DIR", "DATA_CACHE"}),
        ("-x", TEXTS),
        ("x\ny", set()),
    ],
)
def test_no_value_is_a_command_an_option_or_two_lines(value, may_have_it):
    """But in a list, which any white space parts."""
    names = VARIABLES - {"DATA", "ENTRY"}
    faults = list(table.faults(dict.fromkeys(names, value)))
    assert {fault.partition("=")[0] for fault in faults} == names - may_have_it
    assert all(fault.isprintable() for fault in faults)


def test_every_variable_of_a_flag_is_in_the_table():
    """And names of nodes as they are."""
    choices = {choice.partition("=")[0] for choice in table._CHOICE.values()}
    assert {*table._SAME.values(), *table._FROM.values(), *choices} <= VARIABLES
    for name in ("n1", "me@host-2.site", "10.0.0.1", "fe80::1%eth0", "::1", "ip_1"):
        assert not list(table.faults({"MEGATRON_XIELU_NODE": name}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("LR", value) for value in (".5e-3", "+1e-3", "5.E-4")),
        ("TOKENS", "+.5e12"),
        ("MASTER_ADDR", "[::1]"),
        *(("NODE_LIST", value) for value in ("node[01-04]", "n1,n2", "n1 *")),
        ("OMP_NUM_THREADS", " 4, 2 "),
    ],
)
def test_forms_of_others_are_not_refused(name, value):
    assert list(table.faults({name: value})) == []
    assert list(table.faults({name: f"{value};"})) or name == "NODE_LIST"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (")", "line 1: syntax error near unexpected token"),
        ("exit 1", "it ends the script, with 1"),
        ("exit 0", "it ends the script, with 0"),
        ("false\n{debug}", "it ends the script, with 1"),
        ("echo $NO_SUCH", "line 1: NO_SUCH: unbound variable"),
        ("{debug}\nunset HIDDEN_SIZE LR", "does not set HIDDEN_SIZE, LR"),
        ("{debug}\nTP=two", "TP=two is not a whole number"),
        # What it computes with was judged before.
        ("GLOBAL_BATCH=$((MICRO_BATCH * 8))\n{debug}", f"MICRO_BATCH={COMMAND} is not a whole"),
    ],
)
def test_a_model_file_that_is_wrong(tmp_path, content, words):
    """It neither ends the script as if it were done, nor is it tried again."""
    model = tmp_path / "model.sh"
    model.write_text(content.replace("{debug}", f"source {REPOSITORY}/examples/models/debug.sh"))
    given = {"MICRO_BATCH": COMMAND} if "MICRO_BATCH" in content else {}
    model_and_run = {"MODEL": str(model), "RUN_DIR": f"{tmp_path}/run"}
    result = run(PRETRAIN, **SMALL | model_and_run, **given)
    assert result.returncode == 2 and words in result.stderr
    assert len(result.stderr.splitlines()) == 1 and not (tmp_path / "run").exists()
    assert not (REPOSITORY / "PWNED").exists()


def test_a_model_file_knows_what_pretrain_has_set(tmp_path):
    """And a name that was mistyped is told all the same."""
    model = tmp_path / "model.sh"
    model.write_text('LR=3e-3; source "$here/models/debug.sh"; : "$MODEL $PYTHON"\n'
                     '[[ $ACTIVATION == swiglu ]] || NUM_LAYERS=7\n')  # fmt: skip
    variables = SMALL | {"MODEL": str(model)}
    assert "--num-layers 7" in output(LAUNCHER, **variables)
    result = run(LAUNCHER, **variables, ACTIVATON="swiglu")
    assert result.returncode == 2 and "the variable is ACTIVATION" in result.stderr


def test_an_address_in_brackets_and_a_run_dir_that_looks_like_an_option():
    where = {"NNODES": "2", "MASTER_ADDR": "[::1]", "RUN_DIR": "./-x", "WANDB_PROJECT": "p"}
    for command in (LAUNCHER, "examples/torchrun/launch.sh a b -- --dry-run"):
        printed = output(command, **SMALL | where)
        assert "--rdzv-id=-x " in printed and "--wandb-exp-name=-x " in printed
        assert "--rdzv-endpoint ::1:29500 " in printed


def test_a_model_file_beside_the_caller(tmp_path):
    """Not one of the same name that lies in PATH."""
    for folder, layers in (("bin", 3), (".", 7)):
        (tmp_path / folder).mkdir(exist_ok=True)
        text = f"NUM_LAYERS={layers}; source {REPOSITORY}/examples/models/debug.sh\n"
        (tmp_path / folder / "mine.sh").write_text(text)
    command = f'cd {tmp_path} && PATH="$PWD/bin:$PATH" {REPOSITORY}/{LAUNCHER}'
    assert "--num-layers 7" in output(command, **SMALL | {"MODEL": "mine.sh"})


def test_data_and_entry_on_lines_of_their_own():
    text = re.sub(
        r"[\\\s]+", " ", output(LAUNCHER, ENTRY="a.py\n--x", DATA="1 s3://b/c\n2 s3://b/d")
    )
    assert "--data-path 1 s3://b/c 2 s3://b/d --split" in text and " a.py --x " in text


@pytest.mark.parametrize(
    ("path", "is_folder"),
    [
        (".", False),
        ("events", False),
        *((name, True) for name in ("attempts", "events/n1.finished")),
    ],
)
def test_run_dir_that_cannot_be_written_to(tmp_path, path, is_folder):
    """Found before the ranks start: a file in place of a folder, or the other way round."""
    place = tmp_path / "run" / path
    place.parent.mkdir(parents=True, exist_ok=True)
    place.mkdir() if is_folder else place.touch()
    where = {"RUN_DIR": f"{tmp_path}/run", "MEGATRON_XIELU_NODE": "n1"}
    result = run(PRETRAIN, **where, **SMALL)
    assert result.returncode == 2, result.stderr
    assert f"RUN_DIR={tmp_path}/run cannot be written to" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("tracker", ["", "4\n6", "release", "a\\"])
def test_budget_with_a_damaged_tracker(tmp_path, tracker):
    """Three attempts that began at no checkpoint are as many as a run may make."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/latest_checkpointed_iteration.txt").write_text(tracker)
    (tmp_path / "attempts").write_text("0\n0\n0\n")
    result = run("examples/pretrain.sh", RUN_DIR=str(tmp_path), **SMALL)
    assert result.returncode == 4, result.stderr
    assert "3 attempts in a row ended without a checkpoint after iteration 0" in result.stderr


def test_a_run_that_falls_back_and_returns_comes_no_further(tmp_path):
    """The checkpoint of iteration 6 is bad each time that one is written."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/latest_checkpointed_iteration.txt").write_text("4")
    (tmp_path / "attempts").write_text("2\n6\n4\n6\n")
    result = run("examples/pretrain.sh", RUN_DIR=str(tmp_path), **SMALL)
    assert result.returncode == 4, result.stderr
    assert "3 attempts" in result.stderr


def test_a_preflight_by_hand_needs_to_know_node_0():
    result = run("examples/preflight.sh", NNODES="8")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        "preflight.sh: error: NNODES=8 needs MASTER_ADDR, the address of node 0\n"
    )
    result = run("examples/preflight.sh", NODES="8")
    assert result.returncode == 2 and "NODES=8 is not read; the variable is NNODES" in result.stderr


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        ("examples/torchrun/launch.sh --help", 0, "examples/torchrun/launch.sh host1 host2"),
        ("examples/torchrun/launch.sh a --dry-run", 2, "error: --dry-run is no host; flags stand"),
        ("examples/slurm/pretrain.sbatch --lr 1", 2, "error: not in a job; submit it with sbatch"),
        ("examples/slurm/pretrain.sbatch --help", 0, "a job that is stopped, preempted or fails"),
    ],
)
def test_front_ends_started_wrongly(command, code, message):
    """They would start again for ever, or say what the shell says."""
    environment = {name: word for name, word in os.environ.items() if "SLURM" not in name}
    done = subprocess.run(
        ["bash", *command.split()], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    assert done.returncode == code and message in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("srun_args", "words"),
    [
        ('--comment="two words"', "is parted at blanks: no line ends, quotes or backslashes"),
        ("--mpi=pmix\n--label", "SRUN_ARGS=--mpi=pmix?--label is parted at blanks"),
        ("--mpi=pmix touch PWNED", "SRUN_ARGS: touch is no option of srun; write --name=value"),
        ("--mpi=pmix -- touch", "SRUN_ARGS: -- is no option of srun"),
        # The script's own.
        *(
            (word, f"SRUN_ARGS: {word} is the script's: one task on every node")
            for word in ("--ntasks-per-node=4", "--ntasks=8", "-n8", "--nodes=2", "-N2", "-K0")
        ),
        ("--label --kill-on-bad-exit=0", "SRUN_ARGS: --kill-on-bad-exit=0 is the script's"),
        ("--environment=x", "SRUN_ARGS: --environment=x is another container than IMAGE=y.sif"),
        ("--container-image=x", "SRUN_ARGS: --container-image=x is another container than IMAGE"),
    ],
)
def test_options_of_srun_that_are_none(srun_args, words):
    """What stood there would be taken for the program to run, or undo what the script relies on."""
    result = run(SBATCH, SRUN_ARGS=srun_args, IMAGE="y.sif")
    assert (result.returncode, result.stdout) == (2, "")
    assert words in result.stderr and len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("variables", "flags", "words"),
    [
        ({"NEED_GIB": "nan"}, "", "NEED_GIB=nan is not a number"),
        ({"MIN_BANDWIDTH": "fast"}, "", "MIN_BANDWIDTH=fast is not a number"),
        ({"TP": "two"}, "", "TP=two is not a whole number"),
        ({"TP": "2"}, "", "--tensor-model-parallel-size 2 does not divide 1 ranks"),
        ({"GPUS_PER_NODE": "0"}, "", "GPUS_PER_NODE=0 must be above 0"),
        ({"PREFLIGHT_TIMEOUT": "soon"}, "", "PREFLIGHT_TIMEOUT=soon is not a whole number"),
        ({"OMP_NUM_THREADS": "all"}, "", "OMP_NUM_THREADS=all is not"),
        ({"MASTER_PORT": COMMAND}, "", f"MASTER_PORT={COMMAND} is not a whole number"),
        ({"NODE_RANK": COMMAND}, "", f"NODE_RANK={COMMAND} is not a whole number"),
        ({"NNODES": COMMAND}, "", f"NNODES={COMMAND} is not a whole number"),
        (
            {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "x';touch PWNED;'"},
            *("", "MASTER_ADDR=x';touch PWNED;' is not a host's name"),
        ),
        ({"PYTHON": "/no\nsuch"}, "", "PYTHON=/no?such: there is no such program"),
        ({}, "--min-bandwidth fast", "--min-bandwidth: must be a number, not 'fast'"),
        ({}, "--no-such", "unrecognized arguments: --no-such"),
        ({}, "-- --padded-vocab-size x", "--padded-vocab-size: must be a whole number"),
    ],
)
def test_a_preflight_that_is_set_wrongly(variables, flags, words):
    """In a line of its own, which the ranks' output does not hide; nothing has run."""
    small = {"DEVICE": "cpu", "GPUS_PER_NODE": "1"} | variables
    result = run(f"{PREFLIGHT} {flags}", **small)
    assert (result.returncode, result.stdout) == (2, ""), result.stdout + result.stderr
    assert words in result.stderr and len(result.stderr.splitlines()) == 1
    assert not (REPOSITORY / "PWNED").exists()


class Hosts:
    """launch.sh with a pretrain.sh and an ssh that stand in: "hosts" are shells on this machine."""

    def __init__(self, folder: Path, pretrain: str) -> None:
        self.folder = folder
        launch = folder / "examples/torchrun/launch.sh"
        launch.parent.mkdir(parents=True)
        launch.write_text((REPOSITORY / "examples/torchrun/launch.sh").read_text())
        # The options, the host, and what it is to run.
        ssh = "while [[ $1 == -* ]]; do shift 2; done\n[[ $1 != down ]] || exit 255\n"
        ssh += 'echo "$@" >>"$0.log"\nshift\nexec env -i PATH="$PATH" bash -c "$*"'
        (folder / "megatron_xielu").mkdir()
        for name in ("megatron_xielu/__init__.py", "pyproject.toml"):
            (folder / name).touch()
        snapshot = (REPOSITORY / "examples/snapshot.sh").read_text()
        for path, script in (
            ("examples/pretrain.sh", pretrain),
            ("examples/snapshot.sh", snapshot),
            ("ssh", ssh),
        ):
            (folder / path).write_text(f"#!/bin/bash\n{script}\n")
            (folder / path).chmod(0o755)

    def start(self, *hosts: str, **variables: str) -> subprocess.Popen[str]:
        settings = {"RESTART_DELAY": "0", "SSH": f"{self.folder}/ssh", "PATH": os.environ["PATH"]}
        return subprocess.Popen(
            ["bash", str(self.folder / "examples/torchrun/launch.sh"), *hosts],
            cwd=self.folder,
            env=settings | variables,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def run(self, *hosts: str, **variables: str) -> tuple[int, str]:
        process = self.start(*hosts, **variables)
        try:
            said, _ = process.communicate(timeout=30)
        finally:
            process.kill()
        return process.returncode, said


@pytest.mark.parametrize(
    ("hosts", "variables", "words"),
    [
        ("a b/c", {}, "b/c is not a host's name"),
        ("a b&c", {}, "b&c is not a host's name"),
        ("a -oProxyCommand=x", {}, "is no host"),
        ("a", {"MASTER_ADDR": "$(touch PWNED)"}, "MASTER_ADDR=$(touch PWNED) is not a host's name"),
        ("a", {"RESTART_DELAY": "soon"}, "RESTART_DELAY=soon is not a number of seconds"),
        ("a", {"RESTART_BUDGET": COMMAND}, f"RESTART_BUDGET={COMMAND} is not a whole number"),
        ("a", {"RUN_DIR": "a\nb"}, "RUN_DIR has a line end or another control character"),
        ("a", {"SSH": "/no/such -v"}, "SSH=/no/such -v: there is no such program"),
    ],
)
def test_launch_refuses_before_it_calls_anyone(tmp_path, hosts, variables, words):
    code, said = Hosts(tmp_path, "exit 0").run(*hosts.split(), **variables)
    assert code == 2 and words in said and len(said.splitlines()) == 1
    assert not (tmp_path / "ssh.log").exists() and not (tmp_path / "PWNED").exists()


@pytest.mark.parametrize(
    ("pretrain", "code", "starts"),
    [
        # Killed before it counts the attempt: three starts, one of which was the first.
        ("echo >>starts; kill -9 $$", 4, 3),
        # Counted, and so pretrain.sh's to end.
        (
            "echo >>starts; echo >>run/attempts; (($(wc -l <starts) < 5)); exit $(($? ? 4 : 1))",
            4,
            5,
        ),
        # What one host refuses is refused, whatever becomes of the first.
        ("echo >>starts; ((NODE_RANK)) && exit 2; sleep 20", 2, 2),
    ],
)
def test_launch_does_not_start_again_for_ever(tmp_path, pretrain, code, starts):
    hosts = ("a", "b") if "NODE_RANK" in pretrain else ("a",)
    (tmp_path / "run").mkdir()
    ended, said = Hosts(tmp_path, pretrain).run(*hosts, RUN_DIR=f"{tmp_path}/run")
    assert ended == code, said
    assert len((tmp_path / "starts").read_text().splitlines()) == starts


def test_launch_in_an_allocation_starts_no_job_of_slurms(tmp_path):
    code, said = Hosts(tmp_path, "env; exit 0").run("a", SLURM_JOB_ID="7", WORD="passed on")
    assert code == 0 and "WORD=passed on" in said and "SLURM" not in said


def of_network(network: str, **variables: str) -> dict[str, str]:
    """What network.env.sh makes of an environment."""
    environment = {"PATH": os.environ["PATH"], "NETWORK": network, **variables}
    script = "set -euo pipefail; source examples/network.env.sh; env -0"
    done = subprocess.run(
        ["bash", "-c", script], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    return dict(pair.split("=", 1) for pair in done.stdout.split("\0") if pair)


def test_every_network_and_what_slingshot_needs():
    """On one node no plugin is forced; what is in the environment wins."""
    said = run(LAUNCHER, NETWORK="ib").stderr
    known = re.search(r"is not one of (.*)", said)[1].split(", ")
    one, two = ({network: of_network(network, NNODES=n) for network in known} for n in "12")
    assert "cxi" in one and all(found["NCCL_DEBUG"] == "WARN" for found in one.values())
    assert two["cxi"]["NCCL_NET"] == "AWS Libfabric" and "NCCL_NET" not in one["cxi"]
    assert one["cxi"]["NCCL_PROTO"] == "^LL128"  # which corrupts data between GH200s
    assert of_network("cxi", NNODES="2", NCCL_NET="ofi", NCCL_PROTO="LL")["NCCL_NET"] == "ofi"


@pytest.mark.parametrize("run_dir", ["it's here", 'a "b" $HOME; x'])
def test_launch_stops_a_run_whatever_its_folder_is_called(tmp_path, run_dir):
    waits = 'trap "touch stopped; exit 75" TERM; touch ready; for _ in {1..300}; do sleep 0.1; done'
    hosts = Hosts(tmp_path, waits)
    process = hosts.start("me@a", RUN_DIR=run_dir)
    try:
        end = time.monotonic() + 20
        while not (tmp_path / "ready").exists():
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=20)
    finally:
        os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
    assert process.returncode == 75, said
    assert (tmp_path / "stopped").exists()


FRONT_END_SCRIPTS = ("slurm/pretrain.sbatch", "torchrun/launch.sh")

# Not for a user to set.
SHELLS_OWN = r"PYTHONPATH|TMPDIR|SLURM\w+|MEGATRON_XIELU_(GUARD|VERDICT)"


@pytest.mark.parametrize("name", ["pretrain.sh", "preflight.sh", *FRONT_END_SCRIPTS])
def test_help_names_every_variable(name):
    script = REPOSITORY / "examples" / name
    files = [script]
    if name == "pretrain.sh":
        files += [*script.parent.glob("models/*.sh"), script.with_name("command.sh")]
        files.append(script.with_name("environment.sh"))
    code = "".join(file.read_text() for file in files)
    read = {
        variable
        for variable in re.findall(r"\$\{([A-Z][A-Z_]+):?[-=+]", code)
        if not re.fullmatch(SHELLS_OWN, variable)
    }
    text = script.read_text().partition("\nset -")[0]  # what --help prints
    assert len(read) > 3
    if name == "pretrain.sh":
        assert read <= {*VARIABLES, *table._OF_OTHERS}
        read |= VARIABLES
    assert {variable for variable in read if not re.search(rf"\b{variable}\b", text)} == set()
