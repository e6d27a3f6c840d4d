"""Two gloo processes give what one gives, up to the order of additions."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import networks
import pytest
import torch

import bitfold

HERE = Path(__file__).parent

# What every rank runs. Rank 1 kills itself at its n-th matrix, where asked to.
SCRIPT = """
import json, os, signal, sys
sys.path[:0] = [{here!r}, {hf!r}]
import torch
torch.set_num_threads(1)
import bitfold, networks
from bitfold import calibration, methods
gptq = methods.get("gptq")
directory, after = sys.argv[1], int(sys.argv[2])
rank = int(os.environ["RANK"])
calls = [0]

def counting(weight, fmt, statistics=None, **options):
    if rank == 1 and calls[0] == after:
        os.kill(os.getpid(), signal.SIGKILL)
    calls[0] += 1
    return gptq(weight, fmt, statistics, **options)

methods.base._METHODS["gptq"] = counting
model = networks.make("moe")
settings = calibration.Settings(float_stream=True, batch_size=5)
networks.quantize(
    model, "moe", checkpoint=directory + "/state", log=directory + "/log.jsonl", settings=settings
)
torch.save(model.state_dict(), f"{{directory}}/result-{{rank}}.pt")
print(json.dumps({{"calls": calls[0], "notes": calibration.report(model).notes}}))
"""


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


# What every rank runs to see that an error in one of them ends them all; last, a run that is well.
FAILING = """
import json, os, sys
sys.path[:0] = [{here!r}, {hf!r}]
import torch
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
import bitfold, networks
from bitfold import methods
from bitfold.calibration import distributed, driver, resuming
directory = sys.argv[1]
rank = torch.distributed.get_rank()

def broken(*args, **kwargs):
    raise OSError("broken on purpose")

def attempt(owner=None, name=None, at=1, **arguments):
    model = networks.make("perceptron")
    kept = None if owner is None else getattr(owner, name)
    if rank == at and owner is not None:
        setattr(owner, name, broken)
    try:
        networks.quantize(model, "perceptron", checkpoint=directory + "/state", **arguments)
        return model
    except Exception as error:
        assert type(model[0]) is torch.nn.Linear
        return f"{{type(error).__name__}}: {{error}}"
    finally:
        if owner is not None:
            setattr(owner, name, kept)

data = networks.data("perceptron")
told = {{
    "data": attempt(calibration=[None] if rank == 1 else data),
    "other data": attempt(calibration=data[1:] if rank == 1 else data),
    "memory": attempt(driver.memory, "check"),
    "directory": attempt(resuming, "Checkpoint"),
    "gather": attempt(driver, "gather"),
    "solve": attempt(methods, "fold_weight", at=0),  # who solves the only matrix of a set
    "disk": attempt(resuming.Checkpoint, "save_streams"),
}}
well = attempt()
assert not isinstance(well, str), well
torch.save(well.state_dict(), f"{{directory}}/well-{{rank}}.pt")
print(json.dumps(told))
# Or gloo's threads may still run while the interpreter goes, which aborts now and then.
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


# What every rank runs with awq, whose scales rank 0 alone finds: rank 1's first batch goes another way.
SCALING = """
import sys
sys.path[:0] = [{here!r}, {hf!r}]
import torch
torch.set_num_threads(1)
import os, bitfold, json, networks
model = networks.quantize(networks.make("detours"), "detours", method="awq", checkpoint=False)
torch.save(model.state_dict(), sys.argv[1] + "/result-" + os.environ["RANK"] + ".pt")
lines = bitfold.calibration.report(model).lines
print(json.dumps([line.get("scale", line.get("no_scale")) for line in lines]))
"""


def start_two(directory, after=-1, script=SCRIPT):
    """Start as torchrun does; the environment is all that it gives."""
    code = script.format(here=str(HERE), hf=str(HERE.parent / "hf"))
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", code, str(directory), str(after)],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


