"""BitfoldConfig: what `quantization_config` in config.json says, and the recipe for folding at load."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from bitfold.errors import FormatError
from bitfold.formats import Format, as_format
from bitfold.hf.registration import resume
from bitfold.manifest import QUANT_METHOD

__all__ = ["BitfoldConfig"]


class BitfoldConfig(QuantizationConfigMixin):
    """How to fold a float model while transformers loads it, or what a folded model is made of.

    Users make the first kind: `AutoModel.from_pretrained(dir, quantization_config=BitfoldConfig("nf4"))`
    loads the float model and then folds it in place, so the peak of memory is that of the float model (to
    stay below it, fold a folder with `bitfold quantize SRC OUT`). transformers makes the second kind out of
    a config.json.

    Args:
        format: format of the linear layers, a `Format` or its string, such as `"nf4"` or `"int4-g64"`.
        embeddings: format of the embeddings, or None to leave them in float.
        skip: module names or patterns to leave in float, as for `bitfold.quantize`.
        rules: `{regular expression: format}` for single modules, as for `bitfold.quantize`.
        method: how codes are chosen, as for `bitfold.quantize`; None for the format's own default.
        modules: `{module name: description}` of a folded model, as `bitfold.manifest.describe` makes it.
        **manifest: the other keys of such a description, kept as they are.

    Raises:
        FormatError: an unknown or impossible format, or neither `format` nor `modules`.

    Example:
        >>> config = BitfoldConfig("nf4", embeddings=None, skip=["lm_head"])
        >>> config.to_dict()["format"]
        'nf4'
    """

    def __init__(
        self,
        format: Format | str | None = None,
        *,
        embeddings: Format | str | None = "int8-g64",
        skip: Sequence[str] | None = None,
        rules: Mapping[str, Format | str | None] | None = None,
        method: str | None = None,
        modules: Mapping[str, Any] | None = None,
        **manifest: Any,
    ) -> None:
        manifest.pop("quant_method", None)
        self.quant_method = QUANT_METHOD
        self.modules = None if modules is None else dict(modules)
        self.manifest = manifest
        if self.modules is not None:
            return
        if format is None:
            msg = (
                "BitfoldConfig: no format given; expected one such as 'nf4' to fold a float model with "
                "(a config.json of a folded model has 'modules' instead)"
            )
            raise FormatError(msg)
        if isinstance(skip, str):
            msg = f"BitfoldConfig: skip must be a list of names, got the string {skip!r}; write [{skip!r}]"
            raise FormatError(msg)
        self.format = str(_spelled(format))
        self.embeddings = _spelled(embeddings)
        self.skip = list(skip or [])
        self.rules = {pattern: _spelled(fmt) for pattern, fmt in (rules or {}).items()}
        self.method = method

    @property
    def is_recipe(self) -> bool:
        """Whether this tells how to fold a float model (True) or what a folded one is made of (False)."""
        return self.modules is None

    def to_dict(self) -> dict[str, Any]:
        """JSON types only, with `quant_method`: what config.json holds under `quantization_config`."""
        if self.modules is not None:
            return copy.deepcopy({"quant_method": QUANT_METHOD, **self.manifest, "modules": self.modules})
        return {
            "quant_method": QUANT_METHOD,
            **copy.deepcopy(self.manifest),
            "format": self.format,
            "embeddings": self.embeddings,
            "skip": list(self.skip),
            "rules": dict(self.rules),
            "method": self.method,
        }

    def to_diff_dict(self) -> dict[str, Any]:
        """The same as `to_dict`; transformers 4 calls it without having it."""
        return self.to_dict()

    def __iter__(self) -> Any:
        """Pairs of `to_dict`, so that `dict(config)` works."""
        yield from self.to_dict().items()

    def __repr__(self) -> str:
        if self.modules is not None:
            return f"BitfoldConfig({len(self.modules)} folded modules)"
        options = [f"{key}={value!r}" for key, value in self.to_dict().items()]
        return f"BitfoldConfig({', '.join(option for option in options if not option.startswith('quant_'))})"


def _spelled(fmt: Format | str | None) -> str | None:
    """The canonical string of a format; None stays None."""
    return None if fmt is None else str(as_format(fmt))


resume()
