"""What there is to choose from: formats from small to large, and matrices that take one choice together."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from bitfold.choosing import Choice, Fold
from bitfold.errors import FormatError
from bitfold.formats import Format, as_format

__all__ = ["LADDER", "Group", "group_folds", "ladder"]

# Formats of which none is beaten in bits and in squared error by another one, or hardly, measured with
# searched scales on Gaussian, Student-t and language model weights: relative squared error 0.119, 0.106,
# 0.090 at two bits, 0.032, 0.027, 0.020 at three, 0.0087, 0.0062, 0.0045 at four, 0.00006 at eight.
LADDER = (
    "int2-g64-dq", "int2-g64-fz-dq", "int2-g32-fz-dq", "int3-g64-dq", "int3-g32-dq", "int3-g16-dq",
    "nf4", "int4-g32-dq", "int4-g16-dq", "int8-row",
)  # fmt: skip

# Embeddings and output heads are rare tokens' only memory: below this only where the budget needs it.
TABLE_BITS = 4

_SAME_INPUT = (
    ({"q_proj", "k_proj", "v_proj"}, "qkv"),
    ({"query", "key", "value"}, "qkv"),
    ({"query_proj", "key_proj", "value_proj"}, "qkv"),
    ({"q_lin", "k_lin", "v_lin"}, "qkv"),
    ({"q", "k", "v"}, "qkv"),
    ({"to_q", "to_k", "to_v"}, "qkv"),
    ({"wq", "wk", "wv"}, "qkv"),
    ({"gate_proj", "up_proj"}, "gate_up"),
    ({"wi_0", "wi_1"}, "gate_up"),
    ({"w1", "w3"}, "gate_up"),
)
_EXPERT = re.compile(r"(.*\bexperts)\.\d+\.(.*)")


@dataclass
class Group:
    """Matrices that take one choice together.

    Attributes:
        name: of the first of them.
        members: positions in the list of folds.
        formats: what there is to choose from; one where a rule has decided.
    """

    name: str
    members: list[int]
    formats: list[Format]


def ladder(formats: Iterable[Format | str] | None, min_bits: int, max_bits: int) -> list[Format]:
    """The formats named, or those of `LADDER`, with element codes of `min_bits` to `max_bits` bits.

    Raises FormatError for a bad one, ValueError where none is left.
    """
    if isinstance(formats, str):
        msg = f"formats must be a list of formats, got the string {formats!r}; write formats=[{formats!r}]"
        raise TypeError(msg)
    listed = [as_format(fmt) for fmt in (LADDER if formats is None else formats)]
    found = [fmt for fmt in dict.fromkeys(listed) if min_bits <= fmt.bits <= max_bits]
    if not found:
        msg = (
            f"no format of {min_bits} to {max_bits} bits among {', '.join(map(str, listed)) or 'none'}; "
            "expected min_bits <= max_bits between 2 and 8, and formats in that range"
        )
        raise ValueError(msg)
    return found


def group_folds(
    model: nn.Module,
    choice: Choice,
    linear: Sequence[Format],
    embedding: Sequence[Format],
    head: Sequence[Format],
) -> list[Group]:
    """Share the matrices of a choice out to groups.

    Matrices that a fused kernel would read together are told by their names: queries, keys and values of
    one attention, gate and up projections of one block, the same projection of all experts. They must have
    one parent (experts: one list) and as many input features.

    Args:
        model: the model.
        choice: what is folded; a fold with `explicit` set keeps its format.
        linear: candidates for linear layers.
        embedding: candidates for embeddings, tied to a head or not.
        head: candidates for the output head that transformers models name.
    """
    heads = _output_heads(model)
    groups: dict[object, Group] = {}
    for i, fold in enumerate(choice.folds):
        uses = (fold.owner, *fold.tied)
        if fold.explicit:
            formats = [fold.format]
        elif any(use.kind == "embedding" for use in uses):
            formats = _possible(embedding, fold)
        else:
            formats = _possible(head if any(use.module in heads for use in uses) else linear, fold)
        key = (_fusion_key(fold), tuple(map(str, formats)))
        if key in groups:
            groups[key].members.append(i)
        else:
            groups[key] = Group(fold.owner.name, [i], formats)
    return list(groups.values())


def _fusion_key(fold: Fold) -> object:
    name = fold.owner.name
    expert = _EXPERT.fullmatch(name)
    if expert:
        name = f"{expert[1]}.*.{expert[2]}"
    parent, _, leaf = name.rpartition(".")
    role = next((role for leaves, role in _SAME_INPUT if leaf in leaves), None)
    if role is None and not expert:
        return name
    return parent, role or leaf, fold.owner.shape[1]


def _output_heads(model: nn.Module) -> set[nn.Module]:
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    return {head} if isinstance(head, nn.Module) else set()


def _possible(formats: Sequence[Format], fold: Fold) -> list[Format]:
    """Those that can store a matrix of this shape."""
    shape, found, reason = fold.owner.shape, [], ""
    for fmt in formats:
        try:
            fmt.buffers(shape)
            found.append(fmt)
        except FormatError as error:
            reason = str(error)
    if not found:
        msg = f"{fold.owner.name}: none of {', '.join(map(str, formats))} can store {list(shape)}: {reason}"
        raise FormatError(msg)
    return found
