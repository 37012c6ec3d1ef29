"""examples/pretrain.sh: what every model, activation and front end would run, and what is refused.

Five that differ in kind lie in dry_runs/, to the letter; with the variable WRITE_DRY_RUNS this file
writes them anew, to be read before they are committed. Of all others Megatron's own parser and
checks say whether they are right.
"""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import test_kubernetes
from dataset_files import write_dataset, write_prepared, write_tokenizer
from launch import REPOSITORY
from launcher_command import printed_command
from megatron_arguments import validated

from megatron_xielu.checkpoints.optimizer_format import default_bucket_size
from megatron_xielu.plan import checks
from megatron_xielu.plan.model import Model
from megatron_xielu.plan.run import Cluster, Plan
from megatron_xielu.plan.variables import VARIABLES

MODELS = ["llama_1b", "llama_3b", "debug"]
ACTIVATIONS = ["xielu", "xiprelu", "relu2", "swiglu", "gelu"]
EXPECTED = Path(__file__).parent / "dry_runs"
LAUNCHER = "examples/pretrain.sh --dry-run"
SBATCH = "bash examples/slurm/pretrain.sbatch --dry-run"
ON_SLURM = {"NNODES": "11"}
IN_PYXIS = {"IMAGE": "registry/xielu:1", "MOUNTS": "/scratch:/scratch,/data:/data"}
IN_APPTAINER = {"IMAGE": "/images/xielu.sif", "MOUNTS": "/scratch,/data"}
SLURM_SETS = {"NNODES": "11", "MASTER_ADDR": "node1", "MASTER_PORT": "20000"}
# Front end: its command line, what is set for it, what it sets for pretrain.sh.
FRONT_ENDS = {
    "slurm": (SBATCH, ON_SLURM, SLURM_SETS),
    "slurm-pyxis": (SBATCH, ON_SLURM | IN_PYXIS, SLURM_SETS),
    "slurm-apptainer": (SBATCH, ON_SLURM | IN_APPTAINER, SLURM_SETS),
    "torchrun": (
        "examples/torchrun/launch.sh a b -- --dry-run",
        {"MICRO_BATCH": "1", "GLOBAL_BATCH": "448"},
        {"NNODES": "2", "MASTER_ADDR": "a"},
    ),
}


def kubernetes(kind: str) -> tuple[str, dict[str, str], dict[str, str]]:
    """The front end of a pod: what its container runs, on node 3 of 11."""
    injected, inner = test_kubernetes.INJECTED[kind], test_kubernetes.container(kind)
    job = test_kubernetes.documents()["TrainJob"]["spec"]["trainer"]["env"]
    variables = {x["name"]: x["value"] for x in [*job, *inner["env"]] if "value" in x}
    del variables["DATA_ARGS"]  # is not here, which would be refused
    (script,) = inner["args"]
    sets = {
        "NNODES": "11",
        "NODE_RANK": "3",
        "MASTER_ADDR": injected["PET_MASTER_ADDR"],
        "MASTER_PORT": injected["PET_MASTER_PORT"],
        **{name: variables[name] for name in ("RUN_DIR", "TOKENIZER")},
    }
    command = script.replace(test_kubernetes.PRETRAIN, "examples/pretrain.sh --dry-run")
    return command, variables | injected, sets


FRONT_END_SCRIPTS = ("slurm/pretrain.sbatch", "torchrun/launch.sh")
FRONT_ENDS |= {f"kubernetes-{k.lower()}": kubernetes(k) for k in test_kubernetes.INJECTED}

SMALL = {"MODEL": "debug", "DEVICE": "cpu", "GPUS_PER_NODE": "1", "PREFLIGHT": "0"}

# A batch that divides by every layout of these tests, and a run that has many of them.
EVERYWHERE = {"MICRO_BATCH": "1", "GLOBAL_BATCH": "1760", "TOKENS": "125e9"}


def run(command: str, **variables: str) -> subprocess.CompletedProcess:
    """Run a command line of the repository with only these variables set."""
    return subprocess.run(
        ["bash", "-c", command],
        cwd=REPOSITORY,
        env={
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "FAULT_TOLERANCE": "0",
            "ASYNC_SAVE": "mcore",
            **variables,
        },
        capture_output=True,
        text=True,
        timeout=60,
    )


