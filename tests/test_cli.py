"""The command line: info, the demo's parts and its run on small files, exit codes and error text."""

from __future__ import annotations

import gzip
import json
import runpy
import struct
import sys

import numpy as np
import pytest
import torch

import fastprune as fp
from fastprune import cli, demo, metrics
from fastprune.demo import load_digits_data, load_idx_data, make_model, read_idx
from fastprune.modules import choice, formats

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:fastprune")]


def idx_bytes(array):
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


@pytest.fixture
def folder(tmp_path):
    """Four IDX files: images of 4 x 5 pixels that are bright in the row of their class."""
    for prefix, count in (("train", 64), ("t10k", 30)):
        labels = np.arange(count) % 4
        images = np.random.default_rng(0).integers(0, 60, (count, 4, 5))
        images[np.arange(count), labels] += 190
        (tmp_path / f"{prefix}-images-idx3-ubyte").write_bytes(idx_bytes(images))
        (tmp_path / f"{prefix}-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    return tmp_path


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 4, 5), (2, 1, 1, 3), (0, 4, 4)])
@pytest.mark.parametrize("zipped", [False, True])
def test_an_idx_file_is_read_plain_or_gzipped(tmp_path, shape, zipped):
    array = np.random.default_rng(0).integers(0, 256, shape)
    path = tmp_path / ("data.gz" if zipped else "data")
    path.write_bytes(gzip.compress(idx_bytes(array)) if zipped else idx_bytes(array))
    assert np.array_equal(read_idx(path), array)


WHOLE = idx_bytes(np.ones((3, 4, 5)))
BAD_IDX = {
    "empty": b"",
    "garbage": b"not an IDX file at all",
    "another type of number": WHOLE[:2] + b"\x0d" + WHOLE[3:],
    "no data": WHOLE[:16],
    "half a header": WHOLE[:9],
    "one byte short": WHOLE[:-1],
    "one byte more": WHOLE + b"\x00",
    "sizes whose product wraps around": bytes([0, 0, 8, 4]) + struct.pack(">4I", *[2**16] * 4),
    "255 dimensions": bytes([0, 0, 8, 255]) + b"\x00" * 30,
}


@pytest.mark.parametrize("kind", BAD_IDX)
@pytest.mark.parametrize("zipped", [False, True])
def test_what_is_no_whole_idx_file_is_refused_by_name(tmp_path, kind, zipped):
    path = tmp_path / ("images.gz" if zipped else "images")
    path.write_bytes(gzip.compress(BAD_IDX[kind]) if zipped else BAD_IDX[kind])
    with pytest.raises(ValueError, match=path.name):
        read_idx(path)


@pytest.mark.parametrize("cut", [0, 1, 9, 12, -9, -1])
def test_a_truncated_gzip_file_is_refused_by_name(tmp_path, cut):
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(WHOLE)[:cut])
    with pytest.raises(ValueError, match=r"images\.gz is no"):
        read_idx(path)
    damaged = bytearray(gzip.compress(WHOLE))
    damaged[12] ^= 0xFF
    path.write_bytes(bytes(damaged))
    with pytest.raises(ValueError, match=r"images\.gz"):
        read_idx(path)


def test_four_idx_files_become_a_data_set(folder):
    data = load_idx_data(folder)
    assert data.train_inputs.shape == (64, 20)
    assert data.test_inputs.shape == (30, 20)
    assert data.train_labels.dtype == torch.int64
    assert 0 <= float(data.train_inputs.min()) <= float(data.train_inputs.max()) <= 1
    assert data.test_labels.tolist() == [index % 4 for index in range(30)]
    labels = folder / NAMES[3]
    (folder / f"{NAMES[3]}.gz").write_bytes(gzip.compress(labels.read_bytes()))
    labels.unlink()
    assert torch.equal(load_idx_data(folder).test_labels, data.test_labels)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"`--data-dir` must hold {name}"):
        load_idx_data(folder)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        (NAMES[0], np.ones((64, 20)), "must have 3 dimensions"),
        (NAMES[0], np.ones((64,)), "must have 3 dimensions"),
        (NAMES[0], np.ones((0, 4, 5)), NAMES[0]),
        (NAMES[0], np.ones((63, 4, 5)), "must hold 63 labels"),
        (NAMES[1], np.ones((64, 1)), "must have 1 dimensions"),
        (NAMES[1], np.full((64,), 10), "labels below 10"),
        (NAMES[3], np.ones((29,)), "must hold 30 labels"),
        (NAMES[2], np.ones((30, 5, 5)), "of the same size"),
    ],
)
def test_files_that_do_not_belong_together_are_refused(folder, name, array, message):
    (folder / name).write_bytes(idx_bytes(array))
    with pytest.raises(ValueError, match=message):
        load_idx_data(folder)


def test_the_digits_are_the_same_split_each_time():
    data, again = load_digits_data(), load_digits_data()
    assert data.train_inputs.shape == (1437, 64)
    assert data.test_inputs.shape == (360, 64)
    assert float(data.train_inputs.max()) == 1.0
    assert set(data.test_labels.tolist()) == set(range(10))
    assert all(torch.equal(part, other) for part, other in zip(data, again, strict=True))


