"""Drop-in modules whose sparsity is speed, and the conversion of models to them."""

from .choice import clear_layer_seconds, explain
from .convert import leave_dense_, sparsify_, swap_modules
from .linear import BlockSparseLinear

__all__ = ["BlockSparseLinear", "clear_layer_seconds", "explain", "leave_dense_", "sparsify_", "swap_modules"]
