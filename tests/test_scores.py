"""What a user does with scores: saving, merging, comparing, plotting."""

from __future__ import annotations

import builtins
import json

import pytest
import scipy.stats
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import fastprune as fp
from fastprune.importance.ranking import average_ranks
from helpers import classification_batches, masked_mlp, mlp
from networks import SmallConvNet

pytestmark = pytest.mark.usefixtures("one_thread")

GRANULARITIES = [
    fp.Block(4, 3),
    fp.Unit(2),
    fp.InputUnit(),
    fp.Head(1),
    fp.Element(),
    fp.Layer(),
    fp.ParameterTensor(),
]
MERGED = [
    (fp.criteria.Magnitude(1), fp.Block(4, 3)),
    (fp.criteria.Random(3), fp.Unit()),
    ("loss_delta", fp.Unit()),
    ("loss_delta", fp.Block(4, 3)),
    (fp.criteria.LossDelta("predictions"), fp.Block(4, 3)),
    ("taylor", fp.Unit()),
    ("taylor", fp.Element()),
    (fp.criteria.Taylor(per_sample=True), fp.Block(4, 3)),
    ("fisher", fp.Unit()),
    ("wanda", fp.Element()),
    (fp.criteria.Activation("mean"), fp.Unit(4)),
    (fp.criteria.Activation("max"), fp.Layer()),
    (fp.criteria.Activation("zeros"), fp.Unit()),
]


def _facts(scores):
    return {key: value for key, value in scores._facts().items() if key not in ("means", "pruned")}


def _same(first, second):
    assert list(first) == list(second)
    assert _facts(first) == _facts(second)
    assert (first.means is None) == (second.means is None)
    for left, right in (
        (first, second),
        (first.pruned, second.pruned),
        (first.means or {}, second.means or {}),
    ):
        assert left.keys() == right.keys()
        for name in left:
            assert torch.equal(left[name], right[name])
            assert left[name].dtype == right[name].dtype


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_saved_scores_come_back_as_they_were(tmp_path, granularity):
    model = SmallConvNet()
    options = {"include": "head"} if isinstance(granularity, fp.Head) else {}
    loader = classification_batches((4, 3), (3, 7, 5))
    path = tmp_path / "scores.safetensors"
    for criterion in ("magnitude", "taylor"):
        scores = fp.score(
            model, loader, criterion=criterion, granularity=granularity, progress=False, **options
        )
        scores.save(path)
        _same(fp.ImportanceScores.load(path), scores)
        assert [file.name for file in tmp_path.iterdir()] == ["scores.safetensors"]
    masks = fp.ImportanceScores.load(path).select(sparsity=0.5)
    assert all(torch.equal(masks[name], mask) for name, mask in scores.select(sparsity=0.5).items())


def test_what_was_pruned_and_a_model_that_is_a_layer_are_saved_too(tmp_path):
    path = tmp_path / "scores"
    scores = fp.score(masked_mlp()[0], None, criterion="magnitude", granularity=fp.Block(4, 4))
    scores.save(path)
    _same(fp.ImportanceScores.load(path), scores)
    assert bool(scores.pruned["0"].any())
    alone = fp.score(nn.Linear(7, 5), None, criterion="magnitude")
    assert list(alone) == [""]
    alone.save(path)
    _same(fp.ImportanceScores.load(path), alone)


class _OwnUnit(fp.Unit):
    pass


def test_a_granularity_of_ones_own_is_not_saved(tmp_path):
    scores = fp.score(mlp(), None, criterion="magnitude", granularity=_OwnUnit())
    with pytest.raises(ValueError, match="granularity of your own"):
        scores.save(tmp_path / "scores")
    assert not list(tmp_path.iterdir())


