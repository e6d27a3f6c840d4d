"""What a folded model is made of, as JSON, and the way back: empty packed modules from that JSON.

The object is `config.json`'s `quantization_config`, and the `bitfold` metadata of plain safetensors files:

    {"quant_method": "bitfold", "format_version": 1, "modules": {
        "fc":    {"kind": "linear", "format": "nf4", "shape": [64, 128], "dtype": "float32", "bias": true},
        "embed": {"kind": "embedding", "format": "int8-g64", "shape": [1000, 128], "dtype": "float32"},
        "head":  {"kind": "tied_head", "tied_to": "embed", "bias": false}}}

`shape` is `[out, in]` of the matrix, `dtype` the float type it had before folding. Every module stands
under its first name in `named_modules()` only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from bitfold.errors import BitfoldError, PackedDataError
from bitfold.formats import Format
from bitfold.nn import PackedModule, QuantConv1D, QuantEmbedding, QuantLinear, TiedEmbedding, TiedHead
from bitfold.nn._base import dtype_from_name
from bitfold.nn._places import Places, all_names

QUANT_METHOD = "bitfold"
FORMAT_VERSION = 1

PACKED_KINDS: dict[str, type[QuantLinear] | type[QuantEmbedding]] = {
    "linear": QuantLinear,
    "conv1d": QuantConv1D,
    "embedding": QuantEmbedding,
}
TIED_KINDS = ("tied_head", "tied_embedding")


def describe(model: nn.Module) -> dict[str, Any]:
    """The manifest of a folded model; `modules` is empty where nothing is folded.

    Example:
        >>> import bitfold, torch
        >>> model = bitfold.quantize(torch.nn.Sequential(torch.nn.Linear(128, 64)), "nf4", progress=False)
        >>> describe(model)["modules"]["0"]["shape"]
        [64, 128]
    """
    names = {module: name for name, module in model.named_modules()}
    modules: dict[str, dict[str, Any]] = {}
    for module, name in names.items():
        if isinstance(module, PackedModule):
            modules[name] = module.manifest_entry()
        elif isinstance(module, TiedHead | TiedEmbedding):
            if module.source not in names:
                msg = f"{name}: shares the matrix of a module that is not part of this model"
                raise BitfoldError(msg)
            modules[name] = module.manifest_entry(names)
    return {"quant_method": QUANT_METHOD, "format_version": FORMAT_VERSION, "modules": modules}


def check(manifest: Any) -> dict[str, dict[str, Any]]:
    """Validate a manifest read from outside; returns its modules by name.

    Raises PackedDataError naming the module and the field at fault, what was found and what was expected.
    """
    if not isinstance(manifest, Mapping):
        msg = f"manifest: expected a JSON object, found {type(manifest).__name__}"
        raise PackedDataError(msg)
    method = manifest.get("quant_method")
    if method != QUANT_METHOD:
        msg = f"manifest: quant_method is {method!r}, expected {QUANT_METHOD!r}"
        raise PackedDataError(msg)
    version = manifest.get("format_version")
    if type(version) is not int or version < 1:
        msg = f"manifest: format_version is {version!r}, expected an integer from 1 to {FORMAT_VERSION}"
        raise PackedDataError(msg)
    if version > FORMAT_VERSION:
        msg = f"manifest: format_version is {version}, this bitfold reads up to {FORMAT_VERSION}; update it"
        raise PackedDataError(msg)
    modules = manifest.get("modules")
    if not isinstance(modules, Mapping):
        msg = f"manifest: modules is {type(modules).__name__}, expected an object of module entries"
        raise PackedDataError(msg)
    for name, entry in modules.items():
        _check_entry(name, entry, modules)
    return {name: dict(entry) for name, entry in modules.items()}


def tensors(manifest: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Every packed tensor that a file of this model must hold: name -> (dtype name, shape)."""
    table = {}
    for name, entry in check(manifest).items():
        if entry["kind"] in PACKED_KINDS:
            for suffix, type_name, size in Format(entry["format"]).buffers(tuple(entry["shape"])):
                table[f"{name}.weight{suffix}".removeprefix(".")] = (type_name, tuple(size))
    return table


