"""python -m megatron_xielu.convert: real trainings to transformers' models and back."""

import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from launch import REPOSITORY, TINY_LLAMA, load_checkpoint, python, train
from logits_entry import TOKENS
from small_models import small, write_hf

from megatron_xielu.checkpoints import writer
from megatron_xielu.checkpoints.check import check
from megatron_xielu.checkpoints.reader import open_source
from megatron_xielu.checkpoints.source import Refused
from megatron_xielu.checkpoints.torch_dist import TorchDist
from megatron_xielu.convert import __main__ as cli
from megatron_xielu.convert import alphas, from_hf, hf_config, to_hf
from megatron_xielu.convert.megatron_arguments import architecture_of, arguments_of
from megatron_xielu.convert.safetensors_files import Reader
from megatron_xielu.convert.tensors import parts
from megatron_xielu.kernels.reference import softplus

transformers = pytest.importorskip("transformers")

_TIED = [flag for flag in TINY_LLAMA if flag != "--untie-embeddings-and-output-weights"]
_GQA = " --group-query-attention --num-query-groups 2"
# Name: flags, ranks, common flags, class that transformers must load.
_CASES = {
    "apertus": (
        "--xielu --qk-layernorm --tensor-model-parallel-size 2 --use-distributed-optimizer" + _GQA,
        2,
        TINY_LLAMA,
        "ApertusForCausalLM",
    ),
    "arcee": ("--xielu --pipeline-model-parallel-size 2", 2, _TIED, "ArceeForCausalLM"),
    "llama": ("--swiglu --tensor-model-parallel-size 2", 2, TINY_LLAMA, "LlamaForCausalLM"),
    "relu2": (
        "--squared-relu --norm-epsilon 1e-6 --rotary-base 500000 --kv-channels 12" + _GQA,
        1,
        TINY_LLAMA,
        "ArceeForCausalLM",
    ),
    "xiprelu": ("--xiprelu" + _GQA, 1, _TIED, "ArceeXIPReLUForCausalLM"),
}


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Folder of a training by its name in `_CASES`: ``checkpoints`` and ``logits.pt``; run once."""
    folders = {}

    def get(name: str) -> Path:
        if name not in folders:
            flags, ranks, model, _ = _CASES[name]
            folder = tmp_path_factory.mktemp(name)
            train(
                folder,
                f"{flags} --save checkpoints --train-iters 3",
                ranks=ranks,
                model=model,
                command=("-m", "logits_entry"),
            )
            folders[name] = folder
        return folders[name]

    return get


def convert(*arguments: object) -> None:
    """The command."""
    cli.main([str(argument) for argument in arguments])


def model_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Those of the model, without the optimizer's."""
    tensors = load_checkpoint(checkpoint)
    return {key: x for key, x in tensors.items() if not key.startswith("optimizer.")}


