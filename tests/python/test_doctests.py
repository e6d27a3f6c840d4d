"""Every example in a public docstring runs."""

import doctest
import importlib
import pkgutil

import pytest
import torch

import bitfold

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(bitfold.__path__, "bitfold.")
    if not module.name.endswith("__main__") and module.name not in ("bitfold._ops", "bitfold._ops_cuda")
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # examples that save something write here
    torch.manual_seed(0)
    module = importlib.import_module(name)
    failed, _ = doctest.testmod(module, extraglobs={"torch": torch, "bitfold": bitfold})
    if name == "bitfold.formats":  # the native class carries its own
        finder = doctest.DocTestFinder()
        runner = doctest.DocTestRunner()
        for test in finder.find(bitfold.Format, "Format", globs={"bitfold": bitfold}):
            failed += runner.run(test).failed
    assert failed == 0
