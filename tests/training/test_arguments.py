"""The flags: every refused combination, before anything is allocated and naming the flag."""

import os
import re
import shutil
import subprocess
import sys
from argparse import Namespace

import pytest
from launch import TINY_LLAMA, train
from megatron.training.arguments import parse_args

from megatron_xielu import arguments, startup
from megatron_xielu.activations import XIPReLU
from megatron_xielu.megatron_activations import MegatronXIELU


@pytest.fixture
def parse(monkeypatch):
    """Parse a command line (the tiny Llama's flags first) as the entry does."""

    def parse(flags: str, model=TINY_LLAMA):
        monkeypatch.setattr(sys, "argv", ["pretrain_gpt", *model, *flags.split()])
        return parse_args(extra_args_provider=arguments.add_arguments)

    return parse


def test_flags_reach_the_module(parse):
    args = parse(
        "--xielu --xielu-alpha-p-init 0.3 --xielu-alpha-n-init 0.9 --xielu-beta 0.25 "
        "--disable-bias-linear"
    )
    arguments.validate(args)
    assert args.use_te_activation_func
    module = arguments.activation_builder(args)(config=None)
    assert type(module) is MegatronXIELU and module.beta == 0.25
    alpha_p, alpha_n = module.effective_alphas()
    assert alpha_p.item() == pytest.approx(0.3) and alpha_n.item() == pytest.approx(0.9)


def test_help_can_be_printed(parse, capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse("--help")
    assert exit_info.value.code == 0
    assert "--xielu-check-tp-sync" in capsys.readouterr().out


def test_defaults(parse):
    builder = arguments.activation_builder(parse("--xiprelu"))
    assert builder.activation is XIPReLU
    assert (builder.alpha_p_init, builder.alpha_n_init, builder.beta) == (0.8, 0.8, 0.5)
    assert arguments.activation_builder(parse("--squared-relu")) is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--xielu --xiprelu", "give one activation, not --xielu and --xiprelu"),
        (
            "--xielu --spec megatron_xielu.layer_specs xiprelu_layer_spec",
            "give one activation, not --xielu and --xiprelu",
        ),
        ("--xielu --swiglu", "--xielu does not work with --swiglu"),
        ("--xiprelu --squared-relu", "--xiprelu does not work with --squared-relu"),
        ("--xielu --quick-geglu", "--quick-geglu"),
        ("--xielu --use-transformer-engine-op-fuser", "--use-transformer-engine-op-fuser"),
        ("--xielu --use-grouped-gemm-for-shared-expert", "--use-grouped-gemm-for-shared-expert"),
        ("--xielu --num-experts 4 --moe-use-upcycling", "--moe-use-upcycling does not"),
        ("--xielu --hybrid-layer-pattern M-", "--hybrid-layer-pattern"),
        ("--xielu --use-megatron-fsdp", "--use-megatron-fsdp"),
        ("--xielu --use-torch-fsdp2", "--use-torch-fsdp2"),
        ("--xielu --use-precision-aware-optimizer", "keeps the master weights"),
        ("--xielu --optimizer-cpu-offload", "master copy of every parameter"),
        ("--xielu --transformer-impl inference_optimized", "--transformer-impl"),
        ("--xielu --spec other.module spec", "with_activation"),
        ("--xielu --xielu-alpha-p-init 0", "--xielu-alpha-p-init must be a finite number above 0"),
        ("--xielu --xielu-alpha-p-init nan", "--xielu-alpha-p-init must be"),
        ("--xielu --xielu-alpha-n-init 0.5", "--xielu-alpha-n-init of XIELU must be .* above 0.5"),
        ("--xiprelu --xielu-alpha-n-init -1", "--xielu-alpha-n-init of XIPReLU must be"),
        ("--xielu --xielu-beta 0", "--xielu-beta must be a finite number above 0"),
        ("--xielu --xielu-beta inf", "--xielu-beta must be"),
        ("--xielu --xielu-check-tp-sync -1", "--xielu-check-tp-sync must be 0 or more"),
        ("--squared-relu --xielu-recompute-output", "needs --xielu or --xiprelu"),
        # Also at its default: whoever gives one means one of ours.
        ("--xielu-beta 0.5", "--xielu-beta needs --xielu or --xiprelu"),
        ("--swiglu --xielu-alpha-p-init 0.8", "--xielu-alpha-p-init needs --xielu or --xiprelu"),
        ("--xielu-alpha-n-init 0.7", "--xielu-alpha-n-init needs --xielu or --xiprelu"),
        ("--xielu-check-tp-sync 5", "--xielu-check-tp-sync needs --xielu or --xiprelu"),
        ("--xielu --optimizer soap --save x", "--optimizer soap cannot be resumed"),
        ("--xielu --optimizer sgd --load x", "--optimizer sgd .*use --ckpt-format torch"),
        ("--xielu --optimizer sgd --use-distributed-optimizer", "--use-distributed-optimizer"),
        ("--xielu --optimizer adaptive_muon", "choose muon"),
    ],
)
def test_refused(parse, flags, message):
    with pytest.raises(ValueError, match=message):
        arguments.validate(parse(flags))


