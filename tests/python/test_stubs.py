"""_C.pyi names what the native module has, no more and no less."""

import ast
from pathlib import Path

import bitfold
from bitfold import _C

STUB = Path(bitfold.__file__).with_name("_C.pyi")


def public(names) -> set[str]:
    return {name for name in names if not name.startswith("_")}


def test_stub_lists_the_module():
    tree = ast.parse(STUB.read_text())
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    assert functions | set(classes) == public(dir(_C))
    for name, node in classes.items():
        members = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
        assert public(members) == public(vars(getattr(_C, name)))
