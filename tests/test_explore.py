"""The page to point at: its numbers are where the operator samples, its script composes them, its text is only text."""

import base64
import hashlib
import json
import math
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from test_sampling_contract import Stretched
from torch import nn

pytest.importorskip("matplotlib")
from dcn_plugin import visualize  # noqa: E402
from dcn_plugin.layers import (  # noqa: E402
    ActiveConv2d,
    DAttention,
    DCNv1,
    DCNv2,
    DCNv3,
    DCNv4,
    SamplingModule,
    SpatialTransformer,
)
from dcn_plugin.visualize import pages  # noqa: E402

ATOB = """
const atob = (text) => {
  const letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  let [bits, held, out] = [0, 0, ""];
  for (const letter of text.replace(/=+$/, "")) {
    bits = (bits << 6) | letters.indexOf(letter);
    held += 6;
    if (held >= 8) {
      held -= 8;
      out += String.fromCharCode((bits >> held) & 255);
    }
  }
  return out;
};
"""


class Parts(HTMLParser):
    """What a page's elements hold, as a browser reads them."""

    def __init__(self, text):
        super().__init__()
        self.open, self.held, self.attributes = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.attributes.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if self.open:
            self.held.append((self.open[-1], data))

    def all(self, tag):
        return [data for name, data in self.held if name == tag]


def told(path):
    data, _ = Parts(path.read_text()).all("script")
    return json.loads(data)


def unpacked(layer, what):
    values = np.frombuffer(base64.b64decode(layer[what]["data"]), "<i2").astype(np.float64) * layer[what]["step"]
    rows, columns = (1, 1) if layer["shared"] else layer["map"]
    return values.reshape(layer["groups"], rows, columns, len(layer["first"]), *([2] if what == "offset" else []))


def in_eighths(layer, seed):
    """Offsets that are eighths of a pixel, whatever the input: no step rounds them."""
    bias = torch.randint(-16, 17, layer.conv_offset.bias.shape, generator=torch.Generator().manual_seed(seed)) / 8
    with torch.no_grad():
        layer.conv_offset.bias.copy_(bias)
    return layer


