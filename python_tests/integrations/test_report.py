"""The report by itself, over modules of its own: the table, who was reached, and the way back."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import sys
import weakref

import pytest
import torch
from torch import nn

import lwft_kernels
from lwft_kernels import backend
from lwft_kernels.integrations import reached
from lwft_kernels.integrations.report import Change, Report, _ranges

accelerate_module = sys.modules["lwft_kernels.integrations.accelerate"]  # the function of that name hides it


class Plain(nn.Module):
    def forward(self, x):
        return x + 1


class Fast(Plain):
    def forward(self, x):
        reached.mark(self)
        return super().forward(x)


class Slow(Plain):
    """Replaced, and declining every call."""

    def forward(self, x):
        backend.record_decline("test Plain", "too small")
        return super().forward(x)


def plan(model, strict=False):
    """A room for `Plain`; with `strict` it declines."""

    def change(name, module, to):
        def apply():
            module.__class__ = to

        def revert():
            if type(module) is to:
                module.__class__ = Plain

        if strict or getattr(module, "stays", False):
            return Change(name, "Plain", reason="told to")
        return Change(name, "Plain", "fast", apply=apply, revert=revert)

    return [
        change(name, module, Slow if getattr(module, "slow", False) else Fast)
        for name, module in model.named_modules()
        if type(module) is Plain
    ]


@pytest.fixture(autouse=True)
def room(monkeypatch):
    """`accelerate` asks this file's room alone."""
    monkeypatch.setattr(accelerate_module, "_ROOMS", (("here", "torch", "attention"),))
    monkeypatch.setattr(accelerate_module, "_plan", lambda room, library, model, strict: plan(model, strict))


def build(count=3):
    return nn.ModuleDict({"layers": nn.ModuleList(Plain() for _ in range(count)), "head": nn.Linear(2, 2)})


def test_numbered_layers_share_a_line():
    report = lwft_kernels.accelerate(build(12))
    lines = str(report).splitlines()
    assert lines[0].split() == ["module", "was", "now,", "or", "why", "not"]
    assert lines[2].split() == ["layers.0-11", "Plain", "fast"]
    assert lines[3].startswith("12 of 12 replaced (torch ")
    every = report.table(every=True)
    assert [f"layers.{i} " in every for i in range(13)] == [True] * 12 + [False]
    assert len(report.changes) == 12


@pytest.mark.parametrize(
    "names,expected",
    [
        (["a.0.q", "a.0.k", "a.1.q", "a.1.k"], ["a.0-1.q", "a.0-1.k"]),
        (["a.0", "a.2", "a.3", "a.4", "a.9"], ["a.0,2-4,9"]),
        (["a.0.e.0", "a.0.e.1", "a.1.e.0", "a.1.e.1"], ["a.0-1.e.0-1"]),
        (["a.0.e.0", "a.0.e.1", "a.1.e.0"], ["a.0.e.0-1", "a.1.e.0"]),
        (["a.1.x", "a.b.x", "a.0.x"], ["a.0-1.x", "a.b.x"]),
        (["0", "1"], ["0-1"]),
        (["head"], ["head"]),
    ],
)
def test_ranges(names, expected):
    ranges = _ranges(names)
    assert [text for _, text in ranges] == expected
    assert {first for first, _ in ranges} <= set(names)


def test_lines_that_differ_stay_apart_and_in_order():
    model = build(4)
    model.layers[1].stays = True
    lines = str(lwft_kernels.accelerate(model)).splitlines()
    assert [line.split("  ")[0] for line in lines[2:4]] == ["layers.0,2-3", "layers.1"]
    assert "unchanged: told to" in lines[3] and lines[4].startswith("3 of 4 replaced")


def test_explain_changes_nothing():
    model = build()
    report = lwft_kernels.explain(model)
    assert str(report).splitlines()[:3] == str(lwft_kernels.accelerate(build())).splitlines()[:3]
    assert "3 of 3 replaced, once accelerated" in str(report)
    assert all(type(layer) is Plain for layer in model.layers)
    report.undo()
    assert "once accelerated" in str(report)


