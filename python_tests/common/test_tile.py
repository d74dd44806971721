"""csrc/common/cpu/tile.h on every level: packing and the three products, against numpy in float64."""

import itertools

import lwft_harness
import numpy as np
import pytest

LEVELS = lwft_harness.levels()
DTYPES = (np.float32, np.float64)
MARGIN = 5


def random_matrix(rows: int, columns: int, dtype: type, layout: str = "rows") -> np.ndarray:
    """Of N(0, 1). layout: rows or columns are contiguous, with a gap between them; or nothing is."""
    random = np.random.default_rng(1000 * rows + columns)
    if layout == "rows":
        return random.standard_normal((rows, columns + 3)).astype(dtype)[:, :columns]
    if layout == "columns":
        return random.standard_normal((columns, rows + 3)).astype(dtype)[:, :rows].T
    return random.standard_normal((2 * rows, 3 * columns)).astype(dtype)[::2, ::3]


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """bfloat16 bits in an array of the same layout, by cutting."""
    bits = np.empty_like(x, np.uint16)
    bits[...] = np.ascontiguousarray(x, np.float32).view(np.uint32) >> 16
    return bits


def value_of(x: np.ndarray) -> np.ndarray:
    if x.dtype == np.uint16:
        return (x.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return x.astype(np.float64)


def assert_close(actual: np.ndarray, a: np.ndarray, b: np.ndarray, before: np.ndarray | None = None) -> None:
    """Within the rounding of a sum taken in blocks of 256: |error| <= eps * c * |A| |B|."""
    expected, size = a.astype(np.float64) @ value_of(b), np.abs(a).astype(np.float64) @ np.abs(value_of(b))
    if before is not None:
        expected, size = expected + before, size + np.abs(before)
    limit = (4 + a.shape[1] ** 0.5) * np.finfo(actual.dtype).eps
    assert np.all(np.abs(actual - expected) <= limit * size)


SIZES = [
    *itertools.product([1, 2, 5, 6, 7, 13], [1, 3, 16, 17, 64, 65, 131], [1, 2, 17, 64]),
    (37, 97, 257),
    (48, 64, 512),
    (3, 200, 1031),
    # tile registers: whole tiles of 16 and what is left, of rows and of pairs, in one to four columns of tiles
    (16, 16, 32),
    (32, 64, 64),
    (50, 48, 96),
    (63, 130, 530),
    (64, 20, 289),
    *[(m, n, k) for m in (0, 3) for n in (0, 7) for k in (0, 5)],
]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gemm(level: str, dtype: type) -> None:
    layouts = itertools.cycle(itertools.product(["rows", "columns", "none"], ["columns", "rows", "none"]))
    for m, n, k in SIZES:
        a_layout, b_layout = next(layouts)
        a, b = random_matrix(m, k, dtype, a_layout), random_matrix(k, n, dtype, b_layout)
        out = lwft_harness.gemm(level, a, b, margin=MARGIN)
        width = out.shape[1] - MARGIN
        assert n <= width < n + lwft_harness.lanes(level, np.dtype(dtype).name)
        assert_close(out[:, :n], a, b)
        assert np.all(out[:, n:width] == 0), "padding"
        assert np.all(np.isnan(out[:, width:])), "written past the padding"
        before = random_matrix(m, width + MARGIN, dtype)
        after = lwft_harness.gemm(level, a, b, c=before, margin=MARGIN)
        assert_close(after[:, :n], a, b, before[:, :n])
        np.testing.assert_array_equal(after[:, n:], before[:, n:])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("product", ["dot_rows", "combine_rows"])
def test_products_of_few_rows(level: str, dtype: type, product: str) -> None:
    multiply = getattr(lwft_harness, product)
    for m, n, k in SIZES:
        a = random_matrix(m, k, dtype)
        b = random_matrix(k, n, dtype, "columns" if product == "dot_rows" else "rows")
        for b_typed in (b, to_bfloat16(b), b.astype(np.float16, order="K"), b.astype(np.float64, order="K")):
            b_given = b_typed.T if product == "dot_rows" else b_typed
            out = multiply(level, a, b_given, margin=MARGIN)
            assert_close(out[:, :n], a, b_typed)
            assert np.all(np.isnan(out[:, n:]))
            before = random_matrix(m, n + MARGIN, dtype)
            after = multiply(level, a, b_given, c=before, margin=MARGIN)
            assert_close(after[:, :n], a, b_typed, before[:, :n])
            np.testing.assert_array_equal(after[:, n:], before[:, n:])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["rows", "columns", "none"])