@functools.cache
def output(command: str, **variables: str) -> str:
    """Standard output of a dry run, without this machine's paths."""
    result = run(command, **variables)
    assert result.returncode == 0, result.stderr
    assert not result.stderr
    return result.stdout.replace(str(REPOSITORY), "/repository")


# Name of the expected output: command line, variables. Three ways to more than one node with the
# 1.1B and xIELU, another size on one node, and an activation of Megatron's on data made up.
CASES = {name: FRONT_ENDS[name][:2] for name in ("torchrun", "slurm-pyxis", "kubernetes-trainjob")}
CASES |= {
    "llama_3b-xielu": (LAUNCHER, {"MODEL": "llama_3b"}),
    "debug-swiglu": (LAUNCHER, {"MODEL": "debug", "ACTIVATION": "swiglu"}),
}


@pytest.mark.parametrize("name", CASES)
def test_dry_run(name):
    command, variables = CASES[name]
    printed, expected = output(command, **variables), EXPECTED / f"{name}.txt"
    if os.environ.get("WRITE_DRY_RUNS"):
        expected.write_text(printed)
    assert printed == expected.read_text()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_every_command_is_the_launchers_and_trains_the_planned_model(
    model, activation, front_end, monkeypatch
):
    """A front end adds its own first lines and nothing else; Megatron takes what is left."""
    from megatron.training.training import num_floating_point_operations

    command, variables, sets = FRONT_ENDS[front_end]
    what = {"MODEL": model, "ACTIVATION": activation, **EVERYWHERE, "PYTHON": "true"}
    whole = output(command, **{**variables, **what})
    run_dir = {"RUN_DIR": f"/repository/runs/{model}-{activation}"}
    command = output(LAUNCHER, **{**run_dir, **sets, **what})
    assert whole.endswith(command)
    # A Slurm step or a list of hosts; a pod has nothing to add.
    assert bool(whole.removesuffix(command)) is not front_end.startswith("kubernetes")

    words = printed_command(command)
    cluster = Cluster(int(flag(command, "--nnodes")), int(flag(command, "--nproc-per-node")))
    assert cluster.nodes == int(sets["NNODES"])
    plan = Plan(words[words.index("megatron_xielu.pretrain_gpt") + 1 :], cluster=cluster)
    assert checks.problems(plan, environment={}) == []
    assert plan.model.activation == activation
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    monkeypatch.setattr("megatron.training.arguments.get_device_arch_version", lambda: 9)  # H100
    args = validated(plan.argv, gpus=cluster.gpus)
    assert Model.of(args) == plan.model
    assert args.data_parallel_size == plan.data
    flops = num_floating_point_operations(args, args.global_batch_size)
    assert flops == plan.tokens_per_step() * plan.model.flops_per_token()


def test_a_container_changes_only_how_slurms_step_starts():
    steps = {
        name: output(*FRONT_ENDS[name][:1], **FRONT_ENDS[name][1], PYTHON="true").partition("\n")[0]
        for name in ("slurm", "slurm-pyxis", "slurm-apptainer")
    }
    before, shell, inside = steps["slurm"].partition(" bash ")
    inside = inside.replace("/repository/", "/opt/megatron_xielu/")
    pyxis = " --container-image=registry/xielu:1 --no-container-mount-home"
    pyxis += r" --container-mounts=/scratch:/scratch\,/data:/data"
    assert steps["slurm-pyxis"] == before + pyxis + shell + inside
    apptainer = r" apptainer exec --nv --bind /scratch\,/data /images/xielu.sif"
    assert steps["slurm-apptainer"] == before + apptainer + shell + inside


@pytest.mark.parametrize("model", ["llama_1b", "llama_3b"])
def test_activations_have_equal_parameters_and_flops(model):
    plans = [output(LAUNCHER, MODEL=model, ACTIVATION=activation) for activation in ACTIVATIONS]
    for pattern in (r"parameters +([\d,]+)", r"FLOPs per token +([\d.e+]+)"):
        numbers = [float(re.search(pattern, plan)[1].replace(",", "")) for plan in plans]
        assert max(numbers) / min(numbers) - 1 < 1e-3


def flag(text: str, name: str) -> str:
    """Value of a flag in the printed command."""
    return re.search(rf"{name} (\S+)", text)[1]


