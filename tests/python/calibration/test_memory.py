"""What a run will take is known before it starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import networks
import pytest
import torch
from torch import nn

from bitfold import calibration
from bitfold.calibration import MemoryLimitError, Settings, memory

# Predicted and measured growth of the process, of a model large enough that the rest does not matter.
SCRIPT = """
import json, sys
import torch
from torch import nn
torch.set_num_threads(1)
import bitfold
from bitfold.methods.learned import Training

class Block(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.up, self.down = nn.Linear(size, 3 * size), nn.Linear(3 * size, size)
    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))

def resident(what):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(what))

class Words(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.table, self.blocks = nn.Embedding(100000, size), nn.Sequential(Block(size), Block(size))
    def forward(self, x):
        return self.blocks(self.table(x))

size, rows, kind = 480, 1024, sys.argv[1]
if kind == "cross":
    size, rows = 640, 150
if kind == "awq":
    size, rows = 640, 256
method = kind if kind in ("awq", "learned") else "gptq"
options = {"learned": {"training": Training(iterations=2, evaluations=1), "sweeps": 1}}
torch.manual_seed(0)
model = nn.Sequential(*[Block(size) for _ in range(3)]) if kind != "embedding" else Words(size := 256)
data = [torch.randn(rows, size) for _ in range(20 if kind == "streams" else 4)]
if kind == "embedding":
    data = [torch.randint(0, 1000, (4, 64)) for _ in range(4)]
fmt = {"row": "int4-row", "outliers": "int4-g64-outliers"}.get(kind, "int4-g64")
settings = bitfold.calibration.Settings(float_stream=kind not in ("streams", "awq"))
if kind in ("streams", "cross"):
    options["gptq"] = {"sweeps": 1}
bitfold.quantize(nn.Sequential(Block(32), Block(32)), "int4-g64", calibration=[torch.randn(200, 32)],
                 method=method, options=options.get(method), settings=settings, checkpoint=False,
                 progress=False)  # what torch and Python load on first use
before = resident("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # forget the peak so far
bitfold.quantize(model, fmt, calibration=data, method=method, settings=settings,
                 options=options.get(method), progress=False)
measured = resident("VmHWM") - before
print(json.dumps([bitfold.calibration.report(model).predicted_bytes, measured]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["streams", "cross", "awq", "learned", "row", "outliers", "embedding"])
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's peak")
def test_prediction_is_within_fifteen_percent_of_the_peak(kind, tmp_path):
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back at once
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, kind], capture_output=True, text=True, check=True, env=environment
    )
    predicted, measured = json.loads(done.stdout.splitlines()[-1])
    assert measured > 25e6
    assert predicted == pytest.approx(measured, rel=0.15)


def test_a_run_that_will_not_fit_is_refused_with_numbers():
    model = networks.make("perceptron")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(
        MemoryLimitError, match=r"would add 0 MiB \(.*outputs of blocks.*allowed by max_memory"
    ):
        networks.quantize(model, "perceptron", settings=Settings(max_memory=1000))
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert type(model[0]) is nn.Linear


def test_processes_of_one_machine_share_what_is_available(monkeypatch):
    monkeypatch.setattr(memory, "_of_machine", lambda: [1000])
    monkeypatch.setattr(memory, "_of_group", lambda: [900])
    assert memory.available_bytes() == 900
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert memory.available_bytes() == 300


def test_what_is_available_is_known_here():
    if not Path("/proc/meminfo").exists():
        pytest.skip("no /proc/meminfo")
    available = memory.available_bytes()
    assert available is not None
    assert 2**20 < available < 2**50


def test_live_bytes_are_those_of_tensors_alive_at_once():
    with memory.LiveBytes() as live:
        x = torch.zeros(1000, dtype=torch.float64)
        y = x + 1
        del x
        view = y.view(10, 100)
        z = view * 2
    assert live.peak == 16000
    assert live.live == 16000
    del y, view, z
    assert live.live == 0


@pytest.mark.filterwarnings("ignore:little calibration data")
def test_outputs_of_all_blocks_are_kept_only_where_they_are_read():
    for name, kept in (("unet", True), ("perceptron", False)):
        model = networks.make(name)
        networks.quantize(model, name)
        notes = calibration.report(model).notes
        assert any("outputs of all were kept" in note for note in notes) == kept
