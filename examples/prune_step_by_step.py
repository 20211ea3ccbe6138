"""The chain by hand: score, select, mask, distil, convert, compare, save, load.

Run: python examples/prune_step_by_step.py
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset

import fastprune as fp
from fastprune.demo import load_digits_data, make_model, train


def main() -> None:
    torch.manual_seed(0)
    data = load_digits_data()
    loader = DataLoader(TensorDataset(data.train_inputs, data.train_labels), batch_size=64, shuffle=True)
    test_loader = DataLoader(TensorDataset(data.test_inputs, data.test_labels), batch_size=360)
    model = make_model(64)
    train(model, loader, epochs=15, progress=False)

    teacher = copy.deepcopy(model)
    scores = fp.score(model, loader, granularity=fp.Block(16, 16), max_samples=128)
    masks = scores.select(sparsity=0.75)
    print(masks)
    fp.apply_masks_(model, masks)
    fp.distill(model, teacher, loader, epochs=5)

    inputs = data.test_inputs[:256]
    fp.sparsify_(model, example_inputs=inputs)
    print(fp.explain(model))
    print(fp.compare(teacher, model, test_loader, example_inputs=inputs))

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small.safetensors"
        fp.save(model, path)
        again = fp.load(path, make_model(64))
        print(f"\n{path.name}: {path.stat().st_size:,} bytes")
    with torch.no_grad():
        assert torch.equal(again(inputs), model(inputs))


if __name__ == "__main__":
    main()
