"""Every layer with any legal arguments: what it computes from its own offsets, its gradients, and its copies."""

import copy
import math
from unittest import mock

import pytest
import torch
from cases import assert_close
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from dcn_plugin import layers, ops, reference
from fuzz.strategies import fuzz, normal, sizes

ATTENTION = (layers.MSDeformAttn, layers.MMCVMultiScaleDeformableAttention)
AGGREGATION = (layers.DCNv3, layers.DCNv4)


def arguments_of_conv(draw, cls, generator):
    """Arguments of the layer, the input, the shape of the result."""
    groups, offset_groups = draw(sizes), draw(sizes)
    channels, outputs = math.lcm(groups, offset_groups) * draw(st.sampled_from([1, 2, 5])), groups * draw(sizes)
    kernel, dilation, stride = ([draw(sizes), draw(sizes)] for _ in range(3))
    if cls is layers.ActiveConv2d and kernel == [1, 1]:
        kernel = [1, 2]  # one tap alone would have nowhere to go
    total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    four = draw(st.lists(st.integers(0, 3), min_size=4, max_size=4))
    padding, sides = draw(
        st.sampled_from([
            (four, four), (four[:2], four[:2] * 2), (four[0], four[:1] * 4), ("valid", [0] * 4),
            ("same", [total[0] // 2, total[1] // 2, (total[0] + 1) // 2, (total[1] + 1) // 2]),
        ])
    )  # fmt: skip
    stride = [1, 1] if padding == "same" else stride
    pads = [sides[i] + sides[2 + i] for i in (0, 1)]
    size = [max(1, total[i] + 1 - pads[i]) + draw(st.integers(0, 5)) for i in (0, 1)]
    shape = [(size[i] + pads[i] - total[i] - 1) // stride[i] + 1 for i in (0, 1)]
    arguments = {
        "in_channels": channels, "out_channels": outputs, "kernel_size": kernel, "stride": stride, "padding": padding,
        "dilation": dilation, "groups": groups, "bias": draw(st.booleans()), "offset_groups": offset_groups,
    }  # fmt: skip
    if cls is layers.DCNv2Pack:
        pass  # whose masks are given
    elif cls is layers.Dilated:
        arguments["factor"] = [draw(sizes), draw(sizes)]
    elif cls is layers.ActiveConv2d:
        arguments["normalise"] = False  # whose gradients are those of the operator
    elif cls is not layers.DeformConv2d:
        arguments["offset_bound"] = draw(st.sampled_from([None, 0.5, 4]))
        arguments["offset_form"] = draw(st.sampled_from([None, "affine", "similarity"]))
    if cls is layers.DCNv2:
        arguments["mask_activation"] = draw(st.sampled_from(["2*sigmoid", "sigmoid"]))
    n = draw(st.integers(0, 2))
    inputs = {"input": normal(generator, (n, channels, *size))}
    if cls is layers.DCNv2Pack:
        inputs["feat"] = normal(generator, (n, channels, *size))
    if cls is layers.DeformConv2d:
        taps = offset_groups * kernel[0] * kernel[1]
        inputs["offset"] = normal(generator, (n, 2 * taps, *shape))
        if draw(st.booleans()):
            inputs["mask"] = normal(generator, (n, taps, *shape))
    return arguments, inputs, (n, outputs, *shape)


def arguments_of_flows(draw, cls, generator):
    """Convolutions along two flows keep the size of the map."""
    arguments, _, _ = arguments_of_conv(draw, layers.DCNv2Pack, generator)
    for name in ("in_channels", "offset_groups"):
        arguments[name] *= 2
    arguments |= dict(stride=1, padding="same", max_residue_magnitude=draw(st.sampled_from([0.5, 10])))
    n, size, outputs = (
        draw(st.integers(0, 2)),
        [draw(st.integers(1, 9)), draw(st.integers(1, 9))],
        arguments["out_channels"],
    )
    channels = dict(input=arguments["in_channels"], extra_feat=3 * outputs, flow_1=2, flow_2=2)
    inputs = {name: normal(generator, (n, count, *size)) for name, count in channels.items()}
    return arguments, inputs, (n, outputs, *size)


def arguments_of_pool(draw, cls, generator):
    # Where corners are rounded all is a power of two: a sample lies on a border, or it does not, in every arithmetic.
    two = st.sampled_from([1, 2])
    bins, n, count = [draw(two), draw(two)], draw(sizes), draw(st.integers(0, 4))
    arguments = {"output_size": bins, "spatial_scale": draw(st.sampled_from([0.25, 1.0]))}
    whole = issubclass(cls, layers.PSRoIPool)
    classes, outputs, group = draw(two), 2 * draw(two), draw(two)
    parts = bins
    if whole:
        arguments |= {"output_dim": outputs, "group_size": group}
    if issubclass(cls, layers.DeformPSRoIPool):
        parts = draw(st.sampled_from([bins, [1, 2]]))
        arguments |= {
            "part_size": parts,
            "samples_per_part": draw(two),
            "offset_scale": draw(st.sampled_from([0.1, 1])),
        }
    if cls is layers.DeformPSRoIPoolPack:
        arguments |= {
            "offset_classes": classes, "modulated": draw(st.booleans()),
            "mask_activation": draw(st.sampled_from(["2*sigmoid", "sigmoid"])),
        }  # fmt: skip
    if issubclass(cls, layers.DeformRoIPool):
        arguments |= {"sampling_ratio": draw(st.integers(-1, 2)), "gamma": draw(st.sampled_from([0.1, 1]))}
    if issubclass(cls, layers.DeformRoIPoolPack):
        arguments["output_channels"] = outputs
    if cls.__name__.endswith("Pack"):
        arguments["deform_fc_channels"] = draw(sizes)
    size = [draw(st.integers(1, 9)), draw(st.integers(1, 9))]
    corners = 12 * torch.rand(count, 2, 2, generator=generator, dtype=torch.float64).sort(1).values - 2
    number = torch.randint(n, (count, 1), generator=generator)
    inputs = {
        "input": normal(generator, (n, outputs * (group**2 if whole else 1), *size)),
        "rois": torch.cat([number, (corners.round() if whole else corners).flatten(1)], 1),
    }  # fmt: skip
    if cls is layers.DeformRoIPool:
        inputs["offset"] = normal(generator, (count, 2, *bins))
    if cls is layers.DeformPSRoIPool:
        inputs["offset"] = normal(generator, (count, 2 * classes, *parts))
        inputs["mask"] = normal(generator, (count, classes, *parts))
    return arguments, inputs, (count, outputs, *bins)


def arguments_of_attention(draw, cls, generator):
    heads, levels, n, queries = draw(sizes), draw(sizes), draw(st.integers(0, 2)), draw(st.integers(0, 3))
    channels, boxes, mmcv = (
        heads * draw(st.sampled_from([1, 2, 5])),
        draw(st.booleans()),
        cls is not layers.MSDeformAttn,
    )
    shapes = draw(st.lists(st.tuples(sizes, st.integers(1, 5)), min_size=levels, max_size=levels))
    pixels = sum(height * width for height, width in shapes)
    points = draw(sizes) if mmcv or draw(st.booleans()) else [draw(sizes) for _ in shapes]
    query, x = normal(generator, (n, queries, channels)), normal(generator, (n, pixels, channels))
    places = (n, queries, draw(st.sampled_from([1, levels])), 4 if boxes else 2)
    at = torch.rand(places, generator=generator, dtype=torch.float64)
    mask = torch.rand(n, pixels, generator=generator) < 0.3 if draw(st.booleans()) else None
    shapes = shapes if draw(st.booleans()) else torch.tensor(shapes)
    if not mmcv:
        arguments = dict(d_model=channels, n_levels=levels, n_heads=heads, n_points=points)
        names = ("query", "reference_points", "input_flatten", "input_spatial_shapes", "input_padding_mask")
        return arguments, dict(zip(names, (query, at, x, shapes, mask), strict=True)), (n, queries, channels)
    first = draw(st.booleans())
    arguments = dict(
        embed_dims=channels, num_heads=heads, num_levels=levels, num_points=points, dropout=0.0, batch_first=first,
        value_proj_ratio=draw(st.sampled_from([1.0, 2.0])),
    )  # fmt: skip
    query, x = (t if first else t.transpose(0, 1).contiguous() for t in (query, x))
    inputs = dict(query=query, value=x, reference_points=at, spatial_shapes=shapes, key_padding_mask=mask)
    for name in ("identity", "query_pos"):
        if draw(st.booleans()):
            inputs[name] = normal(generator, tuple(query.shape))
    return arguments, inputs, tuple(query.shape)


def arguments_of_aggregation(draw, cls, generator):
    group, kernel, dilation, stride, n = draw(sizes), draw(sizes), draw(sizes), draw(sizes), draw(st.integers(0, 2))
    depth = draw(st.sampled_from([1, 2, 5]))
    # A norm over one or two channels leaves nothing but rounding of the gradients before it.
    channels = group * (depth if group * depth > 2 else 5)
    pad = draw(st.integers(0, dilation * (kernel - 1) // 2))
    size = [max(1, dilation * (kernel - 1) + 1 - 2 * pad) + draw(st.integers(0, 5)) for _ in range(2)]
    shape = [(length + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1 for length in size]
    first = draw(st.booleans())
    arguments = {
        "channels": channels, "kernel_size": kernel, "stride": stride, "pad": pad, "dilation": dilation, "group": group,
        "offset_scale": draw(st.sampled_from([0.5, 1, 2.0])), "dw_kernel_size": draw(st.sampled_from([1, 3])),
        "center_feature_scale": draw(st.booleans()), "channels_first": first,
        "remove_center": kernel % 2 == 1 and kernel > 1 and draw(st.booleans()),
    }  # fmt: skip
    x = normal(generator, (n, channels, *size))
    rows = cls is layers.DCNv4 and not first
    if cls is layers.DCNv3:
        arguments["act_layer"] = draw(st.sampled_from(["GELU", "ReLU", "SiLU"]))
    else:
        arguments |= {"without_pointwise": draw(st.booleans()), "output_bias": draw(st.booleans())}
        if draw(st.booleans()):
            arguments["dw_kernel_size"] = None
    if first:
        return arguments, {"input": x}, (n, channels, *shape)
    if not rows:
        return arguments, {"input": x.permute(0, 2, 3, 1).contiguous()}, (n, *shape, channels)
    x = x.flatten(2).transpose(1, 2).contiguous()
    return arguments, {"input": x, "shape": tuple(size)}, (n, shape[0] * shape[1], channels)


def of_aggregation(package, layer, inputs):
    """The operator on projected pixels, with what the layer predicts where each kernel is centred."""
    x, third = inputs["input"], isinstance(layer, layers.DCNv3)
    if layer.channels_first:
        x = x.permute(0, 2, 3, 1)
    elif not third:
        x = x.reshape(x.shape[0], *inputs["shape"], x.shape[2])
    first, step = layer.dilation * (layer.kernel_size - 1) // 2 - layer.pad, layer.stride
    sizes = ((s + 2 * layer.pad - layer.dilation * (layer.kernel_size - 1) - 1) // step + 1 for s in x.shape[1:3])
    height, width = sizes
    rows, columns = first + step * torch.arange(height), first + step * torch.arange(width)
    convolve = layer.dw_conv if third else layer.offset_mask_dw
    feature = x if convolve is None else convolve(x.permute(0, 3, 1, 2))
    feature = feature if third or convolve is None else feature.permute(0, 2, 3, 1)
    feature = feature[:, rows][:, :, columns]
    project = layer.input_proj if third else layer.value_proj
    value = x if project is None else project(x)
    group, taps = layer.group, layer.kernel_size**2 - layer.remove_center
    if third:
        offset = layer.offset(feature).reshape(*feature.shape[:3], group, taps, 2)
        weight = layer.mask(feature).reshape(*feature.shape[:3], group, taps)
    else:
        packed = layer.offset_mask(feature)[..., : 3 * group * taps].reshape(*feature.shape[:3], group, 3 * taps)
        offset, weight = packed, None
    out = package.deform_aggregate2d(
        value, offset, weight, layer.kernel_size, layer.stride, layer.pad, layer.dilation,
        offset_scale=layer.offset_scale, remove_center=layer.remove_center, softmax=third, official_order=True,
    )  # fmt: skip
    if layer.center_feature_scale:
        gates = layer.center_feature_scale_proj_weight, layer.center_feature_scale_proj_bias
        share = F.linear(feature if third else out, *gates).sigmoid()[..., None]
        grouped = (t.unflatten(-1, (group, layer.group_channels)) for t in (out, value[:, rows][:, :, columns]))
        out, centre = grouped
        out = (out * (1 - share) + centre * share).flatten(-2)
    out = out if layer.output_proj is None else layer.output_proj(out)
    if layer.channels_first:
        return out.permute(0, 3, 1, 2)
    return out if third else out.flatten(1, 2)


def of_attention(package, layer, inputs):
    """Projections, and the operator on what they give: `[N, Q, C]`, or as mmcv's layer has it."""
    mmcv = isinstance(layer, layers.MMCVMultiScaleDeformableAttention)
    given = [v for k, v in inputs.items() if k not in ("query", "identity", "query_pos")]
    x, at, shapes, mask = given if mmcv else (given[1], given[0], *given[2:])
    query = inputs["query"] + inputs["query_pos"] if "query_pos" in inputs else inputs["query"]
    query, x = (t if not mmcv or layer.batch_first else t.transpose(0, 1) for t in (query, x))
    heads = layer.num_heads if mmcv else layer.n_heads
    levels, points = (layer.num_levels, layer.num_points) if mmcv else (layer.n_levels, layer.n_points)
    points = [points] * levels if isinstance(points, int) else list(points)
    value = layer.value_proj(x)
    value = value if mask is None else value * ~mask[..., None]
    shapes = shapes.tolist() if isinstance(shapes, torch.Tensor) else shapes
    found = layer.output_proj(
        package.ms_deform_attn(
            value.reshape(*value.shape[:2], heads, value.shape[2] // heads), shapes,
            layer.sampling_offsets(query).reshape(*query.shape[:2], heads, sum(points), 2),
            layer.attention_weights(query).reshape(*query.shape[:2], heads, sum(points)),
            points=points, softmax=True, reference_points=at,
        )
    )  # fmt: skip
    if not mmcv:
        return found
    return (found if layer.batch_first else found.transpose(0, 1)) + inputs.get("identity", inputs["query"])


def arguments_of_grid(draw, cls, generator):
    heads, groups = draw(sizes), draw(sizes)
    plus, n, size = draw(st.booleans()), draw(st.integers(0, 2)), [draw(sizes), draw(st.integers(1, 9))]
    channels = groups * heads * draw(st.sampled_from([3, 5]))  # of fewer the norm leaves nothing but their signs
    arguments = {
        "dim": channels, "n_heads": groups * heads, "n_groups": groups, "q_size": [draw(sizes), draw(sizes)],
        "ksize": 2 * draw(sizes) - 1, "stride": draw(sizes), "plus": plus,
        "offset_range_factor": draw(st.sampled_from([0.5, 2.0, -1.0] if plus else [0.5, 2.0])),
    }  # fmt: skip
    if plus and arguments["ksize"] == arguments["stride"]:
        size = [side + arguments["ksize"] - 1 for side in size]
    return arguments, {"input": normal(generator, (n, channels, *size))}, (n, channels, *size)


def of_grid(package, layer, inputs):
    """What the layer makes of its positions (test_dat_layer.py writes them again) with the sampler in `package`."""
    with mock.patch("dcn_plugin.layers.dat.ms_deform_attn", package.ms_deform_attn):
        return layer(**inputs)


def arguments_of_transformer(draw, cls, generator):
    n, channels, per_pixel = draw(st.integers(0, 2)), draw(sizes), draw(st.booleans())
    size = [draw(st.integers(4, 9)), draw(st.integers(4, 9))]
    arguments = {
        "channels": channels, "align_corners": draw(st.booleans()), "per_pixel": per_pixel,
        "padding_mode": draw(st.sampled_from(["zeros", "border", "reflection"])),
    }  # fmt: skip
    shape = size
    if not per_pixel and draw(st.booleans()):
        shape = arguments["output_size"] = [draw(st.integers(1, 12)), draw(st.integers(1, 12))]
    return arguments, {"input": normal(generator, (n, channels, *size))}, (n, channels, *shape)


def arguments_of_sequence(draw, cls, generator):
    groups, offset_groups, kernel, n = draw(sizes), draw(sizes), draw(sizes), draw(st.integers(0, 2))
    channels, outputs = math.lcm(groups, offset_groups) * draw(sizes), groups * draw(sizes)
    stride, padding, dilation = draw(sizes), draw(st.integers(0, 3)), draw(sizes)
    reach = dilation * (kernel - 1) + 1
    length = max(1, reach - 2 * padding) + draw(st.integers(0, 5))
    results = (length + 2 * padding - reach) // stride + 1
    arguments = dict(
        in_channels=channels, out_channels=outputs, kernel_size=kernel, stride=stride, padding=padding,
        dilation=dilation, groups=groups, bias=draw(st.booleans()), offset_groups=offset_groups,
    )  # fmt: skip
    inputs = {"input": normal(generator, (n, channels, length))}
    for name in ("offset", "mask")[: 1 + draw(st.booleans())]:
        inputs[name] = normal(generator, (n, offset_groups * kernel, results))
    return arguments, inputs, (n, outputs, results)


def arguments_of_max_pool(draw, cls, generator):
    groups, n = draw(sizes), draw(st.integers(0, 2))
    kernel, dilation, stride = ([draw(sizes), draw(sizes)] for _ in range(3))
    spans = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    padding = [draw(st.integers(0, span // 2)) for span in spans]
    size = [draw(st.integers(span, span + 5)) for span in spans]
    shape = [
        (side + 2 * pad - span) // step + 1 for side, pad, span, step in zip(size, padding, spans, stride, strict=True)
    ]
    channels = groups * draw(sizes)
    arguments = dict(
        channels=channels, kernel_size=kernel, stride=stride, padding=padding, dilation=dilation, offset_groups=groups
    )
    inputs = {"input": normal(generator, (n, channels, *size))}
    if cls is layers.DeformMaxPool2d:
        inputs["offset"] = normal(generator, (n, 2 * groups * math.prod(kernel), *shape))
    return arguments, inputs, (n, channels, *shape)


def of_max_pool(package, layer, inputs):
    """The sampler is that of attention; what is made of samples, test_max_pool.py writes again."""
    with mock.patch("dcn_plugin.layers.max_pool.ms_deform_attn", package.ms_deform_attn):
        return layer(**inputs)


def of_sequence(package, layer, inputs):
    """The operator on a map of one row; that this is a convolution of sequences, test_conv1d.py says."""
    with mock.patch("dcn_plugin.layers.conv1d.deform_conv2d", package.deform_conv2d):
        return layer(**inputs)


def of_transformer(package, layer, inputs):
    """Positions are compared with torch's in test_spatial_transformer.py."""
    with mock.patch("dcn_plugin.layers.spatial_transformer.deform_conv2d", package.deform_conv2d):
        return layer(**inputs)


def of_operator(package, layer, inputs):
    """The layer's result, from the operator in `package` and what the layer predicts and holds."""
    if isinstance(layer, ATTENTION):
        return of_attention(package, layer, inputs)
    if isinstance(layer, AGGREGATION):
        return of_aggregation(package, layer, inputs)
    if isinstance(layer, layers.DAttention):
        return of_grid(package, layer, inputs)
    if isinstance(layer, layers.DeformConv1d):
        return of_sequence(package, layer, inputs)
    if isinstance(layer, layers.SpatialTransformer):
        return of_transformer(package, layer, inputs)
    if isinstance(layer, layers.DeformMaxPool2d):
        return of_max_pool(package, layer, inputs)
    input, *places = (inputs[k] for k in ("input", "rois", "feat", "extra_feat", "flow_1", "flow_2") if k in inputs)
    offset, mask = inputs.get("offset"), inputs.get("mask")
    if getattr(layer, "offset_branches", {}):
        offset, mask = layer.offsets(input, *places)
    elif type(layer) is layers.DeformRoIPool:
        offset = offset.flip(1)  # mmcv's order
    if isinstance(layer, layers.Dilated):
        taps, (_, stride, padding, dilation) = math.prod(layer.kernel_size), layer.window
        offset = input.new_zeros(len(input), 2 * taps, *layer.window.output_size(*input.shape[2:]))
        return package.deform_conv2d(input, offset, layer.weight, layer.bias, stride, padding, dilation)
    if isinstance(layer, layers.SamplingConv):
        how = layer.stride, layer.padding4, layer.dilation
        return package.deform_conv2d(input, offset, layer.weight, layer.bias, *how, mask)
    names = ["output_size", "spatial_scale"]
    if isinstance(layer, layers.DeformRoIPool):
        function, shifts, names = package.deform_roi_pool, (offset, mask), [*names, "sampling_ratio", "gamma"]
    elif isinstance(layer, layers.DeformPSRoIPool):
        function, shifts = package.deform_ps_roi_pool, (offset, mask)
        names += ["output_dim", "group_size", "part_size", "samples_per_part", "offset_scale"]
    else:
        function, shifts, names = package.ps_roi_pool, (), [*names, "output_dim", "group_size"]
    return function(input, *places, *shifts, **{name: getattr(layer, name) for name in names})


def gradients(out, layer, inputs):
    wanted = {k: v for k, v in inputs.items() if isinstance(v, torch.Tensor) and v.requires_grad} | dict(
        layer.named_parameters()
    )
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=out.dtype)
    found = torch.autograd.grad(out, list(wanted.values()), weights, materialize_grads=True)
    return dict(zip(wanted, found, strict=True))


@pytest.mark.parametrize("name", layers.LAYERS)
def test_a_layer_is_the_operator_with_its_own_offsets(name):
    cls = layers.LAYERS[name]
    describe = arguments_of_conv if issubclass(cls, layers.SamplingConv) else arguments_of_pool
    describe = arguments_of_attention if issubclass(cls, ATTENTION) else describe
    describe = arguments_of_aggregation if issubclass(cls, AGGREGATION) else describe
    describe = arguments_of_grid if issubclass(cls, layers.DAttention) else describe
    describe = arguments_of_sequence if issubclass(cls, layers.DeformConv1d) else describe
    describe = arguments_of_max_pool if issubclass(cls, layers.DeformMaxPool2d) else describe
    describe = arguments_of_transformer if issubclass(cls, layers.SpatialTransformer) else describe
    describe = arguments_of_flows if issubclass(cls, layers.SecondOrderDeformableAlignment) else describe

    @fuzz
    @given(st.data())
    def check(data):
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
        arguments, inputs, shape = describe(data.draw, cls, generator)
        for k, v in inputs.items():
            if k != "rois" and isinstance(v, torch.Tensor) and v.is_floating_point():
                v.requires_grad_()
        layer = cls(**arguments).double()
        for p in layer.parameters():  # branches begin with zeros
            p.data.copy_(normal(generator, p.shape) / 2)
        out = layer(**inputs)
        assert out.shape == shape
        again = of_operator(ops, layer, inputs)
        # torch's linear rounds in another order where pixels lie otherwise, and its convolution in one of its own.
        if isinstance(layer, (*AGGREGATION, layers.Dilated)):
            assert_close(out, again, torch.float64)
        else:
            assert torch.equal(out, again)
        expected = of_operator(reference, layer, inputs)
        assert_close(out, expected, torch.float64)
        found, right = gradients(out, layer, inputs), gradients(expected, layer, inputs)
        for k, v in found.items():
            if isinstance(layer, layers.DAttention):  # where gradients cancel, what is left is rounding
                torch.testing.assert_close(v, right[k], rtol=1e-9, atol=1e-9)
                continue
            assert_close(v, right[k], torch.float64, k)
        loaded = cls(**arguments).double()
        loaded.load_state_dict(layer.state_dict())
        for other in (loaded, copy.deepcopy(layer)):
            assert torch.equal(other(**inputs), out)
            assert repr(other) == repr(layer)
            assert not {p.data_ptr() for p in other.parameters()} & {p.data_ptr() for p in layer.parameters()}

    check()


@pytest.mark.parametrize("name", ["DCNv1", "DCNv2", "ActiveConv2d"])
def test_a_fresh_layer_is_a_convolution(name):
    cls = layers.LAYERS[name]

    @fuzz
    @given(st.data())
    def check(data):
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
        arguments, inputs, _ = arguments_of_conv(data.draw, cls, generator)
        arguments.pop("mask_activation", None)
        layer = cls(**arguments).double()
        top, left, bottom, right = layer.padding4
        expected = F.conv2d(
            F.pad(inputs["input"], (left, right, top, bottom)), layer.weight, layer.bias, layer.stride, 0,
            layer.dilation, layer.groups,
        )  # fmt: skip
        assert_close(layer(inputs["input"]), expected, torch.float64)

    check()
