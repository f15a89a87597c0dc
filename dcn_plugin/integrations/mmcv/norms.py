"""The parts of mmcv's synchronised batch norm (`MMSyncBN`); mmcv itself sums up between processes.

Tensors are `[N, C, pixels]`; statistics and parameters, `[C]`, are float32 whatever the type of the input.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ...ops._check import shape, tensor
from ._wide import wide


def _column(value: Tensor, name: str, input: Tensor) -> Tensor:
    shape(value, name, (input.shape[1],))
    return value[:, None]


def sync_bn_forward_mean(input: Tensor, mean: Tensor) -> None:
    """Write the mean of each channel to `mean`."""
    tensor(input, "input", 3, "[N, C, pixels]")
    shape(mean, "mean", (input.shape[1],))
    mean.copy_(wide(input).mean((0, 2)))


def sync_bn_forward_var(input: Tensor, mean: Tensor, var: Tensor) -> None:
    """Write the mean square distance of each channel from `mean` to `var`."""
    tensor(input, "input", 3, "[N, C, pixels]")
    shape(var, "var", (input.shape[1],))
    var.copy_((wide(input) - _column(mean, "mean", input)).square().mean((0, 2)))


def sync_bn_forward_output(
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    norm: Tensor,
    std: Tensor,
    output: Tensor,
    eps: float,
    momentum: float | Tensor,
    group_size: int,
) -> None:
    """Write `norm = (input - mean) / std` with `std = sqrt(var + eps)`, and `output = norm * weight + bias`.

    The running statistics, where there are any, move by `momentum` towards the mean and the variance without its bias.

    Args:
        input: `[N, C, pixels]`.
        mean: `[C]`, over all processes.
        var: `[C]`, likewise.
        weight: `[C]`, or none, as `bias`.
        bias: `[C]`.
        running_mean: `[C]`, or none, as `running_var`.
        running_var: `[C]`.
        norm: as `input`, for the backward.
        std: `[C]`, likewise.
        output: as `input`.
        eps: added to the variance.
        momentum: how far running statistics move.
        group_size: processes, of as many images each.
    """
    tensor(input, "input", 3, "[N, C, pixels]")
    for name, value in (("norm", norm), ("output", output)):
        shape(value, name, tuple(input.shape))
    for name, value in (("var", var), ("std", std)):
        shape(value, name, (input.shape[1],))
    std.copy_((var + eps).sqrt())
    norm.copy_((wide(input) - _column(mean, "mean", input)) / std[:, None])
    if weight is None or bias is None:
        output.copy_(norm)
    else:
        output.copy_(norm * _column(weight, "weight", input) + _column(bias, "bias", input))
    if running_mean is None or running_var is None:
        return
    count = input.shape[0] * input.shape[2] * group_size
    unbiased = var * count / (count - 1) if count > 1 else var
    for running, found in ((running_mean, mean), (running_var, unbiased)):
        running.copy_(momentum * found + (1 - momentum) * running)


def sync_bn_backward_param(grad_output: Tensor, norm: Tensor, grad_weight: Tensor, grad_bias: Tensor) -> None:
    """Write the gradients of this process to `grad_weight` and `grad_bias`."""
    tensor(grad_output, "grad_output", 3, "[N, C, pixels]")
    shape(norm, "norm", tuple(grad_output.shape))
    grad_weight.copy_((wide(grad_output) * norm).sum((0, 2)))
    grad_bias.copy_(wide(grad_output).sum((0, 2)))


def sync_bn_backward_data(
    grad_output: Tensor,
    weight: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    norm: Tensor,
    std: Tensor,
    grad_input: Tensor,
) -> None:
    """Write the input's gradient to `grad_input`: `weight / std * (grad - (grad_weight * norm + grad_bias) / count)`.

    The gradients of the parameters are means over processes, and `count` are the pixels of this one.
    """
    tensor(grad_output, "grad_output", 3, "[N, C, pixels]")
    shape(grad_input, "grad_input", tuple(grad_output.shape))
    count = grad_output.shape[0] * grad_output.shape[2]
    of_weight = _column(grad_weight, "grad_weight", grad_output)
    of_bias = _column(grad_bias, "grad_bias", grad_output)
    scale = _column(weight, "weight", grad_output) / _column(std, "std", grad_output)
    grad_input.copy_(scale * (wide(grad_output) - (of_weight * norm + of_bias) / max(1, count)))


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "sync_bn_forward_mean": sync_bn_forward_mean,
    "sync_bn_forward_var": sync_bn_forward_var,
    "sync_bn_forward_output": sync_bn_forward_output,
    "sync_bn_backward_param": sync_bn_backward_param,
    "sync_bn_backward_data": sync_bn_backward_data,
}