def drawn(module, seed=0, scale=0.2):
    """Weights that have moved."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return module


@pytest.fixture
def three():
    """Three layers that differ in everything, and a pooling between two of them."""
    return nn.Sequential(
        in_eighths(DCNv1(1, 4, 3, stride=1, padding=1), 0),
        nn.MaxPool2d(2),
        in_eighths(DCNv2(4, 4, 3, padding=2, dilation=2, offset_groups=2), 1),
        in_eighths(DCNv2(4, 4, (1, 3), stride=(2, 1), padding=(0, 1)), 2),
    )


# -- what the page holds ----------------------------------------------------------------------------------------------


def test_numbers_are_where_the_operator_samples(tmp_path):
    """Each tap of each pixel, by the formula of a convolution, written out."""
    layer = in_eighths(DCNv1(1, 2, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(2, 3)), 3)
    (found,) = told(visualize.explore(layer, torch.rand(1, 11, 9), tmp_path / "page.html"))["layers"]
    offset = unpacked(found, "offset")
    assert found["map"] == [5, 6] and found["mask"] is None and found["stride"] == [2, 1]
    bias = layer.conv_offset.bias.tolist()
    for y in range(5):
        for x in range(6):
            for tap in range(6):
                move = offset[0, y, x, tap]
                assert move.tolist() == bias[2 * tap : 2 * tap + 2]
                at = [
                    cell * stride + first
                    for cell, stride, first in zip((y, x), (2, 1), found["first"][tap], strict=True)
                ]
                assert at == [2 * y - 1 + tap // 2 * 2, x + tap % 2 * 3]


def test_an_image_that_is_read_there_gives_the_value(tmp_path):
    """The operator itself: one tap, an image whose values say where they are."""
    torch.manual_seed(0)
    layer = DCNv2(1, 1, 1, mask_activation="sigmoid")
    drawn(layer.conv_offset, scale=2.0)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    rows = torch.arange(12.0)[:, None].expand(12, 12)
    (found,) = told(visualize.explore(layer, rows[None] / 4, tmp_path / "page.html"))["layers"]
    offset, mask, out = unpacked(found, "offset"), unpacked(found, "mask"), layer(rows[None, None] / 4)
    for y in range(4, 8):
        for x in range(4, 8):
            at = y + offset[0, y, x, 0, 0]
            if 0 <= at <= 11 and 0 <= x + offset[0, y, x, 0, 1] <= 11:
                value = at / 4 * mask[0, y, x, 0] + layer.bias.item()
                assert out[0, 0, y, x].item() == pytest.approx(value, abs=2e-3)


@pytest.mark.parametrize("size", [1e-4, 1.0, 7.9, 300.0])
def test_precision_is_what_the_documentation_says(size):
    values = torch.rand(2, 5, 5, 9, 2, generator=torch.Generator().manual_seed(0)) * 2 * size - size
    values[0, 0, 0, 0, 0] = size
    packed = pages._packed("", "offsets", values)
    found = np.frombuffer(base64.b64decode(packed["data"]), "<i2") * packed["step"]
    assert math.log2(packed["step"]).is_integer() and packed["step"] <= size / 16383
    assert np.abs(found - values.flatten().double().numpy()).max() <= packed["step"] / 2
    assert size > 8 or packed["step"] / 2 <= 1 / 8192


def test_zeros_are_zeros():
    packed = pages._packed("", "offsets", torch.zeros(1, 2, 2, 1, 2))
    assert packed["step"] > 0 and not any(base64.b64decode(packed["data"]))


def test_layers_and_calls_are_chosen(three, tmp_path):
    def names(**given):
        return [
            layer["name"]
            for layer in told(visualize.explore(three, torch.rand(1, 1, 16, 16), tmp_path / "p.html", **given))[
                "layers"
            ]
        ]

    assert names() == ["0", "2", "3"] and names(layers=2) == ["2", "3"] and names(layers=["0", "3"]) == ["0", "3"]

    class Twice(nn.Sequential):
        def forward(self, x):
            return super().forward(super().forward(x))

    three = Twice(DCNv1(1, 1, 3, padding=1))
    assert names() == ["0[0]", "0[1]"] and names(call=-1) == ["0[1]"]


# -- its script -------------------------------------------------------------------------------------------------------


@pytest.fixture
def engine():
    """An engine for the script alone, without a document."""
    racer = pytest.importorskip("py_mini_racer", reason="the page's script runs in the engine of mini-racer")

    def open_page(path):
        context = racer.MiniRacer()
        context.eval(ATOB + (pages._PARTS / "points.js").read_text())
        context.eval(f"const layers = {json.dumps(told(path)['layers'])}.map(points.unpack);")
        return lambda code: json.loads(context.eval(f"JSON.stringify({code})"))

    return open_page


def pixels_of(item):
    rows, columns = item.offset.shape[-2:] if item.places is None else item.input_size
    return [(0, 0), (rows // 2, columns // 3), (rows - 1, columns - 1)]


class Rows(nn.Module):
    """DCNv4 takes rows of pixels."""

    def __init__(self):
        super().__init__()
        self.layer = drawn(
            DCNv4(16, group=2, kernel_size=3, offset_scale=1.5, remove_center=True, without_pointwise=True)
        )

    def forward(self, x):
        return self.layer(x.flatten(2).transpose(1, 2), shape=x.shape[-2:])


KINDS = {
    "DCNv1": lambda: drawn(DCNv1(16, 4, 3, padding=(1, 1, 0, 0), stride=2, offset_groups=2)),
    "DCNv2": lambda: drawn(DCNv2(16, 4, 5, padding=2, mask_activation="sigmoid")),
    "affine": lambda: drawn(DCNv2(16, 4, 3, padding=1, offset_form="affine")),
    "DCNv3": lambda: drawn(DCNv3(16, group=2, stride=2, offset_scale=2.0, channels_first=True)),
    "DCNv4": Rows,
    "active": lambda: drawn(ActiveConv2d(16, 4, 3, padding=1)),
    "transformer": lambda: drawn(SpatialTransformer(16), scale=0.05),
    "attention": lambda: drawn(DAttention(16, 4, 2, 12, stride=2)),
    "another's": lambda: drawn(Stretched(16, 4, 3, padding=2, dilation=2, limit=3.0)),
}


@pytest.mark.filterwarnings("ignore:.*expected to start at zero")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer_is_shown(kind, engine, tmp_path):
    torch.manual_seed(0)
    model, image = KINDS[kind](), torch.randn(16, 12, 12)
    (item,) = visualize.record(model, image)
    ask = engine(visualize.explore(model, image, tmp_path / "page.html"))
    assert item.offset.abs().max() > 0.01
    for group in range(item.offset.shape[1]):
        for y, x in pixels_of(item):
            found = ask(f"points.taps(layers[0], {group}, [{y}, {x}])")
            expected = item.positions(y, x, group)
            precision = 0.51 * ask("layers[0].offset.step")
            assert torch.tensor([tap["position"] for tap in found]) == pytest.approx(expected, abs=precision, rel=1e-6)
            if item.mask is not None:
                weights = torch.tensor([tap["weight"] for tap in found])
                assert weights == pytest.approx(item.mask[0, group, :, y, x], abs=2e-4)


def nested(records, cell, group):
    """The taps of taps of taps, by recursion over plain numbers."""
    *before, item = records
    found = []
    taps = item.taps().tolist()
    for tap, (ty, tx) in enumerate(taps):
        own = group % item.offset.shape[1]
        move = item.offset[0, own, tap, :, cell[0], cell[1]].tolist()
        position = [
            c * s + t + m for c, s, t, m in zip(cell, item.window.stride, (ty, tx), move, strict=True)
        ]  # fmt: skip
        image = [p * scale + shift for p, (scale, shift) in zip(position, item.grid, strict=True)]
        weight = 1.0 if item.mask is None else item.mask[0, own, tap, cell[0], cell[1]].item()
        if not before:
            found.append((*image, weight))
            continue
        earlier = [round((p - shift) / scale) for p, (scale, shift) in zip(image, before[-1].out_grid, strict=True)]
        rows, columns = before[-1].offset.shape[-2:]
        if 0 <= earlier[0] < rows and 0 <= earlier[1] < columns:
            found += [(y, x, w * weight) for y, x, w in nested(before, earlier, group)]
    return found


def as_table(points):
    return torch.tensor(points).reshape(-1, 3)


@pytest.mark.parametrize("group", [0, 1])
@pytest.mark.parametrize("cell", [(2, 5), (0, 0), (7, 15)])
def test_stacked_layers_are_composed(three, cell, group, engine, tmp_path):
    """Ties between two pixels included: offsets are eighths."""
    image = torch.rand(1, 32, 32)
    records = visualize.record(three, image)
    ask = engine(visualize.explore(three, image, tmp_path / "page.html"))
    for depth in (1, 2, 3):
        chain = f"layers.slice({3 - depth})"
        found = ask(f"points.follow({chain}, {group}, {json.dumps(cell)})")
        points = [(*point["at"], point["weight"]) for point in found["points"]]
        expected = nested(records[3 - depth :], cell, group)
        assert as_table(points) == pytest.approx(as_table(expected), abs=1e-4)
        unit = [c * scale + shift for c, (scale, shift) in zip(cell, records[-1].out_grid, strict=True)]
        assert as_table(points)[:, :2] == pytest.approx(visualize.trace(records[3 - depth :], unit, group=group))
        whole = math.prod(len(item.taps()) for item in records[3 - depth :])
        assert (len(points) == whole) == (found["lost"] == 0)
    if (cell, group) == ((2, 5), 0):
        assert len(points) == 3 * 9 * 9


def test_without_offsets_the_grid_is_plain(engine, tmp_path):
    model = nn.Sequential(*(in_eighths(DCNv1(1, 1, 3, padding=1), i) for i in range(3)))
    ask = engine(visualize.explore(model, torch.rand(1, 21, 21), tmp_path / "page.html"))
    points = ask("points.follow(layers, 0, [10, 10], false).points.map((point) => point.at)")
    steps = range(-3, 4)
    assert len(points) == 9**3 and {tuple(at) for at in points} == {(10 + a, 10 + b) for a in steps for b in steps}
    moved = ask("points.follow(layers, 0, [10, 10]).points.map((point) => point.at)")
    assert len(moved) == 9**3 and moved != points


def test_a_layer_that_all_read_alike_has_its_samples_once(engine, tmp_path):
    model = nn.Sequential(drawn(DAttention(16, 4, 2, 8)), drawn(DCNv1(16, 4, 3, padding=1), scale=0.01))
    image = torch.randn(16, 8, 8)
    records = visualize.record(model, image)
    ask = engine(visualize.explore(model, image, tmp_path / "page.html"))
    found = ask("points.follow(layers, 0, [4, 4]).points.map((point) => point.at)")
    assert torch.tensor(found) == pytest.approx(visualize.trace(records, (4, 4)), abs=2e-3)


def test_effective_dilation_and_histogram(engine, tmp_path):
    layer = DCNv2(2, 4, 3, padding=2, dilation=2, offset_groups=2)
    drawn(layer.conv_offset)
    image = torch.randn(2, 7, 9, generator=torch.Generator().manual_seed(0))
    (item,) = visualize.record(layer, image)
    ask = engine(visualize.explore(layer, image, tmp_path / "page.html"))
    expected = visualize.dilation_by_layer(layer, image[None])[""][0]
    for group in (0, 1):
        for y, x in pixels_of(item):
            here = ask(f"points.dilation(layers[0], {group}, [{y}, {x}])")
            assert here == pytest.approx(expected[group, y, x].item(), abs=1e-3)
        whole = ask(f"points.meanDilation(layers[0], {group}, points.allCells(layers[0]))")
        assert whole == pytest.approx(expected[group].mean().item(), abs=1e-3)
        lengths = item.offset[0, group].norm(dim=1).flatten().sort().values
        found = torch.tensor(ask(f"[...points.lengths(layers[0], {group})]"), dtype=torch.float64)
        assert found == pytest.approx(lengths.double(), abs=1e-3)
        histogram = ask(f"points.histogram(points.lengths(layers[0], {group}), 8)")
        bins = torch.histc(found, 8, 0, histogram["largest"]).tolist()
        assert histogram["counts"] == bins and sum(bins) == 9 * 63
        assert ask(f"points.quantile(points.lengths(layers[0], {group}), 0.5)") == pytest.approx(
            lengths.median().item(), abs=1e-3
        )
    assert ask("points.dilation(layers[0], 0, [0, 0], false)") == 2.0


def test_a_kernel_without_neighbours_has_no_dilation(engine, tmp_path):
    ask = engine(visualize.explore(DCNv1(1, 1, 1), torch.rand(1, 4, 4), tmp_path / "page.html"))
    assert ask("points.dilation(layers[0], 0, [1, 1])") is None
    assert ask("points.meanDilation(layers[0], 0, points.allCells(layers[0]))") is None
    assert ask("points.histogram(points.lengths(layers[0], 0), 3)") == dict(counts=[16, 0, 0], largest=0)


def test_small_rules(engine, tmp_path):
    ask = engine(visualize.explore(DCNv1(1, 1, 3, padding=1), torch.rand(1, 4, 6), tmp_path / "page.html"))
    values = [-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 0.49, -0.51, 3.7]
    assert ask(f"{values}.map(points.nearest)") == [round(value) for value in values]
    assert ask("points.clamped([-Infinity, 9], [4, 6])") == [0, 5]
    # The strongest is opaque, the weak are still to be seen, what is not read is not drawn.
    assert ask("[2, -1, 0.001, 0].map((weight) => points.opacity(weight, 2))") == [1, 0.5, 0.2, 0]
    assert ask("points.extent([3, -1, 2])") == [-1, 3]


# -- its text ---------------------------------------------------------------------------------------------------------

NASTY = "</script></style></title><img src=x onerror=alert(1)>&amp;\"'\u2028$data"


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.add_module("</script><b>&'\"", DCNv1(1, 1, 3, padding=1))

    def forward(self, x):
        return next(self.children())(x)


def test_one_name_is_one_layer(tmp_path):
    model = nn.Sequential()
    for name in ("ab", "a", "b"):
        model.add_module(name, DCNv1(1, 1, 3, padding=1))
    found = told(visualize.explore(model, torch.rand(1, 6, 6), tmp_path / "page.html", "ab"))["layers"]
    assert [layer["name"] for layer in found] == ["ab"]


def test_a_title_may_have_what_is_no_text(tmp_path):
    """As of a file whose name is not UTF-8."""
    title = os.fsdecode(b"caf\xe9.jpg")
    path = visualize.explore(DCNv1(1, 1, 3), torch.rand(1, 6, 6), tmp_path / "page.html", title=title)
    assert "<title>caf?.jpg</title>" in path.read_text(encoding="utf-8")


def test_strings_are_text(tmp_path):
    path = visualize.explore(Odd(), torch.rand(1, 8, 8), tmp_path / "page.html", title=NASTY)
    parts = Parts(path.read_text())
    assert "".join(parts.all("title")) == "".join(parts.all("h1")) == NASTY
    assert told(path)["layers"][0]["name"] == "</script><b>&'\""
    assert len(parts.all("script")) == 2 and not any(tag in ("img", "b") for tag, _ in parts.attributes)


def test_the_policy_admits_this_script_and_this_style_alone(three, tmp_path):
    text = visualize.explore(three, torch.rand(1, 16, 16), tmp_path / "page.html").read_text()
    parts = Parts(text)
    (policy,) = (given["content"] for tag, given in parts.attributes if "http-equiv" in given)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    for part, kind in ((parts.all("style")[0], "style-src"), (parts.all("script")[1], "script-src")):
        digest = base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()
        assert rules[kind] == f"'sha256-{digest}'"
    assert rules["default-src"] == "'none'" and rules["img-src"] == "data:"
    # Nothing is loaded, nothing evaluated, no markup made of strings.
    assert set(re.findall(r"https?://[^\"'\s]+", text)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"\beval\(|new Function|innerHTML|insertAdjacentHTML|document\.write|fetch\(|import\(", text)
    assert not any(name.startswith("on") or name == "style" for _, given in parts.attributes for name in given)
    loaded = [given.get("src") or given.get("href") for _, given in parts.attributes if {"src", "href"} & set(given)]
    assert loaded == ["data:,"]


def test_everything_that_is_pointed_at_has_a_name(three, tmp_path):
    parts = Parts(visualize.explore(three, torch.rand(1, 16, 16), tmp_path / "page.html").read_text())
    ids = [given["id"] for _, given in parts.attributes if "id" in given]
    assert len(ids) == len(set(ids))
    named = {given.get("aria-describedby") for _, given in parts.attributes} - {None}
    assert named <= set(ids) and ("html", {"lang": "en"}) in parts.attributes
    for tag, given in parts.attributes:
        if given.get("tabindex") == "0" or tag == "section":
            assert given.get("aria-label"), (tag, given)
    asked = set(re.findall(r'find\("(\w+)"\)', (pages._PARTS / "explore.js").read_text()))
    assert asked and asked <= set(ids)


def test_a_page_that_is_there_outlives_one_that_is_not_written(tmp_path):
    path = tmp_path / "page.html"
    path.write_text("before")
    layer = DCNv1(1, 1, 3, padding=1)
    with torch.no_grad():
        layer.conv_offset.bias.fill_(math.nan)
    for model, given in ((layer, {}), (DCNv1(1, 1, 3, padding=1), dict(limit_mb=0.001))):
        with pytest.raises(ValueError):
            visualize.explore(model, torch.rand(1, 8, 8), path, **given)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_the_limit_names_what_suffices(tmp_path):
    model, image = DCNv1(1, 1, 3, padding=1), torch.rand(1, 64, 64)
    with pytest.raises(ValueError) as refused:
        visualize.explore(model, image, tmp_path / "page.html", limit_mb=0.01)
    enough = float(re.search(r"at least ([\d.]+)", str(refused.value))[1])
    path = visualize.explore(model, image, tmp_path / "page.html", limit_mb=enough)
    assert path.stat().st_size <= enough * 1e6


def test_a_model_is_left_as_it_was(tmp_path):
    model = nn.Sequential(DCNv1(1, 1, 3, padding=1), nn.BatchNorm2d(1)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    visualize.explore(model, torch.rand(1, 8, 8), tmp_path / "page.html")
    assert model.training and all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(module._sampling_hooks is None for module in model.modules() if isinstance(module, SamplingModule))
