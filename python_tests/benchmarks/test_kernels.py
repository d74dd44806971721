"""`lwft-bench kernels`: it compiles although this process interprets, and tells a fault by its exit status."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from lwft_bench import cli, kernels


def invoke(*words):
    return CliRunner().invoke(cli.main, ["kernels", *map(str, words)], catch_exceptions=False)


@pytest.fixture
def rows(monkeypatch):
    """Made-up records instead of the compiler's; what it was asked for goes to `asked`."""
    made = {
        "room": "norm", "call": "a call", "kernel": "a_kernel", "configuration": "COLS=64", "card": "sm_90 (H100)",
        "registers": 77, "shared_memory": 1024, "stack": 0, "spills": 0, "programs_per_multiprocessor": 3,
        "matrix_instructions": ["HGMMA"], "faults": [],
    }  # fmt: skip
    found = [made, {**made, "kernel": "other_kernel"}]
    asked = []

    def compiled(*words):
        asked.append(words)
        yield from found

    monkeypatch.setattr(kernels, "compiled", compiled)
    return found, asked


def test_compiles_in_a_process_of_its_own(tmp_path, monkeypatch):
    """Two workers on two cards; the interpreter's variable is not for them."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    path = tmp_path / "kernels.json"
    result = invoke("norm", "--card", "sm_90,sm_80", "--jobs", 2, "--json", path)
    records = json.loads(path.read_text())
    assert {record["card"].split()[0] for record in records} == {"sm_80", "sm_90"}, result.output
    assert {record["room"] for record in records} == {"norm"}
    names = {record["kernel"] for record in records}
    assert {"add_layer_norm_forward_kernel", "add_layer_norm_backward_kernel"} <= names
    for record in records:
        assert record["registers"] > 0 and record["programs_per_multiprocessor"] > 0
    faults = [fault for record in records for fault in record["faults"]]
    assert result.exit_code == bool(faults)
    assert f"{len(records)} kernels compiled, {len(faults)} faults" in result.output


def test_a_fault_is_named_and_ends_with_1(rows):
    found, asked = rows
    assert invoke("--jobs", 2, "--card", "sm_90").exit_code == 0
    assert asked == [(kernels.ROOMS, ("sm_90",), 2, None)]
    found[1]["faults"] = ["spills: 8 bytes of stack"]
    result = invoke()
    assert result.exit_code == 1
    assert "other_kernel, COLS=64, sm_90 (H100): spills: 8 bytes of stack" in result.output
    assert "2 kernels compiled, 1 faults" in result.output


def test_a_process_that_ends_is_an_error(monkeypatch):
    monkeypatch.setattr(kernels, "ROOMS", (*kernels.ROOMS, "cellar"))
    with pytest.raises(RuntimeError, match=r"compiling cellar for sm_90 ended the process:[\s\S]*lwft_kernels.cellar"):
        list(kernels.compiled(("cellar",), ("sm_90",)))


def test_without_triton_it_says_so(monkeypatch):
    monkeypatch.setattr(cli.lwft_kernels.backend, "triton_error", "Triton is not installed: pip install triton")
    result = invoke("norm")
    assert result.exit_code == 2 and "pip install triton" in result.output


def test_no_room_is_left_out():
    pytest.importorskip("triton")
    from lwft_kernels.triton import ahead_of_time

    assert kernels.ROOMS == ahead_of_time.ROOMS


@pytest.mark.parametrize("words", [("cellar",), ("--card", "sm_1"), ("--jobs", "0")])
def test_bad_words_are_refused(words):
    assert invoke(*words).exit_code == 2


@pytest.mark.parametrize(
    "words, complaint",
    [((("cellar",), ()), "'cellar' is not one of"), ((("norm",), ("sm_1",)), "'sm_1'"), ((("norm",), (), 0), "jobs")],
)
def test_bad_arguments_are_refused(words, complaint):
    with pytest.raises(ValueError, match=complaint):
        list(kernels.compiled(*words))
