"""Which of the Makefile's environments the tests run in: AdapterHub needs another transformers than the rest."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def _is_installed(distribution: str) -> bool:
    try:
        version(distribution)
    except PackageNotFoundError:
        return False
    return True


HAS_ADAPTERS = _is_installed("adapters")
