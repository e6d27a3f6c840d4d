"""One option of each group, least loss within a number of bytes: the multiple-choice knapsack problem."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["solve"]

# States kept after each group; buckets are 1/8192 of the range of bytes that can still be used.
_STATES = 8192


def solve(
    options: Sequence[Sequence[tuple[int, float]]], budget: int, states: int = _STATES
) -> list[int] | None:
    """Choose one option of each group so that the bytes come to at most `budget` and the loss is least.

    Dynamic programming over the sets of (bytes, loss) that the groups so far can reach and none of which is
    beaten by another in both (Nemhauser and Ullmann 1969). Bytes are never rounded: a solution always fits.
    It is exact as long as no set outgrows `states`; a larger one is thinned to the least loss of each
    of `states` equal ranges of bytes. The work is groups * states * options.

    Args:
        options: for each group its (bytes, loss).
        budget: bytes.
        states: how many partial solutions to keep.

    Returns:
        The index of the option of each group, or None where even the smallest are too large.

    Example:
        >>> solve([[(2, 9.0), (4, 1.0)], [(2, 5.0), (4, 4.0)]], 6)
        [1, 0]
    """
    smallest = [min(nbytes for nbytes, _ in group) for group in options]
    rest = sum(smallest)
    if rest > budget:
        return None
    nbytes, loss = np.zeros(1, np.int64), np.zeros(1)
    steps: list[tuple[np.ndarray, np.ndarray]] = []  # for each kept state: the state before, the option
    for group, least in zip(options, smallest, strict=True):
        rest -= least
        sizes = np.array([size for size, _ in group], np.int64)
        losses = np.array([value for _, value in group], np.float64)
        new_bytes = (nbytes[:, None] + sizes).ravel()
        new_loss = (loss[:, None] + losses).ravel()
        kept = np.flatnonzero(new_bytes + rest <= budget)
        kept = kept[np.lexsort((new_loss[kept], new_bytes[kept]))]
        kept = _unbeaten(kept, new_loss)
        kept = _thinned(kept, new_bytes, states)
        steps.append((kept // len(group), kept % len(group)))
        nbytes, loss = new_bytes[kept], new_loss[kept]
    state = len(loss) - 1  # the most bytes, so the least loss
    chosen: list[int] = []
    for before, option in reversed(steps):
        chosen.append(int(option[state]))
        state = int(before[state])
    return chosen[::-1]


def _unbeaten(order: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Of states in the order of their bytes those with less loss than all before them."""
    sorted_loss = loss[order]
    best_before = np.concatenate(([np.inf], np.minimum.accumulate(sorted_loss)[:-1]))
    return order[sorted_loss < best_before]


def _thinned(order: np.ndarray, nbytes: np.ndarray, states: int) -> np.ndarray:
    """At most about `states` of them: the last, so best, of each bucket, and the smallest of all."""
    if len(order) <= states:
        return order
    low, high = int(nbytes[order[0]]), int(nbytes[order[-1]])
    bucket = (nbytes[order] - low) * states // (high - low + 1)
    last = np.flatnonzero(np.append(bucket[1:] != bucket[:-1], True))
    return order[np.unique(np.concatenate(([0], last)))]