def prepare(model: nn.Module, manifest: Mapping[str, Any], *, missing: str = "raise") -> list[str]:
    """Swap the float modules that `manifest` names for empty packed ones, in place, also on meta.

    All entries are checked before the first swap. Afterwards `load_state_dict` (or transformers' loader)
    finds buffers of the stored names, dtypes and shapes. Packed buffers are on the device of the float
    weight, and the modules run in its dtype; biases are taken over. A module that is packed as its entry
    says already is left alone.

    Args:
        model: a fresh float model. Where it has `base_model_prefix` (transformers), names may carry that
            prefix or lack it, as when a headless model reads a checkpoint with a head.
        manifest: what `describe` returned.
        missing: `"raise"` for names that the model does not have, or `"ignore"`.

    Returns:
        The names that the model does not have.

    Raises:
        PackedDataError: unknown kind, format or version, a name that is not there, a shape that lies.
    """
    swaps, absent = build(model, manifest, missing=missing)
    Places(model).replace(swaps)
    forget_tied_keys(model)
    return absent


def build(
    model: nn.Module, manifest: Mapping[str, Any], *, missing: str = "raise"
) -> tuple[dict[nn.Module, nn.Module], list[str]]:
    """The first half of `prepare`: the swaps to make (old module -> new one), and the absent names."""
    if missing not in ("raise", "ignore"):
        msg = f"prepare(): missing must be 'raise' or 'ignore', got {missing!r}"
        raise ValueError(msg)
    entries = check(manifest)
    found = all_names(model)
    resolved = {name: _resolve(name, model, found) for name in entries}
    absent = [name for name, module in resolved.items() if module is None]
    if absent and missing == "raise":
        raise PackedDataError(
            f"{absent[0]}: named by the manifest but not a module of {type(model).__name__}"
            + (f" (nor are {len(absent) - 1} others)" if len(absent) > 1 else "")
            + "; is this the architecture that was folded?"
        )
    swaps: dict[nn.Module, nn.Module] = {}
    for name, entry in entries.items():
        module = resolved[name]
        if module is not None and entry["kind"] in PACKED_KINDS and not _is_packed_so(name, module, entry):
            swaps[module] = _build(name, module, entry)
    for name, entry in entries.items():
        module = resolved[name]
        if (
            module is not None
            and entry["kind"] in TIED_KINDS
            and not isinstance(module, TiedHead | TiedEmbedding)
        ):
            source = resolved[entry["tied_to"]]
            if source is None:
                msg = f"{name}: tied to {entry['tied_to']}, which {type(model).__name__} does not have"
                raise PackedDataError(msg)
            swaps[module] = _build_tied(name, module, entry, swaps.get(source, source), model)
    return swaps, absent


def _check_entry(name: str, entry: Any, modules: Mapping[str, Any]) -> None:
    if not isinstance(entry, Mapping):
        msg = f"{name}: manifest entry is {type(entry).__name__}, expected an object"
        raise PackedDataError(msg)
    kind = entry.get("kind")
    if kind not in PACKED_KINDS and kind not in TIED_KINDS:
        allowed = ", ".join([*PACKED_KINDS, *TIED_KINDS])
        msg = f"{name}: kind is {kind!r}, expected one of {allowed}"
        raise PackedDataError(msg)
    if kind in TIED_KINDS:
        source = entry.get("tied_to")
        target = modules.get(source) if isinstance(source, str) else None
        if not isinstance(target, Mapping) or target.get("kind") not in PACKED_KINDS:
            msg = f"{name}: tied_to is {source!r}, expected the name of a packed module"
            raise PackedDataError(msg)
        return
    shape = entry.get("shape")
    if not (
        isinstance(shape, list | tuple)
        and len(shape) == 2
        and all(type(size) is int and size >= 1 for size in shape)
    ):
        msg = f"{name}: shape is {shape!r}, expected [out, in] of two positive integers"
        raise PackedDataError(msg)
    if not isinstance(entry.get("format"), str):
        msg = f"{name}: format is {entry.get('format')!r}, expected a string such as 'nf4'"
        raise PackedDataError(msg)
    try:
        Format(entry["format"]).buffers(tuple(shape))
    except (ValueError, OverflowError) as error:
        msg = f"{name}: format {entry['format']!r} with shape {shape}: {error}"
        raise PackedDataError(msg) from error
    if "dtype" in entry:
        dtype_from_name(entry["dtype"], name)


def _resolve(name: str, model: nn.Module, found: Mapping[str, nn.Module]) -> nn.Module | None:
    if name in found:
        return found[name]
    prefix = getattr(model, "base_model_prefix", "")
    if not prefix:
        return None
    return found.get(name.removeprefix(prefix + ".")) or found.get(f"{prefix}.{name}")