def test_panels(level: str, dtype: type, layout: str) -> None:
    """[panel][k][width], the last panel as wide as it must be, zeros in the padding; from every dtype."""
    lanes = lwft_harness.lanes(level, np.dtype(dtype).name)
    for k, n in itertools.product([0, 1, 7, 16, 33], [0, 1, 5, lanes, 2 * lanes + 1, 4 * lanes, 9 * lanes + 3]):
        b = random_matrix(k, n, dtype, layout)
        for given in (b, to_bfloat16(b), b.astype(np.float16, order="K"), b.astype(np.float32, order="K")):
            panels = lwft_harness.pack_panels(level, given, np.dtype(dtype).name)
            padded = -(-n // lanes) * lanes
            assert panels.size == k * padded
            matrix = np.zeros((k, padded), dtype)
            matrix[:, :n] = value_of(given)
            for panel_width in (2 * lanes, 4 * lanes):  # 16 or 32 vector registers
                columns = range(0, padded, panel_width)
                expected = [matrix[:, first : first + panel_width].ravel() for first in columns]
                if np.array_equal(panels, np.concatenate([*expected, np.zeros(0, dtype)])):
                    break
            else:
                raise AssertionError(f"panels of {(k, n)}")


@pytest.mark.parametrize("level", LEVELS)
def test_a_long_sum_is_accurate(level: str) -> None:
    """k = 5000 in float32: no worse than twice numpy's own product, which also sums in blocks."""
    a, b = random_matrix(7, 5000, np.float32), random_matrix(5000, 70, np.float32)
    a, b = np.abs(a), np.abs(b)  # no cancellation: the error of one long chain would grow with k
    exact = a.astype(np.float64) @ b.astype(np.float64)
    numpy_error = np.linalg.norm(a @ b - exact)
    products = [lwft_harness.gemm]
    if lwft_harness.splits_float(level):
        products.append(lwft_harness.gemm_parts)
    for actual in (
        *(product(level, a, b)[:, :70] for product in products),
        lwft_harness.dot_rows(level, a, np.ascontiguousarray(b.T)),
        lwft_harness.combine_rows(level, a, b),
    ):
        assert np.linalg.norm(actual - exact) <= 2 * numpy_error + 2e-7 * np.linalg.norm(exact)


SPLITTING = [level for level in LEVELS if lwft_harness.splits_float(level)]


@pytest.mark.parametrize("level", SPLITTING)
def test_gemm_of_floats_in_parts(level: str) -> None:
    layouts = itertools.cycle(itertools.product(["rows", "columns", "none"], ["columns", "rows", "none"]))
    for m, n, k in SIZES:
        a_layout, b_layout = next(layouts)
        a, b = random_matrix(m, k, np.float32, a_layout), random_matrix(k, n, np.float32, b_layout)
        for given in (b, to_bfloat16(b), b.astype(np.float16, order="K")):
            out = lwft_harness.gemm_parts(level, a, given, margin=MARGIN)
            assert_close(out[:, :n], a, given)
            assert np.all(out[:, n:-MARGIN] == 0), "padding"
            assert np.all(np.isnan(out[:, -MARGIN:])), "written past the padding"
            before = random_matrix(m, out.shape[1], np.float32)
            after = lwft_harness.gemm_parts(level, a, given, c=before, margin=MARGIN)
            assert_close(after[:, :n], a, given, before[:, :n])
            np.testing.assert_array_equal(after[:, n:], before[:, n:])


@pytest.mark.parametrize("level", SPLITTING)
def test_a_left_hand_side_that_is_split_beforehand(level: str) -> None:
    layouts = itertools.cycle(["rows", "columns"])
    for m, n, k in SIZES:
        a, b = random_matrix(m, k, np.float32, next(layouts)), random_matrix(k, n, np.float32)
        expected = lwft_harness.gemm_parts(level, a, b, margin=MARGIN)
        before = random_matrix(m, expected.shape[1], np.float32)
        for c in (None, before):
            expected, actual = (
                lwft_harness.gemm_parts(level, a, b, c=c, margin=MARGIN, split=split) for split in (False, True)
            )
            np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("level", SPLITTING)
def test_a_sum_in_pieces_has_the_bits_of_the_whole(level: str) -> None:
    """Cut at multiples of 512 (kChainDepth)."""
    a, b = random_matrix(50, 1300, np.float32), random_matrix(1300, 70, np.float32)
    pieces = None
    for k in range(0, 1300, 512):
        pieces = lwft_harness.gemm_parts(level, a[:, k : k + 512], b[k : k + 512], c=pieces)
    np.testing.assert_array_equal(pieces, lwft_harness.gemm_parts(level, a, b))


@pytest.mark.parametrize("level", SPLITTING)
def test_some_rows_of_what_is_packed(level: str) -> None:
    b = random_matrix(300, 150, np.float32)
    for first, k in [(0, 300), (0, 65), (32, 32), (64, 100), (256, 44), (288, 1)]:
        a = random_matrix(50, k, np.float32)
        assert_close(lwft_harness.gemm_parts(level, a, b, first=first)[:, :150], a, b[first : first + k])


@pytest.mark.parametrize("level", SPLITTING)
def test_parts_are_as_accurate_as_floats(level: str) -> None:
    """Against gemm of the vectors, whose sums are rounded at every step: no worse, whatever the size of the numbers."""
    random = np.random.default_rng(0)
    for m, n, k in [(64, 64, 64), (33, 100, 700), (64, 48, 4096)]:
        for spread in (0, 20, 60):  # factors up to 2^spread between rows, between columns and along k
            exponents = [random.integers(-spread, spread + 1, size) for size in (m, k, n)]
            a, b = random_matrix(m, k, np.float32), random_matrix(k, n, np.float32)
            a = np.ldexp(a, exponents[0][:, None] // 2 + exponents[1][None, :] // 2).astype(np.float32)
            b = np.ldexp(b, exponents[2][None, :] // 2 - exponents[1][:, None] // 2).astype(np.float32)
            size = np.abs(a).astype(np.float64) @ np.abs(b).astype(np.float64)
            exact = a.astype(np.float64) @ b.astype(np.float64)
            errors = [
                np.sqrt(np.mean(((gemm(level, a, b)[:, :n] - exact) / size) ** 2))
                for gemm in (lwft_harness.gemm_parts, lwft_harness.gemm)
            ]
            assert errors[0] <= errors[1], (m, n, k, spread)


@pytest.mark.parametrize("level", SPLITTING)
def test_what_is_not_finite_shows_in_parts(level: str) -> None:
    a, b = random_matrix(40, 70, np.float32), random_matrix(70, 80, np.float32)
    for value in (np.inf, -np.inf, np.nan):
        for row, column in [(0, 0), (17, 33), (39, 69)]:
            spoilt = a.copy()
            spoilt[row, column] = value
            finite = np.isfinite(lwft_harness.gemm_parts(level, spoilt, b)[:, :80])
            assert not finite[row].any()
            assert finite[np.arange(40) != row].all()


def even_rows(x: np.ndarray) -> np.ndarray:
    """A bfloat16 copy whose rows are whole pairs: an even row stride, and a zero after an odd row."""
    rows, columns = x.shape
    padded = np.zeros((rows, columns + columns % 2), np.uint16)
    padded[:, :columns] = to_bfloat16(x)
    return padded[:, :columns]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("layout", ["rows", "columns", "none"])
@pytest.mark.parametrize("source", [np.uint16, np.float32])
def test_pair_panels(level: str, layout: str, source: type) -> None:
    """The panels of the even rows and of the odd rows, pair by pair; a missing odd row is zero."""
    for k, n in itertools.product([0, 1, 2, 7, 16, 33, 64], [0, 1, 5, 16, 33, 64, 150]):
        b = random_matrix(k, n, np.float32, layout)
        bits = to_bfloat16(b)
        given = bits if source == np.uint16 else value_of(bits).astype(np.float32, order="K")
        expected = np.zeros((2, (k + 1) // 2, n))
        expected[0], expected[1, : k // 2] = value_of(bits[::2]), value_of(bits[1::2])
        pairs = lwft_harness.pack_pair_panels(level, given).reshape(-1, 2)
        for part in range(2):
            panels = lwft_harness.pack_panels(level, expected[part], "float32")
            np.testing.assert_array_equal(value_of(pairs[:, part]), panels)


@pytest.mark.parametrize("level", [level for level in LEVELS if lwft_harness.multiplies_bfloat16(level)])
def test_gemm_of_bfloat16(level: str) -> None:
    layouts = itertools.cycle(["columns", "rows", "none"])
    for m, n, k in SIZES:
        a, b = (
            even_rows(random_matrix(m, k, np.float32)),
            to_bfloat16(random_matrix(k, n, np.float32, next(layouts))),
        )
        exact = value_of(np.ascontiguousarray(a))
        for pack_a in (False, True):
            out = lwft_harness.gemm_bfloat16(level, a, b, margin=MARGIN, pack_a=pack_a)
            assert_close(out[:, :n], exact, b)
            assert np.all(out[:, n:-MARGIN] == 0), "padding"
            assert np.all(np.isnan(out[:, -MARGIN:])), "written past the padding"
            before = random_matrix(m, out.shape[1], np.float32)
            after = lwft_harness.gemm_bfloat16(level, a, b, c=before, margin=MARGIN, pack_a=pack_a)
            assert_close(after[:, :n], exact, b, before[:, :n])
