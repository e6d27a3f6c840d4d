"""Run a model once on inputs of its own kind and store what came out: the other half of `bitfold verify`.

Started as a process of its own (``python -m bitfold.hf.probe DIR …``), so that what is compared is what a
user gets who opens the directory, and not what the exporting process still had in memory. The inputs are made
once and stored, so that source and export see the same ones.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

__all__ = ["NOT_RUN", "make_inputs", "outputs_of"]

# Exit status for a model that was loaded, and raised when it was run.
NOT_RUN = 3

_SENTENCES = [
    "The harbour lay quiet under a thin blanket of morning fog, and the first boats were already out.",
    "Interest rates were left unchanged on Thursday, which surprised nobody who had read the minutes.",
    "def area(radius): return 3.14159 * radius ** 2  # of a circle, in the unit of the radius squared",
    "Add two cups of flour, a pinch of salt and the melted butter, then let the dough rest for an hour.",
    "Die Bahn fährt heute wegen Bauarbeiten nur bis zum Hauptbahnhof, danach gibt es Busse für alle.",
    "She asked whether the library would open on Sunday; he shrugged, for he had never been inside it.",
]
_LENGTH = 24  # tokens: enough for attention to matter, few enough for logits of large vocabularies


def make_inputs(directory: Path, model: Any) -> dict[str, torch.Tensor]:
    """Inputs that fit the model: sentences where there is a tokenizer, else fixed random ids or pixels.

    Raises:
        ValueError: the model wants a kind of input that is not known here.
    """
    generator = torch.Generator().manual_seed(0)
    name = model.main_input_name
    if name == "input_ids":
        ids = _tokenized(directory)
        if ids is None:
            vocabulary = model.config.get_text_config().vocab_size
            ids = torch.randint(vocabulary, (4, _LENGTH), generator=generator)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = ids[:, : _LENGTH // 2]
        vision = getattr(model.config, "vision_config", None)
        if vision is not None and "logit_scale" in dict(
            model.named_parameters()
        ):  # a pair of towers, as CLIP
            inputs["pixel_values"] = _pixels(vision, generator)
        return inputs
    if name == "pixel_values":
        return {"pixel_values": _pixels(model.config, generator)}
    if name == "input_features" and hasattr(model.config, "max_source_positions"):  # Whisper: spectrograms
        shape = (2, model.config.num_mel_bins, 2 * model.config.max_source_positions)
        start = torch.full((2, 4), model.config.decoder_start_token_id)
        return {"input_features": torch.randn(shape, generator=generator), "decoder_input_ids": start}
    message = (
        f"{type(model).__name__} takes {name}; inputs can be made for text, pictures and spectrograms only"
    )
    raise ValueError(message)


def _pixels(config: Any, generator: torch.Generator) -> torch.Tensor:
    size = getattr(config, "image_size", 224)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return torch.randn(2, getattr(config, "num_channels", 3), height, width, generator=generator)


def _tokenized(directory: Path) -> torch.Tensor | None:
    """Sentences as ids [sentences, tokens] of equal length, so that no padding is needed; None without a
    tokenizer.
    """
    if not any(
        (directory / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt")
    ):
        return None
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    rows = [tokenizer(sentence)["input_ids"] for sentence in _SENTENCES]
    length = min(_LENGTH, *(len(row) for row in rows))
    return torch.tensor([row[:length] for row in rows])


@torch.inference_mode()
def outputs_of(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[str, torch.Tensor]:
    """What the model says, in float32: ("logits", [..., classes]) or ("embeddings", [batch, dimensions])."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    result = model(**inputs)
    for name in ("logits", "logits_per_text"):
        if getattr(result, name, None) is not None:
            return "logits", result[name].float().contiguous()
    hidden = result.last_hidden_state.float()
    return "embeddings", hidden.flatten(1, -2).mean(dim=1).contiguous()


def main() -> int:
    """Load, run, store; the exit status says whether all of that went well."""
    parser = argparse.ArgumentParser(prog="python -m bitfold.hf.probe", description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--inputs", type=Path, required=True, help="read if there, else written")
    parser.add_argument("--outputs", type=Path, required=True)
    parser.add_argument("--trust-remote-code", action="store_true")
    options = parser.parse_args()

    from safetensors.torch import load_file, save_file

    import bitfold
    from bitfold.hf.meta_model import model_class

    start = time.perf_counter()
    cls = model_class(options.directory, options.trust_remote_code)
    kwargs = {"trust_remote_code": True} if options.trust_remote_code else {}
    model = cls.from_pretrained(options.directory, dtype="auto", **kwargs).eval()
    loaded = time.perf_counter()
    if options.inputs.exists():
        inputs = load_file(options.inputs)
    else:
        inputs = make_inputs(options.directory, model)
        save_file({name: x.contiguous() for name, x in inputs.items()}, options.inputs)
    try:
        kind, outputs = outputs_of(model, inputs)
    except Exception as error:  # told apart from a failure to load
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return NOT_RUN
    facts = {
        "kind": kind,
        "load_seconds": loaded - start,
        "run_seconds": time.perf_counter() - loaded,
        "resident_bytes": bitfold.summary(model).total.resident,
    }
    save_file({kind: outputs}, options.outputs, metadata={"facts": json.dumps(facts)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
