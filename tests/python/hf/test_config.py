"""BitfoldConfig: both of its kinds, to JSON and back."""

from __future__ import annotations

import json

import pytest

import bitfold
from bitfold.errors import FormatError


def test_recipe_to_json_and_back():
    config = bitfold.BitfoldConfig(
        bitfold.Format("nf4"), embeddings=None, skip=["lm_head"], rules={r"mlp\..*": "int8-row", "x": None}
    )
    stored = json.loads(json.dumps(config.to_dict()))
    assert stored["quant_method"] == "bitfold"
    again = bitfold.BitfoldConfig.from_dict(stored)
    assert again.to_dict() == config.to_dict()
    assert again.is_recipe
    assert (again.format, again.embeddings, again.skip) == ("nf4", None, ["lm_head"])
    assert again.rules == {r"mlp\..*": "int8-row", "x": None}


def test_manifest_passes_through_with_keys_it_does_not_know():
    stored = {
        "quant_method": "bitfold",
        "format_version": 1,
        "modules": {"a": {"kind": "linear", "format": "nf4", "shape": [8, 64]}},
        "of_a_later_version": {"x": [1, 2]},
    }
    config = bitfold.BitfoldConfig.from_dict(stored)
    assert not config.is_recipe
    assert config.to_dict() == stored
    assert dict(config) == stored
    config.to_dict()["modules"].clear()
    assert config.to_dict() == stored


def test_repr_and_json_string_work_for_both():
    recipe = bitfold.BitfoldConfig("nf4")
    folded = bitfold.BitfoldConfig(modules={}, format_version=1)
    assert "nf4" in repr(recipe)
    assert "0 folded modules" in repr(folded)
    assert json.loads(recipe.to_json_string())["format"] == "nf4"
    assert json.loads(folded.to_json_string())["modules"] == {}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({}, "no format given"),
        ({"format": "nf5"}, "nf5"),
        ({"format": "NF4"}, "did you mean 'nf4'"),
        ({"format": "nf4", "embeddings": "int99"}, "int99"),
        ({"format": "nf4", "rules": {"a": "nope"}}, "nope"),
        ({"format": "nf4", "skip": "lm_head"}, "skip must be a list"),
    ],
)
def test_mistakes_are_named(arguments, named):
    with pytest.raises(FormatError, match=named):
        bitfold.BitfoldConfig(**arguments)
