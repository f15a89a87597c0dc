"""What is particular to multi-scale deformable attention: other implementations, references, levels, rules."""

import io
import math

import pytest
import torch
import torch.nn.functional as F
from cases import BY_NAME, Calls, assert_close, convert, leaves, ms_deform_attn_arguments, run, tensors
from conftest import PORTABLE, TUNED, cpu_kernels
from torch import nn
from torch._subclasses import FakeTensorMode

from dcn_plugin import reference
from dcn_plugin.ops import ms_deform_attn

CASE = BY_NAME["ms_deform_attn"]
PLAIN = [name for name in CASE.configs if "reference_points" not in CASE.make(name)]
REFERRED = [name for name in CASE.configs if name not in PLAIN]


# -- other implementations ------------------------------------------------------------------------------------------


def by_grid_sample(value, spatial_shapes, sampling_locations, attention_weights=None, softmax=False, points=None, **_):
    """torch's own sampler, level by level, in float64."""
    n, _, heads, channels = value.shape
    queries, levels = sampling_locations.shape[1], len(spatial_shapes)
    locations = sampling_locations.flatten(3, -2)
    weights = torch.ones_like(locations[..., 0]) if attention_weights is None else attention_weights.flatten(3)
    weights = weights.softmax(-1) if softmax else weights
    counts = points or [locations.shape[3] // levels] * levels
    maps = value.split([h * w for h, w in spatial_shapes], 1)
    out = 0
    for (h, w), level, at, weight in zip(
        spatial_shapes, maps, locations.split(counts, 3), weights.split(counts, 3), strict=True
    ):
        image = level.permute(0, 2, 3, 1).reshape(n * heads, channels, h, w)
        grid = 2 * at.transpose(1, 2).flatten(0, 1) - 1
        found = F.grid_sample(image, grid, padding_mode="zeros", align_corners=False)
        found = found.unflatten(0, (n, heads)) * weight.transpose(1, 2)[:, :, None]
        out = out + found.sum(-1)
    return out.permute(0, 3, 1, 2).reshape(n, queries, heads * channels)


@pytest.mark.parametrize("config", PLAIN)
def test_equals_torchs_sampler(config, device):
    arguments = CASE.make(config, device=device)
    for name, expected in run(by_grid_sample, arguments).items():
        assert_close(run(ms_deform_attn, arguments)[name], expected, torch.float64, name)


def of_transformers(value, spatial_shapes, sampling_locations, attention_weights, **_):
    module = pytest.importorskip("transformers.models.deformable_detr.modeling_deformable_detr")
    pairs = [tuple(pair) for pair in spatial_shapes]
    return module.MultiScaleDeformableAttention()(
        value, torch.tensor(pairs), pairs, None, sampling_locations, attention_weights, 64
    )


@pytest.mark.parametrize("config", ["weights", "strided"])
def test_equals_the_fallback_of_transformers(config):
    arguments = CASE.make(config, torch.float32)
    for name, expected in run(of_transformers, arguments).items():
        assert_close(run(ms_deform_attn, arguments)[name], expected, torch.float32, name)


def located(value, sampling_locations, spatial_shapes, reference_points, points, offset_scale, **rest):
    """The same with locations that are made outside, as users' code makes them."""
    given, counts = sampling_locations.flatten(3, -2), points or [sampling_locations.shape[4]] * len(spatial_shapes)
    made = []
    for level, ((h, w), own) in enumerate(zip(spatial_shapes, given.split(counts, 3), strict=True)):
        at = reference_points.expand(-1, -1, len(spatial_shapes), -1)[:, :, level, None, None]
        if at.shape[-1] == 2:
            made.append(at + own / torch.tensor([w, h]).to(own))
        else:
            made.append(at[..., :2] + own / counts[level] * at[..., 2:] * offset_scale)
    return by_grid_sample(value, spatial_shapes, torch.cat(made, 3), points=counts, **rest)


@pytest.mark.parametrize("config", REFERRED)
def test_reference_points_make_the_locations_of_users_code(config, device):
    arguments = CASE.make(config, device=device)
    for name, expected in run(located, arguments).items():
        assert_close(run(ms_deform_attn, arguments)[name], expected, torch.float64, name)


def test_the_scale_of_boxes(device):
    arguments = CASE.make("boxes", device=device) | {"offset_scale": 0.3}
    for name, expected in run(located, arguments).items():
        assert_close(run(ms_deform_attn, arguments)[name], expected, torch.float64, name)


def loops(value, spatial_shapes, sampling_locations, attention_weights, reference_points, points, offset_scale, **_):
    """Equation 3 of the paper, in Python's numbers: boxes, points that differ in number, a softmax."""
    value, offsets, logits, boxes = (
        t.tolist() for t in (value, sampling_locations, attention_weights, reference_points)
    )
    heads, channels = len(value[0][0]), len(value[0][0][0])
    out = [[[0.0] * (heads * channels) for _ in image] for image in offsets]
    for n, image in enumerate(offsets):
        for q, query in enumerate(image):
            for m, head in enumerate(query):
                powers = [math.exp(logit) for logit in logits[n][q][m]]
                k, first = 0, 0
                for level, (height, width) in enumerate(spatial_shapes):
                    cx, cy, bw, bh = boxes[n][q][level]
                    for _ in range(points[level]):
                        x = (cx + head[k][0] / points[level] * bw * offset_scale) * width - 0.5
                        y = (cy + head[k][1] / points[level] * bh * offset_scale) * height - 0.5
                        for row in range(height):
                            for column in range(width):
                                w = max(0, 1 - abs(y - row)) * max(0, 1 - abs(x - column)) * powers[k] / sum(powers)
                                pixel = value[n][first + row * width + column][m]
                                for d in range(channels):
                                    out[n][q][m * channels + d] += w * pixel[d]
                        k += 1
                    first += height * width
    return torch.tensor(out, dtype=torch.float64)


def test_equals_plain_loops(device):
    arguments = CASE.make("boxes", device=device)
    assert_close(ms_deform_attn(**arguments), loops(**arguments), torch.float64)


# -- forms of the arguments -----------------------------------------------------------------------------------------


def test_merged_points_and_a_tensor_of_shapes_give_the_same():
    arguments = CASE.make("softmax")
    expected = ms_deform_attn(**arguments)
    merged = {
        "sampling_locations": arguments["sampling_locations"].flatten(3, 4),
        "attention_weights": arguments["attention_weights"].flatten(3),
    }
    for name, value in merged.items():
        assert torch.equal(ms_deform_attn(**arguments | {name: value}), expected)
    assert torch.equal(ms_deform_attn(**arguments | merged | {"points": (3, 3)}), expected)
    for dtype in (torch.int64, torch.int32):
        table = torch.tensor(arguments["spatial_shapes"], dtype=dtype)
        assert torch.equal(ms_deform_attn(**arguments | {"spatial_shapes": table}), expected)
    pairs = [torch.Size(pair) for pair in arguments["spatial_shapes"]]
    assert torch.equal(ms_deform_attn(**arguments | {"spatial_shapes": pairs}), expected)


def test_no_weights_is_plain_sampling():
    arguments = CASE.make("one_level")
    ones = torch.ones(arguments["sampling_locations"].shape[:-1], dtype=torch.float64)
    assert_close(ms_deform_attn(**arguments), ms_deform_attn(**arguments, attention_weights=ones), torch.float64)


def test_zero_queries(device):
    arguments = CASE.make("boxes", device=device)
    none = {k: v[:, :0] if k in CASE.float32_beside_half else v for k, v in arguments.items()}
    result = run(ms_deform_attn, none)
    assert result["out"].shape == (2, 0, 15) and not result["grad_value"].any()
    assert result["grad_reference_points"].shape == none["reference_points"].shape


def test_results_are_contiguous_where_strides_look_like_an_image(device):
    """[N, S, M, D] with the strides of channels_last: torch would take it for an image."""
    arguments = CASE.make("weights", torch.float32, device)
    arguments["value"] = arguments["value"].contiguous(memory_format=torch.channels_last)
    assert not arguments["value"].is_contiguous()
    assert all(value.is_contiguous() for value in run(ms_deform_attn, arguments).values())
    compiled = torch.compile(ms_deform_attn, backend="aot_eager", fullgraph=True)
    assert all(value.is_contiguous() for value in run(compiled, arguments).values())


# -- positions and values -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_values_of_a_wide_map_are_found_where_float32_positions_say(dtype, device):
    width = 250
    value = torch.arange(width).remainder(251).to(dtype)[None, :, None, None].to(device)
    assert len(value.unique()) == width, "each pixel is known by its value"
    x = (torch.arange(width, device=device) + 0.5) / width
    locations = torch.stack([x, torch.full_like(x, 0.5)], -1)[None, :, None, None, None]
    out = ms_deform_attn(value, [(1, width)], locations)
    torch.testing.assert_close(out[0, :, 0], value[0, :, 0, 0], rtol=0, atol=0)
    # With positions in half precision a large part of the samples lies elsewhere, which is why they need not be.
    elsewhere = ms_deform_attn(value, [(1, width)], locations.to(dtype))[0, :, 0] != value[0, :, 0, 0]
    assert elsewhere.float().mean() > (0.4 if dtype == torch.bfloat16 else 0.1)


def test_autocast_hands_on_float32_positions(device):
    arguments = CASE.make("boxes", torch.float32, device)
    with torch.autocast(device, torch.bfloat16), Calls(CASE.op) as calls:
        assert ms_deform_attn(**arguments).dtype == torch.bfloat16
    types = [t.dtype for t in calls.found[-1] if isinstance(t, torch.Tensor)]
    assert types == [torch.bfloat16, torch.float32, torch.float32, torch.float32]


def pixel(x, y, device, **more):
    """A map of 3 x 4 whose pixels are 1 to 12, read at (x, y) in pixels."""
    value = torch.arange(1.0, 13.0, dtype=torch.float64, device=device)[None, :, None, None]
    at = torch.tensor([(x + 0.5) / 4, (y + 0.5) / 3], dtype=torch.float64, device=device)
    return dict(value=value, spatial_shapes=[(3, 4)], sampling_locations=at.view(1, 1, 1, 1, 1, 2), **more)


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [(0, 0, 1), (3, 0, 4), (0, 2, 9), (1.5, 0, 2.5), (-0.75, 0, 0.25), (3.75, 2, 3), (-1, 1, 0), (1, 3, 0)],
)
def test_pairs_are_x_y_and_zeros_lie_outside(x, y, expected, device):
    assert ms_deform_attn(**pixel(x, y, device)).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("far", [-1.5, 4.5, 1e30, -1e30, math.inf, -math.inf])
