"""The benchmarks run, and what they say of bytes and fidelity holds. Nothing here looks at times."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import bitfold

pytest.importorskip("safetensors")
pytest.importorskip("transformers")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="not run from a source tree")


SCRIPTS = [
    "bert_table",
    "int8_int2_table",
    "formats_table",
    "linear_cpu",
    "quantize_cpu",
    "models_cpu",
]


@pytest.fixture
def script(monkeypatch):
    """Import a script of benchmarks/ as its own directory would."""
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    return importlib.import_module


@pytest.mark.parametrize("name", [*SCRIPTS, "solvers_cpu", "perplexity"])  # the last draw nothing
def test_script_runs_and_writes_json(script, name, tmp_path, capsys):
    script(name).main(["--smoke", "--no-picture", "--out", str(tmp_path)])
    written = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))
    assert {"cpu", "threads", "torch", "bitfold_instruction_set"} <= written["environment"].keys()
    assert "bitfold" in capsys.readouterr().out


def test_what_smoke_writes_is_no_result(script):
    harness = script("harness")
    parser = harness.arguments("")
    assert parser.parse_args([]).out == harness.RESULTS
    options = parser.parse_args(["--smoke"])
    assert options.smoke
    assert options.out != harness.RESULTS
    options.out.rmdir()
    assert parser.parse_args(["--smoke", "--out", "here"]).out.name == "here"


@pytest.mark.parametrize("name", SCRIPTS)
def test_picture_is_drawn(script, name, tmp_path):
    pytest.importorskip("matplotlib")
    script(name).main(["--smoke", "--out", str(tmp_path)])
    assert (tmp_path / f"{name}.png").stat().st_size > 1000


@pytest.mark.parametrize("size", ["small", "medium"])
@pytest.mark.parametrize(("family", "fmt"), [("int8", "int8-row"), ("2-bit", "int2-row")])
def test_small_models_beat_the_field(script, family, fmt, size, tmp_path):
    table = script("int8_int2_table")
    row = table.measure_one(size, fmt, tmp_path)
    ratio, cosine = table.REFERENCE[family][size]
    assert row["parameters"] == {"small": 10_976, "medium": 172_928}[size]
    for container in ("safetensors", "torch_save"):
        assert row[container]["ratio"] > ratio
    assert round(row["cosine"], 4) >= cosine


def test_cold_copies_exceed_the_cache(script):
    harness = script("harness")
    for nbytes in (1000, 10_000_000, 10**12):
        copies = harness.cold_copies(nbytes)
        assert copies >= 2
        assert copies * nbytes >= harness.CACHE_FACTOR * harness.last_level_cache_bytes()


def test_interleaved_takes_turns(script):
    seen = []
    cases = {name: lambda i, name=name: seen.append((name, i)) for name in "ab"}
    timings = script("harness").interleaved(cases, seconds=0, least=3)
    assert seen == [("a", 0), ("b", 0), *((name, i) for i in (1, 2, 3) for name in "ab")]
    assert all(t.calls == 3 and t.best <= t.low <= t.median <= t.high for t in timings.values())


def test_long_turns_hold_several_calls(script, monkeypatch):
    """Of a turn of nine calls the first third settles; a call as long as the turn counts."""
    harness = script("harness")
    now = [0.0]
    monkeypatch.setattr(harness, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def call(seconds):
        now[0] += seconds

    cases = {"short": lambda i: call(1), "long": lambda i: call(20)}
    timings = harness.interleaved(cases, seconds=0, least=1, turn=9, clock=lambda: now[0])
    assert (timings["short"].calls, timings["short"].best) == (6, 1)
    assert (timings["long"].calls, timings["long"].best) == (1, 20)


@pytest.fixture
def linear_records(script, tmp_path, monkeypatch):
    """Records of `linear_cpu.py` on one tiny shape; two copies, not the thousands that are cold."""
    monkeypatch.setattr(script("harness"), "cold_copies", lambda nbytes: 2)

    def run(*options):
        arguments = ["--shapes", "64x128", "--seconds", "0.01", "--no-picture", "--out", str(tmp_path)]
        return script("linear_cpu").main([*arguments, *options])["shapes"][0]["records"]

    return run


def test_linear_measures_errors_and_counts_bytes(linear_records):
    options = ["--formats", "nf4", "int4-g64", "--rows", "1", "5", "--peers", "torch_dense"]
    records = linear_records(*options)
    cases = {(r["case"], r["m"]): r for r in records}
    assert {m for _, m in cases} == {1, 5}
    for r in records:
        assert 0 < r["error"] < 2.5e-2
        assert r["memory_floor_s"] > 0
        assert r["kind"] == "dense" or r["nbytes"] == bitfold.Format(r["format"]).nbytes((64, 128))
    assert cases["torch fp32", 1]["nbytes"] == 64 * 128 * 4
    assert cases["nf4, bf16 x", 1]["error"] > 5e-4  # that of rounding the output


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_a_wrong_product_is_not_timed(linear_records, monkeypatch, factor):
    linear = bitfold.ops.linear
    monkeypatch.setattr(bitfold.ops, "linear", lambda *args: factor * linear(*args))
    with pytest.raises(SystemExit, match="nothing was timed"):
        linear_records("--formats", "nf4", "--rows", "1", "--levels", "auto", "--peers")


def test_absent_peers_and_levels_are_named(script, linear_records, monkeypatch, capsys):
    linear = bitfold.ops.linear

    def only_auto(x, packed, spec, bias=None, accuracy=0):
        if accuracy:
            raise RuntimeError(f"no accuracy {accuracy}")
        return linear(x, packed, spec, bias)

    monkeypatch.setattr(bitfold.ops, "linear", only_auto)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    script("peers")
    monkeypatch.delitem(sys.modules, "peers.ort", raising=False)
    linear_records("--formats", "nf4", "--rows", "1", "--peers", "ort")
    printed = capsys.readouterr().out
    assert "not measured: onnxruntime: not installed" in printed
    assert "not measured: level int8: no accuracy 2" in printed


@pytest.mark.parametrize("library", ["torch_dense", "torch_int4pack", "bnb", "ort", "ggml"])
def test_peers_multiply_with_the_weight_that_they_name(script, library, monkeypatch):
    peers = script("peers")
    try:
        module = script(f"peers.{library}")
    except ImportError as error:
        pytest.skip(f"{peers.LIBRARIES[library]} is not installed ({error})")
    for place in (module, script("harness")):
        if hasattr(place, "cold_copies"):
            monkeypatch.setattr(place, "cold_copies", lambda nbytes: 2)
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    missing: dict[str, str] = {}
    with torch.inference_mode():
        found = list(peers.build(weight, 1, [library], missing))
        assert found or missing
        for peer in found:
            x = torch.randn(3, 256).to(peer.dtype)
            exact = x.double() @ peer.weight.double().T
            call = peer.bind(x)
            for turn in range(3):
                error = ((call(turn).double() - exact).norm() / exact.norm()).item()
                assert error < (2.5e-2 if peer.int8 else 5e-3), (peer.name, turn)


def test_floors_are_positive(script):
    floors = script("floors").Floors(2, read_bytes=2**20)
    timings = script("harness").interleaved(floors.read_cases(), seconds=0)
    assert floors.bandwidth(timings)["best"] >= floors.bandwidth(timings)["median"] > 0
    assert all(rate > 0 for rate in floors.rates().values())


def test_floors_without_a_compiler(script, monkeypatch):
    module = script("floors")
    monkeypatch.setattr(module.shutil, "which", lambda _: None)
    monkeypatch.delenv("CC", raising=False)
    floors = module.Floors(1, read_bytes=2**20)
    assert floors.rates() == {}
    assert "torch.sum" in floors.how
    assert floors.bandwidth(script("harness").interleaved(floors.read_cases(), seconds=0))["median"] > 0


def test_goals_compare_within_one_run(script):
    goals = script("goals")
    common = {"shape": [4096, 4096], "m": 1, "of_bandwidth": 0.9, "times_floor": 1.1}
    own = {"kind": "bitfold", "format": "nf4", "activations": "fp32", "level": "auto"}
    records = [
        common | own | {"case": "nf4, fp32 x", "seconds": 1.0},
        common | {"case": "slow", "kind": "peer", "level": "exact", "seconds": 3.0},
        common | {"case": "fast", "kind": "peer", "level": "int8", "seconds": 1.3},
    ]
    found = {g["goal"]: g for g in goals.linear_goals(records)}
    assert found["M=1, of read bandwidth"]["met"] is True
    assert found["M=1, faster than the fastest peer"] == {
        "shape": "4096 x 4096",
        "goal": "M=1, faster than the fastest peer",
        "case": "nf4, fp32 x",
        "need": "≥ 1.4",
        "got": 1.3,
        "met": False,
    }
    assert goals.linear_goals(records[:1])[1]["met"] is None  # nobody to compare with


def test_goals_of_int8_and_folding(script):
    goals = script("goals")
    own = {"shape": [8, 8], "kind": "bitfold", "format": "nf4", "activations": "bf16", "level": "int8"}
    dense = {"shape": [8, 8], "kind": "dense", "case": "torch bf16", "level": "exact"}
    records = [own | {"case": "own", "m": m, "seconds": 1.0} for m in (1, 4, 512)]
    records += [dense | {"m": m, "seconds": s} for m, s in ((1, 0.1), (4, 1.2), (512, 1.7))]
    found = {g["goal"]: (g["got"], g["met"]) for g in goals.linear_goals(records)}
    assert found == {
        "M=512, against torch bf16": (1.7, True),
        "M>=4, faster than the fastest peer (least at M=4)": (1.2, False),
    }
    speeds = {"quantize nf4": 15.0, "quantize int8-row": 2.0, "dequantize nf4 to bf16": 20.0}
    met = {g["case"]: g["met"] for g in goals.folding_goals(speeds, copy=31.0, clone=24.0)}
    assert met == {"nf4": True, "int8-row": False, "nf4 to bf16": True}


@pytest.fixture
def gpu(script, monkeypatch):
    """`gpu.py` where there is no GPU: its jobs make their calls on the CPU, and a stub times them."""
    module = script("gpu")
    monkeypatch.setattr(script("gpu_peers"), "DEVICE", "cpu")
    monkeypatch.setattr(module, "l2_bytes", lambda: 1)

    def call_each(calls):
        for call in calls:
            call()
        return {"us": 2.0, "best_us": 1.0, "p90_us": 3.0}

    monkeypatch.setattr(module, "microseconds", call_each)
    monkeypatch.setattr(module, "queued_microseconds", call_each)
    monkeypatch.setattr(module, "clock_microseconds", lambda call: call_each([call]))
    return module


ENVIRONMENT = {"gpu": "none", "torch": torch.__version__, "copy_tb_s": 1.0, "bf16_tflop_s": 100.0}


def measured(gpu, out):
    """Records and goals of a smoke run, in which nothing of our own may fail."""
    gpu.measure(gpu.Run(ENVIRONMENT, 1.0), ENVIRONMENT, out, smoke=True)
    written = json.loads((out / "gpu.json").read_text(encoding="utf-8"))
    return written["records"], written["goals"]


def test_every_job_of_gpu_makes_its_calls(gpu, tmp_path, capsys):
    records, goals = measured(gpu, tmp_path)
    rows = {(r["job"], r["case"], r["m"]): r for r in records}
    assert {job for job, *_ in rows} == {"linear", "fold", "unfold", "gptq", "hessian"}
    for (_, case, _), r in rows.items():
        assert case in gpu.PEERS or r["us"] == 2.0, r
        assert ("us" in r) != ("left_out" in r)
    assert rows["linear", "nf4", 16]["floor_us"] > 0
    assert "Marlin is not installed" in rows["linear", "Marlin int4 g128", 1]["left_out"]
    assert rows["linear", "torch bf16", 16]["us"] == 2.0
    assert {g["met"] for g in goals} == {None}  # of shapes that smoke does not measure
    assert len(goals) == len(gpu.GOALS) + len(gpu.RATIOS) * len(gpu.FOUR_BITS)
    assert "bitfold on none" in capsys.readouterr().out


def test_a_failure_on_a_gpu_is_a_row(gpu, tmp_path, monkeypatch, capsys):
    def fails(*_, **__):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setitem(gpu.PEERS, "torch bf16", lambda _: gpu.gpu_peers.Peer(1, fails, fails, fails))
    monkeypatch.setattr(gpu, "gptq", fails)
    with pytest.raises(
        SystemExit, match="1 rows of bitfold's own failed; the first: RuntimeError: operation"
    ):
        measured(gpu, tmp_path)
    records = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))["records"]
    failed = [r for r in records if "not permitted" in r.get("left_out", "")]
    assert {(r["job"], r["case"]) for r in failed} == {
        ("gptq", "all that was left"),
        *((job, "torch bf16") for job in ("linear", "fold", "unfold")),
    }
    assert any(r["job"] == "linear" and r["case"] == "nf4" and "us" in r for r in records)
    assert capsys.readouterr().out.count("not permitted") == len(failed)


def test_what_was_measured_is_written_when_a_run_is_stopped(gpu, tmp_path, monkeypatch, capsys):
    def stop(*_):
        raise SystemExit(143)

    monkeypatch.setattr(gpu, "fold", stop)
    with pytest.raises(SystemExit, match="143"):
        measured(gpu, tmp_path)
    records = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))["records"]
    assert {r["job"] for r in records} == {"unfold"}
    assert "unfold  nf4" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.json"]


def test_a_failed_capture_gives_the_stream_back_and_its_first_reason(gpu, monkeypatch):
    streams = ["current"]

    class Graph:
        def __init__(self, _):
            streams.append("capturing")

        def __enter__(self):
            pass

        def __exit__(self, *_):
            raise RuntimeError("capture was invalidated")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", Graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: streams[-1])
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)

    def call():
        raise ValueError("copies from the CPU")

    record = gpu.Run(ENVIRONMENT, 1.0).add("linear", "nf4", (8, 8), 1, lambda: gpu.recorded([call]))
    assert record["left_out"] == "ValueError: copies from the CPU"
    assert streams == ["current", "capturing", "current"]


def test_goals_of_a_gpu_are_of_one_run(gpu):
    def row(case, us):
        return {"job": "linear", "case": case, "shape": [8192, 8192], "m": 1, "us": us}

    goals = gpu.goals_of([row("torch bf16", 36.0), row("nf4", 12.0), row("int4-g64", 18.0)])
    at = {(g["goal"], g["case"]): g for g in goals if g["shape"] == "8192 x 8192, M=1"}
    assert at["linear, microseconds", "nf4"]["met"] is True
    assert at["linear, microseconds", "int4-g64"]["met"] is False
    assert at["linear, times as fast as bf16", "nf4"]["got"] == 3.0
    assert at["linear, times as fast as bf16", "int4-g64"]["met"] is False
    assert at["linear, times as fast as bf16", "int4-g128"]["met"] is None


def test_rows_with_goals_are_measured_first(gpu, monkeypatch):
    run, begun = gpu.Run(ENVIRONMENT, 1.0), []
    for name in ("unfold", "fold", "gptq"):
        monkeypatch.setattr(
            gpu, name, lambda _, shapes, job=name: begun.extend((job, s, None) for s in shapes)
        )
    monkeypatch.setattr(
        gpu, "hessians", lambda _, tokens, sizes: begun.append(("hessian", (tokens, *sizes), None))
    )
    monkeypatch.setattr(
        gpu,
        "linear",
        lambda _run, shapes, batches, _formats: begun.extend(
            ("linear", s, m) for s in shapes for m in batches
        ),
    )
    run.do(gpu.jobs_of(run, smoke=False), lambda: None)
    wanted = {(job, shape, m) for job, _, shape, m in gpu.GOALS} | {("linear", *at) for at in gpu.RATIOS}
    assert set(begun[: len(wanted)]) == wanted
