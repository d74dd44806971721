"""The choice of a configuration: the rule, what was measured before, and files that are broken or another's."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from lwft_kernels.triton import tuning
from lwft_kernels.triton.cards import CLASSES, Card, assume, card_of
from lwft_kernels.triton.launch import launch
from lwft_kernels.triton.tuning import Configuration

CARD = Card("A card", 90, 227 << 10, 132)
CANDIDATES = tuple(Configuration({"ROWS": rows}, num_warps=4) for rows in (16, 32, 64))
BAND = (4096, torch.bfloat16)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LWFT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("LWFT_AUTOTUNE", "full")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    tuning.forget()
    yield tmp_path / "cache"
    tuning.forget()


@pytest.fixture
def seconds(monkeypatch):
    """A clock: what each candidate takes, by its str; counts how often it was asked."""
    table = {str(CANDIDATES[0]): 3.0, str(CANDIDATES[1]): 1.0, str(CANDIDATES[2]): 2.0, "asked": 0}

    def do_bench(call, **_):
        table["asked"] += 1
        return table[call()]

    monkeypatch.setattr("triton.testing.do_bench", do_bench)
    return table


def choose(card=CARD, band=BAND, candidates=CANDIDATES):
    return tuning.choose("kernel", card, band, candidates, str)


def test_the_fastest_is_kept_on_disk(folder, seconds):
    assert choose() == CANDIDATES[1]
    assert seconds["asked"] == 3
    assert choose() == CANDIDATES[1]
    tuning.forget()
    assert choose() == CANDIDATES[1]
    assert seconds["asked"] == 3  # from memory, then from disk
    (file,) = folder.iterdir()
    assert file.name.startswith("a-card-triton-")
    assert json.loads(file.read_text()) == {"kernel 4096 torch.bfloat16": str(CANDIDATES[1])}


@pytest.mark.parametrize("mode,expected", [("0", CANDIDATES[0]), ("1", CANDIDATES[1])])
def test_without_measuring(monkeypatch, seconds, mode, expected):
    choose()
    monkeypatch.setenv("LWFT_AUTOTUNE", mode)
    tuning.forget()
    assert choose() == expected  # "0" does not even read
    assert choose(band=(1,)) == CANDIDATES[0]  # never measured
    assert seconds["asked"] == 3


def test_another_card_and_another_band_are_measured_anew(seconds):
    choose()
    choose(card=Card("Another", 90, 227 << 10, 132))
    choose(band=(8192, torch.bfloat16))
    assert seconds["asked"] == 9


def test_what_is_no_candidate_any_more_is_measured_anew(seconds):
    choose()
    assert choose(candidates=CANDIDATES[::2]) == CANDIDATES[2]


def test_nothing_is_timed_while_a_graph_is_captured(monkeypatch, seconds):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose() == CANDIDATES[0]
    assert seconds["asked"] == 0


def test_a_candidate_the_card_cannot_run_is_passed_over(monkeypatch, seconds):
    from triton.runtime.errors import OutOfResources

    def do_bench(call, **_):
        if call() == str(CANDIDATES[1]):
            raise OutOfResources(300000, 232448, "shared memory")
        return seconds[call()]

    monkeypatch.setattr("triton.testing.do_bench", do_bench)
    assert choose() == CANDIDATES[2]
    with pytest.raises(RuntimeError, match="none of the configurations runs on this card"):
        choose(band=(7,), candidates=CANDIDATES[1:2])


class SmallCard:
    """A kernel on a card that has not enough for blocks of more than `rows` rows."""

    __name__ = "a_kernel"

    def __init__(self, rows):
        self.rows, self.ran = rows, []

    def __getitem__(self, grid):
        def run(*args, ROWS, **options):
            from triton.runtime.errors import OutOfResources

            if self.rows < ROWS:
                raise OutOfResources(1000 * ROWS, 1000 * self.rows, "shared memory")
            self.ran.append(ROWS)

        return run


def test_a_card_with_less_takes_another_candidate(monkeypatch):
    monkeypatch.setenv("LWFT_AUTOTUNE", "0")
    kernel, tensor = SmallCard(16), torch.empty(1)
    launch(kernel, tensor, grid=lambda _: (1,), candidates=CANDIDATES[::-1])
    assert kernel.ran == [16]
    with pytest.raises(RuntimeError, match="a_kernel: none of its configurations fits this card, sm_90"):
        launch(SmallCard(8), tensor, grid=lambda _: (1,), candidates=CANDIDATES)


@pytest.mark.parametrize("content", ["{", "[]", "\xff"])
def test_a_broken_file_is_named_and_not_used(folder, seconds, content):
    choose()
    (file,) = folder.iterdir()
    file.write_bytes(content.encode("latin1"))
    tuning.forget()
    with pytest.warns(UserWarning, match="is not used"):
        assert choose() == CANDIDATES[1]
    assert seconds["asked"] == 6


def test_a_folder_that_cannot_be_written_is_said(monkeypatch, tmp_path, seconds):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LWFT_CACHE_DIR", str(tmp_path / "file" / "folder"))
    with pytest.warns(UserWarning, match="cannot be kept"):
        assert choose() == CANDIDATES[1]


def test_what_another_process_wrote_is_not_lost(folder, seconds):
    choose()
    (file,) = folder.iterdir()
    file.write_text(json.dumps({**json.loads(file.read_text()), "other 1": "its choice"}))
    choose(band=(2,))
    assert json.loads(file.read_text()).keys() == {"kernel 4096 torch.bfloat16", "other 1", "kernel 2"}


def test_a_wrong_mode_says_what_it_may_be(monkeypatch):
    monkeypatch.setenv("LWFT_AUTOTUNE", "yes")
    with pytest.raises(ValueError, match="LWFT_AUTOTUNE must be one of 0, 1, full, got 'yes'"):
        choose()


def test_sizes_share_a_band_up_to_a_power_of_two():
    assert [tuning.size_band(n) for n in (0, 1, 2, 3, 4, 5, 8192, 8193)] == [1, 1, 2, 4, 4, 8, 8192, 16384]


def test_a_card_may_be_assumed():
    cpu = torch.device("cpu")
    try:
        assume(CLASSES[1])
        assert card_of(cpu) is CLASSES[1]
        assert not card_of(cpu).large
    finally:
        assume(None)
    assert card_of(cpu).large


def test_triton_is_not_imported_before_it_is_needed():
    code = "import sys, lwft_kernels; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
