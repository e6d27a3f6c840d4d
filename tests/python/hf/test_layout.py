"""Transformers models whose codes lie in panels: saved, adapted and tied as if they lay in rows."""

from __future__ import annotations

import copy

import pytest
import tiny_models
import torch

import bitfold


def layouts(model) -> dict[str, int]:
    found: dict[str, int] = {}
    for module in model.modules():
        if isinstance(module, bitfold.nn.PackedModule):
            found[module.layout] = found.get(module.layout, 0) + 1
    return found


@pytest.fixture
def both(tmp_path):
    """The same loaded model twice, in rows and in panels."""

    def make(name: str = "llama"):
        bitfold.save_pretrained(
            bitfold.quantize(tiny_models.make(name), "nf4", progress=False), tmp_path / name
        )
        rows = bitfold.load(tmp_path / name).eval()
        panels = copy.deepcopy(rows)
        assert bitfold.set_layout(panels, "panels") > 0
        return rows, panels

    return make


def files(directory) -> dict[str, bytes]:
    found = {path.name: path.read_bytes() for path in directory.iterdir()}
    found.pop("README.md", None)  # names the directory
    return found


@pytest.mark.parametrize("name", ["llama", "llama-tied", "bert-masked", "gpt2", "t5"])
def test_saved_files_are_those_of_rows(name, both, tmp_path):
    rows, panels = both(name)
    in_panels = layouts(panels)
    panels.tie_weights()
    assert layouts(panels) == in_panels
    expected, found = (tiny_models.logits(model, name).float() for model in (rows, panels))
    assert torch.nn.functional.cosine_similarity(expected, found, dim=-1).min() > 0.9999
    for save in (bitfold.save_pretrained, lambda model, path: model.save_pretrained(path)):
        for model, directory in ((rows, "rows"), (panels, "panels")):
            save(model, tmp_path / directory)
        assert files(tmp_path / "rows") == files(tmp_path / "panels")
        assert layouts(panels) == layouts(rows)
        bitfold.set_layout(panels, "panels")


def test_adapters_train_alike(both, tmp_path):
    peft = pytest.importorskip("peft")
    inputs = tiny_models.MODELS["llama"].inputs()
    gradients = []
    for model in both():
        before = layouts(model)
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        adapted = peft.get_peft_model(model, config)
        adapted.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append([p.grad for p in adapted.parameters() if p.requires_grad])
        assert layouts(model) == before
        adapted.save_pretrained(tmp_path / "adapter")
    assert len(gradients[0]) > 0
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    rows, panels = both()
    before = layouts(panels)
    loaded = [peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval() for model in (rows, panels)]
    bitfold.set_layout(panels, "panels")
    assert layouts(panels) == before
    with torch.no_grad():
        expected, found = (model(**inputs).logits for model in loaded)
    assert torch.nn.functional.cosine_similarity(expected, found, dim=-1).min() > 0.9999
