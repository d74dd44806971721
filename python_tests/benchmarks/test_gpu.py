"""What can be known of the benchmark of a GPU without one: its rows, its peers' arithmetic, its clock."""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from quantized_weights import NF4

from lwft_bench import (
    attention,
    attention_flex,
    gpu_checks,
    gpu_goals,
    gpu_summary,
    lora_chain,
    report,
    results,
    run,
    timing,
)
from lwft_bench.case import in_preset
from lwft_bench.quantized import nf4_table
from lwft_kernels.attention import reference
from lwft_kernels.functional import QuantizedWeight
from lwft_kernels.quantized.reference import dequantize

CPU = torch.device("cpu")
PROVIDERS = tuple(name for name in (*report.PEERS, results.OURS) if name != "compile")
# A frozen linear layer is torch's own there, and so has no rows.
FAMILIES = tuple(family for family in run.FAMILIES if family != "frozen_linear")


@pytest.fixture(autouse=True)
def short_samples(monkeypatch):
    monkeypatch.setattr(timing, "SAMPLE_SECONDS", 0.0)
    monkeypatch.setattr(timing, "LEAST_ROUNDS", 2)


def rows(family, preset, dtype, modes=run.MODES, providers=PROVIDERS, most=None):
    planned = run.plans((family,), preset, (dtype,), modes, (1,), providers)[:most]
    assert planned
    found = list(run.rows(planned, providers, 0, 0.0))
    bad = [
        (row.case, name, result.note)
        for row in found
        for name, result in row.results.items()
        if result.status in (results.WRONG, results.FAILED)
    ]
    assert bad == []
    return found


def timed(found):
    return {name for row in found for name, result in row.results.items() if result.status == results.TIMED}


# ---- rows ----


def cases_of(family, preset):
    return [case for case in run.FAMILIES[family].cases if in_preset(case, preset)]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_case_of_a_gpu_has_a_twin_for_tests(family):
    large, small = (cases_of(family, preset) for preset in ("gpu", "gpu-smoke"))
    assert large
    # decoding has fewer lengths there
    kinds = [[(*case.sizes, case.dtypes, case.trains, case.in_a_row) for case in cases] for cases in (large, small)]
    assert list(dict.fromkeys(kinds[0])) == list(dict.fromkeys(kinds[1]))


def made_up(family, case, mode="fwdbwd", **medians):
    found = {name: results.Result(results.TIMED, "", median, median, median, 5) for name, median in medians.items()}
    return results.Row(
        run.FAMILIES[family].op, case.name, dict(case.sizes), None, "bfloat16", mode, 1, 1.0, 1.0, 1.0, 1.0, "triton",
        (), in_a_row=case.in_a_row, results=found,
    )  # fmt: skip


def test_every_goal_has_its_row():
    found = [
        made_up(family, case, mode)
        for family in run.FAMILIES
        for case in cases_of(family, "gpu")
        for mode in ("fwd", "fwdbwd")
    ]
    for goal in gpu_goals.GOALS:
        row = goal.row(found)
        assert row is not None, goal.words
        assert row.mode == "fwdbwd"
    small = [made_up(family, case) for family in run.FAMILIES for case in cases_of(family, "gpu-smoke")]
    assert [goal.words for goal in gpu_goals.GOALS if goal.op != "attention" and goal.row(small)] == []


def test_goals_are_told_by_the_right_peer():
    case = next(case for case in cases_of("attention", "gpu") if case.name.startswith("causal (2, 16, 4096, 128)"))
    row = made_up("attention", case, eager=1.0, sdpa=0.5, flash=0.3, flex=0.1, lwft=0.4)
    text = gpu_goals.markdown({"once": [row], "again": []})
    assert "plain causal attention: over the best SDPA | at least 0.8 | **0.75** | - |" in text
    better = dataclasses.replace(row, results={**row.results, "lwft": results.Result(results.TIMED, "", 0.3)})
    assert "at least 0.8 | 1.00 |" in gpu_goals.markdown({"once": [better]})


# ---- peers ----


@pytest.mark.parametrize("family", FAMILIES)
def test_peers_compute_the_same(family):
    assert results.OURS in timed(rows(family, "gpu-smoke", "float32", ("fwdbwd",)))


