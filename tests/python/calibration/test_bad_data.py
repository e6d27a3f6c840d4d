"""Data that is missing, wrong, thin or broken, and models that break."""

from __future__ import annotations

import networks
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bitfold
from bitfold import calibration
from bitfold.calibration import CalibrationWarning, Settings

LLAMA_IDS = [[1, 2, 3, 4] * 5] * 20


def test_a_calibrated_method_without_data_says_how_to_give_it():
    with pytest.raises(ValueError, match=r"'gptq' needs data: give calibration=\[…\]"):
        bitfold.quantize(networks.make("perceptron"), "int4-g16", method="gptq")


def test_data_for_a_method_that_has_no_use_for_it():
    with pytest.raises(ValueError, match="'search' uses no calibration data"):
        bitfold.quantize(networks.make("perceptron"), "nf4", method="search", calibration=[[1]])


@pytest.mark.parametrize("empty", [[], (), iter([]), [[]], [[], []]])
def test_no_data_at_all(empty):
    model = networks.make("moe")
    with pytest.raises(ValueError, match="calibration: the data is empty"):
        networks.quantize(model, "moe", calibration=empty)
    assert type(model.head) is nn.Linear


def test_ids_of_another_vocabulary():
    with pytest.raises(ValueError, match=r"batch 0: token id 99 is outside .* vocabulary of 99"):
        networks.quantize(networks.make("llama"), "llama", calibration=[[1, 2, 99]])
    with pytest.raises(ValueError, match="token id -100"):
        networks.quantize(networks.make("llama"), "llama", calibration=[[1, -100, 3]])


def test_texts_without_a_tokenizer():
    with pytest.raises(ValueError, match="does not say where its tokenizer is; give tokenizer="):
        networks.quantize(networks.make("llama"), "llama", calibration=["some text"])
    with pytest.raises(ValueError, match=r"no tokenizer could be loaded from '/nowhere'"):
        networks.quantize(networks.make("llama"), "llama", calibration=["text"], tokenizer="/nowhere")


def test_labels_beside_the_inputs():
    model = networks.make("perceptron")
    x, label = torch.randn(512, 48), torch.zeros(512, dtype=torch.long)
    loader = DataLoader(TensorDataset(x, label), batch_size=256)
    expected = (
        r"calibration batch 0 holds \(float32 \[256, 48\], int64 \[256\]\), but Sequential.forward takes "
        r"\(input\): too many positional arguments; .* give the inputs alone: \[x for x, label in pairs\]"
    )
    with pytest.raises(ValueError, match=expected):
        networks.quantize(model, "perceptron", calibration=loader)
    with pytest.raises(ValueError, match=r"batch 1 holds \(input=.*, label=.*'label'; give what it takes"):
        networks.quantize(model, "perceptron", calibration=[x, {"input": x, "label": label}])
    assert type(model[0]) is nn.Linear
    networks.quantize(model, "perceptron", calibration=[x for x, _ in loader])

    model = networks.make("perceptron")
    model.register_forward_pre_hook(lambda module, args: args[:1])  # then forward does not say what is taken
    networks.quantize(model, "perceptron", calibration=loader)


def test_an_item_of_no_known_kind_is_named():
    with pytest.raises(ValueError, match=r"item 1: expected a text, token ids, .* got NoneType"):
        networks.quantize(networks.make("llama"), "llama", calibration=[[1, 2], None])
    with pytest.raises(ValueError, match="expected an iterable of texts, ids or dicts, got int"):
        networks.quantize(networks.make("llama"), "llama", calibration=3)
    for single in ([5], [torch.tensor(5)], [[1, 2], 5]):
        with pytest.raises(
            ValueError, match=rf"item {len(single) - 1}: .*, got the single number 5; for one"
        ):
            networks.quantize(networks.make("llama"), "llama", calibration=single)


def test_few_tokens_are_warned_of_once_with_the_worst():
    model = networks.make("llama")
    with pytest.warns(CalibrationWarning) as caught:
        networks.quantize(model, "llama", calibration=LLAMA_IDS[:5])
    (warning,) = caught
    assert "mlp.down_proj saw 100 for 96 inputs, effective rank" in str(warning.message)


def test_rows_that_are_not_finite_are_counted_dropped_and_named():
    model, clean = networks.make("perceptron"), networks.make("perceptron")
    data = networks.data("perceptron")
    broken = [batch.clone() for batch in data]
    broken[0][3, 5], broken[1][7, 0] = float("nan"), float("inf")
    kept = [batch.clone() for batch in data]
    kept[0] = torch.cat([kept[0][:3], kept[0][4:]])
    kept[1] = torch.cat([kept[1][:7], kept[1][8:]])
    with pytest.warns(CalibrationWarning, match=r"not finite .* inputs of 0 \(2 rows\), 2 \("):
        networks.quantize(model, "perceptron", calibration=broken)
    assert calibration.report(model)["0"]["dropped_rows"] == 2
    assert calibration.report(model)["0"]["tokens"] == 32 * len(data) - 2
    networks.quantize(clean, "perceptron", calibration=kept)
    assert torch.equal(model[0].weight, clean[0].weight)


def test_only_rows_that_are_not_finite_fall_back_to_search():
    model = networks.make("perceptron")
    data = [torch.full((300, 48), float("nan"))]
    with pytest.warns(CalibrationWarning):
        networks.quantize(model, "perceptron", calibration=data)
    line = calibration.report(model)["0"]
    assert line["method"] == "search"
    assert line["fallback"] == "0 tokens reached it, fewer than 1"


class Sulking(nn.Module):
    """A block that raises at its n-th call."""

    def __init__(self, inner, calls):
        super().__init__()
        self.inner, self.left = inner, calls

    def forward(self, x):
        self.left -= 1
        if self.left == 0:
            raise RuntimeError("the block is broken")
        return self.inner(x)


