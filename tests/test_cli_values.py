"""Values of the command line and of TOML files: what they become, and that no code in them runs."""

from __future__ import annotations

import argparse
import ast
import inspect
import random

import numpy as np
import pytest
import torch
from torch import nn

import cli_project
import fastprune as fp
from fastprune.cli import commands, options, values


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("16x16", fp.Block(16, 16)),
        (" 4x1 ", fp.Block(4, 1)),
        ("Block(16, 8)", fp.Block(16, 8)),
        ("Block(rows=2,cols=3)", fp.Block(2, 3)),
        ("Block()", fp.Block()),
        ("Unit", fp.Unit()),
        ("Unit(group_size=4, coupled=True)", fp.Unit(4, coupled=True)),
        ("Head(8)", fp.Head(8)),
        ("Element()", fp.Element()),
        ("auto", "auto"),
    ],
)
def test_granularities(text, expected):
    assert values.granularity(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("loss_delta", "loss_delta"),
        ("LossDelta(targets='predictions')", fp.criteria.LossDelta(targets="predictions")),
        ("Taylor(per_sample=True)", fp.criteria.Taylor(per_sample=True)),
        ("cli_project:loss", cli_project.loss),
    ],
)
def test_criteria(text, expected):
    assert values.criterion(text) == expected


def test_every_criterion_and_granularity_of_the_api_can_be_named():
    for name in fp.criteria.__all__:
        kind = getattr(fp.criteria, name)
        if inspect.isclass(kind) and not inspect.isabstract(kind):
            assert isinstance(values.criterion(f"{name}()"), kind)
    assert {"Block", "Element", "Head", "InputUnit", "Layer", "ParameterTensor", "Unit"} == set(
        values._PIECES
    )


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("max_sparsity=0.98", fp.Floor(max_sparsity=0.98)),
        ("Floor(units=3)", fp.Floor(units=3)),
        ("units=3, blocks_per_row=1", fp.Floor(units=3, blocks_per_row=1)),
        ({"units": 3}, fp.Floor(units=3)),
        ({"head": {"units": 3}, "*": {"max_sparsity": 0.5}},
         {"head": fp.Floor(units=3), "*": fp.Floor(max_sparsity=0.5)}),
    ],
)  # fmt: skip
def test_floors(value, expected):
    assert values.floor(value) == expected


@pytest.mark.parametrize("value", ["flops=0.4", "Budget(flops=0.4)", {"flops": 0.4}])
def test_budgets(value):
    assert values.budget(value) == fp.Budget(flops=0.4)


def test_layers_scopes_and_options_of_distill():
    assert values.layers("enc*") == ["enc*"]
    assert values.layers(["a", "cli_project:only_the_first"]) == ["a", cli_project.only_the_first]
    assert values.scope("layer") == "layer"
    assert values.scope("[['a', 'b'], 'c']") == [["a", "b"], "c"]
    given = ["max_grad_norm=1.5", "features={'0': '0'}", "scheduler=cli_project:sgd"]
    given += ["autocast_dtype=bfloat16", "scheduler_interval=step"]
    expected = {
        "max_grad_norm": 1.5,
        "features": {"0": "0"},
        "scheduler": cli_project.sgd,
        "autocast_dtype": torch.bfloat16,
        "scheduler_interval": "step",
    }
    assert values.distillation(given) == expected
    assert values.distillation(dict(entry.split("=", 1) for entry in given[2:])) == {
        key: expected[key] for key in ("scheduler", "autocast_dtype", "scheduler_interval")
    }


def test_factories_are_called_and_values_are_not():
    assert isinstance(values.made("cli_project:make_model"), nn.Sequential)
    assert values.made("cli_project:val_loader") is cli_project.val_loader
    assert isinstance(values.made("cli_project:Training"), cli_project.Training)
    assert values.reference("cli_project:sgd") is cli_project.sgd
    assert values.reference("cli_project:Training.__iter__") is cli_project.Training.__iter__


CODE = (
    "__import__('os').remove('x')", "(lambda: 1)()", "Block(open('x'), 1)", "Block(*[1, 2])", "Block(**{})",
    "Block(1)(2)", "os.system('x')", "Block.__init__(1)", "[Block()]", "Block(1 for _ in ())",
    "Block(f'{1}')", "", "(" * 5000, "Block(" + "-" * 5000 + "1)",
)  # fmt: skip


@pytest.mark.parametrize("read", [values.granularity, values.floor, values.budget])
@pytest.mark.parametrize("text", CODE, ids=range(len(CODE)))
def test_code_is_refused_and_never_runs(read, text, monkeypatch):
    monkeypatch.setattr("builtins.open", lambda *_: pytest.fail("it ran"))
    with pytest.raises(ValueError, match=r"^must "):
        read(text)


def test_the_parser_of_values_has_no_eval():
    for module in (values, options, commands):
        tree = ast.parse(inspect.getsource(module))
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        assert not names & {"eval", "exec", "compile"}


@pytest.mark.parametrize(
    ("names", "function", "beside"),
    [
        (commands.COMPRESS, fp.compress, {"output"}),
        (commands.SHRINK, fp.shrink, {*commands.SELECT, "scores", "masked", "output", "seed"}),
        (commands.SCORE, fp.score, {"output", "seed"}),
        (commands.COMPARE, fp.compare, {"max_accuracy_drop", "min_speedup", "seed"}),
    ],
)
def test_options_are_the_arguments_of_the_api(names, function, beside):
    assert set(names) - beside == set(inspect.signature(function).parameters) - {"masks"}
    assert len(set(names)) == len(names)
    assert set(names) <= set(options.OPTIONS)


@pytest.mark.parametrize(
    ("line", "file", "expected"), [(None, 5, 5), ("4", 5, 4), ("4", None, 4), (None, None, 0)]
)
def test_generators_are_seeded_by_the_line_or_the_file_before_a_factory_draws(tmp_path, line, file, expected):
    config = tmp_path / "run.toml"
    config.write_text('model = "cli_project:make_model"\n' + ("" if file is None else f"seed = {file}\n"))
    parser = argparse.ArgumentParser()
    options.add_options(parser, ("model", "seed"))
    arguments = parser.parse_args(["--config", str(config)] + ([] if line is None else ["--seed", line]))
    torch.manual_seed(99)
    model = options.read_options(arguments, required=("model",))["model"]
    drawn = random.random(), np.random.rand()
    torch.manual_seed(expected)
    assert torch.equal(model[0].weight, cli_project.make_model()[0].weight)
    assert drawn == (random.Random(expected).random(), np.random.RandomState(expected).rand())
