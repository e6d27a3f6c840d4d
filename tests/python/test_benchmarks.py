"""The benchmarks run, and what they say of bytes and fidelity holds. Nothing here looks at times."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("safetensors")
pytest.importorskip("transformers")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="not run from a source tree")


@pytest.fixture
def script(monkeypatch):
    """Import a script of benchmarks/ as its own directory would."""
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    return importlib.import_module


@pytest.mark.parametrize("name", ["bert_table", "int8_int2_table", "formats_table", "cpu_linear"])
def test_script_runs_and_writes_json(script, name, tmp_path, capsys):
    script(name).main(["--smoke", "--no-picture", "--out", str(tmp_path)])
    written = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))
    assert {"cpu", "threads", "torch", "bitfold_instruction_set"} <= written["environment"].keys()
    assert "bitfold" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["bert_table", "int8_int2_table", "formats_table", "cpu_linear"])
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