@pytest.mark.parametrize("flags", ["--num-experts 4", "--mtp-num-layers 1"])
def test_needs_0_19(parse, flags, monkeypatch):
    args = parse(f"--xielu {flags}")
    arguments.validate(args)
    monkeypatch.setattr(arguments.releases, "release", lambda: (0, 18))
    with pytest.raises(ValueError, match=f"{flags.split()[0]} needs megatron-core 0.19"):
        arguments.validate(args)


@pytest.mark.parametrize(
    "flags",
    [
        "--recompute-granularity full",
        "--recompute-modules mlp",
        "--recompute-modules moe",
        "--recompute-modules shared_experts",
        "--moe-layer-recompute",
        "--moe-shared-expert-overlap",
        "--fp8-format hybrid",
        "--fp4-format e2m1",
        "--te-precision-config-file recipe.yaml",
        "--cpu-offloading-num-layers 1",
        "--fine-grained-activation-offloading",
        "--delay-wgrad-compute",
        "--cuda-graph-impl local",
        "--enable-cuda-graph",
        "--external-cuda-graph",
    ],
)
def test_refused_with_recompute_output(parse, flags):
    flag = flags if flags.startswith("--recompute") else flags.split()[0]
    message = f"--xielu-recompute-output does not work with {flag}; drop one of them"
    with pytest.raises(ValueError, match=message):
        arguments.validate(parse(f"--xielu --xielu-recompute-output {flags}"))
    arguments.validate(parse(f"--xielu {flags}"))


@pytest.mark.parametrize(
    ("bias", "flag", "fused"),
    [(True, "", True), (True, "--no-bias-gelu-fusion", False), (False, "", False)],
)
def test_bias_is_fused_by_us_where_megatron_would(parse, bias, flag, fused):
    model = [word for word in TINY_LLAMA if not (bias and word == "--disable-bias-linear")]
    args = parse(f"--xielu {flag}", model)
    arguments.validate(args)
    assert args.xielu_fuse_bias == fused
    assert not args.bias_gelu_fusion


def test_activations_of_megatron_are_left_alone(parse):
    args = parse("--swiglu --bf16 --save x")
    arguments.validate(args)
    assert not args.use_te_activation_func


def test_other_activation_in_the_checkpoint(parse, start_checkpoint):
    """Megatron itself would load it and ignore the alphas."""
    for flags, message in (
        ("--xiprelu", "was trained with --xielu, but this run asks for --xiprelu; drop --xiprelu"),
        ("", r"but this run asks for GELU; .* \(pretrain\.sh: ACTIVATION=xielu\)$"),
        ("--squared-relu", "but this run asks for --squared-relu"),
        ("--xielu --xielu-beta 0.4", r"trained with --xielu-beta 0\.5, not 0\.4"),
    ):
        with pytest.raises(ValueError, match=message):
            arguments.check_checkpoint(parse(f"{flags} --load {start_checkpoint}"))
    # Of the same shape, so that nothing else would notice.
    with pytest.raises(ValueError, match=r"with GELU, .*; drop --squared-relu, or"):
        arguments.refuse_another_activation(parse("--squared-relu"), parse(""), "x")
    arguments.check_checkpoint(parse(f"--xielu --load {start_checkpoint}"))
    spec = "--spec megatron_xielu.layer_specs xielu_layer_spec"
    arguments.check_checkpoint(parse(f"{spec} --load {start_checkpoint}"))


