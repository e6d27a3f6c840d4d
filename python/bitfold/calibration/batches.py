"""Calibration data, in whatever form it comes, as batches of the model's own arguments."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bitfold.calibration.settings import Settings
from bitfold.outputs import Batch, check_arguments


def as_batches(calibration: Any, model: nn.Module, tokenizer: Any, settings: Settings) -> list[Batch]:
    """Read `calibration` once, to its end, into batches on the CPU.

    Args:
        calibration: an iterable (a generator, a list, a DataLoader) of texts, or of dicts with a `"text"`;
            of sequences of token ids (lists or 1-D tensors; NumPy arrays count as tensors); of batches of ids
            (2-D tensors); of dicts of
            the model's arguments, one sequence or a batch each; of float tensors, for models that take
            those, or tuples and lists of positional arguments; of Batches.
        model: the float model.
        tokenizer: for texts: a transformers tokenizer, its name, any callable that turns a text into ids,
            or None for the one that came with the model.
        settings: batch size, sequence length, packing.

    Raises:
        ValueError: no data, ids outside of the vocabulary, texts without a tokenizer, an item of another
            kind, arguments that the model does not take; the item, or the batch made of items, is named by
            its number.
    """
    if calibration is None:
        msg = "calibration: no data; give texts, token ids or batches of the model's arguments"
        raise ValueError(msg)
    if isinstance(calibration, str | Tensor | np.ndarray | Mapping):
        calibration = [calibration]
    if not isinstance(calibration, Iterable):
        msg = f"calibration: expected an iterable of texts, ids or dicts, got {type(calibration).__name__}"
        raise ValueError(msg)
    encode = _Encoder(tokenizer, model)
    batches: list[Batch] = []
    rows: list[list[int]] = []
    for number, item in enumerate(calibration):
        made = _one(item, encode, model, f"calibration item {number}")
        if isinstance(made, Batch):
            batches.append(made)
        else:
            rows.append(made)
    batches += _from_rows(rows, model, encode, settings)
    if not any(_counts(batch) for batch in batches):
        msg = (
            "calibration: the data is empty (no token in any item, or all of them masked); at least one "
            "sequence is needed"
        )
        raise ValueError(msg)
    batches = [batch.mapped(_normal) for batch in batches]
    for number, batch in enumerate(batches):
        _check_vocabulary(batch, model, number)
        _complete_decoder(batch, model)
        check_arguments(batch, model, f"calibration batch {number}")
    return batches


def _normal(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.is_inference() else tensor


def _counts(batch: Batch) -> bool:
    """Whether a token of the batch counts."""
    return not batch.masks or any(bool(mask.any()) for mask in batch.masks)


def _one(item: Any, encode: _Encoder, model: nn.Module, where: str) -> Batch | list[int]:
    """One item: a batch, or a sequence of ids that is batched with others later."""
    if isinstance(item, Batch):
        return Batch(item.args, dict(item.kwargs))
    if isinstance(item, str):
        return encode(item)
    if isinstance(item, np.ndarray):
        item = torch.as_tensor(item)
    if isinstance(item, Mapping):
        if isinstance(item.get("text"), str):  # a row of a text dataset
            return encode(item["text"])
        return _from_mapping(item, where)
    if isinstance(item, list | tuple) and all(isinstance(part, Integral) for part in item):
        return [int(part) for part in item]
    if isinstance(item, list) and item and all(isinstance(part, list) for part in item):
        return _from_mapping({"input_ids": item}, where)
    if isinstance(item, Tensor) and item.ndim:
        if item.is_floating_point():
            return Batch(args=(item,))
        if item.ndim == 1:
            return [int(token) for token in item]
        return _of_ids(item, None, model)
    if isinstance(item, list | tuple) and any(isinstance(part, Tensor) for part in item):
        return Batch(args=tuple(item))
    if isinstance(item, Integral) or (isinstance(item, Tensor) and not item.ndim):
        found = f"the single number {int(item) if isinstance(item, Integral) else item.item()}"
        msg = f"{where}: expected a sequence of token ids, got {found}; for one sequence write [[…]]"
        raise ValueError(msg)
    msg = f"{where}: expected a text, token ids, a tensor or a dict of arguments, got {type(item).__name__}"
    raise ValueError(msg)


def _from_mapping(item: Mapping[str, Any], where: str) -> Batch | list[int]:
    kwargs = {str(name): _as_tensor(value, f"{where}[{name!r}]") for name, value in item.items()}
    ids = kwargs.get("input_ids")
    if isinstance(ids, Tensor) and ids.ndim == 1:
        mask = kwargs.get("attention_mask")
        if set(kwargs) <= {"input_ids", "attention_mask"} and (mask is None or bool(mask.all())):
            return [int(token) for token in ids]
        kwargs = {k: v.unsqueeze(0) if isinstance(v, Tensor) and v.ndim else v for k, v in kwargs.items()}
    return Batch(kwargs=kwargs)


def _as_tensor(value: Any, where: str) -> Any:
    if not isinstance(value, list | tuple | np.ndarray):
        return value
    try:
        return torch.as_tensor(value)
    except (ValueError, TypeError) as error:
        msg = f"{where}: a list that is no rectangle of numbers ({error}); pad it, or give single sequences"
        raise ValueError(msg) from error


def _from_rows(rows: list[list[int]], model: nn.Module, encode: _Encoder, settings: Settings) -> list[Batch]:
    """Cut (or join) sequences to length, sort by length, pad into batches."""
    length = settings.sequence_length or min(512, _positions(model))
    if settings.pack:
        rows = [[token for row in rows for token in row]]
    pieces = [row[i : i + length] for row in rows for i in range(0, len(row), length)]
    if settings.pack and len(pieces) > 1 and len(pieces[-1]) < length:
        pieces.pop()  # the ragged rest
    pieces.sort(key=len)  # neighbours of like length need little padding; the sort is stable
    padded = _takes(model, "attention_mask")
    batches: list[Batch] = []
    while pieces:
        like = pieces if padded else [piece for piece in pieces if len(piece) == len(pieces[0])]
        batches.append(_padded(like[: settings.batch_size], model, encode))
        pieces = pieces[len(like[: settings.batch_size]) :]
    return batches


def _padded(rows: Sequence[list[int]], model: nn.Module, encode: _Encoder) -> Batch:
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), encode.pad, dtype=torch.long)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return _of_ids(ids, mask, model)


def _of_ids(ids: Tensor, mask: Tensor | None, model: nn.Module) -> Batch:
    if not _takes(model, "input_ids"):
        return Batch(args=(ids,))
    if mask is None or not _takes(model, "attention_mask"):
        return Batch(kwargs={"input_ids": ids})
    return Batch(kwargs={"input_ids": ids, "attention_mask": mask})


def _takes(model: nn.Module, argument: str) -> bool:
    return argument in inspect.signature(model.forward).parameters


def _positions(model: nn.Module) -> int:
    config = getattr(model, "config", None)
    found = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions")]
    return min([value for value in found if isinstance(value, int) and value > 1] or [512])


def _check_vocabulary(batch: Batch, model: nn.Module, number: int) -> None:
    ids = batch.kwargs.get("input_ids")
    find = getattr(model, "get_input_embeddings", None)
    if not isinstance(ids, Tensor) or ids.is_floating_point() or find is None or not ids.numel():
        return
    table = find()
    size = getattr(table, "num_embeddings", None)
    low, high = (int(value) for value in torch.aminmax(ids))
    if isinstance(size, int) and (low < 0 or high >= size):
        msg = (
            f"calibration batch {number}: token id {high if high >= size else low} is outside of the model's "
            f"vocabulary of {size}; the data was made by the tokenizer of another model"
        )
        raise ValueError(msg)


def _complete_decoder(batch: Batch, model: nn.Module) -> None:
    """Give the decoder of an encoder-decoder model the input itself, shifted, where nothing is given."""
    config = getattr(model, "config", None)
    given = {"decoder_input_ids", "decoder_inputs_embeds", "labels"} & set(batch.kwargs)
    ids = batch.kwargs.get("input_ids")
    if not getattr(config, "is_encoder_decoder", False) or given or not isinstance(ids, Tensor):
        return
    if not _takes(model, "decoder_input_ids"):
        return
    start = getattr(config, "decoder_start_token_id", None)
    start = getattr(config, "pad_token_id", None) if start is None else start
    shifted = torch.roll(ids, 1, dims=1)
    shifted[:, 0] = start or 0
    batch.kwargs["decoder_input_ids"] = shifted
    mask = batch.kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and _takes(model, "decoder_attention_mask"):
        batch.kwargs["decoder_attention_mask"] = mask.clone()


class _Encoder:
    """Turns texts into ids; the tokenizer is looked for when the first text comes."""

    def __init__(self, tokenizer: Any, model: nn.Module) -> None:
        self._tokenizer = tokenizer
        self._model = model

    @property
    def pad(self) -> int:
        """The id to pad with; its value is masked anyway."""
        found = [
            getattr(owner, "pad_token_id", None)
            for owner in (self._tokenizer, getattr(self._model, "config", None))
        ]
        return next((value for value in found if isinstance(value, int) and value >= 0), 0)

    def __call__(self, text: str) -> list[int]:
        if self._tokenizer is None or isinstance(self._tokenizer, str):
            self._tokenizer = _load_tokenizer(self._tokenizer, self._model)
        quiet = {"verbose": False} if hasattr(self._tokenizer, "model_max_length") else {}
        encoded = self._tokenizer(text, **quiet)
        ids = encoded["input_ids"] if isinstance(encoded, Mapping) else encoded
        return [int(token) for token in ids]


def _load_tokenizer(name: str | None, model: nn.Module) -> Any:
    name = name or getattr(getattr(model, "config", None), "name_or_path", "") or ""
    if not name:
        msg = (
            "calibration: the data holds texts and the model does not say where its tokenizer is; "
            "give tokenizer=… (a transformers tokenizer, its name, or a function from text to ids)"
        )
        raise ValueError(msg)
    try:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(name)
    except (ImportError, OSError, ValueError) as error:
        msg = f"calibration: no tokenizer could be loaded from {name!r} ({error}); give tokenizer=…"
        raise ValueError(msg) from error