def test_an_empty_report_says_so():
    assert "nothing to replace (torch" in str(lwft_kernels.accelerate(nn.Linear(2, 2)))


def test_the_model_itself_has_a_name():
    layer = Plain()
    report = lwft_kernels.accelerate(layer)
    assert type(layer) is Fast and "(the model)" in str(report)
    layer(torch.zeros(2))
    assert not report.unreached()


def test_rich_draws_it():
    console = pytest.importorskip("rich.console", reason="rich is optional").Console(file=io.StringIO(), width=100)
    report = lwft_kernels.accelerate(build())
    console.print(report)
    text = console.file.getvalue()
    assert "layers.0-2" in text and "3 of 3 replaced" in text and "─" in text
    console.print(lwft_kernels.accelerate(nn.Linear(2, 2)))
    assert "nothing to replace" in console.file.getvalue()


def test_what_is_never_called_is_said():
    model = build()
    report = lwft_kernels.accelerate(model)
    assert "0 of 3 reached by fast calls so far" in str(report)
    assert "never reached" not in str(report), "nobody has called the model yet"
    assert [c.module for c in report.unreached()] == ["layers.0", "layers.1", "layers.2"]
    for layer in (model.layers[0], model.layers[2]):
        layer(torch.zeros(2))
    assert [c.module for c in report.unreached()] == ["layers.1"]
    assert "2 of 3 reached by fast calls so far\nnever reached: layers.1" in str(report)
    model.layers[1](torch.zeros(2))
    assert "all of them reached by fast calls" in str(report) and not report.unreached()


def test_what_declines_every_call_is_said_with_the_reason():
    model = build()
    for layer in model.layers:
        layer.slow = True
    report = lwft_kernels.accelerate(model)
    for layer in model.layers:
        layer(torch.zeros(2))
    assert "never reached: layers.0-2" in str(report)
    assert "test Plain: 3 x too small" in str(report)
    assert lwft_kernels.stats() == {"test Plain": {"fast": 0, "declined": {"too small": 3}}}


def test_a_new_report_counts_anew():
    model = build(1)
    report = lwft_kernels.accelerate(model)
    model.layers[0](torch.zeros(2))
    report.undo()
    assert len(lwft_kernels.accelerate(model).unreached()) == 1


@pytest.mark.parametrize("regional", [False, True])
def test_under_compile_what_is_traced_counts(regional):
    torch._dynamo.reset()
    model = nn.Sequential(*(Plain() for _ in range(12)))
    report = lwft_kernels.accelerate(model)
    x = torch.zeros(2)
    frames = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    if regional:
        for layer in model:
            layer.compile(fullgraph=True, backend="aot_eager")
    else:
        model.compile(fullgraph=True, backend="aot_eager")
    reached._classes.clear()
    assert len(report.unreached()) == 12
    assert torch.equal(model(x), x + 12)
    assert not report.unreached()
    if regional:  # one graph, at most with a second one after the first look, serves all twelve
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - frames <= 2
    reached._classes.clear()


def test_marks_are_not_on_the_module():
    layer = Fast()
    before = set(layer.__dict__), pickle.dumps(layer.state_dict())
    layer(torch.zeros(2))
    assert (set(layer.__dict__), pickle.dumps(layer.state_dict())) == before
    assert reached.is_reached(layer) and not reached.is_reached(copy.deepcopy(layer))


def test_marks_die_with_the_module():
    layer = Fast()
    layer(torch.zeros(2))
    key, gone = id(layer), weakref.ref(layer)
    assert key in reached._modules
    del layer
    gc.collect()
    assert gone() is None and key not in reached._modules


def test_a_report_keeps_no_model_alive():
    model = nn.ModuleDict({"layers": nn.ModuleList([Plain()])})
    gone = weakref.ref(model)
    report = Report(model, [Change("layers.0", "Plain", "fast")], {"torch": "2"}, applied=True)
    del model
    gc.collect()
    assert gone() is None and not report.unreached() and "1 of 1 replaced" in str(report)


