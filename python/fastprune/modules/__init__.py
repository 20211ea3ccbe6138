"""Drop-in modules whose sparsity is speed, and the conversion of models to them."""

from .convert import explain, leave_dense_, sparsify_, swap_modules
from .linear import BlockSparseLinear

__all__ = ["BlockSparseLinear", "explain", "leave_dense_", "sparsify_", "swap_modules"]
