"""The registry of methods, and what a method returns."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bitfold import Format, methods
from bitfold.methods import Solution
from bitfold.nn import QuantEmbedding, QuantLinear


@pytest.fixture
def calibrated():
    """A method that cannot do without statistics."""

    def needs_data(weight, fmt, statistics=None, **options):
        return methods.get("round")(weight, fmt)

    methods.register("needs-data", calibrated=True)(needs_data)
    yield "needs-data"
    del methods.base._METHODS["needs-data"]
    methods.base._CALIBRATED.discard("needs-data")


def test_data_free_methods_return_a_solution():
    weight, fmt = torch.randn(8, 64), Format("int4-g64")
    for name in ("round", "search", "minmax"):
        solution = methods.fold_weight(weight, fmt, name)
        assert [tuple(t.shape) for t in solution.packed] == [size for _, _, size in fmt.buffers((8, 64))]
        assert solution.report == {}
        assert solution.bias_shift is None
        assert not methods.is_calibrated(name)
    assert not methods.is_calibrated(None)


def test_a_calibrated_method_without_statistics_says_what_to_give(calibrated):
    assert methods.is_calibrated(calibrated)
    with pytest.raises(ValueError, match=r"needs calibration data: bitfold.quantize\(.*calibration="):
        methods.fold_weight(torch.randn(8, 64), Format("nf4"), calibrated)
    with pytest.raises(ValueError, match="needs calibration data"):
        QuantLinear.from_float(nn.Linear(64, 8), "nf4", calibrated)


def test_unknown_names_list_what_there_is():
    with pytest.raises(ValueError, match=r"method must be one of .*round.*search"):
        methods.is_calibrated("best")


def test_a_solution_made_elsewhere_becomes_a_module():
    layer, fmt = nn.Linear(64, 8), Format("int4-g64")
    before = layer.bias.detach().clone()
    solution = methods.fold_weight(layer.weight.detach(), fmt, "round")
    solution.bias_shift = torch.full((8,), 0.5)
    new = QuantLinear.from_float(layer, fmt, solution=solution)
    assert torch.equal(new.weight, solution.packed[0])
    assert torch.equal(new.bias, before + 0.5)
    assert torch.equal(layer.bias, before)
    assert QuantLinear.from_float(nn.Linear(64, 8, bias=False), fmt, solution=solution).bias is None
    table = QuantEmbedding.from_float(nn.Embedding(8, 64), fmt, solution=Solution(solution.packed))
    assert table.weight is solution.packed[0]
