"""`gpu_proof` on the CPU, with the smallest sizes: what it writes, and that a failure or a late unit stops nothing."""

from __future__ import annotations

import json
import time

import pytest

from lwft_bench import gpu_paths, gpu_proof, results

SMOKE = ["--device", "cpu", "--smoke", "--families", "add_layer_norm"]


@pytest.mark.slow
def test_end_to_end(tmp_path, capsys):
    words = ["--out", str(tmp_path / "out"), *SMOKE, "--parts", "environment,check,bench,first_call,tests"]
    status = gpu_proof.main(words)
    log = (tmp_path / "out" / "log.txt").read_text()
    assert status == 0, log
    assert "0 faults; keep with: cp -r" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "summary.md", "proof.json", "bench.json", "gpu_paths.json", "log.txt",
    }  # fmt: skip
    proof = json.loads((tmp_path / "out" / "proof.json").read_text())
    assert all(outcome["status"] == "done" for outcomes in proof["parts"].values() for outcome in outcomes)
    assert {finding["check"] for finding in proof["findings"]["check"]} == {"numbers", "same bits twice"}
    assert {finding["dtype"] for finding in proof["findings"]["check"]} == {"float32", "bfloat16"}
    assert len(proof["findings"]["first_call"]) == 3
    assert proof["tests"]["norm"]["tests"] > 0 and proof["tests"]["norm"]["failures"] == 0
    assert proof["command"].endswith(" ".join(words[2:]))
    assert {"GPU", "date", "commit", "torch", "triton", "peaks"} <= proof["environment"].keys()
    bench = results.read(tmp_path / "out" / "bench.json")
    assert bench.partial() is None and len(bench.rows) == 8
    for row in bench.rows:
        assert row.results[results.OURS].error is not None
        assert row.results["liger"].status == results.NOT_OFFERED
    summary = (tmp_path / "out" / "summary.md").read_text()
    for words_ in ("## Checks", "8 of 8", "## Goals", "## First calls", "## Tests", "### add_layer_norm"):
        assert words_ in summary


def test_a_unit_that_fails_is_a_fault_and_the_next_part_runs(tmp_path, monkeypatch, capsys):
    """An unknown backend: every process of ours ends when it imports the library."""
    monkeypatch.setenv("LWFT_BACKEND", "abacus")
    assert gpu_proof.main(["--out", str(tmp_path), *SMOKE, "--parts", "environment,first_call"]) == 1
    printed = capsys.readouterr().out
    assert "environment: 1 failed" in printed and "first_call: 1 failed" in printed and "2 faults" in printed
    assert "backend must be one of" in (tmp_path / "log.txt").read_text()
    assert "| first_call | the first call" in (tmp_path / "summary.md").read_text()


def options(**more):
    chosen = {"device": "cpu", "smoke": True, "families": ("add_layer_norm",), "min_time": 0.001, **more}
    return gpu_proof.Options(**chosen)


@pytest.mark.parametrize("whole, limit", [(60.0, 0.3), (0.3, 60.0)])
def test_a_late_unit_is_stopped(tmp_path, whole, limit):
    """By the limit of its part, or by that of all."""
    begun = time.monotonic()
    proof = gpu_proof.Proof(tmp_path / "out", tmp_path, options(), begun + whole, "command")
    proof.run(gpu_proof.Part("bench", "", limit))
    assert time.monotonic() - begun < 10
    written = json.loads((tmp_path / "out" / "proof.json").read_text())
    assert [outcome["status"] for outcome in written["parts"]["bench"]] == ["stopped"]
    assert proof.faults() == 0
    assert "add_layer_norm stopped" in (tmp_path / "out" / "summary.md").read_text()


def test_nothing_is_begun_when_time_is_up(tmp_path):
    proof = gpu_proof.Proof(tmp_path / "out", tmp_path, options(), time.monotonic() - 1, "command")
    proof.run(gpu_proof.PARTS[0])
    written = json.loads((tmp_path / "out" / "proof.json").read_text())
    assert [outcome["status"] for outcome in written["parts"]["environment"]] == ["not begun"]


def test_a_complaint_is_a_fault(tmp_path):
    proof = gpu_proof.Proof(tmp_path / "out", tmp_path, options(families=("lora",)), time.monotonic() - 1, "command")
    part = next(part for part in gpu_proof.PARTS if part.name == "check")
    finding = {"check": "CUDA graph", "op": "lora_linear", "case": "a case", "dtype": "float32", "error": None}
    path = proof._path(gpu_proof.units(part, options(families=("lora",)))[0])
    path.write_text(json.dumps([{**finding, "complaint": "other bits: out", "declined": "too large"}]))
    proof.run(part)
    assert proof.faults() == 1
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert "- lora_linear, a case, float32, CUDA graph: other bits: out" in summary
    assert "| lora_linear | 0 of 1 | - |" in summary
    assert "was declined: too large" in summary


def test_cuda_kernels_are_checked_where_the_library_has_them(monkeypatch):
    parts = {part.name: part for part in gpu_proof.PARTS}
    every = options(smoke=False, families=gpu_proof.FAMILIES)
    monkeypatch.setattr(gpu_proof.backend, "has_cuda_kernel", lambda name: name == "adapter_forward")
    units = gpu_proof.units(parts["cuda_check"], every) + gpu_proof.units(parts["cuda_bench"], every)
    assert {unit["family"] for unit in units} == {"adapter"} and len(units) == 4


