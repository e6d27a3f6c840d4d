"""What happened to each matrix: kept for the caller, and written as JSON lines."""

from __future__ import annotations

import json
import os
import resource
import warnings
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn


class CalibrationWarning(UserWarning):
    """Calibration data that will not carry what it is used for."""


@dataclass
class Report:
    """The calibration of one model.

    Attributes:
        lines: one dict of JSON types per matrix, in the order of folding: `name`, `shape`, `format`,
            `method`, `tokens`, what the method reported (`loss`, `predicted`, `damping`, …), `seconds`,
            `peak_rss_bytes`. Where they apply:

            - `fallback`: why the matrix was folded without calibration (a text), or that `gptq` could not
              factor the Hessian and rounded with searched scales (true);
            - `dropped_rows`: rows of its input that were not finite; `padding_counted`: its input has another
              shape than the attention mask, or the mask is of a kind that does not tell padding;
            - `effective_rank`: of its Hessian, where there were fewer than four tokens per input;
            - `blended`: how much an expert took from the others;
            - `scale`: of `awq`: the `source` that it is folded into, and the `alpha` that was chosen, 0 for
              none; `no_scale`: why it found none; `clipped_groups`: how many groups it clipped;
            - `outliers`: weights stored apart; `outliers_by`: by what they were chosen, where it was not by
              the factor of the Hessian;
            - `refined`: `learned` has changed the codes; with `block_error_before` and `block_error` of the
              block, and the losses of the codes before as `loss_before`, `predicted_before`, ….

            `learned` adds a line per block: `name`, `method`, the two errors, `seconds`, `peak_rss_bytes`.
        notes: what was decided about the model as a whole.
        predicted_bytes: memory that the run was predicted to add at its peak.
    """

    lines: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    predicted_bytes: int = 0

    def warn(self) -> None:
        """Say once what is wrong with the data: rows that are not finite, and too few of them."""
        bad = {line["name"]: line["dropped_rows"] for line in self.lines if line.get("dropped_rows")}
        if bad:
            shown = ", ".join(f"{name} ({count} rows)" for name, count in list(bad.items())[:5])
            more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
            text = f"activations that are not finite were left out at the inputs of {shown}{more}"
            warnings.warn(text, CalibrationWarning, stacklevel=6)
        thin = [line for line in self.lines if "effective_rank" in line]
        if thin:
            worst = min(thin, key=lambda line: line["tokens"] / line["shape"][1])
            text = (
                f"little calibration data: {worst['name']} saw {worst['tokens']} for {worst['shape'][1]} "
                f"inputs, effective rank {worst['effective_rank']:.1f}; at least four tokens per input are "
                "wanted, give more or longer sequences"
            )
            warnings.warn(text, CalibrationWarning, stacklevel=6)

    def __getitem__(self, name: str) -> dict[str, Any]:
        for line in self.lines:
            if line["name"] == name:
                return line
        raise KeyError(name)


_REPORTS: weakref.WeakKeyDictionary[nn.Module, Report] = weakref.WeakKeyDictionary()


def report(model: nn.Module) -> Report | None:
    """The report of the last calibration of `model` in this process, or None."""
    return _REPORTS.get(model)


def remember(model: nn.Module, made: Report) -> None:
    """Make `made` what `report(model)` returns."""
    _REPORTS[model] = made


class Log:
    """Appends a JSON line per matrix to a file as it is folded; None writes nowhere."""

    def __init__(self, path: str | os.PathLike[str] | None, made: Report) -> None:
        self._path = None if path is None else Path(path)
        self._report = made
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text("")

    def add(self, line: dict[str, Any]) -> None:
        """Record one matrix."""
        self._report.lines.append(line)
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def peak_rss_bytes() -> int:
    """The most memory that this process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
