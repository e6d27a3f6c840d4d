"""Going on after whatever happened: the result is that of a run nothing happened to."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import networks
import pytest
import torch
from torch import nn

import bitfold
from bitfold import calibration, methods
from bitfold.calibration import CalibrationWarning, CheckpointError, Settings, fingerprint
from bitfold.calibration import checkpoint as checkpoints
from bitfold.calibration.checkpoint import Checkpoint
from bitfold.calibration.streams import Stream
from bitfold.io.locking import DirectoryLock
from bitfold.io.safetensors_file import SafetensorsFile
from bitfold.outputs import Batch

pytest.importorskip("transformers")

HERE = Path(__file__).parent

# Folds a model, and saves the result unless the process kills itself at the n-th matrix or file.
SCRIPT = """
import os, signal, sys
sys.path[:0] = [{here!r}, {hf!r}]
import torch
torch.set_num_threads(1)
import bitfold, networks
from bitfold import methods
from bitfold.io import atomic
name, directory, result, kind, count = sys.argv[1:]
left = [int(count)]

def die(what):
    if kind == what:
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1

gptq = methods.get("gptq")
def dying(weight, fmt, statistics=None, **options):
    die("method")
    return gptq(weight, fmt, statistics, **options)

methods.base._METHODS["gptq"] = dying
fsync = atomic._fsync
def fsync_and_die(path):
    die("before-flush")
    fsync(path)
    die("after-flush")
