"""bitfold.quantize: what is folded and with what, interrupts, memory, ties."""

from __future__ import annotations

import copy
import gc
import io
import sys
import weakref

import pytest
import torch
from torch import nn

import bitfold
from bitfold import methods
from bitfold.errors import CoverageError, FormatError, WeightError
from bitfold.nn import QuantEmbedding, QuantLinear, TiedEmbedding, TiedHead
from toys import INDICES, Toy, assert_unchanged, fold, kinds, state_of


def test_defaults():
    model = Toy().eval()
    expected = model(INDICES)
    assert fold(model) is model
    assert kinds(model) == {"embed": "int8-g64", "layers.0": "nf4", "layers.1": "nf4", "head": "nf4"}
    assert (model(INDICES) - expected).norm() < 0.2 * expected.norm()
    assert [name for name, _ in model.named_parameters()] == [
        "layers.0.bias",
        "norm.weight",
        "norm.bias",
        "head.bias",
    ]
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_dtypes(dtype):
    model = fold(Toy(dtype=dtype))
    assert model(INDICES).dtype == dtype
    assert model.layers[0].original_dtype == dtype


def test_accepts_format_objects():
    model = fold(Toy(), bitfold.Format("int4-g64"), embeddings=bitfold.Format("nf4"))
    assert kinds(model)["embed"] == "nf4"


def test_embeddings_none_leaves_them_in_float():
    model = fold(Toy(), embeddings=None)
    assert kinds(model) == {"embed": "float", "layers.0": "nf4", "layers.1": "nf4", "head": "nf4"}


def test_skip_by_name_prefix_and_regex():
    assert kinds(fold(Toy(), skip=["head"]))["head"] == "float"
    assert kinds(fold(Toy(), skip=["layers"])) == {
        "embed": "int8-g64",
        "layers.0": "float",
        "layers.1": "float",
        "head": "nf4",
    }
    assert kinds(fold(Toy(), skip=[r"layers\.\d"]))["layers.1"] == "float"
    assert kinds(fold(Toy(), skip=["layers.1"]))["layers.0"] == "nf4"


def test_first_rule_wins_and_skip_goes_before():
    rules = {"layers.0": "int8-row", r"layers\..*": "int4-g64", "head": None, "embed": "nf4"}
    assert kinds(fold(Toy(), rules=rules)) == {
        "embed": "nf4",
        "layers.0": "int8-row",
        "layers.1": "int4-g64",
        "head": "float",
    }
    assert kinds(fold(Toy(), rules=rules, skip=["layers.0"]))["layers.0"] == "float"


@pytest.mark.parametrize(
    "arguments",
    [
        {"skip": ["layer"]},
        {"skip": ["layers.2"]},
        {"rules": {"nothing.*": "nf4"}},
        {"rules": {"norm": "nf4"}},
        {"skip": ["head("]},
    ],
)
def test_a_pattern_that_matches_nothing_is_named(arguments):
    model = Toy()
    before = state_of(model)
    pattern = next(iter(next(iter(arguments.values()))))
    with pytest.raises(ValueError, match=r"(skip|rules)") as error:
        fold(model, **arguments)
    assert repr(pattern) in str(error.value)
    assert_unchanged(model, before)


@pytest.mark.parametrize("wrong", [None, 4, b"nf4"])
def test_a_format_that_is_no_string_is_named(wrong):
    with pytest.raises(FormatError, match="format must be a string such as 'nf4'"):
        fold(Toy(), wrong)


@pytest.mark.parametrize("wrong", ["INT4-G64", "int4_g64", " int4-g64"])
def test_a_format_in_another_spelling_is_hinted_at(wrong):
    with pytest.raises(FormatError, match=r"; did you mean 'int4-g64'\?$"):
        fold(Toy(), rules={"head": wrong})
    with pytest.raises(FormatError, match=r"kmeans2$"):  # the last of the known codes
        fold(Toy(), "INT5")


def test_a_float64_beyond_float32_is_found_before_anything_changes():
    model = Toy().double()
    with torch.no_grad():
        model.head.weight[0, 0] = 1e300
    with pytest.raises(WeightError, match=r"head\.weight: 1 of"):
        fold(model)
    assert set(kinds(model).values()) == {"float"}


