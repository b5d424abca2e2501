"""Real text with labels, on every machine: the docstrings of Python's standard library.

Each docstring is labelled by the top-level package or module it stands in. The source files are parsed, never imported.
"""

from __future__ import annotations

import ast
import hashlib
import random
import re
import sysconfig
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_MIN_WORDS = 5


@dataclass(frozen=True)
class LabelledTexts:
    """Texts with the index of their label.

    Attributes:
        labels: names of the classes, most frequent first.
        train: (text, class) pairs to learn from.
        held_out: (text, class) pairs to judge by; no text is in both.
    """

    labels: tuple[str, ...]
    train: tuple[tuple[str, int], ...]
    held_out: tuple[tuple[str, int], ...]

    @property
    def majority(self) -> float:
        """Held-out accuracy of always answering the class that is most frequent in training."""
        favourite = Counter(label for _, label in self.train).most_common(1)[0][0]
        return sum(label == favourite for _, label in self.held_out) / len(self.held_out)

    @property
    def digest(self) -> str:
        """Fingerprint of texts, labels and split: standard libraries differ from one Python release to the next."""
        return hashlib.sha256(repr((self.labels, self.train, self.held_out)).encode()).hexdigest()[:12]


def load(*, classes: int = 12, per_class: int = 240, held_out: float = 0.2, seed: int = 0) -> LabelledTexts:
    """The `classes` labels with the most distinct docstrings, at most `per_class` of each.

    The label's own name is cut out of its texts, so the answer is never spelled in the question. A text that occurs
    more than once, under one label or several, is dropped altogether: it could stand on both sides of the split.
    """
    texts = _texts_by_label()
    occurrences = Counter(text for found in texts.values() for text in found)
    unique = {label: [t for t in found if occurrences[t] == 1] for label, found in texts.items()}
    labels = sorted(unique, key=lambda label: (-len(unique[label]), label))[:classes]
    shuffle = random.Random(seed)
    train: list[tuple[str, int]] = []
    kept: list[tuple[str, int]] = []
    for index, label in enumerate(labels):
        pool = sorted(unique[label])
        shuffle.shuffle(pool)
        pool = pool[:per_class]
        cut = round(len(pool) * held_out)
        kept += [(text, index) for text in pool[:cut]]
        train += [(text, index) for text in pool[cut:]]
    shuffle.shuffle(train)
    return LabelledTexts(tuple(labels), tuple(train), tuple(kept))


def batches(examples: Sequence[tuple[str, int]], size: int, *, seed: int) -> Iterator[list[int]]:
    """Indices of full batches, epoch after epoch, reshuffled each time; endless."""
    shuffle = random.Random(seed)
    while True:
        order = list(range(len(examples)))
        shuffle.shuffle(order)
        for start in range(0, len(order) - size + 1, size):
            yield order[start : start + size]


def _texts_by_label() -> dict[str, list[str]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [f for f in sorted(root.rglob("*.py")) if not _NOT_LIBRARY & set(f.relative_to(root).parts)]
    texts: dict[str, list[str]] = defaultdict(list)
    for file in tqdm(files, desc="reading the standard library", unit="file", leave=False, disable=None):
        label = file.relative_to(root).parts[0].removesuffix(".py")
        if not label.startswith("_"):
            texts[label] += _docstrings(file, label)
    return texts


def _docstrings(file: Path, label: str) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old modules are not our concern
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError):  # lib2to3 carries Python 2 sources on purpose
            return
    own_name = re.compile(rf"{re.escape(label)}", re.IGNORECASE)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = " ".join(own_name.sub(" ", ast.get_docstring(node) or "").split())
            if len(text.split()) >= _MIN_WORDS:
                yield text
