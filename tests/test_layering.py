"""Who may import whom: Python from below, kernels no framework, bindings the stable ABI alone."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import fastprune

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "python" / "fastprune"
CSRC = ROOT / "csrc"

# Lowest first, in the groups of the design's layers. A module imports only from those before it, so
# that there can be no cycle; one that is missing here fails the test.
ORDER = (
    "_library", "reference",
    "_fake_checks", "_registration", "_registration_ablation", "_registration_conv",
    "_registration_conv_changes", "_dispatch", "ops_conv", "ops_conv_changes", "ops",
    "files", "granularity", "layers", "batches", "timing", "latency", "masks", "block_sparse", "graph",
    "exported", "node_ops", "tracing", "channel_changes", "conv_chains", "coupling",
    "importance.replacement", "importance.calibration", "importance.criterion", "importance.weight_criteria",
    "importance.sample_gradients", "importance.gradient_criteria", "importance.activation_criteria",
    "importance.criteria",
    "importance.thresholds", "importance.scopes", "importance.floors", "importance.knapsack",
    "importance.rounding", "importance.selection",
    "importance.ranking", "importance.plotting", "importance.scores_file", "importance.union",
    "importance.scores",
    "importance.packed_layers", "importance.piece_changes", "importance.fused", "importance.masked_forwards",
    "importance.chunks",
    "importance.loss_delta", "importance.first_forward", "importance.eval_mode", "importance.scoring",
    "importance",
    "modules.attention", "modules.resized", "modules.base", "modules.own_forward", "modules.linear",
    "modules.conv",
    "modules.swapping", "modules.unpack", "modules.examples", "modules.formats", "modules.choice",
    "modules.fold", "modules.block_sizes", "modules.convert",
    "modules.density", "modules.densify", "modules.latency", "modules",
    "metrics", "block_choice", "schedules", "regrowth", "resets", "pruning", "pruner",
    "gradients", "regularization", "capture", "distillation_losses", "learners", "distillation_rounds",
    "distillation",
    "shrinking.dependencies", "shrinking.heads", "shrinking.cutting", "shrinking.skipping", "shrinking.plan",
    "shrinking.verification", "shrinking.removal", "shrinking.removable", "shrinking.saving", "shrinking",
    "saved_structure", "serialization",
    "checkpoints",
    "report.style", "report.html", "report.charts", "report.heat_maps", "report.tables", "report.page",
    "report.saved", "report",
    "unit_scores", "compression_result", "compression_run", "compression_search", "compress", "demo",
    "cli.values", "cli.options", "cli.commands", "cli",
    "", "__main__",
)  # fmt: skip
# Siblings of one layer that are kept apart, so that either can be understood without the other.
APART = (("importance", "modules"), ("metrics", "distillation", "serialization"))


def _name(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def modules():
    return {_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(name, source, is_package):
    """The modules of the package that a module imports, wherever in the file it does."""
    known = modules()
    base = name.split(".") if name else []
    found = set()

    def add(dotted):
        # `from .masks import Masks` is `masks`; `from . import ops` is `ops`.
        while dotted and dotted not in known:
            dotted = dotted.rpartition(".")[0]
        found.add(dotted)

    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names if alias.name.split(".")[0] == "fastprune"]
            for target in targets:
                add(target.partition(".")[2])
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0:
                if node.module.split(".")[0] != "fastprune":
                    continue
                prefix = node.module.split(".")[1:]
            else:
                package = base if is_package else base[:-1]
                prefix = package[: len(package) - node.level + 1] + (node.module or "").split(".")
            for alias in node.names:
                add(".".join(part for part in [*prefix, alias.name] if part))
    # The compiled modules are no Python modules; `from . import _C` would read as the package itself.
    return found - {name}


def _imports_of(name):
    path = modules()[name]
    source = re.sub(r"from \. import _C\b", "pass", path.read_text())
    return imported(name, source, path.name == "__init__.py")


def test_the_order_names_every_module_once():
    assert sorted(ORDER) == sorted(modules())


@pytest.mark.parametrize("name", modules())
def test_a_module_imports_only_from_below(name):
    rank = {module: index for index, module in enumerate(ORDER)}
    above = sorted(target for target in _imports_of(name) if rank[target] >= rank[name])
    assert not above, f"{name or 'fastprune'} imports {above}, which lie above it"


def test_siblings_do_not_import_each_other():
    for group in APART:
        for name in modules():
            own = name.split(".")[0]
            if own in group:
                others = {target.split(".")[0] for target in _imports_of(name)} & set(group) - {own}
                assert not others, f"{name} imports its sibling {others}"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from .masks import Masks", {"masks"}),
        ("from . import ops, reference", {"ops", "reference"}),
        ("def f():\n    from .importance.scores import ImportanceScores", {"importance.scores"}),
        ("import fastprune.masks as m", {"masks"}),
        ("from fastprune.modules import explain", {"modules"}),
        ("from fastprune import modules, score", {"modules", ""}),
        ("import torch\nfrom torch import nn", set()),
    ],
)
def test_every_form_of_import_is_seen(source, expected):
    assert imported("cli", source, False) == expected
    assert imported(
        "importance.scores", "from ..masks import Masks\nfrom .criteria import Magnitude", False
    ) == {
        "masks",
        "importance.criteria",
    }


def _uses_torch_ops(tree):
    """Whether `torch.ops` is read, or imported, in any form; torch's own `torch.ops.aten` does not count."""
    own = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "aten"
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "ops" and id(node) not in own:
            if isinstance(node.value, ast.Name) and node.value.id == "torch":
                return True
        elif isinstance(node, ast.ImportFrom) and node.module == "torch":
            if any(alias.name == "ops" for alias in node.names):
                return True
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            if any(name.startswith(("torch.ops", "torch._ops")) for name in names):
                return True
    return False