atomic._fsync = fsync_and_die
model = networks.make(name)
networks.quantize(model, name, checkpoint=directory)
torch.save(model.state_dict(), result)
"""


def fold_in_a_process(name, directory, result, kind="never", count=0):
    code = SCRIPT.format(here=str(HERE), hf=str(HERE.parent / "hf"))
    arguments = [sys.executable, "-c", code, name, str(directory), str(result), kind, str(count)]
    return subprocess.run(arguments, capture_output=True, text=True, check=False)


def assert_same_bytes(a, b):
    assert list(a) == list(b)
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype
        assert torch.equal(tensor, b[name]), name


def stages(directory):
    return sorted(file.name for file in Path(directory).glob("stage-*"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:little calibration data")
def test_killed_again_and_again_it_ends_with_the_same_bytes(tmp_path):
    whole = networks.quantize(networks.make("moe"), "moe", checkpoint=False).state_dict()
    result = tmp_path / "result.pt"
    for kind, count, finished in (
        ("method", 17, 1),  # in the second of three stages
        ("after-flush", 2, 1),  # its packed file is whole, but has not got its name
        ("before-flush", 3, 2),  # it has; the streams of the stage before are still there
    ):
        done = fold_in_a_process("moe", tmp_path / "state", result, kind, count)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert len(stages(tmp_path / "state")) == finished
        assert not result.exists()
    done = fold_in_a_process("moe", tmp_path / "state", result)
    assert done.returncode == 0, done.stderr
    assert_same_bytes(torch.load(result), whole)
    assert not (tmp_path / "state").exists()


GPTQ = methods.get("gptq")


class Failing:
    """GPTQ that raises at its n-th call."""

    def __init__(self, after, error=RuntimeError):
        self.left, self.error, self.calls = after, error, 0

    def __call__(self, weight, fmt, statistics=None, **options):
        self.calls += 1
        if self.left == 0:
            raise self.error("broken on purpose")
        self.left -= 1
        return GPTQ(weight, fmt, statistics, **options)


@pytest.fixture
def failing(monkeypatch):
    def install(after, error=RuntimeError):
        made = Failing(after, error)
        monkeypatch.setitem(methods.base._METHODS, "gptq", made)
        return made

    return install


@pytest.mark.parametrize(
    ("name", "float_stream"),
    [("llama", False), ("llama", True), ("t5", False), ("moe", True), ("unet", True)],
)
@pytest.mark.filterwarnings("ignore:little calibration data")
def test_an_exception_half_way_and_a_second_run_on_a_fresh_model(failing, tmp_path, name, float_stream):
    settings = Settings(float_stream=float_stream)
    arguments = {"checkpoint": tmp_path / "state", "settings": settings}
    whole = networks.quantize(networks.make(name), name, settings=settings).state_dict()
    failing(5 if name != "unet" else 2)
    with pytest.raises(RuntimeError, match="on purpose"):
        networks.quantize(networks.make(name), name, **arguments)
    failing(-1)
    model = networks.quantize(networks.make(name), name, **arguments)
    assert_same_bytes(model.state_dict(), whole)
    assert len(calibration.report(model).lines) == len(bitfold.manifest.describe(model)["modules"]) - sum(
        entry["kind"].startswith("tied") for entry in bitfold.manifest.describe(model)["modules"].values()
    )


def test_going_on_solves_only_what_is_left(failing, tmp_path):
    failing(10)
    with pytest.raises(RuntimeError, match="on purpose"):
        networks.quantize(networks.make("llama"), "llama", checkpoint=tmp_path / "state")
    assert stages(tmp_path / "state") == ["stage-0000.safetensors"]
    made = failing(-1)
    model = networks.quantize(networks.make("llama"), "llama", checkpoint=tmp_path / "state")
    assert made.calls == 8  # seven of the second block, and the head
    assert "went on after 1 of 3 stages" in calibration.report(model).notes


@pytest.mark.parametrize("after", [3, 10])
def test_going_on_with_the_same_model_object(failing, tmp_path, after):
    whole = networks.quantize(networks.make("llama"), "llama", checkpoint=False).state_dict()
    model = networks.make("llama")
    failing(after, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        networks.quantize(model, "llama")
    assert torch.isfinite(networks.outputs(model, "llama")).all()
    assert all("forward" not in module.__dict__ for module in model.modules())
    failing(-1)
    networks.quantize(model, "llama")
    assert_same_bytes(model.state_dict(), whole)
    cache = Path(os.environ["XDG_CACHE_HOME"]) / "bitfold" / "calibration"
    assert list(cache.iterdir()) == []


def test_lost_streams_are_made_again(failing, tmp_path):
    whole = networks.quantize(networks.make("t5"), "t5", checkpoint=False).state_dict()
    failing(30)
    with pytest.raises(RuntimeError, match="on purpose"):
        networks.quantize(networks.make("t5"), "t5", checkpoint=tmp_path / "state")
    (stream,) = (tmp_path / "state").glob("stream-*")
    stream.write_bytes(stream.read_bytes()[:1000])
    failing(-1)
    model = networks.quantize(networks.make("t5"), "t5", checkpoint=tmp_path / "state")
    assert_same_bytes(model.state_dict(), whole)


def test_streams_come_back_whatever_the_order_of_keys(tmp_path):
    def stream():
        return Stream(nn.Identity(), [], 12)

    store, before, after = Checkpoint(tmp_path, {}), stream(), stream()
    before.outputs = {"a:b": [torch.tensor([number]) for number in range(12)]}
    store.save_streams(0, {"folded": before})
    (path,) = tmp_path.glob("stream-*")
    with SafetensorsFile(path) as file:
        tensors = {name: file.read(name) for name in file.tensors}
        keys = sorted(file.metadata.items(), reverse=True)
    checkpoints._write(path, tensors, dict(keys))
    assert store.load_streams(0, {"folded": after})
    assert after.outputs == before.outputs
    checkpoints._write(path, tensors, dict(keys[1:]))
    assert not store.load_streams(0, {"folded": after})  # one batch is missing


@pytest.mark.filterwarnings("ignore:little calibration data")
def test_after_scaling_lost_streams_mean_starting_over_and_folded_blocks_a_refusal(failing, tmp_path):
    """The float blocks in front of which norms were scaled are not there any more."""
    arguments = {"method": "awq+gptq", "calibration": networks.data("llama", count=10)}
    whole = networks.quantize(networks.make("llama"), "llama", **arguments).state_dict()
    arguments["checkpoint"] = tmp_path / "state"
    failing(10)
    model = networks.make("llama")
    with pytest.raises(RuntimeError, match="on purpose"):
        networks.quantize(model, "llama", **arguments)
    (stream,) = (tmp_path / "state").glob("stream-*")
    stream.unlink()
    made = failing(-1)
    with pytest.raises(CheckpointError, match=r"stream-0000\) are lost .*load the model and call again"):
        networks.quantize(model, "llama", **arguments)
    assert made.calls == 0
    model = networks.make("llama")
    with pytest.warns(CalibrationWarning, match=r"after 'awq\+gptq' they cannot .*starts over"):
        networks.quantize(model, "llama", **arguments)
    assert_same_bytes(model.state_dict(), whole)
    assert made.calls == 15
    assert "started over: the outputs of 1 finished stages were lost" in calibration.report(model).notes


def test_two_runs_do_not_share_a_directory(failing, tmp_path):
    class Other:
        def __call__(self, weight, fmt, statistics=None, **options):
            with pytest.raises(CheckpointError, match=rf"process {os.getpid()} is at work .* another checkp"):
                networks.quantize(networks.make("perceptron"), "perceptron", checkpoint=tmp_path)
            return GPTQ(weight, fmt, statistics, **options)

    methods.base._METHODS["gptq"] = Other()
    try:
        networks.quantize(networks.make("perceptron"), "perceptron", checkpoint=tmp_path)
    finally:
        methods.base._METHODS["gptq"] = GPTQ
    assert not tmp_path.exists()
    failing(1)
    with pytest.raises(RuntimeError, match="on purpose"):
        networks.quantize(networks.make("perceptron"), "perceptron", checkpoint=tmp_path)
    failing(-1)  # what failed holds nothing
    networks.quantize(networks.make("perceptron"), "perceptron", checkpoint=tmp_path)


def test_abandoned_checkpoints_go_when_a_new_one_is_opened():
    cache = Path(os.environ["XDG_CACHE_HOME"]) / "bitfold" / "calibration"
    for name, days, mark in (
        ("old", 31, True),
        ("held", 31, True),
        ("young", 29, True),
        ("foreign", 99, False),
    ):
        file = cache / name / ("fingerprint.json" if mark else "thesis.txt")
        file.parent.mkdir(parents=True)
        file.write_text("{}")
        lock = DirectoryLock(file.parent) if name == "held" else None
        then = time.time() - days * 24 * 3600
        for path in (file, *file.parent.iterdir(), file.parent):
            os.utime(path, (then, then))
        if lock is not None:  # by another process that lives: the one that started this one
            held = next(file.parent.glob(".lock-*"))
            held.rename(held.with_name(held.name.replace(str(os.getpid()), str(os.getppid()))))
            os.utime(file.parent, (then, then))
            lock.release()
    networks.quantize(networks.make("perceptron"), "perceptron")
    assert sorted(path.name for path in cache.iterdir()) == ["foreign", "held", "young"]


def test_another_run_is_refused_with_what_changed(failing, tmp_path):
    failing(10)
    with pytest.raises(RuntimeError, match="on purpose"):
        networks.quantize(networks.make("llama"), "llama", checkpoint=tmp_path)
    failing(-1)

    def again(model=None, **others):
        arguments = {"checkpoint": tmp_path, **others}
        networks.quantize(model or networks.make("llama"), "llama", **arguments)

    with pytest.raises(CheckpointError, match=r"changed: the calibration data \(digest\)\. Undo"):
        again(calibration=networks.data("llama", seed=9))
    with pytest.raises(CheckpointError, match=r"options or settings \(damping: None before, '0.05' now\)"):
        again(options={"damping": 0.05})
    with pytest.raises(CheckpointError, match=r"settings \(true_sequential: 'True' before, 'False' now\)"):
        again(settings=Settings(true_sequential=False))
    changed = networks.make("llama")
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight[3, 3] += 1e-3
    with pytest.raises(CheckpointError, match=r"the model \(model.layers.1.mlp.up_proj.weight\)"):
        again(changed)
    with pytest.raises(CheckpointError, match=r"the model \(config.rms_norm_eps, .*class"):
        changed = networks.make("llama")
        changed.config.rms_norm_eps = changed.model.norm.variance_epsilon = 0.5
        again(changed)
    with pytest.raises(CheckpointError, match=r"the model \(model.rotary_emb.inv_freq\)"):
        changed = networks.make("llama")
        changed.model.rotary_emb.inv_freq.mul_(0.1)
        again(changed)
    with pytest.raises(CheckpointError, match=r"the plan \(lm_head: 'int3-g16 gptq' before, 'nf4 gptq' now"):
        bitfold.quantize(
            networks.make("llama"),
            "int3-g16",
            rules={"lm_head": "nf4"},
            calibration=networks.data("llama"),
            method="gptq",
            checkpoint=tmp_path,
            progress=False,
        )
    assert stages(tmp_path) == ["stage-0000.safetensors"]
    again()


def test_a_directory_of_somebody_else_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("dear")
    with pytest.raises(CheckpointError, match="is no checkpoint; choose another"):
        networks.quantize(networks.make("llama"), "llama", checkpoint=tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "dear"


def test_a_damaged_stage_is_named(failing, tmp_path):
    failing(10)
    with pytest.raises(RuntimeError, match="on purpose"):
        networks.quantize(networks.make("llama"), "llama", checkpoint=tmp_path)
    path = tmp_path / "stage-0000.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    failing(-1)
    with pytest.raises(CheckpointError, match=r"stage-0000.safetensors: damaged .*delete"):
        networks.quantize(networks.make("llama"), "llama", checkpoint=tmp_path)


FULL = r"checkpoint, .*stage.*No space left.* bytes are free.*make room"


@pytest.mark.parametrize("nth", [0, 1, 2, 3])
def test_a_full_disk_is_told_and_what_was_written_before_stays(monkeypatch, tmp_path, nth):
    """The n-th file that is written fills the disk: streams and packed matrices of stages 0 and 1."""
    whole = networks.quantize(networks.make("llama"), "llama", checkpoint=False).state_dict()
    left = [nth]
    put = checkpoints.SafetensorsWriter._put

    def full(self, data, position):
        if position == 0:
            left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        put(self, data, position)

    monkeypatch.setattr(checkpoints.SafetensorsWriter, "_put", full)
    with pytest.raises(OSError, match=FULL) as caught:
        networks.quantize(networks.make("llama"), "llama", checkpoint=tmp_path / "state")
    assert caught.value.errno == errno.ENOSPC
    assert len(stages(tmp_path / "state")) == nth // 2
    assert not list((tmp_path / "state").glob(".*"))  # no half-written file
    monkeypatch.setattr(checkpoints.SafetensorsWriter, "_put", put)
    model = networks.quantize(networks.make("llama"), "llama", checkpoint=tmp_path / "state")
    assert_same_bytes(model.state_dict(), whole)


def test_the_default_directory_is_below_the_cache_and_goes_when_done(failing):
    cache = Path(os.environ["XDG_CACHE_HOME"]) / "bitfold" / "calibration"
    failing(10)
    with pytest.raises(RuntimeError, match="on purpose"):
        networks.quantize(networks.make("llama"), "llama")
    (directory,) = cache.iterdir()
    assert json.loads((directory / "fingerprint.json").read_text())["processes"] == 1
    failing(-1)
    model = networks.quantize(networks.make("llama"), "llama")
    assert "went on after 1 of 3 stages" in calibration.report(model).notes
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("allowed", range(4))
def test_a_kill_while_it_is_removed_leaves_a_checkpoint(monkeypatch, tmp_path, allowed):
    for name in ("stage-0000.safetensors", "stage-0001.safetensors", "stream-0001-0.safetensors"):
        (tmp_path / name).write_text("")
    unlink, left = Path.unlink, [allowed]
    (tmp_path / "fingerprint.json").write_text("{}")

    def dying(path, missing_ok=False):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", dying)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.remove_directory(tmp_path)
    assert (tmp_path / "fingerprint.json").exists()
    assert stages(tmp_path) == ["stage-0000.safetensors", "stage-0001.safetensors"][: 3 - max(allowed, 1)]
    store = Checkpoint(tmp_path, {})  # goes on
    store.remove()
    store.close()
    assert not tmp_path.exists()


def test_one_byte_of_a_stage_that_has_changed_is_seen(failing, tmp_path):
    failing(2)
    with pytest.raises(RuntimeError, match="on purpose"):
        networks.quantize(networks.make("perceptron"), "perceptron", checkpoint=tmp_path)
    path = tmp_path / "stage-0000.safetensors"
    data = bytearray(path.read_bytes())
    data[-40] ^= 0x5A
    path.write_bytes(bytes(data))
    failing(-1)
    with pytest.raises(CheckpointError, match=r"stage-0000.safetensors: damaged \(its bytes are not"):
        networks.quantize(networks.make("perceptron"), "perceptron", checkpoint=tmp_path)


def test_a_directory_that_cannot_be_used_is_told_with_the_way_out(monkeypatch, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    with pytest.raises(OSError, match=r"checkpoint, making its directory: .*checkpoint=False to keep none"):
        networks.quantize(networks.make("perceptron"), "perceptron")


def test_a_fingerprint_of_another_kind_is_refused(tmp_path):
    (tmp_path / "fingerprint.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"fingerprint.json: not readable \(expected a JSON object"):
        networks.quantize(networks.make("perceptron"), "perceptron", checkpoint=tmp_path)


def test_arguments_that_are_no_tensors_are_data_too():
    x = torch.ones(2)
    first, *others = (
        fingerprint.of_batches([Batch(kwargs=kwargs)])
        for kwargs in ({"x": x, "k": 1.0}, {"x": x, "k": 2.0}, {"x": [x], "k": 1.0}, {"x": x, "l": 1.0})
    )
    assert all(other != first for other in others)
    assert first == fingerprint.of_batches([Batch(kwargs={"k": 1.0, "x": x.clone()})])