def test_tokens_become_samples_for_any_batch():
    """125e9 tokens, warm-up and decay in the published proportions, in whole batches."""
    for batch in (440, 512, 2048):
        text = output(LAUNCHER, TOKENS="125e9", GLOBAL_BATCH=str(batch), MICRO_BATCH="1")
        samples = int(flag(text, "--train-samples"))
        assert samples % batch == 0
        assert 0 <= samples * 4096 - 125e9 < batch * 4096
        assert int(flag(text, "--lr-warmup-samples")) == pytest.approx(samples / 35, abs=batch)
        decay = int(flag(text, "--lr-wsd-decay-samples"))
        assert decay == pytest.approx(samples * 14500 / 70000, abs=batch)
        assert flag(text, "--lr-decay-samples") == str(samples)


def test_published_schedule_is_met_exactly():
    for model, steps, warmup, decay in (
        ("llama_1b", 70_000, 2_000, 14_500),
        ("llama_3b", 48_000, 2_000, 10_000),
    ):
        text = output(LAUNCHER, MODEL=model)
        batch = int(flag(text, "--global-batch-size"))
        assert int(flag(text, "--train-samples")) == steps * batch
        assert int(flag(text, "--lr-warmup-samples")) == warmup * batch
        assert int(flag(text, "--lr-wsd-decay-samples")) == decay * batch


def test_environment_and_trailing_flags_override():
    text = output(LAUNCHER + " --lr 5e-4 --seed=7", NUM_LAYERS="12", LR="3e-4", RUN_DIR="/r")
    assert flag(text, "--num-layers") == "12"
    assert re.findall(r"--lr (\S+)", text) == ["3e-4", "5e-4"]
    assert text.index("--lr 5e-4") < text.index("--seed=7")
    assert flag(text, "--save") == "/r/checkpoints"


@pytest.mark.parametrize("command", [LAUNCHER, "examples/torchrun/launch.sh a -- --dry-run"])
def test_where_cd_looks_elsewhere_first(command):
    """It prints where it went, then, in the middle of what asks where a script lies."""
    assert output(command, CDPATH=str(REPOSITORY)) == output(command)


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


def test_names_that_a_cluster_may_set_are_warned_of():
    result = run(LAUNCHER, **SMALL, NUM_NODES="4", TOKEN="secret", TZ="UTC", MODELS="/models")
    assert result.returncode == 0
    assert result.stderr == (
        "pretrain.sh: warning: NUM_NODES=4 is not read; the variable is NNODES\n"
    )
    assert not run(LAUNCHER, **SMALL, NUM_NODES="4", NODES="4", NNODES="2").stderr


def test_of_ranks_that_are_no_whole_number_there_is_no_batch():
    result = run(LAUNCHER, NNODES="11", TP="3")
    assert result.returncode == 2 and "data-parallel ranks" not in result.stderr


def test_flags_behind_two_dashes():
    assert output(f"{LAUNCHER} -- --lr 1e-4") == output(f"{LAUNCHER} --lr 1e-4")


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


def test_another_step_than_the_learning_rate_was_chosen_for_is_told():
    assert (
        "warning: a step of 7,208,960 tokens is 4 times the model file's 1,802,240, for which its "
        "LR=0.0008 was chosen; rules of thumb, not measured here, are × 2 (square root) or × 4 "
        "(linear)\n"
    ) in output(LAUNCHER, GLOBAL_BATCH="1760")
    for flags, variables in (("", {}), ("", {"LR": "1e-3"}), (" --lr 1e-3", {})):
        batch = {"GLOBAL_BATCH": "1760"} if flags or variables else {}
        assert "the model file's" not in output(LAUNCHER + flags, **batch, **variables)


def test_a_plan_that_cannot_run_does_not_look_like_one_that_can():
    result = run(LAUNCHER, NNODES="8")
    assert result.returncode == 2
    assert "\n\nTHIS PLAN CANNOT RUN: 1 problem, told below\nmodel\n" in result.stdout
    assert "GPU-hours" not in result.stdout and "checkpoints\n" not in result.stdout


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


