"""`bitfold plan`, `bitfold quantize --plan` and `bitfold compare`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import bitfold
from bitfold.cli import main

transformers = pytest.importorskip("transformers")
WORDS = [f"w{i}" for i in range(95)]


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["bert", "llama"])
def source(request: Any, tmp_path: Path) -> Path:
    sizes = {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    if request.param == "bert":
        config = transformers.BertConfig(**sizes, intermediate_size=96, max_position_embeddings=32)
        model = transformers.BertModel(config)
    else:
        config = transformers.LlamaConfig(**sizes, intermediate_size=96, tie_word_embeddings=True)
        model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "source")
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(tmp_path / "source")
    (tmp_path / "text.txt").write_text("\n".join(" ".join(WORDS[i : i + 9 + i]) for i in range(1, 20)))
    return tmp_path / "source"


def run_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, Any]:
    capsys.readouterr()
    status = main([*map(str, arguments), "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["exit_status"] == status
    return status, result


def test_plan_quantize_compare(capsys: pytest.CaptureFixture[str], tmp_path: Path, source: Path) -> None:
    text, file = tmp_path / "text.txt", tmp_path / "plan.json"
    status, planned = run_json(
        capsys, "plan", source, "--target-ratio", 4.5, "--text", text, "--length", 16, "--out", file
    )
    assert status == 0
    assert planned["ratio"] >= 4.5
    assert planned["measure"] == "kl"
    assert planned["float_file_bytes"] == (source / "model.safetensors").stat().st_size

    status, result = run_json(capsys, "quantize", source, tmp_path / "out", "--plan", file)
    assert status == 0, result
    assert result["written_bytes"] == planned["file_bytes"]
    assert sum(result["summary"]["formats"].values()) == len(planned["formats"])

    status, result = run_json(capsys, "compare", source, tmp_path / "out", "--text", text, "--length", 16)
    assert status == 0
    assert {layer["name"] for layer in result["layers"]} >= set(planned["formats"])
    assert result["final"]["cosine"] > 0.8

    folded = bitfold.quantize(transformers.AutoModel.from_pretrained(source), "nf4", progress=False)
    assert bitfold.summary(folded).formats  # the plan belongs to one model: another class has other names
    assert main(["compare", str(source), str(tmp_path / "out"), "--text", str(text), "--no-layers"]) == 0
    assert "cosine" in capsys.readouterr().out


def test_what_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, source: Path) -> None:
    status, result = run_json(capsys, "plan", source, "--target-ratio", 50)
    assert (status, result["error"]["type"]) == (2, "BudgetError")
    assert run_json(capsys, "plan", source, "--target-bytes", "many")[0] == 2
    (tmp_path / "empty.txt").write_text("\n")
    status, result = run_json(capsys, "plan", source, "--target-ratio", 4, "--text", tmp_path / "empty.txt")
    assert status == 2
    assert "no text" in result["error"]["message"]
    assert run_json(capsys, "plan", tmp_path / "nothing", "--target-ratio", 4)[0] == 3
    (tmp_path / "plan.json").write_text("{}")
    status, result = run_json(capsys, "quantize", source, tmp_path / "out", "--plan", tmp_path / "plan.json")
    assert status == 2
    assert "plan.json" in result["error"]["message"]
    with pytest.raises(SystemExit):
        main(["plan", str(source)])


def test_target_bytes(capsys: pytest.CaptureFixture[str], source: Path) -> None:
    size = (source / "model.safetensors").stat().st_size
    assert main(["plan", str(source), "--target-bytes", f"{size // 5}B", "--embeddings", "int4-g64"]) == 0
    out = capsys.readouterr().out
    assert "weights by bits" in out
    assert "int4-g64" in out
