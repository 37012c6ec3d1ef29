"""An exported model has the tokenizer that its data had, or none is exported."""

import json
from argparse import Namespace
from pathlib import Path

import huggingface_hub.constants
import pytest
from hostile import damaged, damaged_bytes
from hypothesis import HealthCheck, given, settings
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from megatron_xielu.checkpoints.source import Refused
from megatron_xielu.convert import __main__ as cli
from megatron_xielu.convert import from_hf, tokenizer

transformers = pytest.importorskip("transformers")

EOD = "<|endoftext|>"
TEXTS = ("Hello World 123456", "a  b\n\n c", f"x {EOD}y", "def f(x): return X_y", "naïve 世界")


def byte_level(pattern: str = r"\p{Lu}\p{Ll}+|\p{N}{1,3}|\s+|[^\s\p{L}\p{N}]+|\p{L}+") -> Tokenizer:
    """Of bytes and a few merges, that splits otherwise than any class of transformers."""
    vocabulary = {EOD: 0}
    for entry in (*sorted(pre_tokenizers.ByteLevel.alphabet()), "12", "ĠW", "He", "ĠĠ", "o,"):
        vocabulary[entry] = len(vocabulary)
    merges = [("1", "2"), ("Ġ", "W"), ("H", "e"), ("Ġ", "Ġ"), ("o", ",")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([EOD])
    tokenizer.enable_truncation(3)  # neither may reach a text
    tokenizer.enable_padding(length=9)
    return tokenizer


def folder_of(place: Path, **config: object) -> Path:
    """A tokenizer's folder with fields of tokenizer_config.json."""
    place.mkdir()
    byte_level().save(str(place / "tokenizer.json"))
    (place / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOD, **config}))
    return place


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Of a Llama with 512 rows, and no tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "hf")
    from_hf.convert(folder / "hf", folder / "megatron", from_hf.Options())
    return folder / "megatron"


def export(checkpoint: Path, out: Path, name: object, *flags: object) -> None:
    """The command."""
    cli.main([str(x) for x in ("to-hf", checkpoint, out, "--tokenizer", name, *flags)])


def refusal(checkpoint: Path, out: Path, name: object, *flags: object) -> str:
    """The one line with which the command ends; nothing is left."""
    with pytest.raises(SystemExit) as end:
        export(checkpoint, out, name, *flags)
    assert not list(out.parent.glob(f"{out.name}*"))
    message = str(end.value)
    assert message.startswith("megatron_xielu.convert: error: ") and "\n" not in message
    return message


@pytest.mark.parametrize(
    "name", ["GPT2Tokenizer", "LlamaTokenizerFast", "Qwen2Tokenizer", "PreTrainedTokenizerFast"]
)
def test_encodes_as_tokenizer_json_does_whatever_the_class(name, checkpoint, tmp_path, capsys):
    config = {
        "tokenizer_class": name,
        "chat_template": "{{ messages }}",
        "model_max_length": 77,
        "pad_token": {"content": EOD, "special": True, "__type": "AddedToken"},
        "bos_token": None,  # GPT2Tokenizer would have one
        "auto_map": {"AutoTokenizer": ["tokenization.Mine", None]},
    }
    source, out = folder_of(tmp_path / "source", **config), tmp_path / "out"
    export(checkpoint, out, source)
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    expected = byte_level()
    expected.no_truncation()
    expected.no_padding()
    loaded = transformers.AutoTokenizer.from_pretrained(out)
    for text in TEXTS:
        assert loaded(text, add_special_tokens=False).input_ids == expected.encode(text).ids, text
    assert loaded.chat_template == "{{ messages }}" and loaded.model_max_length == 77
    ids = (loaded.eos_token_id, loaded.pad_token_id, loaded.bos_token_id)
    assert ids == (0, 0, None)
    config = json.loads((out / "config.json").read_text())
    assert tuple(config[f"{x}_token_id"] for x in ("eos", "pad", "bos")) == ids
    rebuilt = name in ("GPT2Tokenizer", "Qwen2Tokenizer")
    assert (f"loads {source} as {name}, which encodes" in capsys.readouterr().out) == rebuilt


_CODE = """
import os
from transformers import PreTrainedTokenizerFast
os.mkdir({marker!r})
class Mine(PreTrainedTokenizerFast): ...
"""


