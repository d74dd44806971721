"""The random stream: known answers of Philox, and the vectorised rows of every level against the scalar."""

import lwft_harness
import numpy as np
import pytest

LEVELS = lwft_harness.levels()


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    # Random123's kat_vectors, "philox4x32 10"
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_known_answers(counter: list[int], key: list[int], expected: list[int]) -> None:
    assert lwft_harness.philox(counter, key) == expected


def test_where_a_draw_stands() -> None:
    seed, offset, row = 0x0123456789ABCDEF, 0xFEDCBA9876543210, 2**33 + 5
    for col in (0, 15, 16, 63, 64, 100, 1000003):
        counter = [col // 64 * 16 + col % 16, row % 2**32, row >> 32, offset % 2**32]
        words = lwft_harness.philox(counter, [seed % 2**32, seed >> 32])
        assert lwft_harness.philox_draw(seed, offset, row, col) == words[col % 64 // 16]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("arithmetic", ["float32", "float64"])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.999, 1.0])
def test_rows_equal_the_scalar_stream(level: str, arithmetic: str, p: float) -> None:
    seed, offset = 0xDEADBEEF12345678, 3
    threshold = min(int(p * 2**32), 2**32 - 1)
    keep_scale = 0.0 if p == 1 else 1 / (1 - p)
    for row, col0, n in [
        (0, 0, 256),
        (7, 64, 65),
        (2**32 + 1, 1, 200),
        (3, 63, 1),
        (3, 100, 0),
        (1, 4096 + 37, 93),
    ]:
        draws = np.array([lwft_harness.philox_draw(seed, offset, row, col0 + i) for i in range(n)], np.int64)
        expected = np.where(draws >= threshold, keep_scale, 0.0).astype(arithmetic)
        multipliers = lwft_harness.dropout_multipliers(level, arithmetic, seed, offset, p, row, col0, n)
        np.testing.assert_array_equal(multipliers, expected)
        values = np.random.default_rng(n).standard_normal(n).astype(arithmetic)
        dropped = lwft_harness.dropout_row(level, seed, offset, p, row, col0, values)
        np.testing.assert_array_equal(dropped, values * expected)


def test_how_many_are_kept() -> None:
    """0.9 of 2 million, within 5 standard deviations; no two rows alike."""
    level = LEVELS[-1]
    rows = [lwft_harness.dropout_multipliers(level, "float32", 1, 2, 0.1, row, 0, 20_000) for row in range(100)]
    kept = np.stack(rows) != 0
    assert abs(kept.mean() - 0.9) < 5 * (0.09 / kept.size) ** 0.5
    assert len({row.tobytes() for row in kept}) == 100
