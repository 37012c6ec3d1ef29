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
from argparse import Namespace
from pathlib import Path

import pytest
import test_kubernetes
from dataset_files import write_dataset, write_prepared, write_tokenizer
from launch import REPOSITORY
from launcher_command import printed_command
from megatron_arguments import validated

from megatron_xielu.checkpoints.optimizer_format import default_bucket_size
from megatron_xielu.common import fp8
from megatron_xielu.plan import checks
from megatron_xielu.plan.model import Model
from megatron_xielu.plan.run import Cluster, Plan

MODELS = ["llama_1b", "llama_3b", "debug"]
ACTIVATIONS = ["xielu", "xiprelu", "relu2", "swiglu", "gelu"]
EXPECTED = Path(__file__).parent / "dry_runs"
LAUNCHER = "examples/pretrain.sh --dry-run"
SBATCH = "bash examples/slurm/pretrain.sbatch --dry-run"
ON_SLURM = {"NNODES": "11"}
IN_PYXIS = {"IMAGE": "registry/xielu:1", "MOUNTS": "/scratch:/scratch,/data:/data"}
IN_PYXIS |= {"SRUN_ARGS": "--mpi=pmix  --network=disable_rdzv_get"}
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


def kubernetes() -> tuple[str, dict[str, str], dict[str, str]]:
    """The front end of a pod: what its container runs, on node 3 of 11."""
    injected, inner = test_kubernetes.INJECTED, test_kubernetes.container()
    job = test_kubernetes.documents()["TrainJob"]["spec"]["trainer"]["env"]
    variables = {x["name"]: x["value"] for x in [*job, *inner["env"]] if "value" in x}
    del variables["DATA_ARGS"]  # is not here, which would be refused
    (script,) = inner["args"]
    sets = {
        "NNODES": "11",
        "NODE_RANK": "3",
        "MASTER_ADDR": injected["PET_MASTER_ADDR"],
        "MASTER_PORT": injected["PET_MASTER_PORT"],
        **{name: variables[name] for name in ("RUN_DIR", "TOKENIZER", "NETWORK")},
    }
    command = script.replace(test_kubernetes.PRETRAIN, "examples/pretrain.sh --dry-run")
    return command, variables | injected, sets


FRONT_ENDS["kubernetes-trainjob"] = kubernetes()

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
    """Standard output of a dry run, without this machine's paths, or what changes with the code."""
    result = run(command, **variables)
    assert result.returncode == 0, result.stderr
    assert not result.stderr
    mine = f"/megatron_xielu-{os.getuid()}/"
    printed = re.sub("/code/[0-9a-f]{12}/", "/code/DIGEST/", result.stdout)
    return printed.replace(str(REPOSITORY), "/repository").replace(mine, "/megatron_xielu-UID/")


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


@pytest.mark.parametrize(
    ("model", "nodes", "layout"),
    [
        ("llama_1b", 1, {}),
        ("llama_1b", 11, {}),
        ("llama_1b", 32, {"GLOBAL_BATCH": "512", "MICRO_BATCH": "2"}),
        ("llama_3b", 1, {}),
        ("llama_3b", 11, {"GLOBAL_BATCH": "704"}),
        ("llama_3b", 32, {"TP": "2"}),  # the paper's
    ],
)
def test_what_makes_it_fast_is_in_megatrons_arguments(model, nodes, layout, monkeypatch):
    printed = output(LAUNCHER, MODEL=model, NNODES=str(nodes), **layout)
    words = printed_command(printed)
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    monkeypatch.setattr("megatron.training.arguments.get_device_arch_version", lambda: 9)  # H100
    words = words[words.index("megatron_xielu.pretrain_gpt") + 1 :]
    args = validated([*words, "--mock-data"], gpus=8 * nodes)
    assert (args.cross_entropy_loss_fusion, args.cross_entropy_fusion_impl) == (True, "native")
    assert (args.manual_gc, args.manual_gc_interval) == (True, 500)
    assert not args.create_attention_mask_in_dataloader
    assert args.check_for_nan_in_loss_and_grad
    assert args.data_cache_path == f"/repository/runs/{model}-xielu/cache"
    assert args.distributed_timeout_minutes == 30
    assert args.distributed_timeout_seconds_after_init == 600
    if model == "llama_3b":
        assert args.micro_batch_size == {1: 2, 2: 5}[args.tensor_model_parallel_size]
    free = re.search(r"total .* free \((\d+)%\)", printed)
    assert free and int(free[1]) > 10
    assert "  PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True\n" in printed

    alps = {"GPU": "gh200", "GPUS_PER_NODE": "4", "NNODES": str(2 * nodes), "NETWORK": "cxi"}
    printed = output(LAUNCHER, MODEL=model, **alps, **layout)
    others = printed_command(printed)
    assert others[others.index("megatron_xielu.pretrain_gpt") + 1 :] == words
    assert " of GH200's 989 TFLOP/s" in printed and "  NCCL_NET=AWS Libfabric\n" in printed