def test_a_block_that_raises_leaves_whole_modules_and_can_go_on(tmp_path):
    whole = networks.quantize(networks.make("perceptron"), "perceptron")
    inputs = torch.randn(5, 48)
    for calls in (1, 5, 15, 25):
        model = networks.make("perceptron")
        model[2] = Sulking(model[2], calls)
        with pytest.raises(RuntimeError, match="the block is broken"):
            networks.quantize(model, "perceptron", checkpoint=tmp_path / str(calls))
        assert all("forward" not in module.__dict__ for module in model.modules())
        assert all(not module._forward_pre_hooks for module in model.modules())
        model[2].left = -1
        networks.quantize(model, "perceptron", checkpoint=tmp_path / str(calls))
        assert torch.equal(model(inputs), whole(inputs))


def test_matrices_that_no_data_reaches_are_folded_and_reported():
    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x):
            return self.used(x)

    model = Partly()
    bitfold.quantize(model, "int4-g16", calibration=[torch.randn(200, 32)], progress=False)
    assert calibration.report(model)["unused"]["fallback"] == "the data does not reach it"
    assert calibration.report(model)["used"]["method"] == "gptq"


@pytest.mark.filterwarnings("ignore:little calibration data")
def test_experts_that_few_tokens_reach():
    model = networks.make("moe")
    with torch.no_grad():
        model.layers[0].moe.gate.weight[3] = -model.layers[0].moe.gate.weight[:3].sum(0)
    settings = Settings(expert_floor=40, expert_prior=16)
    networks.quantize(model, "moe", calibration=networks.data("moe", count=14), settings=settings)
    lines = [line for line in calibration.report(model).lines if ".experts." in line["name"]]
    assert len(lines) == 24
    for line in lines:
        inputs = line["shape"][1]
        if line["tokens"] < 40:
            assert line["method"] == "search"
            assert "fewer than 40" in line["fallback"]
        elif line["tokens"] < 4 * inputs:
            assert line["blended"] == round(16 / (16 + line["tokens"]), 4)
        else:
            assert "blended" not in line
    assert any("blended" in line for line in lines)
    assert any("fallback" in line for line in lines)


def test_a_model_on_meta_has_nothing_to_calibrate():
    with torch.device("meta"):
        model = networks.perceptron()
    with pytest.raises(ValueError, match="no values to calibrate"):
        networks.quantize(model, "perceptron")


@pytest.mark.parametrize(
    ("field", "value"), [("batch_size", 0), ("expert_floor", -3), ("expert_prior", -5), ("max_memory", 0)]
)
def test_settings_are_checked(field, value):
    with pytest.raises(ValueError, match=f"Settings: {field} must be at"):
        Settings(**{field: value})


def test_masks_that_hide_all_are_no_data():
    ids = torch.arange(20)[None]
    batch = {"input_ids": ids, "attention_mask": torch.zeros_like(ids)}
    model = networks.make("llama")
    with pytest.raises(ValueError, match=r"data is empty \(no token in any item, or all of them masked\)"):
        networks.quantize(model, "llama", calibration=[batch])
    assert type(model.lm_head) is nn.Linear


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
@pytest.mark.filterwarnings("ignore:little calibration data")
def test_padding_is_left_out_by_masks_of_four_dimensions(kind):
    ids = torch.randint(0, 99, (2, 16), generator=torch.Generator().manual_seed(1))
    seen = torch.ones(2, 16, dtype=torch.bool)
    seen[0, 9:], seen[1, 12:] = False, False
    mask = seen[:, None, None, :] & torch.ones(16, 16, dtype=torch.bool).tril()
    if kind is torch.float32:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    model = networks.make("llama")
    networks.quantize(model, "llama", calibration=[{"input_ids": ids, "attention_mask": mask}])
    line = calibration.report(model)["model.layers.0.mlp.up_proj"]
    assert line["tokens"] == 21
    assert "padding_counted" not in line


@pytest.mark.filterwarnings("ignore:little calibration data")
def test_a_mask_of_another_kind_is_reported():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(32, 32)

        def forward(self, x, attention_mask=None):
            return self.inner(x)

    model = Masked()
    batch = {"x": torch.randn(4, 8, 32), "attention_mask": {"causal": torch.ones(8, 8)}}
    bitfold.quantize(model, "int4-g16", calibration=[batch], progress=False, checkpoint=False)
    assert calibration.report(model)["inner"]["padding_counted"]


@pytest.mark.parametrize("method", ["gptq", "learned"])
@pytest.mark.filterwarnings("ignore:little calibration data")
def test_inside_of_inference_mode(method):
    from bitfold.methods.learned import Training

    options = {"training": Training(iterations=2)} if method == "learned" else {}
    model, other = networks.make("perceptron"), networks.make("perceptron")
    networks.quantize(other, "perceptron", method=method, options=options)
    with torch.inference_mode():
        data = [item.clone() for item in networks.data("perceptron")]
        networks.quantize(model, "perceptron", method=method, options=options, calibration=data)
        made = nn.Sequential(nn.Linear(48, 16))
        with pytest.raises(ValueError, match=r"0.weight was made under torch.inference_mode\(\), so"):
            networks.quantize(made, "perceptron")
    assert all(
        torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m in (model, other)), strict=True)
    )


@pytest.mark.parametrize(("field", "value"), [("iterations", -1), ("iterations", 2.5), ("batches", 0)])
def test_training_is_checked(field, value):
    from bitfold.methods.learned import Training

    with pytest.raises(ValueError, match=f"Training: {field} must be a whole number of at least"):
        Training(**{field: value})
