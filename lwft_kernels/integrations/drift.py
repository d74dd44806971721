"""The drift guard: is an upstream function that a room overrides still the one the room was written against?

A room names what it overrides as an `Upstream`, with the fingerprints of the releases it is tested with, and asks
`why_not` before it swaps. Something newer is held against our code on a tiny instance first, or, with `strict`, left.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import sys
import tokenize
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lwft_kernels import backend

UNREADABLE = "unreadable"  # the fingerprint of what has no source to read; it is never known


class DriftWarning(UserWarning):
    """An upstream function is not one that lwft_kernels was tested with."""


@dataclass(frozen=True)
class Upstream:
    """What a room overrides. Make it when it is asked for, not at import: somebody may replace a function in between.

    Attributes:
        name: what it is, the package it belongs to first: ``"peft.tuners.lora.Linear.forward"``.
        functions: the function that is overridden, and those whose behaviour our version of it copies.
        known: their fingerprints in the releases that the tests have run with.
        self_test: holds a tiny instance, forward and backward, against upstream; returns what differed, or None. It
            runs with its own random numbers and is not counted in `stats`. `first_difference` compares for it.
    """

    name: str
    functions: tuple[Callable[..., Any], ...]
    known: frozenset[str]
    self_test: Callable[[], str | None]


def why_not(upstream: Upstream, strict: bool) -> str | None:
    """The reason why `upstream` must not be overridden, or None.

    A function that somebody outside the library has put there is theirs and is left alone. One with an unknown
    fingerprint is refused if `strict`; else there is one warning, and the self-test, run once, decides.
    """
    library = upstream.name.replace(".", " ").split()[0]
    for function in upstream.functions:
        for layer in _layers(function):
            origin: str = getattr(layer, "__globals__", {}).get("__name__", library)
            if origin.partition(".")[0] not in (library, *_DECORATORS):
                return f"somebody else has replaced {upstream.name} (by a function of {origin})"
    found = fingerprint(*upstream.functions)
    if found in upstream.known:
        return None
    version = f"{library} {getattr(sys.modules.get(library), '__version__', '')}".rstrip()
    if strict:
        return f"{upstream.name} of {version} is not one that was tested (fingerprint {found}), and strict=True"
    tested = (upstream.name, upstream.functions)
    if tested not in _verdicts:
        difference = _run(upstream.self_test)
        _verdicts[tested] = None if difference is None else f"{upstream.name} of {version} is another: {difference}"
        outcome = "Its self-test passed, so it is replaced; strict=True would leave it."
        if difference is not None:
            outcome = f"It stays as it is: {difference}."
        warnings.warn(
            f"lwft_kernels: {upstream.name} of {version} is not one that was tested (fingerprint {found}). {outcome}",
            DriftWarning,
            stacklevel=2,
        )
    return _verdicts[tested]


# Packages whose decorators libraries put around their own functions
_DECORATORS = frozenset({"torch", "typing_extensions", *sys.stdlib_module_names})
# What a self-test said, so that it is run, and warned of, once
_verdicts: dict[tuple[str, tuple[Callable[..., Any], ...]], str | None] = {}


def _run(self_test: Callable[[], str | None]) -> str | None:
    """The self-test's answer; neither the random numbers, the modes nor the counts of the caller are touched."""
    try:
        with (
            torch.random.fork_rng(devices=[]),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
            backend.not_counted(),
        ):
            torch.manual_seed(0)
            return self_test()
    except Exception as error:  # whatever it is, what we know of upstream no longer holds
        return f"its self-test failed with {type(error).__name__}: {error}"


def first_difference(
    ours: Mapping[str, Tensor | None], theirs: Mapping[str, Tensor | None], limit: float = 1e-9
) -> str | None:
    """What a self-test returns: the first of `theirs` that `ours` does not have or that is another.

    Args:
        ours, theirs: outputs and gradients by name, computed in float64, where the order of a sum is worth about 1e-15.
        limit: the largest distance, relative to the norm of `theirs`.
    """
    for name, expected in theirs.items():
        found = ours.get(name)
        if expected is None and found is None:
            continue
        if expected is None or found is None or expected.shape != found.shape or expected.dtype != found.dtype:
            return f"{name} is {_form(found)}, upstream's is {_form(expected)}"
        distance, scale = (found - expected).norm().item(), expected.norm().item()
        if not distance <= limit * max(scale, 1e-300):
            return f"{name} differs by {distance / max(scale, 1e-300):.1e}"
    more = ours.keys() - theirs.keys()
    return f"upstream has no {min(more)}" if more else None


def _form(value: Tensor | None) -> str:
    return "none" if value is None else f"{value.dtype} of shape {tuple(value.shape)}"


@functools.cache
def fingerprint(*functions: Callable[..., Any]) -> str:
    """Sixteen hexadecimal digits over the source of `functions` (and what wraps them), the value for `known`.

    Comments, docstrings, blank lines and the width of indentation do not count; the same for every Python version.
    """
    digest = hashlib.sha256()
    for function in functions:
        for layer in _layers(function):
            try:
                source = inspect.getsource(getattr(layer, "__code__", layer))
                digest.update("\n".join(_tokens(source)).encode())
            except (OSError, TypeError, SyntaxError, tokenize.TokenError):
                return UNREADABLE
            digest.update(b"\0")
    return digest.hexdigest()[:16]


def _layers(function: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """A function and, where decorators have wrapped it, what is within: `inspect` shows the innermost only."""
    seen: set[int] = set()
    while id(function) not in seen:
        seen.add(id(function))
        yield function
        function = getattr(function, "__wrapped__", function)


_BLANK = (tokenize.COMMENT, tokenize.NL, tokenize.ENCODING, tokenize.ENDMARKER)
_LAYOUT = (tokenize.INDENT, tokenize.DEDENT, tokenize.NEWLINE)
# Python 3.12 and later cut an f-string (3.14 a t-string) into parts between these two; before, it is one token.
_BEGINS = {getattr(tokenize, name, None) for name in ("FSTRING_START", "TSTRING_START")} - {None}
_ENDS = {getattr(tokenize, name, None) for name in ("FSTRING_END", "TSTRING_END")} - {None}


def _tokens(source: str) -> Iterator[str]:
    """The tokens that mean something, each layout token by its name."""
    rows = source.splitlines(keepends=True)
    tokens = [t for t in tokenize.generate_tokens(iter(rows).__next__) if t.type not in _BLANK]
    depth, begin, index = 0, (0, 0), -1
    begins_statement = True
    while (index := index + 1) < len(tokens):
        token = tokens[index]
        if token.type in _BEGINS:
            begin = token.start if depth == 0 else begin
            depth += 1
        elif token.type in _ENDS:
            depth -= 1
            if depth == 0:
                yield _between(rows, begin, token.end)
        elif depth == 0 and token.type in _LAYOUT:
            yield tokenize.tok_name[token.type]
        elif begins_statement and token.type == tokenize.STRING and tokens[index + 1].type == tokenize.NEWLINE:
            index += 1  # a docstring, and the end of its line
            continue
        elif depth == 0:
            yield token.string
        begins_statement = token.type in _LAYOUT


def _between(rows: list[str], begin: tuple[int, int], end: tuple[int, int]) -> str:
    if begin[0] == end[0]:
        return rows[begin[0] - 1][begin[1] : end[1]]
    return "".join((rows[begin[0] - 1][begin[1] :], *rows[begin[0] : end[0] - 1], rows[end[0] - 1][: end[1]]))
