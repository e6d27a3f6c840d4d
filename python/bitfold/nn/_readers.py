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
from dataclasses import dataclass

from torch import nn

# Set-up, tying and resizing touch weights as well, but never while the model computes.
_SET_UP = re.compile(
    r"__\w+__|_?init_\w+|_?tie_\w+|[gs]et_(input|output)_embeddings|_?resize_\w+|_?reset_parameters|_?load_\w+"
)
_PLAIN = (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict)
_HARMLESS = {"dtype", "device", "is_meta", "requires_grad"}


@dataclass(frozen=True)
class Reads:
    """Where the methods of a class read weights.

    `own` are paths below the module (`a` or `a.b`, from `self.a.weight`, `self.a.b.weight`);
    `loose` are ends of paths anywhere in the model (`word_embeddings`, from an argument of that name).
    """

    own: frozenset[str]
    loose: frozenset[str]


@functools.cache
def weights_read_by(cls: type[nn.Module]) -> Reads:
    """Which weights the methods of `cls` read. Empty where there is no source.

    Harmless looks (`self.a.weight.dtype`, `isinstance(self.a.weight, …)`) do not count; casting the input
    to `self.a.weight.dtype` does, unless the method knows about int8.
    """
    own: set[str] = set()
    loose: set[str] = set()
    seen: set[str] = set()
    for base in cls.__mro__:
        if not issubclass(base, nn.Module) or base in _PLAIN:
            continue
        for method in _methods(base):
            if method.name not in seen and not _SET_UP.fullmatch(method.name):
                for root, path in _reads(method):
                    if root == "self":
                        own.add(path)
                    else:
                        loose.add(path or root)
            seen.add(method.name)
    return Reads(frozenset(own), frozenset(loose) - {"module", "layer"})


def _methods(cls: type) -> Iterator[ast.FunctionDef]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError, SyntaxError, IndentationError):
        return
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            yield from (item for item in node.body if isinstance(item, ast.FunctionDef))


def _reads(method: ast.FunctionDef) -> Iterator[tuple[str, str]]:
    parents = {child: node for node in ast.walk(method) for child in ast.iter_child_nodes(node)}
    knows_int8 = any(isinstance(node, ast.Attribute) and node.attr == "int8" for node in ast.walk(method))
    for node in ast.walk(method):
        found = _owner_of_weight(node)
        if found is not None and found != ("self", "") and not _harmless(node, parents, knows_int8):
            yield found


def _owner_of_weight(node: ast.AST) -> tuple[str, str] | None:
    """`("self", "a.b")` for an expression `self.a.b.weight` that is read, indices left out; else None."""
    if not (isinstance(node, ast.Attribute) and node.attr == "weight" and isinstance(node.ctx, ast.Load)):
        return None
    path: list[str] = []
    owner: ast.AST = node.value
    while isinstance(owner, ast.Attribute | ast.Subscript):
        if isinstance(owner, ast.Attribute):
            path.insert(0, owner.attr)
        owner = owner.value
    return (owner.id, ".".join(path)) if isinstance(owner, ast.Name) else None


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