def test_outside_gives_zero_value_and_zero_gradients(far, device):
    for name, value in run(ms_deform_attn, pixel(far, 1.0, device)).items():
        assert not value.any(), name


def test_nan_positions_show_in_their_head_and_nowhere_else(device):
    arguments = CASE.make("weights", device=device)
    arguments["sampling_locations"][1, 2, 1, 0, 3, 0] = torch.nan
    actual, truth = run(ms_deform_attn, arguments), run(reference.ms_deform_attn, arguments)
    expected = torch.zeros(2, 7, 2, 8, dtype=torch.bool, device=device)
    expected[1, 2, 1] = True
    assert torch.equal(actual["out"].isnan(), expected.flatten(2))
    for name in ("grad_sampling_locations", "grad_attention_weights", "grad_value"):
        assert_close(actual[name], truth[name], torch.float64, name)
    assert actual["grad_value"].isfinite().all()
    assert actual["grad_attention_weights"].isnan().sum() == 1


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_bad_pixels_reach_only_the_samples_that_read_them(bad, device):
    arguments = pixel(1.0, 1.0, device)
    arguments["value"][0, 6] = bad  # right of it, with weight 0
    assert ms_deform_attn(**arguments).item() == 6
    arguments["value"][0, 5] = bad
    assert not ms_deform_attn(**arguments).isfinite()


