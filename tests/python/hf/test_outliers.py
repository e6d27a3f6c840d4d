"""transformers models with sparse outliers: folded in place or streamed, saved, loaded, verified, refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import bitfold
from bitfold.errors import PackedDataError
from bitfold.hf.streaming import fold_directory, plan_directory
from bitfold.hf.verifying import verify

FORMAT = "int4-g64-outliers20"
WEIGHT = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, Path, Path]:
    directory = tmp_path_factory.mktemp("outliers")
    model = tiny_models.make("llama-tied")
    model.save_pretrained(directory / "float")
    bitfold.quantize(model, FORMAT, embeddings="nf4-outliers", progress=False)
    model.save_pretrained(directory / "folded")
    return model, directory / "float", directory / "folded"


def test_what_was_saved_comes_back_and_passes(saved) -> None:
    model, _, folded = saved
    again = AutoModelForCausalLM.from_pretrained(folded).eval()
    ids = tiny_models.tokens()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model.eval()(ids).logits)
    found = verify(folded)
    assert [p for p in found.problems if p.name != "whole model"] == []  # headers weigh much here
    assert found.real["linear"] == pytest.approx(found.promised["linear"])


def test_streamed_bytes_are_those_of_folding_in_place(saved, tmp_path: Path) -> None:
    _, source, folded = saved
    fold_directory(plan_directory(source, FORMAT, embeddings="nf4-outliers"), tmp_path / "out")
    mine, theirs = (load_file(place / "model.safetensors") for place in (tmp_path / "out", folded))
    assert set(mine) == set(theirs)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


@pytest.mark.parametrize(
    "load", [AutoModelForCausalLM.from_pretrained, bitfold.load], ids=["from_pretrained", "load"]
)
@pytest.mark.parametrize(
    ("suffix", "lie", "words"),
    [
        ("_outlier_row", lambda t: t.flip(0), "from 123 to 0"),
        ("_outlier_column", lambda t: t.fill_(-1), "65535 at 0"),
    ],
)
def test_places_that_lie_are_refused_by_name(
    saved, suffix: str, lie: Callable[[torch.Tensor], torch.Tensor], words: str, load, tmp_path: Path
) -> None:
    _, _, folded = saved
    tensors = load_file(folded / "model.safetensors")
    tensors[WEIGHT + suffix] = lie(tensors[WEIGHT + suffix].clone())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((folded / "config.json").read_bytes())
    with pytest.raises(PackedDataError) as refused:
        load(tmp_path)
    assert WEIGHT + suffix in str(refused.value)
    assert words in str(refused.value)
    (problem,) = [p for p in verify(tmp_path).problems if p.name != "whole model"]
    assert problem.name == WEIGHT + suffix
