"""Which matrices of a model are folded, into which Format, and what stays float and why. Changes nothing.

Only exact types are folded: about 55 subclasses of Linear and Embedding in transformers scale, offset or
quantize on their own. What stays float must be named by the user where it matters (more than 1 % of the
bytes of all matrices), so that nobody believes a model folded that is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from bitfold.errors import CoverageError, FormatError
from bitfold.formats import Format, as_format
from bitfold.naming import Patterns, as_patterns, paste_ready
from bitfold.nn import PackedModule, TiedEmbedding, TiedHead
from bitfold.nn._base import check_float_weight, tensor_key
from bitfold.nn._readers import weights_read_by
from bitfold.nn.conv1d import is_conv1d
from bitfold.nn.embedding import is_scaled_embedding

UNNAMED_SHARE = 0.01  # of the bytes of all float matrices


@dataclass(eq=False)
class Use:
    """One module that computes with a matrix."""

    name: str
    module: Any  # Linear, Embedding, Conv1D or their packed twins
    kind: str  # "linear" | "conv1d" | "embedding"

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)` of the matrix, packed or float; a float Conv1D holds the transpose."""
        if isinstance(self.module, PackedModule):
            return self.module.shape
        rows, columns = self.module.weight.shape
        return (columns, rows) if self.kind == "conv1d" else (rows, columns)

    def float_matrix(self) -> Tensor:
        """The float weight `[out, in]` in float32: a view where it is that already."""
        weight: Tensor = self.module.weight.detach()
        return (weight.t() if self.kind == "conv1d" else weight).float()


@dataclass(eq=False)
class Fold:
    """One matrix to fold: its owner, and the modules tied to it."""

    owner: Use
    tied: list[Use]
    format: Format
    done: bool = False  # it is folded in this format already
    explicit: bool = False  # a rule asks for this format


@dataclass(frozen=True)
class Kept:
    """One float tensor of two or more dimensions that stays as it is."""

    name: str
    shape: tuple[int, ...]
    nbytes: int
    reason: str
    named: bool


@dataclass
class Choice:
    """What `choose` decided."""

    folds: list[Fold] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)
    total_nbytes: int = 0
    names: list[str] = field(default_factory=list)

    def check_coverage(self) -> None:
        """Raise CoverageError if more than 1 % of the matrix bytes would stay float without being named."""
        unnamed = sorted((kept for kept in self.kept if not kept.named), key=lambda kept: -kept.nbytes)
        left = sum(kept.nbytes for kept in unnamed)
        if left <= UNNAMED_SHARE * self.total_nbytes:
            return
        listed = "\n".join(
            f"  {kept.name} {list(kept.shape)}, {kept.nbytes:,} bytes: {kept.reason}" for kept in unnamed[:20]
        )
        more = f"\n  … and {len(unnamed) - 20} more" if len(unnamed) > 20 else ""
        pasted = ",\n".join(
            f"    {pattern}" for pattern in paste_ready([k.name for k in unnamed], self.names)
        )
        msg = (
            f"{left / self.total_nbytes:.1%} of the bytes of all matrices would stay float without being "
            f"named, at most {UNNAMED_SHARE:.0%} may; nothing was changed.\n{listed}{more}\n"
            f"To leave them in float, name them:\nskip=[\n{pasted},\n]"
        )
        raise CoverageError(msg)


def choose(
    model: nn.Module,
    fmt: Format | str = "nf4",
    *,
    embeddings: Format | str | None = "int8-g64",
    skip: Iterable[str] = (),
    rules: Mapping[str, Format | str | None] | None = None,
) -> Choice:
    """Decide for every matrix of `model`, which may be on meta; arguments as for `bitfold.quantize`.

    Raises FormatError (bad format, contradicting rules, folded otherwise already), WeightError (integer or
    complex or empty weight), ValueError (a pattern that matches nothing).
    """
    if isinstance(model, PackedModule) or _kind(model) is not None:
        msg = f"the model itself is a {type(model).__name__}; fold it with bitfold.nn's from_float"
        raise TypeError(msg)
    linear_format = as_format(fmt)
    embedding_format = None if embeddings is None else as_format(embeddings)
    patterns = as_patterns(model, skip, {} if rules is None else rules)
    choice = Choice(names=patterns.names)
    users, problems = _users(model)
    settled: set[Any] = set()
    for key, uses in users.items():
        decision = _decide(uses, patterns, linear_format, embedding_format)
        reason, soft = _why_not(uses, problems)
        wanted = decision.format
        if wanted is not None and (reason is None or (soft and decision.explicit)):
            settled.add(key)
            fold = _fold(uses, wanted)
            fold.explicit = decision.explicit
            choice.folds.append(fold)
        elif isinstance(uses[0].module, PackedModule):
            module = uses[0].module
            msg = f"{uses[0].name}: folded in {module.format} already, cannot go back; load the float model"
            raise FormatError(msg)
    choice.total_nbytes = sum(_nbytes(fold.owner.module) for fold in choice.folds)
    _keep_the_rest(model, choice, settled, users, problems, patterns, embedding_format)
    patterns.check_all_used()
    return choice