def test_fused_attention_computes_the_same():
    """Every option alone and all at once; FlexAttention has no backward on the CPU."""
    providers = ("sdpa", "flash", "flex")
    found = rows("attention", "gpu-smoke", "float32", ("fwd",), providers)
    found += rows("attention", "smoke", "float32", ("fwd",), providers)
    assert timed(found) == set(providers)
    dropout = [row.results["flex"] for row in found if "dropout_p" in row.sizes]
    assert {result.note for result in dropout} == {"FlexAttention has no dropout"}
    assert all(row.results["flex"].status == results.TIMED for row in found if "dropout_p" not in row.sizes)
    backward = rows("attention", "smoke", "float32", ("fwdbwd",), ("flex",))
    assert {row.results["flex"].status for row in backward} == {results.NOT_OFFERED}


@pytest.mark.parametrize(
    "options",
    [
        {"prefix": 3, "window": 2},
        {"prefix": 2, "window": 3, "causal": True, "padding": True},
        {"softcap": 2.0, "bias": True},
        {"softcap": 1.0, "prefix": 4},
    ],
    ids=str,
)
def test_flex_rules_are_those_of_the_reference(options):
    """Together, and so strong that what is left out shows."""
    case = attention._case("", "smoke", 2, 4, 5, 8, kv_heads=2, keys=9, **options)
    arguments = attention.arguments(case, torch.float32, torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = attention_flex.bind(case, arguments)(), reference.attention(**arguments)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_the_gradient_of_the_chain(p):
    """With the mask that the same seed gives again."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, a, b = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((5, 4), (6, 4), (6,), (2, 4), (6, 2))
    )

    def chain(x, a, b):
        torch.manual_seed(0)
        return lora_chain.AddmmChain.apply(x, weight, bias, a, b, 2.0, p)

    assert torch.autograd.gradcheck(chain, [leaf.requires_grad_() for leaf in (x, a, b)])


def test_lora_peers_in_16_bits():
    found = rows("lora", "gpu-smoke", "bfloat16", ("fwdbwd",), ("chain", "peft_autocast"))
    for row in found:
        assert row.results["chain"].status == results.TIMED
        offered = row.results["peft_autocast"].status == results.TIMED
        assert offered == ("float32_adapter" in row.sizes)


def test_libraries_that_are_not_here_get_the_right_arguments(monkeypatch):
    """Stand-ins of their signatures, in plain PyTorch."""

    def fused_linear_lora(x, linear_w, lora_a, lora_b, alpha, seed=None, dropout_p=0.0, linear_bias=None):
        batch, tokens, _ = x.shape
        base = F.linear(x, linear_w, linear_bias)
        return (base + F.dropout(x, dropout_p) @ lora_a.T @ lora_b.T * alpha).reshape(batch, tokens, -1)

    class LigerLayerNormFunction:
        @staticmethod
        def apply(x, weight, bias, eps):
            return F.layer_norm(x, weight.shape, weight, bias, eps)

    class QuantState:
        def __init__(self, absmax, shape, code, blocksize, quant_type, dtype):
            self.weight = QuantizedWeight(
                torch.zeros(shape.numel() // 2, 1, dtype=torch.uint8), absmax, shape, code, 64
            )
            assert (blocksize, quant_type) == (64, "nf4")

    def matmul_4bit(x, codes, quant_state, bias):
        weight = dataclasses.replace(quant_state.weight, codes=codes.t())
        return F.linear(x, dequantize(weight, x.dtype), bias)

    modules = {
        "bitsandbytes.functional": {"QuantState": QuantState},
        "lorafusion.ops.lora_v1": {"fused_linear_lora": fused_linear_lora},
        "liger_kernel.ops.layer_norm": {"LigerLayerNormFunction": LigerLayerNormFunction},
    }
    peers = (("lora", "lorafusion"), ("add_layer_norm", "liger"), ("quantized", "bitsandbytes"))
    for family, name in peers:
        (missing,) = {row.results[name].note for row in rows(family, "gpu-smoke", "bfloat16", ("fwd",), (name,), 1)}
        assert missing.endswith("is not installed")
    for path, members in modules.items():
        parts = path.split(".")
        for end in range(1, len(parts) + 1):
            monkeypatch.setitem(sys.modules, ".".join(parts[:end]), types.ModuleType(parts[end - 1]))
        vars(sys.modules[path]).update(members)
    sys.modules["bitsandbytes"].matmul_4bit = matmul_4bit
    for family, name in peers:
        found = rows(family, "gpu-smoke", "float32", ("fwdbwd",), (name,), 2)
        assert timed(found) == {name}


def test_the_values_of_nf4():
    """To the last bits those that bitsandbytes has written down."""
    torch.testing.assert_close(nf4_table(), torch.tensor(NF4), rtol=0, atol=1e-6)


# ---- the clock ----


class Machine:
    """A host and a GPU in virtual time: what the host launches, the GPU does in order as soon as it can."""

    LAUNCH = 5e-6

    def __init__(self):
        self.host = self.busy_until = 0.0
        self.flushed, self.occupied = 0, []

    def launch(self, seconds):
        self.host += self.LAUNCH
        self.busy_until = max(self.busy_until, self.host) + seconds

    def flush(self):
        self.flushed += 1
        self.launch(20e-6)

    def occupy(self, seconds):
        self.occupied.append(seconds)
        self.launch(seconds)

    def event(self):
        machine = self

        class Event:
            def record(self):
                machine.launch(0.0)
                self.at = machine.busy_until

            def elapsed_time(self, later):
                return 1e3 * (later.at - self.at)

        return Event()

    def wait(self):
        self.host = max(self.host, self.busy_until)


@pytest.fixture
def machine(monkeypatch):
    found = Machine()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: found.host)
    return found


def test_the_gpu_clock_sees_work_not_launches(machine):
    """Fifty kernels of 1 us, each launched in 5: 50 us of work, which takes the host 250."""

    def short_kernels():
        for _ in range(50):
            machine.launch(1e-6)

    clock = timing.DeviceClock(machine)
    assert clock.sample(short_kernels, 1) > 200e-6  # nobody knows yet how long the host needs
    for _ in range(3):
        assert clock.sample(short_kernels, 1) == pytest.approx(50e-6, abs=6e-6)  # and the launch of an event
    assert machine.flushed == 4
    in_turn = timing.interleaved({"short": short_kernels, "long": lambda: machine.launch(1e-3)}, 0.0, clock)
    assert in_turn["short"].median == pytest.approx(50e-6, abs=6e-6)
    assert in_turn["long"].median == pytest.approx(1e-3, rel=0.01)


def test_a_call_that_waits_is_not_waited_for_longer_and_longer(machine):
    def waits():
        machine.launch(100e-6)
        machine.wait()
        machine.launch(100e-6)

    clock = timing.DeviceClock(machine)
    found = [clock.sample(waits, 1) for _ in range(20)]
    assert max(found) < 300e-6
    assert max(machine.occupied) < 1e-3


def test_calls_in_a_row_end_when_the_gpu_has_ended(machine):
    clock = timing.HostClock(machine.wait)
    assert clock.sample(lambda: machine.launch(1e-3), 4) == pytest.approx(1e-3, rel=0.01)
    assert clock.sample(lambda: machine.launch(1e-9), 4) == pytest.approx(Machine.LAUNCH, rel=0.01)


# ---- checks ----


def findings(monkeypatch, ours, family="add_layer_norm"):
    broken = dataclasses.replace(run.FAMILIES[family], providers={**run.FAMILIES[family].providers, results.OURS: ours})
    monkeypatch.setitem(run.FAMILIES, family, broken)
    case = cases_of(family, "gpu-smoke")[1]
    assert "dropout_p" not in case.sizes
    return {finding.check: finding for finding in gpu_checks.check(family, case, "float32", CPU)}


def test_a_right_op_has_nothing_to_complain_of(monkeypatch):
    right = run.FAMILIES["add_layer_norm"].providers[results.OURS]
    found = findings(monkeypatch, right)
    assert {check: finding.complaint for check, finding in found.items()} == {"numbers": None, "same bits twice": None}
    assert found["numbers"].error <= found["numbers"].allowed


def test_a_wrong_op_is_found(monkeypatch):
    right = run.FAMILIES["add_layer_norm"].providers[results.OURS]
    found = findings(monkeypatch, lambda case, a: lambda: right(case, a)() * 1.001)
    assert "error" in found["numbers"].complaint and found["same bits twice"].complaint is None


def test_an_op_of_other_bits_each_time_is_found(monkeypatch):
    right = run.FAMILIES["add_layer_norm"].providers[results.OURS]
    calls = []

    def unsteady(case, a):
        def call():
            calls.append(0)
            return right(case, a)() * (1 + len(calls) * 2**-23)

        return call

    found = findings(monkeypatch, unsteady)
    assert found["same bits twice"].complaint.startswith("other bits: out")


def test_an_op_that_raises_or_declines_is_told(monkeypatch):
    def raises(case, a):
        raise ZeroDivisionError("no")

    assert findings(monkeypatch, raises)["numbers"].complaint == "ZeroDivisionError: no"
    monkeypatch.undo()

    def declines(case, a):
        def call():
            gpu_checks.lwft_kernels.backend.record_decline("add_layer_norm", "too tired")
            return run.FAMILIES["add_layer_norm"].providers["eager"](case, a)()

        return call

    found = findings(monkeypatch, declines)
    assert found["numbers"].complaint is None and found["numbers"].declined == "too tired"


class StaleGraph:
    """A graph whose replay does nothing."""

    def replay(self):
        pass


@pytest.fixture
def pretended_cuda(monkeypatch):
    """Streams on which everything is done at once, and graphs that compute when they are captured and never again."""
    stream = types.SimpleNamespace(wait_stream=lambda other: None, synchronize=lambda: None)
    for name, value in {
        "Stream": lambda: stream, "current_stream": lambda: stream, "synchronize": lambda: None,
        "_sleep": lambda cycles: None, "stream": lambda s: contextlib.nullcontext(),
        "CUDAGraph": StaleGraph, "graph": lambda g: contextlib.nullcontext(),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)


def test_what_is_not_replayed_or_reads_too_early_is_found(pretended_cuda, monkeypatch):
    for family in gpu_checks.OPS:
        for case in cases_of(family, "gpu-smoke"):
            arguments = run.FAMILIES[family].arguments(case, torch.float32, torch.Generator().manual_seed(0))
            words = run.FAMILIES[family], case, arguments, torch.float32
            assert gpu_checks._on_another_stream(*words) is None, case
            stale = "two replays drop the same elements" if "dropout_p" in case.sizes else "other bits: 0"
            assert gpu_checks._in_a_graph(*words).startswith(stale), case
    monkeypatch.setattr(gpu_checks, "_assign", lambda targets, sources: [
        t.detach().zero_() for t in targets.values() if isinstance(t, torch.Tensor) and t.is_floating_point()
    ])  # fmt: skip
    assert gpu_checks._on_another_stream(*words).startswith("other bits: out")


# ---- tables ----


def test_the_gpu_table_has_the_limit_first():
    case = cases_of("adapter", "gpu")[0]
    row = made_up("adapter", case, eager=4.0, compile=3.0, lwft=2.0)
    refused = results.Result(results.NOT_OFFERED, "why not")
    row = dataclasses.replace(row, results={**row.results, "liger": refused})
    headings, (line,) = report.gpu_table([row])
    assert headings[:6] == ["case", "dtype", "mode", "of limit", "vs eager", "vs best peer"]
    assert line[3:7] == ["50% GEMM", "2.00x", "1.50x compile", "2 s"]
    text = report.markdown([row])
    assert "- liger: why not" in text and "| -" in text


def test_pytest_reports_are_counted(tmp_path):
    path = tmp_path / "x.xml"
    path.write_text(
        '<testsuites><testsuite tests="3" failures="1" errors="0" skipped="1"><testcase name="good"/>'
        '<testcase name="bad"><failure/></testcase><testcase name="left"><skipped/></testcase></testsuite></testsuites>'
    )
    assert gpu_summary.counts(path) == {"tests": 3, "failures": 1, "errors": 0, "skipped": 1, "failed": ["bad"]}
    assert gpu_summary.counts(tmp_path / "none.xml") == {}


def test_nothing_that_prints_or_draws_is_needed():
    """rich, click and matplotlib are not on every machine that has a GPU."""
    absent = "import sys; sys.modules |= dict.fromkeys(('rich', 'click', 'matplotlib', 'pytest'))"
    path = [str(Path(run.__file__).parents[1]), *filter(None, sys.path)]
    code = f"{absent}; sys.path[:0] = {path!r}; import lwft_bench.gpu_proof"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
