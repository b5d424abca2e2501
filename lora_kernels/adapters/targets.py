"""Which modules an adapter goes to, by PEFT's rules: names and suffixes, a regular expression, "all-linear"."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from lora_kernels.adapters.tree import Place
from lora_kernels.errors import ArgumentError
from lora_kernels.nn.adopt import is_linear

ALL_LINEAR = "all-linear"

Names = str | Collection[str]
V = TypeVar("V")


@dataclass(frozen=True)
class Targets:
    """What names are chosen.

    A string is a regular expression that the whole name must match; of several strings, the name must be one, or end
    in one after a dot. layers_to_transform restricts the latter to layers with these indices; layers_pattern names
    what the index follows.
    """

    target_modules: Names
    exclude_modules: Names | None = None
    layers_to_transform: Collection[int] | None = None
    layers_pattern: Collection[str] = ()

    def check(self) -> None:
        """Types, and regular expressions that compile.

        Raises:
            ArgumentError: naming the argument.
        """
        _check_names("target_modules", self.target_modules)
        if not self.target_modules:
            raise ArgumentError('target_modules must name at least one module, or be "all-linear"; got nothing.')
        if self.exclude_modules is not None:
            _check_names("exclude_modules", self.exclude_modules)

    def choose(self, model: nn.Module, modules: Sequence[Place]) -> list[Place]:
        """The chosen ones of a model's modules; one that is used at several places is chosen by any of its names."""
        return [place for place in self._wanted(model, modules) if not any(map(self.excludes, place.names))]

    def _wanted(self, model: nn.Module, modules: Sequence[Place]) -> list[Place]:
        if self.all_linear:
            output = output_layer(model)
            return [place for place in modules if is_linear(place.module) and place.module is not output]
        return [place for place in modules if any(map(self.wants, place.names))]

    @property
    def all_linear(self) -> bool:
        """Whether target_modules is PEFT's shorthand."""
        return isinstance(self.target_modules, str) and self.target_modules.lower() == ALL_LINEAR

    def excludes(self, name: str) -> bool:
        """Whether exclude_modules matches."""
        return bool(self.exclude_modules) and _matches(self.exclude_modules or (), name)

    def wants(self, name: str) -> bool:
        """Whether target_modules matches, at a layer that is wanted."""
        if not _matches(self.target_modules, name):
            return False
        if self.layers_to_transform is None or isinstance(self.target_modules, str) or name in self.target_modules:
            return True
        index = self._layer_index(name)
        return index is not None and index in self.layers_to_transform

    def _layer_index(self, name: str) -> int | None:
        # The first number in the name, after any component or after one of layers_pattern: experts have indices, too.
        patterns = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in self.layers_pattern] or [r".*?\.[^.]*\.(\d+)\."]
        found = next((match for pattern in patterns if (match := re.match(pattern, name))), None)
        return int(found[1]) if found else None

    def unmatched(self, modules: Sequence[Place]) -> tuple[str, ...]:
        """Those of several targets that match no module."""
        if isinstance(self.target_modules, str):
            return ()
        names = [name for place in modules for name in place.names]
        return tuple(
            sorted(target for target in self.target_modules if not any(_matches([target], name) for name in names))
        )

    def nothing_chosen(self, model: nn.Module, modules: Sequence[Place]) -> str:
        """Why `choose` found nothing, and what is near."""
        wanted = self._wanted(model, modules)
        if wanted:
            return (
                f"exclude_modules must leave some of the modules that target_modules matches; got "
                f"{self.exclude_modules!r}, which excludes all {len(wanted)} of them, {wanted[0].name!r} first."
            )
        names = [name for place in modules if is_linear(place.module) for name in place.names]
        if not names:
            return f"model must have linear layers; got {type(model).__name__} without any below it."
        suffixes = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
        targets = [self.target_modules] if isinstance(self.target_modules, str) else sorted(self.target_modules)
        near = list(dict.fromkeys(n for target in targets for n in difflib.get_close_matches(target, suffixes + names)))
        hint = f"Near names: {_listed(near)}." if near else f"The model's linears are called {_listed(suffixes)}."
        rule = "match the whole name of" if isinstance(self.target_modules, str) else "name"
        return (
            f"target_modules must {rule} at least one module; got {self.target_modules!r}, which matches none. {hint}"
        )


def output_layer(model: nn.Module) -> nn.Module | None:
    """The output embeddings of a transformers model, which "all-linear" leaves out; None for other models."""
    getter = getattr(model, "get_output_embeddings", None)
    found = getter() if callable(getter) else None
    return found if isinstance(found, nn.Module) else None


def pattern_value(patterns: Mapping[str, V], name: str, default: V) -> V:
    """The value of the first pattern that matches the name or what follows one of its dots; else the default."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def _matches(names: Names, name: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, name) is not None
    return name in names or any(name.endswith(f".{suffix}") for suffix in names)


def _check_names(argument: str, names: object) -> None:
    if isinstance(names, str):
        check_pattern(argument, names)
    elif not isinstance(names, Collection) or not all(isinstance(name, str) for name in names):
        raise ArgumentError(f"{argument} must be a string or a list of strings; got {names!r}.")


def check_pattern(argument: str, pattern: object) -> None:
    """A regular expression.

    Raises:
        ArgumentError: it does not compile.
    """
    try:
        re.compile(pattern)  # type: ignore[call-overload]
    except (re.error, TypeError, RecursionError, OverflowError) as error:
        raise ArgumentError(f"{argument} must be a regular expression; got {pattern!r}: {error}.") from None


def _listed(names: Sequence[str], most: int = 8) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + rest