@pytest.mark.parametrize(
    ("flags", "variables", "missing"),
    [
        ("", {"LOSS_FUSION": "0"}, "--cross-entropy-loss-fusion"),
        # The gradients that it returns are bf16.
        ("", {"PRECISION": "fp32", "MICRO_BATCH": "1"}, "--cross-entropy-loss-fusion"),
        ("", {"DEVICE": "cpu"}, "--cross-entropy-loss-fusion"),
        ("", {"DEVICE": "cpu"}, "--log-memory-to-tensorboard"),
        ("", {"GC_INTERVAL": "0"}, "--manual-gc"),
        (" --reset-attention-mask", {}, "--no-create-attention-mask-in-dataloader"),
        ("", {"NAN_CHECK": "1"}, "--no-check-for-nan-in-loss-and-grad"),
    ],
)
def test_what_makes_it_fast_can_be_left_out(flags, variables, missing):
    given = "--numa-binding node", {"NUMA_BINDING": "node", "NAN_CHECK": "0"}
    everything = output(LAUNCHER, **given[1])
    assert f"    {missing} " in everything and given[0] in everything
    assert missing not in output(LAUNCHER + flags, **variables)


def test_a_collective_may_take_longer_before_the_first_step_is_done():
    text = output(LAUNCHER, TIMEOUT_MINUTES="45")
    assert flag(text, "--distributed-timeout-minutes") == "45"
    assert flag(text, "--distributed-timeout-seconds-after-init") == str(45 * 60)


def test_what_is_in_the_environment_stays(tmp_path):
    def environment(**variables: str) -> dict[str, str]:
        text = output(LAUNCHER, **variables).partition("\n\nenvironment\n")[2]
        lines = text.partition("\n\n")[0].splitlines()
        return dict(line.strip().split("=", 1) for line in lines)

    by_itself = environment(TMPDIR=str(tmp_path))
    assert by_itself["TRITON_CACHE_DIR"] == f"{tmp_path}/megatron_xielu-UID/triton"
    elsewhere = environment(TMPDIR="/of/another/machine")
    assert elsewhere["TRITON_CACHE_DIR"] == "/tmp/megatron_xielu-UID/triton"
    assert "HF_HUB_OFFLINE" not in by_itself
    chosen = dict.fromkeys(by_itself, "7") | {"HF_HUB_OFFLINE": "0"}
    assert environment(**chosen, TOKENIZER=str(tmp_path)) == chosen
    assert environment(TOKENIZER=str(tmp_path))["HF_HUB_OFFLINE"] == "1"
    assert "PYTORCH_CUDA_ALLOC_CONF" not in environment(PYTORCH_ALLOC_CONF="a:b")
    assert set(environment(DEVICE="cpu")) == {
        "CUDA_DEVICE_MAX_CONNECTIONS",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE",
    }


