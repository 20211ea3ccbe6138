"""How many samples the values of a traced model are kept for at once.

The choice depends on sizes alone and not on timings, so that the same call gives the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

# What a trace is compared on with its model, and its values are measured on.
PROBE_SAMPLES = 32

# The largest value of a suffix stays near the caches, and below the 32 MiB from which malloc maps fresh
# pages for every tensor.
_LARGEST_VALUE = 8 << 20

# On a GPU a launch costs some microseconds, in which it reads or writes some megabytes: values are many times
# that, so that the launches of a suffix do not count.
_LARGEST_VALUE_ON_CUDA = 128 << 20

# A suffix holds new values beside the kept ones, and kernels hold copies.
_SHARE_OF_BUDGET = 0.25


def default_memory_budget(device: torch.device) -> int:
    """Return a quarter of the free memory, in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 4
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024 // 4
    except (OSError, KeyError, ValueError):  # no Linux
        return 1 << 30


def samples_at_once(values: dict[fx.Node, Any], samples: int, memory_budget: int) -> int:
    """Return how many samples to keep the values of, from those of a few samples.

    Args:
        values: the value of every node, for ``samples`` samples.
        samples: how many there are.
        memory_budget: bytes.

    """
    tensors = [
        tensor
        for node, value in values.items()
        if node.op not in ("placeholder", "get_attr")
        for tensor in tree_leaves(value)
        if isinstance(tensor, Tensor)
    ]
    if not tensors:
        return samples
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    most = _LARGEST_VALUE_ON_CUDA if any(tensor.is_cuda for tensor in tensors) else _LARGEST_VALUE
    largest, total = max(storages.values()) / samples, sum(storages.values()) / samples
    fitting = min(most / max(largest, 1), _SHARE_OF_BUDGET * memory_budget / max(total, 1))
    return max(1, int(fitting))
