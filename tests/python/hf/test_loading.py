"""bitfold.load and bitfold.save_pretrained."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import pytest
import tiny_models
import torch
from transformers import CLIPConfig, CLIPModel

import bitfold
from bitfold.errors import BitfoldError, PackedDataError

REAL = Path(__file__).parents[4] / "shared" / "models" / "tiny-llama"


@pytest.fixture
def folded():
    return bitfold.quantize(tiny_models.make("llama-tied"), "nf4", progress=False)


@pytest.mark.parametrize("name", tiny_models.MODELS)
def test_load_finds_the_class(name, tmp_path):
    model = bitfold.quantize(tiny_models.make(name, torch.bfloat16), "int4-g64", progress=False)
    bitfold.save_pretrained(model, tmp_path / "m")
    again = bitfold.load(tmp_path / "m")
    assert type(again) is type(model)
    assert torch.equal(tiny_models.logits(again, name), tiny_models.logits(model, name))


def test_load_takes_from_pretrained_options(folded, tmp_path):
    bitfold.save_pretrained(folded, tmp_path / "m", max_shard_size="10KB")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 2
    model = bitfold.load(
        str(tmp_path / "m"), device_map="auto", dtype=torch.bfloat16, attn_implementation="eager"
    )
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    assert bitfold.load(tmp_path / "m", torch_dtype=torch.float16).dtype == torch.float16


def test_generation_config_and_card_travel(folded, tmp_path):
    folded.generation_config.max_new_tokens = 17
    bitfold.save_pretrained(folded, tmp_path / "m")
    assert bitfold.load(tmp_path / "m").generation_config.max_new_tokens == 17
    assert "| whole model |" in (tmp_path / "m" / "README.md").read_text()


def test_tokenizer_travels(folded, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    bitfold.save_pretrained(
        folded,
        tmp_path / "m",
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]"),
    )
    assert AutoTokenizer.from_pretrained(tmp_path / "m")("b a x")["input_ids"] == [2, 1, 0]


def test_saving_replaces_the_directory_as_a_whole(folded, tmp_path):
    target = tmp_path / "m"
    target.mkdir()
    (target / "stale.safetensors").write_text("old")
    with pytest.raises(FileExistsError, match=r"no config\.json"):  # somebody's work, for all that is known
        bitfold.save_pretrained(folded, target)
    (target / "config.json").write_text("{}")
    bitfold.save_pretrained(folded, target)
    assert not (target / "stale.safetensors").exists()
    with pytest.raises(FileExistsError):
        bitfold.save_pretrained(folded, target, overwrite=False)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_path_that_is_not_there_is_no_name_on_the_hub(tmp_path):
    with pytest.raises(BitfoldError, match="no such directory"):
        bitfold.load(tmp_path / "nothing")


def test_a_part_that_was_folded_by_itself_is_saved_with_the_whole(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**sizes, "vocab_size": 100, "max_position_embeddings": 16},
        vision_config={**sizes, "image_size": 32, "patch_size": 16},
        projection_dim=32,
    )
    model = CLIPModel(config).eval()
    bitfold.quantize(model.text_model, "nf4", skip=["embeddings.position_embedding"], progress=False)
    bitfold.save_pretrained(model, tmp_path / "m")
    loaded = bitfold.load(tmp_path / "m")
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_failed_save_leaves_the_previous_export_and_nothing_else(folded, tmp_path):
    bitfold.save_pretrained(folded, tmp_path / "m")
    before = {file.name: file.read_bytes() for file in (tmp_path / "m").iterdir()}

    class Broken:
        def save_pretrained(self, directory):
            message = "disk is full"
            raise OSError(message)

    for target in ("m", "new"):
        with pytest.raises(OSError, match="disk is full"):
            bitfold.save_pretrained(folded, tmp_path / target, tokenizer=Broken())
    assert {file.name: file.read_bytes() for file in (tmp_path / "m").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_what_is_no_folded_model_is_refused_by_load(tmp_path):
    with pytest.raises(BitfoldError, match=r"no config\.json"):
        bitfold.load(tmp_path)
    tiny_models.make("llama").save_pretrained(tmp_path / "float")
    with pytest.raises(BitfoldError, match="BitfoldConfig"):
        bitfold.load(tmp_path / "float")
    with pytest.raises(BitfoldError, match="load_into"):
        bitfold.load(tmp_path / "float" / "model.safetensors")


@pytest.mark.parametrize(
    ("architectures", "error", "named"),
    [([], PackedDataError, "architectures"), (["NoSuchModel"], BitfoldError, "NoSuchModel")],
)
def test_unknown_architecture_is_named(architectures, error, named, folded, tmp_path):
    bitfold.save_pretrained(folded, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["architectures"] = architectures
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(error, match=named):
        bitfold.load(tmp_path / "m")


def test_what_cannot_be_saved_is_refused(folded, tmp_path):
    with pytest.raises(BitfoldError, match=r"bitfold\.save"):
        bitfold.save_pretrained(torch.nn.Linear(4, 4), tmp_path / "m")
    with pytest.raises(BitfoldError, match="nothing in this LlamaForCausalLM is folded"):
        bitfold.save_pretrained(tiny_models.make("llama"), tmp_path / "m")
    with pytest.raises(BitfoldError, match="push_to_hub"):
        bitfold.save_pretrained(folded, tmp_path / "m", push_to_hub=True)
    assert list(tmp_path.iterdir()) == []


CONFIGURATION = """
    from transformers import PretrainedConfig

    class OwnConfig(PretrainedConfig):
        model_type = "bitfold-test-own"

        def __init__(self, width=64, **kwargs):
            super().__init__(**kwargs)
            self.width = width
