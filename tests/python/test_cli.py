"""The command line: output, JSON, exit statuses, interruption and memory."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import bitfold
from bitfold.cli import main
from bitfold.io.shards import Checkpoint

transformers = pytest.importorskip("transformers")
PACKAGE = str(Path(bitfold.__file__).parents[1])


def save_bert(directory: Path, **changes: Any) -> Path:
    config = transformers.BertConfig(
        vocab_size=99, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
        max_position_embeddings=32, **changes,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(directory)
    return directory


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_bert(tmp_path / "source")


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a command."""
    capsys.readouterr()
    status = main([str(argument) for argument in arguments])
    return status, *capsys.readouterr()


def run_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, Any]:
    status, out, _ = run(capsys, *arguments, "--json")
    result = json.loads(out)
    assert result["exit_status"] == status
    return status, result


def fresh(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": PACKAGE},
        capture_output=True,
        text=True,
        check=False,
    )


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# quantize


def test_quantize(capsys: pytest.CaptureFixture[str], tmp_path: Path, source: Path) -> None:
    status, out, _ = run(capsys, "quantize", source, tmp_path / "out", "--format", "int4-g64")
    assert status == 0
    assert "linear" in out
    assert "bytes" in out
    assert names(tmp_path) == ["out", "source"]
    assert bitfold.summary(bitfold.load(tmp_path / "out")).formats == {"int4-g64": 13, "int8-g64": 3}


def test_quantize_as_json(capsys: pytest.CaptureFixture[str], tmp_path: Path, source: Path) -> None:
    status, result = run_json(capsys, "quantize", source, tmp_path / "out")
    assert status == 0
    assert result["predicted_bytes"] == result["written_bytes"]
    assert result["written_bytes"] == (tmp_path / "out/model.safetensors").stat().st_size
    assert result["summary"]["formats"] == {"nf4": 13, "int8-g64": 3}


def test_dry_run_writes_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path, source: Path) -> None:
    status, result = run_json(capsys, "quantize", source, tmp_path / "out", "--dry-run")
    assert (status, result["written_bytes"], names(tmp_path)) == (0, 0, ["source"])
    run(capsys, "quantize", source, tmp_path / "out")
    assert result["predicted_bytes"] == (tmp_path / "out/model.safetensors").stat().st_size


def test_rules_and_skip(capsys: pytest.CaptureFixture[str], tmp_path: Path, source: Path) -> None:
    arguments = ["--embeddings", "none", "--skip", "pooler.dense", "--rule", r".*output\.dense=int8-row"]
    arguments += ["--rule", r".*layer\.0\.attention\.self\.query=none", "--method", "round"]
    status, result = run_json(capsys, "quantize", source, tmp_path / "out", *arguments)
    assert status == 0
    # 4 "output.dense" (attention and feed-forward in 2 layers); of 13 linears two stay float
    assert result["summary"]["formats"] == {"nf4": 7, "int8-row": 4}


def test_shards(capsys: pytest.CaptureFixture[str], tmp_path: Path, source: Path) -> None:
    assert run(capsys, "quantize", source, tmp_path / "out", "--max-shard-size", "20KB")[0] == 0
    assert (tmp_path / "out/model.safetensors.index.json").exists()


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--format", "nf5"], 2, "nf5"),
        (["--embeddings", "int9"], 2, "int9"),
        (["--rule", "nonsense"], 2, "expected REGEX=FORMAT"),
        (["--rule", ".*=nope"], 2, "nope"),
        (["--skip", "no.such.module"], 2, "no.such.module"),
        (["--method", "guess"], 2, "guess"),
        (["--max-shard-size", "many"], 2, "many"),
    ],
)
def test_wrong_options(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    source: Path,
    arguments: list[str],
    status: int,
    words: str,
) -> None:
    found, out, err = run(capsys, "quantize", source, tmp_path / "out", *arguments)
    assert (found, out) == (status, "")
    assert words in err
    assert "Traceback" not in err
    assert names(tmp_path) == ["source"]


