"""Drop-in modules whose sparsity is speed, and the conversion of models to them."""

from .attention import MultiheadAttention
from .base import BlockSparseLayer
from .choice import clear_layer_seconds, explain, layer_choices
from .conv import BlockSparseConv2d
from .convert import leave_dense_, sparsify_
from .densify import to_dense_
from .density import set_density
from .latency import measure_latency
from .linear import BlockSparseLinear
from .swapping import swap_modules
from .unpack import unpack_attention_

__all__ = [
    "BlockSparseConv2d",
    "BlockSparseLayer",
    "BlockSparseLinear",
    "MultiheadAttention",
    "clear_layer_seconds",
    "explain",
    "layer_choices",
    "leave_dense_",
    "measure_latency",
    "set_density",
    "sparsify_",
    "swap_modules",
    "to_dense_",
    "unpack_attention_",
]