@dataclass(frozen=True)
class _Decision:
    format: Format | None
    explicit: bool


def _decide(uses: list[Use], patterns: Patterns, linear: Format, embedding: Format | None) -> _Decision:
    """One format for all users of a matrix: what skip or a rule says of any of them, else the default."""
    explicit: dict[str, str] = {}
    chosen: Format | None = None
    for use in uses:
        found, fmt = patterns.format_of(use.module)
        if found:
            explicit[use.name] = "float" if fmt is None else str(as_format(fmt))
            chosen = None if fmt is None else as_format(fmt)
    if len(set(explicit.values())) > 1:
        msg = f"tied modules need one format, but skip and rules ask for {explicit}"
        raise FormatError(msg)
    if explicit:
        return _Decision(chosen, True)
    is_table = any(use.kind == "embedding" for use in uses)
    return _Decision(embedding if is_table else linear, False)


def _fold(uses: list[Use], fmt: Format) -> Fold:
    owner, *tied = uses
    module = owner.module
    if isinstance(module, PackedModule):
        if module.format != fmt:
            msg = (
                f"{owner.name}: folded in {module.format} already, cannot become {fmt}; load the float model"
            )
            raise FormatError(msg)
        return Fold(owner, tied, fmt, done=True)
    check_float_weight(module.weight, f"{owner.name}.weight")
    fmt.buffers(owner.shape)  # FormatError here, before anything changes
    return Fold(owner, tied, fmt)


def _nbytes(module: Any) -> int:
    if isinstance(module, PackedModule):
        return module.original_nbytes()
    return int(module.weight.numel()) * int(module.weight.itemsize)


def _users(model: nn.Module) -> tuple[dict[Any, list[Use]], dict[nn.Module, tuple[str, bool]]]:
    """Gather who computes with which matrix, and what forbids folding.

    Returns (matrix -> modules, module -> (why it cannot be folded, whether a rule may insist)).
    """
    users: dict[Any, list[Use]] = {}
    problems: dict[nn.Module, tuple[str, bool]] = {}
    others: dict[Any, str] = {}
    readers = _direct_readers(model)
    rank = _rank(model)
    for name, module in model.named_modules():
        kind = _kind(module)
        if isinstance(module, PackedModule):
            users.setdefault(id(module), []).append(Use(name, module, module.kind))
        elif isinstance(module, TiedHead | TiedEmbedding):
            kind = "linear" if isinstance(module, TiedHead) else "embedding"
            users.setdefault(id(module.source), []).append(Use(name, module, kind))
        elif kind is not None and "weight" in module._parameters and module.weight is not None:
            users.setdefault(tensor_key(module.weight), []).append(Use(name, module, kind))
            problem = _problem(module) or readers.get(module)
            if problem:
                problems[module] = problem
        else:
            for attribute, parameter in module._parameters.items():
                if parameter is not None:
                    others[tensor_key(parameter)] = f"{name}.{attribute} ({type(module).__name__})"
    for key, uses in users.items():
        uses.sort(key=rank)  # the owner comes first
        if key in others:
            problems[uses[0].module] = (
                f"shares its weight with {others[key]}, which cannot be folded",
                False,
            )
        if len(uses) > 1 and any(use.kind == "conv1d" for use in uses):
            problems[uses[0].module] = ("a Conv1D that shares its weight cannot be folded", False)
    return users, problems


