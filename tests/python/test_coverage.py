"""bitfold.quantize: what cannot be folded and must be named, and what raises before anything changes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from bitfold.errors import CoverageError, WeightError
from bitfold.nn import TiedHead
from toys import Toy, assert_unchanged, fold, kinds, state_of


class Subclass(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Experts(nn.Module):
    def __init__(self, count: int = 4) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(count, 32, 16))
        self.down = nn.Parameter(torch.randn(count, 16, 32))


def pasted(error: Exception) -> list[str]:
    """The `skip=[…]` of the message, as a user pastes it."""
    return eval(str(error).split("skip=")[1])


@pytest.mark.parametrize(
    ("extra", "named", "reason"),
    [
        (lambda: nn.Conv2d(3, 16, 5), ["extra"], "a convolution"),
        (lambda: Subclass(32, 32), ["extra"], "Subclass is a subclass"),
        (Experts, ["extra.gate_up", "extra.down"], "fused experts"),
        (
            lambda: nn.MultiheadAttention(32, 2),
            ["extra.in_proj_weight", "extra.out_proj"],
            "a parameter of MultiheadAttention",
        ),
        (lambda: nn.Embedding(50, 32, max_norm=1.0), ["extra"], "max_norm"),
        (lambda: nn.LSTM(32, 32), ["extra.weight_ih_l0", "extra.weight_hh_l0"], "a parameter of LSTM"),
        (lambda: torch.nn.utils.parametrizations.weight_norm(nn.Linear(32, 32)), None, "a parameter of"),
    ],
    ids=["conv", "subclass", "experts", "attention", "max_norm", "lstm", "weight_norm"],
)
def test_what_cannot_be_folded_must_be_named(extra, named, reason):
    model = Toy()
    model.extra = extra()
    before = state_of(model)
    with pytest.raises(CoverageError, match="% of the bytes of all matrices") as error:
        fold(model)
    assert_unchanged(model, before)
    assert reason in str(error.value)
    if named is not None:
        assert sorted(pasted(error.value)) == sorted(named)
    fold(model, skip=pasted(error.value))
    assert kinds(model)["layers.0"] == "nf4"
    assert all(tensor.is_floating_point() for name, tensor in model.extra.state_dict().items())


def test_numbered_siblings_are_listed_as_one_regex():
    model = nn.ModuleDict(
        {"blocks": nn.ModuleList([nn.Conv1d(8, 8, 3) for _ in range(12)]), "fc": nn.Linear(4, 4)}
    )
    with pytest.raises(CoverageError) as error:
        fold(model)
    assert pasted(error.value) == [r"blocks\.\d+"]
    fold(model, skip=pasted(error.value))


def test_less_than_one_percent_may_stay_unnamed():
    model = nn.ModuleDict({"fc": nn.Linear(256, 256), "conv": nn.Conv1d(4, 4, 9)})
    fold(model)
    assert kinds(model) == {"fc": "nf4"}


def test_a_format_for_what_cannot_be_folded_is_refused():
    class Scaled(nn.Linear):
        pass

    model = nn.ModuleDict({"large": nn.Linear(640, 64), "small": Scaled(4, 4)})
    with pytest.raises(ValueError, match="'small' matches no module that can be folded"):
        fold(model, rules={"small": "int8"})


def test_rules_that_say_none_count_as_naming():
    model = Toy()
    model.extra = nn.Conv2d(3, 16, 5)
    fold(model, rules={"extra": None})


def test_parent_that_reads_the_weight_and_a_rule_that_insists():
    layer = nn.TransformerEncoderLayer(32, 2, dim_feedforward=64, batch_first=True).eval()
    model = nn.ModuleDict({"layer": layer})
    with pytest.raises(
        CoverageError, match="TransformerEncoderLayer reads its weight without calling it"
    ) as error:
        fold(model)
    assert {"layer.linear1", "layer.linear2"} <= set(pasted(error.value))
    with pytest.warns(UserWarning, match="that skip, rules and embeddings leave to fold"):
        fold(copy.deepcopy(model), skip=["layer"])
    fold(model, skip=["layer.self_attn"], rules={r"layer\.linear\d": "nf4"})
    assert kinds(model)["layer.linear1"] == "nf4"


def test_transformer_encoder_as_a_whole_computes_as_before():
    model = nn.ModuleDict(
        {"encoder": nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 64, batch_first=True), 2)}
    )
    model["fc"] = nn.Linear(32, 32)
    model.eval()
    fold(model, skip=["encoder"])
    x = torch.randn(1, 4, 32)
    with torch.no_grad():
        assert torch.isfinite(model["encoder"](x)).all()


def test_patched_forward_stays_float():
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    model["a"].forward = lambda x: x
    with pytest.raises(CoverageError, match="its forward was replaced"):
        fold(model)


def test_a_model_without_matrices():
    model = nn.Sequential(nn.LayerNorm(4), nn.ReLU())
    with pytest.warns(UserWarning, match=r"nothing in this Sequential is folded: it has no nn\.Linear"):
        assert fold(model) is model


# Bad weights


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_are_named_before_anything_changes(value):
    model = Toy()
    model.head.weight.data[3, 4] = value
    before = list(model.modules())
    with pytest.raises(WeightError, match=r"head\.weight: 1 of 1600 values are NaN or Inf"):
        fold(model)
    assert list(model.modules()) == before
    fold(model, skip=["head"])


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64])
def test_non_float_weights_are_named(dtype):
    model = Toy()
    model.layers[1].weight = nn.Parameter(torch.ones(32, 32).to(dtype), requires_grad=False)
    before = list(model.modules())
    with pytest.raises(WeightError, match=r"layers\.1\.weight: dtype is"):
        fold(model)
    assert list(model.modules()) == before
    fold(model, skip=["layers.1"])


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_empty_weights_are_named():
    model = Toy()
    model.extra = nn.Linear(0, 8)
    with pytest.raises(WeightError, match=r"extra\.weight: .*no elements"):
        fold(model)
    fold(model, skip=["extra"])


def test_tiny_layers():
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 2), nn.Linear(2, 3))
    assert fold(model)(torch.ones(1, 1)).shape == (1, 3)


def test_on_meta_gives_empty_packed_modules():
    with torch.device("meta"):
        model = Toy(tied=True)
    fold(model)
    assert kinds(model)["layers.0"] == "nf4"
    assert isinstance(model.head, TiedHead)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    real = fold(Toy(tied=True))
    assert {n: (t.dtype, t.shape) for n, t in model.state_dict().items()} == {
        n: (t.dtype, t.shape) for n, t in real.state_dict().items()
    }
