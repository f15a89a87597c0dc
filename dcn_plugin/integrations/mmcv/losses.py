"""mmcv's focal losses and their gradients, in plain PyTorch.

Half precision is computed in float32, where the smallest number inside of a logarithm, `TINY`, is more than 0.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...ops._check import shape, tensor
from ._wide import wide

# The smallest normal number of a C++ float, which mmcv's kernels take for every type.
TINY = torch.finfo(torch.float32).tiny


def _check(input: Tensor, target: Tensor, weight: Tensor, most: int, outputs: dict[str, tuple[Tensor, int]]) -> None:
    """Check sizes (of an output, how many of those of `input`), and that no label is above `most`."""
    tensor(input, "input", 2, "[N, C]")
    shape(target, "target", (len(input),))
    for output, (value, dim) in outputs.items():
        shape(value, output, tuple(input.shape[:dim]))
    if weight.numel():
        shape(weight, "weight", (input.shape[1],))
    if target.numel() and int(target.max()) > most:
        raise ValueError(
            f"target: expected labels up to {most} beside {input.shape[1]} classes, got {int(target.max())}"
        )


def _weights(target: Tensor, weight: Tensor, classes: int) -> Tensor | float:
    """Return the weight of each row's label, `[N]`; it is 1 without a class, where mmcv reads beyond the weights."""
    if not weight.numel():
        return 1.0
    return torch.where(_labelled(target, classes), wide(weight)[target.clamp(0, classes - 1)], 1)


def _labelled(target: Tensor, classes: int) -> Tensor:
    return (target >= 0) & (target < classes)


def _sigmoid(
    input: Tensor,
    target: Tensor,
    weight: Tensor,
    output: Tensor,
    right: Callable[[Tensor], Tensor],
    wrong: Callable[[Tensor], Tensor],
) -> None:
    """Write `wrong(p)` of every probability to `output`, `right(p)` where the class is the label, both weighted."""
    probability = wide(input).sigmoid()
    found = wrong(probability)
    rows = _labelled(target, input.shape[1]).nonzero()[:, 0]
    labels = target[rows]
    found[rows, labels] = right(probability[rows, labels])
    factor = _weights(target, weight, input.shape[1])
    output.copy_(found * factor[:, None] if isinstance(factor, Tensor) else found)


def _log(value: Tensor) -> Tensor:
    return value.clamp(min=TINY).log()


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Write the loss of each class to `output`.

    With `p = sigmoid(input)` it is `-alpha * (1-p)**gamma * log(p)` for the label, `-(1-alpha) * p**gamma * log(1-p)`
    for the others.

    Args:
        input: `[N, C]`, logits.
        target: `[N]`, labels; any that is no class, as C, is background.
        weight: `[C]`, of each label, or empty.
        output: `[N, C]`.
        gamma: how much what is right already counts less.
        alpha: share of the label.

    Raises:
        ValueError: sizes do not agree, or a label is more than C.
    """
    _check(input, target, weight, input.shape[1], {"output": (output, 2)})
    _sigmoid(
        *(input, target, weight, output),
        right=lambda p: -alpha * (1 - p) ** gamma * _log(p),
        wrong=lambda p: (alpha - 1) * p**gamma * _log(1 - p),
    )


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Write the derivative of each loss by its logit to `grad_input` `[N, C]`; arguments as for the forward."""
    _check(input, target, weight, input.shape[1], {"grad_input": (grad_input, 2)})
    _sigmoid(
        *(input, target, weight, grad_input),
        right=lambda p: -alpha * (1 - p) ** gamma * (1 - p - gamma * p * _log(p)),
        wrong=lambda p: (alpha - 1) * p**gamma * (gamma * (1 - p) * _log(1 - p) - p),
    )


def _probability(input: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor | float]:
    """Return of each row whether it has a class, the label's probability (1, of loss 0, without one), its weight."""
    has = target >= 0
    if not input.numel():
        return has, wide(input).new_ones(len(input)), 1.0
    found = wide(input).gather(1, target.clamp(min=0)[:, None])[:, 0]
    return has, torch.where(has, found, 1), _weights(target, weight, input.shape[1])


def softmax_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Write the loss of each row to `output`: `-alpha * (1-p)**gamma * log(p)`, with the probability p of the label.

    Args:
        input: `[N, C]`, probabilities: what softmax has made of the logits.
        target: `[N]`, labels; a negative one has no loss.
        weight: `[C]`, of each label, or empty.
        output: `[N]`.
        gamma: how much what is right already counts less.
        alpha: factor of the loss.

    Raises:
        ValueError: sizes do not agree, or a label is C or more.
    """
    _check(input, target, weight, input.shape[1] - 1, {"output": (output, 1)})
    has, p, factor = _probability(input, target, weight)
    output.copy_(torch.where(has, -alpha * (1 - p) ** gamma * _log(p), 0) * factor)


def softmax_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, buff: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Write the derivatives of each loss by the logits to `grad_input` `[N, C]`; arguments as for the forward.

    `buff` `[N]` gets the derivative by the logarithm of the label's probability.
    """
    _check(input, target, weight, input.shape[1] - 1, {"buff": (buff, 1), "grad_input": (grad_input, 2)})
    has, p, factor = _probability(input, target, weight)
    slope = alpha * (gamma * (1 - p) ** (gamma - 1) * p * _log(p) - (1 - p) ** gamma)
    slope = torch.where(has, slope, 0) * factor
    buff.copy_(slope)
    found = -slope[:, None] * wide(input)
    rows = has.nonzero()[:, 0]
    found[rows, target[rows]] += slope[rows]
    grad_input.copy_(found)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "sigmoid_focal_loss_forward": sigmoid_focal_loss_forward,
    "sigmoid_focal_loss_backward": sigmoid_focal_loss_backward,
    "softmax_focal_loss_forward": softmax_focal_loss_forward,
    "softmax_focal_loss_backward": softmax_focal_loss_backward,
}
