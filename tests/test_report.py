"""The report of a compression: the history's figures, nothing beside the page, and all names as text."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os

import numpy as np
import pytest
import torch
from torch import nn

import fastprune as fp
from compression import OPTIONS, task
from fastprune.report.heat_maps import ranks
from report_pages import Reader, levels

pytestmark = [
    pytest.mark.usefixtures("one_thread", "sparse_is_faster"),
    pytest.mark.filterwarnings("ignore:fastprune"),
]
ROUND_KEYS = ("sparsity", "accuracy", "loss", "parameters", "flops", "bytes", "latency_seconds", "seconds")


def read(path):
    return Reader(path.read_text(encoding="utf-8"))


def run(directory, **options):
    """Compress the task in a directory, and write the history beside the checkpoints."""
    torch.manual_seed(0)  # a second run is of the same model
    model, train, val = task()
    result = fp.compress(
        model, train, val, **{**OPTIONS, **options}, checkpoint_dir=directory / "checkpoints"
    )
    result.save_history(directory / "history.json")
    return result


def assert_figures_are_those_of(page, result):
    last = result.history[-1]
    speedups = [entry["dense_latency_seconds"] / entry["latency_seconds"] for entry in result.history]
    for key in ROUND_KEYS:
        rounds = [entry[key] for entry in result.history]
        if key == "seconds":
            expected = rounds
        elif key == "sparsity":
            expected = [last[key], *rounds]
        else:
            dense = (
                result.history[-1]["dense_latency_seconds"] if key == "latency_seconds" else result.dense[key]
            )
            expected = [dense, last[key], *rounds]
        assert page.figures[key] == expected, key
    assert page.figures["speedup"] == [speedups[-1], *speedups]
    assert page.figures["layer_sparsity"] == list(last["layers"].values())
    for key in ("dense_seconds", "sparse_seconds"):
        assert page.figures[f"layer_{key}"] == [entry[key] for entry in last["layer_latency"].values()]


def test_every_figure_is_that_of_the_history(tmp_path):
    result = run(tmp_path)
    result.report(tmp_path / "report.html")
    page = read(tmp_path / "report.html")
    assert_figures_are_those_of(page, result)
    last = result.history[-1]
    shown = (
        f"{100 * last['accuracy']:.2f} %", f"{100 * result.dense_accuracy:.2f} %", f"{last['parameters']:,}",
        f"{result.dense['flops']:,}", f"{100 * last['layers']['3']:.1f} %", "2.00\u00d7", "batch 16",
        fp.cpu_isa(), "Block(rows=4, cols=4)", "sparse: measured faster",
        f"{int(result.masks['0'].sum())} of 15", f"torch{torch.__version__}",
    )  # fmt: skip
    for text in shown:
        assert text in page.text, text
    assert page.tags.count("caption") == page.tags.count("table") >= 5
    assert all(caption.strip() for caption in page.captions)


def test_the_dense_model_is_described_as_compare_describes_it(tmp_path):
    model, train, val = task()
    result = fp.compress(model, train, val, **OPTIONS)
    example = next(iter(val))[0]
    expected = fp.compare(model, result.model, val, example_inputs=example).to_dict()["dense"]
    del expected["latency_seconds"]
    assert result.dense == expected
    assert result.environment["batch_sizes"] == [16]
    assert result.environment["threads"] == 1
    assert result.settings["rounds"] == 3


def test_a_page_of_the_files_is_that_of_the_result(tmp_path):
    result = run(tmp_path)
    result.report(tmp_path / "now.html", title="One")
    fp.report(tmp_path, tmp_path / "later.html", title="One")
    fp.report(
        os.fspath(tmp_path), tmp_path / "elsewhere.html", checkpoint_dir=tmp_path / "checkpoints", title="One"
    )
    now = (tmp_path / "now.html").read_text()
    assert (tmp_path / "later.html").read_text() == now
    assert (tmp_path / "elsewhere.html").read_text() == now
    fp.report(tmp_path / "checkpoints", tmp_path / "bare.html", title="One")
    assert (tmp_path / "bare.html").read_text() == now


def test_a_history_alone_gives_all_but_the_maps(tmp_path):
    result = run(tmp_path)
    (tmp_path / "other").mkdir()
    result.save_history(tmp_path / "other" / "history.json")
    fp.report(tmp_path / "other", tmp_path / "report.html")
    page = read(tmp_path / "report.html")
    assert_figures_are_those_of(page, result)
    assert page.images == []
    assert "The scores of the last round were not kept." in page.text


@pytest.mark.parametrize(
    "granularity",
    [fp.Block(4, 4), fp.Block(3, 5), fp.Unit(), fp.Unit(group_size=4), fp.InputUnit(), fp.Element()],
    ids=str,
)
def test_scores_and_masks_are_kept_and_read_back(tmp_path, granularity):
    result = run(tmp_path, granularity=granularity)
    again = run(tmp_path, granularity=granularity)  # reads what is there
    for found in (result, again):
        assert found.scores.granularity == found.masks.granularity == granularity
        for name, mask in found.masks.items():
            assert torch.equal(mask, result.masks[name])
            assert torch.equal(found.scores[name], result.scores[name])
            assert found.masks.sparsity(name) == result.history[-1]["layers"][name]
            weight = result.model.get_submodule(name).weight
            assert bool((weight[~granularity.expand(mask, weight.shape)] == 0).all())
    again.report(tmp_path / "again.html")
    result.report(tmp_path / "first.html")
    assert (tmp_path / "again.html").read_text() == (tmp_path / "first.html").read_text()
    many = sum(mask.numel() > 1 for mask in result.masks.values())
    assert len(read(tmp_path / "first.html").images) == 2 * many > 0


class Own(fp.Block):
    """A granularity that no file format knows."""


def test_scores_without_a_file_format_are_there_once(tmp_path):
    result = run(tmp_path, granularity=Own(4, 4))
    assert set(result.masks) == {"0", "3"}
    again = run(tmp_path, granularity=Own(4, 4))
    assert again.scores is None
    assert again.masks is None
    again.report(tmp_path / "report.html")
    assert "were not kept" in read(tmp_path / "report.html").text


def test_a_mask_of_a_layer_that_is_used_twice_is_read_back(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = self.second = nn.Linear(12, 12)
            self.last = nn.Linear(12, 2)

        def forward(self, x):
            return self.last(self.second(self.first(x)))

    _, train, val = task()
    options = {**OPTIONS, "checkpoint_dir": tmp_path, "rounds": 1}
    result = fp.compress(Tied(), train, val, **options)
    fp.report(tmp_path, tmp_path / "later.html")
    result.report(tmp_path / "now.html")
    assert (tmp_path / "later.html").read_text() == (tmp_path / "now.html").read_text()


def test_the_pictures_show_ranks_and_what_was_kept(tmp_path):
    result = run(tmp_path)
    result.report(tmp_path / "report.html")
    images = dict(read(tmp_path / "report.html").images)
    rank_of = ranks(result.scores, result.scores.pruned)
    assert any(bool(layer.any()) for layer in result.scores.pruned.values())
    for name, mask in result.masks.items():
        kept = levels(images[f"kept blocks of {name}"])
        assert np.array_equal(kept == 1.0, mask.numpy())
        assert np.array_equal(kept == 0.0, ~mask.numpy())
        shown = levels(images[f"importance of {name}"])
        gone = np.isnan(rank_of[name])
        assert (shown[gone] == 0).all()
        np.testing.assert_allclose(shown[~gone], 0.14 + 0.86 * rank_of[name][~gone], atol=0.02)
        assert not gone[mask.numpy()].any()


def test_a_page_of_many_large_layers_is_small(tmp_path):
    result = run(tmp_path)
    shape, generator = torch.Size([4096, 4096]), torch.Generator().manual_seed(0)
    granularity = fp.Block(4, 4)
    names = [f"encoder.layer.{index}.output" for index in range(4)]
    scores = {name: torch.randn(1024, 1024, generator=generator).double() for name in names}
    shapes = dict.fromkeys(names, shape)
    result.scores = fp.ImportanceScores(
        scores,
        **{
            **result.scores._facts(), "weight_shapes": shapes, "granularities": None, "pruned": {},
            "means": None,
        },
    )  # fmt: skip
    masks = {name: layer > 1.0 for name, layer in scores.items()}
    result.masks = fp.Masks(masks, granularity, shapes)
    result.report(tmp_path / "report.html")
    page = read(tmp_path / "report.html")
    assert len(page.images) == 8
    assert "each cell is the mean of 16 \u00d7 16" in page.text
    assert (tmp_path / "report.html").stat().st_size < 20_000 + 8 * 6_000


HOSTILE = '<script>alert("1")</script>&amp;\'"><img src=x onerror=alert(2)> ü 層'


def test_names_are_text_wherever_they_stand(tmp_path):
    _, train, val = task()
    model = nn.Sequential()
    model.add_module(HOSTILE, nn.Linear(12, 17))
    model.add_module("relu", nn.ReLU())
    model.add_module("b" * 200, nn.Linear(17, 2))
    result = fp.compress(model, train, val, **OPTIONS)
    result.settings["loss_fn"] = HOSTILE
    result.environment[HOSTILE] = HOSTILE
    result.history[-1]["layer_latency"][HOSTILE]["reason"] = HOSTILE
    result.report(tmp_path / "report.html", title=HOSTILE)
    page = read(tmp_path / "report.html")
    assert page.text.count(HOSTILE) >= 6
    assert "script" not in page.tags
    assert len(page.images) == 4
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]


def test_the_page_loads_nothing(tmp_path):
    run(tmp_path).report(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    page = read(tmp_path / "report.html")
    assert not {"script", "link", "iframe", "object", "base", "form"} & set(page.tags)
    assert "url(" not in text
    assert "@import" not in text
    loaded = [value for _, name, value in page.attributes if name in ("src", "href", "srcset", "xlink:href")]
    assert loaded
    assert all(value.startswith("data:image/png;base64,") for value in loaded)
    policy = dict.fromkeys(value for _, name, value in page.attributes if name == "content")
    assert any("default-src 'none'" in value for value in policy)


def test_targets_that_are_no_classes_have_a_loss_and_no_accuracy(tmp_path):
    loader = [(torch.randn(8, 12), torch.randn(8, 2))]
    options = {
        **OPTIONS,
        "hard_label_weight": 1.0,
        "loss_fn": nn.MSELoss(),
        "checkpoint_dir": tmp_path / "run",
    }
    result = fp.compress(task()[0], loader, loader, **options)
    result.report(tmp_path / "report.html")
    page = read(tmp_path / "report.html")
    assert "nan" not in page.text.lower()
    assert "accuracy" not in page.figures
    assert page.figures["loss"][2:] == [entry["loss"] for entry in result.history]
    assert "Loss over sparsity" in page.text
    fp.report(tmp_path / "run", tmp_path / "later.html")
    assert (tmp_path / "later.html").read_text() == (tmp_path / "report.html").read_text()


def test_a_run_of_which_no_round_counts_says_so(tmp_path, monkeypatch):
    module = importlib.import_module("fastprune.compression_run")
    accuracies = iter([0.9, 0.5])
    monkeypatch.setattr(module, "evaluate", lambda *_, **__: {"accuracy": next(accuracies), "loss": 1.0})
    result = run(tmp_path, max_accuracy_drop=0.1)
    assert result.history == []
    assert result.scores is None
    result.report(tmp_path / "report.html")
    page = read(tmp_path / "report.html")
    assert "the model was returned as it was" in page.text
    assert page.figures["accuracy"] == [0.9]
    fp.report(tmp_path, tmp_path / "later.html")
    assert (tmp_path / "later.html").read_text() == (tmp_path / "report.html").read_text()
    fp.report(tmp_path / "checkpoints", tmp_path / "bare.html")
    assert read(tmp_path / "bare.html").figures["accuracy"] == [0.9]


def test_the_round_that_counts_is_the_one_whose_pieces_are_shown(tmp_path, monkeypatch):
    module = importlib.import_module("fastprune.compression_run")
    accuracies = iter([0.9, 0.88, 0.87, 0.5])
    monkeypatch.setattr(module, "evaluate", lambda *_, **__: {"accuracy": next(accuracies), "loss": 1.0})
    result = run(tmp_path, max_accuracy_drop=0.1)
    assert [entry["accuracy"] for entry in result.history] == [0.88, 0.87]
    assert result.masks.sparsity() == pytest.approx(result.history[1]["sparsity"])
    again = run(tmp_path, max_accuracy_drop=0.1)
    assert all(torch.equal(mask, result.masks[name]) for name, mask in again.masks.items())
    result.report(tmp_path / "report.html")
    fp.report(tmp_path, tmp_path / "later.html")
    fp.report(tmp_path / "checkpoints", tmp_path / "bare.html")
    for name in ("later", "bare"):
        assert (tmp_path / f"{name}.html").read_text() == (tmp_path / "report.html").read_text()
    assert "lowest that counts" in read(tmp_path / "report.html").text


def test_a_search_shows_what_it_tried_and_the_run_it_returns(tmp_path):
    result = run(tmp_path, sparsity=None, target="auto", max_accuracy_drop=1.0, tolerance=0.2, rounds=2)
    result.report(tmp_path / "report.html")
    page = read(tmp_path / "report.html")
    assert page.figures["probe_accuracy"] == [probe["accuracy"] for probe in result.probes]
    assert result.settings["sparsity"] == result.history[-1]["target_sparsity"]
    assert result.masks.sparsity() == pytest.approx(result.history[-1]["sparsity"])
    fp.report(tmp_path, tmp_path / "later.html")
    assert (tmp_path / "later.html").read_text() == (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("structure", ["units", "both"])
def test_units_that_are_cut_out_are_reported(tmp_path, structure):
    pytest.importorskip("torch_pruning", reason="needs pip install 'fastprune[structured]'")
    result = run(tmp_path, structure=structure, round_to=1)
    result.report(tmp_path / "report.html")
    page = read(tmp_path / "report.html")
    assert page.figures["parameters"][1] == result.history[-1]["parameters"]
    assert page.figures["layer_sparsity"] == list(result.history[-1]["layers"].values())
    assert ("units and heads scored by" if structure == "units" else "units, then Block") in page.text
    fp.report(tmp_path, tmp_path / "later.html")
    assert (tmp_path / "later.html").read_text() == (tmp_path / "report.html").read_text()


def test_units_say_why_no_layer_was_measured(tmp_path):
    result = run(tmp_path, granularity=fp.Unit())
    assert {entry["choice"] for entry in result.history[-1]["layer_latency"].values()} == {"dense"}
    result.report(tmp_path / "report.html")
    assert "masks leave plain zeros" in read(tmp_path / "report.html").text


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("no/such/folder/report.html", ValueError, "`path` must be in a folder that exists"),
        (".", ValueError, "`path` must name a file"),
        (3, TypeError, "`path` must be a path, got int"),
        (None, TypeError, "`path` must be a path, got NoneType"),
    ],
)
def test_a_wrong_path_is_refused(tmp_path, monkeypatch, path, error, message):
    monkeypatch.chdir(tmp_path)
    result = fp.CompressionResult(nn.Linear(2, 2), [], 0.5)
    with pytest.raises(error, match=message):
        result.report(path)
    with pytest.raises(TypeError, match="`title` must be a string"):
        result.report(tmp_path / "report.html", title=3)
    assert list(tmp_path.iterdir()) == []


def test_the_old_page_stays_when_a_new_one_cannot_be_written(tmp_path, monkeypatch):
    result = fp.CompressionResult(nn.Linear(2, 2), [], 0.5)
    result.report(tmp_path / "report.html")
    before = (tmp_path / "report.html").read_bytes()

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        dataclasses.replace(result, dense_accuracy=0.7).report(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_folders_that_hold_no_compression_are_refused(tmp_path):
    target = tmp_path / "report.html"
    with pytest.raises(FileNotFoundError, match="`folder` must be one that a compression wrote"):
        fp.report(tmp_path / "nothing", target)
    with pytest.raises(FileNotFoundError, match=r"`folder` must hold history\.json or the checkpoints"):
        fp.report(tmp_path, target)
    for text in ("{", "[]", '{"history": 3}', '{"history": []}', '{"dense_accuracy": 1, "history": [{}]}'):
        (tmp_path / "history.json").write_text(text)
        with pytest.raises(ValueError, match=r"history\.json' is no history of a compression"):
            fp.report(tmp_path, target)
    assert not target.exists()


def test_checkpoints_of_another_run_and_damaged_ones_are_refused(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        run(tmp_path / name, seed=len(name))
    target = tmp_path / "report.html"
    with pytest.raises(ValueError, match="`checkpoint_dir` must hold the run of"):
        fp.report(tmp_path / "first", target, checkpoint_dir=tmp_path / "second" / "checkpoints")
    state = tmp_path / "first" / "checkpoints" / "state.json"
    for text in ("{", "[]", json.dumps({"settings": {}})):
        state.write_text(text)
        with pytest.raises(ValueError, match=r"damaged state\.json"):
            fp.report(tmp_path / "first", target)
    masked = tmp_path / "second" / "checkpoints" / "round_002.safetensors"
    masked.write_bytes(masked.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"round_002\.safetensors' does not hold the masks"):
        fp.report(tmp_path / "second", target)
    fresh = task()[0]
    fp.save(fresh, masked)
    with pytest.raises(ValueError, match=r"round_002\.safetensors' does not hold the masks"):
        fp.report(tmp_path / "second", target)
    assert not target.exists()
