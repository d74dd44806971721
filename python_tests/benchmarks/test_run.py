"""`lwft-bench run`, `env` and `plot`: what they write and how they judge. No time is asserted anywhere."""

from __future__ import annotations

import csv
import dataclasses
import io
import json

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from lwft_bench import cli, curves, memory, report, results, run, timing
from lwft_bench.add_layer_norm import _case as case_of_norm
from lwft_bench.attention import _case as case_of_attention
from lwft_kernels.lowrank import frozen

SMOKE = ["run", "--preset", "smoke", "--threads", "1"]


def invoke(*words):
    return CliRunner().invoke(cli.main, [str(word) for word in words], catch_exceptions=False)


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def measurements(path):
    return json.loads(path.read_text())["measurements"]


def row(medians, *, flops=1.0, traffic=1.0, gemm_rate=1.0, copy_rate=1.0, tokens=1, threads=1, status=results.TIMED):
    """A made-up row of the providers in `medians`; None for one that was not timed."""
    found = {
        name: results.Result(results.WRONG, "error 1")
        if median is None
        else results.Result(status, "", median, median, median, 5)
        for name, median in medians.items()
    }
    return results.Row(
        "adapter", f"T={tokens}", {"T": tokens}, ("d=8", "T"), "float32", "fwd", threads, flops, traffic, gemm_rate,
        copy_rate, "native", (), results=found,
    )  # fmt: skip


def printed(rows):
    console = Console(width=200, record=True, file=io.StringIO())
    report.print_table(rows, console, torch.device("cpu"))
    return console.export_text()


def test_every_family_end_to_end(tmp_path):
    json_path, csv_path, png = tmp_path / "run.json", tmp_path / "run.csv", tmp_path / "run.png"
    result = invoke(*SMOKE, "--json", json_path, "--csv", csv_path)
    assert result.exit_code == 0, result.output
    assert "WRONG" not in result.output
    assert "failed" not in result.output
    assert "compile: left out" in result.output
    written = json.loads(json_path.read_text())
    assert written["environment"]["peaks"].keys() == {"GEMM float32", "copy"}
    assert {m["op"] for m in written["measurements"]} == {family.op for family in run.FAMILIES.values()}
    for m in written["measurements"]:
        on_gpus_only = m["op"] == "quantized_linear"
        served = "reference" if on_gpus_only else "native"
        if m["op"] == "frozen_linear" and not frozen.is_own(torch.float32, 1024, 1024, 1024):
            served = "-"  # torch's own function, on a processor without a product of ours
        assert m["backend"] == served
        assert bool(m["declined"]) == on_gpus_only
        assert min(m["flops"], m["bytes"], m["gemm_rate"], m["copy_rate"]) > 0
        if m["status"] == results.TIMED:
            assert 0 < m["first_quartile"] <= m["median"] <= m["third_quartile"]
        else:
            assert m["status"] == results.NOT_OFFERED
            assert m["note"]
    with csv_path.open() as file:
        assert len(list(csv.DictReader(file))) == len(written["measurements"])
    assert png.read_bytes().startswith(b"\x89PNG")


def test_the_file_holds_all_of_the_report(tmp_path):
    path = tmp_path / "run.json"
    rows = [row({"eager": 3.0, "lwft": None}), row({"lwft": 1.0}, tokens=2)]
    whole = results.Report("lwft-bench run", 3, {"torch": "2"}, rows, 2)
    assert whole.partial() is None
    whole.write_json(path)
    assert results.read(path) == whole


