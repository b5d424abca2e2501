"""What compiled kernels take of their targets, kept in figures.json: only what is not there is compiled.

A figure is the assembler's and the same on every machine, for as long as the kernel's source, what it is compiled for
and Triton are the same. So each is kept under a hash of all of these: a changed kernel is compiled and judged in every
run, until `make figures` has written it to the file. `make test-compile-all` believes none of it.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import types
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
import triton.language as tl

FILE = Path(__file__).with_name("figures.json")
OURS = ("lora_kernels", "tests", "importlib")  # what Triton brings is known by its version


def key_of(fn: Any, *circumstances: Any, version: str | None = None) -> str:
    """Hash of a kernel with everything of ours that it calls or reads, of Triton's version, and of `circumstances`.

    Not Triton's own cache key, which knows the line a function begins at. Mappings count as sorted, sets too. version:
    of the Triton that compiles, None for the one that is imported.
    """
    sources: dict[str, str] = {}
    _collect(fn, sources)
    text = json.dumps([version or triton.__version__, sorted(sources.items()), _plain(circumstances)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _collect(fn: Any, sources: dict[str, str]) -> None:
    name = f"{fn.fn.__module__}.{fn.fn.__qualname__}"
    if name in sources:
        return
    # A kernel's source is without its decorator.
    sources[name] = f"{type(fn).__name__}, noinline={getattr(fn, 'noinline', None)}\n{fn.src}"
    for read, value in _names_of(fn):
        if hasattr(value, "src") and hasattr(value, "fn") and value.fn.__module__.partition(".")[0] != "triton":
            # Which function the name stands for; its text has a place of its own.
            sources[f"{name}: {read}"] = f"{value.fn.__module__}.{value.fn.__qualname__}"
            _collect(value, sources)
        elif isinstance(value, (tl.constexpr, bool, int, float, str, tuple)):
            sources[f"{name}: {read}"] = repr(getattr(value, "value", value))
        elif inspect.isclass(value) and value.__module__.partition(".")[0] in OURS:
            sources[f"{name}: {read}"] = inspect.getsource(value)
        elif (python := getattr(value, "fn", value)) is not None and hasattr(python, "__qualname__"):
            sources[f"{name}: {read}"] = f"{python.__module__}.{python.__qualname__}"  # Triton's, under any name


def _names_of(fn: Any) -> Iterator[tuple[str, Any]]:
    """Each global or variable of an enclosing function that the source names, attributes of modules included."""
    names = ChainMap(dict(inspect.getclosurevars(fn.fn).nonlocals), fn.fn.__globals__)
    for node in ast.walk(ast.parse(fn.src)):
        if isinstance(node, ast.Name) and node.id in names:
            yield node.id, names[node.id]
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = names.get(node.value.id)
            if isinstance(module, types.ModuleType) and module.__name__.partition(".")[0] in OURS:
                yield f"{node.value.id}.{node.attr}", getattr(module, node.attr, None)


def _plain(value: Any) -> Any:
    """As JSON, whose text does not depend on the order in which a mapping or a set was made."""
    if isinstance(value, Mapping):
        return sorted([str(key), _plain(each)] for key, each in value.items())
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(each) for each in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


@dataclass
class Book:
    """The file, and what a run asked of it.

    Attributes:
        known: (label, figures) by key, from the file.
        all: compile whatever is known, and compare.
        asked: keys looked up.
        compiled: as `known`, what this run compiled.
        whole: the run has every test, so that what nothing asks for is nobody's.
        anew: what is compiled counts, whatever was known.
    """

    known: dict[str, tuple[str, list[int]]]
    all: bool = False
    asked: set[str] = field(default_factory=set)
    compiled: dict[str, tuple[str, list[int]]] = field(default_factory=dict)
    whole: bool = True
    anew: bool = False

    @staticmethod
    def of(file: Path) -> Book:
        """The file's figures; none where there is no file."""
        rows = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        return Book({key: (label, numbers) for key, (label, *numbers) in rows.items()})

    def find(self, key: str) -> list[int] | None:
        """The figures, unless they are to be compiled."""
        self.asked.add(key)
        return None if self.all or key not in self.known else self.known[key][1]

    def add(self, key: str, label: str, numbers: list[int]) -> None:
        """What was compiled. What was known of it must be the same."""
        self.compiled[key] = label, numbers
        known = self.known.get(key, (label, numbers))[1]
        assert self.anew or numbers == known, (
            f"{label}: compiled {numbers}, {FILE.name} has {known} under {key}; "
            "without that line, `make figures` writes what is compiled"
        )

    def join(self, asked: Sequence[str], compiled: Mapping[str, Sequence[Any]]) -> None:
        """What a worker asked and compiled."""
        self.asked |= set(asked)
        self.compiled |= {key: (label, list(numbers)) for key, (label, numbers) in compiled.items()}

    @property
    def stale(self) -> list[str]:
        """Labels of what nothing asked for; none after a part of the tests."""
        return sorted(self.known[key][0] for key in self.known.keys() - self.asked) if self.whole else []

    @property
    def missing(self) -> list[str]:
        """Labels of what was asked for and not known."""
        return sorted(self.compiled[key][0] for key in self.compiled.keys() - self.known.keys())

    def write(self, file: Path) -> None:
        """What was asked for, after a part of the tests also what was known; a line each, a kernel's together."""
        rows = {key: row for key, row in (self.known | self.compiled).items() if key in self.asked or not self.whole}
        ordered = sorted(rows.items(), key=lambda item: (item[1][0], item[0]))
        lines = [f"{json.dumps(key)}: {json.dumps([label, *numbers])}" for key, (label, numbers) in ordered]
        file.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


BOOK = Book.of(FILE)
