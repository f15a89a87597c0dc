"""What stands in for operators of mmcv's, called with tensors of other sizes than mmcv gives them."""

import torch

from dcn_plugin.integrations.mmcv import attention, losses, masks, nms, norms, regions, upsampling
from errors.case import Case

FUNCTIONS = {
    name: function
    for module in (attention, losses, masks, nms, norms, regions, upsampling)
    for name, function in module.FUNCTIONS.items()
}
LABELS = torch.tensor([0, 2])
PLACES = torch.tensor([0, 1])


def zeros(*shape):
    return torch.zeros(shape)


def with_zeros(**shapes):
    return {name: zeros(*shape) for name, shape in shapes.items()}


BOXES = with_zeros(boxes=(3, 4), scores=(3,))
ALIGNED = dict(
    **with_zeros(rois=(3, 5), argmax_y=(3, 2, 4, 6), argmax_x=(3, 2, 4, 6)),
    **dict(aligned_height=4, aligned_width=6, spatial_scale=1.0, sampling_ratio=2, pool_mode=0, aligned=True),
)
POOLED = with_zeros(rois=(3, 5)) | dict(
    argmax=torch.zeros(3, 2, 4, 6, dtype=torch.int32), pooled_height=4, pooled_width=6, spatial_scale=1.0
)
WINDOWS = dict(kernel_size=3, group_size=2, scale_factor=2)
FOCAL = dict(target=LABELS, weight=zeros(3), gamma=2.0, alpha=0.25)
PSA = dict(psa_type=0, num_=2, h_feature=3, w_feature=4, h_mask=5, w_mask=3, half_h_mask=2, half_w_mask=1)
CHOSEN = dict(mask_h_idx=PLACES, mask_w_idx=PLACES)
ATTENTION = dict(
    **with_zeros(value=(1, 20, 2, 3), sampling_locations=(1, 5, 2, 1, 3, 2), attention_weights=(1, 5, 2, 1, 3)),
    value_spatial_shapes=torch.tensor([[4, 5]]),
    value_level_start_index=torch.tensor([0]),
    im2col_step=64,
)

# Function -> what is good.
GOOD = {
    "nms": BOXES | dict(iou_threshold=0.5, offset=0),
    "softnms": BOXES | with_zeros(dets=(3, 5)) | dict(iou_threshold=0.5, sigma=0.5, min_score=0.1, method=1, offset=0),
    "nms_match": with_zeros(dets=(3, 5)) | dict(iou_threshold=0.5),
    "nms_rotated": with_zeros(dets=(3, 5), scores=(3,), dets_sorted=(3, 5), labels=(0,))
    | dict(order=torch.arange(3), iou_threshold=0.5, multi_label=False),
    "roi_align_forward": with_zeros(input=(1, 2, 7, 8), output=(3, 2, 4, 6)) | ALIGNED,
    "roi_align_backward": with_zeros(grad_input=(1, 2, 7, 8), grad_output=(3, 2, 4, 6)) | ALIGNED,
    "roi_pool_forward": with_zeros(input=(1, 2, 7, 8), output=(3, 2, 4, 6)) | POOLED,
    "roi_pool_backward": with_zeros(grad_input=(1, 2, 7, 8), grad_output=(3, 2, 4, 6)) | POOLED,
    "sigmoid_focal_loss_forward": with_zeros(input=(2, 3), output=(2, 3)) | FOCAL,
    "sigmoid_focal_loss_backward": with_zeros(input=(2, 3), grad_input=(2, 3)) | FOCAL,
    "softmax_focal_loss_forward": with_zeros(input=(2, 3), output=(2,)) | FOCAL,
    "softmax_focal_loss_backward": with_zeros(input=(2, 3), buff=(2,), grad_input=(2, 3)) | FOCAL,
    "carafe_naive_forward": with_zeros(features=(1, 4, 2, 3), masks=(1, 18, 4, 6), output=(1, 4, 4, 6)) | WINDOWS,
    "carafe_naive_backward": with_zeros(
        features=(1, 4, 2, 3),
        masks=(1, 18, 4, 6),
        top_grad=(1, 4, 4, 6),
        bottom_grad=(1, 4, 2, 3),
        mask_grad=(1, 18, 4, 6),
    )
    | WINDOWS,
    "psamask_forward": with_zeros(input=(2, 15, 3, 4), output=(2, 12, 3, 4)) | PSA,
    "psamask_backward": with_zeros(grad_input=(2, 15, 3, 4), grad_output=(2, 12, 3, 4)) | PSA,
    "masked_im2col_forward": with_zeros(im=(1, 2, 3, 4), col=(18, 2))
    | CHOSEN
    | dict(kernel_h=3, kernel_w=3, pad_h=1, pad_w=1),
    "masked_col2im_forward": with_zeros(im=(1, 2, 3, 4), col=(2, 2)) | CHOSEN | dict(height=3, width=4, channels=2),
    "sync_bn_forward_mean": with_zeros(input=(2, 3, 4), mean=(3,)),
    "sync_bn_forward_var": with_zeros(input=(2, 3, 4), mean=(3,), var=(3,)),
    "sync_bn_forward_output": with_zeros(
        input=(2, 3, 4), mean=(3,), var=(3,), weight=(3,), bias=(3,), norm=(2, 3, 4), std=(3,), output=(2, 3, 4)
    )
    | dict(running_mean=zeros(3), running_var=zeros(3), eps=1e-5, momentum=0.1, group_size=1),
    "sync_bn_backward_param": with_zeros(grad_output=(2, 3, 4), norm=(2, 3, 4), grad_weight=(3,), grad_bias=(3,)),
    "sync_bn_backward_data": with_zeros(
        grad_output=(2, 3, 4),
        weight=(3,),
        grad_weight=(3,),
        grad_bias=(3,),
        norm=(2, 3, 4),
        std=(3,),
        grad_input=(2, 3, 4),
    ),
    "ms_deform_attn_forward": ATTENTION,
}