@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
def test_code_beside_a_tokenizer_is_neither_executed_nor_asked_about(
    file, checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    classes = {"AutoTokenizer": ["mine.Mine", "mine.Mine"], "AutoConfig": "mine.Mine"}
    source = folder_of(tmp_path / "source", tokenizer_class="Mine")
    (source / "mine.py").write_text(_CODE.format(marker=str(tmp_path / "executed")))
    content = {"auto_map": classes, "tokenizer_class": "Mine", "model_type": "mine"}
    (source / file).write_text(json.dumps(content))
    export(checkpoint, tmp_path / "out", source)
    assert not (tmp_path / "executed").exists()
    assert "auto_map" not in (tmp_path / "out" / "tokenizer_config.json").read_text()
    (source / "tokenizer.json").rename(source / "vocab.json")  # what transformers has to read
    assert "cannot be loaded" in refusal(checkpoint, tmp_path / "none", source)
    assert not (tmp_path / "executed").exists()


def test_a_name_in_the_checkpoint_is_no_command(capsys):
    """It is printed, to be copied."""
    for name, said in (
        ("a; rm -rf ~", "add --tokenizer 'a; rm -rf ~'\n"),
        ("\x1b[2J", "('\\x1b[2J'); add a Hugging Face tokenizer with --tokenizer\n"),
        (None, "(None); add a Hugging Face tokenizer with --tokenizer\n"),
    ):
        arguments = Namespace(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=name)
        assert tokenizer.load(None, arguments, 9, print) is None
        assert capsys.readouterr().out.endswith(said)


def test_special_tokens_that_only_the_class_names(checkpoint, tmp_path, capsys):
    """As in GPT-2's own folder."""
    source, out = folder_of(tmp_path / "source"), tmp_path / "out"
    (source / "config.json").write_text('{"model_type": "gpt2"}')
    (source / "tokenizer_config.json").write_text('{"model_max_length": 9, "bos_token": null}')
    export(checkpoint, out, source)
    config = json.loads((out / "config.json").read_text())
    assert (config["eos_token_id"], config["bos_token_id"]) == (0, None)
    assert "eos_token" not in capsys.readouterr().out

    (source / "config.json").unlink()
    export(checkpoint, tmp_path / "none", source)
    assert f"note: {source} names no eos_token" in capsys.readouterr().out


def test_files_that_users_know_come_along(checkpoint, tmp_path, capsys):
    source = folder_of(tmp_path / "source")
    raw = byte_level()
    raw.post_processor = processors.TemplateProcessing(
        single=f"{EOD} $A", special_tokens=[(EOD, 0)]
    )
    raw.save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").unlink()
    (source / "special_tokens_map.json").write_text(json.dumps({"bos_token": EOD}))
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "rag.jinja").write_text("{{ documents }}")
    (source / "notes.txt").write_text("of no use")
    export(checkpoint, tmp_path / "out", source / "tokenizer.json")
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded.bos_token_id == 0
    assert loaded.chat_template == {"default": "{{ messages }}", "rag": "{{ documents }}"}
    assert not (tmp_path / "out" / "notes.txt").exists()
    assert f"adds {EOD} to every text, which tools/prepare_data.py" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"split_special_tokens": True}, "otherwise than tokenizer.json"),
        (
            {"added_tokens_decoder": {"300": {"content": "World"}}},
            "encode '  Hello World, leading spaces' otherwise than tokenizer.json",
        ),
        ({"pad_token": "<pad>", "mask_token": "<mask>"}, "adds tokens up to id 263"),
    ],
)
def test_what_would_encode_otherwise_is_refused(config, message, checkpoint, tmp_path):
    source = folder_of(tmp_path / "source", **config)
    assert message in refusal(checkpoint, tmp_path / "out", source, "--trim-vocab", 263)


def test_without_tokenizer_json_it_is_what_transformers_makes_of_it(checkpoint, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "wor", "##ld", "1", "##2"]
    (source / "vocab.txt").write_text("\n".join(words))
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    export(checkpoint, out, source)
    before, after = map(transformers.AutoTokenizer.from_pretrained, (source, out))
    assert before("Hello world 12").input_ids == after("Hello world 12").input_ids

    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    (source / "vocab.txt").unlink()
    assert "has no tokenizer.json" in refusal(checkpoint, tmp_path / "none", source)


