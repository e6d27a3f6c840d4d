"""Which children's `.weight` a module reads itself, instead of calling the child.

`nn.MultiheadAttention`, `nn.TransformerEncoderLayer`'s fast path, Mamba mixers, SAM's tokens and many others
do so; they would compute with packed bytes. The class's source tells: no list of names would stay complete.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Iterator

from torch import nn

# Set-up, tying and resizing touch weights as well, but never while the model computes.
_SET_UP = re.compile(
    r"__\w+__|_?init_\w+|_?tie_\w+|get_\w+|set_\w+|_?resize_\w+|_?reset_parameters|_?load_\w+"
)
_HARMLESS = {"dtype", "device", "is_meta", "requires_grad"}


@functools.cache
def weights_read_by(cls: type[nn.Module]) -> frozenset[str]:
    """Names of the attributes `a` of `cls` where its methods read `self.a.weight` (or `self.a[i].weight`).

    Harmless looks (`self.a.weight.dtype`, `isinstance(self.a.weight, …)`) do not count; casting the input
    to `self.a.weight.dtype` does, unless the method knows about int8. Empty where there is no source.
    """
    found: set[str] = set()
    seen: set[str] = set()
    for base in cls.__mro__:
        if base in (nn.Module, object) or not issubclass(base, nn.Module):
            continue
        if base in (nn.Sequential, nn.ModuleList, nn.ModuleDict):
            continue
        for method in _methods(base):
            if method.name not in seen and not _SET_UP.fullmatch(method.name):
                found.update(_reads(method))
            seen.add(method.name)
    return frozenset(found)


def _methods(cls: type) -> Iterator[ast.FunctionDef]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError, SyntaxError, IndentationError):
        return
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            yield from (item for item in node.body if isinstance(item, ast.FunctionDef))


def _reads(method: ast.FunctionDef) -> Iterator[str]:
    parents = {child: node for node in ast.walk(method) for child in ast.iter_child_nodes(node)}
    knows_int8 = any(isinstance(node, ast.Attribute) and node.attr == "int8" for node in ast.walk(method))
    for node in ast.walk(method):
        child = _child_of_self(node)
        if child is not None and not _harmless(node, parents, knows_int8):
            yield child


def _child_of_self(node: ast.AST) -> str | None:
    """`a` for an expression `self.a.weight` or `self.a[…].weight` that is read, else None."""
    if not (isinstance(node, ast.Attribute) and node.attr == "weight" and isinstance(node.ctx, ast.Load)):
        return None
    owner = node.value
    if isinstance(owner, ast.Subscript):
        owner = owner.value
    if isinstance(owner, ast.Attribute) and isinstance(owner.value, ast.Name) and owner.value.id == "self":
        return owner.attr
    return None


def _harmless(node: ast.AST, parents: dict[ast.AST, ast.AST], knows_int8: bool) -> bool:
    parent = parents.get(node)
    if isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name):
        return parent.func.id in ("isinstance", "hasattr")
    if isinstance(parent, ast.Compare):
        return all(isinstance(operator, ast.Is | ast.IsNot) for operator in parent.ops)
    if not (isinstance(parent, ast.Attribute) and parent.attr in _HARMLESS):
        return False
    call = parents.get(parent)
    casts = (
        parent.attr == "dtype"
        and isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.func.attr == "to"
    )
    return knows_int8 or not casts
