"""Naming modules: `skip` and `rules` patterns, and the way back from names to patterns ready to paste."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn


class Patterns:
    """`skip` and `rules` over one model.

    A pattern names a module or parameter exactly, or is a regular expression that matches the whole name;
    either way it also holds for everything below that module. `skip` goes before `rules`; of the rules the
    first match wins.
    """

    def __init__(self, model: nn.Module, skip: Iterable[str], rules: Mapping[str, Any]) -> None:
        self._module_names: dict[nn.Module, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            self._module_names.setdefault(module, []).append(name)
        parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        self.names = [name for names in self._module_names.values() for name in names if name] + parameters
        known = set(self.names)
        self._rules: list[tuple[str, re.Pattern[str] | None, Any]] = []
        for argument, pattern, value in [
            *(("skip", pattern, None) for pattern in skip),
            *(("rules", pattern, value) for pattern, value in rules.items()),
        ]:
            self._rules.append((pattern, _compiled(argument, pattern, known), value))
        self._unused = {(i, pattern) for i, (pattern, _, _) in enumerate(self._rules)}
        for i, (pattern, regex, value) in enumerate(self._rules):
            if value is None and any(_holds(pattern, regex, name) for name in self.names):
                self._unused.discard((i, pattern))

    def _holding(self, names: Iterable[str]) -> list[tuple[int, str, Any]]:
        names = list(names)
        return [
            (i, pattern, value)
            for i, (pattern, regex, value) in enumerate(self._rules)
            if any(_holds(pattern, regex, name) for name in names)
        ]

    def format_of(self, module: nn.Module) -> tuple[bool, Any]:
        """(whether a pattern holds for the module, the format that it asks for; None means float).

        Ask of modules that can be folded only: their patterns count as used.
        """
        holding = self._holding(self._module_names[module])
        self._unused.difference_update((i, pattern) for i, pattern, _ in holding)
        return (True, holding[0][2]) if holding else (False, None)

    def keeps_float(self, module: nn.Module) -> bool:
        """Whether the module is named to stay float."""
        return self._says_float(self._module_names[module])

    def keeps_float_name(self, name: str) -> bool:
        """Whether the parameter `name` is named to stay float."""
        return self._says_float([name])

    def _says_float(self, names: Iterable[str]) -> bool:
        holding = self._holding(names)
        return bool(holding) and holding[0][2] is None

    def check_all_used(self) -> None:
        """ValueError naming the first pattern that holds for nothing."""
        if self._unused:
            _, pattern = min(self._unused)
            msg = (
                f"skip or rules: {pattern!r} matches no module that can be folded; expected the name of a "
                "module, a prefix of it up to a dot, or a regular expression for the whole name"
            )
            raise ValueError(msg)


def as_patterns(model: nn.Module, skip: Any, rules: Any) -> Patterns:
    """Check the types of `skip` and `rules` and compile them."""
    if isinstance(skip, str):
        msg = f"skip must be a list of names, got the string {skip!r}; write skip=[{skip!r}]"
        raise TypeError(msg)
    if not isinstance(rules, Mapping):
        msg = f"rules must be a dict of pattern -> format or None, got {type(rules).__name__}"
        raise TypeError(msg)
    return Patterns(model, skip, rules)


def _compiled(argument: str, pattern: Any, known: set[str]) -> re.Pattern[str] | None:
    if not isinstance(pattern, str):
        msg = f"{argument}: expected a string, got {pattern!r}"
        raise TypeError(msg)
    if pattern in known:  # a name as it stands: its dots are dots
        return None
    try:
        return re.compile(pattern)
    except re.error as error:
        msg = f"{argument}: {pattern!r} is neither a name in the model nor a regular expression ({error})"
        raise ValueError(msg) from error


def _ancestors(name: str) -> Iterator[str]:
    """`a.b.c` -> `a.b.c`, `a.b`, `a`."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def _holds(pattern: str, regex: re.Pattern[str] | None, name: str) -> bool:
    if regex is None:
        return name == pattern or name.startswith(pattern + ".")
    return any(regex.fullmatch(part) for part in _ancestors(name))


def paste_ready(names: Iterable[str], all_names: Iterable[str]) -> list[str]:
    r"""String literals that name exactly `names`: numbered siblings become one raw regex with `\d+`."""
    wanted = list(dict.fromkeys(names))
    others = set(all_names) - set(wanted)
    groups: dict[str, list[str]] = {}
    for name in wanted:
        groups.setdefault(re.sub(r"(?<=\.)\d+(?=\\\.|$)", r"\\d+", re.escape(name)), []).append(name)
    literals = []
    for pattern, members in groups.items():
        if len(members) > 1 and not any(re.fullmatch(pattern, name) for name in others):
            literals.append(f'r"{pattern}"')
        else:
            literals.extend(f'"{name}"' for name in members)
    return literals
