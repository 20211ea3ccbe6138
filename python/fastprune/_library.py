"""Loads the compiled modules, which registers the ops with torch, and says what they hold."""

from __future__ import annotations

import importlib

import torch

try:
    from . import _C  # type: ignore[attr-defined]
except ImportError as error:
    raise ImportError(
        f"fastprune: its compiled module could not be loaded with torch {torch.__version__}: {error}. "
        "Reinstall it against this torch: pip install --no-build-isolation --force-reinstall --no-deps ."
    ) from error

_cuda_unavailable: str | None = None
try:
    importlib.import_module("fastprune._C_cuda")
except ModuleNotFoundError:
    _cuda_unavailable = _C.cuda_status
except ImportError as error:
    _cuda_unavailable = f"built, but it could not be loaded: {error}"


def cuda_kernels_unavailable_reason() -> str | None:
    """Return why there are no CUDA kernels in this process, or None where they are loaded."""
    return _cuda_unavailable


def cpu_isa() -> str:
    """Return the instruction set of the CPU kernels in use: "avx512", "avx2" or "baseline".

    The environment variable ``FASTPRUNE_CPU_ISA`` forces one before the first kernel runs.
    """
    return _C.cpu_isa()


def set_cpu_isa(name: str) -> None:
    """Force the instruction set of the CPU kernels; "" goes back to the best.

    Raises:
        ValueError: the set is not built in, or this CPU does not run it.

    """
    _C.set_cpu_isa(name)


def supported_cpu_isas() -> list[str]:
    """Return the instruction sets that are built in and run on this CPU, best first."""
    return list(_C.supported_cpu_isas())


def version() -> str:
    """Return the version of fastprune."""
    return str(_C.version)


def build_info() -> dict[str, str | list[str] | None]:
    """Return versions, instruction sets and what there is of CUDA, as ``fastprune info`` prints them."""
    return {
        "fastprune": _C.version,
        "torch": torch.__version__,
        "built with torch": _C.built_with_torch,
        "compiler": _C.compiler,
        "cpu instruction sets built in": list(_C.built_cpu_isas()),
        "cpu instruction sets supported": supported_cpu_isas(),
        "cpu instruction set in use": cpu_isa(),
        "threads": str(torch.get_num_threads()),
        "cuda kernels": "loaded" if _cuda_unavailable is None else _cuda_unavailable,
        "cuda device": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }
