"""Focal losses under mmcv's names, against its published numbers and the formula in plain Python.

Gradients are checked by finite differences through mmcv's own functions too, in `test_mmcv_ops.py`.
"""

import math

import pytest
import torch

from dcn_plugin.integrations.mmcv.losses import FUNCTIONS

# Of mmcv's tests/test_ops/test_focal_loss.py, with gamma 2 and alpha 0.25: logits, labels, and of each function the
# mean over rows and its gradient.
PUBLISHED = [
    (
        [[1.0, 0], [0, 1.0]], [0, 1],
        (0.00566451, [[-0.00657264, 0.00657264], [0.00657264, -0.00657264]]),
        (0.13562961, [[-0.00657264, 0.11185755], [0.11185755, -0.00657264]]),
    ),
    (
        [[1.0, 0, -1.0], [0, 1.0, 2.0]], [2, 1],
        (0.34956908, [[0.10165970, 0.03739851, -0.13905823], [0.01227554, -0.10298023, 0.09070466]]),
        (1.10251057, [[0.28808805, 0.11185755, -0.09602935], [0.11185755, -0.00657264, 0.40376765]]),
    ),
    (
        [[1e-6, 2e-6, 3e-6], [4e-6, 5e-5, 6e-4], [7e-3, 8e-2, 9e-1]], [1, 2, 0],
        (0.15754992, [[0.02590877, -0.05181759, 0.02590882], [0.02589641, 0.02589760, -0.05179400],
                      [-0.07307514, 0.02234372, 0.05073142]]),
        (0.42287254, [[0.07457182, -0.02485716, 0.07457201], [0.07457211, 0.07457669, -0.02483728],
                      [-0.02462499, 0.08277918, 0.18050370]]),
    ),
]  # fmt: skip


def run(kind, logits, labels, gamma, alpha, weight=None):
    """Return the losses and the gradients of their sum."""
    weight = logits.new_empty(0) if weight is None else weight
    input = logits.softmax(1) if kind == "softmax" else logits
    loss = logits.new_zeros(logits.shape if kind == "sigmoid" else logits.shape[:1])
    buff = [] if kind == "sigmoid" else [logits.new_zeros(len(logits))]
    grad = torch.zeros_like(logits)
    FUNCTIONS[f"{kind}_focal_loss_forward"](input, labels, weight, loss, gamma=gamma, alpha=alpha)
    FUNCTIONS[f"{kind}_focal_loss_backward"](input, labels, weight, *buff, grad, gamma=gamma, alpha=alpha)
    return loss, grad


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", PUBLISHED)
def test_the_published_numbers(case, kind, dtype):
    logits, labels, *expected = case
    mean, gradient = expected[kind == "sigmoid"]
    loss, grad = run(kind, torch.tensor(logits, dtype=dtype), torch.tensor(labels), 2.0, 0.25)
    assert loss.dtype == grad.dtype == dtype
    close = dict(rel=2e-5, abs=1e-6) if dtype.itemsize > 2 else dict(rel=2e-2, abs=1e-4)
    assert loss.sum().item() / len(labels) == pytest.approx(mean, **close)
    found = (grad / len(labels)).flatten().tolist()
    assert found == pytest.approx([value for row in gradient for value in row], **close)


def sigmoid_loss(logit, right, gamma, alpha):
    """With every logarithm taken of what does not round to 0."""
    p = 1 / (1 + math.exp(-logit))
    return -alpha * (1 - p) ** gamma * math.log(p) if right else -(1 - alpha) * p**gamma * math.log(1 - p)


@pytest.mark.parametrize("gamma, alpha", [(2.0, 0.25), (0.5, 0.6), (0.0, 0.5)])
def test_sigmoid_losses_of_every_label_and_weight(gamma, alpha):
    logits = torch.linspace(-3, 3, 15, dtype=torch.float64).view(5, 3)
    labels = torch.tensor([0, 2, 3, -1, 1])  # 3 and -1: background
    weight = torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64)
    for weights in (None, weight):
        loss, grad = run("sigmoid", logits, labels, gamma, alpha, weights)
        for row, label in enumerate(labels.tolist()):
            factor = 1.0 if weights is None or label in (3, -1) else weight[label].item()
            for c in range(3):
                given = label == c, gamma, alpha
                x = logits[row, c].item()
                assert loss[row, c].item() == pytest.approx(factor * sigmoid_loss(x, *given))
                slope = (sigmoid_loss(x + 1e-6, *given) - sigmoid_loss(x - 1e-6, *given)) / 2e-6
                assert grad[row, c].item() == pytest.approx(factor * slope, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("gamma", [2.0, 1.0])
def test_softmax_losses_of_every_label_and_weight(gamma):
    logits = torch.linspace(-2, 2, 12, dtype=torch.float64).cos().view(4, 3)
    labels = torch.tensor([0, -1, 2, 1])
    weight = torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64)

    def formula(logits):
        p = logits.softmax(1)[[0, 2, 3], [0, 2, 1]]
        return -0.25 * (1 - p) ** gamma * p.log() * weight[[0, 2, 1]]

    loss, grad = run("softmax", logits, labels, gamma, 0.25, weight)
    wanted = logits.clone().requires_grad_()
    formula(wanted).sum().backward()
    assert torch.allclose(loss[[0, 2, 3]], formula(logits))
    assert torch.allclose(grad, wanted.grad)
    assert loss[1] == 0 and not grad[1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_logits_beyond_every_exponent_give_finite_losses(dtype):
    logits = torch.tensor([[1e4, -1e4, 1e4]], dtype=dtype)
    loss, grad = run("sigmoid", logits, torch.tensor([1]), 2.0, 0.25)
    most = -math.log(torch.finfo(torch.float32).tiny)  # as far as mmcv's kernels go
    assert loss.tolist()[0] == pytest.approx([0.75 * most, 0.25 * most, 0.75 * most], rel=1e-3)
    assert torch.isfinite(grad).all()
    assert torch.isnan(run("sigmoid", logits * math.nan, torch.tensor([1]), 2.0, 0.25)[0]).all()


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("rows, classes", [(0, 3), (0, 0)])
def test_no_rows_are_no_loss(kind, rows, classes):
    loss, grad = run(kind, torch.zeros(rows, classes), torch.zeros(rows, dtype=torch.long), 2.0, 0.25)
    assert loss.numel() == grad.numel() == 0
