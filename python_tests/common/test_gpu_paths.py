"""Which kernels serve on a GPU: the table, and the rule that reads it."""

from __future__ import annotations

import json

import pytest
import torch

from lwft_kernels import backend, gpu_paths


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Writes a table of the rows it is given, of which the process then knows."""

    def write(*rows):
        (tmp_path / "paths.json").write_text(json.dumps({"measured": rows}))
        gpu_paths.places.cache_clear()

    monkeypatch.setattr(gpu_paths, "TABLE", tmp_path / "paths.json")
    monkeypatch.setattr(gpu_paths, "_card", lambda index: "card")
    yield write
    monkeypatch.undo()
    gpu_paths.places.cache_clear()


def test_what_was_not_measured_is_tritons():
    gpu_paths.places.cache_clear()
    assert not gpu_paths.places()  # once it holds rows, they name a run in benchmarks/results
    assert not gpu_paths.to_cuda("adapter", torch.empty(4, 8, device="meta"))
    assert backend.by_triton("adapter", torch.empty(4, 8, device="meta"))


@pytest.mark.parametrize(
    "op,shape,dtype,cuda",
    [
        ("adapter", (2, 100, 64), torch.bfloat16, True),  # 200 rows, as 256
        ("adapter", (256, 64), torch.bfloat16, True),
        ("adapter", (128, 64), torch.bfloat16, False),
        ("adapter", (257, 64), torch.bfloat16, False),
        ("adapter", (200, 128), torch.bfloat16, False),
        ("adapter", (200, 64), torch.float16, False),
        ("adapter", (0, 64), torch.bfloat16, False),
        ("attention", (200, 64), torch.bfloat16, False),
    ],
    ids=str,
)
def test_the_row_of_the_very_place_decides(table, op, shape, dtype, cuda):
    table({"card": "card", "op": "adapter", "dtype": "bfloat16", "width": 64, "rows": 256})
    x = torch.empty(shape, dtype=dtype, device="meta")
    assert gpu_paths.to_cuda(op, x) == cuda
    assert backend.by_triton(op, x) != cuda
    with backend.use_backend("triton"):
        assert backend.by_triton(op, x)


def test_another_card_is_tritons(table):
    table({"card": "another", "op": "adapter", "dtype": "bfloat16", "width": 64, "rows": 256})
    assert not gpu_paths.to_cuda("adapter", torch.empty(256, 64, dtype=torch.bfloat16, device="meta"))


def test_a_table_that_is_none_says_so(table):
    table({"card": "card", "colour": "green"})
    with pytest.raises(ValueError, match="a row must have card, op, dtype, width, rows"):
        gpu_paths.places()
