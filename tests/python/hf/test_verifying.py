"""`verify` finds what is wrong with an export and names it; a sound export passes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make

import bitfold
from bitfold.errors import PackedDataError
from bitfold.hf import verifying
from bitfold.hf.streaming import fold_directory, plan_directory
from bitfold.hf.verifying import verify

WEIGHT = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("verify")
    source, out = directory / "source", directory / "out"
    make("llama-tied", torch.bfloat16).save_pretrained(source)
    fold_directory(plan_directory(source, "nf4"), out)
    return source, out


@pytest.fixture
def export(pair: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(pair[1], tmp_path / "export"))


def edit(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def problems(directory: Path, **options: Any) -> list[str]:
    return [str(problem) for problem in verify(directory, **options).problems]


def test_sound_export_passes_and_is_compared(pair: tuple[Path, Path]) -> None:
    source, out = pair
    found = verify(out, against=source, min_cosine=0.9)
    assert found.passed, found.problems
    assert found.comparison["outputs"] == "logits"
    assert 0.9 < found.comparison["cosine_mean"] <= 1
    assert 0 < found.comparison["weight_error_worst"] < 0.2
    assert found.real["linear"] == pytest.approx(found.promised["linear"])
    assert found.comparison["resident_bytes"] < found.comparison["source_resident_bytes"]
    json.dumps(found.to_dict())


@pytest.mark.slow
def test_encoder_is_compared_by_embeddings(tmp_path: Path) -> None:
    from tiny_models import _bert_config
    from transformers import BertModel

    BertModel(_bert_config()).save_pretrained(tmp_path / "source")
    fold_directory(plan_directory(tmp_path / "source", "int8-g64"), tmp_path / "out")
    found = verify(tmp_path / "out", against=tmp_path / "source")
    assert found.passed, found.problems
    assert found.comparison["outputs"] == "embeddings"
    assert found.comparison["cosine_mean"] > 0.999


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_conv1d_and_encoder_decoder(tmp_path: Path, name: str) -> None:
    make(name).save_pretrained(tmp_path / "source")
    fold_directory(plan_directory(tmp_path / "source", "int8-row"), tmp_path / "out")
    found = verify(tmp_path / "out", against=tmp_path / "source")
    assert found.passed, found.problems
    assert found.comparison["weight_error_worst"] < 0.02
    assert found.comparison["cosine_mean"] > 0.99


@pytest.mark.parametrize(
    ("ours", "words"), [(-1.0, "a mean cosine of -1.0000"), (float("nan"), "values NaN or Inf")]
)
def test_outputs_unlike_the_source(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, ours: float, words: str
) -> None:
    facts = {"load_seconds": 0.0, "run_seconds": 0.0, "resident_bytes": 1}

    def probe(result: Any, directory: Path, *_: Any) -> Any:
        return "logits", torch.full((2, 5), ours if directory == pair[1] else 1.0), facts

    monkeypatch.setattr(verifying, "_probe", probe)
    (problem,) = problems(pair[1], against=pair[0], min_cosine=0.5)
    assert words in problem


def test_weights_of_another_model(pair: tuple[Path, Path], tmp_path: Path) -> None:
    torch.manual_seed(99)
    other = make("llama-tied", torch.bfloat16)
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight.normal_()
    other.save_pretrained(tmp_path / "other")
    (problem,) = problems(pair[1], against=tmp_path / "other")
    assert problem.startswith(f"{WEIGHT}: found a relative error of")


def test_missing_tensor(export: Path) -> None:
    edit(export, lambda tensors: tensors.pop(f"{WEIGHT}_scale"))
    assert any(p.startswith(f"{WEIGHT}_scale: found no such tensor, expected int8") for p in problems(export))


def test_missing_float_tensor(export: Path) -> None:
    edit(export, lambda tensors: tensors.pop("model.norm.weight"))
    assert any(
        p.startswith("model.norm.weight: found no such tensor, expected bfloat16 [64]")
        for p in problems(export)
    )


def test_wrong_size(export: Path) -> None:
    edit(export, lambda tensors: tensors.update({WEIGHT: tensors[WEIGHT][:-1].clone()}))
    assert any(p.startswith(f"{WEIGHT}: found int8 [3071], expected int8 [3072]") for p in problems(export))


def test_wrong_dtype(export: Path) -> None:
    edit(export, lambda tensors: tensors.update({WEIGHT: tensors[WEIGHT].view(torch.uint8)}))
    assert any(p.startswith(f"{WEIGHT}: found uint8") for p in problems(export))


def test_nan_in_the_bits_of_a_scale(export: Path) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{WEIGHT}_scale_absmax"].view(torch.float32)[0] = float("nan")

    edit(export, damage)
    (problem,) = problems(export)
    assert problem.startswith(f"{WEIGHT}_scale_absmax: found 1 of")
    assert "expected finite values in these bits of float32" in problem


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_float_tensor_that_is_not_finite(export: Path, value: float) -> None:
    edit(export, lambda tensors: tensors["model.norm.weight"].__setitem__(3, value))
    (problem,) = problems(export)
    assert problem.startswith("model.norm.weight: found 1 of 64 values NaN or Inf")
    assert "at 3" in problem


def test_a_float_copy_breaks_the_promise(export: Path) -> None:
    edit(export, lambda tensors: tensors.update({"copy.weight": torch.zeros(200, 200)}))
    assert any(p.startswith("whole model: found") for p in problems(export))


def test_a_pickle_lying_beside_counts(export: Path) -> None:
    torch.save(torch.zeros(40_000), export / "pytorch_model.bin")
    assert any(p.startswith("whole model: found") for p in problems(export))


def test_larger_packed_tensors_than_promised(export: Path) -> None:
    """Extra bytes under a module's own name count for its class."""
    edit(export, lambda tensors: tensors.update({f"{WEIGHT}_float": torch.zeros(96 * 64 * 4)}))
    assert any(p.startswith("linear: found") for p in problems(export))


