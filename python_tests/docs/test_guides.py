"""README.md and the pages of docs/: every ```python block runs, page by page from top to bottom, and every link leads.

What a block needs and a reader does not (a tiny model instead of theirs) stands before it in a comment:

    <!-- python
    model = ...
    -->
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from environment import HAS_ADAPTERS

ROOT = Path(__file__).resolve().parents[2]
GUIDES = sorted((ROOT / "docs").glob("*.md"))
_BLOCK = re.compile(r"^```python\n(.*?)^```$|^<!-- python\n(.*?)^-->$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(?:#[^)]*)?\)")


def name(page):
    return str(page.relative_to(ROOT))


def pages():
    """Those of this environment."""
    adapters = [page for page in GUIDES if page.name == "adapters.md"]
    if HAS_ADAPTERS:
        assert adapters, "docs/adapters.md is not there"
        return adapters
    return [ROOT / "README.md", *(page for page in GUIDES if page not in adapters)]


def blocks(page):
    """The code of each block, on the lines on which it stands in the page."""
    text = page.read_text()
    for match in _BLOCK.finditer(text):
        group = 1 if match[1] is not None else 2
        yield "\n" * text.count("\n", 0, match.start(group)) + match[group]


@pytest.fixture(autouse=True)
def no_process_group_is_left():
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", pages(), ids=name)
def test_every_block_runs(page, tmp_path, monkeypatch, small_calls):
    monkeypatch.chdir(tmp_path)
    found = list(blocks(page))
    assert found, f"{page.name} has no example"
    namespace = {"__name__": "__main__"}
    for block in found:
        exec(compile(block, str(page), "exec"), namespace)


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *GUIDES], ids=lambda page: str(page.relative_to(ROOT))
)
def test_every_link_leads(page):
    targets = [target for target in _LINK.findall(page.read_text()) if "://" not in target]
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_every_page_is_in_the_index():
    linked = set(_LINK.findall((ROOT / "docs" / "README.md").read_text()))
    assert {page.name for page in GUIDES if page.name != "README.md"} <= linked