def test_logits_that_are_not_finite_do_what_torchs_softmax_does(device):
    arguments = CASE.make("softmax", device=device)
    logits = arguments["attention_weights"]
    logits[0, 0, 0, 0, 0], logits[0, 1, 0, 0, 1], logits[0, 2, 0] = -torch.inf, torch.nan, -torch.inf
    logits[0, 3, 0, 1, 2], logits[0, 4, 0, 0, 0] = torch.inf, 700.0
    weights = logits.flatten(3).softmax(-1).view_as(logits)
    outside = arguments | {"attention_weights": weights, "softmax": False}
    assert_close(ms_deform_attn(**arguments), ms_deform_attn(**outside), torch.float64)
    actual, truth = run(ms_deform_attn, arguments), run(reference.ms_deform_attn, arguments)
    assert_close(actual["grad_attention_weights"], truth["grad_attention_weights"], torch.float64)


@pytest.mark.parametrize("reference_size", [0, 2, 4])
def test_hostile_positions_never_read_out_of_bounds(reference_size, device):
    make = ms_deform_attn_arguments((2, 3, 5), queries=40, points=3, reference=reference_size)
    torch.manual_seed(0)
    arguments = convert(make(), dtype=torch.float32, device=device)
    hostile = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e38, -1e38, 2.0**31, 2.0**63, -(2.0**63), 1e-45, -0.0])
    for name in {"sampling_locations", "reference_points"} & set(arguments):
        picked = torch.randint(len(hostile), arguments[name].shape)
        arguments[name] = hostile[picked].to(device)
    actual, expected = run(ms_deform_attn, arguments), run(reference.ms_deform_attn, arguments)
    for name in ("out", "grad_value"):
        assert_close(actual[name], expected[name], torch.float32, name)


