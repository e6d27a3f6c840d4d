"""Folds of scales: found in blocks of every kind, exact, and never found where they are not."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from bitfold.folds import apply_folds, columns_of, find_folds, holds

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def config(name, **others):
    return getattr(transformers, name)(**{**SMALL, **others})


MODELS = {
    "llama": lambda: transformers.LlamaForCausalLM(config("LlamaConfig", num_key_value_heads=2)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=99, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    ),
    "opt": lambda: transformers.OPTForCausalLM(
        config("OPTConfig", ffn_dim=96, word_embed_proj_dim=64, activation_function="relu")
    ),
    "gemma": lambda: transformers.GemmaForCausalLM(config("GemmaConfig", num_key_value_heads=1, head_dim=16)),
    "bert": lambda: transformers.BertModel(config("BertConfig")),
}

BLOCKS = {
    "llama": "model.layers.1",
    "gpt2": "transformer.h.1",
    "opt": "model.decoder.layers.1",
    "gemma": "model.layers.1",
    "bert": "encoder.layer.1",
}

ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
GATED = {
    "input_layernorm": ATTENTION,
    "self_attn.v_proj": ["self_attn.o_proj"],
    "post_attention_layernorm": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp.up_proj": ["mlp.down_proj"],
}
EXPECTED = {
    "llama": ("gain", GATED),
    "gpt2": ("gain", {"ln_1": ["attn.c_attn"], "ln_2": ["mlp.c_fc"]}),  # c_fc -> GELU -> c_proj is none
    "opt": (
        "gain",
        {
            "self_attn_layer_norm": ATTENTION,
            "self_attn.v_proj": ["self_attn.out_proj"],
            "final_layer_norm": ["fc1"],
            "fc1": ["fc2"],  # through ReLU
        },
    ),
    "gemma": ("one_plus_gain", GATED),
    "bert": ("gain", {"attention.self.value": ["attention.output.dense"]}),  # its norms feed residuals
}


class Expert(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.w1, self.w3 = nn.Linear(size, 48), nn.Linear(size, 48)
        self.w2 = nn.Linear(48, size)

    def forward(self, x):
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


class MixtureBlock(nn.Module):
    """A norm that feeds a router and experts; some experts get no token."""

    def __init__(self, size=32, experts=6):
        super().__init__()
        self.norm, self.gate = nn.RMSNorm(size), nn.Linear(size, experts, bias=False)
        self.experts = nn.ModuleList(Expert(size) for _ in range(experts))

    def forward(self, x):
        rows = self.norm(x)
        weight, chosen = self.gate(rows).softmax(-1).max(-1)
        result = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            at = torch.where(chosen == number)[0]
            if at.numel():
                result[at] = expert(rows[at]) * weight[at, None]
        return x + result


def with_random_vectors(model):
    """Biases and gains as trained models have them, not zeros and ones; no key-value cache."""
    if hasattr(model, "config"):
        model.config.use_cache = False
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def called_with(model, block, *args, **kwargs):
    found = []
    hook = model.get_submodule(block).register_forward_pre_hook(
        lambda _, args, kwargs: found.append((args, kwargs)), with_kwargs=True
    )
    with torch.no_grad():
        result = model(*args, **kwargs)
    hook.remove()
    return found, result[0]


def random_scales(folds):
    return [torch.exp(torch.randn(fold.channels)) for fold in folds]


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", MODELS)
def test_exactly_the_legal_folds_of_an_architecture(name):
    model = with_random_vectors(MODELS[name]())
    ids = torch.randint(0, 99, (2, 12))
    inputs, before = called_with(model, BLOCKS[name], input_ids=ids)
    block = model.get_submodule(BLOCKS[name])
    weights = copy.deepcopy(block.state_dict())
    folds = find_folds(block, inputs).folds
    assert all(torch.equal(value, weights[key]) for key, value in block.state_dict().items())
    form, expected = EXPECTED[name]
    assert {fold.source: sorted(fold.readers) for fold in folds} == {
        k: sorted(v) for k, v in expected.items()
    }
    assert {fold.form for fold in folds if "norm" in fold.source or "ln_" in fold.source} <= {form}

    apply_folds(block, folds, random_scales(folds))
    with torch.no_grad():
        after = model(input_ids=ids)[0]
    assert (after - before).norm() <= 1e-5 * before.norm()
    assert any(not torch.equal(value, weights[key]) for key, value in block.state_dict().items())
    other = BLOCKS[name].replace("1", "0")
    inputs, _ = called_with(model, other, input_ids=ids)
    assert holds(model.get_submodule(other), inputs, folds)


def test_grouped_heads_share_the_scales_of_their_values():
    model = with_random_vectors(MODELS["llama"]())
    inputs, _ = called_with(model, "model.layers.0", input_ids=torch.randint(0, 99, (2, 12)))
    folds = {fold.source: fold for fold in find_folds(model.model.layers[0], inputs).folds}
    fold = folds["self_attn.v_proj"]
    heads = torch.arange(32).view(2, 16)  # two of values, each read by two of queries
    assert fold.channels == 32
    assert torch.equal(fold.readers["self_attn.o_proj"], heads.repeat_interleave(2, dim=0).reshape(-1))


def test_a_mixture_scales_its_router_and_experts_that_got_nothing():
    block, x = with_random_vectors(MixtureBlock()), torch.randn(40, 32)
    with torch.no_grad():
        block.gate.weight[5] = -9 * block.gate.weight[:5].sum(0)
        chosen = set(block.gate(block.norm(x)).argmax(-1).tolist())
        x = x[block.gate(block.norm(x)).argmax(-1) != min(chosen)]  # nobody asks for that one
        before = block(x)
    folds = {fold.source: fold for fold in find_folds(block, [((x,), {})]).folds}
    everyone = {"gate", *(f"experts.{i}.{w}" for i in range(6) for w in ("w1", "w3"))}
    assert set(folds["norm"].readers) == everyone
    assert f"experts.{min(chosen)}.w3" not in folds  # what could not be tried is not claimed
    picked = list(folds.values())
    apply_folds(block, picked, random_scales(picked))
    with torch.no_grad():
        assert (block(x) - before).norm() <= 1e-5 * before.norm()


def test_what_a_norm_feeds_besides_is_said():
    class Leaky(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(16), nn.Linear(16, 16)

        def forward(self, x):
            y = self.norm(x)
            return y + self.linear(y)

    found = find_folds(Leaky().eval(), [((torch.randn(9, 16),), {})])
    assert found.folds == []
    assert "feeds more than linear" in found.refused["norm"]


def test_weights_that_others_use_are_left_alone():
    block = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)).eval()
    inputs = [((torch.randn(9, 16),), {})]
    assert [fold.source for fold in find_folds(block, inputs).folds] == ["0", "1"]
    found = find_folds(block, inputs, shared={id(block[1].weight)})
    assert found.folds == []
    assert "used by another module" in found.refused["0"]
    assert not holds(block, inputs, find_folds(block, inputs).folds, shared={id(block[1].weight)})
    block[3].weight = block[1].weight
    assert find_folds(block, inputs).folds == []


def test_channels_that_were_never_active_follow_the_others():
    block = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8)).eval()
    with torch.no_grad():
        block[0].bias[3:6] = -100
    folds = find_folds(block, [((torch.randn(30, 16),), {})]).folds
    assert [fold.source for fold in folds] == ["0"]
    assert torch.equal(folds[0].readers["2"], torch.arange(24))


def test_half_precision_weights_and_bad_scales():
    block = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 8)).eval().bfloat16()
    folds = find_folds(block, [((torch.randn(9, 16).bfloat16(),), {})]).folds
    assert len(folds) == 1
    with pytest.raises(ValueError, match=r"must be \[16\], got \[8\]"):
        apply_folds(block, folds, [torch.ones(8)])
    with pytest.raises(ValueError, match="positive and finite"):
        apply_folds(block, folds, [torch.zeros(16)])
    assert columns_of(torch.tensor([1, -1, 0]), torch.tensor([2.0, 3.0])).tolist() == [3.0, 1.0, 2.0]
