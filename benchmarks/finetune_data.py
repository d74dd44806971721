"""A classification task that every Python carries: which package of the standard library does this text document?

The texts are the docstrings of the running interpreter, read from its source files; nothing is imported or downloaded.
"""

from __future__ import annotations

import ast
import random
import re
import sysconfig
from dataclasses import dataclass
from pathlib import Path

# Not documentation of a library: test suites, a GUI program, vendored wheels, turtle graphics.
_LEFT_OUT = {"__pycache__", "ensurepip", "idlelib", "lib2to3", "site-packages", "test", "turtledemo"}
_SHORTEST = 4  # words of a sentence worth reading
HELD_OUT = 4  # every fourth docstring is held out


@dataclass
class Package:
    """Sentences of one package, in reading order, of docstrings to train on and of docstrings held out."""

    name: str
    train: list[str]
    held_out: list[str]


def sentences(docstring: str) -> list[str]:
    """The sentences of a docstring: paragraphs unwrapped, then cut after . ! ? or :"""
    found = []
    for paragraph in re.split(r"\n\s*\n", docstring):
        text = " ".join(paragraph.split())
        found += [s for s in re.split(r"(?<=[.!?:])\s+", text) if len(s.split()) >= _SHORTEST]
    return found


def _docstrings(folder: Path) -> list[str]:
    found = []
    for file in sorted(folder.rglob("*.py")):
        if {"test", "tests"} & set(file.parts):
            continue
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                found.append(ast.get_docstring(node) or "")
    return found


def read_packages(count: int = 12) -> list[Package]:
    """The `count` packages of the standard library with the most documentation, each split in two, without doubles."""
    packages = []
    for folder in sorted(Path(sysconfig.get_path("stdlib")).iterdir()):
        if folder.name in _LEFT_OUT or not (folder / "__init__.py").exists():
            continue
        seen: set[str] = set()
        parts: tuple[list[str], list[str]] = ([], [])
        for index, docstring in enumerate(_docstrings(folder)):
            new = [s for s in sentences(docstring) if not (s in seen or seen.add(s))]  # type: ignore[func-returns-value]
            parts[index % HELD_OUT == 0].extend(new)
        packages.append(Package(folder.name, *parts))
    packages.sort(key=lambda package: -min(len(package.train), 3 * len(package.held_out)))
    return sorted(packages[:count], key=lambda package: package.name)


def _window(lines: list[str], start: int, words: int) -> str:
    """Consecutive sentences from `start` on, going round at the end, until there are `words` words."""
    text: list[str] = []
    for step in range(len(lines)):
        text += lines[(start + step) % len(lines)].split()
        if len(text) >= words:
            break
    return " ".join(text[:words])


class Task:
    """Texts of a wanted length with the index of their package.

    Args:
        words: length of a text.
        seed: of the draw of training texts; the held-out texts are always the same.
    """

    def __init__(self, words: int, seed: int, packages: list[Package] | None = None) -> None:
        self.packages = read_packages() if packages is None else packages
        self.words = words
        self._random = random.Random(seed)

    @property
    def labels(self) -> list[str]:
        """Names of the packages."""
        return [package.name for package in self.packages]

    def batch(self, size: int) -> tuple[list[str], list[int]]:
        """Training texts, the packages in equal shares, each from a random place of its documentation."""
        labels = [self._random.randrange(len(self.packages)) for _ in range(size)]
        texts = []
        for label in labels:
            lines = self.packages[label].train
            texts.append(_window(lines, self._random.randrange(len(lines)), self.words))
        return texts, labels

    def held_out(self, per_package: int) -> tuple[list[str], list[int]]:
        """The same number of texts for every package, evenly spaced over its held-out documentation."""
        texts, labels = [], []
        for label, package in enumerate(self.packages):
            for index in range(per_package):
                start = index * len(package.held_out) // per_package
                texts.append(_window(package.held_out, start, self.words))
                labels.append(label)
        return texts, labels