def test_wrong_argument_types_are_named():
    with pytest.raises(TypeError, match=r"write skip=\['head'\]"):
        fold(Toy(), skip="head")
    with pytest.raises(TypeError, match="rules must be a dict"):
        fold(Toy(), rules=["head"])
    with pytest.raises(TypeError, match="skip: expected a string, got 3"):
        fold(Toy(), skip=[3])
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        bitfold.quantize({"a": torch.zeros(3)})
    with pytest.raises(TypeError, match="the model itself is a Linear; fold it with"):
        fold(nn.Linear(3, 4))


def test_unknown_format_and_method_change_nothing():
    model = Toy()
    before = state_of(model)
    for arguments in ({"fmt": "nf5"}, {"embeddings": "int9"}, {"rules": {"head": "x"}}):
        with pytest.raises(FormatError):
            fold(model, **arguments)
    with pytest.raises(ValueError, match="method must be one of"):
        fold(model, method="best")
    assert_unchanged(model, before)


def test_method_is_used():
    a, b = (
        fold(copy.deepcopy(model := Toy()), "int4-g64", method="round"),
        fold(model, "int4-g64", method="search"),
    )
    assert not torch.equal(a.layers[0].dequantize(), b.layers[0].dequantize())


# Folding again, interrupts, memory


def test_again_with_the_same_formats_is_a_no_op():
    model = fold(Toy(tied=True))
    before, modules = state_of(model), list(model.modules())
    fold(model)
    assert_unchanged(model, before)
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))


@pytest.mark.parametrize(
    ("arguments", "name"),
    [({"fmt": "int4-g64"}, "layers.0"), ({"embeddings": "nf4"}, "embed"), ({"skip": ["head"]}, "head")],
)
def test_again_with_another_format_is_an_error(arguments, name):
    model = fold(Toy())
    before = state_of(model)
    with pytest.raises(FormatError, match=f"{name}: folded in .* already"):
        fold(model, **arguments)
    assert_unchanged(model, before)


@pytest.fixture
def interrupting():
    """A method that is interrupted at its n-th matrix."""
    count = {"left": 0}

    def interrupted(weight, fmt, statistics=None):
        if count["left"] == 0:
            raise KeyboardInterrupt
        count["left"] -= 1
        return methods.get("round")(weight, fmt)

    methods.register("interrupted")(interrupted)
    yield count
    del methods.base._METHODS["interrupted"]


@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_interrupt_leaves_whole_modules_and_a_second_run_finishes(interrupting, after):
    whole = fold(copy.deepcopy(model := Toy(tied=True).eval()), "nf4", method="round")
    interrupting["left"] = after
    if after < 3:
        with pytest.raises(KeyboardInterrupt):
            fold(model, "nf4", method="interrupted")
    else:
        fold(model, "nf4", method="interrupted")
    assert sum(kind != "float" for kind in kinds(model).values()) >= after
    assert (kinds(model)["embed"] == "float") == (kinds(model)["head"] == "float")
    assert torch.isfinite(model(INDICES)).all()
    bitfold.manifest.describe(model)
    fold(model, "nf4", method="round")
    assert torch.equal(model(INDICES), whole(INDICES))


def test_interrupt_in_the_middle_of_a_swap_does_not_part_tied_modules(monkeypatch):
    from bitfold.nn._places import Places

    class Interrupting(dict):
        times = 1

        def __setitem__(self, key, value):
            if isinstance(value, TiedHead) and Interrupting.times:
                Interrupting.times -= 1
                raise KeyboardInterrupt
            super().__setitem__(key, value)

    model = Toy(tied=True)
    model._modules = Interrupting(model._modules)
    with pytest.raises(KeyboardInterrupt):
        fold(model)
    assert isinstance(model.embed, QuantEmbedding)
    assert isinstance(model.head, TiedHead)
    assert model.head.source is model.embed
    assert Places(model)


def test_each_float_weight_is_freed_before_the_next_is_folded():
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(5)], nn.Embedding(64, 64))
    references = [weakref.ref(module.weight) for module in model]
    alive = []

    def watching(weight, fmt, statistics=None):
        alive.append(sum(reference() is not None for reference in references))
        return methods.get("round")(weight, fmt)

    methods.register("watching")(watching)
    gc.disable()  # reference counts alone must do
    try:
        fold(model, method="watching")
    finally:
        gc.enable()
        del methods.base._METHODS["watching"]
    assert alive == [6, 5, 4, 3, 2, 1]
    assert all(reference() is None for reference in references)