def test_what_the_network_is_told_is_in_the_environment_of_the_ranks():
    text = output(LAUNCHER, NNODES="11", NETWORK="cxi", NCCL_NET="ofi", NCCL_IB_HCA="mlx5_0")
    printed = text.partition("\n\nenvironment\n")[2].partition("\n\n")[0].splitlines()
    for line in ("NCCL_NET=ofi", "NCCL_PROTO=^LL128", "FI_PROVIDER=cxi", "NCCL_IB_HCA=mlx5_0"):
        assert f"  {line}" in printed
    assert "  TORCH_NCCL_ASYNC_ERROR_HANDLING=3" in printed


def test_cuda_graphs_go_with_memory_in_segments(monkeypatch):
    """Megatron's own check of the environment that the script makes for these flags."""
    graphs = "--cuda-graph-impl transformer_engine --cuda-graph-modules attn"
    text = output(f"{LAUNCHER} {graphs}")
    lines = text.partition("\n\nenvironment\n")[2].partition("\n\n")[0].splitlines()
    for line in lines:
        monkeypatch.setenv(*line.strip().split("=", 1))
    monkeypatch.setattr("megatron.training.arguments.get_device_arch_version", lambda: 9)  # H100
    words = printed_command(text)
    words = words[words.index("megatron_xielu.pretrain_gpt") + 1 :]
    assert validated([*words, "--mock-data"], gpus=88).cuda_graph_impl == "transformer_engine"
    assert "NCCL_GRAPH_REGISTER" not in output(LAUNCHER)


def test_a_folder_of_compiled_kernels_is_nobody_elses(tmp_path):
    """In /tmp anybody may have made it before."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").touch()
    mine = tmp_path / f"megatron_xielu-{os.getuid()}"
    mine.symlink_to("elsewhere")
    where = {
        "NNODES": "2",
        "MASTER_ADDR": "a",
        "TMPDIR": str(tmp_path),
        "RUN_DIR": f"{tmp_path}/run",
    }
    where |= {"MODEL": "debug", "GLOBAL_BATCH": "64"}
    result = run("examples/pretrain.sh", **where)
    assert result.returncode == 2
    assert result.stderr == (
        f"pretrain.sh: error: {mine}, for compiled kernels, is no folder of this user's, or cannot "
        "be made; set another TMPDIR\n"
    )
    mine.unlink()
    for _ in range(2):  # made, and found again
        result = run("examples/pretrain.sh", **where)
        assert f"RUN_DIR={tmp_path}/run cannot be written to" in result.stderr
        assert mine.stat().st_mode & 0o777 == 0o700


def test_a_container_changes_only_how_slurms_step_starts():
    steps = {
        name: output(*FRONT_ENDS[name][:1], **FRONT_ENDS[name][1], PYTHON="true").partition("\n")[0]
        for name in ("slurm", "slurm-pyxis", "slurm-apptainer")
    }
    before, shell, inside = steps["slurm"].partition(" bash ")
    inside = re.sub(r"\S+/code/DIGEST/", "/opt/megatron_xielu/", inside)
    pyxis = " --mpi=pmix --network=disable_rdzv_get"
    pyxis += " --container-image=registry/xielu:1 --no-container-mount-home"
    pyxis += r" --container-mounts=/scratch:/scratch\,/data:/data"
    assert steps["slurm-pyxis"] == before + pyxis + shell + inside
    assert "--dry-run" not in steps["slurm"]
    assert " --cpus-per-task=$SLURM_CPUS_ON_NODE " in steps["slurm"]
    nodes = output(SBATCH, SRUN_ARGS="--nodelist=a --no-kill", PYTHON="true").partition("\n")[0]
    assert " --nodelist=a --no-kill bash " in nodes
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


def test_profiled_steps():
    """Megatron's range begins after a step; PyTorch's profiler takes the first and not the last."""
    for device, steps in (("gpu", ("99", "103")), ("cpu", ("100", "104"))):
        text = output(LAUNCHER, **{**SMALL, "DEVICE": device, "PROFILE_STEPS": "100-103"})
        found = flag(text, "--profile-step-start"), flag(text, "--profile-step-end")
        assert found == steps and flag(text, "--profile-ranks") == "0"
        assert ("--use-pytorch-profiler" in text) is (device == "cpu")
        assert ("rank 0 runs under nsys in steps 100-103" in text) is (device == "gpu")
    beyond = "the steps up to --profile-step-end 103 (PROFILE_STEPS) are not all in the run"
    assert f"{beyond}, which has 40\n" in output(LAUNCHER, MODEL="debug", PROFILE_STEPS="100-103")
    assert beyond not in output(LAUNCHER, PROFILE_STEPS="100-103")


def test_help_says_where_the_variables_of_slurm_are_told():
    assert (
        "SRUN_ARGS, IMAGE and MOUNTS: slurm/pretrain.sbatch --help"
        in run("examples/pretrain.sh --help").stdout
    )


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


def test_of_ranks_that_are_no_whole_number_there_is_no_batch():
    result = run(LAUNCHER, NNODES="11", TP="3")
    assert result.returncode == 2 and "data-parallel ranks" not in result.stderr


def test_flags_behind_two_dashes():
    assert output(f"{LAUNCHER} -- --lr 1e-4") == output(f"{LAUNCHER} --lr 1e-4")


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


@pytest.mark.parametrize("model, nodes, tensor", [("llama_1b", 11, 1), ("llama_3b", 32, 2)])
def test_gradient_buckets_are_megatrons_at_the_papers_layout_and_stay(model, nodes, tensor):
    """A resume needs the same ones, and Megatron's own size changes with the node count."""
    papers = output(LAUNCHER, MODEL=model, NNODES=str(nodes), TP=str(tensor))
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


