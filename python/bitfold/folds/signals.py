"""What a random scale at one place did to tensors at another."""

from __future__ import annotations

import torch
from torch import Tensor

PURE = 1e-4  # how exactly a column must be scaled


def random_scale(channels: int) -> Tensor:
    """From 1.25 to 5, all distinct and evenly apart, in random order: a factor tells its channel."""
    generator = torch.Generator().manual_seed(channels)
    steps = (torch.arange(channels) + 0.5) / channels
    return (1.25 * 4**steps)[torch.randperm(channels, generator=generator)]


def _rows(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1, t.shape[-1]) for t in tensors]).double()


def _comparable(before: list[Tensor], now: list[Tensor]) -> bool:
    return bool(before) and [t.shape for t in before] == [t.shape for t in now] and before[0].ndim > 0


def scaled_by(before: list[Tensor], now: list[Tensor], scale: Tensor) -> bool:
    """Whether all channels are divided by `scale` and nothing else happened."""
    if not _comparable(before, now):
        return False
    old, new = _rows(before), _rows(now) * scale.double()
    return bool((old - new).norm() <= PURE * old.norm())


def channels_read(before: list[Tensor], now: list[Tensor], scale: Tensor) -> Tensor | None:
    """Which channel each column carries, if every column is scaled by that of one channel or by none."""
    if not _comparable(before, now):
        return None
    old, new = _rows(before), _rows(now)
    power = (new * new).sum(0)
    dead = power == 0
    ratio = (old * new).sum(0) / power.masked_fill(dead, 1.0)
    off = (old - ratio * new).norm(dim=0)
    if bool((off > PURE * old.norm(dim=0)).any()) or bool((old.norm(dim=0)[dead] > 0).any()):
        return None
    known = torch.cat([scale.double(), torch.ones(1, device=scale.device, dtype=torch.float64)])
    ordered, place = known.log().sort()
    wanted = ratio.masked_fill(dead, 1.0).clamp_min(1e-30).log()
    right = torch.searchsorted(ordered, wanted).clamp(max=len(ordered) - 1)
    left = (right - 1).clamp_min(0)
    nearest = torch.where((ordered[right] - wanted).abs() < (ordered[left] - wanted).abs(), right, left)
    if bool(((ordered[nearest] - wanted).abs() > 0.25 / len(known)).any()):
        return None
    channel = place[nearest]
    channel[channel == scale.numel()] = -1
    if bool(dead.any()) and not _fill_dead(channel, dead, scale.numel()):
        return None
    return channel if bool((channel >= 0).any()) else None


def _fill_dead(channel: Tensor, dead: Tensor, channels: int) -> bool:
    """Columns that were zero for all tokens show no factor: they follow the others where the map is plain."""
    own = torch.arange(len(channel), device=channel.device)
    if len(channel) != channels or not bool((channel == own)[~dead].all()) or bool(dead.all()):
        return False
    channel[dead] = own[dead]
    return True


def distance(before: list[Tensor], now: list[Tensor]) -> float:
    """|now - before| / |before| of the worst tensor; infinite where shapes differ."""
    if [t.shape for t in before] != [t.shape for t in now] or not before:
        return float("inf")
    worst = 0.0
    for old, new in zip(before, now, strict=True):
        size = float(old.double().norm())
        worst = max(worst, float((new.double() - old.double()).norm()) / max(size, 1e-30))
    return worst
