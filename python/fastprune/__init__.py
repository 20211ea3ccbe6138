"""fastprune: make trained PyTorch models smaller and really faster.

Score every piece of a model by the exact change of the loss when it is masked, prune what matters least
in blocks, recover by distillation, and swap in block-sparse layers whose sparsity is wall-clock speed.
"""

from . import ops, reference
from ._library import build_info, cpu_isa, set_cpu_isa, supported_cpu_isas, version
from .block_sparse import BlockSparseTensor
from .capture import capture_outputs
from .compress import CompressionResult, compress
from .distillation import distill
from .distillation_losses import FeatureLoss, distillation_loss, logit_mse_loss
from .gradients import GradientAccumulator, GradientThreshold, zero_small_gradients_
from .granularity import Block, Element, Granularity, Head, InputUnit, Layer, ParameterTensor, Unit
from .importance import Calibration, ImportanceScores, criteria, score
from .masks import Budget, Masks, apply_masks_, remove_masks_
from .metrics import Comparison, compare, evaluate
from .modules import BlockSparseConv2d, BlockSparseLinear, explain, sparsify_
from .regularization import clamp_weights_, group_lasso_penalty, l1_penalty, max_norm_, soft_threshold_
from .serialization import load, save

__version__ = version()

__all__ = [
    "Block",
    "BlockSparseConv2d",
    "BlockSparseLinear",
    "BlockSparseTensor",
    "Budget",
    "Calibration",
    "Comparison",
    "CompressionResult",
    "Element",
    "FeatureLoss",
    "GradientAccumulator",
    "GradientThreshold",
    "Granularity",
    "Head",
    "ImportanceScores",
    "InputUnit",
    "Layer",
    "Masks",
    "ParameterTensor",
    "Unit",
    "__version__",
    "apply_masks_",
    "build_info",
    "capture_outputs",
    "clamp_weights_",
    "compare",
    "compress",
    "cpu_isa",
    "criteria",
    "distill",
    "distillation_loss",
    "evaluate",
    "explain",
    "group_lasso_penalty",
    "l1_penalty",
    "load",
    "logit_mse_loss",
    "max_norm_",
    "ops",
    "reference",
    "remove_masks_",
    "save",
    "score",
    "set_cpu_isa",
    "soft_threshold_",
    "sparsify_",
    "supported_cpu_isas",
    "zero_small_gradients_",
]
