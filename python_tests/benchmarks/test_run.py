"""`lwft-bench run`, `env` and `plot`: what they write and how they judge. No time is asserted anywhere."""

from __future__ import annotations

import csv
import dataclasses
import json

import pytest
import torch
from click.testing import CliRunner

from lwft_bench import cli, report, run, timing

SMOKE = ["run", "--preset", "smoke", "--threads", "1"]


def invoke(*words):
    return CliRunner().invoke(cli.main, [str(word) for word in words], catch_exceptions=False)


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_every_family_end_to_end(tmp_path):
    json_path, csv_path, png = tmp_path / "run.json", tmp_path / "run.csv", tmp_path / "run.png"
    result = invoke(*SMOKE, "--json", json_path, "--csv", csv_path, "--png", png)
    assert result.exit_code == 0, result.output
    assert "WRONG" not in result.output and "torch.compile is left out" in result.output
    written = json.loads(json_path.read_text())
    assert {"command", "seed", "environment", "rows"} <= written.keys()
    assert {row["op"] for row in written["rows"]} == {family.op for family in run.FAMILIES.values()}
    for row in written["rows"]:
        assert row["declined"] == []
        assert set(row["peaks"]) == {"gemm", "copy"} and row["flops"] > 0 and row["bytes"] > 0
        for provider in row["providers"].values():
            assert 0 < provider["first_quartile"] <= provider["median"] <= provider["third_quartile"]
    with csv_path.open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == sum(len(row["providers"]) for row in written["rows"])
    assert png.read_bytes().startswith(b"\x89PNG")


def test_the_compiler_as_a_peer(tmp_path):
    result = invoke(*SMOKE, "add_layer_norm", "--mode", "fwd", "--providers", "compile", "--providers", "lwft",
                    "--json", tmp_path / "run.json")  # fmt: skip
    assert result.exit_code == 0, result.output
    (row,) = json.loads((tmp_path / "run.json").read_text())["rows"]
    assert set(row["providers"]) == {"compile", "lwft"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_other_dtypes(tmp_path, dtype):
    result = invoke(*SMOKE, "--dtype", dtype, "--json", tmp_path / "run.json")
    assert result.exit_code == 0 and "WRONG" not in result.output, result.output


@pytest.mark.parametrize("name", ["lwft", "eager"])
def test_a_wrong_provider_is_named_and_not_timed(tmp_path, monkeypatch, name):
    family = run.FAMILIES["add_layer_norm"]
    right = family.providers[name]

    def wrong(case, arguments):
        call = right(case, arguments)
        return lambda: call() + 0.1

    broken = dataclasses.replace(family, providers={**family.providers, name: wrong})
    monkeypatch.setitem(run.FAMILIES, "add_layer_norm", broken)
    result = invoke(*SMOKE, "add_layer_norm", "--json", tmp_path / "run.json")
    assert "WRONG" in result.output
    assert result.exit_code == (1 if name == "lwft" else 0)
    for row in json.loads((tmp_path / "run.json").read_text())["rows"]:
        assert row["providers"][name].keys() == {"wrong"}
        assert report.ratio(row) is None


def test_ratio_is_to_the_best_peer_and_shows_losses():
    providers = {"eager": {"median": 3.0}, "sdpa": {"median": 2.0}, "lwft": {"median": 4.0}}
    assert report.ratio({"providers": providers}) == (0.5, "sdpa")
    assert report.ratio({"providers": {"lwft": {"median": 1.0}}}) is None
    assert report.ratio({"providers": {"eager": {"median": 1.0}, "lwft": {"wrong": "error 1"}}}) is None


def test_limit_names_the_nearer_one():
    row = {
        "providers": {"lwft": {"median": 2.0}}, "flops": 10.0, "bytes": 1.0, "peaks": {"gemm": 10.0, "copy": 10.0}
    }  # fmt: skip
    assert report.limit(row) == (0.5, "GEMM")


def test_rounds_alternate():
    calls = []
    functions = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    result = timing.interleaved(functions, 0.0)
    assert set(result) == {"a", "b"} and all(t.rounds >= timing.LEAST_ROUNDS for t in result.values())
    order = [name for i, name in enumerate(calls) if i == 0 or calls[i - 1] != name]
    assert order[-6:] in (list("ababab"), list("bababa"))


def test_presets_grow():
    sizes = [len(run.plans(tuple(run.FAMILIES), p, (), ("fwd",), (1,))) for p in ("quick", "full")]
    assert 0 < sizes[0] < sizes[1]


def test_environment():
    facts = json.loads(invoke("env", "--json").output)
    assert {"torch", "processor", "compiler", "instruction set", "library", "GPU"} <= facts.keys()
    assert "processor" in invoke("env").output


def test_plot_draws_curves(tmp_path):
    rows = []
    for tokens in (1, 10, 100):
        providers = {name: {"median": t * 1e-6 * tokens} for name, t in (("eager", 2.0), ("lwft", 1.0))}
        rows.append({
            "op": "adapter", "case": f"T={tokens}", "sizes": {"T": tokens}, "curve": ["d=8", "T"], "dtype": "float32",
            "mode": "fwd", "threads": 1, "providers": providers,
        })  # fmt: skip
    source = tmp_path / "run.json"
    source.write_text(json.dumps({"rows": rows, "environment": {"processor": "x", "torch": "y"}}))
    result = invoke("plot", source, "-o", tmp_path / "out.png")
    assert result.exit_code == 0 and (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "words", [("run", "--threads", "0"), ("run", "--threads", "x"), ("run", "sort"), ("plot", "no.json")]
)
def test_bad_words_are_refused(words):
    assert invoke(*words).exit_code == 2
