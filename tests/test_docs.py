"""The code blocks of a page of the documents are one program, which runs."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

import fastprune as fp
from fastprune import cli
from fastprune.cli import options

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


def test_the_page_on_the_command_line_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("torch_pruning", reason="needs pip install 'fastprune[structured]'")
    text = (DOCS / "command_line.md").read_text()
    blocks = dict(re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    (tmp_path / "project.py").write_text(blocks["python"])
    (tmp_path / "run.toml").write_text(blocks["toml"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "project", raising=False)
    commands = [shlex.split(line) for line in blocks["sh"].splitlines()]
    named = [command[1] for command in commands]
    assert named == ["score", "compress", "compare", "report", "score", "shrink"]
    for command in commands:
        assert command[0] == "fastprune"
        assert cli.main(command[1:]) == 0
        if "--json" in command:
            assert json.loads(capsys.readouterr().out.rpartition("run\n")[2])["speedup"] == 2.0
    assert "Three rounds to 75 %" in (tmp_path / "run" / "report.html").read_text()
    assert json.loads((tmp_path / "run" / "history.json").read_text())["settings"]["sparsity"] == 0.75
    small = fp.load(tmp_path / "small.safetensors", sys.modules["project"].make_model())
    assert 0 < small[0].out_features < 64
    named = set(re.findall(r"`(\w+)`", text.partition("## Arguments")[2].partition("##")[0]))
    assert named & set(options.OPTIONS) >= {"model", "granularity", "criterion", "floor", "budget", "scope"}


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
