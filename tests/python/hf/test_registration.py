"""Registration: without importing transformers, in both orders, once."""

from __future__ import annotations

import importlib
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import pytest

from bitfold.hf import postimport


def test_importing_bitfold_imports_no_optional_package(run_script):
    code = """
        import json, sys
        import numpy, torch
        before = set(sys.modules)
        import bitfold
        heavy = ["transformers", "peft", "accelerate", "huggingface_hub", "safetensors", "rich", "tqdm"]
        print(json.dumps([name for name in heavy if name in sys.modules and name not in before]))
    """
    assert run_script(textwrap.dedent(code)) == []


ORDERS = {
    "bitfold first": "import bitfold; import transformers",
    "transformers first": "import transformers; import bitfold",
    "quantizers loaded first": "import transformers.quantizers.auto; import bitfold",
    "from a model module": "import bitfold; from transformers import BertModel",
    "config first": "import bitfold; bitfold.BitfoldConfig",
    "quantizer module first": "import bitfold; from bitfold.hf import quantizer",
    "twice": "import bitfold; from bitfold.hf.registration import install; install(); import transformers",
}


@pytest.mark.parametrize("order", ORDERS)
def test_registered_in_every_order_of_imports(order, run_script):
    code = """
        import json
        from transformers.quantizers import auto
        from bitfold import quantizing
        from bitfold.hf.quantizer import BitfoldQuantizer
        print(json.dumps([
            auto.AUTO_QUANTIZER_MAPPING.get("bitfold") is BitfoldQuantizer,
            auto.AUTO_QUANTIZATION_CONFIG_MAPPING.get("bitfold") is bitfold.BitfoldConfig,
            [hook.__name__ for hook in quantizing.AFTER_FOLDING],
        ]))
    """
    once = ["keep_packed_on_save", "release_ties"]
    assert run_script(ORDERS[order] + "\n" + textwrap.dedent(code)) == [True, True, once]


def test_a_transformers_that_cannot_be_registered_with_still_imports(run_script):
    code = """
        import json, warnings
        import bitfold.hf.registration as registration
        import transformers.quantizers.auto
        from types import ModuleType
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            registration._register(ModuleType("auto"))  # has no registries
        print(json.dumps([str(item.message) for item in caught if item.category is RuntimeWarning]))
    """
    messages = run_script(textwrap.dedent(code))
    assert len(messages) == 1
    assert "bitfold could not register with transformers" in messages[0]


@pytest.fixture
def module_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Write importable modules; forgotten again after the test."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name: str, text: str = "value = 1\n") -> str:
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
        importlib.invalidate_caches()
        return name

    return write


def test_callback_runs_once_right_after_the_module(module_file):
    name = module_file("bitfold_test_late")
    seen: list[ModuleType] = []
    postimport.after_import(name, seen.append)
    assert seen == []
    module = importlib.import_module(name)
    assert seen == [module]
    assert module.value == 1
    importlib.reload(module)
    assert seen == [module]


def test_callback_runs_at_once_for_a_loaded_module(module_file):
    module = importlib.import_module(module_file("bitfold_test_loaded"))
    seen: list[ModuleType] = []
    postimport.after_import("bitfold_test_loaded", seen.append)
    assert seen == [module]


def test_loader_of_the_module_stays_its_own(module_file):
    import inspect

    name = module_file("bitfold_test_source", "def f():\n    return 2\n")
    postimport.after_import(name, lambda module: None)
    module = importlib.import_module(name)
    assert "return 2" in inspect.getsource(module.f)


def test_a_module_that_fails_keeps_waiting(module_file):
    name = module_file("bitfold_test_broken", "raise OSError('no')\n")
    seen: list[ModuleType] = []
    postimport.after_import(name, seen.append)
    with pytest.raises(OSError, match="no"):
        importlib.import_module(name)
    module_file(name)
    importlib.import_module(name)
    assert len(seen) == 1


def test_a_name_that_never_comes_is_an_ordinary_import_error():
    postimport.after_import("bitfold_test_absent", lambda module: None)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("bitfold_test_absent")