def test_the_digits_say_which_extra_they_need(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'fastprune\[demo\]'"):
        load_digits_data()


def test_the_speedup_of_a_layer_is_measured_only_if_it_is_right():
    layer = fp.BlockSparseLinear.from_dense(torch.nn.Linear(32, 32), mask=torch.eye(2, dtype=torch.bool))
    assert demo.layer_speedup(layer, 2) > 0
    wrong = fp.BlockSparseLinear.from_dense(torch.nn.Linear(32, 32))
    wrong.forward = lambda x: torch.zeros(len(x), 32)
    with pytest.raises(AssertionError, match="not close"):
        demo.layer_speedup(wrong, 2)


@pytest.fixture
def small_demo(monkeypatch):
    """The demo with small layers, and with times that need no measuring."""
    monkeypatch.setattr(demo, "HIDDEN_FEATURES", 33)
    monkeypatch.setattr(demo, "SPARSITIES", (0.5, 0.75))
    monkeypatch.setattr(demo, "BATCH_SIZES", (1, 8))
    monkeypatch.setattr(demo, "SCORED_SAMPLES", 16)
    for module in (demo, metrics, choice, formats):
        monkeypatch.setattr(
            module, "interleaved_medians", lambda functions, **options: [2e-3, 1e-3][: len(functions)]
        )


def test_the_demo_ends_with_a_table_and_every_figure_in_json(folder, small_demo, capsys):
    json_path = folder / "figures.json"
    arguments = [
        "demo",
        "--data",
        "fashion-mnist",
        "--data-dir",
        str(folder),
        "--json",
        str(json_path),
        "--quiet",
    ]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    for row in (
        "accuracy", "pruning rate", "parameters", "bytes on disk", "FLOPs, batch 8", "latency, batch 1",
        "latency, batch 8", "50% pruned", "75% pruned", "layer 2 33x33, batch 8", "2.00x",
        "64 training and 30 test samples", "figures written to",
    ):  # fmt: skip
        assert row in printed.out, row
    figures = json.loads(json_path.read_text())
    assert figures["data"] == "fashion-mnist"
    assert set(figures["results"]) == {"0.5", "0.75"}
    for sparsity, result in figures["results"].items():
        assert len(result["history"]) == demo.ROUNDS
        assert result["history"][-1]["sparsity"] <= float(sparsity)
        comparison = result["comparison"]["8"]
        assert comparison["compressed"]["parameters"] < comparison["dense"]["parameters"]
        assert comparison["compressed"]["flops"] < comparison["dense"]["flops"]
        assert result["bytes_on_disk"]["compressed"] > 0
        assert result["layers"]["2"]["shape"] == [33, 33]


def test_the_demo_network_has_two_hidden_layers_of_1024():
    assert [tuple(layer.weight.shape) for layer in make_model(64)[::2]] == [
        (1024, 64),
        (1024, 1024),
        (10, 1024),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "fashion-mnist"], "`--data fashion-mnist` needs `--data-dir`"),
        (["--data", "fashion-mnist", "--data-dir", "."], "`--data-dir` must hold train-images-idx3-ubyte"),
        (["--json", "no/such/folder/figures.json"], "`--json` must be in a folder that exists"),
    ],
)
def test_what_the_demo_cannot_use_is_one_line_and_exit_code_2(
    arguments, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["demo", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("fastprune: ")
    assert message in printed.err
    assert "Traceback" not in printed.err
    assert printed.out == ""


def test_a_damaged_data_set_is_one_line_and_exit_code_2(folder, capsys):
    for content in (b"garbage", gzip.compress(WHOLE)[:-5]):
        (folder / NAMES[0]).unlink(missing_ok=True)
        (folder / f"{NAMES[0]}.gz").write_bytes(content)
        assert cli.main(["demo", "--data", "fashion-mnist", "--data-dir", str(folder)]) == 2
        assert f"fastprune: {NAMES[0]}.gz is no" in capsys.readouterr().err


def test_info_prints_versions_instruction_sets_threads_and_cuda(capsys):
    assert cli.main(["info"]) == 0
    lines = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines())
    values = {name: value.strip() for name, value in lines.items()}
    assert values["fastprune"] == fp.__version__
    assert values["torch"] == torch.__version__
    assert values["threads"] == str(torch.get_num_threads())
    assert values["cpu instruction set in use"] == fp.cpu_isa()
    assert fp.cpu_isa() in values["cpu instruction sets built in"].split(", ")
    assert values["cuda kernels"]


@pytest.mark.parametrize("arguments", [[], ["train"], ["demo", "--data", "imagenet"], ["info", "--all"]])
def test_wrong_arguments_exit_with_2_and_the_usage(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2
    assert "usage: fastprune" in capsys.readouterr().err


def test_help_names_the_commands(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--help"])
    assert exit_.value.code == 0
    printed = capsys.readouterr().out
    assert "info" in printed
    assert "demo" in printed


def test_python_dash_m_runs_the_command_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fastprune", "info"])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_module("fastprune", run_name="__main__")
    assert exit_.value.code == 0
    assert "fastprune:" in capsys.readouterr().out
