"""A process that does not import bitfold must not get a random model: loading fails, whatever the format."""

from __future__ import annotations

import json
import textwrap
from typing import Any

import pytest
import tiny_models
from test_round_trip import FORMATS

import bitfold

LOAD = """
    import json, sys
    import transformers, tiny_models
    transformers.logging.set_verbosity_error()

    outcome = {}
    for key, (directory, auto) in json.loads(sys.argv[1]).items():
        try:
            getattr(transformers, auto).from_pretrained(directory)
        except Exception as error:
            outcome[key] = [type(error).__name__, str(error)]
        else:
            outcome[key] = None
    assert "bitfold" not in sys.modules
    print(json.dumps(outcome))
"""

# Every format for linear layers; each architecture once, with embeddings folded or left alone.
CASES = {
    **{fmt: ("llama", fmt, None) for fmt in FORMATS},
    **{
        f"embeddings-{fmt}": ("llama-tied", "nf4", fmt)
        for fmt in ("nf4", "int8-row", "int4-g64", "kmeans2-row")
    },
    **{name: (name, "int8-row", "int8-g64") for name in tiny_models.MODELS},
}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory, run_script: Any) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("folded")
    jobs = {}
    for key, (name, fmt, embeddings) in CASES.items():
        model = bitfold.quantize(tiny_models.make(name), fmt, embeddings=embeddings, progress=False)
        model.save_pretrained(root / key)
        jobs[key] = (str(root / key), tiny_models.MODELS[name].auto_class)
    return run_script(textwrap.dedent(LOAD), json.dumps(jobs))


@pytest.mark.parametrize("key", CASES)
def test_loading_without_bitfold_fails(key, outcome):
    assert outcome[key] is not None, "a random model was handed out"
    kind, message = outcome[key]
    assert kind in ("RuntimeError", "ValueError")
    assert "mismatch" in message or "size" in message