def test_manifest_that_lies_about_a_shape(export: Path) -> None:
    config = json.loads((export / "config.json").read_text())
    config["quantization_config"]["modules"][WEIGHT.removesuffix(".weight")]["shape"] = [64, 97]
    (export / "config.json").write_text(json.dumps(config))
    with pytest.raises(PackedDataError, match=r"down_proj.*\[64, 97\]"):
        verify(export)


def test_float_checkpoint_is_no_export(pair: tuple[Path, Path]) -> None:
    with pytest.raises(PackedDataError, match="not folded by bitfold"):
        verify(pair[0])


def test_export_that_does_not_load(export: Path) -> None:
    """The tensors are right, but something else that a user needs is not: the fresh process says so."""
    (export / "tokenizer.json").write_text("{")
    (export / "tokenizer_config.json").write_text("{}")
    found = verify(export)
    assert not found.passed
    assert "fresh process" in str(found.problems[0])


def test_a_plain_file_of_a_bare_module(tmp_path: Path) -> None:
    bitfold.save(
        bitfold.nn.QuantLinear.from_float(torch.nn.Linear(512, 512), "nf4"), tmp_path / "m.safetensors"
    )
    assert verify(tmp_path / "m.safetensors").problems == []


def test_a_plain_file_is_not_compared_in_silence(tmp_path: Path) -> None:
    model = bitfold.quantize(torch.nn.Sequential(torch.nn.Linear(512, 512)), "nf4", progress=False)
    bitfold.save(model, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="plain torch file has no model class"):
        verify(tmp_path / "m.safetensors", tmp_path / "m.safetensors")


def test_plain_file(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(128, 64), torch.nn.LayerNorm(64))
    bitfold.save(bitfold.quantize(model, "int4-g64", progress=False), tmp_path / "model.safetensors")
    assert verify(tmp_path / "model.safetensors").passed
    tensors = load_file(tmp_path / "model.safetensors")
    from bitfold.io.safetensors_file import SafetensorsFile

    with SafetensorsFile(tmp_path / "model.safetensors") as file:
        metadata = file.metadata
    tensors["0.weight_scale"].view(torch.float16)[0, 0] = float("inf")
    save_file(tensors, tmp_path / "model.safetensors", metadata=metadata)
    (problem,) = verify(tmp_path / "model.safetensors").problems
    assert problem.name == "0.weight_scale"