@pytest.mark.parametrize(
    ("flags", "differs"),
    [
        ("--hidden-size 64", "hidden_size is 32 there, and 64 here"),
        ("--num-layers 3", "num_layers is 4 there, and 3 here"),
        ("--group-query-attention --num-query-groups 2", "num_query_groups is "),
        ("--normalization LayerNorm", "normalization is RMSNorm there, and LayerNorm here"),
        ("--num-experts 2", "num_experts is None there, and 2 here"),
        ("--padded-vocab-size 256", ".* 128 there, and 256 here; .* here --padded-vocab-size 128"),
    ],
)
def test_another_model_in_the_checkpoint(parse, start_checkpoint, flags, differs):
    """Megatron would end with a traceback, or leave out what the model does not have."""
    words = f"--xielu {flags} --load {start_checkpoint}"
    with pytest.raises(ValueError, match=f"is of another model: {differs}"):
        arguments.check_checkpoint(parse(words))
    arguments.check_checkpoint(parse(f"{words} --dist-ckpt-strictness log_all"))
    if "vocab" in flags:  # the way to more tokens
        arguments.check_checkpoint(parse(f"{words} --finetune"))


@pytest.mark.parametrize(
    "name",
    ["latest_checkpointed_iteration.txt", "*/.metadata", "*/metadata.json"],
)
@pytest.mark.parametrize("content", [b"", b"no"])
def test_a_damaged_checkpoint(parse, tmp_path, start_checkpoint, name, content):
    folder = tmp_path / "damaged"
    shutil.copytree(start_checkpoint, folder)
    (file,) = folder.glob(name)
    file.write_bytes(content)
    for flags in ("--xielu", "--xielu --use-checkpoint-args"):
        with pytest.raises(ValueError) as error:
            arguments.check_checkpoint(parse(f"{flags} --load {folder}"))
        assert str(error.value).startswith(f"--load {folder} cannot be read: ")
        assert "\n" not in str(error.value)


def test_no_checkpoint_yet(parse, tmp_path, start_checkpoint):
    for folder in (tmp_path, tmp_path / "none"):
        arguments.check_checkpoint(parse(f"--xielu --load {folder} --save {folder}/."))
    arguments.check_checkpoint(parse("--xielu"))
    first_run = f"--load {tmp_path} --pretrained-checkpoint {start_checkpoint}"
    arguments.check_checkpoint(parse(f"--xielu {first_run}"))
    with pytest.raises(ValueError, match="was trained with --xielu"):
        arguments.check_checkpoint(parse(first_run))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--load NONE", "--load NONE: there is no checkpoint in it .*, and it is not .* of --save"),
        ("--load NONE --save OTHER", "--load NONE: there is no checkpoint in it"),
        ("--load NONE --save NONE --use-checkpoint-args", "which --use-checkpoint-args needs"),
        ("--load NONE --save NONE --finetune", "which --finetune needs"),
        ("--finetune --save NONE", "--finetune has nothing to go on from; add --load, or drop it"),
        ("--load NONE --save NONE --exit-on-missing-checkpoint", "which --exit-on-missing-checkpo"),
        ("--load NONE --save NONE --pretrained-checkpoint NO", "--pretrained-checkpoint NO: there"),
        ("--pretrained-checkpoint NO --ckpt-step 1", "--pretrained-checkpoint NO: there is no che"),
        ("--load START --ckpt-step 7", "--ckpt-step 7: there is no START/iter_0000007; there is 1"),
    ],
)
def test_a_checkpoint_that_is_not_there(parse, tmp_path, start_checkpoint, flags, message):
    """Megatron would train from scratch, or end with status 0 or a traceback."""
    folders = {name: str(tmp_path / name) for name in ("NONE", "NO", "OTHER")}
    folders["START"] = str(start_checkpoint)
    for name in ("START", "NONE", "NO", "OTHER"):
        flags, message = (re.sub(rf"\b{name}\b", folders[name], text) for text in (flags, message))
    with pytest.raises(ValueError, match=message):
        arguments.check_checkpoint(parse(f"--xielu {flags}"))