def _tamper(path, change):
    with safe_open(path, framework="pt") as file:
        manifest = json.loads(file.metadata()["fastprune_scores"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(manifest, tensors)
    save_file(tensors, path, metadata={"fastprune_scores": json.dumps(manifest)})


TAMPERED = {
    "another format": lambda m, t: m.update(format=9),
    "no criterion": lambda m, t: m.pop("criterion"),
    "a criterion that is a number": lambda m, t: m.update(criterion=3),
    "an unknown merging": lambda m, t: m.update(merging="sum"),
    "negative samples": lambda m, t: m.update(num_samples=-1),
    "a layer too many": lambda m, t: m["layers"].append("9"),
    "layers that are no list": lambda m, t: m.update(layers="0"),
    "a tensor too few": lambda m, t: t.pop("scores/0"),
    "a tensor too many": lambda m, t: t.update({"other/0": t["scores/0"].clone()}),
    "a tensor of nothing": lambda m, t: t.update({"scores/9": t["scores/0"].clone()}),
    "scores in float32": lambda m, t: t.update({"scores/0": t["scores/0"].float()}),
    "scores of another shape": lambda m, t: t.update({"scores/0": t["scores/0"][:1].clone()}),
    "scores that are NaN": lambda m, t: t["scores/0"].fill_(torch.nan),
    "scores that are not those of their means": lambda m, t: t["scores/0"].add_(1),
    "an unknown granularity": lambda m, t: m["granularity"].update(kind="Column"),
    "a granularity out of range": lambda m, t: m["granularity"].update(rows=0),
    "a granularity with text": lambda m, t: m["granularity"].update(rows="4"),
    "a granularity with more": lambda m, t: m["granularity"].update(depth=4),
    "a weight shape of text": lambda m, t: m["weight_shapes"].update({"0": ["a", 3]}),
    "a weight shape that is negative": lambda m, t: m["weight_shapes"].update({"0": [-9, 7]}),
    "norms of nothing": lambda m, t: m["norms"].update({"9": "1"}),
    "weights that are text": lambda m, t: m["weights"].update({"0": "1"}),
    "coupled layers that are none": lambda m, t: m.update(coupled=[["0", "9"]]),
    "a layer coupled twice": lambda m, t: m.update(coupled=[["0", "0"]]),
    "coupled layers of other shapes": lambda m, t: m.update(coupled=[["0", "2"]]),
    "a group of one": lambda m, t: m.update(coupled=[["0"]]),
    "no element sizes": lambda m, t: m["element_sizes"].clear(),
}


@pytest.mark.parametrize("kind", TAMPERED)
def test_a_tampered_file_is_refused(tmp_path, kind):
    path = tmp_path / "scores"
    scores = fp.score(
        mlp(), classification_batches(), criterion="taylor", granularity=fp.Block(4, 3), progress=False
    )
    scores.save(path)
    _tamper(path, lambda manifest, tensors: None)
    _same(fp.ImportanceScores.load(path), scores)
    _tamper(path, TAMPERED[kind])
    with pytest.raises(ValueError, match=r"holds damaged scores|has format 9|no whole file"):
        fp.ImportanceScores.load(path)


def test_foreign_and_truncated_files_are_refused(tmp_path):
    path = tmp_path / "scores"
    with pytest.raises(FileNotFoundError, match="`path`"):
        fp.ImportanceScores.load(path)
    fp.save(nn.Sequential(nn.Linear(3, 2)), path)
    with pytest.raises(ValueError, match="no whole file of fastprune scores"):
        fp.ImportanceScores.load(path)
    path.write_bytes(b"not a safetensors file")
    with pytest.raises(ValueError, match="no whole file of fastprune scores"):
        fp.ImportanceScores.load(path)
    fp.score(mlp(), None, criterion="magnitude").save(path)
    whole = path.read_bytes()
    for size in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="no whole file of fastprune scores"):
            fp.ImportanceScores.load(path)


@pytest.mark.parametrize(("criterion", "granularity"), MERGED, ids=str)
def test_merged_shards_score_as_all_the_data_does(criterion, granularity, tmp_path):
    model, shape = SmallConvNet(), (3, 7, 5)
    loader = classification_batches((15, 8, 1, 4), shape)
    loader[1][1][:5] = -100  # samples that do not count make a shard weigh less
    options = {"criterion": criterion, "granularity": granularity, "progress": False}
    whole = fp.score(model, loader, **options)
    first, second = fp.score(model, loader[:1], **options), fp.score(model, loader[1:], **options)
    second.save(tmp_path / "second")
    merged = first.merge(fp.ImportanceScores.load(tmp_path / "second"))
    assert merged.num_samples == whole.num_samples
    assert merged.weights == whole.weights
    assert merged.loss == (None if whole.loss is None else pytest.approx(whole.loss, rel=1e-6))
    for name in whole:
        scale = float(whole[name].abs().max())
        torch.testing.assert_close(merged[name], whole[name], rtol=1e-5, atol=1e-6 * scale)
    needs_data = whole.num_samples > 0
    assert needs_data == any(not torch.equal(first[name], second[name]) for name in whole)


@pytest.mark.parametrize(
    ("criterion", "granularity"),
    [
        ("gradient", fp.Unit()),
        ("gradient_change", fp.Unit(4)),
        ("wanda", fp.Unit()),
        (lambda calibration: calibration.zeros(), fp.Unit()),
    ],
)
def test_what_cannot_be_merged_says_so(criterion, granularity):
    loader = classification_batches((4,))
    scores = fp.score(mlp(), loader, criterion=criterion, granularity=granularity, progress=False)
    with pytest.raises(ValueError, match="cannot be merged"):
        scores.merge(scores)


def test_only_scores_of_the_same_model_criterion_and_pieces_are_merged():
    model, loader = mlp(), classification_batches((4,))

    def scored(model=model, **options):
        return fp.score(
            model, loader, **{"criterion": "fisher", "granularity": fp.Unit(), "progress": False, **options}
        )

    scores = scored()
    with pytest.raises(TypeError, match="`other` must be ImportanceScores"):
        scores.merge(dict(scores))
    for other, message in (
        (scored(criterion="taylor"), "same criterion"),
        (scored(granularity=fp.Unit(3)), "same granularities"),
        (scored(include="0"), "same granularities"),
        (scored(mlp(7, 11)), "same weight_shapes"),
        (scored(mlp()), "other weights"),
    ):
        with pytest.raises(ValueError, match=message):
            scores.merge(other)
    first = scored(criterion="magnitude")
    second = scored(mlp(), criterion="magnitude")
    second.digest = None
    with pytest.raises(ValueError, match="same scores for layer '0'"):
        first.merge(second)


@pytest.mark.parametrize("size", [1, 15, 17, 129, 151])
@pytest.mark.parametrize("values", [2, 5, 1000])
def test_ranks_and_correlations_are_those_of_scipy(size, values):
    first, second = (torch.randint(0, values, (size,)).double() for _ in range(2))
    assert torch.equal(average_ranks(first), torch.from_numpy(scipy.stats.rankdata(first.numpy())))
    granularity = fp.Unit()

    def scores(layer):
        return fp.ImportanceScores(
            {"a": layer, "b": layer.flip(0) + 3},
            granularity=granularity,
            criterion="test",
            weight_shapes=dict.fromkeys("ab", torch.Size((size, 3))),
            pruned={},
            norms={},
            weight_uses=None,
            element_sizes=dict.fromkeys("ab", 4),
            loss=None,
            num_samples=0,
        )

    found = scores(first).correlation(scores(second), k=0.3)
    pairs = {
        "a": (first, second),
        "all": tuple(torch.cat([layer, layer.flip(0) + 3]) for layer in (first, second)),
    }
    for name, (left, right) in pairs.items():
        agreement = found.overall if name == "all" else found.layers[name]
        if len(left.unique()) > 1 and len(right.unique()) > 1:
            expected = scipy.stats.spearmanr(left.numpy(), right.numpy()).statistic
            assert agreement.spearman == pytest.approx(expected, abs=1e-12)
        else:
            assert agreement.spearman != agreement.spearman
        count = max(1, int(0.3 * len(left)))
        lowest = [sorted(range(len(x)), key=lambda i, x=x: (float(x[i]), i))[:count] for x in (left, right)]
        assert agreement.overlap == len(set(lowest[0]) & set(lowest[1])) / count


def test_a_correlation_prints_and_checks_its_arguments():
    model = mlp()
    scores = fp.score(model, None, criterion="magnitude", granularity=fp.Unit())
    found = scores.correlation(scores)
    for agreement in (found.overall, *found.layers.values()):
        assert agreement.spearman == pytest.approx(1.0)
        assert agreement.overlap == 1.0
    assert "lowest 25%" in str(found)
    assert str(found).count("100.0%") == 3
    for k in (0, 1.5, True, "half"):
        with pytest.raises(ValueError, match="`k`"):
            scores.correlation(scores, k)
    with pytest.raises(ValueError, match="`other` must have scores of the same layers"):
        scores.correlation(fp.score(model, None, criterion="magnitude", granularity=fp.Unit(), include="0"))
    with pytest.raises(ValueError, match="`other` must have scores of shape"):
        scores.correlation(fp.score(model, None, criterion="magnitude", granularity=fp.Unit(2)))


def test_a_plot_has_a_row_for_each_layer_and_a_map_for_each_with_blocks(tmp_path):
    pytest.importorskip("matplotlib", reason="plots need the extra `plot`")
    model, _ = masked_mlp(0.5)
    scores = fp.score(model, None, criterion="magnitude", granularity=fp.Block(4, 4))
    figure = scores.plot()
    boxes, *rest = figure.axes
    maps = [axes for axes in rest if axes.images and axes.get_title()]
    assert [label.get_text() for label in boxes.get_yticklabels()] == ["0", "2"]
    assert [axes.get_title() for axes in maps] == ["layer 0", "layer 2"]
    for axes in maps:
        name = axes.get_title().split()[1]
        drawn = axes.images[0].get_array()
        assert drawn.shape == scores[name].shape
        blank = torch.as_tensor(drawn.mask if drawn.mask.shape else drawn.mask | (drawn.data != drawn.data))
        assert torch.equal(blank, scores.pruned[name])
    figure.savefig(tmp_path / "scores.png")
    units = fp.score(model, None, criterion="magnitude", granularity=fp.Unit()).plot()
    assert len(units.axes) == 1
    fp.score(nn.Linear(1, 1), None, criterion="magnitude").plot()


def test_a_plot_without_matplotlib_names_the_extra(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **options):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"fastprune\[plot\]"):
        fp.score(mlp(), None, criterion="magnitude").plot()


def test_absolute_scores_rank_by_size_and_merge_before_the_sign_is_dropped():
    model, shards = mlp(), [classification_batches((40,)), classification_batches((23,))]
    first, second = (fp.score(model, shard, granularity=fp.Block(4, 3), progress=False) for shard in shards)
    assert any(bool((layer < 0).any()) for layer in first.values())
    merged = first.absolute().merge(second.absolute())
    for name, layer in first.merge(second).items():
        assert torch.equal(first.absolute()[name], first[name].abs())
        torch.testing.assert_close(merged[name], layer.abs(), rtol=1e-12, atol=1e-15)
    assert first.absolute().criterion == "loss_delta"
    wanted = torch.cat([layer.flatten() for layer in first.values()]).abs().min()
    masks = first.absolute().select(sparsity=0.1)
    dropped = torch.cat([first[name][~masks[name]] for name in first])
    assert float(dropped.abs().min()) == float(wanted)
