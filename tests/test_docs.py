"""The examples of the documentation's pages run, in the order in which they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.usefixtures("one_thread", "sparse_is_faster"),
    pytest.mark.filterwarnings("ignore:fastprune"),
]

DOCS = Path(__file__).resolve().parent.parent / "docs"


@pytest.mark.parametrize("page", ["pruning.md"])
def test_the_examples_of_a_page_run(page, capsys):
    text = (DOCS / page).read_text()
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert len(blocks) == text.count("```python") > 0
    names = {"__name__": page}
    for block in blocks:
        line = text.count("\n", 0, block.start(1))
        # Blank lines in front make errors name the page's own lines.
        exec(compile("\n" * line + block[1], str(DOCS / page), "exec"), names)
    assert "chosen" in capsys.readouterr().out