def test_checkpoint_args_against_a_flag(parse, start_checkpoint):
    args = parse(f"--load {start_checkpoint} --use-checkpoint-args")
    arguments.restore_from_checkpoint(args)
    assert args.xielu and args.xielu_beta == 0.5
    for flags in ("--xiprelu", "--xielu-beta 0.4"):
        with pytest.raises(ValueError, match="was trained with --xielu"):
            arguments.restore_from_checkpoint(parse(f"{flags} --load {start_checkpoint}"))


def test_settings_of_a_checkpoint(parse):
    """Those of our activations alone: a checkpoint of Megatron's has the defaults, and no use."""
    args = parse("--use-checkpoint-args")
    gelu = {"xielu": False, "xiprelu": False, "xielu_beta": 0.5, "xielu_alpha_p_init": 0.8}
    arguments.restore(args, Namespace(**gelu), "there")
    arguments.validate(args)
    assert args.xielu_beta == 0.5 and not args.xielu  # as ever: what reads checkpoints finds it
    for flags in ("", "--xielu"):
        args = parse(f"{flags} --use-checkpoint-args")
        arguments.restore(args, Namespace(xielu=True, xielu_beta=0.3), "there")
        arguments.validate(args)
        assert (args.xielu, args.xielu_beta, args.xielu_alpha_p_init) == (True, 0.3, 0.8)


def test_the_entry_ends_with_one_line(tmp_path):
    run = train(tmp_path, "--xielu --swiglu", succeeds=False)
    assert run.output.rstrip().endswith(
        "megatron_xielu: error: --xielu does not work with --swiglu; drop one of them"
    )
    assert "Traceback" not in run.output


def test_a_vocabulary_that_is_too_small_for_the_tokenizer(tmp_path):
    run = train(tmp_path, "--xielu --padded-vocab-size 64", succeeds=False)
    assert "--padded-vocab-size 64 is less than the tokenizer's 127 entries" in run.output
    assert "Traceback" not in run.output


def test_the_entry_says_which_megatron_is_missing():
    code = (
        "import sys; sys.modules['megatron'] = None; "
        "from megatron_xielu import pretrain_gpt; pretrain_gpt.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("megatron_xielu: error")
    assert "pip install 'megatron-core[training]>=0.19,<0.20'" in done.stderr


def test_cpu_mode_refuses_what_needs_a_gpu(tmp_path):
    from megatron_xielu import cpu

    for flags, message in (
        (["--transformer-impl", "transformer_engine"], "--transformer-impl transformer_engine"),
        (["--transformer-impl=transformer_engine"], "--transformer-impl transformer_engine"),
        (["--fp8-format", "hybrid"], "--fp8-format needs a GPU"),
        (["--distributed-backend", "nccl"], "--distributed-backend nccl needs a GPU"),
    ):
        with pytest.raises(SystemExit, match=message):
            cpu.add_cpu_flags(flags)
    assert cpu.add_cpu_flags(["--transformer-impl", "local"])[-2:] == [
        "--transformer-impl",
        "local",
    ]


def test_cpu_mode_comes_before_megatron():
    from megatron_xielu import cpu

    with pytest.raises(RuntimeError, match=r"before importing megatron\.core|a GPU is visible"):
        cpu.activate()


def test_cpu_mode_wants_a_script():
    done = subprocess.run(
        [sys.executable, "-m", "megatron_xielu.cpu", "no_such_script.py"],
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and "no such script: no_such_script.py" in done.stderr


def test_in_process_restart_needs_torchrun(monkeypatch):
    """Megatron counts on the two ports after MASTER_PORT, which a group of one does not choose."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", "--inprocess-restart"])
    with pytest.raises(SystemExit, match="--inprocess-restart: start with torchrun"):
        startup._rendezvous_with_itself()
    assert "RANK" not in os.environ
