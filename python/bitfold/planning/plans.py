"""`Plan`: which Format each matrix of a model gets, what stays float, and what the file will weigh."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from bitfold.choosing import Choice, choose
from bitfold.formats import Format, as_format
from bitfold.planning.file_bytes import FileBytes, float_dtype
from bitfold.tables import Table, scaled

__all__ = ["Plan", "PlannedMatrix"]

_VERSION = 1


@dataclass(frozen=True)
class PlannedMatrix:
    """One matrix that is folded.

    Attributes:
        format: canonical string of its Format.
        shape: `(out, in)`.
        weights_bytes: of its packed tensors, metadata included.
        float_bytes: of the matrix before.
        group: name of the first matrix of those that take one choice with it.
        loss: what that group costs at its formats, in the plan's measure; None where nothing was measured.
        method: how its codes are chosen, or None for the one given to `quantize`, or the format's own.
    """

    name: str
    format: str
    shape: tuple[int, int]
    weights_bytes: int
    float_bytes: int
    group: str
    loss: float | None = None
    method: str | None = None


@dataclass(frozen=True, repr=False)
class Plan(Mapping[str, Format]):
    """An immutable mapping from the names of matrices (their modules) to Formats; printing shows the table.

    Made by `Plan.of` from rules, or by `bitfold.plan` for a number of bytes; carried out by
    `bitfold.quantize(model, plan)`. Of matrices that several modules share only the owner is listed.

    Attributes:
        matrices: all that is folded.
        floats: names and bytes of the matrices that stay float.
        file_bytes: of the file that `save_pretrained` will write (config.json not counted), or of that of
            `bitfold.save` for a model that is not of transformers. Tensors are exact, see `data_bytes`;
            the header too, but where transformers renames tensors on saving.
        data_bytes: of the tensors in that file, exactly.
        float_file_bytes: of the same file of the float model, in the dtypes that it has.
        measure: how `loss` was measured: `"kl"`, `"output"`, `"weight"`, or `"none"`.
        losses: all that was measured: group -> format -> loss.
        next_ratio: ratios nearest to `ratio`, below and above, that the change of one group's format gives;
            None where there is none, or where the plan was made from rules.
        notes: what was decided beyond the request.

    Example:
        >>> import torch
        >>> plan = Plan.of(torch.nn.Sequential(torch.nn.Linear(256, 64)), "nf4")
        >>> str(plan["0"]), plan.data_bytes
        ('nf4', 8712)
    """

    matrices: tuple[PlannedMatrix, ...]
    floats: tuple[tuple[str, int], ...]
    file_bytes: int
    data_bytes: int
    float_file_bytes: int
    measure: str = "none"
    losses: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    next_ratio: tuple[float | None, float | None] = (None, None)
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        model: nn.Module,
        fmt: Format | str = "nf4",
        *,
        embeddings: Format | str | None = "int8-g64",
        skip: Iterable[str] = (),
        rules: Mapping[str, Format | str | None] | None = None,
        method: str | None = None,
    ) -> Plan:
        """What `bitfold.quantize` with the same arguments would do; `model` (also on meta) is not changed.

        Raises as `bitfold.quantize` does: CoverageError, FormatError, WeightError, ValueError.
        """
        choice = choose(model, fmt, embeddings=embeddings, skip=skip, rules=rules)
        choice.check_coverage()
        files = FileBytes(model, list(choice.folds))
        formats = [fold.format for fold in choice.folds]
        return cls.made(choice, files, formats, method=method)

    @classmethod
    def made(
        cls,
        choice: Choice,
        files: FileBytes,
        formats: Sequence[Format],
        *,
        groups: Sequence[str] | None = None,
        method: str | None = None,
        **others: Any,
    ) -> Plan:
        """A plan from its parts: `formats[i]` and `groups[i]` belong to the i-th fold of `choice`."""
        losses = others.get("losses", {})
        matrices = []
        for i, (fold, fmt) in enumerate(zip(choice.folds, formats, strict=True)):
            shape = fold.owner.shape
            group = groups[i] if groups else fold.owner.name
            matrices.append(
                PlannedMatrix(
                    name=fold.owner.name,
                    format=str(fmt),
                    shape=shape,
                    weights_bytes=fmt.nbytes(shape),
                    float_bytes=shape[0] * shape[1] * float_dtype(fold).itemsize,
                    group=group,
                    loss=losses.get(group, {}).get(str(fmt)),
                    method=method,
                )
            )
        return cls(
            matrices=tuple(matrices),
            floats=tuple((kept.name, kept.nbytes) for kept in choice.kept),
            file_bytes=files.total(formats),
            data_bytes=files.data(formats),
            float_file_bytes=files.total([None] * len(formats)),
            **others,
        )

    def __getitem__(self, name: str) -> Format:
        for matrix in self.matrices:
            if matrix.name == name:
                return Format(matrix.format)
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return (matrix.name for matrix in self.matrices)

    def __len__(self) -> int:
        return len(self.matrices)

    @property
    def rules(self) -> dict[str, str | None]:
        """The plan as `rules` of `bitfold.quantize`: exact names, deeper ones first; None stays float."""
        named: dict[str, str | None] = dict.fromkeys((name for name, _ in self.floats), None)
        named |= {matrix.name: matrix.format for matrix in self.matrices}
        return dict(sorted(named.items(), key=lambda item: -item[0].count(".")))

    @property
    def default(self) -> str:
        """The most frequent format; what `rules` do not name would get it."""
        return max(Counter(matrix.format for matrix in self.matrices).items(), key=lambda item: item[1])[0]

    @property
    def methods(self) -> dict[str, str]:
        """Matrices for which the plan names a method."""
        return {matrix.name: matrix.method for matrix in self.matrices if matrix.method is not None}

    @property
    def ratio(self) -> float:
        """Bytes of the float file per byte of the folded one."""
        return self.float_file_bytes / self.file_bytes

    @property
    def bits_per_weight(self) -> float:
        """Bits stored per weight of the folded matrices, metadata included."""
        weights = sum(matrix.shape[0] * matrix.shape[1] for matrix in self.matrices)
        return (
            8 * sum(matrix.weights_bytes for matrix in self.matrices) / weights if weights else float("nan")
        )

    def choose(self, model: nn.Module) -> Choice:
        """What to fold of `model`, as `choosing.choose` puts it.

        Raises:
            ValueError: `model` is not the one that was planned for: a matrix has no place in the plan, or
                another shape, or the plan names what is not there.
            FormatError: folded otherwise already.
        """
        if not self.matrices:
            return choose(model, "nf4", rules=dict.fromkeys(self.rules, None))
        choice = choose(model, self.default, embeddings=self.default, rules=self.rules)
        planned = {matrix.name: matrix for matrix in self.matrices}
        for fold in choice.folds:
            # the owner of a shared matrix may be another of its modules, on another version of transformers
            name = next((use.name for use in (fold.owner, *fold.tied) if use.name in planned), None)
            if name is None:
                msg = f"{fold.owner.name}: not in the plan, which was made for another model; plan again"
                raise ValueError(msg)
            if planned[name].shape != fold.owner.shape:
                msg = (
                    f"{fold.owner.name}: the plan is for {list(planned[name].shape)}, the model has "
                    f"{list(fold.owner.shape)}; plan again"
                )
                raise ValueError(msg)
        return choice

    def to_json(self) -> str:
        """The whole plan as JSON text."""
        content = asdict(self)
        matrices = [dict(matrix, shape=list(matrix["shape"])) for matrix in content.pop("matrices")]
        return json.dumps({"bitfold_plan": _VERSION, "matrices": matrices, **content}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that `to_json` wrote.

        Raises:
            ValueError: not such text; FormatError (a ValueError) for a format that does not exist.
        """
        try:
            content = json.loads(text)
            version = content.pop("bitfold_plan")
            if version != _VERSION:
                msg = f"plan: version is {version!r}, expected {_VERSION}; update bitfold or plan again"
                raise ValueError(msg)
            matrices = tuple(
                PlannedMatrix(**{**m, "shape": tuple(map(int, m["shape"]))}) for m in content.pop("matrices")
            )
            for matrix in matrices:
                as_format(matrix.format)
            content["floats"] = tuple((str(name), int(nbytes)) for name, nbytes in content["floats"])
            content["next_ratio"] = tuple(content["next_ratio"])
            content["notes"] = tuple(content["notes"])
            return cls(matrices=matrices, **content)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            msg = f"plan: expected JSON that Plan.to_json wrote, found something else ({error!r})"
            raise ValueError(msg) from error

    def table(self) -> Table:
        """One line per matrix, their sum, the distribution of bits, the file."""
        size, unit = scaled(sum(matrix.float_bytes for matrix in self.matrices))
        cells = [["layer", "format", "bits/weight", unit, f"loss ({self.measure})"]]
        for m in self.matrices:
            bits = 8 * m.weights_bytes / (m.shape[0] * m.shape[1])
            loss = "-" if m.loss is None else f"{m.loss:.3g}" if m.group == m.name else f"with {m.group}"
            cells.append([m.name, m.format, f"{bits:.3f}", f"{m.weights_bytes / size:.2f}", loss])
        nbytes = sum(matrix.weights_bytes for matrix in self.matrices)
        losses = {m.group: m.loss for m in self.matrices if m.loss is not None}
        total = f"{sum(losses.values()):.3g}" if losses else "-"
        cells.append(["folded matrices", "", f"{self.bits_per_weight:.3f}", f"{nbytes / size:.2f}", total])
        return Table(cells, [*self._lines(), *self.notes], totals=1)

    def _lines(self) -> list[str]:
        weights: Counter[int] = Counter()
        counts: Counter[int] = Counter()
        for matrix in self.matrices:
            bits = Format(matrix.format).bits
            weights[bits] += matrix.shape[0] * matrix.shape[1]
            counts[bits] += 1
        shares = [
            f"{bits}-bit {weights[bits] / weights.total():.1%} ({counts[bits]} matrices)"
            for bits in sorted(weights)
        ]
        lines = ["weights by bits: " + ", ".join(shares)] if shares else []
        lines.append(
            f"file: {self.float_file_bytes:,} -> {self.file_bytes:,} bytes, {self.ratio:.3f}x smaller"
        )
        below, above = self.next_ratio
        if below is not None or above is not None:
            ends = ["none" if value is None else f"{value:.3f}x" for value in (below, above)]
            lines.append(f"next ratios: {ends[0]} below, {ends[1]} above")
        if self.floats:
            largest = sorted(self.floats, key=lambda item: -item[1])
            more = f" and {len(largest) - 5} more" if len(largest) > 5 else ""
            lines.append("matrices in float: " + ", ".join(name for name, _ in largest[:5]) + more)
        return lines

    def __str__(self) -> str:
        return str(self.table())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()