# Arguments whose last size is free: others are told to agree with it.
FREE = {
    "roi_align_forward": {"input"},
    "roi_align_backward": {"grad_input"},
    "roi_pool_forward": {"input"},
    "roi_pool_backward": {"grad_input"},
    "sigmoid_focal_loss_forward": {"input"},
    "sigmoid_focal_loss_backward": {"input"},
    "softmax_focal_loss_forward": {"input"},
    "softmax_focal_loss_backward": {"input"},
    "carafe_naive_forward": {"features"},
    "carafe_naive_backward": {"features"},
    "masked_im2col_forward": {"im"},
    "sync_bn_forward_mean": {"input"},
    "sync_bn_forward_var": {"input"},
    "sync_bn_forward_output": {"input"},
    "sync_bn_backward_param": {"grad_output"},
    "sync_bn_backward_data": {"grad_output"},
    "ms_deform_attn_forward": {"value"},
}
# Arguments that are not looked at: what torch itself refuses, and what nothing is read from.
UNCHECKED = {
    "nms_rotated": {"dets", "scores", "labels"},
    "masked_im2col_forward": {"mask_h_idx"},
    "masked_col2im_forward": {"mask_h_idx"},
    "sync_bn_forward_output": {"running_mean", "running_var"},
    "sync_bn_backward_param": {"grad_weight", "grad_bias"},
    "sync_bn_backward_data": {"norm"},
}


def call(function, **given):
    return lambda: FUNCTIONS[function](**GOOD[function] | given)


def refused(function, name, bad):
    return Case(call(function, **{name: bad}), ValueError, f"{name}: ", "expected ", str(tuple(bad.shape)))


def wrong_sizes():
    """Every tensor with one more in its last dimension, and with a dimension more."""
    for function in filter(FUNCTIONS.__contains__, GOOD):  # an older torchvision lacks one
        for name, value in GOOD[function].items():
            if isinstance(value, torch.Tensor) and name not in UNCHECKED.get(function, ()):
                if name not in FREE.get(function, ()):
                    yield refused(function, name, value.new_zeros(*value.shape[:-1], value.shape[-1] + 1))
                yield refused(function, name, value[None])


def region(function, *row, **options):
    rois = torch.tensor([[0.0, 0, 0, 1, 1], row, row])
    return Case(
        call(function, rois=rois, **options), ValueError, "rois", "of images 0 to 0", f"{rois[1].tolist()} in row 1"
    )


CASES = [
    *wrong_sizes(),
    region("roi_align_forward", 1, 0, 0, 1, 1),
    region("roi_align_forward", -1, 0, 0, 1, 1, pool_mode=1),
    region("roi_align_forward", 0, 0, 0, float("nan"), 1, pool_mode=1),
    region("roi_align_forward", 0, 3, 0, 1, 1),
    region("roi_pool_forward", 0, 0, 0, float("inf"), 1),
    *(
        region(function, *row, **options)
        for row in ((1, 0, 0, 1, 1), (0, 0, 0, float("nan"), 1))
        for function, options in (
            ("roi_align_backward", dict(pool_mode=1)),
            ("roi_align_backward", {}),
            ("roi_pool_backward", {}),
        )
    ),
    Case(call("carafe_naive_forward", group_size=0), ValueError, "group_size", "expected at least 1", "got 0"),
    Case(
        call("carafe_naive_forward", group_size=3, masks=zeros(1, 27, 4, 6)),
        *(ValueError, "group_size", "expected a divisor of 4 channels", "got 3"),
    ),
    *(
        Case(
            call("ms_deform_attn_forward", **{name: torch.tensor(bad)}),
            *(ValueError, "value_spatial_shapes", expected, got),
        )
        for name, bad, expected, got in (
            ("value_spatial_shapes", [[4, 6]], "expected levels of 20 pixels together", "got 24: [[4, 6]]"),
            ("value_spatial_shapes", [[3, 5]], "expected levels of 20 pixels together", "got 15: [[3, 5]]"),
            ("value_level_start_index", [1], "levels one after the other", "got 4 x 5 from pixel 1 on, behind 0"),
            ("value_level_start_index", [-1], "levels one after the other", "got 4 x 5 from pixel -1 on, behind 0"),
            ("value_spatial_shapes", [[-4, -5]], "levels one after the other", "got -4 x -5 from pixel 0 on"),
        )
    ),
    refused("masked_im2col_forward", "im", zeros(2, 2, 3, 4)),
    *(
        Case(
            call(function, target=torch.tensor([0, label])),
            *(ValueError, "target", f"expected labels up to {label - 1} beside 3 classes", f"got {label}"),
        )
        for function, label in (("sigmoid_focal_loss_forward", 4), ("softmax_focal_loss_backward", 3))
    ),
]