def logits_of(folder: Path, *, alphas: bool = True) -> torch.Tensor:
    """A stock model's logits in fp32; ``alphas``: as the file has them, not as they are loaded."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code="auto_map" in hf_config.read(folder)
    )
    if alphas:
        reader = Reader(folder)
        for name, parameter in model.named_parameters():
            if ".act_fn." in name:
                parameter.data = reader.read(name)
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("name", _CASES)
def test_megatron_to_hugging_face_and_back(name, trained, tmp_path):
    folder = trained(name)
    out, back = tmp_path / "hf", tmp_path / "back"
    options = to_hf.Options(shard_bytes=50_000)
    to_hf.export(open_source(folder / "checkpoints"), out, options)
    config = transformers.AutoConfig.from_pretrained(out, trust_remote_code=True)
    assert config.architectures == [_CASES[name][3]]
    assert len(list(out.glob("model-*.safetensors"))) > 1

    expected = torch.load(folder / "logits.pt")
    assert expected.abs().max() > 1
    torch.testing.assert_close(logits_of(out), expected, rtol=0, atol=1e-5)

    from_hf.convert(out, back, from_hf.Options())
    check(back / "release", whole=True)
    before, after = (
        model_tensors(folder / "checkpoints/iter_0000003"),
        model_tensors(back / "release"),
    )
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype and torch.equal(tensor, after[key]), key
    assert architecture_of(TorchDist(back / "release").arguments, 128) == architecture_of(
        open_source(folder / "checkpoints").arguments, 128
    )


def test_what_transformers_makes_of_alphas(trained, tmp_path):
    """What docs/conversion.md says: exact in Apertus in fp32, rounded to bfloat16 in Arcee."""
    for name, exact in (("apertus", True), ("arcee", False)):
        out = tmp_path / name
        to_hf.export(open_source(trained(name) / "checkpoints"), out, to_hf.Options())
        assert Reader(out).dtype("model.layers.0.mlp.act_fn.alpha_p") == torch.float32
        stock = logits_of(out, alphas=False)
        assert torch.equal(stock, logits_of(out)) == exact
        torch.testing.assert_close(stock, logits_of(out), rtol=0, atol=0.05)

    from megatron_xielu.hf import use_fused_activation

    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "arcee", dtype=torch.float32
    )
    use_fused_activation(model, alphas_from=tmp_path / "arcee")
    expected = torch.load(trained("arcee") / "logits.pt")
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, expected, rtol=0, atol=1e-5)


_CONTINUE = """
    --seq-length 32 --train-iters 1 --lr 0 --weight-decay 0 --hidden-dropout 0 --attention-dropout 0
    --mock-data --tokenizer-type NullTokenizer --vocab-size 119 --micro-batch-size 2
    --global-batch-size 4 --eval-iters 0 --eval-interval 1000 --log-interval 1 --save checkpoints
    --save-interval 1000
""".split()


def test_a_released_apertus_continues_at_tp_2(tmp_path):
    """With bf16 weights and alphas, llama3 RoPE scaling and a vocabulary that two do not divide."""
    torch.manual_seed(0)
    config = transformers.ApertusConfig(
        vocab_size=121,
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        dtype=torch.bfloat16,
    )
    model = transformers.ApertusForCausalLM(config).bfloat16()
    for name, parameter in model.named_parameters():
        if "alpha" in name:
            parameter.data.fill_(3 * torch.randn(1).item())
        if "norm" in name:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "released")

    told: list[str] = []
    options = from_hf.Options(dtype=torch.float32, divisor=8)
    from_hf.convert(tmp_path / "released", tmp_path / "megatron", options, told.append)
    flags = told[-1].removeprefix("continue pre-training with: ").split()
    assert "--use-rope-scaling" in flags and "--qk-layernorm" in flags
    command = ("-m", "logits_entry")
    layout = [*_CONTINUE, "--tensor-model-parallel-size", "2"]
    train(tmp_path, [*flags, *layout], ranks=2, model=(), command=command)
    logits = torch.load(tmp_path / "logits.pt")
    assert logits.shape[-1] == 128
    expected = logits_of(tmp_path / "released", alphas=False)
    torch.testing.assert_close(logits[..., :121], expected, rtol=0, atol=1e-5)

    # Back again, without the padding: every tensor of the release.
    to_hf.export(
        open_source(tmp_path / "checkpoints"), tmp_path / "hf", to_hf.Options(vocabulary=121)
    )
    released, returned = Reader(tmp_path / "released"), Reader(tmp_path / "hf")
    assert released.names == returned.names
    for name in released.names:
        assert torch.equal(released.read(name), returned.read(name).to(released.dtype(name))), name


def test_a_model_continues_at_pp_2_in_bf16_with_fp32_alphas(trained, tmp_path):
    to_hf.export(open_source(trained("xiprelu") / "checkpoints"), tmp_path / "hf", to_hf.Options())
    told: list[str] = []
    from_hf.convert(tmp_path / "hf", tmp_path / "megatron", from_hf.Options(), told.append)
    flags = told[-1].removeprefix("continue pre-training with: ").split()
    layout = [
        *_CONTINUE,
        *"--pipeline-model-parallel-size 2 --bf16 --use-distributed-optimizer".split(),
    ]
    train(
        tmp_path,
        [*flags, *layout],
        ranks=2,
        model=(),
        command=("-m", "megatron_xielu.pretrain_gpt"),
    )
    before = model_tensors(tmp_path / "megatron/release")
    after = model_tensors(tmp_path / "checkpoints/iter_0000001")
    for key, tensor in before.items():
        assert after[key].dtype == (torch.float32 if "alpha" in key else torch.bfloat16)
        assert torch.equal(tensor.to(after[key].dtype), after[key]), key


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Path:
    """A Hugging Face tokenizer of 120 tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<s>": 0, "</s>": 1, **{f"w{i}": i for i in range(2, 120)}}
    raw = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    fast.save_pretrained(folder)
    return folder


