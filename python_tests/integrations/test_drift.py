"""The drift guard: fingerprints, verdicts, what a self-test may not touch, and the rooms that ask it."""

from __future__ import annotations

import functools
import importlib.util
import textwrap
import types
import warnings
from pathlib import Path

import pytest
import torch

import lwft_kernels
from lwft_kernels import functional as LF
from lwft_kernels.integrations import drift
from lwft_kernels.integrations.drift import DriftWarning, Upstream, fingerprint, first_difference, why_not

spec = importlib.util.spec_from_file_location("drifted", Path(__file__).with_name("drifted.py"))
drifted = importlib.util.module_from_spec(spec)
spec.loader.exec_module(drifted)

FORWARD = """
def forward(self, x):
    y = x + 1
    if self.bias:
        y = y + f"{x!r:>{3}}" "a"
    return y
"""


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A function of a library `upstreamlib`, from its source."""
    count = 0

    def make(source, name="upstreamlib.layers"):
        nonlocal count
        count += 1
        path = tmp_path / f"source{count}.py"
        path.write_text(textwrap.dedent(source))
        module = types.ModuleType(name)
        exec(compile(path.read_text(), str(path), "exec"), module.__dict__)
        return module.forward

    return make


def test_layout_and_prose_do_not_count(library):
    other_layout = '''
    def forward(self,
                x):
            """What it does.

            At length.
            """
            y = x+1  # one more

            if (self
                .bias):
                # a comment
                y = y + f"{x!r:>{3}}" "a"
            return y
    '''
    with_parentheses = FORWARD.replace("self.bias", "(self.bias)")
    assert fingerprint(library(other_layout)) == fingerprint(library(with_parentheses))
    assert fingerprint(library(FORWARD)) != fingerprint(library(with_parentheses))


def test_every_python_gives_the_same():
    # An f-string is one token up to Python 3.11 and many from 3.12 on.
    assert list(drift._tokens('def f(x):\n  "doc"\n  return f"{x!r:>{3}} {{}}" + rf\'\'\'\n{x}\'\'\'\n')) == [
        "def", "f", "(", "x", ")", ":", "NEWLINE", "INDENT",
        "return", 'f"{x!r:>{3}} {{}}"', "+", "rf'''\n{x}'''", "NEWLINE", "DEDENT",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "old,new",
    [("+ 1", "+ 2"), ("if self.bias", "if not self.bias"), ("{x!r", "{x!s"), ('"a"', '"b"'), ("x):", "x, z=0):")],
)
def test_code_counts(library, old, new):
    assert old in FORWARD
    assert fingerprint(library(FORWARD)) != fingerprint(library(FORWARD.replace(old, new)))


def test_a_block_that_moves_counts(library):
    moved = FORWARD.replace("    return y", "        return y")
    assert fingerprint(library(FORWARD)) != fingerprint(library(moved))


def test_wrappers_count(library):
    function = library(FORWARD)

    @functools.wraps(function)
    def wrapper(*args):
        return 2 * function(*args)

    assert fingerprint(function) != fingerprint(wrapper)


def test_what_has_no_source_is_never_known():
    assert fingerprint(len) == fingerprint(eval("lambda: 1")) == drift.UNREADABLE


class SelfTest:
    """A self-test that counts its runs."""

    def __init__(self, answer=None):
        self.answer, self.runs = answer, 0

    def __call__(self):
        self.runs += 1
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def test_a_known_one_is_not_tested(library):
    function, test = library(FORWARD), SelfTest("never")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for strict in (False, True):
            assert (
                why_not(Upstream("upstreamlib.f", (function,), frozenset({fingerprint(function)}), test), strict)
                is None
            )
    assert test.runs == 0


def test_an_unknown_one_that_passes_is_warned_of_once(library):
    function, test = library(FORWARD), SelfTest()
    upstream = Upstream("upstreamlib.Layer.forward", (function,), frozenset({"0" * 16}), test)
    with pytest.warns(DriftWarning, match=f"upstreamlib.Layer.forward .*{fingerprint(function)}.* self-test passed"):
        assert why_not(upstream, strict=False) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert why_not(upstream, strict=False) is None
    assert test.runs == 1
    assert "strict=True" in why_not(upstream, strict=True)


@pytest.mark.parametrize(
    "answer,words",
    [("dx differs by 3e-2", "dx differs"), (TypeError("no such argument"), "TypeError: no such argument")],
)
def test_an_unknown_one_that_fails_is_refused(library, answer, words):
    upstream = Upstream("upstreamlib.f", (library(FORWARD),), frozenset(), SelfTest(answer))
    with pytest.warns(DriftWarning, match="stays as it is"):
        assert words in why_not(upstream, strict=False)
    assert words in why_not(upstream, strict=False)
    assert upstream.self_test.runs == 1


@pytest.mark.parametrize("wrapped", [False, True])
def test_what_somebody_else_put_there_is_theirs(library, wrapped):
    original = library(FORWARD)
    theirs = library(FORWARD.replace("+ 1", "+ 2"), name="otherlib.patches")
    if wrapped:
        functools.update_wrapper(theirs, original)
    test = SelfTest()
    reason = why_not(Upstream("upstreamlib.f", (theirs,), frozenset({fingerprint(theirs)}), test), strict=False)
    assert reason == "somebody else has replaced upstreamlib.f (by a function of otherlib.patches)"
    assert test.runs == 0


def test_a_decorator_of_torch_is_nobodys_patch(library):
    function = torch.no_grad()(library(FORWARD))
    upstream = Upstream("upstreamlib.f", (function,), frozenset({fingerprint(function)}), SelfTest("never"))
    assert why_not(upstream, strict=False) is None


@pytest.mark.filterwarnings("ignore::lwft_kernels.integrations.drift.DriftWarning")
def test_a_self_test_leaves_no_trace(library):
    seen = []

    def self_test():
        seen.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")))
        LF.low_rank_linear(torch.randn(2, 3), torch.randn(1, 3), torch.randn(4, 1))
        return

    upstream = Upstream("upstreamlib.f", (library(FORWARD),), frozenset(), self_test)
    before = torch.random.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert why_not(upstream, strict=False) is None
        assert torch.is_inference_mode_enabled() and torch.is_autocast_enabled("cpu")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert seen == [(True, False, False)] and lwft_kernels.stats() == {}


def test_first_difference():
    x = torch.randn(5, dtype=torch.float64)
    assert first_difference({"out": x * (1 + 1e-15), "dx": None}, {"out": x, "dx": None}) is None
    assert first_difference({"out": x, "dx": x * (1 + 1e-6)}, {"out": x, "dx": x}) == "dx differs by 1.0e-06"
    assert "dx is none" in first_difference({"out": x}, {"out": x, "dx": x})
    assert "upstream's is none" in first_difference({"dx": x}, {"dx": None})
    assert "float32" in first_difference({"out": x.float()}, {"out": x})
    assert "upstream has no dy" in first_difference({"out": x, "dy": x}, {"out": x})
    assert "differs" in first_difference({"out": x * float("nan")}, {"out": x})
    assert "differs" in first_difference({"out": x}, {"out": 0 * x})


# ---- the rooms, under libraries that have moved on: drifted.py is the process ----


@pytest.fixture(scope="module")
def outcomes():
    return functools.cache(drifted.run)


@pytest.mark.parametrize("room", drifted.EDITS)
def test_upstream_rewritten_but_the_same_is_replaced_after_its_test(outcomes, room):
    outcome = outcomes("same")[room]
    assert outcome["replaced"] == 1 and outcome["equal"] and outcome["unreached"] == 0, outcome
    (warning,) = outcome["warnings"]
    assert "self-test passed" in warning
    replaced, reasons = outcome["strict"]
    assert replaced == 0 and all("strict=True" in reason for reason in reasons)


@pytest.mark.parametrize("room", drifted.EDITS)
def test_upstream_that_computes_something_else_is_left(outcomes, room):
    outcome = outcomes("other")[room]
    assert outcome["replaced"] == 0 and outcome["equal"], outcome
    assert any("differs by" in reason for reason in outcome["reasons"]), outcome
    (warning,) = outcome["warnings"]
    assert "stays as it is" in warning
    assert outcome["strict"][0] == 0


@pytest.mark.parametrize("room", drifted.EDITS)
def test_a_patch_of_another_package_is_left(outcomes, room):
    outcome = outcomes("foreign")[room]
    assert outcome["replaced"] == 0 and outcome["equal"], outcome
    assert any("somebody else has replaced" in reason for reason in outcome["reasons"]), outcome
    assert outcome["warnings"] == []
