"""csrc/common/cpu/vec_math.h on every level: errors against extended precision, special values."""

import math

import lwft_harness
import numpy as np
import pytest

LEVELS = lwft_harness.levels()
DTYPES = (np.float32, np.float64)


def reference(name: str, x: np.ndarray) -> np.ndarray:
    wide = x.astype(np.longdouble)
    if name == "erf":
        return np.array([math.erf(float(value)) for value in x])
    if name == "sigmoid":
        return 1 / (1 + np.exp(-wide))
    return getattr(np, name)(wide)


def arguments(dtype: type, low: float, high: float) -> np.ndarray:
    """Dense over the range, and dense towards 0 from both sides."""
    tiny = np.exp(np.linspace(math.log(1e-30), math.log(high), 5003))
    x = np.concatenate([np.linspace(low, high, 100_003), tiny, -tiny])
    return x[(x >= low) & (x <= high)].astype(dtype)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["exp", "exp2", "tanh", "sigmoid"])
def test_relative_error(level: str, dtype: type, name: str) -> None:
    # The ranges stay clear of subnormal results, where a relative error says nothing.
    high = {("exp", np.float32): 87.0, ("exp", np.float64): 700.0, ("exp2", np.float32): 125.0}.get((name, dtype), 40.0)
    x = arguments(dtype, -min(high, 80.0) if name == "sigmoid" else -high, high)
    y = lwft_harness.unary(level, name, x)
    assert y.dtype == dtype
    expected = reference(name, x)
    relative = np.abs(y - expected) / np.where(expected == 0, 1, np.abs(expected))
    limit = 4 if name == "sigmoid" else 2.5  # units of the last place, of 1
    assert relative.max() <= limit * np.finfo(dtype).eps


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("dtype", "limit"), [(np.float32, 2e-7), (np.float64, 1e-15)])
def test_erf_absolute_error(level: str, dtype: type, limit: float) -> None:
    x = arguments(dtype, -7, 7)
    assert np.abs(lwft_harness.unary(level, "erf", x) - reference("erf", x)).max() <= limit


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(level: str, dtype: type) -> None:
    inf, nan = np.inf, np.nan
    largest, tiny = np.finfo(dtype).max, np.finfo(dtype).tiny
    x = np.array([-inf, -largest, -1e4, -0.0, 0.0, tiny, 1e4, largest, inf, nan], dtype)
    expected = {
        "exp": [0, 0, 0, 1, 1, 1, inf, inf, inf, nan],
        "exp2": [0, 0, 0, 1, 1, 1, inf, inf, inf, nan],
        "tanh": [-1, -1, -1, -0.0, 0, tiny, 1, 1, 1, nan],
        "sigmoid": [0, 0, 0, 0.5, 0.5, 0.5, 1, 1, 1, nan],
    }
    for name, values in expected.items():
        np.testing.assert_array_equal(lwft_harness.unary(level, name, x), np.array(values, dtype), err_msg=name)
    erf = lwft_harness.unary(level, "erf", x)
    np.testing.assert_allclose(erf, [-1, -1, -1, 0, 0, 1.1283791671 * tiny, 1, 1, 1, nan], rtol=1e-6)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_exp_goes_to_zero_through_the_subnormals(level: str, dtype: type) -> None:
    smallest = np.finfo(dtype).smallest_subnormal
    start, stop = (-110.0, -85.0) if dtype == np.float32 else (-750.0, -700.0)
    x = np.linspace(start, stop, 20_011).astype(dtype)
    y = lwft_harness.unary(level, "exp", x)
    expected = np.exp(x.astype(np.longdouble))
    assert np.all(np.abs(y - expected) <= np.maximum(smallest, 2.5 * np.finfo(dtype).eps * expected))
    assert np.all(np.diff(y) >= 0)
    assert y[0] == 0


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sum_and_max_over_lanes(level: str, dtype: type) -> None:
    random = np.random.default_rng(5)
    lanes = lwft_harness.lanes(level, np.dtype(dtype).name)
    assert lanes >= 2
    for place in range(lanes):
        x = random.integers(-1000, 1000, lanes).astype(dtype)
        x[place] = 5000
        np.testing.assert_array_equal(lwft_harness.sum_and_max(level, x), [x.sum(), 5000])