def test_tokenizer_and_padded_rows(trained, tokenizer, tmp_path, capsys):
    checkpoint, out = trained("relu2") / "checkpoints", tmp_path / "hf"
    convert("to-hf", checkpoint, out, "--tokenizer", tokenizer, "--dtype", "bfloat16")
    words = transformers.AutoTokenizer.from_pretrained(out)
    assert words("w5 w7").input_ids[-2:] == [5, 7]
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert model.config.eos_token_id == model.generation_config.eos_token_id == 1
    # A padded row that would win every time is never generated.
    with torch.no_grad():
        model.lm_head.weight[125] *= 1000
        model.lm_head.weight[126] = -model.lm_head.weight[125]
    generated = model.generate(TOKENS[:1, :4], max_new_tokens=8)
    assert generated.shape[1] > 4 and generated.max() < 120

    # To Megatron and back: what the checkpoint names is named, and not opened.
    convert("from-hf", out, tmp_path / "megatron")
    capsys.readouterr()
    convert("to-hf", tmp_path / "megatron", tmp_path / "without")
    assert f"; if you trust it, add --tokenizer {out}\n" in capsys.readouterr().out
    assert not list((tmp_path / "without").glob("tokenizer*"))
    again = ("--tokenizer", out, "--trim-vocab", 120)
    convert("to-hf", tmp_path / "megatron", tmp_path / "again", *again)
    assert (tmp_path / "again/tokenizer.json").read_text() == (out / "tokenizer.json").read_text()
    assert Reader(tmp_path / "again").shape("lm_head.weight") == (120, 32)
    assert "suppress_tokens" not in (tmp_path / "again/generation_config.json").read_text()

    for flags, message in (
        (("--tokenizer", tmp_path / "none"), "no such folder"),
        (
            ("--tokenizer", tokenizer, "--trim-vocab", 100),
            "--trim-vocab 100: the model has 128 rows, its tokenizer 120 entries; give 120 to 128",
        ),
    ):
        with pytest.raises(SystemExit, match=message):
            convert("to-hf", checkpoint, tmp_path / "refused", *flags)
        assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("normalization", "LayerNorm"),
        ("add_bias_linear", True),
        ("add_qkv_bias", True),
        ("layernorm_zero_centered_gamma", True),
        ("position_embedding_type", "learned_absolute"),
        ("rotary_percent", 0.5),
        ("rotary_interleaved", True),
        ("rotary_seq_len_interpolation_factor", 2),
        ("num_experts", 8),
        ("mtp_num_layers", 1),
        ("multi_latent_attention", True),
        ("softmax_type", "learnable"),
        ("window_size", (128, 0)),
        ("attention_output_gate", True),
        ("no_rope_freq", [1, 0]),
        ("openai_gelu", True),
        ("hybrid_layer_pattern", "M*"),
        ("heterogeneous_layers_config_path", "x.json"),
        ("spec", ["some", "spec"]),
        ("swiglu", True),  # two activations
    ],
)
def test_what_hugging_face_lacks_is_refused_by_name(argument, value, trained):
    arguments = open_source(trained("relu2") / "checkpoints").arguments
    architecture_of(arguments, 128)
    changed = Namespace(**{**vars(arguments), argument: value})
    with pytest.raises(Refused, match=argument):
        architecture_of(changed, 128)


