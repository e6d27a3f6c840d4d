"""`bitfold.load` and `bitfold.save_pretrained`: a folded transformers model from and to a directory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from bitfold.errors import BitfoldError, PackedDataError
from bitfold.hf.checks import folded_modules
from bitfold.manifest import QUANT_METHOD

__all__ = ["load", "save_pretrained"]

_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


def load(path: str | os.PathLike[str], **options: Any) -> Any:
    """Load a folded transformers model, in the class that it was saved from.

    `AutoModelForCausalLM.from_pretrained(path)` and its like do the same where the class is known; this
    picks it from `architectures` in config.json.

    Args:
        path: directory that `bitfold.save_pretrained`, `model.save_pretrained` or `bitfold quantize` wrote,
            or the name of such a repository on the Hub.
        **options: passed to `from_pretrained`: `device_map`, `dtype` (default `"auto"`: as saved),
            `trust_remote_code`, `attn_implementation`, `revision`, …

    Returns:
        The model, in evaluation mode, weights packed.

    Raises:
        BitfoldError: transformers is not installed, no folded model is there, or its class is unknown.
        PackedDataError: files that are truncated or do not fit config.json.

    Example:
        >>> model = bitfold.load("llama-nf4", device_map="auto")  # doctest: +SKIP
    """
    transformers = _transformers()
    name = os.fspath(path)
    directory = Path(name) / options.get("subfolder", "")
    if directory.is_dir():
        _check_checkpoint(directory, options)
    elif Path(name).is_file():
        msg = f"{name}: is a file, expected a model directory; for plain torch models use bitfold.load_into"
        raise BitfoldError(msg)
    elif Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:  # no name on the Hub
        msg = f"{name}: no such directory; expected one that save_pretrained or `bitfold quantize` wrote"
        raise BitfoldError(msg)
    config = _config(transformers, name, options)
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method != QUANT_METHOD:
        msg = (
            f"{name}: quant_method in config.json is {method!r}, expected {QUANT_METHOD!r}; to fold a "
            "float model use from_pretrained(…, quantization_config=bitfold.BitfoldConfig('nf4')), or "
            "`bitfold quantize` for a folder"
        )
        raise BitfoldError(msg)
    if "torch_dtype" not in options:
        options.setdefault("dtype", "auto")
    return _model_class(transformers, name, config).from_pretrained(name, **options)


def save_pretrained(
    model: Any,
    directory: str | os.PathLike[str],
    tokenizer: Any = None,
    *,
    overwrite: bool = True,
    **options: Any,
) -> None:
    """Save a folded transformers model as a directory that is there whole or not at all.

    Writes what `model.save_pretrained` writes (safetensors, config.json with `model_type` and the formats,
    generation config, remote code), the tokenizer, and a model card (README.md) with the table of bytes.

    Args:
        model: a folded `PreTrainedModel`.
        directory: created, or replaced as a whole: nothing of an older content remains in it. One with
            other things in it but no config.json is refused.
        tokenizer: tokenizer or processor (anything with `save_pretrained`) to save along.
        overwrite: False refuses a directory that has something in it.
        **options: passed to `model.save_pretrained`, such as `max_shard_size="2GB"`.

    Raises:
        BitfoldError: not a transformers model, one with nothing folded, or `push_to_hub` among the options.
        FileExistsError: `directory` may not be replaced.
        OSError: writing failed; `directory` is then as it was.

    Example:
        >>> bitfold.save_pretrained(model, "llama-nf4", tokenizer=tokenizer)  # doctest: +SKIP
    """
    from bitfold.hf.model_card import model_card
    from bitfold.io.atomic import atomic_directory
    from bitfold.quantizing import record

    if not hasattr(model, "save_pretrained") or not hasattr(model, "config"):
        msg = (
            f"save_pretrained: expected a transformers model, got {type(model).__name__}; "
            "for plain torch models use bitfold.save(model, file)"
        )
        raise BitfoldError(msg)
    if next(folded_modules(model), None) is None:
        msg = (
            f"save_pretrained: nothing in this {type(model).__name__} is folded; call bitfold.quantize first"
        )
        raise BitfoldError(msg)
    if options.pop("push_to_hub", False):
        msg = "save_pretrained: push_to_hub is not done from here; call model.push_to_hub(repo_id)"
        raise BitfoldError(msg)
    record(model)  # a part of the model may have been folded by itself, and the record stand there
    with atomic_directory(directory, overwrite, marker="config.json") as temporary:
        model.save_pretrained(temporary, **options)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        name = Path(os.path.realpath(directory)).name
        (temporary / "README.md").write_text(model_card(model, name), encoding="utf-8")


def _check_checkpoint(directory: Path, options: dict[str, Any]) -> None:
    """Raise PackedDataError for shards that are missing, truncated or do not belong together."""
    from bitfold.io.shards import Checkpoint

    if "variant" not in options and (directory / "config.json").is_file():
        Checkpoint(directory).close()


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        msg = "transformers is not installed; pip install 'bitfold[hf]'"
        raise BitfoldError(msg) from error
    return transformers


def _config(transformers: Any, name: str, options: dict[str, Any]) -> dict[str, Any]:
    """config.json of a directory or of a Hub repository, as a dict."""
    if Path(name).is_dir() and not (Path(name) / options.get("subfolder", "") / "config.json").is_file():
        msg = f"{name}: has no config.json; expected a directory that save_pretrained wrote"
        raise BitfoldError(msg)
    hub = {key: options[key] for key in _HUB_OPTIONS if key in options}
    try:
        config, _ = transformers.PretrainedConfig.get_config_dict(name, **hub)
    except OSError as error:
        msg = f"{name}: no such directory, and no config.json of that name on the Hub: {error}"
        raise BitfoldError(msg) from error
    return config


def _model_class(transformers: Any, name: str, config: dict[str, Any]) -> Any:
    """The class whose `from_pretrained` to call: the one saved, or the Auto class that finds its code."""
    architectures = config.get("architectures") or []
    if not architectures:
        msg = f"{name}: config.json names no architectures; load it with the class that was saved"
        raise PackedDataError(msg)
    architecture = str(architectures[0])
    for auto_class, reference in (config.get("auto_map") or {}).items():
        # "modeling_x.XForCausalLM", or a list of such (slow and fast tokenizers)
        if isinstance(reference, str) and reference.rpartition(".")[2] == architecture:
            found = getattr(transformers, auto_class, None)
            if found is not None:
                return found
    found = getattr(transformers, architecture, None)
    if found is None:
        msg = (
            f"{name}: architecture {architecture!r} is not part of transformers "
            f"{transformers.__version__}; load it with the class that defines it, or install a "
            f"transformers that has it"
        )
        raise BitfoldError(msg)
    return found
