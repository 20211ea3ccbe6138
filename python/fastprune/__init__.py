"""fastprune: make trained PyTorch models smaller and really faster.

Score every piece of a model by the exact change of the loss when it is masked, prune what matters least
in blocks, recover by distillation, and swap in block-sparse layers whose sparsity is wall-clock speed.
"""

from . import ops, reference
from ._library import build_info, cpu_isa, set_cpu_isa, supported_cpu_isas, version
from .block_choice import AutoBlock
from .block_sparse import BlockSparseTensor
from .capture import capture_outputs
from .compress import compress
from .compression_result import CompressionResult
from .distillation import distill
from .distillation_losses import FeatureLoss, distillation_loss, logit_mse_loss
from .gradients import GradientAccumulator, GradientThreshold, zero_small_gradients_
from .granularity import Block, Element, Granularity, Head, InputUnit, Layer, ParameterTensor, Unit
from .importance import Calibration, Floor, ImportanceScores, Threshold, criteria, score
from .latency import LatencyTable, LayerLatency
from .masks import Budget, Masks, apply_masks_, remove_masks_
from .metrics import Comparison, compare, evaluate
from .modules import (
    BlockSparseConv2d,
    BlockSparseLinear,
    MultiheadAttention,
    explain,
    measure_latency,
    set_density,
    sparsify_,
    to_dense_,
    unpack_attention_,
)
from .pruner import Pruner
from .pruning import prune_
from .regrowth import RigL
from .regularization import clamp_weights_, group_lasso_penalty, l1_penalty, max_norm_, soft_threshold_
from .report import report
from .resets import reset_pieces_
from .schedules import (
    CubicSchedule,
    ExponentialSchedule,
    LinearSchedule,
    OneShotSchedule,
    Schedule,
)
from .serialization import load, save
from .shrinking import shrink

__version__ = version()

__all__ = [
    "AutoBlock",
    "Block",
    "BlockSparseConv2d",
    "BlockSparseLinear",
    "BlockSparseTensor",
    "Budget",
    "Calibration",
    "Comparison",
    "CompressionResult",
    "CubicSchedule",
    "Element",
    "ExponentialSchedule",
    "FeatureLoss",
    "Floor",
    "GradientAccumulator",
    "GradientThreshold",
    "Granularity",
    "Head",
    "ImportanceScores",
    "InputUnit",
    "LatencyTable",
    "Layer",
    "LayerLatency",
    "LinearSchedule",
    "Masks",
    "MultiheadAttention",
    "OneShotSchedule",
    "ParameterTensor",
    "Pruner",
    "RigL",
    "Schedule",
    "Threshold",
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
    "measure_latency",
    "ops",
    "prune_",
    "reference",
    "remove_masks_",
    "report",
    "reset_pieces_",
    "save",
    "score",
    "set_cpu_isa",
    "set_density",
    "shrink",
    "soft_threshold_",
    "sparsify_",
    "supported_cpu_isas",
    "to_dense_",
    "unpack_attention_",
    "zero_small_gradients_",
]
