"""Statistics against their formulas; masks; which structure is found where."""

from __future__ import annotations

import networks
import pytest
import torch
from torch import nn

from bitfold.calibration import Settings
from bitfold.calibration.batches import as_batches
from bitfold.calibration.blocks import find_layout
from bitfold.calibration.gathering import gather
from bitfold.calibration.sets import find_sets
from bitfold.calibration.statistics import InputStatistics, mean_of
from bitfold.calibration.streams import Stream, needs_all_outputs
from bitfold.outputs import Batch, row_mask

CPU = torch.device("cpu")


def of(x, **arguments):
    part = InputStatistics(x.shape[-1], CPU, **arguments)
    part.add(x)
    part.complete()
    return part


def test_any_split_in_batches_gives_the_formulas():
    x, other = torch.randn(70, 20), torch.randn(70, 20)
    part = InputStatistics(20, CPU, cross=True)
    for start, stop in ((0, 1), (1, 40), (40, 70)):
        part.add(x[start:stop], x_float=other[start:stop])
    part.complete()
    found = part.finish()
    assert found.tokens == 70
    torch.testing.assert_close(found.hessian, x.T @ x / 70)
    torch.testing.assert_close(found.cross, (other - x).T @ x / 70)
    torch.testing.assert_close(found.mean, x.mean(0))
    torch.testing.assert_close(found.mean_abs, x.abs().mean(0))


def test_masked_and_broken_rows_do_not_count():
    x = torch.randn(2, 3, 8, dtype=torch.bfloat16)
    x[0, 1] = float("nan")
    x[1, 2] = float("inf")
    part = InputStatistics(8, CPU)
    part.add(x, torch.tensor([[True, True, False], [True, True, False]]))
    part.complete()
    rows = torch.stack([x[0, 0], x[1, 0], x[1, 1]]).float()
    assert (part.tokens, part.dropped) == (3, 1)
    torch.testing.assert_close(part.hessian, rows.T @ rows / 3)


def test_masks_fit_by_shape():
    mask = torch.tensor([[True, True, False], [True, False, False]])
    flat = mask.reshape(-1)
    assert torch.equal(row_mask(torch.zeros(2, 3, 5), [mask]), flat)
    assert torch.equal(row_mask(torch.zeros(6, 5), [mask]), flat)
    assert torch.equal(row_mask(torch.zeros(3, 2, 5), [mask]), mask.t().reshape(-1))
    assert row_mask(torch.zeros(2, 5), [mask]) is None
    both = row_mask(torch.zeros(2, 3, 5), [mask, ~mask])
    assert not both.any()


def test_blending_is_a_weighted_mean():
    a, b = of(torch.randn(50, 6)), of(torch.randn(10, 6))
    mean = mean_of([a, b])
    torch.testing.assert_close(mean.hessian, (50 * a.hessian + 10 * b.hessian) / 60)
    expected = (10 * b.hessian + 30 * mean.hessian) / 40
    assert b.blend(mean, 30) == 0.75
    torch.testing.assert_close(b.hessian, expected)


def test_effective_rank():
    assert of(torch.eye(12) * 3).effective_rank() == pytest.approx(12)
    assert of(torch.ones(5, 4)).effective_rank() == pytest.approx(1)


def names_of(model):
    return [name for name, module in model.named_modules() if type(module) is nn.Linear]


def layout_of(name):
    model = networks.make(name)
    batch = as_batches(networks.data(name), model, None, Settings())[0]
    with torch.no_grad():
        return model, find_layout(model, names_of(model), batch), batch


@pytest.mark.parametrize(
    ("name", "blocks", "outside"),
    [
        ("moe", ["layers.0", "layers.1"], [("head",)]),
        ("unet", ["blocks.0", "blocks.1", "blocks.2", "blocks.3"], []),
        ("towers", ["towers.0.0", "towers.0.2", "towers.1.0", "towers.1.2"], []),
        ("perceptron", ["0", "2", "4", "6"], []),
    ],
)
def test_stacks_are_found(name, blocks, outside):
    model, layout, batch = layout_of(name)
    assert [stage.block for stage in layout.stages if stage.block] == blocks
    assert [stage.matrices for stage in layout.stages if not stage.block] == outside
    assert needs_all_outputs(model, layout, batch) is (name == "unet")


def test_stacks_of_transformers_models():
    pytest.importorskip("transformers")
    _, layout, _ = layout_of("t5")
    assert [stack.name for stack in layout.stacks] == ["encoder.block", "decoder.block"]
    _, layout, _ = layout_of("bert-masked")
    assert layout.stages[-1].matrices == ("cls.predictions.transform.dense", "cls.predictions.decoder")


def test_a_body_between_an_input_and_an_output_layer():
    body = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3)])
    model = nn.Sequential(nn.Linear(4, 8), body, nn.Linear(8, 2))
    layout = find_layout(model, names_of(model), Batch(args=(torch.randn(5, 4),)))
    assert [stage.name for stage in layout.stages] == [
        "0 (outside of blocks)",
        "1.0",
        "1.1",
        "1.2",
        "2 (outside of blocks)",
    ]


@torch.no_grad()
def test_experts_form_sets_by_role_and_padding_never_reaches_them():
    model, layout, batch = layout_of("moe")
    stage = layout.stages[0]
    sets = find_sets(model, stage, batch, {}, stage.matrices)
    experts = [part for part in sets if any(part.roles)]
    assert [len(part.groups) for part in experts] == [4, 4]
    assert experts[0].groups[2] == ("layers.0.moe.experts.2.w1", "layers.0.moe.experts.2.w3")
    assert [part.groups for part in sets[:2]] == [(("layers.0.mix",),), (("layers.0.moe.gate",),)]
    batches = as_batches(networks.data("moe"), model, None, Settings())
    total = sum(int(part.masks[0].sum()) for part in batches)
    assert total < sum(part.masks[0].numel() for part in batches)
    for part in sets:
        gathered = gather(model, part, batches, Stream(model, layout.stacks, len(batches)))
        choices = 2 if any(part.roles) else 1  # each token goes to two experts
        assert sum(found.tokens for found in gathered) == choices * total
        assert not any(found.unmasked for found in gathered)