def test_units_come_in_order_of_interest():
    every = options(smoke=False, families=gpu_proof.FAMILIES)
    parts = {part.name: part for part in gpu_proof.PARTS}
    assert gpu_proof.units(parts["check"], every)[0] == {"part": "check", "family": "adapter", "dtype": "bfloat16"}
    assert {unit["family"] for unit in gpu_proof.units(parts["tune"], every)} == set(gpu_proof.gpu_checks.OPS)
    rooms = {unit["room"] for unit in gpu_proof.units(parts["tests"], every)}
    assert {"attention", "norm"} <= rooms
    assert [unit["room"] for unit in gpu_proof.units(parts["tests"], options())] == ["norm"]


@pytest.mark.parametrize("words", [["--parts", "dance"], ["--families", "sort"], []])
def test_bad_words_are_refused(tmp_path, words, monkeypatch):
    monkeypatch.setattr(gpu_proof.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        gpu_proof.main(["--out", str(tmp_path), *words])


def test_a_result_is_named_by_card_date_and_commit():
    facts = {"GPU": "NVIDIA H200", "date": "2026-11-25T19:00:00+00:00", "commit": "abc123+"}
    assert gpu_proof.name_of(facts) == "nvidia-h200-2026-11-25-abc123"


SANITIZER = """#!/bin/sh
for word; do case $word in
  --tool=*) tool=${word#*=} ;;
  --*) ;;
  *) break ;;
esac; shift; done
echo "$tool runs $*; caching off: $PYTORCH_NO_CUDA_MEMORY_CACHING, unproven kernels: $LWFT_CUDA_UNPROVEN"
test $tool = racecheck && exit 9
exec "$@"
"""


def sanitized(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_proof.backend, "has_cuda_kernel", lambda name: True)
    proof = gpu_proof.Proof(tmp_path / "out", tmp_path, options(), time.monotonic() + 100, "command")
    proof.run(next(part for part in gpu_proof.PARTS if part.name == "sanitizer"))
    written = json.loads((tmp_path / "out" / "proof.json").read_text())
    return proof, [outcome["status"] for outcome in written["parts"]["sanitizer"]]


@pytest.mark.slow
def test_every_tool_of_the_sanitizer_runs_and_what_one_reports_is_a_fault(tmp_path, monkeypatch):
    program = tmp_path / "compute-sanitizer"
    program.write_text(SANITIZER)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    proof, statuses = sanitized(tmp_path, monkeypatch)
    assert statuses == ["done", "failed", "done", "done"] and proof.faults() == 1
    log = (tmp_path / "out" / "log.txt").read_text()
    assert all(f"{tool} runs" in log for tool in gpu_proof.SANITIZERS)
    assert log.count("caching off: 1, unproven kernels: 1") == 4


def test_without_a_sanitizer_its_part_is_skipped_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_proof, "sanitizer", lambda: None)
    proof, statuses = sanitized(tmp_path, monkeypatch)
    assert len(statuses) == 4 and all("no compute-sanitizer" in status for status in statuses)
    assert proof.faults() == 0
    assert "no compute-sanitizer" in (tmp_path / "out" / "summary.md").read_text()


def row(op, case, mode, seconds, declined=(), **sizes):
    ours = results.Result(results.TIMED, median=seconds)
    return results.Row(
        op, case, sizes, None, "bfloat16", mode, 1, 1.0, 1.0, 1.0, 1.0, "", declined, results={results.OURS: ours}
    )


def test_a_place_is_the_cuda_kernels_only_where_they_won_every_row():
    shapes = {
        "won": [(1.0, 2.0, ()), (2.0, 3.0, ())],
        "lost in one": [(1.0, 2.0, ()), (4.0, 3.0, ())],
        "not timed in one": [(1.0, 2.0, ()), (None, 3.0, ())],
        "declined in one": [(1.0, 2.0, ()), (1.0, 3.0, ("too wide",))],
    }
    ours, theirs = [], []
    for width, (case, timed) in enumerate(shapes.items(), 1):
        for mode, (cuda, triton, declined) in zip(("fwd", "fwdbwd"), timed, strict=True):
            ours.append(row("adapter", case, mode, cuda, declined, T=8191, d=width))
            theirs.append(row("adapter", case, mode, triton, T=8191, d=width))
    ours.append(row("attention", "no rival", "fwd", 1.0, B=2, H=3, S=5, D=64))
    environment = {"GPU": "card", "date": "2026-11-25T19", "commit": "abc"}
    benches = {"bench": results.Report("", 0, {}, theirs, 8), "cuda_bench": results.Report("", 0, {}, ours, 9)}
    found = gpu_paths.table(environment, benches)
    assert found["measured"] == [{"card": "card", "op": "adapter", "dtype": "bfloat16", "width": 1, "rows": 8192}]
    assert gpu_paths.table(environment, {"bench": benches["bench"]}) == {"note": "Not measured.", "measured": []}
