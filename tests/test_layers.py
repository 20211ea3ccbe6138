"""select_layers: the forms of `include` and `exclude`."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import fastprune as fp
from fastprune.layers import select_layers, selects


def _model():
    return nn.ModuleDict(
        {
            "encoder": nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Conv2d(1, 2, 3)),
            "norm": nn.BatchNorm1d(4),
            "decoder": nn.Sequential(nn.Linear(4, 3)),
            "head": nn.Linear(3, 2),
        }
    )


ALL = ["encoder.0", "encoder.2", "decoder.0", "head"]


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (None, None, ALL),
        ("encoder.*", None, ["encoder.0", "encoder.2"]),
        ("*.0", None, ["encoder.0", "decoder.0"]),
        (nn.Conv2d, None, ["encoder.2"]),
        (nn.Module, None, ALL),
        ([nn.Conv2d, "head"], None, ["encoder.2", "head"]),
        (lambda name, module: getattr(module, "in_features", 0) == 3, None, ["encoder.0", "head"]),
        (None, "head", ALL[:3]),
        (None, [nn.Conv2d, "decoder.*"], ["encoder.0", "head"]),
        ("encoder.*", lambda name, module: name.endswith("2"), ["encoder.0"]),
        (None, [], ALL),
        (("HEAD", "head"), None, ["head"]),
    ],
)
def test_layers_are_chosen_in_the_order_of_the_model(include, exclude, expected):
    assert list(select_layers(_model(), include, exclude)) == expected
    taken = selects(include, exclude)
    kinds = (nn.Linear, nn.Conv2d)
    modules = [pair for pair in _model().named_modules() if isinstance(pair[1], kinds)]
    assert [name for name, module in modules if taken(name, module)] == expected


def test_an_iterator_of_selectors_is_read_once_for_all_layers():
    assert list(select_layers(_model(), (name for name in ("encoder.0", "head")))) == ["encoder.0", "head"]


@pytest.mark.parametrize("include", ["nothing", nn.Embedding, [], lambda name, module: False])
def test_a_selection_that_leaves_nothing_is_refused(include):
    with pytest.raises(ValueError, match="`include` and `exclude`"):
        select_layers(_model(), include)


@pytest.mark.parametrize("selection", [3, [None], [nn.Linear(1, 1), 2.0]])
@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_selector_of_another_kind_is_refused(argument, selection):
    with pytest.raises(TypeError, match=f"`{argument}` must be module types, name globs or predicates"):
        select_layers(_model(), **{argument: selection})


def test_the_model_itself_can_be_the_layer():
    layer = nn.Linear(3, 2)
    assert select_layers(layer) == {"": layer}


def test_a_shared_module_is_listed_once():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    model.append(model[0])
    assert list(select_layers(model)) == ["0"]


@pytest.mark.filterwarnings("error")
def test_layers_that_are_not_included_do_not_warn():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    with pytest.warns(UserWarning, match="tied") as caught:
        assert list(select_layers(nn.ModuleList([model, nn.Linear(2, 2)]))) == ["1"]
    assert len(caught) == 2
    assert list(select_layers(nn.ModuleList([model, nn.Linear(2, 2)]), "1")) == ["1"]


def test_a_tied_bias_does_not_leave_a_layer_out():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].bias = model[0].bias
    assert list(select_layers(model)) == ["0", "1"]


def test_a_masked_layer_is_still_a_layer_and_one_that_torch_pruned_is_not():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    scores = fp.score(model, None, criterion="magnitude", granularity=fp.Element())
    fp.apply_masks_(model, scores.select(sparsity=0.5))
    assert list(select_layers(model, nn.Linear)) == ["0", "1"]

    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    prune.random_unstructured(model[0], "weight", 0.5)
    with pytest.warns(UserWarning, match=r"prune\.remove"):
        assert list(select_layers(model)) == ["1"]
    prune.remove(model[0], "weight")
    assert list(select_layers(model)) == ["0", "1"]
    assert isinstance(model[0].weight, torch.nn.Parameter)
