"""awq: folds of a whole model, scales that pay, clipping that pays, and going on after an interrupt."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import bitfold
from bitfold import Format, calibration, methods, ops
from bitfold.methods import Statistics

QUIET = pytest.mark.filterwarnings("ignore:little calibration data")


class Block(nn.Module):
    def __init__(self, size=64):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(size), nn.Linear(size, 96), nn.Linear(96, size)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Model(nn.Module):
    """Two blocks whose norms make some channels thirty times as large as the rest, as large models do."""

    def __init__(self, size=64):
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(50, size)
        self.blocks = nn.ModuleList(Block(size) for _ in range(2))
        with torch.no_grad():
            for block in self.blocks:
                block.norm.weight[::13] = 30.0
                block.up.weight[:, ::13] *= 0.1
        self.eval()

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def data(seed):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 50, (4, 32), generator=draw) for _ in range(6)]


def folded(method, model=None, fmt="int3-g32", **others):
    model = Model() if model is None else model
    if methods.is_calibrated(method):
        others = {"calibration": data(1), "checkpoint": False, **others}
    return bitfold.quantize(model, fmt, method=method, embeddings=None, progress=False, **others)


@torch.no_grad()
def error(model):
    ids = torch.cat(data(2))
    expected = Model()(ids)
    return float((model(ids) - expected).norm() / expected.norm())


def statistics_of(x):
    return Statistics(x.t() @ x / len(x), len(x), x.mean(0), x.abs().mean(0))


@QUIET
def test_outlying_channels_keep_their_precision():
    model = folded("awq")
    assert error(model) < 0.8 * error(folded("search"))
    lines = {line["name"]: line for line in calibration.report(model).lines}
    for i in range(2):
        scale = lines[f"blocks.{i}.up"]["scale"]
        assert scale["source"] == "norm"
        assert scale["after"] < scale["before"]
        assert lines[f"blocks.{i}.down"]["scale"]["source"] == "up"
        assert not torch.equal(model.blocks[i].norm.weight, Model().blocks[i].norm.weight)


@QUIET
def test_error_feedback_on_top(monkeypatch):
    seen = []

    def feedback(weight, fmt, statistics=None, *, damping=None):
        seen.append((weight, statistics, {"damping": damping}))
        return methods.get("search")(weight, fmt)

    monkeypatch.setitem(methods.base._METHODS, "gptq", feedback)
    folded("awq+gptq", options={"damping": 0.02})
    assert [options for _, _, options in seen] == [{"damping": 0.02}] * 4
    up, plain = seen[0][0], Model().blocks[0].up.weight.detach()
    ratio = (
        up / plain
    )  # columns by what the norm was divided by, rows divided by what `down` was multiplied by
    columns = ratio[0] / ratio[0, 1]
    assert torch.allclose(ratio, ratio[:, 1:2] * columns, rtol=1e-3)
    assert columns[::13].min() > 3 * columns[1::13].max()
    with torch.no_grad():
        x = Model().blocks[0].norm(Model().embed(torch.cat(data(1)))).reshape(-1, 64)
    undone = seen[0][1].hessian.diagonal() * columns**2 / (x * x).mean(0)  # its input is divided by the same
    assert torch.allclose(undone, undone[1].expand(64), rtol=1e-3)


@QUIET
@pytest.mark.parametrize("same_process", [True, False])
def test_an_interrupted_run_goes_on_to_the_same_bytes(monkeypatch, tmp_path, same_process):
    whole = folded("awq").state_dict()
    plain, calls = methods.get("awq"), []

    def failing(weight, fmt, statistics=None, **options):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return plain(weight, fmt, statistics, **options)

    monkeypatch.setitem(methods.base._METHODS, "awq", failing)
    model = Model()
    with pytest.raises(KeyboardInterrupt):
        folded("awq", model, checkpoint=tmp_path / "state")
    assert type(model.blocks[0].up) is not nn.Linear
    fresh = Model().blocks[1].state_dict()  # the block in which it came is as it was
    assert all(torch.equal(value, fresh[name]) for name, value in model.blocks[1].state_dict().items())
    monkeypatch.setitem(methods.base._METHODS, "awq", plain)
    model = model if same_process else Model()
    again = folded("awq", model, checkpoint=tmp_path / "state").state_dict()
    assert list(again) == list(whole)
    assert all(torch.equal(value, whole[name]) for name, value in again.items())
    assert not (tmp_path / "state").exists()


def test_it_cannot_do_without_data():
    with pytest.raises(ValueError, match="needs data"):
        bitfold.quantize(Model(), "int4-g32", method="awq")


@pytest.mark.parametrize("fmt", ["int3-g32", "nf4", "int4-row-outliers", "kmeans4-row", "int8-tensor", "fp4"])
def test_codes_of_one_matrix(fmt):
    fmt, shape = Format(fmt), (40, 70)
    x = torch.randn(500, 70) @ (torch.eye(70) + 0.2 * torch.randn(70, 70))
    weight = torch.distributions.Laplace(0.0, 1.0).sample(shape)
    statistics = statistics_of(x)

    def loss(packed):
        error = ops.dequantize(packed, fmt, shape) - weight
        return float(((error @ statistics.hessian) * error).sum())

    solution = methods.fold_weight(weight, fmt, "awq", statistics)
    stored = [(tuple(t.shape), t.dtype) for t in solution.packed]
    assert stored == [(tuple(t.shape), t.dtype) for t in ops.quantize(weight, fmt)]
    assert solution.report["loss"] == pytest.approx(loss(solution.packed), rel=1e-5)
    if fmt.grouping == "tensor" or fmt.code.startswith("kmeans"):  # nothing to clip
        assert solution.report["clipped_groups"] == 0
        assert solution.report["loss"] == pytest.approx(loss(ops.quantize(weight, fmt)), rel=1e-5)
    else:
        assert solution.report["clipped_groups"] > 0
        assert solution.report["loss"] < loss(ops.quantize(weight, fmt))


@QUIET
def test_half_precision_models_stay_what_they_are():
    model = Model().bfloat16()
    before = copy.deepcopy(model)
    ids = torch.cat(data(2))
    folded("awq", model, "int8-row")
    with torch.no_grad():
        assert model.blocks[0].norm.weight.dtype is torch.bfloat16
        difference = (model(ids) - before(ids)).float().norm() / before(ids).float().norm()
    assert difference < 0.02


@QUIET
@pytest.mark.parametrize("method", ["awq", "awq+gptq"])
def test_what_a_finished_block_has_taught_survives_an_interrupt(monkeypatch, tmp_path, method):
    """In the second block a channel is dead: its fold is known from the first one only."""
    from bitfold.calibration.checkpoint import Checkpoint

    def model():
        made = Model()
        with torch.no_grad():
            made.blocks[1].up.weight[3], made.blocks[1].up.bias[3] = 0, -1
        return made

    def fold(**others):
        made, settings = model(), {"calibration": data(0), "progress": False, **others}
        bitfold.quantize(made, "int3-g32", method=method, **settings)
        return made

    whole = fold(checkpoint=False)
    save = Checkpoint.save

    def dying(self, number, *finished):
        save(self, number, *finished)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "save", dying)
        with pytest.raises(KeyboardInterrupt):
            fold(checkpoint=tmp_path / "state")
    resumed = fold(checkpoint=tmp_path / "state")
    assert (
        calibration.report(whole)["blocks.1.down"]["scale"]
        == calibration.report(resumed)["blocks.1.down"]["scale"]
    )
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
