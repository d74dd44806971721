"""csrc/common/cpu/threads.h: every task once, memory of its own, a failure that reaches the caller."""

from collections.abc import Iterator

import lwft_harness
import pytest

LEVELS = lwft_harness.levels()


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    lwft_harness.set_threads(request.param)
    yield request.param
    lwft_harness.set_threads(1)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("tasks", [0, 1, 2, 3, 200])
def test_every_task_runs_once_with_its_own_memory(level: str, tasks: int, threads: int) -> None:
    assert lwft_harness.run_tasks(level, tasks) == list(range(tasks))


@pytest.mark.parametrize("level", LEVELS)
def test_memory_that_cannot_be_had_is_an_error(level: str, threads: int) -> None:
    with pytest.raises(MemoryError):
        lwft_harness.run_tasks(level, 20, fail=True)
    assert lwft_harness.run_tasks(level, 20) == list(range(20))
