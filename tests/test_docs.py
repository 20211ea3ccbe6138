"""The code blocks of a page of the documents are one program, which runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import fastprune as fp

DOCS = Path(__file__).resolve().parent.parent / "docs"

pytestmark = [
    pytest.mark.usefixtures("one_thread", "sparse_is_faster"),
    pytest.mark.filterwarnings("ignore:fastprune"),
]


def run_page(name):
    """Run the python blocks of a page one after the other; return what they defined."""
    text = (DOCS / name).read_text()
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert len(blocks) == text.count("```python") > 0
    namespace = {"__name__": name}
    for block in blocks:
        line = text[: block.start(1)].count("\n")  # so that a traceback names the line of the page
        exec(compile("\n" * line + block.group(1), str(DOCS / name), "exec"), namespace)
    return namespace


def test_the_page_on_distillation_runs_and_does_what_it_says(capsys):
    defined = run_page("distillation.md")
    printed = capsys.readouterr().out.splitlines()
    assert printed[1] == "[(48, 24), (48,)]"
    assert printed[3] == "[0, 1, 2]"
    assert printed[4] in ("49% pruned", "50% pruned")
    assert 0 < int(re.match(r"(\d+)% of the blocks are zero", printed[5]).group(1)) < 100
    model = defined["model"]
    for layer in (model[0], model[2]):
        mask = layer.parametrizations.weight[0].mask
        assert not bool(mask.all())
        assert bool((layer.weight[~mask] == 0).all())
    assert float(model[2].weight.detach().norm(dim=1).max()) <= 3.0001
    assert all(not hook for hook in (model[3]._forward_hooks, defined["teacher"][3]._forward_hooks))


def test_every_function_that_the_page_names_exists():
    text = (DOCS / "distillation.md").read_text()
    names = set(re.findall(r"\bfp\.(\w+)", text))
    assert len(names) > 15
    assert names <= set(fp.__all__)


def test_the_page_on_pruning_runs(capsys):
    run_page("pruning.md")
    assert "chosen" in capsys.readouterr().out


def test_the_page_on_the_report_runs():
    defined = run_page("report.md")
    assert "Three rounds to 75 %" in (defined["folder"] / "checkpoints.html").read_text()


def test_the_page_on_shrinking_runs():
    pytest.importorskip("torch_pruning", reason="needs pip install 'fastprune[structured]'")
    defined = run_page("shrinking.md")
    parameters = [sum(p.numel() for p in defined[name].parameters()) for name in ("small", "model")]
    assert parameters[0] < 0.4 * parameters[1]


def test_the_page_on_compression_runs_and_its_table_names_the_keys(capsys):
    defined = run_page("compression.md")
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split()[:3] == ["round", "sparsity", "accuracy"]
    assert "0.5 " in printed[5]
    assert defined["scores"].granularity == fp.Block(8, 8)
    table = (DOCS / "compression.md").read_text().partition("## The history")[2].partition("```python")[0]
    named = set(re.findall(r"`(\w+)`", table.partition("| key |")[2]))
    assert set(defined["result"].history[0]) <= named