def test_what_is_not_covered_is_listed_ready_to_paste(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = transformers.ViTConfig(
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=96,
        image_size=32,
        patch_size=8,
    )
    transformers.ViTModel(config).save_pretrained(tmp_path / "source")
    status, _, err = run(capsys, "quantize", tmp_path / "source", tmp_path / "out")
    assert status == 2
    pasted = shlex.split(err.split("or here: ")[1])
    assert "--skip" in pasted
    assert run(capsys, "quantize", tmp_path / "source", tmp_path / "out", *pasted)[0] == 0


def test_unknown_option_is_a_usage_error() -> None:
    for arguments in (["quantize"], ["fold", "a", "b"], ["inspect", "x", "--colour"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2


def test_overwriting_must_be_asked_for(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, source: Path
) -> None:
    out = tmp_path / "out"
    assert run(capsys, "quantize", source, out)[0] == 0
    before = (out / "model.safetensors").read_bytes()
    status, _, err = run(capsys, "quantize", source, out, "--format", "int8-row")
    assert status == 2
    assert "--overwrite" in err
    assert (out / "model.safetensors").read_bytes() == before
    assert run(capsys, "quantize", source, out, "--format", "int8-row", "--overwrite")[0] == 0
    assert (out / "model.safetensors").read_bytes() != before


def test_bad_input(capsys: pytest.CaptureFixture[str], tmp_path: Path, source: Path) -> None:
    status, result = run_json(capsys, "quantize", tmp_path / "nothing", tmp_path / "out")
    assert (status, result["error"]["type"]) == (3, "FileNotFoundError")

    weights = source / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-5])
    status, result = run_json(capsys, "quantize", source, tmp_path / "out")
    assert (status, result["error"]["type"]) == (3, "PackedDataError")
    assert "truncated" in result["error"]["message"]

    weights.unlink()
    torch.save({}, source / "pytorch_model.bin")
    status, _, err = run(capsys, "quantize", source, tmp_path / "out")
    assert status == 3
    assert "a pickle" in err
    assert names(tmp_path) == ["source"]


def test_full_disk(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, source: Path, monkeypatch: Any
) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
    status, _, err = run(capsys, "quantize", source, tmp_path / "out")
    assert status == 4
    assert "10 bytes free" in err


KILLED = """
import os, signal, sys
from bitfold.hf.streaming import fold_directory, plan_directory
def progress(name, done, total):
    if done > total / 2:
        os.kill(os.getpid(), int(sys.argv[3]))
fold_directory(plan_directory(sys.argv[1], "int8-row"), sys.argv[2], overwrite=True, progress=progress)
"""


def test_killed_in_the_middle(capsys: pytest.CaptureFixture[str], tmp_path: Path, source: Path) -> None:
    """The earlier export stays whole, a new one does not appear, and the next run clears up."""
    out = tmp_path / "out"
    run(capsys, "quantize", source, out)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    for target in (out, tmp_path / "new"):
        assert fresh(KILLED, source, target, int(signal.SIGKILL)).returncode == -signal.SIGKILL
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert not (tmp_path / "new").exists()
    assert len([name for name in names(tmp_path) if ".bitfold-new-" in name]) == 2
    for target in (out, tmp_path / "new"):
        assert run(capsys, "quantize", source, target, "--overwrite")[0] == 0
    assert names(tmp_path) == ["new", "out", "source"]


def test_interrupted_by_the_user(tmp_path: Path, source: Path) -> None:
    done = fresh(KILLED, source, tmp_path / "out", int(signal.SIGINT))
    assert done.returncode != 0
    assert names(tmp_path) == ["source"]


MEMORY = """
import json, resource, sys
from bitfold.hf.streaming import fold_directory, plan_directory
plan = plan_directory(sys.argv[1], "nf4")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
fold_directory(plan, sys.argv[2])
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"grown": (after - before) * 1024, "source": plan.source_bytes}))
"""


def test_memory_is_that_of_a_few_tensors(tmp_path: Path) -> None:
    """170 MB of weights, the largest tensor 4 MB; what grows is buffers of that size and allocator slack."""
    config = transformers.LlamaConfig(
        vocab_size=99, hidden_size=512, intermediate_size=2048, num_hidden_layers=10, num_attention_heads=8,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "source", max_shard_size="50MB")
    done = fresh(MEMORY, tmp_path / "source", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["source"] > 160_000_000
    assert found["grown"] < 48_000_000


# inspect


def test_inspect_before_and_after(capsys: pytest.CaptureFixture[str], tmp_path: Path, source: Path) -> None:
    status, result = run_json(capsys, "inspect", source)
    assert status == 0
    assert result["model"] == "BertModel"
    assert result["folded_modules"] == 0
    assert result["total"]["ratio"] == 1
    run(capsys, "quantize", source, tmp_path / "out")
    status, result = run_json(capsys, "inspect", tmp_path / "out")
    assert result["folded_modules"] == 16
    expected = bitfold.summary(bitfold.load(tmp_path / "out")).to_dict()
    for name in ("linear", "embedding"):
        assert result["classes"][name] == expected["classes"][name]
    assert result["total"]["disk_bytes"] == expected["total"]["disk_bytes"]
    status, out, _ = run(capsys, "inspect", tmp_path / "out")
    assert status == 0
    assert "bits/weight" in out


def test_inspect_loads_no_tensor(
    capsys: pytest.CaptureFixture[str], source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("a tensor was read"))
    assert run(capsys, "inspect", source)[0] == 0


def test_inspect_a_plain_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = bitfold.quantize(torch.nn.Sequential(torch.nn.Linear(128, 64)), "nf4", progress=False)
    bitfold.save(model, tmp_path / "model.safetensors")
    status, result = run_json(capsys, "inspect", tmp_path / "model.safetensors")
    assert status == 0
    assert result["classes"]["linear"]["weights"] == 128 * 64


def test_inspect_finds_a_manifest_that_lies(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, source: Path
) -> None:
    run(capsys, "quantize", source, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    config["quantization_config"]["modules"]["pooler.dense"]["shape"] = [64, 65]
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    status, _, err = run(capsys, "inspect", tmp_path / "out")
    assert status == 3
    assert "'pooler.dense.weight' is int8 [2048], expected int8 [2112]" in err


@pytest.mark.parametrize("what", ["nothing", "text.txt"])
def test_inspect_what_is_no_checkpoint(capsys: pytest.CaptureFixture[str], tmp_path: Path, what: str) -> None:
    (tmp_path / "text.txt").write_text("hello")
    status, _, err = run(capsys, "inspect", tmp_path / what)
    assert status == 3
    assert what in err


# verify


def test_verify(capsys: pytest.CaptureFixture[str], tmp_path: Path, source: Path) -> None:
    run(capsys, "quantize", source, tmp_path / "out", "--format", "int8-g64")
    status, out, _ = run(capsys, "verify", tmp_path / "out", "--against", source, "--min-cosine", "0.99")
    assert status == 0, out
    assert "cosine mean: 0.99" in out or "cosine mean: 1.0" in out
    assert out.strip().endswith("ok")


def test_verify_damaged(capsys: pytest.CaptureFixture[str], tmp_path: Path, source: Path) -> None:
    run(capsys, "quantize", source, tmp_path / "out")
    weights = tmp_path / "out/model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-4])
    status, result = run_json(capsys, "verify", tmp_path / "out")
    assert status == 1
    assert not result["passed"]
    assert "truncated" in result["problems"][0]["found"]
    # A reader that trusts the header would not see this one: the scales of one layer turned into NaN.
    weights.write_bytes(content)
    from safetensors.torch import load_file, save_file

    tensors = load_file(weights)
    name = "encoder.layer.0.output.dense.weight_scale_absmax"
    tensors[name].view(torch.float32)[0] = float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})
    status, out, _ = run(capsys, "verify", tmp_path / "out")
    assert status == 1
    assert f"problem: {name}: found 1 of" in out


def test_verify_what_was_never_folded(capsys: pytest.CaptureFixture[str], source: Path) -> None:
    status, out, _ = run(capsys, "verify", source)
    assert status == 1
    assert "not folded by bitfold" in out


# doctor and the rest


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    status, result = run_json(capsys, "doctor")
    assert (status, result["broken"]) == (0, [])
    asked = {check["name"] for check in result["checks"]}
    assert {"torch", "_C", "_ops", "instruction set", "self-test", "transformers"} <= asked


def test_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bitfold", "--help"],
        env={**os.environ, "PYTHONPATH": PACKAGE},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0
    assert "exit status" in done.stdout


def test_help_needs_neither_transformers_nor_rich() -> None:
    code = (
        "import sys, bitfold.cli\n"
        "try: bitfold.cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'transformers', 'rich', 'safetensors'} & set(sys.modules)))"
    )
    assert fresh(code).stdout.splitlines()[-1] == "[]"


def test_ctrl_c(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import bitfold.hf.streaming

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bitfold.hf.streaming, "_stream", interrupt)
    status, _, err = run(capsys, "quantize", source, tmp_path / "out")
    assert status == 130
    assert "interrupted" in err
    assert names(tmp_path) == ["source"]


@pytest.mark.parametrize("bar", ["_rich_bar", "_tqdm_bar"])
def test_progress_bars_take_what_they_are_told(bar: str) -> None:
    from bitfold.cli import output

    with getattr(output, bar)("folding", 100) as advance:
        for done in (10, 50, 100):
            advance("some.weight", done, 100)


def test_version_and_bare_call(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"bitfold {bitfold.__version__}\n"
    assert main([]) == 2
    assert "quantize" in capsys.readouterr().err


def test_help_names_the_formats(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["quantize", "--help"])
    shown = capsys.readouterr().out
    assert all(code in shown for code in ("nf4", "int3", "kmeans2", "-g128"))


def test_min_cosine_needs_a_source(capsys: pytest.CaptureFixture[str], source: Path) -> None:
    status, _, error = run(capsys, "verify", source, "--min-cosine", 0.9)
    assert status == 2
    assert "--against" in error