# -- tables of levels -----------------------------------------------------------------------------------------------

WRONG_TABLES = [[(6, 8)], [(6, 8), (3, 5)], [(6, 8), (3, 4), (1, 1)], [(12, 4), (3, 3)], [(2**30, 2**30)] * 2]


@pytest.mark.parametrize("table", WRONG_TABLES, ids=str)
@pytest.mark.parametrize("where", ["cpu", "meta"])
def test_levels_that_do_not_add_up_are_refused_on_every_device(table, where):
    arguments = convert(CASE.make("weights"), device=where)
    with pytest.raises(ValueError, match="^spatial_shapes: expected levels with the S = 60 pixels .* got"):
        ms_deform_attn(**arguments | {"spatial_shapes": table})
    # The compiled operators too, and their shape rules, which is what a graph calls.
    given = CASE.to_op(**arguments)
    flat = [size for pair in table for size in pair]
    given |= {"spatial_shapes": flat, "points": [8 // len(table)] * len(table)}
    for op, first in ((CASE.op, []), (CASE.backward_op, [arguments["value"].new_ones(2, 7, 16)])):
        last = [1] if first else []
        with pytest.raises((RuntimeError, ValueError), match="spatial_shapes: expected .* got"):
            op(*first, *given.values(), *last)


def test_a_tensor_of_shapes_without_values_is_refused_by_name():
    arguments = CASE.make("weights")
    message = "spatial_shapes: expected pairs .* whose numbers are not known"
    with pytest.raises(ValueError, match=message):
        ms_deform_attn(**arguments | {"spatial_shapes": torch.zeros(2, 2, dtype=torch.long, device="meta")})
    table = torch.tensor(arguments["spatial_shapes"])
    with FakeTensorMode() as mode:
        fake = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
        with pytest.raises(ValueError, match=message):
            ms_deform_attn(**fake | {"spatial_shapes": mode.from_tensor(table)})


def test_torch_compile_reads_a_tensor_of_shapes_outside_its_graph():
    torch._dynamo.reset()
    compiled = torch.compile(ms_deform_attn, backend="aot_eager")
    for config in ("weights", "softmax"):
        arguments = CASE.make(config)
        table = torch.tensor(arguments["spatial_shapes"])
        assert_close(
            compiled(**arguments | {"spatial_shapes": table}), ms_deform_attn(**arguments), torch.float64, config
        )


class Pyramid(nn.Module):
    """Levels from maps, as a detector makes them."""

    def forward(self, fine, coarse, locations, weights):
        maps = (fine, coarse)
        value = torch.cat([m.flatten(2).mT for m in maps], 1).unflatten(2, (2, -1))
        return ms_deform_attn(value, [(m.shape[2], m.shape[3]) for m in maps], locations, weights)


def of_pyramid(n, h, w, q):
    torch.manual_seed(n)
    maps = torch.randn(n, 8, h, w), torch.randn(n, 8, h // 2, w // 2 + 1)
    return *maps, torch.rand(n, q, 2, 2, 3, 2), torch.rand(n, q, 2, 2, 3)


def test_an_exported_graph_serves_other_images_queries_and_sizes_of_maps():
    given, model, dim = of_pyramid(3, 14, 18, 11), Pyramid(), torch.export.Dim.DYNAMIC
    image = {0: dim, 2: dim, 3: dim}
    exported = torch.export.export(model, given, dynamic_shapes=(image, image, {0: dim, 1: dim}, {0: dim, 1: dim}))
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for sizes in ((3, 14, 18, 11), (5, 8, 22, 4), (2, 20, 6, 30)):
        torch.testing.assert_close(loaded(*of_pyramid(*sizes)), model(*of_pyramid(*sizes)))


# -- transforms, sizes ----------------------------------------------------------------------------------------------


def calls_under_vmap(names):
    arguments = CASE.make("boxes")
    batch = [torch.stack([arguments[name]] * 3) for name in names]
    with Calls(CASE.op) as calls:
        torch.func.vmap(lambda *t: ms_deform_attn(**arguments | dict(zip(names, t, strict=True))))(*batch)
    (found,) = calls.found
    return found


def test_samples_become_queries_of_a_value_that_they_share():
    found = calls_under_vmap(["sampling_locations"])
    assert found[0].shape == (2, 64, 3, 5) and found[1].shape[:2] == (2, 21) and found[3].shape[:2] == (2, 21)
    found = calls_under_vmap(["value", "sampling_locations"])
    assert found[0].shape == (6, 64, 3, 5) and found[1].shape[:2] == (6, 7)


def test_ranges_of_queries_do_not_show():
    """The index of the portable gradient is made for some queries, or some images, at a time."""
    many_queries = ms_deform_attn_arguments((2, 8, 1), ((9, 8),), 9000, 4, weights=False)
    large_maps = ms_deform_attn_arguments((8, 8, 1), ((100, 101),), 3, 2)
    for make in (many_queries, large_maps):
        torch.manual_seed(0)
        arguments = make()
        expected = run(by_grid_sample, arguments)["grad_value"]
        with cpu_kernels(PORTABLE):
            found = run(ms_deform_attn, arguments)["grad_value"]
        assert_close(found, expected, torch.float64)


@pytest.mark.parametrize("kernels", [PORTABLE, TUNED])
def test_more_than_2_to_the_31_elements(kernels):
    # Untouched pages cost nothing: only what is written and read becomes real memory.
    side = 46400
    value = torch.empty(1, side * side + 6, 1, 1)
    assert value.numel() > 2**31
    value[0, side * side - 2 : side * side, 0, 0] = torch.tensor([3.0, 5.0])
    value[0, -6:, 0, 0] = torch.arange(6.0)
    at = torch.tensor([[(side - 1.5 + 0.5) / side, (side - 0.5) / side], [0.5, 0.75]])
    # In float32 a position on a map of this size is no finer than 1/256 of a pixel.
    with cpu_kernels(kernels):
        out = ms_deform_attn(value, [(side, side), (2, 3)], at.view(1, 1, 1, 2, 1, 2))
    assert out.item() == pytest.approx(4.0 + 4.0, abs=0.1)


def test_deterministic_mode_is_served(device):
    arguments = leaves(CASE.make("many_queries", torch.float32, device))
    expected = run(ms_deform_attn, arguments)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = run(ms_deform_attn, arguments), run(ms_deform_attn, arguments)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        assert_close(value, expected[name], torch.float32, name)


def test_types_of_points_may_differ_from_one_another():
    """Where locations, weights and references differ, all are read as float32."""
    arguments = CASE.make("boxes", torch.bfloat16)
    mixed = arguments | {"attention_weights": arguments["attention_weights"].float()}
    result = run(ms_deform_attn, mixed)
    assert {k: v.dtype for k, v in result.items()} == {
        "out": torch.bfloat16, "grad_value": torch.bfloat16, "grad_sampling_locations": torch.bfloat16,
        "grad_attention_weights": torch.float32, "grad_reference_points": torch.bfloat16,
    }  # fmt: skip
    expected = run(reference.ms_deform_attn, convert(mixed, dtype=torch.float64))
    for name in ("out", *(f"grad_{k}" for k in tensors(mixed))):
        assert_close(result[name], expected[name], torch.bfloat16, name)