def _rank(model: nn.Module) -> Callable[[Use], tuple[bool, bool, bool]]:
    """Order in which the users of one matrix may own it: transformers' own choice, then embeddings."""
    sources = set(dict(getattr(model, "all_tied_weights_keys", None) or {}).values())

    def rank(use: Use) -> tuple[bool, bool, bool]:
        packed = isinstance(use.module, PackedModule)
        return not packed, f"{use.name}.weight" not in sources, use.kind != "embedding"

    return rank


def _kind(module: nn.Module) -> str | None:
    if type(module) is nn.Linear:
        return "linear"
    if is_conv1d(module):
        return "conv1d"
    if type(module) is nn.Embedding or is_scaled_embedding(module):
        return "embedding"
    return None


def _problem(module: nn.Module) -> tuple[str, bool] | None:
    if getattr(module, "max_norm", None) is not None:
        return "max_norm rewrites rows at each look-up", False
    if "forward" in module.__dict__:
        return "its forward was replaced (accelerate hooks?)", False
    return None


def _direct_readers(model: nn.Module) -> dict[nn.Module, tuple[str, bool]]:
    """Modules whose `.weight` another one reads without calling them. A rule may insist on folding."""
    found: dict[nn.Module, tuple[str, bool]] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    loose: dict[str, str] = {}
    for parent_name, parent in modules.items():
        reads = weights_read_by(type(parent))  # type: ignore[arg-type]
        reason = (
            f"{type(parent).__name__} reads its weight without calling it (a rule can insist, "
            "for a model that never comes by there)"
        )
        loose |= dict.fromkeys(reads.loose, reason)
        for path in reads.own:
            child = modules.get(f"{parent_name}.{path}".removeprefix("."))
            for module in child if isinstance(child, nn.ModuleList | nn.Sequential) else [child]:
                if module is not None:
                    found[module] = (reason, True)
    for name, module in modules.items():
        for path, reason in loose.items():
            if f".{name}".endswith(f".{path}"):
                found[module] = (reason, True)
    return found


def _why_not(uses: list[Use], problems: Mapping[nn.Module, tuple[str, bool]]) -> tuple[str | None, bool]:
    """The gravest reason against folding a matrix with these users, and whether a rule may insist."""
    found = [(use.name, *problems[use.module]) for use in uses if use.module in problems]
    if not found:
        return None, True
    name, reason, soft = min(found, key=lambda problem: problem[2])
    return (reason if len(uses) == 1 else f"{name}: {reason}"), soft


def _keep_the_rest(
    model: nn.Module,
    choice: Choice,
    settled: set[Any],
    users: Mapping[Any, list[Use]],
    problems: Mapping[nn.Module, tuple[str, bool]],
    patterns: Patterns,
    embeddings: Format | None,
) -> None:
    seen = set(settled)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        key = tensor_key(parameter)
        if key in seen or parameter.ndim < 2 or not parameter.is_floating_point():
            continue
        seen.add(key)
        owner_name, _, attribute = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        short = owner_name if attribute == "weight" and owner_name else name
        modules = [use.module for use in users.get(key, ())] or [owner]
        named = any(patterns.keeps_float(module) for module in modules) or patterns.keeps_float_name(name)
        named = named or (embeddings is None and any(isinstance(module, nn.Embedding) for module in modules))
        reason = "left in float as asked" if named else _reason(users.get(key), problems, owner, parameter)
        nbytes = parameter.numel() * parameter.itemsize
        choice.kept.append(Kept(short, tuple(parameter.shape), nbytes, reason, named))
        choice.total_nbytes += nbytes


def _reason(
    uses: list[Use] | None,
    problems: Mapping[nn.Module, tuple[str, bool]],
    owner: nn.Module,
    parameter: nn.Parameter,
) -> str:
    if uses:
        return _why_not(uses, problems)[0] or "not chosen"
    kind = type(owner).__name__
    if isinstance(owner, nn.modules.conv._ConvNd):
        return f"a convolution ({kind}), not covered"
    if parameter.ndim == 3 and parameter.shape[0] > 1 and not isinstance(owner, nn.Linear | nn.Embedding):
        return f"a 3-D parameter of {kind}, such as fused experts [E, out, in]; not covered yet"
    if isinstance(owner, nn.Linear | nn.Embedding):
        return f"{kind} is a subclass that may compute something else"
    return f"a parameter of {kind}, not a module that can be folded"