def test_replicas_of_data_parallel_count_for_their_class():
    class Replicated(Fast):
        pass

    layer = Replicated()
    replica = layer._replicate_for_data_parallel()
    replica(torch.zeros(2))
    assert reached.is_reached(layer)


def test_undo_restores_and_can_be_repeated():
    model = build()
    report = lwft_kernels.accelerate(model)
    assert all(type(layer) is Fast for layer in model.layers)
    for _ in range(2):
        report.undo()
        assert all(type(layer) is Plain for layer in model.layers)
    assert "3 of 3 replaced, and restored since" in str(report)
    lwft_kernels.accelerate(model)
    report.undo()
    assert all(type(layer) is Fast for layer in model.layers), "another report's changes are not its own"


def test_undo_leaves_what_others_have_put_there():
    class Theirs(Fast):
        pass

    model = build()
    report = lwft_kernels.accelerate(model)
    model.layers[1].__class__ = Theirs
    report.undo()
    assert [type(layer) for layer in model.layers] == [Plain, Theirs, Plain]


def test_accelerated_is_undone_however_it_ends():
    model = build()
    with lwft_kernels.accelerated(model) as report:
        assert all(type(layer) is Fast for layer in model.layers) and len(report.replaced) == 3
    assert all(type(layer) is Plain for layer in model.layers)

    def fail():
        with lwft_kernels.accelerated(model):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert all(type(layer) is Plain for layer in model.layers)
    with lwft_kernels.accelerated(model, strict=True) as report:
        assert not report.replaced


def test_an_outer_accelerate_outlives_an_inner_one():
    model = build()
    lwft_kernels.accelerate(model)
    with lwft_kernels.accelerated(model) as inner:
        assert not inner.replaced
    assert all(type(layer) is Fast for layer in model.layers)


def test_a_change_that_fails_leaves_the_model_whole(monkeypatch):
    def fail():
        raise RuntimeError("cannot")

    model = build()

    def broken(room, library, model, strict):
        return [*plan(model), Change("head", "Linear", "fast", apply=fail)]

    monkeypatch.setattr(accelerate_module, "_plan", broken)
    with pytest.raises(RuntimeError, match="cannot"):
        lwft_kernels.accelerate(model)
    assert all(type(layer) is Plain for layer in model.layers)


def test_a_change_that_turns_out_impossible_has_a_reason(monkeypatch):
    changes = [Change("head", "Linear", "fast", apply=lambda: "it will not have it")]
    monkeypatch.setattr(accelerate_module, "_plan", lambda *_, **__: changes)
    (declined,) = lwft_kernels.accelerate(build()).declined
    assert declined.reason == "it will not have it" and declined.now is None


def test_a_keyword_switches_a_room_off():
    assert not lwft_kernels.explain(build(), attention=False).changes


@pytest.mark.parametrize("function", [lwft_kernels.accelerate, lwft_kernels.explain])
def test_not_a_module(function):
    with pytest.raises(TypeError, match="model must be a torch"):
        function("bert")


@pytest.mark.parametrize(
    "missing,words", [("peft.tuners.gone", "is not supported"), ("lwft_kernels.integrations.gone", None)]
)
def test_a_library_that_lacks_something_is_declined_and_a_fault_of_ours_is_not(monkeypatch, missing, words):
    def fail(name):
        raise ImportError(f"no {missing}", name=missing)

    monkeypatch.undo()
    monkeypatch.setattr(accelerate_module, "_ROOMS", (("here", "torch", "attention"),))
    monkeypatch.setattr(accelerate_module.importlib, "import_module", fail)
    if words is None:
        with pytest.raises(ImportError, match="gone"):
            lwft_kernels.accelerate(build())
        return
    (declined,) = lwft_kernels.accelerate(build()).declined
    assert f"torch {torch.__version__} is not supported: no {missing}" == declined.reason