CONFIGS = {
    "empty": (b"", "it is no JSON"),
    "list": (b"[]", "it is [], not an object"),
    "latin1": (b'{"eos_token": "\xe9"}', "it is no JSON: not UTF-8"),
    "deep": (b"[" * 100_000, "it is no JSON of ours: nested too deeply"),
    "object": (b'{"eos_token": {"text": 1}}', "eos_token is {'text': 1}, not text"),
    "number": (b'{"pad_token": 3}', "pad_token is 3, not text"),
    "nul": (b'{"bos_token": "a\\u0000"}', r"bos_token is 'a\x00', not text"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_damaged_config_is_refused_by_its_field(name, checkpoint, tmp_path):
    content, message = CONFIGS[name]
    source = folder_of(tmp_path / "source")
    (source / "tokenizer_config.json").write_bytes(content)
    found = refusal(checkpoint, tmp_path / "out", source)
    assert f"{source / 'tokenizer_config.json'}: {message}" in found


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"eos_token": ""}, ""),  # which is no token, and as if it were not there
        ({"model_max_length": "512"}, "is loaded, and cannot encode"),
    ],
)
def test_a_senseless_config_is_refused_or_harmless(config, message, checkpoint, tmp_path):
    source = folder_of(tmp_path / "source", **config)
    if message:
        assert message in refusal(checkpoint, tmp_path / "out", source)
    else:
        export(checkpoint, tmp_path / "out", source)


def test_a_byte_order_mark_is_read(checkpoint, tmp_path):
    source = folder_of(tmp_path / "source")
    (source / "tokenizer_config.json").write_bytes(b"\xef\xbb\xbf{}")
    export(checkpoint, tmp_path / "out", source)
    transformers.AutoTokenizer.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "its tokenizer.json cannot be used"),
        (b"\xff", "its tokenizer.json cannot be used"),
        (b'{"model": 1}', "its tokenizer.json cannot be used"),
        (models.WordLevel({}), "its tokenizer.json cannot be used: its vocabulary is empty"),
        (models.WordLevel({"a": 0, "b": 600}, unk_token="a"), "has 601 tokens, the model 512 rows"),
        (None, "cannot be loaded"),  # a folder
    ],
)
def test_a_damaged_tokenizer_json_is_refused(content, message, checkpoint, tmp_path):
    source = folder_of(tmp_path / "source")
    file = source / "tokenizer.json"
    file.unlink()
    if content is None:
        file.mkdir()
    else:
        file.write_bytes(
            content if isinstance(content, bytes) else Tokenizer(content).to_str().encode()
        )
    assert message in refusal(checkpoint, tmp_path / "out", source)


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "/none", "a/b/c", ""])
def test_a_name_that_cannot_be_one(name, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "--tokenizer" in refusal(checkpoint, tmp_path / "out", name)


def test_a_name_on_the_hub(checkpoint, tmp_path, monkeypatch):
    """From the hub's cache; tests/data asks a server."""
    repository = tmp_path / "cache" / "models--owner--name"
    (repository / "snapshots").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    source = folder_of(repository / "snapshots" / ("0" * 40), tokenizer_class="GPT2Tokenizer")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    export(checkpoint, tmp_path / "out", "owner/name")
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (
        source / "tokenizer.json"
    ).read_bytes()


_GOOD = {
    "eos_token": {"content": EOD},
    "pad_token": EOD,
    "tokenizer_class": "GPT2Tokenizer",
    "model_max_length": 9,
    "padding_side": "left",
    "added_tokens_decoder": {"0": {"content": EOD, "special": True}},
    "extra_special_tokens": ["a"],
    "model_input_names": ["input_ids"],
    "chat_template": "{{ messages }}",
    "add_bos_token": False,
    "split_special_tokens": False,
}


def _load(folder: Path) -> None:
    """It works, or is refused in one line."""
    from argparse import Namespace

    try:
        words = tokenizer.load(str(folder), Namespace(), 512, lambda _: None)
        staged = folder / "staged"
        staged.mkdir(exist_ok=True)
        tokenizer.write(staged, words, 512, lambda _: None)
    except Refused as error:
        assert "\n" not in str(error)


@pytest.mark.filterwarnings("ignore")
def test_any_damage_is_refused_in_one_line(tmp_path):
    folder = folder_of(tmp_path / "source")
    small = Tokenizer(models.WordLevel({EOD: 0, "a": 1}, unk_token=EOD))
    small.add_special_tokens([EOD])
    good = small.to_str()

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    @given(damaged(_GOOD))
    def of_config(config):
        (folder / "tokenizer.json").write_text(good)
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        _load(folder)

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    @given(damaged_bytes(good.encode()))
    def of_tokenizer(content):
        (folder / "tokenizer.json").write_bytes(content)
        _load(folder)

    of_config()
    (folder / "tokenizer_config.json").write_text(json.dumps(_GOOD))
    of_tokenizer()
