"""bitfold.quantize on transformers models: the swap computes what the dequantized float model computes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import bitfold
from bitfold.errors import CoverageError
from bitfold.nn import PackedModule, QuantConv1D, QuantEmbedding, TiedEmbedding, TiedHead

transformers = pytest.importorskip("transformers")

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 120,
}
TOKENS = {"input_ids": torch.arange(3, 17).reshape(2, 7)}
PAIR = TOKENS | {"decoder_input_ids": TOKENS["input_ids"]}


def build(name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A tiny random model of each family, and its inputs."""
    t = transformers
    seq2seq = {"decoder_start_token_id": 0, "vocab_size": 120}
    bart = {
        f"{side}_{what}": n
        for side in ("encoder", "decoder")
        for what, n in (("layers", 1), ("attention_heads", 4), ("ffn_dim", 96))
    }
    gpt2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 120}
    table: dict[str, tuple[Any, Any, dict[str, torch.Tensor]]] = {
        "bert": (t.BertModel, t.BertConfig(**SIZES), TOKENS),
        "bert-mlm": (t.BertForMaskedLM, t.BertConfig(**SIZES), TOKENS),
        "llama": (t.LlamaForCausalLM, t.LlamaConfig(**SIZES), TOKENS),
        "llama-tied": (t.LlamaForCausalLM, t.LlamaConfig(**SIZES, tie_word_embeddings=True), TOKENS),
        "gpt2": (t.GPT2LMHeadModel, t.GPT2Config(**gpt2), TOKENS),
        "t5": (
            t.T5ForConditionalGeneration,
            t.T5Config(d_model=64, d_ff=96, num_layers=2, num_heads=4, d_kv=16, **seq2seq),
            PAIR,
        ),
        "bart": (
            t.BartForConditionalGeneration,
            t.BartConfig(d_model=64, scale_embedding=True, max_position_embeddings=32, **bart, **seq2seq),
            PAIR,
        ),
        "gemma3": (
            t.Gemma3ForCausalLM,
            t.Gemma3TextConfig(**SIZES, num_key_value_heads=2, head_dim=16, sliding_window=8),
            TOKENS,
        ),
        "opt": (
            t.OPTForCausalLM,
            t.OPTConfig(
                hidden_size=64,
                word_embed_proj_dim=64,
                ffn_dim=96,
                num_hidden_layers=2,
                num_attention_heads=4,
                vocab_size=120,
                max_position_embeddings=32,
            ),
            TOKENS,
        ),
        "mixtral": (
            t.MixtralForCausalLM,
            t.MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4),
            TOKENS,
        ),
        "mamba": (
            t.MambaForCausalLM,
            t.MambaConfig(hidden_size=64, num_hidden_layers=2, vocab_size=120),
            TOKENS,
        ),
        "deberta": (
            t.DebertaV2Model,
            t.DebertaV2Config(
                **SIZES, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8
            ),
            TOKENS,
        ),
        "vit": (
            t.ViTForImageClassification,
            t.ViTConfig(**{k: v for k, v in SIZES.items() if k != "vocab_size"}, image_size=32, patch_size=8),
            {"pixel_values": torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)},
        ),
    }
    cls, config, inputs = table[name]
    torch.manual_seed(0)
    return cls(config).eval(), inputs


NAMES = [
    *("bert", "bert-mlm", "llama", "llama-tied", "gpt2", "t5", "bart"),
    *("gemma3", "opt", "mixtral", "mamba", "deberta", "vit"),
]
ALL_COVERED = {"bert", "deberta", "bert-mlm", "llama", "llama-tied", "gpt2", "t5", "gemma3"}


def output(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs)[0]


def fold(model: nn.Module, fmt: str = "nf4") -> list[str]:
    """Fold, with what the message lists as `skip`; returns that."""
    try:
        bitfold.quantize(model, fmt, progress=False)
    except CoverageError as error:
        skip = eval(str(error).split("skip=")[1])
        bitfold.quantize(model, fmt, skip=skip, progress=False)
        return skip
    return []


def with_dequantized_weights(reference: nn.Module, folded: nn.Module) -> nn.Module:
    for name, module in folded.named_modules():
        if isinstance(module, PackedModule):
            matrix = module.dequantize()
            target = reference.get_submodule(name)
            target.weight.data = matrix.t().contiguous() if isinstance(module, QuantConv1D) else matrix
    if hasattr(reference, "tie_weights"):
        reference.tie_weights()
    return reference


@pytest.mark.parametrize("name", NAMES)
def test_the_swap_computes_what_the_dequantized_model_computes(name):
    model, inputs = build(name)
    reference = copy.deepcopy(model)
    before = output(model, inputs)
    skipped = fold(model)
    fused = any(parameter.ndim == 3 for parameter in reference.parameters())  # not in transformers 4
    assert (skipped == []) == (name in ALL_COVERED or (name == "mixtral" and not fused)), skipped
    folded = output(model, inputs)
    assert not torch.equal(folded, before)
    expected = output(with_dequantized_weights(reference, model), inputs)
    bitfold.set_accuracy(model, "fp32")
    exact = output(model, inputs)
    # float32 sums in another order, through two layers
    assert torch.allclose(exact, expected, atol=1e-4 * expected.abs().max().item()), (
        (exact - expected).abs().max()
    )
    # The default: each product adds up to 2e-4 of its size, and a model has about ten one after another.
    off = (folded - expected).square().mean() / expected.square().mean()
    assert off.sqrt() <= 2e-3


