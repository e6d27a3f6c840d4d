"""Every structure is found, everything is folded, and calibration pays."""

from __future__ import annotations

import copy
import json

import networks
import pytest
import torch
from torch import nn

import bitfold
from bitfold import calibration
from bitfold.calibration import Settings
from bitfold.nn import QuantEmbedding, QuantLinear

pytest.importorskip("transformers")


@pytest.mark.parametrize("name", networks.NAMES)
@pytest.mark.filterwarnings("ignore:little calibration data")
def test_all_is_folded_and_the_output_is_nearer_than_without_data(name):
    model = networks.make(name)
    expected = networks.outputs(model, name)
    plain = copy.deepcopy(model)
    skip = ["vit.embeddings"] if name == "vit" else []
    bitfold.quantize(plain, "int3-g16", method="search", skip=skip, progress=False)
    modules = {n for n, m in plain.named_modules() if isinstance(m, QuantLinear | QuantEmbedding)}
    assert networks.quantize(model, name) is model
    assert {n for n, m in model.named_modules() if isinstance(m, QuantLinear | QuantEmbedding)} == modules
    assert bitfold.manifest.describe(model) == bitfold.manifest.describe(plain)
    report = calibration.report(model)
    assert {line["name"] for line in report.lines} == modules
    assert not model.training
    before = (networks.outputs(plain, name) - expected).square().mean()
    after = (networks.outputs(model, name) - expected).square().mean()
    assert after < before


def order_of(model):
    lines = calibration.report(model).lines
    return [line["name"] for line in lines if line["method"] == "gptq"]


def test_sets_run_in_order_and_share_hessians():
    model = networks.make("llama")
    networks.quantize(model, "llama")
    first = [name.removeprefix("model.layers.0.") for name in order_of(model)[:7]]
    assert first == [
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ]
    assert order_of(model)[-1] == "lm_head"


def test_encoder_goes_before_decoder():
    model = networks.make("t5")
    networks.quantize(model, "t5")
    names = order_of(model)
    assert names.index("encoder.block.1.layer.1.DenseReluDense.wo") < names.index(
        "decoder.block.0.layer.0.SelfAttention.q"
    )


@pytest.mark.filterwarnings("ignore:little calibration data")
def test_the_float_model_is_fed_what_the_folded_blocks_return():
    """With 8-bit formats the walk must reproduce plain passes: the Hessians of both are nearly the same."""
    model = networks.make("llama")
    seen = {}

    def looking(weight, fmt, statistics=None, **options):
        seen[len(seen)] = statistics
        return bitfold.methods.get("search")(weight, bitfold.Format("int8-g16"))

    bitfold.methods.register("looking", calibrated=True)(looking)
    try:
        last = model.model.layers[1].mlp.down_proj
        rows = []
        handle = last.register_forward_pre_hook(lambda m, args: rows.append(args[0]))
        from bitfold.calibration.batches import as_batches

        for batch in as_batches(networks.data("llama"), model, None, Settings()):
            with torch.no_grad():
                model(**batch.kwargs)
            rows[-1] = rows[-1][batch.masks[0]]
        handle.remove()
        x = torch.cat(rows)
        bitfold.quantize(
            model, "int8-g16", calibration=networks.data("llama"), method="looking", progress=False
        )
    finally:
        del bitfold.methods.base._METHODS["looking"]
        bitfold.methods.base._CALIBRATED.discard("looking")
    found = seen[13]  # the fourteenth matrix: down_proj of the second block
    assert found.tokens == x.shape[0]
    torch.testing.assert_close(
        found.hessian, x.T @ x / x.shape[0], rtol=0.05, atol=1e-2 * found.hessian.max().item()
    )
    torch.testing.assert_close(found.mean_abs, x.abs().mean(0), rtol=0.1, atol=1e-3)


def test_jsonl_lines_say_what_was_done(tmp_path):
    model = networks.make("llama")
    networks.quantize(model, "llama", log=tmp_path / "log.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == calibration.report(model).lines
    told = {"name", "shape", "format", "method", "tokens", "loss", "predicted", "damping", "seconds"}
    calibrated = [line for line in lines if line["method"] == "gptq"]
    assert len(calibrated) == 15
    for line in calibrated:
        assert told | {"peak_rss_bytes"} <= set(line), line["name"]
        assert line["seconds"] > 0


def test_training_flags_caches_and_hooks_are_left_as_they_were():
    model = networks.make("llama").train()
    model.model.norm.eval()
    assert model.config.use_cache
    networks.quantize(model, "llama")
    assert model.training
    assert model.model.layers[0].self_attn.q_proj.training
    assert not model.model.norm.training
    assert model.config.use_cache
    assert all(not m._forward_pre_hooks and not m._forward_hooks for m in model.modules())
    assert all("forward" not in m.__dict__ for m in model.modules())


@pytest.mark.parametrize("name", ["llama", "t5", "moe"])
@pytest.mark.filterwarnings("ignore:little calibration data")
def test_float_stream_gives_the_cross_term(name):
    seen = []

    def looking(weight, fmt, statistics=None, **options):
        seen.append(statistics)
        return bitfold.methods.get("search")(weight, fmt)

    bitfold.methods.register("looking", calibrated=True)(looking)
    try:
        model = networks.make(name)
        settings = Settings(float_stream=True)
        networks.quantize(model, name, method="looking", settings=settings)
    finally:
        del bitfold.methods.base._METHODS["looking"]
        bitfold.methods.base._CALIBRATED.discard("looking")
    crossed = [found for found in seen if found.cross is not None]
    assert len(crossed) >= 5
    assert any(float(found.cross.abs().max()) > 1e-4 for found in crossed)
    # small beside H itself: both streams feed nearly the same
    assert all(found.cross.norm() < 0.5 * found.hessian.norm() for found in crossed)


def test_gathering_a_whole_block_at_once_folds_all_too():
    model = networks.make("llama")
    networks.quantize(model, "llama", settings=Settings(true_sequential=False))
    assert not any(type(m) is nn.Linear for m in model.modules())


def test_float_matrices_are_released_on_the_way():
    import weakref

    model = networks.make("llama")
    references = [weakref.ref(m.weight) for m in model.modules() if type(m) is nn.Linear]
    alive = []

    def counting(weight, fmt, statistics=None):
        alive.append(sum(reference() is not None for reference in references))
        return bitfold.methods.get("search")(weight, fmt)

    bitfold.methods.register("counting", calibrated=True)(counting)
    try:
        networks.quantize(model, "llama", method="counting")
    finally:
        del bitfold.methods.base._METHODS["counting"]
        bitfold.methods.base._CALIBRATED.discard("counting")
    assert alive[0] == 15
    assert alive[-1] == 1


def test_a_plan_is_carried_out():
    from bitfold.choosing import choose

    class Plan:
        methods = {"model.layers.0.mlp.down_proj": "search"}  # noqa: RUF012

        def choose(self, model):
            return choose(model, "int4-g16", rules={"lm_head": "int8-g16"})

    model = networks.make("llama")
    bitfold.quantize(model, Plan(), calibration=networks.data("llama"), method="gptq", progress=False)
    report = calibration.report(model)
    assert report["lm_head"]["format"] == "int8-g16"
    assert report["model.layers.0.mlp.down_proj"]["method"] == "search"
    assert report["model.layers.1.mlp.down_proj"]["method"] == "gptq"
    with pytest.raises(ValueError, match="belong to the making of the plan"):
        bitfold.quantize(networks.make("llama"), Plan(), skip=["lm_head"], calibration=[[1, 2]])