@pytest.mark.parametrize("model, nodes", [("llama_1b", 11), ("llama_3b", 32)])
def test_gradient_buckets_are_megatrons_at_the_papers_layout_and_stay(model, nodes):
    """A resume needs the same ones, and Megatron's own size changes with the node count."""
    papers = output(LAUNCHER, MODEL=model, NNODES=str(nodes))
    ranks = int(re.search(r"DP (\d+)", papers)[1])
    assert int(flag(papers, "--ddp-bucket-size")) == default_bucket_size(ranks) > 40_000_000
    fewer = output(LAUNCHER, MODEL=model)
    assert flag(fewer, "--ddp-bucket-size") == flag(papers, "--ddp-bucket-size")
    assert "later jobs keep TP, PP, EP and buckets\n" in fewer
    assert flag(output(LAUNCHER, BUCKET_SIZE="5"), "--ddp-bucket-size") == "5"


def test_the_optimizer_state_is_gathered_only_on_request():
    full = "--dist-ckpt-optim-fully-reshardable"
    for variables, given in (({}, False), ({"OPTIMIZER_FORMAT": "full"}, True)):
        text = output(LAUNCHER, **variables)
        command, _, plan = text.partition("\n\n")
        assert (full in command) is given
        assert ("fully_reshardable: a later job" in plan) is given
        assert "--ckpt-fully-parallel-load" in command


def test_data_in_one_list_or_by_split(tmp_path):
    splits = '{"train": ["s3://bucket/text"], "valid": ["s3://bucket/some"], "test": null}'
    for name, flags, content in (
        ("list.txt", "--data-args-path {} --split 9/1", "s3://bucket/text"),
        ("splits.json", "--per-split-data-args-path {}", splits),
    ):
        (tmp_path / name).write_text(content)
        text = output(LAUNCHER, DATA_ARGS=str(tmp_path / name), SPLIT="9/1")
        text = re.sub(r"[\\\s]+", " ", text)
        assert flags.format(tmp_path / name) in text
        assert ("--split" in text) == (name == "list.txt")


@pytest.mark.parametrize(
    ("variables", "tokenizer", "padding", "taken"),
    [
        ({"DATA_ARGS": "{data}"}, "{data}/tokenizer", "1024", "TOKENIZER= PADDED_VOCAB_SIZE="),
        ({"DATA": "{data}"}, "{data}/tokenizer", "1024", "TOKENIZER= PADDED_VOCAB_SIZE="),
        (
            {"DATA": "{data}/train/00000", "SPLIT": "9,1,0"},
            *("{data}/tokenizer", "1024", "TOKENIZER= PADDED_VOCAB_SIZE="),
        ),
        ({"DATA_ARGS": "{data}", "PADDED_VOCAB_SIZE": "7"}, "{data}/tokenizer", "7", "TOKENIZER="),
        (
            {"DATA_ARGS": "{data}/per_split_data_args.json", "TOKENIZER": "{data}/tokenizer"},
            *("{data}/tokenizer", "1024", "PADDED_VOCAB_SIZE="),
        ),
        ({"DATA_ARGS": "{data}", "TOKENIZER": "some/name"}, "some/name", "147456", ""),
        # The data's, however it is spelt.
        *(
            ({"DATA_ARGS": "{data}", "TOKENIZER": spelt}, spelt, "1024", "PADDED_VOCAB_SIZE=")
            for spelt in ("{copy}", "{data}/tokenizer/tokenizer.json", "who/name")
        ),
        (
            {"DATA_ARGS": "{data}/manifest.json"},
            *("{data}/tokenizer", "1024", "TOKENIZER= PADDED_VOCAB_SIZE="),
        ),
        (
            {"DATA": "{data}/manifest.json"},
            *("{data}/tokenizer", "1024", "TOKENIZER= PADDED_VOCAB_SIZE="),
        ),
        # The model file's own, with its padding.
        ({"DATA_ARGS": "{papers}"}, "mistralai/Mistral-Nemo-Base-2407", "147456", ""),
        (
            {"DATA_ARGS": "{papers}", "TOKENIZER": "{papers}/tokenizer"},
            *("{papers}/tokenizer", "147456", ""),
        ),
    ],
)
def test_tokenizer_and_vocabulary_of_prepared_data(tmp_path, variables, tokenizer, padding, taken):
    """What is given wins, then the data, then the model file."""
    names = {"data": "who/name", "papers": "mistralai/Mistral-Nemo-Base-2407"}
    for folder, name in names.items():
        write_prepared(tmp_path / folder, ["a", "b"], name=name)
    write_tokenizer(tmp_path / "copy", ["a", "b"])
    folders = {folder: tmp_path / folder for folder in (*names, "copy")}
    result = run(LAUNCHER, **{name: text.format(**folders) for name, text in variables.items()})
    assert result.returncode == 0, result.stderr
    assert flag(result.stdout, "--tokenizer-model") == tokenizer.format(**folders)
    assert flag(result.stdout, "--padded-vocab-size") == padding
    said = re.sub("=[^ \n]*", "=", result.stderr)
    where = f"pretrain.sh: taken from {tmp_path}/data/manifest.json: "
    assert said == (f"{where}{taken}\n" if taken else "")


