"""The ops as torch users call them: transforms, compilation, autocast, import."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import fastprune as fp
from fastprune import _dispatch


@pytest.fixture
def layers():
    torch.manual_seed(0)
    mask = torch.rand(3, 5) < 0.6
    sparse = fp.BlockSparseLinear.from_dense(nn.Linear(65, 33), (16, 16), mask)
    return sparse, sparse.to_dense()


def test_forward_mode_derivatives_are_those_of_the_dense_layer(layers):
    input, direction = torch.randn(7, 65), torch.randn(7, 65)
    results = [torch.func.jvp(layer, (input,), (direction,)) for layer in layers]
    assert results[1][1].abs().max() > 0
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("transform", [torch.func.jacrev, torch.func.vmap])
def test_function_transforms_give_what_the_dense_layer_gives(layers, transform):
    input = torch.randn(7, 65)
    sparse, dense = (transform(layer)(input) for layer in layers)
    torch.testing.assert_close(sparse, dense)


@pytest.mark.parametrize("grad", [False, True])
def test_a_converted_model_compiles_whole(layers, grad):
    model = nn.Sequential(layers[0], nn.ReLU(), nn.Linear(33, 4))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    input = torch.randn(7, 65)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(compiled(input), model(input))
    if grad:
        expected = torch.autograd.grad(model(input).square().sum(), list(model.parameters()))
        found = torch.autograd.grad(compiled(input).square().sum(), list(model.parameters()))
        torch.testing.assert_close(found, expected)


def test_a_converted_model_exports(layers):
    input = torch.randn(7, 65)
    exported = torch.export.export(nn.Sequential(layers[0]).eval(), (input,))
    torch.testing.assert_close(exported.module()(input), layers[0](input))


@pytest.mark.parametrize("input_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes_are_served_or_refused_when_traced_as_when_run(layers, dtype, input_dtype):
    layer, input = layers[0].to(dtype), torch.randn(2, 65, dtype=input_dtype)
    if input_dtype == dtype:
        exported = torch.export.export(layer.eval(), (input,))
        assert torch.equal(exported.module()(input), layer(input))
        return
    refused = "bias" if input_dtype == torch.float32 else "packed_values"
    with pytest.raises(ValueError, match=f"`{refused}` must have dtype"):
        layer(input)
    with pytest.raises(Exception, match=f"`{refused}` must have dtype"):
        torch.export.export(layer.eval(), (input,))


def test_blocks_too_large_to_count_are_refused():
    with pytest.raises(ValueError, match=r"`packed_values`.*from 1 to 128"):
        fp.ops.block_sparse_linear(
            torch.randn(4, 8),
            torch.empty(0, 2**31, 2**31),
            torch.zeros(2, dtype=torch.int32),
            torch.zeros(0, dtype=torch.int32),
            out_features=8,
        )


def test_import_does_not_start_cuda():
    script = (
        "import torch\n"
        "torch.cuda.is_available = lambda: True\n"
        "def fail(*args): raise SystemExit('CUDA was started')\n"
        "torch.cuda.get_device_name = torch.cuda.current_device = fail\n"
        "import fastprune; print(fastprune.__version__)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (result.returncode, result.stdout.strip()) == (0, fp.__version__), result.stderr


def test_a_wrong_instruction_set_in_the_environment_is_named_at_the_first_kernel():
    script = "import fastprune as fp; print('imported'); fp.cpu_isa()"
    environment = {**os.environ, "FASTPRUNE_CPU_ISA": "sse9"}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert result.stdout.strip() == "imported"
    assert "'sse9' is not available" in result.stderr
    assert "FASTPRUNE_CPU_ISA" in result.stderr


@pytest.mark.parametrize(
    ("is_cuda", "dtype", "reason", "served"),
    [
        (False, torch.float32, "not built", True),
        (False, torch.float64, "not built", True),
        (False, torch.float16, None, False),
        (True, torch.float32, None, True),
        (True, torch.float64, None, False),
        (True, torch.float32, "not built", False),
    ],
)
def test_where_the_ablation_ops_have_kernels(monkeypatch, is_cuda, dtype, reason, served):
    monkeypatch.setattr("fastprune._library._cuda_unavailable", reason)
    monkeypatch.setattr(torch.Tensor, "is_cuda", is_cuda)
    assert fp.ops.has_ablation_kernels(torch.zeros(1, dtype=dtype)) is served


@pytest.mark.parametrize(
    ("dtype", "reason", "dense"),
    [
        (torch.float32, None, False),
        (torch.bfloat16, None, False),
        (torch.float64, None, True),
        (torch.float32, "not built", True),
    ],
)
def test_which_layers_run_dense_on_cuda(monkeypatch, layers, dtype, reason, dense):
    layer = layers[0].to(dtype)
    monkeypatch.setattr("fastprune._library._cuda_unavailable", reason)
    assert "through its dense weight on CUDA" not in fp.explain(nn.Sequential(layer))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    assert _dispatch.runs_dense(layer.packed_values) is dense
    assert ("through its dense weight on CUDA" in fp.explain(nn.Sequential(layer))) is dense


@pytest.mark.parametrize("op", ["block_sparse_linear", "ablate_linear"])
@pytest.mark.parametrize(
    ("reason", "cause"),
    [("not built", "CUDA kernels are not built"), (None, "it has no CUDA kernel for torch.float64")],
)
def test_what_runs_without_a_cuda_kernel_says_so_once(monkeypatch, op, reason, cause):
    monkeypatch.setattr("fastprune._library._cuda_unavailable", reason)
    monkeypatch.setattr("fastprune._dispatch._warned", set())
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    tensor = torch.zeros(1, dtype=torch.float64)
    with pytest.warns(UserWarning, match="fastprune") as warned:
        assert [_dispatch.lacks_cuda_kernel(op, tensor, False) for _ in range(2)] == [True, True]
    messages = [str(warning.message) for warning in warned]
    assert messages == [f"fastprune: {op} runs as plain torch operations on CUDA: {cause}"]


TF32_SWITCHES = {
    "nothing": ("pass", False),
    "allow_tf32": ("torch.backends.cuda.matmul.allow_tf32 = True", True),
    "fp32_precision": ("torch.backends.cuda.matmul.fp32_precision = 'tf32'", True),
    "ieee": ("torch.backends.cuda.matmul.fp32_precision = 'ieee'", False),
    "matmul precision": ("torch.set_float32_matmul_precision('high')", True),
}


def test_tf32_follows_every_switch_of_torch_compiled_too():
    # In a process of their own: after the newer switch the older one can no longer be read.
    code = "import torch; from fastprune import ops; results = []\n"
    for switch, _ in TF32_SWITCHES.values():
        code += "torch.backends.cuda.matmul.fp32_precision = 'none'\n" + switch + "\n"
        code += "results.append(ops._tf32_allowed())\n"
        code += "f = lambda x: x * (2 if ops._tf32_allowed() else 1)\n"
        code += "compiled = torch.compile(f, fullgraph=True, backend='eager')\n"
        code += "results.append(compiled(torch.ones(1)).item() == 2); torch.compiler.reset()\n"
    code += "print(results)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    wanted = [allowed for _, allowed in TF32_SWITCHES.values() for _ in range(2)]
    assert result.stdout.strip() == str(wanted), result.stderr


CONVOLUTION_SWITCHES = {
    "nothing": ("pass", True),
    "allow_tf32": ("torch.backends.cudnn.allow_tf32 = False", False),
    "ieee": ("torch.backends.cudnn.conv.fp32_precision = 'ieee'", False),
    "fp32_precision": ("torch.backends.cudnn.conv.fp32_precision = 'tf32'", True),
    "matmul's": ("torch.backends.cuda.matmul.fp32_precision = 'ieee'", True),
}


def test_tf32_of_convolutions_follows_their_own_switches_compiled_too():
    code = "import torch; from fastprune import ops_conv; results = []\n"
    for switch, _ in CONVOLUTION_SWITCHES.values():
        code += switch + "\n"
        code += "results.append(ops_conv._tf32_allowed())\n"
        code += "f = lambda x: x * (2 if ops_conv._tf32_allowed() else 1)\n"
        code += "compiled = torch.compile(f, fullgraph=True, backend='eager')\n"
        code += "results.append(compiled(torch.ones(1)).item() == 2); torch.compiler.reset()\n"
        code += "torch.backends.cudnn.conv.fp32_precision = 'tf32'\n"
    code += "print(results)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    wanted = [allowed for _, allowed in CONVOLUTION_SWITCHES.values() for _ in range(2)]
    assert result.stdout.strip() == str(wanted), result.stderr


@pytest.mark.parametrize("allow_tf32", [False, True])
def test_tf32_changes_nothing_on_the_cpu(layers, allow_tf32):
    input, layer = torch.randn(3, 65), layers[0]
    arguments = (layer.packed_values, layer.crow_indices, layer.col_indices)
    forward = torch.ops.fastprune.block_sparse_linear(
        input, *arguments, layer.bias, layer.out_features, "none", allow_tf32
    )
    assert torch.equal(forward, layer(input))
    gradient = torch.ops.fastprune.block_sparse_linear_input_gradient(forward, *arguments, 65, allow_tf32)
    assert torch.equal(
        gradient, fp.ops.block_sparse_linear_input_gradient(forward, *arguments, in_features=65)
    )
