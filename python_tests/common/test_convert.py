"""csrc/common/cpu/convert.h on every level: each bfloat16 and float16 there is, rounding to nearest even."""

import lwft_harness
import numpy as np
import pytest

LEVELS = lwft_harness.levels()
ALL_BITS = np.arange(65536, dtype=np.uint16)


def bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def float32_to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Round to nearest even, in integers."""
    bits = x.view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def is_nan(bits: np.ndarray, infinity: int) -> np.ndarray:
    return (bits & 0x7FFF) > infinity


def assert_same_bits(actual: np.ndarray, expected: np.ndarray, infinity: int) -> None:
    """Equal, where any NaN is as good as another."""
    nan = is_nan(expected, infinity)
    np.testing.assert_array_equal(is_nan(actual, infinity), nan)
    np.testing.assert_array_equal(actual[~nan], expected[~nan])


def hard_float32(halves: np.ndarray) -> np.ndarray:
    """The numbers given, the points half way between neighbours, and what lies next to those."""
    finite = np.sort(halves[np.isfinite(halves)].astype(np.float64))
    middle = ((finite[:-1] + finite[1:]) / 2).astype(np.float32)
    up, down = np.nextafter(middle, np.float32(np.inf)), np.nextafter(middle, np.float32(-np.inf))
    special = np.array([np.inf, -np.inf, np.nan, 0.0, -0.0, 65504, 65519.996, 65520, 3.4e38, 1e-45], np.float32)
    random = np.random.default_rng(1).integers(0, 2**32, 200_003, dtype=np.uint32).view(np.float32)
    return np.concatenate([halves.astype(np.float32), middle, up, down, special, -special, random])


@pytest.mark.parametrize("level", LEVELS)
def test_every_bfloat16_is_read(level: str) -> None:
    actual = lwft_harness.convert(level, ALL_BITS, "float32")
    np.testing.assert_array_equal(actual.view(np.uint32), ALL_BITS.astype(np.uint32) << 16)


@pytest.mark.parametrize("level", LEVELS)
def test_every_float16_is_read(level: str) -> None:
    halves = ALL_BITS.view(np.float16)
    np.testing.assert_array_equal(lwft_harness.convert(level, halves, "float32"), halves.astype(np.float32))
    np.testing.assert_array_equal(lwft_harness.convert(level, halves, "float64"), halves.astype(np.float64))


@pytest.mark.parametrize("level", LEVELS)
def test_bfloat16_rounds_to_nearest_even(level: str) -> None:
    x = hard_float32(bfloat16_to_float32(ALL_BITS))
    if level in ("avx512_bf16", "amx_bf16"):  # its instruction takes subnormals as zero
        x = x[~((np.abs(x) < np.finfo(np.float32).tiny) & (x != 0))]
    assert_same_bits(lwft_harness.convert(level, x, "bfloat16"), float32_to_bfloat16(x), 0x7F80)


@pytest.mark.parametrize("level", LEVELS)
def test_float16_rounds_to_nearest_even(level: str) -> None:
    x = hard_float32(ALL_BITS.view(np.float16))
    with np.errstate(over="ignore"):
        expected = x.astype(np.float16).view(np.uint16)
    assert_same_bits(lwft_harness.convert(level, x, "float16").view(np.uint16), expected, 0x7C00)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("to", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("source", [np.float64, np.float32, np.float16, np.uint16])
def test_every_pair_any_length_any_stride(level: str, source: type, to: str) -> None:
    small = np.random.default_rng(2).integers(-64, 64, 300)  # exact in every type
    values = float32_to_bfloat16(small.astype(np.float32)) if source == np.uint16 else small.astype(source)
    for length in [*range(40), 100]:
        for step in (1, 3):
            actual = lwft_harness.convert(level, values[: length * step : step], to)
            if to == "bfloat16":
                actual = bfloat16_to_float32(actual)
            np.testing.assert_array_equal(actual, small[: length * step : step])