"""
MODELING = """
    import torch
    from transformers import PreTrainedModel

    from .configuration_own import OwnConfig

    class OwnModel(PreTrainedModel):
        config_class = OwnConfig

        def __init__(self, config):
            super().__init__(config)
            self.inner = torch.nn.Linear(config.width, config.width)
            self.norm = torch.nn.LayerNorm(config.width)
            self.post_init()

        def _init_weights(self, module):
            pass

        def forward(self, x):
            return self.norm(self.inner(x))
"""


def test_remote_code_travels(tmp_path, monkeypatch):
    from transformers import AutoModel

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    source = tmp_path / "source"
    source.mkdir()
    (source / "configuration_own.py").write_text(textwrap.dedent(CONFIGURATION))
    (source / "modeling_own.py").write_text(textwrap.dedent(MODELING))
    config = {
        "model_type": "bitfold-test-own",
        "architectures": ["OwnModel"],
        "auto_map": {"AutoConfig": "configuration_own.OwnConfig", "AutoModel": "modeling_own.OwnModel"},
        "width": 64,
    }
    (source / "config.json").write_text(json.dumps(config))
    from safetensors.torch import save_file

    torch.manual_seed(0)
    state = {"inner.weight": torch.randn(64, 64), "inner.bias": torch.randn(64)}
    state |= {"norm.weight": torch.randn(64), "norm.bias": torch.randn(64)}
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    model = AutoModel.from_pretrained(source, trust_remote_code=True)
    bitfold.quantize(model, "nf4", progress=False)
    bitfold.save_pretrained(model, tmp_path / "m")
    assert (tmp_path / "m" / "modeling_own.py").is_file()
    assert (tmp_path / "m" / "configuration_own.py").is_file()
    again = bitfold.load(tmp_path / "m", trust_remote_code=True)
    x = torch.randn(3, 64)
    assert torch.equal(again(x), model(x))
    assert isinstance(again.inner, bitfold.nn.QuantLinear)


@pytest.mark.skipif(not REAL.is_dir(), reason=f"the small causal language model is not at {REAL}")
def test_small_real_language_model(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(REAL / "tokenizer.json"))
    model = AutoModelForCausalLM.from_pretrained(REAL, dtype=torch.float32)
    batch = tokenizer("The cat sat on the", return_tensors="pt")
    with torch.no_grad():
        expected = model(input_ids=batch["input_ids"]).logits
    bitfold.save_pretrained(
        bitfold.quantize(model, "int8-row", progress=False), tmp_path / "m", tokenizer=tokenizer
    )
    again = bitfold.load(tmp_path / "m")
    with torch.no_grad():
        found = again(input_ids=batch["input_ids"]).logits
    assert torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.999
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "m")("The cat")["input_ids"]
        == tokenizer("The cat")["input_ids"]
    )
    float_bytes = sum(
        parameter.numel() * 4 for parameter in AutoModelForCausalLM.from_pretrained(REAL).parameters()
    )
    assert float_bytes / (tmp_path / "m" / "model.safetensors").stat().st_size > 3.7
