"""bitfold.compare: against figures computed here from whole outputs, and what it refuses."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from torch import nn

import bitfold
from bitfold.errors import ActivationError
from bitfold.planning.candidates import LADDER


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.embed.weight.data *= 0.1  # else every token predicts itself, whatever the weights
        self.a = nn.Linear(64, 96)
        self.b = nn.Linear(96, 64)
        self.head = nn.Linear(64, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> dict:
        del attention_mask
        x = self.embed(input_ids)
        return {"logits": self.head(x + self.b(torch.relu(self.a(x))))}


def pair(fmt: str = "nf4") -> tuple[nn.Module, nn.Module]:
    model = Net()
    other = copy.deepcopy(model)
    bitfold.quantize(other, fmt, progress=False)
    bitfold.set_accuracy(other, "fp32")
    return model, other


def batch(rows: int = 3, length: int = 7) -> dict[str, torch.Tensor]:
    mask = torch.ones(rows, length, dtype=torch.int64)
    mask[0, 4:] = 0
    return {"input_ids": torch.randint(0, 50, (rows, length)), "attention_mask": mask}


def test_figures_are_those_of_the_whole_outputs():
    model, other = pair("int3-g64")
    batches = [batch(), batch(2, 5)]
    found = bitfold.compare(model, other, iter(batches))
    expected, actual = [], []
    for item in batches:
        keep = item["attention_mask"].bool()
        with torch.no_grad():
            expected.append(model(**item)["logits"][keep].double())
            actual.append(other(**item)["logits"][keep].double())
    p, q = torch.cat(expected), torch.cat(actual)
    kl = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1).mean()
    assert found.output == "logits"
    assert found.batches == 2
    assert found.final.rows == len(p) == 27
    assert found.kl == pytest.approx(float(kl), rel=1e-4)
    assert found.top1 == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert found.final.relative_mse == pytest.approx(
        float((p - q).square().sum() / p.square().sum()), rel=1e-4
    )
    assert found.final.cosine == pytest.approx(
        float(nn.functional.cosine_similarity(p, q, -1).mean()), rel=1e-5
    )
    assert found.final.max_error == pytest.approx(float((p - q).abs().max()), rel=1e-4)
    assert found.perplexity is None


def test_layers_alone_and_in_place():
    model, other = pair("int2-g64")
    data = batch()
    layers = {layer.name: layer for layer in bitfold.compare(model, other, [data]).layers}
    assert list(layers) == ["embed", "a", "b", "head"]
    keep = data["attention_mask"].bool()
    with torch.no_grad():
        x, y = model.embed(data["input_ids"])[keep], other.embed(data["input_ids"])[keep]
        alone, in_place, reference = other.a(x), other.a(y), model.a(x)
    scale = reference.square().sum()
    assert layers["a"].isolated.relative_mse == pytest.approx(
        float((alone - reference).square().sum() / scale), rel=1e-4
    )
    assert layers["a"].accumulated.relative_mse == pytest.approx(
        float((in_place - reference).square().sum() / scale), rel=1e-4
    )
    assert layers["a"].format == "int2-g64"
    assert layers["head"].accumulated.relative_mse > layers["head"].isolated.relative_mse


def test_better_formats_deviate_less():
    model = Net()
    errors = []
    for fmt in (LADDER[0], LADDER[3], "nf4", "int8-row"):
        other = bitfold.quantize(copy.deepcopy(model), fmt, embeddings=fmt, progress=False)
        errors.append(bitfold.compare(model, other, [batch()], per_layer=False).kl)
    assert errors == sorted(errors, reverse=True)


def test_nothing_is_changed_and_layers_can_be_left_out():
    model, other = pair()
    model.train()
    model.a.eval()
    result = bitfold.compare(model, other, [batch()], per_layer=False)
    assert result.layers == []
    assert model.training
    assert not model.a.training
    for module in [*model.modules(), *other.modules()]:
        assert not module._forward_hooks


def test_tables_and_json():
    model, other = pair()
    result = bitfold.compare(model, other, [batch()])
    for part in ("own rel. MSE", "nf4", "head", "mean KL", "top-1 agreement"):
        assert part in str(result)
    assert result._repr_html_().count("<tr>") == 6
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False)) == result.to_dict()


def test_plain_tensors_and_tuples():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    other = bitfold.quantize(copy.deepcopy(model), "int8-row", progress=False)
    result = bitfold.compare(model, other, [torch.randn(5, 64), (torch.randn(2, 64),)])
    assert (result.output, result.final.rows, result.kl) == ("output", 7, None)
    assert result.final.cosine > 0.999


def test_shared_and_routed_modules():
    """A module that is called twice is compared call by call; one with other rows only by itself."""

    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.expert, self.idle = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.gate(self.gate(x))
            chosen = (y[:, 0] * 1e4).floor() % 2 == 0  # another choice after the smallest change
            return y.index_add(0, chosen.nonzero()[:, 0], self.expert(y[chosen]))

    model = Routed()
    other = bitfold.quantize(copy.deepcopy(model), "int3-g64", progress=False)
    layers = {layer.name: layer for layer in bitfold.compare(model, other, [torch.randn(33, 64)]).layers}
    assert layers["gate"].isolated.rows == layers["gate"].accumulated.rows == 66
    assert layers["expert"].isolated.rows > 0
    assert "idle" not in layers


# Errors


def test_what_does_not_fit_is_refused():
    model, other = pair()
    for arguments, words in [
        ((model, model), "same object"),
        ((model, copy.deepcopy(model)), "nothing is folded"),
        ((other, copy.deepcopy(other)), "embed: folded in the second model, the first has a folded"),
        ((nn.Sequential(nn.Linear(8, 8)), other), "no such module"),
    ]:
        with pytest.raises(ValueError, match=words):
            bitfold.compare(*arguments, [batch()])
    wider = Net()
    wider.a = nn.Linear(64, 128)
    with pytest.raises(
        ValueError, match=r"a: the float model has Linear \[128, 64\], the folded one \[96, 64\]"
    ):
        bitfold.compare(wider, other, [batch()])


def test_bad_batches():
    model, other = pair()
    with pytest.raises(ValueError, match="no batches"):
        bitfold.compare(model, other, iter([]))
    with pytest.raises(TypeError, match="for a single batch write"):
        bitfold.compare(model, other, batch())
    with pytest.raises(TypeError, match="batch 2 is a list"):
        bitfold.compare(model, other, [batch(), [1, 2]])
    with pytest.raises(ValueError, match=r"batch 1 holds \(.*label=int64 \[2\]\).*'label'"):
        bitfold.compare(model, other, [{**batch(), "label": torch.zeros(2, dtype=torch.long)}])
    empty = batch()
    empty["attention_mask"].zero_()
    with pytest.raises(ValueError, match="no rows"):
        bitfold.compare(model, other, [empty])


def test_non_finite_outputs_are_named():
    model, other = pair()
    model.b.bias.data[3] = math.inf
    with pytest.raises(ActivationError, match="float model: b: 18 of"):
        bitfold.compare(model, other, [batch()])
    model, other = pair()
    other.b.bias = nn.Parameter(torch.full((64,), math.nan))
    with pytest.raises(ActivationError, match="the folded b"):
        bitfold.compare(model, other, [batch()])
    with pytest.raises(ActivationError, match="the folded model: logits"):
        bitfold.compare(model, other, [batch()], per_layer=False)


# transformers


def test_causal_perplexity_is_that_of_the_model_itself():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=99, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96
    )
    model = transformers.LlamaForCausalLM(config).eval()
    other = bitfold.quantize(copy.deepcopy(model), "int4-g64", progress=False)
    ids = torch.randint(0, 99, (2, 12))
    result = bitfold.compare(model, other, [{"input_ids": ids}])
    with torch.no_grad():
        losses = [float(m(input_ids=ids, labels=ids).loss) for m in (model, other)]
    assert result.perplexity == pytest.approx([math.exp(loss) for loss in losses], rel=1e-4)
    assert [layer.name for layer in result.layers][:2] == [
        "model.embed_tokens",
        "model.layers.0.self_attn.q_proj",
    ]


def test_encoders_and_encoder_decoders():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=99, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
        max_position_embeddings=32,
    )  # fmt: skip
    model = transformers.BertModel(config).eval()
    other = bitfold.quantize(copy.deepcopy(model), "int8-row", progress=False)
    result = bitfold.compare(model, other, [batch()])
    assert (result.output, result.kl, result.final.rows) == ("last_hidden_state", None, 18)
    assert result.final.cosine > 0.99
    config = transformers.T5Config(
        vocab_size=99, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    other = bitfold.quantize(copy.deepcopy(model), "int8-row", progress=False)
    ids = torch.randint(0, 99, (2, 5))
    result = bitfold.compare(model, other, [{**batch(2, 9), "labels": ids}])
    assert result.final.rows == 10
    with torch.no_grad():
        loss = float(model(input_ids=ids, labels=ids).loss)
    assert result.perplexity is not None
    assert loss > 0
