"""Adapters on folded models: gradients, PEFT, the Trainer's checks."""

from __future__ import annotations

import pytest
import tiny_models
import torch

import bitfold
from bitfold.errors import BitfoldError


@pytest.fixture
def loaded(tmp_path):
    def make(name: str = "llama"):
        bitfold.save_pretrained(
            bitfold.quantize(tiny_models.make(name), "nf4", progress=False), tmp_path / name
        )
        return bitfold.load(tmp_path / name)

    return make


def loss(model, name: str = "llama") -> torch.Tensor:
    inputs = tiny_models.MODELS[name].inputs()
    return model(**inputs, labels=inputs["input_ids"]).loss


def test_gradients_flow_through_folded_layers(loaded):
    model = loaded().train()
    model.model.layers[0].input_layernorm.weight.requires_grad_(True)
    loss(model).backward()
    gradient = model.model.layers[0].input_layernorm.weight.grad
    assert gradient is not None
    assert gradient.abs().sum() > 0


def test_trainer_accepts_an_adapter_and_refuses_bare_codes(loaded):
    quantizer = loaded().hf_quantizer
    assert quantizer.is_trainable is True
    assert quantizer.is_qat_trainable is False
    assert quantizer.is_compileable is True
    assert quantizer.is_serializable(safe_serialization=True) is True


def adapted(model, **options):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, **options))


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_lora_trains_on_a_folded_model(targets, loaded):
    model = loaded()
    packed = {key: value.clone() for key, value in model.state_dict().items()}
    model = adapted(model, target_modules=targets).train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trainable
    optimizer = torch.optim.AdamW(trainable, lr=0.02)
    first = loss(model).item()
    for _ in range(20):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    assert loss(model).item() < 0.8 * first
    after = {
        key.replace(".base_layer", ""): value for key, value in model.get_base_model().state_dict().items()
    }
    assert all(torch.equal(after[key], value) for key, value in packed.items())


def test_adapter_is_saved_and_loaded_beside_the_folded_model(loaded, tmp_path):
    peft = pytest.importorskip("peft")
    model = adapted(loaded(), target_modules="all-linear", init_lora_weights=False).eval()
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(loaded(), tmp_path / "adapter").eval()
    inputs = tiny_models.MODELS["llama"].inputs()
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)
        assert not torch.equal(again(**inputs).logits, loaded()(**inputs).logits)


@pytest.mark.parametrize(("name", "options"), [
    ("llama", {"target_modules": "all-linear"}),
    ("llama", {"target_modules": ["embed_tokens"]}),
    ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
])  # fmt: skip
@pytest.mark.parametrize("way", ["merge_and_unload", "merge_adapter"])
def test_merging_into_packed_codes_is_refused_by_name(way, name, options, loaded):
    model = adapted(loaded(name), **options)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(BitfoldError, match="packed codes"):
        getattr(model, way)()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_merging_into_float_layers_still_works(loaded):
    model = bitfold.quantize(tiny_models.make("llama"), "nf4", skip=["lm_head"], progress=False)
    inputs = tiny_models.MODELS["llama"].inputs()
    adapter = adapted(model, target_modules=["lm_head"], init_lora_weights=False).eval()
    with torch.no_grad():
        expected = adapter(**inputs).logits
        merged = adapter.merge_and_unload()
        assert type(merged.lm_head) is torch.nn.Linear
        torch.testing.assert_close(merged(**inputs).logits, expected)


def test_merge_is_guarded_where_peft_was_imported_first(run_script):
    pytest.importorskip("peft")
    code = """import peft, bitfold, json
from peft.tuners.lora import layer
print(json.dumps(hasattr(layer.Linear.merge, "__bitfold_guard__")))
"""
    assert run_script(code) is True


def test_dequantizing_the_whole_model_is_refused_with_a_way_out(loaded):
    with pytest.raises(NotImplementedError, match=r"module\.dequantize"):
        loaded().dequantize()


@pytest.mark.slow
def test_trainer_trains_adapters_only(loaded, tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    row = tiny_models.tokens()[0]
    options = {"max_steps": 2, "per_device_train_batch_size": 2, "report_to": [], "save_strategy": "no"}
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"), use_cpu=True, disable_tqdm=True, **options
    )
    data = [{"input_ids": row, "labels": row}] * 4
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(model=loaded("llama-tied"), args=arguments, train_dataset=data)
    model = adapted(loaded("llama-tied"), target_modules="all-linear")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    Trainer(model=model, args=arguments, train_dataset=data).train()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed
    assert all("lora_" in key for key in changed)