@pytest.mark.parametrize("activation", ["xielu", "xiprelu"])
def test_experts_with_trainable_activations_are_refused(activation, tmp_path, capsys):
    """By name, with the reason, in one line, and before anything is written."""
    flags = f"--{activation} --num-layers 1 --num-experts 4 --moe-router-topk 2 --train-iters 1"
    train(tmp_path, f"{flags} --save checkpoints --no-save-optim")
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        convert("to-hf", tmp_path / "checkpoints", tmp_path / "out")
    said = str(error.value)
    assert f"num_experts = 4 and the activation {activation}: no language model" in said
    assert "a pair of alphas for each expert" in said and "\n" not in said
    assert not (tmp_path / "out").exists() and capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "qwen3"},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"hidden_act": "gelu_new"},
        {
            "rope_scaling": None,
            "rope_parameters": {"rope_type": "yarn", "rope_theta": 1, "factor": 2},
        },
        {"quantization_config": {"quant_method": "x"}},
        {"intermediate_size": 64},
        {"tie_word_embeddings": False},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_megatron_lacks_is_refused_by_name(changes, tmp_path):
    folder = write_hf(tmp_path / "hf", small(), **changes)
    words = {"intermediate_size": "up_proj", "tie_word_embeddings": "lm_head"}
    field = next(iter(changes))
    with pytest.raises(Refused, match=words.get(field, field.removesuffix("_scaling"))):
        from_hf.convert(folder, tmp_path / "out", from_hf.Options())
    assert not (tmp_path / "out").exists()


def test_what_other_readers_ask_for(tmp_path):
    """Fields without a default in mlx-lm 0.32.0's Apertus; a warning of GELU in llama.cpp."""
    config = hf_config.config_of(small(qk_layernorm=True, activation="xielu"), torch.float32)
    wanted = "attention_bias mlp_bias post_norm qk_norm rope_theta rms_norm_eps tie_word_embeddings"
    assert set(wanted.split()) <= config.keys() and config["qk_norm"] and not config["post_norm"]

    for activation, warned in (("gelu", True), ("relu2", False)):
        told: list[str] = []
        folder = tmp_path / activation
        folder.mkdir()
        from_hf.convert(
            write_hf(folder / "hf", small(activation=activation)), folder / "m", from_hf.Options()
        )
        to_hf.export(open_source(folder / "m"), folder / "out", to_hf.Options(), told.append)
        assert any("llama.cpp runs every Arcee" in line for line in told) == warned


def test_a_tensor_without_a_place_is_refused(tmp_path):
    architecture = small()
    chunk = writer.Chunk
    chunks = [
        chunk(
            "decoder.layers.self_attention.linear_qkv.bias",
            layer,
            2,
            (48,),
            torch.float32,
            lambda: torch.ones(48),
        )
        for layer in range(2)
    ]
    for part in parts(architecture):
        key = part.megatron if part.layer is None else f"decoder.layers.{part.megatron}"
        read = torch.ones(part.shape).clone
        chunks.append(chunk(key, part.layer, 2, part.shape, torch.float32, read))
    writer.write(tmp_path / "iter", chunks, arguments_of(architecture, torch.float32))
    with pytest.raises(Refused, match=r"linear_qkv\.bias"):
        to_hf.export(open_source(tmp_path / "iter"), tmp_path / "out", to_hf.Options())


class Malicious:
    """Unpickling it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("where", ["metadata", "common"])
def test_nothing_in_a_checkpoint_is_executed(where, trained, tmp_path):
    marker, folder = tmp_path / "executed", tmp_path / "iter"
    shutil.copytree(trained("relu2") / "checkpoints/iter_0000003", folder)
    if where == "metadata":
        data = pickle.dumps(Malicious(marker))
        (folder / ".metadata").write_bytes(data)
    else:
        buffer = io.BytesIO()
        torch.save({"args": Malicious(marker)}, buffer)
        (folder / "common.pt").write_bytes(data := buffer.getvalue())
    with pytest.raises(SystemExit, match=r"posix\.mkdir"):
        convert("to-hf", folder, tmp_path / "out")
    assert not marker.exists() and not (tmp_path / "out").exists()
    # It would have been, by a plain load.
    if where == "metadata":
        pickle.loads(data)
    else:
        torch.load(io.BytesIO(data), weights_only=False)
    assert marker.exists()


_INTERRUPTED = """
import os, signal, sys
from megatron_xielu.convert import __main__ as cli, safetensors_files
write = safetensors_files.Writer.write
def counted(self, *args):
    global count
    count += 1
    if count == 20:
        os.kill(os.getpid(), number)
    write(self, *args)