def test_only_ops_and_registration_use_torch_ops():
    users = {name for name, path in modules().items() if _uses_torch_ops(ast.parse(path.read_text()))}
    assert users == {"_registration", "_registration_conv", "ops", "ops_conv", "ops_conv_changes"}
    for source in ("torch.ops.fastprune.f()", "from torch import ops", "import torch.ops as o"):
        assert _uses_torch_ops(ast.parse(source))
    assert not _uses_torch_ops(ast.parse("torch.ops.aten.relu(x)"))


def test_only_the_loader_imports_the_compiled_modules():
    pattern = re.compile(r"import _C\b|fastprune\._C")
    users = {name for name, path in modules().items() if pattern.search(path.read_text())}
    assert users == {"_library"}


def test_every_public_name_exists_and_has_a_docstring():
    for name in fastprune.__all__:
        value = getattr(fastprune, name)
        assert isinstance(value, str) or value.__doc__, name


def includes(path):
    return re.findall(r'^\s*#\s*include\s*([<"][^>"]+[>"])', path.read_text(), re.MULTILINE)


def sources(folder):
    return sorted(
        path
        for path in (CSRC / folder).rglob("*")
        if path.suffix in {".h", ".hpp", ".cuh", ".c", ".cpp", ".cu"}
    )


FRAMEWORK = re.compile(r'[<"](torch|ATen|aten|c10|caffe2|pybind11|Python\.h|numpy)\b')
STABLE = ("torch/csrc/stable/", "torch/headeronly/", "torch/csrc/inductor/aoti_torch/c/")


@pytest.mark.parametrize("path", sources("kernels"), ids=lambda path: str(path.relative_to(CSRC)))
def test_kernels_include_no_framework_and_no_binding(path):
    for header in includes(path):
        assert not FRAMEWORK.match(header), header
        assert "bindings/" not in header


@pytest.mark.parametrize("path", sources("bindings"), ids=lambda path: str(path.relative_to(CSRC)))
def test_bindings_include_only_the_stable_headers_of_torch(path):
    for header in includes(path):
        name = header[1:-1]
        assert not name.startswith(("ATen/", "aten/", "c10/", "caffe2/")), header
        assert not name.startswith("torch/") or name.startswith(STABLE), header


def test_the_header_patterns_find_what_they_look_for():
    assert len(sources("kernels")) > 4
    assert len(sources("bindings")) > 4
    assert any(includes(path) for path in sources("kernels"))
    for header in (
        "<torch/all.h>",
        "<ATen/ATen.h>",
        "<c10/util/Half.h>",
        "<pybind11/pybind11.h>",
        "<Python.h>",
    ):
        assert FRAMEWORK.match(header)
    assert not FRAMEWORK.match("<cstdint>")
    assert not FRAMEWORK.match('"../types.h"')