def _is_packed_so(name: str, module: nn.Module, entry: Mapping[str, Any]) -> bool:
    """True for a module that is packed as `entry` says; PackedDataError for one that is packed otherwise."""
    if not isinstance(module, PackedModule):
        return False
    has = (module.kind, str(module.format), list(module.shape))
    wants = (entry["kind"], str(Format(entry["format"])), list(entry["shape"]))
    if has != wants:
        msg = f"{name}: the model has it packed as {has}, the manifest says {wants}"
        raise PackedDataError(msg)
    return True


def _build(name: str, module: Any, entry: Mapping[str, Any]) -> PackedModule:
    kind = entry["kind"]
    if not PACKED_KINDS[kind].replaces(module):
        msg = f"{name}: the manifest says {kind}, the model has a {type(module).__name__} there"
        raise PackedDataError(msg)
    weight = module.weight
    actual = list(weight.shape)[:: -1 if kind == "conv1d" else 1]
    if actual != list(entry["shape"]):
        msg = f"{name}: the manifest says shape {entry['shape']}, the model has {actual}"
        raise PackedDataError(msg)
    original = dtype_from_name(entry["dtype"], name) if "dtype" in entry else None
    if kind == "embedding":
        return QuantEmbedding.empty_like(
            module, entry["format"], original, stored_scale=_stored_scale(name, entry)
        )
    has_bias = module.bias is not None
    if "bias" in entry and bool(entry["bias"]) != has_bias:
        msg = f"{name}: the manifest says bias={entry['bias']}, the model has bias={has_bias}"
        raise PackedDataError(msg)
    return PACKED_KINDS[kind].empty_like(module, entry["format"], original)


def _build_tied(
    name: str,
    module: nn.Module,
    entry: Mapping[str, Any],
    source: nn.Module,
    model: nn.Module,
) -> nn.Module:
    if not isinstance(source, PackedModule):
        msg = f"{name}: tied to {entry['tied_to']}, which is a {type(source).__name__}, not packed"
        raise PackedDataError(msg)
    if entry["kind"] == "tied_embedding":
        if not isinstance(module, nn.Embedding):
            msg = f"{name}: the manifest says tied_embedding, the model has {type(module).__name__}"
            raise PackedDataError(msg)
        return TiedEmbedding.from_float(module, source, stored_scale=_stored_scale(name, entry))
    if not isinstance(module, nn.Linear):
        msg = f"{name}: the manifest says tied_head, the model has {type(module).__name__}"
        raise PackedDataError(msg)
    return TiedHead.from_float(module, source, bias_owner(model, module, entry.get("bias"), name))


def bias_owner(
    model: nn.Module, head: nn.Module, stored: Any = None, head_name: str = ""
) -> tuple[nn.Module, str] | None:
    """`(module, attribute)` of another module that owns the bias parameter of `head`, or None.

    `stored` is the parameter's name in the manifest, which wins: on meta, before tying, two parameters
    that will be one are still two.
    """
    if isinstance(stored, str):
        owner_name, _, attribute = stored.rpartition(".")
        owner = _resolve(owner_name, model, all_names(model))
        if owner is None or not isinstance(getattr(owner, attribute, None), torch.Tensor):
            msg = f"{head_name}: bias is {stored!r}, which is not a parameter of the model"
            raise PackedDataError(msg)
        return owner, attribute
    if getattr(head, "bias", None) is None:
        return None
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            if parameter is head.bias and module is not head:
                return module, attribute
    return None


def _stored_scale(name: str, entry: Mapping[str, Any]) -> tuple[float, bool] | None:
    if "scale" not in entry:
        return None
    if not isinstance(entry["scale"], int | float) or isinstance(entry["scale"], bool):
        msg = f"{name}: scale is {entry['scale']!r}, expected a number"
        raise PackedDataError(msg)
    return float(entry["scale"]), bool(entry.get("round_scale", False))


def forget_tied_keys(model: nn.Module) -> None:
    """Drop packed modules from transformers' maps of tied weights: it ties parameters and dies on buffers."""
    for module in model.modules():
        tied = getattr(module, "all_tied_weights_keys", None)
        if not isinstance(tied, dict) or not tied:
            continue
        owners = all_names(module)
        packed = {
            name
            for name, owner in owners.items()
            if isinstance(owner, PackedModule | TiedHead | TiedEmbedding)
        }
        left = {
            target: source
            for target, source in tied.items()
            if target.rpartition(".")[0] not in packed and source.rpartition(".")[0] not in packed
        }
        setattr(module, "all_tied_weights_keys", left)  # noqa: B010 (a plain attribute, no tensor or module)
