"""Fold, save, load in a fresh process: the same logits to the last bit, the same bytes when saved again."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from safetensors.torch import load_file

import bitfold

FORMATS = [
    "nf4",
    "nf4-nodq",
    "nf3",
    "nf2",
    "fp4",
    "log4",
    "int8-row",
    "int8-tensor",
    "int8-g64",
    "int4-g64",
    "int4-g64-sym",
    "int4-g64-fz",
    "int4-g64-dq",
    "int3-g64",
    "int2-g64",
    "int2-g64-zp",
    "kmeans4-row",
    "kmeans3-tensor",
    "kmeans2-row",
]

# Each exported directory is loaded by its Auto class in one fresh process, which saves what it found.
LOAD = """
    import json, sys
    from pathlib import Path
    import bitfold, tiny_models, torch, transformers
    transformers.logging.set_verbosity_error()

    found = {}
    for directory, name, options in json.loads(sys.argv[1]):
        options = {key: getattr(torch, value) if "dtype" in key and value != "auto" else value
                   for key, value in options.items()}
        try:
            auto = getattr(transformers, tiny_models.MODELS[name].auto_class)
            model = auto.from_pretrained(directory, **options)
            out = Path(sys.argv[2]) / str(len(found))
            model.save_pretrained(out / "again")
            torch.save(tiny_models.logits(model, name), out / "logits.pt")
            found[str(len(found))] = {
                "class": type(model).__name__,
                "buffers": {k: str(v.dtype) for k, v in model.named_buffers() if ".weight" in k},
                "dtype": str(model.dtype),
                "devices": sorted({str(tensor.device) for tensor in model.state_dict().values()}),
                "training": model.training,
                "footprint": model.get_memory_footprint(),
                "quantizer": type(model.hf_quantizer).__name__,
                "method": model.config.quantization_config.quant_method,
            }
        except Exception as error:
            found[str(len(found))] = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(found))
