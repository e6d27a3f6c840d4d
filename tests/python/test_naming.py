"""Patterns for modules, and names ready to paste."""

from __future__ import annotations

import re

from torch import nn

from bitfold.naming import as_patterns, paste_ready


def test_names_with_dots_are_taken_literally():
    model = nn.ModuleDict({"ab": nn.Linear(2, 2), "a": nn.ModuleDict({"b": nn.Linear(2, 2)})})
    patterns = as_patterns(model, ["a.b"], {})
    assert patterns.keeps_float(model["a"]["b"])
    assert not patterns.keeps_float(model["ab"])


def test_a_prefix_ends_at_a_dot():
    model = nn.ModuleDict({"layer1": nn.Linear(2, 2), "layer11": nn.Linear(2, 2)})
    patterns = as_patterns(model, ["layer1"], {})
    assert patterns.keeps_float(model["layer1"])
    assert not patterns.keeps_float(model["layer11"])


def test_paste_ready_names_exactly_what_was_given():
    everything = [f"h.{i}.{part}" for i in range(3) for part in ("conv", "fc")] + ["top"]
    assert paste_ready(["h.0.conv", "h.1.conv", "h.2.conv", "top"], everything) == [
        r'r"h\.\d+\.conv"',
        '"top"',
    ]
    # h.2.conv is not among them: no regex
    assert paste_ready(["h.0.conv", "h.1.conv"], everything) == ['"h.0.conv"', '"h.1.conv"']
    assert paste_ready(["h.0.conv"], everything) == ['"h.0.conv"']
    assert all(re.compile(eval(literal)) for literal in paste_ready(["a.0.b", "a.1.b"], ["a.0.b", "a.1.b"]))