def finish(processes):
    done = [process.communicate(timeout=240) for process in processes]
    return [process.returncode for process in processes], done


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
@pytest.mark.filterwarnings("ignore:little calibration data")
def test_two_processes_agree_with_one_also_after_one_was_killed(tmp_path):
    settings = bitfold.calibration.Settings(float_stream=True, batch_size=5)
    alone = networks.quantize(networks.make("moe"), "moe", settings=settings)
    processes = start_two(tmp_path, after=9)  # in the second stage
    processes[1].wait(timeout=240)
    processes[0].kill()  # as torchrun does with those that are left
    codes, _ = finish(processes)
    assert codes[1] == -signal.SIGKILL
    assert (tmp_path / "state" / "stage-0000.safetensors").exists()

    codes, said = finish(start_two(tmp_path))
    assert codes == [0, 0], said
    told = [json.loads(out.splitlines()[-1]) for out, _ in said]
    assert all("went on after 1 of 3 stages" in part["notes"] for part in told)
    # fourteen matrices of the second block and the head, in shares
    assert sum(part["calls"] for part in told) == 15
    assert min(part["calls"] for part in told) >= 5
    assert not (tmp_path / "state").exists()

    first, second = (torch.load(tmp_path / f"result-{rank}.pt") for rank in range(2))
    same = total = 0
    for name, tensor in alone.state_dict().items():
        assert torch.equal(first[name], second[name]), name
        if tensor.dtype == torch.int8:
            same += int((first[name] == tensor).sum())
            total += tensor.numel()
    assert same / total > 0.999
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    report = bitfold.calibration.report(alone)
    assert {line["name"] for line in lines} == {line["name"] for line in report.lines}
    for line in lines:
        expected = report[line["name"]]
        assert line.get("tokens") == expected.get("tokens")
        if "loss" in expected:
            assert line["loss"] == pytest.approx(expected["loss"], rel=1e-3, abs=1e-7)


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_awq_gives_all_processes_the_same_scales(tmp_path):
    codes, said = finish(start_two(tmp_path, script=SCALING))
    assert codes == [0, 0], said
    told = [json.loads(out.splitlines()[-1]) for out, _ in said]
    assert told[0] == told[1]
    assert any(isinstance(line, dict) and line["alpha"] > 0 for line in told[0])
    first, second = (torch.load(tmp_path / f"result-{rank}.pt") for rank in range(2))
    float_norm = networks.make("detours")[0].norm.weight
    assert not torch.equal(first["0.norm.weight"], float_norm)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
@pytest.mark.filterwarnings("ignore:little calibration data")
def test_an_error_in_one_process_ends_all_and_they_say_whose(tmp_path):
    alone = networks.quantize(networks.make("perceptron"), "perceptron").state_dict()
    codes, said = finish(start_two(tmp_path, script=FAILING))
    assert codes == [0, 0], said
    first, second = (json.loads(out.splitlines()[-1]) for out, _ in said)
    assert second.pop("data").startswith("ValueError: calibration item 0: expected a text")
    assert second.pop("other data").startswith("ValueError: process 1 differs from process 0 in the calibr")
    assert second.pop("solve").endswith("elsewhere: process 0: OSError: broken on purpose")
    assert set(second.values()) == {"OSError: broken on purpose"}
    assert first.pop("solve") == "OSError: broken on purpose"
    for what, text in first.items():
        assert text.startswith("RuntimeError: calibration stopped because of an error elsewhere: process 1: ")
        assert second.get(what, "ValueError: ") in text, what

    # With biases of their own, which take the mean error of the outputs.
    results = [torch.load(tmp_path / f"well-{rank}.pt") for rank in range(2)]
    for name, tensor in alone.items():
        assert torch.equal(results[0][name], results[1][name]), name
        if name.endswith("bias"):
            torch.testing.assert_close(results[0][name], tensor, rtol=1e-3, atol=1e-4)
    moved = [
        not torch.equal(networks.make("perceptron").state_dict()[n], alone[n]) for n in ("0.bias", "2.bias")
    ]
    assert all(moved)
