"""Steps of distillation by plain formulas in float64, which several test files compare with."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F


def sgd(parameters):
    return torch.optim.SGD(parameters, 0.1)


def divergence(student, teacher, temperature=2.0):
    """T^2 KL(teacher || student), by the formula."""
    p, q = (F.log_softmax(logits / temperature, 1) for logits in (teacher.detach(), student))
    return (p.exp() * (p - q)).sum(1).mean() * temperature**2


def assert_same_weights(model, expected):
    for found, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(found.double(), other.double(), rtol=1e-5, atol=1e-7)


def reference_steps(student, teacher, windows, total=None):
    """The student after SGD in float64, a step for each window with the mean loss over all its samples."""
    student, teacher = copy.deepcopy(student).double(), copy.deepcopy(teacher).double()
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    for window in windows:
        x, y = (torch.cat(tensors) for tensors in zip(*window, strict=True))
        logits = student(x.double())
        loss = F.cross_entropy(logits, y) / 2 + divergence(logits, teacher(x.double())) / 2
        if total is not None:
            loss = total(student, loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return student
