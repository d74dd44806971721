"""What this room builds on in transformers: known in the installed release, tried where it is not."""

from __future__ import annotations

import importlib
import warnings

import pytest
import torch
from tiny_models import build
from torch import nn

import lwft_kernels
from lwft_kernels.integrations import drift
from lwft_kernels.integrations.transformers import upstream

pytestmark = pytest.mark.usefixtures("native")


@pytest.fixture(autouse=True)
def no_verdicts(monkeypatch):
    monkeypatch.setattr(drift, "_verdicts", {})


def test_the_installed_release_is_known():
    assert upstream.why_not(strict=True) is None
    assert lwft_kernels.explain(build("gemma2"), strict=True).replaced


def test_the_self_tests_pass():
    assert upstream._test_sdpa() is None and upstream._test_masks() is None


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "granite_swa", "mimo_v2_flash", "flint", "deepseek_v4",
                                    "openai_privacy_filter"])  # fmt: skip
def test_softcap_and_sinks_are_those_of_eager(family):
    try:
        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    except ImportError:
        pytest.skip("not in this release")
    assert drift.fingerprint(module.eager_attention_forward) in upstream._EAGER
    assert upstream._test_eager(module.eager_attention_forward) is None


def test_an_unknown_release_is_tried(monkeypatch):
    monkeypatch.setattr(upstream, "_SDPA", frozenset())
    with pytest.warns(drift.DriftWarning, match="sdpa_attention_forward"):
        report = lwft_kernels.explain(build("llama"))
    assert len(report.replaced) == 2
    refused = lwft_kernels.explain(build("llama"), strict=True)
    assert not refused.replaced and "strict=True" in refused.declined[0].reason


def nothing_to_replace():
    yield nn.Linear(2, 2)
    yield build("bloom")
    for implementation in ("flex_attention", "eager"):
        model = build("gemma2")
        model.set_attn_implementation(implementation)
        if implementation == "eager":
            model.config.output_attentions = True
        yield model
    model = build("gemma2")
    lwft_kernels.accelerate(model)
    yield model  # already


def test_nothing_is_tried_where_there_is_nothing_to_replace(monkeypatch):
    models = list(nothing_to_replace())
    for known in ("_SDPA", "_MASKS", "_EAGER"):
        monkeypatch.setattr(upstream, known, frozenset())
    with warnings.catch_warnings():
        warnings.simplefilter("error", drift.DriftWarning)
        reports = [lwft_kernels.explain(model, strict=strict) for model in models for strict in (False, True)]
    assert not any(report.replaced for report in reports)
    assert not any("strict" in change.reason for report in reports for change in report.declined)


def other_attention(*args, **kwargs):
    out, weights = upstream.sdpa_attention_forward(*args, **kwargs)
    return out * 1.001, weights


@pytest.mark.parametrize("known", ["_SDPA", "_MASKS"])
def test_a_release_that_differs_is_refused(known, monkeypatch):
    original = upstream._difference
    monkeypatch.setattr(upstream, "_difference", lambda theirs, *rest, **more: original(other_attention, *rest, **more))
    monkeypatch.setattr(upstream, "compact_mask", lambda **given: ~upstream.sdpa_mask(**given))
    monkeypatch.setattr(upstream, known, frozenset())
    model = build("llama")
    with pytest.warns(drift.DriftWarning, match="stays as it is"):
        report = lwft_kernels.accelerate(model)
    assert not report.replaced and "is another" in report.declined[0].reason
    assert model.config._attn_implementation == "sdpa"


def test_a_model_whose_own_attention_differs_is_refused(monkeypatch):
    def test_eager(eager):
        return "the softcap is another"

    monkeypatch.setattr(upstream, "_EAGER", frozenset())
    monkeypatch.setattr(upstream, "_test_eager", test_eager)
    with pytest.warns(drift.DriftWarning, match="gemma2"):
        report = lwft_kernels.accelerate(build("gemma2"))
    assert not report.replaced and {"the softcap is another" in c.reason for c in report.declined} == {True}
    assert lwft_kernels.accelerate(build("llama")).replaced  # SDPA says it all


def test_a_mistake_of_ours_would_be_found(monkeypatch):
    forward = upstream.attention_forward
    for argument in ("scaling", "position_bias", "s_aux", "softcap"):
        monkeypatch.setattr(upstream, "attention_forward", lambda *args, _name=argument, **kwargs: forward(
            *args, **{name: value for name, value in kwargs.items() if name != _name}))  # fmt: skip
        results = [upstream._test_sdpa()]
        for family in ("gemma2", "gpt_oss"):
            module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
            results.append(upstream._test_eager(module.eager_attention_forward))
        if argument == "position_bias" and upstream.RELEASE < (5,):
            continue  # SDPA takes none there
        assert any(results), argument
    assert torch.is_grad_enabled()