@pytest.mark.parametrize("name", ["bert-mlm", "llama-tied", "gpt2", "t5", "bart", "gemma3"])
def test_tied_weights_stay_one_matrix(name):
    model, inputs = build(name)
    fold(model)
    heads = [module for module in model.modules() if isinstance(module, TiedHead)]
    assert len(heads) == 1
    assert heads[0].source in list(model.modules())
    assert not any("lm_head.weight" in key or "decoder.weight" in key for key in model.state_dict())
    # transformers 4 hangs one embedding in several places, 5 ties several: either way there is one table
    tables = {id(module) for module in model.modules() if isinstance(module, QuantEmbedding)}
    others = {"bert-mlm": 2, "gpt2": 1, "t5": 2}.get(name, 0)  # positions, token types, relative biases
    assert len(tables) == 1 + others
    if name in ("t5", "bart") and transformers.__version__ >= "5":
        assert sum(isinstance(module, TiedEmbedding) for module in model.modules()) == 2
    twin = copy.deepcopy(model)
    assert torch.equal(output(twin, inputs), output(model, inputs))
    twin_head = next(module for module in twin.modules() if isinstance(module, TiedHead))
    assert twin_head.source in list(twin.modules())
    assert twin_head.source not in list(model.modules())


@pytest.mark.parametrize("name", ["bert-mlm", "t5", "gemma3", "bart"])
def test_bfloat16(name):
    model, inputs = build(name)
    fold(model.to(torch.bfloat16))
    folded = output(model, inputs)
    assert folded.dtype == torch.bfloat16
    assert torch.isfinite(folded).all()
    again = output(model.float(), inputs)
    assert (again - folded.float()).norm() < 0.05 * again.norm()


def test_bias_of_berts_head_stays_tied():
    model, _ = build("bert-mlm")
    fold(model)
    assert "cls.predictions.decoder.bias" not in model.state_dict()
    entry = bitfold.manifest.describe(model)["modules"]["cls.predictions.decoder"]
    assert entry == {
        "kind": "tied_head",
        "tied_to": "bert.embeddings.word_embeddings",
        "bias": "cls.predictions.bias",
    }


def test_transformers_does_not_try_to_tie_packed_buffers():
    for name in ("bert-mlm", "llama-tied", "t5"):
        model, _ = build(name)
        fold(model)
        tied = getattr(model, "all_tied_weights_keys", {})
        packed = {key for key, tensor in model.state_dict().items() if not tensor.is_floating_point()}
        assert not packed & {*tied, *tied.values()}


def test_the_config_says_how_the_model_is_folded():
    model, _ = build("bert")
    fold(model)
    stored = model.config.to_dict()["quantization_config"]
    assert stored["quant_method"] == "bitfold"
    assert stored["modules"] == bitfold.manifest.describe(model)["modules"]


def test_fused_experts_are_named():
    model, _ = build("mixtral")
    if not any(parameter.ndim == 3 for parameter in model.parameters()):
        pytest.skip("this transformers has one Linear per expert")
    with pytest.raises(CoverageError, match="fused experts") as error:
        bitfold.quantize(model, "nf4", progress=False)
    assert r'r"model\.layers\.\d+\.mlp\.experts\.gate_up_proj"' in str(error.value)


def test_on_meta_with_ties():
    with torch.device("meta"):
        model, _ = build("llama-tied")
    fold(model)
    real, _ = build("llama-tied")
    fold(real)
    assert bitfold.manifest.describe(model) == bitfold.manifest.describe(real)


def test_an_interrupted_model_can_be_described_and_finished():
    from bitfold import methods

    model, inputs = build("bert-mlm")
    left = {"count": 5}

    def interrupted(weight, fmt, statistics=None):
        left["count"] -= 1
        if left["count"] < 0:
            raise KeyboardInterrupt
        return methods.get("round")(weight, fmt)

    methods.register("interrupted-hf")(interrupted)
    try:
        with pytest.raises(KeyboardInterrupt):
            bitfold.quantize(model, "nf4", method="interrupted-hf", progress=False)
    finally:
        del methods.base._METHODS["interrupted-hf"]
    assert model.config.quantization_config["modules"] == bitfold.manifest.describe(model)["modules"]
    assert (
        len(bitfold.manifest.describe(model)["modules"]) == 6
    )  # five matrices, one of them with a tied head
    assert torch.isfinite(output(model, inputs)).all()
    fold(model)
    whole, _ = build("bert-mlm")
    fold(whole)
    assert bitfold.manifest.describe(model) == bitfold.manifest.describe(whole)
