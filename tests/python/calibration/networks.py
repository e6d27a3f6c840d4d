"""Models that are made on the fly, one per structure that calibration has to find its way through."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor, nn


class Expert(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(size, 48, bias=False), nn.Linear(size, 48, bias=False)
        self.w2 = nn.Linear(48, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


class Mixture(nn.Module):
    """A router that sends each token to two experts; those that get none are not called."""

    def __init__(self, size: int, experts: int) -> None:
        super().__init__()
        self.gate = nn.Linear(size, experts, bias=False)
        self.experts = nn.ModuleList(Expert(size) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        weight, chosen = self.gate(flat).softmax(-1).topk(2, dim=-1)
        result = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            rows, place = torch.where(chosen == number)
            if rows.numel():
                result.index_add_(0, rows, expert(flat[rows]) * weight[rows, place, None])
        return result.view_as(x)


class MixtureBlock(nn.Module):
    def __init__(self, size: int, experts: int) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(size), nn.Linear(size, size)
        self.moe = Mixture(size, experts)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(torch.cumsum(self.norm(x), dim=1) / 8)
        return x + self.moe(self.norm(x))


class MixtureModel(nn.Module):
    def __init__(self, size: int = 32, experts: int = 4, blocks: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(99, size)
        self.layers = nn.ModuleList(MixtureBlock(size, experts) for _ in range(blocks))
        self.head = nn.Linear(size, 99, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Unet(nn.Module):
    """The second half of the blocks reads the outputs of the first."""

    def __init__(self, size: int = 32) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(size, size), nn.GELU()) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        a = self.blocks[0](x)
        b = self.blocks[1](a)
        c = self.blocks[2](b)
        return self.blocks[3](c + a)


class Towers(nn.Module):
    """Two stacks side by side in one list."""

    def __init__(self, size: int = 32) -> None:
        super().__init__()
        self.towers = nn.ModuleList(
            nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, size)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.towers[0](x) * self.towers[1](-x)


class Detour(nn.Module):
    """A block with a matrix that only some batches reach, and with channels that a scale helps."""

    def __init__(self, size: int = 32) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.always, self.sometimes = nn.Linear(size, size), nn.Linear(size, size)
        with torch.no_grad():
            self.norm.weight[::13] = 30.0
            self.always.weight[:, ::13] *= 0.1

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        y = x + torch.tanh(self.always(h))
        return y + torch.tanh(self.sometimes(h)) if bool((x[..., 0] > 50).any()) else y


def detours() -> nn.Module:
    return nn.Sequential(Detour(), Detour())


def vit() -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=96,
            image_size=32,
            patch_size=8,
            num_labels=10,
        )
    )


def perceptron() -> nn.Module:
    sizes = [48, 64, 64, 64, 16]
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


PLAIN = {
    "moe": MixtureModel,
    "unet": Unet,
    "towers": Towers,
    "vit": vit,
    "perceptron": perceptron,
    "detours": detours,
}
NAMES = ["llama", "llama-tied", "gpt2", "bert-masked", "t5", "moe", "unet", "towers", "vit", "perceptron"]


def make(name: str) -> Any:
    """The named model, the same at each call."""
    if name not in PLAIN or name == "vit":
        pytest.importorskip("transformers")
    if name not in PLAIN:
        return tiny_models.make(name)
    torch.manual_seed(11)
    return PLAIN[name]().eval()


def data(name: str, seed: int = 1, count: int = 40) -> list[Any]:
    """Calibration or test data for the named model: items as a user would give them."""
    draw = torch.Generator().manual_seed(seed)
    if name == "vit":
        return [{"pixel_values": torch.randn(4, 3, 32, 32, generator=draw)} for _ in range(count // 4)]
    if name in ("unet", "towers", "perceptron"):
        width = 48 if name == "perceptron" else 32
        mix = torch.randn(width, width, generator=torch.Generator().manual_seed(5)) / width**0.5
        return [torch.randn(32, width, generator=draw) @ mix for _ in range(count // 4)]
    if name == "detours":  # every second batch goes both ways
        items = [torch.randn(32, 32, generator=draw) for _ in range(count // 4)]
        for item in items[::2]:
            item[0, 0] = 100.0
        return items
    longest = 24
    lengths = torch.randint(longest // 2, longest, (count,), generator=draw).tolist()
    return [torch.randint(0, 99, (length,), generator=draw).tolist() for length in lengths]


@torch.no_grad()
def outputs(model: Any, name: str, seed: int = 2) -> Tensor:
    """What the model makes of data that was held back, padding left out."""
    from bitfold.calibration import Settings
    from bitfold.calibration.batches import as_batches

    found = []
    for batch in as_batches(data(name, seed, 16), model, None, Settings()):
        result = model(*batch.args, **batch.kwargs)
        values = getattr(result, "logits", result)
        mask = batch.masks[0] if batch.masks and values.ndim == 3 else None
        found.append(values.reshape(-1) if mask is None else values[mask].reshape(-1))
    return torch.cat(found).float()


def quantize(model: Any, name: str, **others: Any) -> Any:
    """Fold with GPTQ, three bits in groups of sixteen."""
    import bitfold

    arguments = {"calibration": data(name), "method": "gptq", "progress": False, **others}
    skip = ["vit.embeddings"] if name == "vit" else []
    return bitfold.quantize(model, "int3-g16", skip=skip, **arguments)