def test_documents_attend_to_each_other_but_on_request():
    flag_of_it = "--dataloader-inter-document-masking"
    assert flag_of_it not in output(LAUNCHER)
    text = output(LAUNCHER, DOCUMENT_MASK="1")
    assert flag_of_it in text.partition("\n\n")[0]
    assert "DOCUMENT_MASK=1: FLOPs and hours count attention over whole sequences" in text


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


@pytest.mark.parametrize(
    ("recipe", "fp8_format", "edges"),
    [("tensorwise", "hybrid", True), ("blockwise", "hybrid", False), ("mxfp8", "e4m3", False)],
)
def test_fp8_and_decayed_norms(recipe, fp8_format, edges, monkeypatch):
    """Megatron's own parser and configuration take the flags, and the plan says what they cost."""
    from megatron.training.argument_utils import core_transformer_config_from_args

    from megatron_xielu import run_checks

    text = output(LAUNCHER, PRECISION="fp8", FP8_RECIPE=recipe, DECAY_NORMS="1")
    words = printed_command(text)
    plan = Plan(words[words.index("megatron_xielu.pretrain_gpt") + 1 :])
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    monkeypatch.setattr("megatron.training.arguments.get_device_arch_version", lambda: 10)
    args = validated(plan.argv, gpus=88)
    args.apply_rope_fusion = False  # Transformer Engine's
    if fp8.installed_engine() is None:
        with pytest.raises(ValueError, match=f"{recipe} needs Transformer Engine.*none is inst"):
            run_checks.check_run(args)
    local = Namespace(**{**vars(args), "transformer_impl": "local"})
    with pytest.raises(ValueError, match="--transformer-impl local, whose layers would train in"):
        run_checks.check_run(local)
    assert args.bf16 and args.apply_wd_to_norms and not args.fp8_param_gather
    config = core_transformer_config_from_args(args)
    assert (config.fp8, config.fp8_recipe, config.first_last_layers_bf16) == (
        fp8_format,
        recipe,
        edges,
    )
    assert "FP8 is not measured" in text
    assert "--fp8-recipe tensorwise" in output(LAUNCHER, PRECISION="fp8").replace("\\\n", "")


def test_other_scripts_get_the_layer_spec():
    text = output(LAUNCHER, ENTRY="/opt/megatron-lm/pretrain_gpt.py")
    assert "--spec megatron_xielu.layer_specs xielu_layer_spec" in text.replace(" \\\n   ", "")
    assert "--use-te-activation-func" in text and "--xielu " not in text