def test_progress_bar_shows_the_names(capsys, monkeypatch):
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    bitfold.quantize(Toy(), "nf4")
    assert "folding" in capsys.readouterr().err
    fold(Toy())
    assert capsys.readouterr().err == ""


def test_progress_bar_is_for_terminals_and_notebooks(monkeypatch):
    pytest.importorskip("tqdm")
    for module, shown in (("elsewhere", False), ("ipykernel.iostream", True)):
        stream = type("Stream", (io.StringIO,), {"__module__": module})()
        monkeypatch.setattr(sys, "stderr", stream)
        bitfold.quantize(Toy(), "nf4")
        assert ("folding" in stream.getvalue()) is shown


def test_without_tqdm(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    bitfold.quantize(Toy(), "nf4")
    assert capsys.readouterr().err == ""


# Tied and shared


def test_tied_weights_are_folded_once_and_stay_tied():
    model = fold(Toy(tied=True).eval())
    assert isinstance(model.head, TiedHead)
    assert model.head.source is model.embed
    assert str(model.embed.format) == "int8-g64"
    bitfold.set_accuracy(model, "fp32")
    x = torch.randn(3, 32)
    assert torch.allclose(model.head(x), x @ model.embed.dequantize().T + model.head.bias, atol=1e-5)
    assert [name for name in model.state_dict() if "head" in name] == ["head.bias"]
    twin = copy.deepcopy(model)
    assert twin.head.source is twin.embed
    assert torch.equal(twin(INDICES), model(INDICES))


def test_tied_by_equal_memory():
    model = Toy()
    model.head.weight = nn.Parameter(model.embed.weight.detach())  # another Parameter, same memory
    assert isinstance(fold(model).head, TiedHead)


def test_rules_for_tied_modules():
    assert kinds(fold(Toy(tied=True), rules={"head": "nf4"})) == {
        "embed": "nf4",
        "layers.0": "nf4",
        "layers.1": "nf4",
        "head": "nf4",
    }
    model = fold(Toy(tied=True), skip=["head"])
    assert model.head.weight is model.embed.weight
    assert kinds(fold(Toy(tied=True), embeddings=None))["head"] == "float"
    with pytest.raises(FormatError, match="tied modules need one format"):
        fold(Toy(tied=True), rules={"head": "nf4", "embed": "int8-row"})


def test_several_embeddings_of_one_table():
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Embedding(20, 16)
            self.first = nn.Embedding(20, 16)
            self.second = nn.Embedding(20, 16)
            self.first.weight = self.second.weight = self.shared.weight

        def forward(self, indices):
            return self.first(indices) + self.second(indices)

    model = fold(Encoder())
    assert isinstance(model.shared, QuantEmbedding)
    assert isinstance(model.first, TiedEmbedding)
    indices = torch.tensor([1, 2])
    assert torch.equal(model(indices), 2 * model.shared(indices))
    assert {name.partition(".")[0] for name in model.state_dict()} == {"shared"}


def test_a_shared_module_stays_shared():
    layer = nn.Linear(16, 16)
    model = fold(nn.ModuleDict({"a": layer, "b": nn.Sequential(layer), "c": nn.Linear(16, 16)}))
    assert model["a"] is model["b"][0]
    assert isinstance(model["a"], QuantLinear)
    one, other = nn.Linear(4, 4), nn.Linear(4, 4)
    model = fold(nn.ModuleDict({"a": one, "b": one, "c": other}), skip=["b"])
    assert kinds(model) == {"a": "float", "c": "nf4"}


def test_two_linears_with_one_weight():
    model = nn.ModuleDict({"a": nn.Linear(16, 16), "b": nn.Linear(16, 16)})
    model["b"].weight = model["a"].weight
    fold(model)
    assert isinstance(model["b"], TiedHead)
    assert model["b"].source is model["a"]


def test_a_weight_shared_with_something_else_stays_float():
    class Foreign(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.table = weight

    embed = nn.Embedding(16, 16)
    model = nn.ModuleDict({"embed": embed, "other": Foreign(embed.weight), "fc": nn.Linear(16, 16)})
    with pytest.raises(CoverageError, match=r"embed .*shares its weight with other\.table \(Foreign\)"):
        fold(model)
    fold(model, skip=["embed"])
    assert model["other"].table is model["embed"].weight