def test_data_that_do_not_fit_are_refused_in_a_dry_run(tmp_path):
    write_dataset(tmp_path / "text", [3] * 600, {0: 256})
    for data, message in ((f"{tmp_path}/text", "has token 256"), (f"{tmp_path}", "is a folder")):
        result = run(LAUNCHER, MODEL="debug", DATA=data)
        assert result.returncode == 2 and message in result.stderr


def test_other_scripts_get_the_layer_spec():
    text = output(LAUNCHER, ENTRY="/opt/megatron-lm/pretrain_gpt.py")
    assert "--spec megatron_xielu.layer_specs xielu_layer_spec" in text.replace(" \\\n   ", "")
    assert "--use-te-activation-func" in text and "--xielu " not in text


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
        ({"PRECISION": "fp8"}, "PRECISION=fp8: choose"),
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
            "work: NNODES=11, or GLOBAL_BATCH=448 MICRO_BATCH=1, or GLOBAL_BATCH=384 MICRO_BATCH=6",
        ),
        ({"MOCK_DATA": "1"}, "libcuda.so.1"),
        ({"MOCK_DATA": "1", "DATA": "x"}, "give one of MOCK_DATA=1, DATA_ARGS and DATA"),
        ({"NNODES": "0"}, "NNODES=0 must be above 0"),
        ({"NETWORK": "ib"}, "NETWORK=ib is not one of"),
        ({"NODES": "11"}, "NODES=11 is not read; the variable is NNODES"),
        ({"GLOBAL_BACTH": "8"}, "GLOBAL_BACTH=8 is not read; the variable is GLOBAL_BATCH"),
    ],
)
def test_bad_settings_name_the_variable_and_leave_nothing(variables, words, tmp_path):
    result = run("examples/pretrain.sh", **{"RUN_DIR": str(tmp_path / "run"), **variables})
    assert result.returncode == 2
    assert words in result.stderr and len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_run_dir_that_is_no_folder(tmp_path):
    (tmp_path / "file").touch()
    result = run("examples/pretrain.sh", RUN_DIR=f"{tmp_path}/file", **SMALL)
    assert result.returncode == 2
    assert result.stderr.endswith(f"RUN_DIR={tmp_path}/file cannot be written to\n")


@pytest.mark.parametrize("tracker", ["", "4\n6", "release", "a\\"])
def test_budget_with_a_damaged_tracker(tmp_path, tracker):
    """Three attempts that began at no checkpoint are as many as a run may make."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/latest_checkpointed_iteration.txt").write_text(tracker)
    (tmp_path / "attempts").write_text("0\n0\n0\n")
    result = run("examples/pretrain.sh", RUN_DIR=str(tmp_path), **SMALL)
    assert result.returncode == 4, result.stderr
    assert "3 attempts in a row ended without a checkpoint after iteration 0" in result.stderr


# Not for a user to set.
SHELLS_OWN = r"PYTHONPATH|SLURM\w+"


@pytest.mark.parametrize("name", ["pretrain.sh", "preflight.sh", *FRONT_END_SCRIPTS])
def test_help_names_every_variable(name):
    script = REPOSITORY / "examples" / name
    files = [script, *script.parent.glob("models/*.sh")] if name == "pretrain.sh" else [script]
    code = "".join(file.read_text() for file in files)
    read = {
        variable
        for variable in re.findall(r"\$\{([A-Z][A-Z_]+):?[-=+]", code)
        if not re.fullmatch(SHELLS_OWN, variable)
    }
    text = script.read_text().partition("\nset -")[0]  # what --help prints
    assert len(read) > 3
    if name == "pretrain.sh":
        others = {"MEGATRON_XIELU_NODE", "CUDA_DEVICE_MAX_CONNECTIONS"}
        assert read - others <= VARIABLES
        read |= VARIABLES
    assert {variable for variable in read if not re.search(rf"\b{variable}\b", text)} == set()