safetensors_files.Writer.write = counted
for name in sys.argv[1].split(","):
    number, count = getattr(signal, name), 0
    try:
        cli.main(sys.argv[2:])
    except SystemExit as end:
        print(name, end.code, sorted(os.listdir(".")), flush=True)
"""


def test_an_interrupted_export_leaves_no_half_model(trained, tmp_path):
    checkpoint, out = trained("relu2") / "checkpoints", tmp_path / "hf"

    def interrupt(names: str, *flags: str) -> str:
        done = subprocess.run(
            [python(), "-c", _INTERRUPTED, names, "to-hf", checkpoint, out, *flags],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
        return "".join(line for line in done.stdout.splitlines(True) if line.startswith("SIG"))

    assert interrupt("SIGINT,SIGTERM,SIGKILL") == "SIGINT 130 []\nSIGTERM 143 []\n"
    assert [path.name for path in tmp_path.iterdir()] == ["hf.incomplete"]
    convert("to-hf", checkpoint, out)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(SystemExit, match="--force"):
        convert("to-hf", checkpoint, out)
    interrupt("SIGKILL", "--force", "--dtype=bfloat16")
    assert (out / "model.safetensors").read_bytes() == before
    convert("to-hf", checkpoint, out, "--force", "--dtype=bfloat16")
    assert (out / "model.safetensors").stat().st_size < 0.6 * len(before)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


_MEASURED = """
import resource
import torch, transformers
import megatron_xielu.checkpoints.fork, megatron_xielu.convert.from_hf
from megatron_xielu.convert import __main__ as cli
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
cli.main(["from-hf", "hf", "megatron"])
cli.main(["to-hf", "megatron", "again"])
print("KB", peak() - before)
"""


def test_memory_is_that_of_a_few_tensors(tmp_path):
    """Not of the model: 206 MB here, of which the largest tensor is 8 MB."""
    architecture = small(layers=16, hidden=512, ffn=4096, heads=8, head_dim=64, groups=8)
    write_hf(tmp_path / "hf", architecture)
    size = (tmp_path / "hf/model.safetensors").stat().st_size
    assert size > 200e6
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "[transformers]" not in done.stderr  # warnings about defaults of its own
    used = int(done.stdout.split("KB ")[1]) * 1024
    print(f"{used / 1e6:.0f} MB")
    assert used < size / 3


def test_alphas_of_hugging_face(tmp_path):
    model = write_hf(tmp_path / "xielu", small(activation="xielu", qk_layernorm=True))
    alphas.write(model, tmp_path / "alphas.json")
    reader, found = Reader(model), json.loads((tmp_path / "alphas.json").read_text())
    for side, floor in (("alpha_p", 0), ("alpha_n", 0.5)):
        raw = [reader.read(f"model.layers.{layer}.mlp.act_fn.{side}") for layer in (0, 1)]
        assert found[side] == [softplus(one).item() + floor for one in raw]
    with pytest.raises(SystemExit, match=r"alphas.json exists; .* replace it with --force"):
        cli.main(["alphas", str(model), str(tmp_path / "alphas.json")])
    model = write_hf(tmp_path / "relu2", small())
    with pytest.raises(Refused, match="its activation is relu2, which has no alphas"):
        alphas.write(model, tmp_path / "alphas.json")
    lacks = small(activation="xielu", qk_layernorm=True)
    model = write_hf(tmp_path / "lacks", lacks, num_hidden_layers=3)
    with pytest.raises(Refused, match=r"no tensor model.layers.2.mlp.act_fn.alpha_p of one number"):
        alphas.write(model, tmp_path / "alphas.json")
