"""Model cards: written by save_pretrained, and put into what push_to_hub uploads. No network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
from huggingface_hub import ModelCard

import bitfold
from bitfold.hf.model_card import model_card, update_card


@pytest.fixture
def folded():
    return bitfold.quantize(tiny_models.make("llama-tied"), "nf4", progress=False)


def test_card_tells_the_bytes_that_the_file_has(folded, tmp_path):
    bitfold.save_pretrained(folded, tmp_path / "my-model")
    card = ModelCard.load(tmp_path / "my-model" / "README.md")
    assert card.data.library_name == "transformers"
    assert {"bitfold", str(bitfold.Format("nf4")), str(bitfold.Format("int8-g64"))} <= set(card.data.tags)
    assert "# my-model" in card.text
    rows = {
        line.split("|")[1].strip(): line.split("|")
        for line in card.text.splitlines()
        if line.startswith("| ")
    }
    total = bitfold.summary(folded).total
    assert rows["whole model"][4].strip() == f"{total.disk / 2**20:.2f} MiB"
    assert (
        abs((tmp_path / "my-model" / "model.safetensors").stat().st_size - total.disk) < 16 * 1024
    )  # header


def test_update_keeps_what_others_wrote_and_replaces_its_own(folded, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("---\nlicense: mit\ntags:\n- mine\n---\n# Own words\n\nBy hand.\n")
    update_card(folded, readme, "me/first")
    update_card(folded, readme, "me/second")
    card = ModelCard.load(readme)
    assert card.data.license == "mit"
    assert card.data.tags[:2] == ["mine", "bitfold"]
    assert len(card.data.tags) == len(set(card.data.tags))
    assert "By hand." in card.text
    assert "me/second" in card.text
    assert "me/first" not in card.text
    assert card.text.count("| whole model |") == 1


def test_update_makes_a_card_where_there_is_none(folded, tmp_path):
    update_card(folded, tmp_path / "README.md", "me/model")
    assert (tmp_path / "README.md").read_text() == model_card(folded, "me/model")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A Hub that keeps what is committed to it."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import EntryNotFoundError
    from transformers.utils import hub as module

    uploaded: dict[str, Any] = {}

    class Repo(str):
        repo_id = "me/folded"

    class Absent(EntryNotFoundError):
        def __init__(self) -> None:
            Exception.__init__(self, "no such file")

    def no_card(*args: Any, **kwargs: Any) -> None:
        raise Absent

    def commit(self: Any, repo_id: str, operations: Any, **kwargs: Any) -> str:
        for operation in operations:
            content = operation.path_or_fileobj
            uploaded[operation.path_in_repo] = (
                Path(content).read_bytes() if isinstance(content, str) else content
            )
        return "commit"

    def create(self: Any = None, *args: Any, **kwargs: Any) -> Repo:
        return Repo("me/folded")

    monkeypatch.setattr(HfApi, "create_repo", create)
    monkeypatch.setattr(HfApi, "create_commit", commit)
    for name, replacement in (
        ("create_repo", lambda *a, **k: Repo("me/folded")),
        ("create_commit", lambda *a, **k: commit(None, *a, **k)),
        ("create_branch", lambda *a, **k: None),
    ):
        if hasattr(module, name):  # transformers 4 and 5.17 import the functions
            monkeypatch.setattr(module, name, replacement)
    monkeypatch.setattr(ModelCard, "load", no_card)
    return uploaded


def test_push_to_hub_uploads_the_table(folded, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folded.push_to_hub("me/folded")
    text = hub["README.md"].decode()
    assert "| whole model |" in text
    assert 'bitfold.load("me/folded")' in text
    assert "- bitfold" in text
    assert "model.safetensors" in hub


def test_save_pretrained_with_push_uploads_the_table(folded, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folded.save_pretrained("folded", push_to_hub=True)
    assert "| whole model |" in hub["README.md"].decode()


def test_float_models_are_pushed_as_before(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_models.make("llama").push_to_hub("me/float")
    assert b"bitfold" not in hub["README.md"]