"""

# (id, model, format, dtype of the model that is folded, how it is saved, how it is loaded)
AUTO: dict[str, Any] = {"dtype": "auto"}
CASES: list[tuple[str, str, str, str, dict[str, Any], dict[str, Any]]] = [
    *((name, name, "nf4", "float32", {}, AUTO) for name in tiny_models.MODELS),
    *((f"{name}-bfloat16", name, "nf4", "bfloat16", {}, AUTO) for name in tiny_models.MODELS),
    *((f"llama-tied-{fmt}", "llama-tied", fmt, "float32", {}, AUTO) for fmt in FORMATS if fmt != "nf4"),
    ("t5-float16", "t5", "int8-row", "float16", {}, AUTO),
    ("sharded", "llama", "nf4", "float32", {"max_shard_size": "20KB"}, AUTO),
    ("sharded-tied", "llama-tied", "int4-g64", "float32", {"max_shard_size": "10KB"}, AUTO),
    ("device-map-cpu", "llama-tied", "nf4", "float16", {}, {**AUTO, "device_map": "cpu"}),
    (
        "device-map-auto",
        "llama",
        "nf4",
        "float16",
        {"max_shard_size": "30KB"},
        {**AUTO, "device_map": "auto"},
    ),
    ("device-map-auto-tied", "gpt2", "int4-g64", "float32", {}, {**AUTO, "device_map": "auto"}),
    ("low-memory", "bert-masked", "nf4", "float32", {}, {**AUTO, "low_cpu_mem_usage": True}),
    ("old-spelling", "llama", "nf4", "float16", {}, {"torch_dtype": "auto"}),
]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, run_script: Any) -> dict[str, dict[str, Any]]:
    root = tmp_path_factory.mktemp("exported")
    jobs, saved = [], {}
    for key, name, fmt, dtype, save_options, load_options in CASES:
        model = bitfold.quantize(tiny_models.make(name, getattr(torch, dtype)), fmt, progress=False)
        model.save_pretrained(root / key, **save_options)
        jobs.append((str(root / key), name, load_options))
        saved[key] = {
            "logits": tiny_models.logits(model, name),
            "state": {key: value.clone() for key, value in model.state_dict().items()},
            "class": type(model).__name__,
            "directory": root / key,
            "footprint": model.get_memory_footprint(),
            "buffers": {key: str(value.dtype) for key, value in model.named_buffers() if ".weight" in key},
        }
    loaded = run_script(textwrap.dedent(LOAD), json.dumps(jobs), str(root / "loaded"))
    for index, key in enumerate(saved):
        saved[key]["loaded"] = loaded[str(index)]
        saved[key]["out"] = root / "loaded" / str(index)
    return saved


KEYS = [case[0] for case in CASES]


@pytest.mark.parametrize("key", KEYS)
def test_loads_with_the_same_logits_in_a_fresh_process(key, exported):
    case = exported[key]
    loaded = case["loaded"]
    assert "error" not in loaded, loaded
    assert torch.equal(torch.load(case["out"] / "logits.pt"), case["logits"])
    assert case["logits"].isfinite().all()
    assert loaded["class"] == case["class"]
    assert loaded["buffers"] == case["buffers"]
    assert loaded["devices"] == ["cpu"]
    assert loaded["training"] is False
    assert loaded["quantizer"] == "BitfoldQuantizer"
    assert loaded["method"] == "bitfold"
    assert abs(loaded["footprint"] - case["footprint"]) <= 64  # buffers that are made anew, such as masks


@pytest.mark.parametrize("key", KEYS)
def test_saving_a_loaded_model_again_gives_the_same_bytes(key, exported):
    case = exported[key]
    first, again = stored(case["directory"]), stored(case["out"] / "again")
    assert first.keys() == again.keys()
    for name, tensor in first.items():
        assert again[name].dtype == tensor.dtype, name
        assert torch.equal(again[name], tensor), name
    assert (
        config(case["directory"])["quantization_config"]
        == config(case["out"] / "again")["quantization_config"]
    )


@pytest.mark.parametrize("key", KEYS)
def test_directory_holds_packed_bytes_and_says_so(key, exported):
    directory = exported[key]["directory"]
    written = config(directory)
    assert written["model_type"]
    assert written["architectures"] == [exported[key]["class"]]
    assert written["quantization_config"]["quant_method"] == "bitfold"
    tensors = stored(directory)
    for name, entry in written["quantization_config"]["modules"].items():
        if "format" not in entry:
            assert f"{name}.weight" not in tensors  # tied: the matrix is stored once, under its owner
            continue
        for suffix, dtype, shape in bitfold.Format(entry["format"]).buffers(tuple(entry["shape"])):
            tensor = tensors[f"{name}.weight{suffix}"]
            assert (str(tensor.dtype), tuple(tensor.shape)) == (f"torch.{dtype}", tuple(shape))
    if key.startswith("sharded"):
        assert len(list(directory.glob("*.safetensors"))) > 2


@pytest.mark.parametrize("name", ["llama-tied", "bert-masked", "t5"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_another_dtype_at_load_leaves_packed_data_unharmed(name, dtype, exported):
    import transformers

    case = exported[name]
    auto = getattr(transformers, tiny_models.MODELS[name].auto_class)
    model = auto.from_pretrained(case["directory"], dtype=dtype)
    state = model.state_dict()
    assert state.keys() >= case["state"].keys()
    for key in case["state"]:
        tensor = state[key]
        if not case["state"][key].is_floating_point():
            assert tensor.dtype == case["state"][key].dtype
            assert torch.equal(tensor, case["state"][key]), key
        elif ".wo." not in key:
            assert tensor.dtype == dtype, key
    result = tiny_models.logits(model, name)
    # Rounding of activations in the narrower type only: the weights are the same.
    scale = case["logits"].abs().max()
    assert (result.float() - case["logits"]).abs().max() <= 0.05 * scale
    if dtype == torch.float32:
        assert torch.equal(result, case["logits"])


@pytest.mark.parametrize(("saved", "loaded"), [("llama", "AutoModel"), ("bert-masked", "AutoModel")])
def test_base_model_loads_from_a_checkpoint_with_head(saved, loaded, exported):
    import transformers

    base = getattr(transformers, loaded).from_pretrained(exported[saved]["directory"], dtype="auto")
    whole = tiny_models.MODELS[saved].auto_class
    model = getattr(transformers, whole).from_pretrained(exported[saved]["directory"], dtype="auto")
    inputs = tiny_models.MODELS[saved].inputs()
    with torch.no_grad():
        expected = model.base_model(**inputs).last_hidden_state
        assert torch.equal(base(**inputs).last_hidden_state, expected)


def test_head_on_a_folded_base_model(tmp_path, exported):
    from transformers import AutoModel, AutoModelForSequenceClassification

    directory = exported["bert-classifier"]["directory"]
    AutoModel.from_pretrained(directory, dtype="auto").save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype="auto")
    whole = AutoModelForSequenceClassification.from_pretrained(directory, dtype="auto")
    inputs = tiny_models.MODELS["bert-classifier"].inputs()
    with torch.no_grad():
        assert torch.equal(model.bert(**inputs)[0], whole.bert(**inputs)[0])
    assert type(model.classifier) is torch.nn.Linear  # new, in float, as transformers says in its report
    assert isinstance(model.bert.encoder.layer[0].output.dense, bitfold.nn.QuantLinear)


def test_memory_footprint_counts_the_packed_bytes(exported):
    case = exported["llama"]
    float_bytes = sum(p.nbytes for p in tiny_models.make("llama").parameters())
    on_disk = sum(tensor.nbytes for tensor in stored(case["directory"]).values())
    assert on_disk <= case["footprint"] <= on_disk + 4096  # rotary tables are not saved
    assert float_bytes / case["footprint"] > 5


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "t5"])
def test_generate(name, exported):
    import transformers

    case = exported[name]
    auto = getattr(transformers, tiny_models.MODELS[name].auto_class)
    model = auto.from_pretrained(case["directory"], dtype="auto")
    inputs = {key: value for key, value in tiny_models.MODELS[name].inputs().items() if "decoder" not in key}
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": 98}
    assert torch.equal(
        model.generate(**inputs, **options), model.generate(**inputs, use_cache=False, **options)
    )


def test_tying_again_changes_nothing(exported):
    """transformers ties after loading (4.57), in the Trainer, and when embeddings are resized."""
    import transformers

    for name in ("llama-tied", "gpt2", "bert-masked", "t5", "gemma"):
        case = exported[name]
        auto = getattr(transformers, tiny_models.MODELS[name].auto_class)
        model = auto.from_pretrained(case["directory"], dtype="auto")
        for _ in range(2):
            model.tie_weights()
        assert torch.equal(tiny_models.logits(model, name), case["logits"]), name


def test_loaded_model_can_be_copied_and_pickled(exported):
    import copy
    import pickle

    from transformers import AutoModelForCausalLM

    case = exported["llama-tied"]
    model = AutoModelForCausalLM.from_pretrained(case["directory"], dtype="auto")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(tiny_models.logits(twin, "llama-tied"), case["logits"])


def stored(directory: Path) -> dict[str, torch.Tensor]:
    return {key: value for file in directory.glob("*.safetensors") for key, value in load_file(file).items()}


def config(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())
