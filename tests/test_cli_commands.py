"""score, compress, compare and report on the command line, in one process and in ones of their own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import cli_project
import fastprune as fp
from fastprune import cli
from fastprune.modules import choice

pytestmark = [
    pytest.mark.usefixtures("one_thread", "sparse_is_faster"),
    pytest.mark.filterwarnings("ignore:fastprune"),
]
MODEL = ["--model", "cli_project:make_model"]
LOADERS = ["--train-loader", "cli_project:Training", "--val-loader", "cli_project:val_loader"]
SHORT = ["--rounds", "3", "--sparsity", "0.6", "--granularity", "4x4"]
COMPRESS = ["compress", *MODEL, *LOADERS, *SHORT, "--no-progress"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments, code=0, **environment):
    """Run the command line in a process of its own, in the current folder."""
    shutil.copy(cli_project.__file__, "cli_project.py")
    done = subprocess.run(
        [sys.executable, "-m", "fastprune", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stderr
    return done


def one_line(capsys):
    """Return the one line on standard error; nothing else was printed."""
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("fastprune: ")
    assert printed.err.count("\n") == 1
    return printed.err


def test_compress_writes_what_the_api_gives(folder, capsys):
    torch.manual_seed(5)  # the command seeds by itself
    assert cli.main([*COMPRESS, "--output", "run", "--max-samples", "40", "--epochs", "2"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    torch.manual_seed(0)
    model = cli_project.make_model()
    expected = fp.compress(
        model,
        cli_project.Training(),
        cli_project.val_loader,
        sparsity=0.6,
        rounds=3,
        epochs=2,
        granularity=fp.Block(4, 4),
        max_samples=40,
        progress=False,
    )
    loaded = fp.load("run/model.safetensors", cli_project.make_model())
    for name, tensor in expected.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    found = json.loads(Path("run/history.json").read_text())
    assert [entry["accuracy"] for entry in found["history"]] == [e["accuracy"] for e in expected.history]
    assert found["settings"] == json.loads(json.dumps(expected.to_dict()["settings"]))
    assert f"{found['history'][-1]['accuracy']:.2%}" in printed.out
    assert "written to run" in printed.out
    assert "<h1>Compression report</h1>" in Path("run/report.html").read_text()


def test_compress_that_was_killed_goes_on_to_the_same_file(folder):
    arguments = [*COMPRESS, "--teacher", "previous"]
    run(*arguments, "--output", "whole")
    run(*arguments, "--output", "killed", code=-9, KILL_IN_PASS="5")
    state = json.loads(Path("killed/checkpoints/state.json").read_text())
    assert 0 < len(state["history"]) < 3
    assert not Path("killed/model.safetensors").exists()
    done = run(*arguments, "--output", "killed")
    assert done.stdout.startswith("round")
    for name in ("model.safetensors", "checkpoints/round_002.safetensors"):
        assert Path("killed", name).read_bytes() == Path("whole", name).read_bytes(), name
    again = run(*arguments, "--output", "killed")
    assert again.stdout == done.stdout
    report = Path("killed/report.html").read_text()
    run("report", "killed", "--output", "later.html")
    assert Path("later.html").read_text() == report


def test_exit_codes_and_streams_of_processes(folder):
    done = run(*COMPRESS, "--output", "run", "--json", "--progress")
    assert json.loads(done.stdout)["history"][-1]["round"] == 2
    assert "loss deltas" in done.stderr  # the progress bars
    done = run("compare", "--dense", "cli_project:make_model", "--compressed", "run/model.safetensors",
               "--loader", "cli_project:val_loader", "--min-speedup", "3", code=1)  # fmt: skip
    assert "speed-up" in done.stdout
    assert done.stderr == "fastprune: `--min-speedup` 3 is not met: the speed-up is 2.00\n"
    done = run(*COMPRESS, "--output", "run", "--rounds", "4", code=2)
    assert done.stderr.startswith("fastprune: `checkpoint_dir` holds a run with other arguments (rounds)")
    assert done.stdout == ""
    done = run("compress", code=2)
    assert done.stderr == "fastprune: `--model` must be given, on the command line or in --config\n"


def test_an_accuracy_that_falls_too_far_is_exit_code_1(folder, capsys, monkeypatch):
    from importlib import import_module

    accuracies = iter([0.9, 0.89, 0.5])
    monkeypatch.setattr(
        import_module("fastprune.compression_run"),
        "evaluate",
        lambda *_, **__: {"accuracy": next(accuracies), "loss": 1.0},
    )
    assert cli.main([*COMPRESS, "--output", "run", "--max-accuracy-drop", "0.05"]) == 1
    printed = capsys.readouterr()
    assert printed.err == "fastprune: `--max-accuracy-drop` 0.05 let 1 of 3 rounds count\n"
    assert len(json.loads(Path("run/history.json").read_text())["history"]) == 1
    assert Path("run/model.safetensors").exists()


def test_a_search_needs_no_sparsity(folder, capsys):
    arguments = ["compress", *MODEL, *LOADERS, "--rounds", "1", "--granularity", "Element()", "--no-progress"]
    arguments += ["--target", "auto", "--max-accuracy-drop", "1", "--tolerance", "0.2", "--output", "run"]
    assert cli.main(arguments) == 0
    capsys.readouterr()
    page = Path("run/report.html").read_text()
    assert cli.main(["report", "run", "--title", "Again"]) == 0
    assert Path("run/report.html").read_text() == page.replace("Compression report", "Again")


def test_score_writes_scores_and_prints_them(folder, capsys):
    arguments = ["score", *MODEL, "--loader", "cli_project:val_loader", "--granularity", "Unit(group_size=2)"]
    arguments += ["--exclude", "2", "--output", "scores.safetensors", "--no-progress"]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    torch.manual_seed(0)
    expected = fp.score(
        cli_project.make_model(),
        cli_project.val_loader,
        granularity=fp.Unit(group_size=2),
        exclude="2",
        progress=False,
    )
    found = fp.ImportanceScores.load("scores.safetensors")
    assert list(found) == ["0"]
    assert torch.equal(found["0"], expected["0"])
    assert f"{float(expected['0'].max()):.3e}" in printed.out
    assert cli.main([*arguments, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["layers"]["0"]["shape"] == [9]
    assert figures["layers"]["0"]["lowest"] == float(expected["0"].min())
    assert figures["layers"]["0"]["median"] == float(expected["0"].median())
    assert figures["num_samples"] == 40


def test_shrink_cuts_what_scores_or_a_masked_model_say(folder, capsys):
    pytest.importorskip("torch_pruning", reason="needs pip install 'fastprune[structured]'")
    score = [
        "score",
        *MODEL,
        "--loader",
        "cli_project:val_loader",
        "--granularity",
        "Unit()",
        "--exclude",
        "2",
    ]
    assert cli.main([*score, "--output", "scores.safetensors", "--no-progress"]) == 0
    capsys.readouterr()
    shrink = ["shrink", *MODEL, "--example-inputs", "cli_project:example", "--output", "small.safetensors"]
    select = ["--scores", "scores.safetensors", "--sparsity", "0.5", "--round-to", "4"]
    assert cli.main([*shrink, *select]) == 0
    printed = capsys.readouterr().out
    torch.manual_seed(0)
    model = cli_project.make_model()
    masks = fp.ImportanceScores.load("scores.safetensors").select(sparsity=0.5, round_to=4)
    expected = fp.shrink(model, masks, cli_project.example())
    loaded = fp.load("small.safetensors", cli_project.make_model())
    assert loaded[0].out_features == expected[0].out_features < 17
    assert torch.equal(loaded(cli_project.inputs), expected(cli_project.inputs))
    left = sum(parameter.numel() for parameter in expected.parameters())
    assert printed == f"{left} of 257 parameters are left, written to small.safetensors\n"

    fp.save(fp.apply_masks_(model, masks), "masked.safetensors")
    assert cli.main([*shrink, "--masked", "masked.safetensors", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)["parameters"]
    assert figures == {"before": 257, "after": left}
    for arguments, message in (
        ([], "`--scores` or `--masked` must be given"),
        ([*select, "--masked", "masked.safetensors"], "`--scores` or `--masked` must be given, and not both"),
        (["--masked", "masked.safetensors", "--round-to", "2"], "`--round-to` selects from --scores"),
        (["--scores", "scores.safetensors"], "select needs exactly one of `sparsity`, `threshold`, `budget`"),
        (["--scores", "none.safetensors", "--sparsity", "0.5"], "got 'none.safetensors'"),
    ):
        assert cli.main([*shrink, *arguments]) == 2
        assert message in one_line(capsys)
    assert cli.main(["compare", "--dense", "cli_project:make_model", "--compressed", "small.safetensors",
                     "--loader", "cli_project:val_loader"]) == 0  # fmt: skip


def test_compare_prints_a_table_or_json_and_judges(folder, capsys):
    assert cli.main([*COMPRESS, "--output", "run"]) == 0
    capsys.readouterr()
    arguments = ["compare", "--dense", "cli_project:make_model", "--loader", "cli_project:val_loader"]
    arguments += ["--compressed", "run/model.safetensors"]
    assert cli.main(arguments) == 0
    assert "pruning rate" in capsys.readouterr().out
    assert cli.main([*arguments, "--json", "--example-inputs", "cli_project:example"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["batch_size"] == 8
    assert figures["speedup"] == 2.0
    lost = figures["dense"]["accuracy"] - figures["compressed"]["accuracy"]
    assert cli.main([*arguments, "--max-accuracy-drop", str(lost), "--min-speedup", "2"]) == 0
    assert cli.main([*arguments, "--max-accuracy-drop", str(lost - 0.01), "--min-speedup", "2.1"]) == 1
    complaints = capsys.readouterr().err
    assert "`--max-accuracy-drop`" in complaints
    assert "`--min-speedup` 2.1 is not met" in complaints
    same = ["compare", "--dense", "cli_project:make_model", "--compressed", "cli_project:make_model"]
    assert cli.main([*same, "--loader", "cli_project:val_loader", "--seed", "1"]) == 0


def test_a_file_gives_the_arguments_and_the_line_beats_it(folder, capsys):
    Path("run.toml").write_text(
        """
        model = "cli_project:make_model"
        train_loader = "cli_project:Training"
        val_loader = "cli_project:val_loader"
        example_inputs = "cli_project:example"
        optimizer = "cli_project:sgd"
        loss_fn = "cli_project:loss"
        sparsity = 0.5
        rounds = 2
        granularity = "Block(4, 4)"
        criterion = "Taylor(per_sample=True)"
        include = ["0", "2"]
        scope = [["0"], ["2"]]
        progress = false
        output = "run"
        seed = 3

        [floor]
        "0" = { max_sparsity = 0.9 }
        "*" = { blocks_per_row = 1 }

        [distillation]
        max_grad_norm = 1.5
        """
    )
    assert cli.main(["compress", "--config", "run.toml", "--rounds", "1", "--include", "0"]) == 2
    assert "scope" in one_line(capsys)
    assert cli.main(["compress", "--config", "run.toml", "--rounds", "1"]) == 0
    settings = json.loads(Path("run/history.json").read_text())["settings"]
    expected = {
        "rounds": 1, "sparsity": 0.5, "seed": 3, "granularity": "Block(rows=4, cols=4)", "optimizer": "sgd",
        "loss_fn": "loss", "include": ["0", "2"], "scope": [["0"], ["2"]],
        "distillation": {"max_grad_norm": 1.5},
    }  # fmt: skip
    assert {key: settings[key] for key in expected} == expected
    assert settings["criterion"].startswith("taylor")
    assert "blocks_per_row=1" in settings["floor"]["*"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sparsety = 0.5\nepoch = 1", "`--config` run.toml has unknown keys: epoch, sparsety"),
        ("sparsity = ", "`--config` must be a TOML file, got run.toml"),
        ('sparsity = "half"', "`sparsity` in run.toml must be a number, got 'half'"),
        ("rounds = 2.5", "`rounds` in run.toml must be an integer, got 2.5"),
        ("progress = 1", "`progress` in run.toml must be true or false, got 1"),
        ("[floor]\nshare = 1", "`floor` in run.toml must have keys of units, blocks_per_row, max_sparsity"),
        ("[budget]\nflops = 2", "`budget` in run.toml: Budget `flops` must be a fraction"),
    ],
)
def test_wrong_files_are_one_line_and_exit_code_2(folder, capsys, text, message):
    Path("run.toml").write_text(text)
    assert cli.main([*COMPRESS[:7], "--output", "run", "--config", "run.toml"]) == 2
    assert message in one_line(capsys)


def test_a_missing_file_and_a_missing_parser_are_named(folder, capsys, monkeypatch):
    assert cli.main([*COMPRESS, "--output", "run", "--config", "none.toml"]) == 2
    assert "`--config` must be a TOML file, got none.toml: No such file" in one_line(capsys)
    monkeypatch.setitem(sys.modules, "tomllib", None)
    monkeypatch.setitem(sys.modules, "tomli", None)
    Path("run.toml").write_text("rounds = 1")
    assert cli.main([*COMPRESS, "--output", "run", "--config", "run.toml"]) == 2
    assert "pip install 'fastprune[toml]'" in one_line(capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "cli_project"], "`--model` must be package.module:name, got 'cli_project'"),
        (["--model", "no_such_module:f"], "`--model` must name a module that can be imported, got 'no_such"),
        (["--model", "cli_project:no"], "`--model` must name something in cli_project, which has no 'no'"),
        (
            ["--model", "cli_project:needs_an_argument"],
            "`--model` must be a value or callable without arguments",
        ),
        (["--model", "cli_project:value"], "`model` must be a torch.nn.Module"),
        (["--train-loader", "cli_project:value"], "`loader` must be an iterable of batches, got int"),
        (["--sparsity", "half"], "`--sparsity` must be a number, got 'half'"),
        (["--sparsity", "1.5"], "`sparsity` must be a number in [0, 1), got 1.5"),
        (["--rounds", "2.5"], "`--rounds` must be an integer, got '2.5'"),
        (["--rounds", "0"], "`rounds` must be an integer of at least 1, got 0"),
        (["--granularity", "16x"], "`--granularity` must be one of Block, Element"),
        (["--granularity", "Block(__import__('os').getpid(), 4)"], "`--granularity` must be one of Block"),
        (["--granularity", "Block(4, 4, 4)"], "`--granularity` must be as the API takes it"),
        (["--granularity", "Block(0, 4)"], "`--granularity`: `blocksize` must be two integers"),
        (["--criterion", "none"], "`criterion` must be"),
        (["--criterion", "Taylor(per_sample=True"], "`--criterion` must be one of"),
        (["--floor", "0.5"], "`--floor` must be key=value"),
        (["--floor", "share=0.5"], "`--floor` must have keys of units"),
        (["--budget", "flops=0.4"], "`budget` takes the place of `sparsity`, got both"),
        (["--distillation", "max_grad_norm"], "`--distillation` must be key=value, got 'max_grad_norm'"),
        (["--distillation", "speed=3"], "`distillation` may hold"),
        (["--teacher", "nobody"], "`teacher` must be 'original' or 'previous'"),
        (["--scope", "[0"], "`--scope` must be 'global', 'layer' or a list of groups"),
        (["--output", "cli_project.py"], "`--output` must be a folder, or not exist yet"),
        (["--seed", "x"], "`--seed` must be an integer, got 'x'"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_2(folder, capsys, arguments, message):
    Path("cli_project.py").write_text("")
    assert cli.main([*COMPRESS, "--output", "run", *arguments]) == 2
    assert message in one_line(capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--model", "cli_project:broken"],
            "`--model`: cli_project:broken raised ValueError: the weights are lost",
        ),
        (["--model", "cli_project:BrokenModel"], "ValueError: this model cannot run"),
        (["--model", "broken_module:f"], "`--model`: broken_module raised RuntimeError: at import"),
        (
            ["--model", "bad_import:f"],
            "`--model`: bad_import raised ModuleNotFoundError: No module named 'nothing_",
        ),
    ],
)
def test_what_fails_in_the_users_code_is_one_line_and_exit_code_1(folder, capsys, arguments, message):
    Path("broken_module.py").write_text("raise RuntimeError('at import')")
    Path("bad_import.py").write_text("import nothing_of_this_name")
    assert cli.main([*COMPRESS, "--output", "run", *arguments]) == 1
    assert message in one_line(capsys)


def test_debug_prints_the_traceback_and_keeps_the_code(folder, capsys):
    assert cli.main([*COMPRESS, "--output", "run", "--rounds", "0", "--debug"]) == 2
    printed = capsys.readouterr().err
    assert "Traceback (most recent call last)" in printed
    assert printed.splitlines()[-1].startswith("fastprune: `rounds` must be")
    assert cli.main([*COMPRESS, "--output", "run", "--model", "cli_project:broken", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_an_interrupt_is_exit_code_130(folder, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(choice, "interleaved_medians", interrupt)
    assert cli.main([*COMPRESS, "--output", "run"]) == 130
    assert "interrupted" in one_line(capsys)


def test_outputs_that_cannot_be_written_are_refused_before_the_work(folder, capsys, monkeypatch):
    monkeypatch.setattr("fastprune.cli.commands.score", lambda *_, **__: pytest.fail("it was scored"))
    arguments = ["score", *MODEL, "--loader", "cli_project:val_loader", "--output"]
    assert cli.main([*arguments, "no/such/scores.safetensors"]) == 2
    assert "`--output` must be in a folder that exists" in one_line(capsys)
    assert cli.main([*arguments, "."]) == 2
    assert "`--output` must name a file" in one_line(capsys)
    assert cli.main(["report", "nothing"]) == 2
    assert "`folder` must be one that compress wrote, got 'nothing'" in one_line(capsys)
    assert cli.main(["report", ".", "--output", "report.html"]) == 2
    assert "`folder` must hold history.json" in one_line(capsys)


def test_warnings_are_one_line(folder, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert cli.main([*COMPRESS, "--output", "run", "--sparsity", "0.99"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines
    assert all(line.startswith("fastprune: nothing is left of") for line in lines)


def test_info_prints_json(capsys):
    assert cli.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == fp.build_info()
