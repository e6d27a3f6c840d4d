"""The bytes of the file that a folded model will be saved in, known before anything is folded."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from bitfold.choosing import Fold
from bitfold.formats import Format
from bitfold.io.safetensors_writer import TensorSpec
from bitfold.io.shards import ShardedWriter
from bitfold.manifest import FORMAT_VERSION, PACKED_KINDS, QUANT_METHOD, bias_owner
from bitfold.nn import PackedModule, TiedEmbedding, TiedHead
from bitfold.nn._base import dtype_from_name, tensor_key

__all__ = ["FileBytes"]

_SHARD_BYTES = 5_000_000_000  # the smallest default among writers of sharded checkpoints: most headers


class FileBytes:
    """What a model's file weighs, by the formats of its matrices.

    For a transformers model the file is that of `save_pretrained` (all weight files; config.json is not
    counted), for any other that of `bitfold.save`, whose header holds the manifest. Tensors are counted
    exactly. So is the header, unless transformers renames tensors on saving, or stores one tensor of several
    that share memory under another of their names: then it is off by the difference of the names' lengths.

    Args:
        model: the model, float or folded in part, also on meta.
        folds: its matrices, as `choosing.choose` lists them.
    """

    def __init__(self, model: nn.Module, folds: Sequence[Fold]) -> None:
        self._model = model
        self._folds = list(folds)
        self._is_hf = hasattr(model, "save_pretrained") and hasattr(model, "config")
        names: dict[nn.Module, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            names.setdefault(module, []).append(name)
        self._first = {module: found[0] for module, found in names.items()}
        self._places = [names[fold.owner.module] for fold in self._folds]
        self._tied_places = [[n for use in fold.tied for n in names[use.module]] for fold in self._folds]
        self._floats, self._aliases = _other_tensors(model, self._folds, names)
        self._entries: dict[tuple[int, str], dict[str, dict[str, Any]]] = {}

    def total(self, formats: Sequence[Format | None]) -> int:
        """Bytes of the file, header included, with `formats[i]` for the i-th fold; None leaves it float."""
        return ShardedWriter.predict(self._specs(formats), _SHARD_BYTES, self._metadata(formats))

    def data(self, formats: Sequence[Format | None]) -> int:
        """Bytes of the tensors alone: `total` less the header."""
        return sum(spec.nbytes for spec in self._specs(formats).values())

    def floats(self) -> list[tuple[str, int]]:
        """Names and bytes of the tensors that stay as they are, largest first."""
        sizes = [(name, spec.nbytes) for name, spec in self._floats.items()]
        return sorted(sizes, key=lambda item: -item[1])

    def cost(self, index: int, fmt: Format) -> int:
        """Bytes that the i-th fold adds to the file: its tensors, and about their part of the header.

        The part of the header depends on how many digits the offsets of the tensors have, and so on all
        other folds. It is taken for offsets of nine digits; the sum of costs is no exact size.
        """
        shape = self._folds[index].owner.shape
        header = sum(
            len(f'"{self._places[index][0]}.weight{suffix}":{{"dtype":"I32","shape":,"data_offsets":[,]}},')
            + len(json.dumps(size, separators=(",", ":")))
            + 2 * 9
            for suffix, _, size in fmt.buffers(shape)
        )
        if not self._is_hf:
            header += len(json.dumps(json.dumps(self._manifest_entries(index, fmt))))
        return fmt.nbytes(shape) + header

    def _specs(self, formats: Sequence[Format | None]) -> dict[str, TensorSpec]:
        specs = dict(self._floats)
        for fold, places, fmt in zip(self._folds, self._places, formats, strict=True):
            shape = fold.owner.shape
            name = f"{places[0]}.weight".removeprefix(".")
            if fmt is None:
                specs[name] = TensorSpec(float_dtype(fold), shape)
                continue
            for suffix, dtype, size in fmt.buffers(shape):
                specs[name + suffix] = TensorSpec(dtype_from_name(dtype, name), tuple(size))
        return specs

    def _metadata(self, formats: Sequence[Format | None]) -> dict[str, str]:
        if self._is_hf:
            return {"format": "pt"}
        modules: dict[str, Any] = dict(self._entries_of_others())
        aliases = dict(self._aliases)
        for i, fmt in enumerate(formats):
            if fmt is not None:
                modules |= self._manifest_entries(i, fmt)
            suffixes = [""] if fmt is None else [s for s, _, _ in fmt.buffers(self._folds[i].owner.shape)]
            first, *others = self._places[i]
            others += self._tied_places[i] if fmt is None else []
            aliases |= {
                f"{n}.weight{suffix}": f"{first}.weight{suffix}" for n in others for suffix in suffixes
            }
        manifest = {"quant_method": QUANT_METHOD, "format_version": FORMAT_VERSION, "modules": modules}
        if aliases:
            manifest["aliases"] = aliases
        return {"format": "pt", "bitfold": json.dumps(manifest)}

    def _entries_of_others(self) -> Iterable[tuple[str, Any]]:
        """Modules that are folded already and that no fold names; there are none in a float model."""
        known = {use.module for fold in self._folds for use in (fold.owner, *fold.tied)}
        for module, name in self._first.items():
            if module in known:
                continue
            if isinstance(module, PackedModule):
                yield name, module.manifest_entry()
            elif isinstance(module, TiedHead | TiedEmbedding):
                yield name, module.manifest_entry(self._first)

    def _manifest_entries(self, index: int, fmt: Format) -> dict[str, dict[str, Any]]:
        key = (index, str(fmt))
        if key not in self._entries:
            self._entries[key] = self._describe(self._folds[index], fmt)
        return self._entries[key]

    def _describe(self, fold: Fold, fmt: Format) -> dict[str, dict[str, Any]]:
        """What the manifest says of one matrix and of those tied to it, from modules made for the purpose."""
        owner = fold.owner.module
        if isinstance(owner, PackedModule):
            packed: PackedModule = owner
        else:
            packed = PACKED_KINDS[fold.owner.kind].empty_like(owner, fmt)
        entries = {self._first[owner]: packed.manifest_entry()}
        names = {**self._first, packed: self._first[owner]}
        for use in fold.tied:
            tied = use.module
            if isinstance(tied, nn.Embedding):
                tied = TiedEmbedding.from_float(tied, packed)
            elif not isinstance(tied, TiedHead | TiedEmbedding):
                tied = TiedHead.from_float(tied, packed, bias_owner(self._model, tied))
            entries[self._first[use.module]] = tied.manifest_entry(names)
        return entries


def float_dtype(fold: Fold) -> Any:
    """The float dtype that the matrix of a fold has, or had before it was folded."""
    module = fold.owner.module
    return module.original_dtype if isinstance(module, PackedModule) else module.weight.dtype


def _other_tensors(
    model: nn.Module, folds: Sequence[Fold], names: dict[nn.Module, list[str]]
) -> tuple[dict[str, TensorSpec], dict[str, str]]:
    """All tensors of the state but those of the folds, and second names of such (alias -> name)."""
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    for fold in folds:
        for use in (fold.owner, *fold.tied):
            packed = isinstance(use.module, PackedModule)
            attributes = use.module.packed_names if packed else ("weight",)
            if use in fold.tied and bias_owner(model, use.module) is not None:
                attributes = ("weight", "bias")
            ignored |= {
                f"{n}.{attribute}".removeprefix(".") for n in names[use.module] for attribute in attributes
            }
    specs: dict[str, TensorSpec] = {}
    aliases: dict[str, str] = {}
    first: dict[Any, str] = {}
    for name, tensor in model.state_dict().items():
        if name in ignored or not isinstance(tensor, Tensor):
            continue
        key = tensor_key(tensor)
        if key in first:
            aliases[name] = first[key]
        else:
            first[key] = name
            specs[name] = TensorSpec.of(tensor)
    return specs, aliases
