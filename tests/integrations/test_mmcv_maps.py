"""CARAFE, PSA masks, masked convolution and batch norm under mmcv's names, against plain loops.

Gradients are checked by finite differences through mmcv's own functions, in `test_mmcv_ops.py`.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dcn_plugin.integrations.mmcv import masks, norms, upsampling


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("window, groups, scale", [(3, 2, 2), (5, 1, 3), (1, 4, 1)])
def test_carafe_is_a_sum_over_a_window(window, groups, scale):
    features, weights = drawn(2, 4, 3, 4), drawn(2, groups * window * window, 3 * scale, 4 * scale)
    output = torch.zeros(2, 4, 3 * scale, 4 * scale, dtype=torch.float64)
    expected = torch.zeros_like(output)
    for n, c, y, x in np.ndindex(*output.shape):
        for u, v in np.ndindex(window, window):
            row, column = y // scale + u - window // 2, x // scale + v - window // 2
            if 0 <= row < 3 and 0 <= column < 4:
                place = (c // (4 // groups) * window + u) * window + v
                expected[n, c, y, x] += features[n, c, row, column] * weights[n, place, y, x]
    upsampling.carafe_naive_forward(features, weights, output, window, groups, scale)
    assert torch.allclose(output, expected)
    made = [torch.zeros_like(each) for each in (features, output, weights, output)]
    upsampling.carafe_forward(features, weights, *made, window, groups, scale)
    assert torch.equal(made[3], output)


def test_carafe_of_many_channels_and_of_half_precision():
    features, weights = drawn(1, 40, 4, 4), drawn(1, 25, 8, 8).softmax(1)
    grad = drawn(1, 40, 8, 8, seed=1)
    found = {}
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        given = [each.to(dtype) for each in (features, weights, grad)]
        made = [torch.zeros_like(each) for each in (given[2], *given[:2])]
        upsampling.carafe_naive_forward(*given[:2], made[0], 5, 1, 2)
        upsampling.carafe_naive_backward(given[2], *given[:2], *made[1:], 5, 1, 2)
        found[dtype] = made
    # Linear in each: what the gradients say of an input is what the gradient of the output says of the output.
    output, *gradients = found[torch.float64]
    for gradient, value in zip(gradients, (features, weights), strict=True):
        assert (gradient * value).sum() == pytest.approx((grad * output).sum().item())
    for dtype, error in ((torch.float16, 2e-3), (torch.bfloat16, 2e-2)):
        for half, exact in zip(found[dtype], found[torch.float64], strict=True):
            assert half.dtype == dtype
            assert (half.double() - exact).abs().max() < error * exact.abs().max()


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("window", [(3, 5), (4, 2), (9, 9)])
def test_psa_masks_are_spread_over_the_map(kind, window):
    height, width = 4, 3
    half = [(side - 1) // 2 for side in window]
    input = drawn(2, window[0] * window[1], height, width)
    expected = torch.zeros(2, height * width, height * width, dtype=torch.float64)
    for n, u, v, y, x in np.ndindex(2, *window, height, width):
        row, column = y + u - half[0], x + v - half[1]
        if 0 <= row < height and 0 <= column < width:
            pair = (row * width + column, y * width + x)
            expected[(n, *(pair if kind == 0 else pair[::-1]))] = input[n, u * window[1] + v, y, x]
    output = torch.full((2, height * width, height, width), 7, dtype=torch.float64)
    sizes = (kind, 2, height, width, *window, *half)
    masks.psamask_forward(input, output, *sizes)
    assert torch.equal(output.flatten(2), expected)
    # Its backward is its transpose: every number comes back from where it went, and 0 from where it was cut off.
    back = torch.full_like(input, 7)
    masks.psamask_backward(output, back, *sizes)
    assert torch.equal(back, torch.where(back == 0, 0, input))
    assert (back != 0).sum() == (expected != 0).sum()


@pytest.mark.parametrize("padding", [(1, 2), (0, 0)])
def test_masked_convolution_is_a_convolution_at_the_pixels_chosen(padding):
    image, weight = drawn(1, 3, 6, 7), drawn(4, 3, 3, 5)
    whole = F.conv2d(image, weight, padding=padding)
    chosen = (drawn(*whole.shape[2:], seed=2) > 0).nonzero()
    rows, columns = chosen[:, 0].contiguous(), chosen[:, 1].contiguous()
    windows = torch.full((3 * 3 * 5, len(chosen)), 7, dtype=torch.float64)
    masks.masked_im2col_forward(image, rows, columns, windows, 3, 5, *padding)
    found = torch.zeros_like(whole)
    masks.masked_col2im_forward(weight.flatten(1) @ windows, rows, columns, found, *whole.shape[2:], 4)
    expected = torch.zeros_like(whole)
    expected[:, :, rows, columns] = whole[:, :, rows, columns]
    assert torch.allclose(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_batch_norm_is_torchs(dtype):
    input, grad = (drawn(4, 3, 10, seed=seed).to(dtype) for seed in (0, 1))
    weight, bias = drawn(3, seed=2).float(), drawn(3, seed=3).float()
    own = [torch.zeros(3), torch.ones(3)]
    torchs = [each.clone() for each in own]
    mean, var, std = torch.zeros(3), torch.zeros(3), torch.zeros(3)
    norm, output, grad_input = torch.zeros(4, 3, 10), torch.zeros_like(input), torch.zeros_like(input)
    norms.sync_bn_forward_mean(input, mean)
    norms.sync_bn_forward_var(input, mean, var)
    norms.sync_bn_forward_output(
        input, mean, var, weight, bias, *own, norm, std, output, eps=1e-5, momentum=torch.tensor([0.1]), group_size=1
    )
    grads = torch.zeros(3), torch.zeros(3)
    norms.sync_bn_backward_param(grad, norm, *grads)
    norms.sync_bn_backward_data(grad, weight, *grads, norm, std, grad_input)

    wanted = [each.float().requires_grad_() for each in (input, weight, bias)]
    expected = F.batch_norm(wanted[0], *torchs, wanted[1], wanted[2], True, 0.1, 1e-5)
    expected.backward(grad.float())
    close = dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=2e-3, atol=2e-3)
    found = (output, grad_input, *grads, *own)
    for one, other in zip(found, (expected, *(each.grad for each in wanted), *torchs), strict=True):
        assert torch.allclose(one.float(), other, **close)


def test_batch_norm_without_parameters_and_running_statistics():
    input, mean, var, std = drawn(4, 3, 10).float(), torch.zeros(3), torch.ones(3), torch.zeros(3)
    norm, output = torch.zeros_like(input), torch.zeros_like(input)
    norms.sync_bn_forward_output(input, mean, var, None, None, None, None, norm, std, output, 3.0, 0.1, 1)
    assert torch.equal(std, torch.full((3,), 2.0))
    assert torch.equal(output, input / 2) and torch.equal(norm, output)


def test_nothing_is_allowed():
    none = torch.zeros(0, 4, 3, 3)
    upsampling.carafe_naive_forward(none, torch.zeros(0, 9, 6, 6), torch.zeros(0, 4, 6, 6), 3, 1, 2)
    made = torch.zeros_like(none), torch.zeros(0, 9, 6, 6)
    upsampling.carafe_naive_backward(torch.zeros(0, 4, 6, 6), none, made[1], *made, 3, 1, 2)
    masks.psamask_forward(torch.zeros(0, 4, 3, 3), torch.zeros(0, 9, 3, 3), 0, 0, 3, 3, 2, 2, 0, 0)
    masks.psamask_backward(torch.zeros(0, 9, 3, 3), torch.zeros(0, 4, 3, 3), 0, 0, 3, 3, 2, 2, 0, 0)
