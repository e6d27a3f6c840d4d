"""learned: blocks lose less than with gptq alone, the same each time, wherever a run was interrupted."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import bitfold
from bitfold import calibration, methods
from bitfold.calibration import Settings
from bitfold.calibration.distributed import Processes
from bitfold.methods import Statistics
from bitfold.methods.learned import Call, Training, refine

sys.path.insert(0, str(Path(__file__).parents[1] / "calibration"))
sys.path.insert(0, str(Path(__file__).parents[1] / "hf"))

SHORT = Training(iterations=40)


class Block(nn.Module):
    """Attention and a gated sum, with norms that are no matrices."""

    def __init__(self, size=32):
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.qkv, self.out = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.mlp = nn.Sequential(nn.Linear(size, 64), nn.GELU(), nn.Linear(64, size, bias=False))

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
        return x + self.mlp(self.norm(x))


class Sparse(Block):
    """One more matrix, which is only used where the input says so."""

    def __init__(self, size=32):
        super().__init__(size)
        self.two = nn.Linear(size, size)

    def forward(self, x):
        return super().forward(x if x.mean() < 100 else self.two(x))


def folded(block, fmt, x):
    """The block folded by gptq, what `refine` needs beside it, and the data."""
    target = [block(part).detach() for part in x]
    seen = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, a, n=name: seen.setdefault(n, []).append(a[0].detach()))
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
    ]
    for part in x:
        block(part)
    for hook in hooks:
        hook.remove()
    found = {}
    for name in [n for n, m in block.named_modules() if isinstance(m, nn.Linear)]:
        layer = block.get_submodule(name)
        rows = torch.cat([part.flatten(0, 1) for part in seen.get(name, [x[0]])])
        gathered = Statistics(rows.T @ rows / len(rows), len(rows), rows.mean(0), rows.abs().mean(0))
        solution = methods.fold_weight(layer.weight.detach(), bitfold.Format(fmt), "gptq", gathered)
        packed = bitfold.nn.QuantLinear.from_float(layer, bitfold.Format(fmt), solution=solution)
        parent, _, attribute = name.rpartition(".")
        setattr(block.get_submodule(parent), attribute, packed)
        found[name] = (packed, layer.weight.detach().clone())
    return found, [Call((part,), {}, y, None) for part, y in zip(x, target, strict=True)]


def data(count=4, rows=4, tokens=16, size=32, seed=4):
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=draw) / size**0.5
    return [torch.randn(rows, tokens, size, generator=draw) @ mix for _ in range(count)]


def error(block, calls):
    with torch.no_grad():
        found = [
            (block(*c.args) - c.target).square().mean() / c.target.square().mean().clamp_min(1e-20)
            for c in calls
        ]
    return float(torch.stack(found).mean())


@pytest.mark.parametrize(
    ("fmt", "share"), [("int2-g16", 0.95), ("int3-g32-fz", 0.95), ("int2-g16-dq", 0.95), ("int3-g32", 0.95)]
)
def test_a_block_loses_less_than_after_gptq(fmt, share):
    block = Block()
    found, calls = folded(block, fmt, data())
    before = error(block, calls)
    solutions, report = refine(block, found, calls, {"training": SHORT})
    assert report["block_error_before"] == pytest.approx(before, rel=1e-2)
    assert report["block_error"] < share * report["block_error_before"]
    assert error(block, calls) == pytest.approx(before, rel=1e-6)  # left as it is
    assert all(parameter.grad is None for parameter in block.parameters())
    assert all("forward" not in module.__dict__ for module in block.modules())
    assert solutions.keys() == found.keys()
    for name, solution in solutions.items():
        packed, weight = found[name]
        sizes = [tuple(size) for _, _, size in packed.format.buffers(tuple(weight.shape))]
        assert [tuple(t.shape) for t in solution.packed] == sizes
        packed.take(solution, packed.bias)
    # What is stored is what was measured.
    assert error(block, calls) == pytest.approx(report["block_error"], rel=1e-2)


def test_the_same_seed_means_the_same_bytes():
    block = Block()
    found, calls = folded(block, "int3-g32", data())
    results = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        results.append(refine(block, found, calls, {"training": SHORT}))
    same = [
        all(
            torch.equal(a, b)
            for name in found
            for a, b in zip(results[0][0][name].packed, other[0][name].packed, strict=True)
        )
        for other in results[1:]
    ]
    assert same == [True, False]


def test_never_worse_and_no_solution_where_nothing_was_gained():
    block = Block()
    found, calls = folded(block, "int4-g32", data())
    wild = Training(iterations=4, scale_rate=5.0)
    solutions, report = refine(block, found, calls, {"training": wild})
    assert report["block_error"] <= report["block_error_before"]
    assert (report["block_error"] == report["block_error_before"]) == (not solutions)
    solutions, report = refine(block, found, calls, {"training": Training(iterations=0)})
    assert not solutions
    assert report["block_error"] == report["block_error_before"]


@pytest.mark.parametrize("fmt", ["kmeans3-row", "int3-g16-outliers"])
def test_learned_codebooks_and_outliers_are_left_alone(fmt):
    block = Block()
    found, calls = folded(block, fmt, data(count=1))
    solutions, report = refine(block, found, calls, {"training": SHORT})
    assert not solutions
    assert report["block_error"] == report["block_error_before"]
    assert report["block_error"] == pytest.approx(error(block, calls), rel=1e-2)


def test_matrices_that_no_call_reaches():
    block = Sparse()
    found, calls = folded(block, "int2-g16", data())
    solutions, report = refine(block, found, calls, {"training": SHORT})
    assert report["block_error"] < report["block_error_before"]
    same = zip(solutions["two"].packed, found["two"][0].packed(), strict=True)
    assert all(torch.equal(a, b) for a, b in same)


def test_masks_and_calls_that_are_not_finite():
    block = Block()
    found, calls = folded(block, "int2-g16", data(count=3))
    calls[0].mask = torch.zeros(4, 16, dtype=torch.bool)
    calls[0].mask[:, :5] = True

    def trained(some):
        torch.manual_seed(3)
        return refine(block, found, some, {"training": Training(iterations=20)})

    expected = trained(calls[:1])
    calls[0].target[~calls[0].mask] += 1e6  # padding: whatever comes out there does not count
    calls[1].target[0, 0] = float("nan")
    calls[2].mask = torch.zeros(4, 16, dtype=torch.bool)
    solutions, report = trained(calls)
    assert report == expected[1]
    assert 0 < report["block_error"] <= report["block_error_before"] < 1
    for name, solution in solutions.items():
        same = zip(solution.packed, expected[0][name].packed, strict=True)
        assert all(torch.equal(a, b) for a, b in same)
    assert trained(calls[1:]) == ({}, {})
    assert trained([]) == ({}, {})


# ---- end to end ----


def fold_llama(model=None, name="llama", **others):
    import networks

    arguments = {
        "calibration": networks.data(name, count=24),
        "method": "learned",
        "options": {"training": Training(iterations=30)},
        "progress": False,
        **others,
    }
    return bitfold.quantize(model or networks.make(name), "int2-g32", **arguments)


@pytest.fixture(scope="module")
def whole():
    """A model folded in one go, and its report."""
    pytest.importorskip("transformers")
    model = fold_llama(checkpoint=False)
    return model, calibration.report(model)


BLOCKS = ["model.layers.0", "model.layers.1"]


@pytest.mark.filterwarnings("ignore:little calibration data")
def test_a_model_is_folded_everywhere_and_reports_its_blocks(whole):
    model, report = whole
    entries = bitfold.manifest.describe(model)["modules"]
    linear = [entry["format"] for entry in entries.values() if entry["kind"] == "linear"]
    assert linear == ["int2-g32"] * 15  # seven of each block, and the head
    assert not any(type(module) is nn.Linear for module in model.modules())
    assert not any(type(module) is nn.Embedding for module in model.modules())
    for name in BLOCKS:
        assert report[name]["method"] == "learned"
        assert report[name]["block_error"] <= report[name]["block_error_before"]
        assert report[name]["seconds"] > 0
        assert report[name]["peak_rss_bytes"] > 2**20
        line = report[f"{name}.mlp.up_proj"]
        if report[name]["block_error"] < report[name]["block_error_before"]:
            # The losses that gptq told of are not those of what is stored.
            assert line["refined"]
            assert line["block_error"] == report[name]["block_error"]
            assert {"loss_before", "measured_before"} <= set(line)
            assert not {"loss", "measured"} & set(line)
        else:
            assert "refined" not in line
    gained = [report[name]["block_error"] < report[name]["block_error_before"] for name in BLOCKS]
    assert any(gained)  # so that going on below has something to get wrong
    assert report["lm_head"]["method"] == "learned"  # no block, so gptq
    assert all(parameter.grad is None for parameter in model.parameters())


class Interrupted(Exception):
    pass


@pytest.mark.parametrize(
    ("where", "fresh"), [("solving", True), ("training", True), ("training", False), ("saving", False)]
)
@pytest.mark.filterwarnings("ignore:little calibration data")
def test_going_on_after_an_interrupt_gives_the_same_bytes(monkeypatch, tmp_path, whole, where, fresh):
    import networks

    from bitfold.calibration.checkpoint import Checkpoint

    expected = whole[0].state_dict()
    state, model = tmp_path / "state", networks.make("llama")
    calls = [0]

    def interrupt(kind, times, original):
        @functools.wraps(original)
        def run(*args, **kwargs):
            calls[0] += 1
            if calls[0] == times and where == kind:
                raise Interrupted
            return original(*args, **kwargs)

        return run

    with monkeypatch.context() as patch:
        if where == "solving":
            patch.setitem(methods.base._METHODS, "learned", interrupt("solving", 11, methods.get("learned")))
        elif where == "training":
            learned = sys.modules["bitfold.methods.learned"]
            patch.setattr(learned, "_add_gradients", interrupt("training", 40, learned._add_gradients))
        else:
            patch.setattr(Checkpoint, "save", interrupt("saving", 2, Checkpoint.save))
        with pytest.raises(Interrupted):
            fold_llama(model, checkpoint=state)
    assert sorted(file.name for file in state.glob("stage-*")) == ["stage-0000.safetensors"]
    assert torch.isfinite(networks.outputs(model, "llama")).all()
    torch.manual_seed(1234)  # the caller's generator does not matter
    model = fold_llama(None if fresh else model, checkpoint=state)
    assert model.state_dict().keys() == expected.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    report = calibration.report(model)
    assert all(report[name]["block_error"] == whole[1][name]["block_error"] for name in BLOCKS)
    assert not state.exists()


@pytest.mark.filterwarnings("ignore:little calibration data")
def test_experts_that_few_tokens_reach():
    pytest.importorskip("transformers")
    model = fold_llama(name="moe", options={"training": Training(iterations=20)})
    lines = calibration.report(model).lines
    blocks = {line["name"]: line for line in lines if "shape" not in line}
    assert list(blocks) == ["layers.0", "layers.1"]
    gained = [name for name, line in blocks.items() if line["block_error"] < line["block_error_before"]]
    assert gained
    experts = [line for line in lines if ".experts." in line["name"]]
    assert any("blended" in line or "fallback" in line for line in experts)
    for line in experts:
        assert line.get("refined", False) == (line["name"][:8] in gained)


def test_more_processes_and_no_float_stream_are_refused(monkeypatch):
    pytest.importorskip("transformers")
    import networks

    model = networks.make("llama")
    with pytest.raises(ValueError, match="float_stream cannot be False"):
        fold_llama(model, settings=Settings(float_stream=False))

    def two(self, device):
        self._device, self._made, self.rank, self.size = device, False, 0, 2
        self._parted = True  # there is no other one

    monkeypatch.setattr(Processes, "__init__", two)
    with pytest.raises(ValueError, match="'learned' trains blocks in one process; run it without torchrun"):
        fold_llama(model)
    assert not any(isinstance(module, bitfold.nn.PackedModule) for module in model.modules())


@pytest.mark.filterwarnings("ignore:little calibration data")
def test_blocks_that_are_matrices_themselves():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)).eval()
    data = [torch.randn(40, 16) for _ in range(2)]
    bitfold.quantize(
        model,
        "int2-g16",
        calibration=data,
        method="learned",
        options={"training": SHORT},
        checkpoint=False,
        progress=False,
    )
    assert all(isinstance(model[i], bitfold.nn.PackedModule) for i in (0, 2))
    blocks = [line["name"] for line in calibration.report(model).lines if "shape" not in line]
    assert blocks == ["0", "2"]