def test_the_compiler_as_a_peer(tmp_path):
    path = tmp_path / "run.json"
    words = ["add_layer_norm", "--mode", "fwd", "--providers", "compile,lwft", "--json", path]
    result = invoke(*SMOKE, *words)
    assert result.exit_code == 0, result.output
    assert {m["provider"] for m in measurements(path)} == {"compile", "lwft"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_other_dtypes(tmp_path, dtype):
    result = invoke(*SMOKE, "--dtype", dtype, "--json", tmp_path / "run.json")
    assert result.exit_code == 0, result.output
    assert "WRONG" not in result.output


@pytest.mark.parametrize("name", ["lwft", "eager"])
def test_a_wrong_provider_is_named_and_not_timed(tmp_path, monkeypatch, name):
    family = run.FAMILIES["add_layer_norm"]
    right = family.providers[name]

    def wrong(case, arguments):
        call = right(case, arguments)
        return lambda: call() + 0.1

    broken = dataclasses.replace(family, providers={**family.providers, name: wrong})
    monkeypatch.setitem(run.FAMILIES, "add_layer_norm", broken)
    path = tmp_path / "run.json"
    result = invoke(*SMOKE, "add_layer_norm", "--json", path)
    assert "WRONG" in result.output
    assert result.exit_code == (1 if name == "lwft" else 0)
    mine = [m for m in measurements(path) if m["provider"] == name]
    assert mine
    for m in mine:
        assert m["status"] == results.WRONG
        assert "error" in m["note"]
        assert m["median"] is None


def test_a_peer_that_forgets_dropout_is_wrong(tmp_path, monkeypatch):
    family = run.FAMILIES["adapter"]
    right = family.providers["eager"]

    def without_dropout(case, arguments):
        return right(case, {name: value for name, value in arguments.items() if name != "dropout_p"})

    broken = dataclasses.replace(family, providers={**family.providers, "eager": without_dropout})
    monkeypatch.setitem(run.FAMILIES, "adapter", broken)
    path = tmp_path / "run.json"
    invoke(*SMOKE, "adapter", "--mode", "fwd", "--json", path)
    verdicts = {"dropout_p" in m["sizes"]: m["status"] for m in measurements(path) if m["provider"] == "eager"}
    assert verdicts == {False: results.TIMED, True: results.WRONG}


def test_ratio_is_to_the_best_peer():
    assert row({"eager": 3.0, "sdpa": 2.0, "lwft": 4.0}).ratio() == 0.5
    assert row({"eager": 3.0, "sdpa": 2.0, "lwft": 4.0}).best_peer() == "sdpa"
    assert row({"eager": None, "sdpa": 2.0, "lwft": 1.0}).best_peer() == "sdpa"
    assert row({"lwft": 1.0}).ratio() is None
    assert row({"eager": 1.0, "lwft": None}).ratio() is None


def test_losses_stand_beside_wins():
    text = printed([row({"eager": 1.0, "lwft": 2.0}), row({"eager": 3.0, "lwft": 1.0}, tokens=2)])
    assert "0.50x eager" in text
    assert "3.00x eager" in text


def test_the_summary_lists_every_loss():
    rows = [row({"eager": ours, "lwft": 1.0}, tokens=n) for n, ours in enumerate((2.0, 0.98, 0.96, 0.5))]
    console = Console(width=200, record=True, file=io.StringIO())
    report.print_summary([*rows, row({"lwft": 1.0})], console)
    first, *losses = console.export_text().splitlines()
    assert "4 rows beside a peer: 1 above 1.03x, 1 level, rows below 0.97x: 2" in first
    assert [line.split()[:2] for line in losses] == [["0.50x", "eager"], ["0.96x", "eager"]]
    assert "adapter: T=3" in losses[0]


def test_limit_is_the_nearer_one():
    assert row({"lwft": 2.0}, flops=10.0, gemm_rate=10.0, traffic=1.0, copy_rate=10.0).limit() == (1.0, "GEMM")
    slow_memory = row({"lwft": 4.0}, flops=10.0, gemm_rate=10.0, traffic=20.0, copy_rate=10.0)
    assert slow_memory.limit() == (2.0, "copy")
    assert slow_memory.share_of_limit() == 0.5


def test_work_of_attention():
    """Causal, 3 queries on 5 keys and a prefix of 2: the queries see 3, 4, 5 keys, and the prefix."""
    case = case_of_attention("test", "smoke", 2, 4, 3, 8, keys=5, causal=True, prefix=2)
    values = run.FAMILIES["attention"].arguments(case, torch.float32, torch.Generator())
    pairs = 2 * 4 * (3 + 4 + 5 + 3 * 2)
    assert run.FAMILIES["attention"].flops(case, values, False) == 4.0 * 8 * pairs
    assert run.FAMILIES["attention"].flops(case, values, True) == 3.5 * 4.0 * 8 * pairs


def test_peak_memory_sees_a_tensor():
    size = 64 * 2**20
    peak = memory.peak_memory(lambda: torch.ones(size // 4), torch.device("cpu"))
    if peak is None:
        pytest.skip("this system does not tell")
    assert 0.9 * size <= peak <= 1.5 * size


def test_every_round_has_all_and_another_order(monkeypatch):
    monkeypatch.setattr(timing, "LEAST_ROUNDS", 30)
    monkeypatch.setattr(timing, "SAMPLE_SECONDS", 0.0)  # one call a sample
    calls = []
    functions = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    result = timing.interleaved(functions, 0.0)
    assert {name: timed.rounds for name, timed in result.items()} == dict.fromkeys("abc", 30)
    rounds = [tuple(calls[i : i + 3]) for i in range(len(calls) - 90, len(calls), 3)]
    assert all(set(order) == set("abc") for order in rounds)
    before = {name: {calls[i - 1] for i in range(len(calls) - 89, len(calls)) if calls[i] == name} for name in "abc"}
    assert all(len(names) >= 2 for names in before.values())  # nobody runs always after the same one


def test_presets_grow():
    sizes = [len(run.plans(tuple(run.FAMILIES), p, (), ("fwd",), (1,), cli.PROVIDERS)) for p in ("quick", "full")]
    assert 0 < sizes[0] < sizes[1]


@pytest.mark.parametrize("dtypes", [(), ("float32",)])
def test_every_row_once(dtypes):
    planned = run.plans(tuple(run.FAMILIES), "full", dtypes, run.MODES, (1, 2), cli.PROVIDERS)
    rows = {(plan.family.op, plan.case.name, plan.dtype, plan.mode, plan.threads) for plan in planned}
    assert len(rows) == len(planned)


def test_environment():
    facts = json.loads(invoke("env", "--json").output)
    assert {"torch", "processor", "compiler", "instruction set", "library", "GPU"} <= facts.keys()
    assert "processor" in invoke("env").output


def test_an_interrupted_run_leaves_what_it_has(tmp_path, monkeypatch):
    """The second op is interrupted in its second case: the first op is in the file before that, and then the rest."""
    family = run.FAMILIES["adapter"]
    path, csv_path = tmp_path / "run.json", tmp_path / "run.csv"
    before = []

    def interrupted(case, arguments):
        if "dropout_p" in case.sizes:
            before.append(results.read(path))
            raise KeyboardInterrupt
        return family.providers["eager"](case, arguments)

    broken = dataclasses.replace(family, providers={**family.providers, "eager": interrupted})
    monkeypatch.setitem(run.FAMILIES, "adapter", broken)
    words = ["low_rank", "adapter", "--mode", "fwd", "--json", path, "--csv", csv_path]
    result = invoke(*SMOKE, *words)
    assert result.exit_code == 1
    assert "3 rows: low_rank_linear 1, adapter 2" in result.output
    assert [r.op for r in before[0].rows] == ["low_rank_linear"]
    left = results.read(path)
    assert [r.op for r in left.rows] == ["low_rank_linear", "adapter"]
    assert left.partial() == "PARTIAL, 2 of 3 rows"
    assert json.loads(path.read_text())["partial"] == left.partial()
    with csv_path.open() as file:
        assert {line["partial"] for line in csv.DictReader(file)} == {left.partial()}


def test_a_provider_may_be_left_out(tmp_path):
    path = tmp_path / "run.json"
    result = invoke(*SMOKE, "lora", "--mode", "fwd", "--without", "peft,addmm", "--json", path)
    assert result.exit_code == 0, result.output
    assert "peft: left out by --without" in result.output
    assert {m["provider"] for m in measurements(path)} == {"eager", "lwft"}


def test_a_prefix_is_told_against_the_call_without(tmp_path):
    path = tmp_path / "run.json"
    result = invoke(*SMOKE, "attention", "--json", path)
    beside = {m["case"]: m for m in measurements(path) if m["beside"] is not None}
    assert beside
    for m in beside.values():
        assert m["sizes"]["prefix"]
        assert m["beside_seconds"] > 0
    assert "as long as the same without a prefix" in result.output


def test_cost_of_a_unit_and_its_growth():
    medians = {1: 4.0, 10: 20.0, 100: 300.0, 200: 500.0}  # per token 4, 2, 3, 2.5
    rows = [row({"eager": 2.0 * n, "lwft": medians[n]}, tokens=n) for n in (200, 100, 1, 10)]
    (curve,) = curves.curves(rows)
    assert (curve.axis, curve.unit, [x for x, _ in curve.points]) == ("T", "token", [1, 10, 100, 200])
    assert curve.costs(True) == [4.0, 2.0, 3.0, 2.5]
    assert list(curve.growths(True)) == [None, 0.5, 1.5, 1.25]  # to the least so far, not to the one before
    assert list(curve.growths(False)) == [None, 1.0, 1.0, 1.0]
    assert curves.curves(rows[:2]) == []


def test_threads_are_shown_at_the_largest_size():
    rows = [row({"lwft": 8.0 / count}, tokens=n, threads=count) for n in (1, 9) for count in (1, 2, 4)]
    (curve,) = curves.curves(rows)
    assert [(count, r.sizes["T"]) for count, r in curve.points] == [(1, 9), (2, 9), (4, 9)]
    assert curve.unit == "call"
    assert list(curves.gains(curve, True)) == [1.0, 2.0, 4.0]


def test_curves_have_a_unit_and_the_largest_size_every_thread_count():
    planned = run.curve_plans(tuple(run.FAMILIES), (), ("fwd",), (1, 2), cli.PROVIDERS)
    assert {plan.case.curve[1] for plan in planned} == set(curves.UNITS)
    with_one = [plan for plan in planned if plan.threads == 1]
    for plan in with_one:
        name, axis = plan.case.curve
        others = [
            p.case.sizes[axis]
            for p in planned
            if (p.family.op, p.case.curve, p.dtype) == (plan.family.op, plan.case.curve, plan.dtype)
        ]
        assert plan.case.sizes[axis] == max(others)
        assert len(set(others)) >= 3, (name, others)
    assert 0 < len(with_one) < len(planned) / 2
    assert run.thread_counts(1) == (1,)
    assert run.thread_counts(6) == (1, 2, 4, 6)
    assert run.thread_counts(8) == (1, 2, 4, 8)


def test_curves_end_to_end(tmp_path, monkeypatch):
    small = dataclasses.replace(
        run.FAMILIES["add_layer_norm"], cases=tuple(case_of_norm("full", n, 24) for n in (1, 3, 9))
    )
    monkeypatch.setitem(run.FAMILIES, "add_layer_norm", small)
    path = tmp_path / "curves.json"
    words = ["--mode", "fwd", "--threads", "1,2", "--min-time", "0.001", "--json", path]
    result = invoke("curves", "add_layer_norm", *words)
    assert result.exit_code == 0, result.output
    assert "4 rows: add_layer_norm 4" in result.output
    for words in ("/ token", "T=9", "threads=2", "points where our cost grows by more than 10%:"):
        assert words in result.output
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_plot_draws_curves(tmp_path):
    rows = [row({"eager": 2e-6 * n, "lwft": 1e-6 * n}, tokens=n) for n in (1, 10, 100)]
    source = tmp_path / "run.json"
    environment = {"processor": "x", "instruction set": "y", "torch": "z", "commit": "-", "date": "2000-01-01"}
    results.Report("lwft-bench run", 0, environment, rows, 4).write_json(source)
    result = invoke("plot", source, "-o", tmp_path / "out.png")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_plot_refuses_other_files(tmp_path):
    source = tmp_path / "other.json"
    for content, words in (
        ("{}", "not a JSON file of"),
        ('{"schema": 0}', "run it again"),
        ("\x00", "not a JSON file"),
    ):
        source.write_text(content)
        result = invoke("plot", source, "-o", tmp_path / "out.png")
        assert result.exit_code == 2
        assert words in " ".join(result.output.split())


@pytest.mark.parametrize(
    "words",
    [
        ("run", "--threads", "0"),
        ("run", "--threads", "x"),
        ("run", "sort"),
        ("run", "--dtype", "int8"),
        ("run", "--providers", "nobody"),
        ("run", "--providers", "eager", "--without", "eager"),
        ("curves", "peft"),  # no curve
        ("plot", "no.json", "-o", "x.png"),
    ],
)
def test_bad_words_are_refused(words):
    assert invoke(*words).exit_code == 2
