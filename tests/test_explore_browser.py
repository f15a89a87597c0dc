"""The page in a browser: what points at it moves the points to where the operator samples, and nothing complains.

The numbers themselves are tested without one (`test_explore.py`). A browser of the Chromium family is used where there
is one in the path, or in DCN_PLUGIN_BROWSER; Debian's package is `chromium`.
"""

import pytest
import torch
from browser import Browser, find_browser
from test_explore import Odd, drawn, nested
from torch import nn

pytest.importorskip("matplotlib")
from dcn_plugin import visualize  # noqa: E402
from dcn_plugin.layers import DAttention, DCNv1, DCNv2  # noqa: E402

PROGRAM = find_browser()
pytestmark = [
    pytest.mark.skipif(
        PROGRAM is None, reason="NO BROWSER: install chromium, or set DCN_PLUGIN_BROWSER, to see that the page works"
    ),
    pytest.mark.filterwarnings("ignore:.*expected to start at zero"),
    pytest.mark.xdist_group("browser"),  # one window for all
]
POINTS = "[...document.querySelectorAll('#{} circle')].map((c) => [c.cy, c.cx].map((v) => v.baseVal.value))"
ON_SCREEN = """(() => {{
  const matrix = document.getElementById("drawing").getScreenCTM();
  const at = new DOMPoint({x}, {y}).matrixTransform(matrix);
  return [at.x, at.y];
}})()"""


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    with Browser(PROGRAM, tmp_path_factory.mktemp("profile")) as browser:
        yield browser


class Explored:
    """A page of three layers, open, and what the layers recorded."""

    def __init__(self, window, folder, **given):
        self.window = window
        self.model = nn.Sequential(
            drawn(DCNv2(1, 4, 3, padding=1), 0),
            nn.MaxPool2d(2),
            drawn(DCNv1(4, 4, 3, padding=2, dilation=2, offset_groups=2), 1),
            drawn(DCNv2(4, 4, 3, padding=1), 2),
        )
        image = torch.rand(1, 32, 48, generator=torch.Generator().manual_seed(0))
        self.records = visualize.record(self.model, image)
        self.path = visualize.explore(self.model, image, folder / "page.html")
        window.open(self.path, **given)

    def where(self, cell):
        """The centre of the window's pixels that show an output pixel of the last layer."""
        y, x = (c * scale + shift for c, (scale, shift) in zip(cell, self.records[-1].out_grid, strict=True))
        return self.window.ask(ON_SCREEN.format(y=y, x=x))

    def points(self, kind="moved"):
        return torch.tensor(self.window.ask(POINTS.format(kind))).reshape(-1, 2)

    def expected(self, cell, depth=3, group=0):
        """Close to it: a number that is stored in steps may lie on the other side of a border between two pixels."""
        return torch.tensor(nested(self.records[3 - depth :], list(cell), group))[:, :2]

    def shows(self, cell, depth=3, group=0):
        found, expected = self.points(), self.expected(cell, depth, group)
        assert found.shape == expected.shape
        assert ((found - expected).abs().amax(1) < 2e-3).float().mean() > 0.98
        rows = self.window.ask("[...document.querySelectorAll('#row, #column')].map((field) => Number(field.value))")
        assert rows == list(cell)
        assert f"Output pixel ({cell[0]}, {cell[1]}) of 3" in self.said()

    def said(self):
        return self.window.ask("document.getElementById('reading').textContent")

    def choose(self, name, value):
        code = f"(() => {{ const field = document.getElementById('{name}'); field.value = '{value}'; "
        self.window.ask(f"{code} field.dispatchEvent(new Event('change')); }})()")


@pytest.fixture
def explored(window, tmp_path):
    made = Explored(window, tmp_path)
    yield made
    assert window.errors == []
    assert window.requests and all(url == made.path.as_uri() or url.startswith("data:") for url in window.requests)


def test_pointing_moves_the_points_to_where_the_operator_samples(explored):
    explored.shows((8, 12))  # the middle, at first
    for cell in ((8, 12), (3, 7), (10, 20), (0, 0), (15, 23)):
        explored.window.point(*explored.where(cell))
        explored.shows(cell)


def test_one_layer_alone_is_exact(explored):
    explored.choose("depth", 0)
    for cell in ((5, 9), (12, 3)):
        explored.window.point(*explored.where(cell))
        torch.testing.assert_close(explored.points(), explored.expected(cell, 1), atol=5e-4, rtol=0)
        weights = torch.tensor(
            explored.window.ask(
                "[...document.querySelectorAll('#moved circle')].map((c) => Number(c.getAttribute('opacity')))"
            )
        )
        mask = explored.records[-1].mask[0, 0, :, cell[0], cell[1]]
        torch.testing.assert_close(weights, (mask / mask.max()).clamp(min=0.2), atol=2e-3, rtol=0)


def test_a_click_holds_the_pixel(explored):
    explored.window.point(*explored.where((4, 5)), click=True)
    assert "Held" in explored.said()
    explored.window.point(*explored.where((10, 11)))
    explored.shows((4, 5))
    explored.window.point(*explored.where((10, 11)), click=True)
    explored.shows((10, 11))
    explored.window.point(*explored.where((9, 11)))
    explored.shows((9, 11))


def test_the_keyboard_does_all(explored):
    order = []
    for _ in range(9):
        explored.window.press("Tab")
        order.append(explored.window.ask("document.activeElement.id || document.activeElement.localName"))
        outline = explored.window.ask("getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid", order
        if order[-1] == "figure":
            for key, shift, cell in (
                ("ArrowDown", False, (9, 12)), ("ArrowLeft", False, (9, 11)), ("ArrowUp", True, (4, 11)),
                ("ArrowRight", True, (4, 16)), ("Home", False, (4, 0)), ("ArrowLeft", False, (4, 0)),
                ("End", False, (4, 23)),
            ):  # fmt: skip
                explored.window.press(key, shift)
                explored.shows(cell)
    assert order == ["theme", "layer", "depth", "group", "row", "column", "plain", "figure", "summary"]
    explored.window.press(" ")  # on the summary
    explored.window.settle()
    assert explored.window.ask("document.querySelectorAll('#rows tr').length") == 9


def test_controls(explored):
    explored.choose("group", 1)
    explored.shows((8, 12), group=1)
    explored.choose("group", 0)
    explored.choose("row", 3)
    explored.choose("column", 99)
    explored.shows((3, 23))
    explored.choose("column", "")
    explored.shows((3, 23))
    assert len(explored.points("still")) == 0
    explored.window.ask("document.getElementById('plain').click()")
    found = explored.points("still").float()
    zeros = visualize.trace(
        [type(item)(**{**vars(item), "offset": 0 * item.offset}) for item in explored.records],
        [c * scale + shift for c, (scale, shift) in zip((3, 23), explored.records[-1].out_grid, strict=True)],
    )
    torch.testing.assert_close(found, zeros, atol=1e-3, rtol=0)
    explored.choose("layer", 0)
    assert explored.window.ask("[...document.querySelectorAll('#depth option')].map((o) => o.textContent)") == [
        "1 layer"
    ]
    assert len(explored.points()) == 9 and "of 0, at" in explored.said()


def test_what_is_said_is_what_the_library_says(explored):
    explored.choose("depth", 0)
    item = explored.records[-1]
    here = visualize.effective_dilation(item.offset.flatten(1, 3), (3, 3))[0, 0]
    said = explored.window.ask(
        "Object.fromEntries([...document.querySelectorAll('#layers dl div')].map((row) => "
        "[...row.children].map((c) => c.textContent)))"
    )
    assert float(said["Effective dilation here"]) == pytest.approx(here[8, 12].item(), abs=0.006)
    assert float(said["of the whole map"]) == pytest.approx(here.mean().item(), abs=0.006)
    assert said["of the plain grid"] == "1" and said["Kind"] == "DCNv2" and said["Map"] == "16 × 24, reads 16 × 24"
    explored.window.ask("document.getElementById('taps').open = true")
    explored.window.settle()
    rows = explored.window.ask(
        "[...document.querySelectorAll('#rows tr')].map((row) => [...row.children].map((c) => c.textContent))"
    )
    for tap, (name, *_, modulation) in enumerate(rows):
        assert name == f"{tap // 3}, {tap % 3}"
        assert float(modulation) == pytest.approx(item.mask[0, 0, tap, 8, 12].item(), abs=0.006)
        numbers = [[float(v) for v in text.strip("()").split(",")] for text in rows[tap][1:4]]
        assert numbers[0] == pytest.approx(item.offset[0, 0, tap, :, 8, 12].tolist(), abs=0.006)
        assert numbers[1] == pytest.approx(item.positions(8, 12)[tap].tolist(), abs=0.006)
    announced = "new Promise((done) => setTimeout(() => done(document.getElementById('announced').textContent), 600))"
    assert explored.window.ask(announced) == explored.said()


def test_a_telephone(window, tmp_path):
    """360 pixels: nothing sticks out, a tap chooses, and a finger can still scroll."""
    made = Explored(window, tmp_path, width=360, height=740, touch=True)
    window.ask("document.getElementById('taps').open = true")
    assert window.ask("document.documentElement.scrollWidth") == 360
    window.ask("document.getElementById('figure').scrollIntoView({block: 'center'})")
    for cell in ((6, 9), (12, 20)):
        window.tap(*made.where(cell))
        made.shows(cell)
    assert window.ask("getComputedStyle(document.getElementById('figure')).touchAction") == "pan-y pinch-zoom"
    small = window.ask(
        "[...document.querySelectorAll('button, select, input[type=number], summary, .tick')]"
        ".map((e) => [e.id || e.localName, e.getBoundingClientRect().height]).filter(([, height]) => height < 36)"
    )
    assert small == [] and window.errors == []


CONTRASTS = """(() => {
  const light = (color) => {
    const [r, g, b] = color.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255).map((v) => (
      v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    const own = getComputedStyle(element).backgroundColor;
    return own === "rgba(0, 0, 0, 0)" ? ground(element.parentElement) : own;
  };
  const words = "h1, button, select, #reading, #help, dt, dd, .axis, summary, label";
  return [...document.querySelectorAll(words)].map((element) => {
    const pair = [light(getComputedStyle(element).color), light(ground(element))].sort((a, b) => b - a);
    return (pair[0] + 0.05) / (pair[1] + 0.05);
  });
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark(window, tmp_path, scheme):
    Explored(window, tmp_path, scheme=scheme)
    ground = "getComputedStyle(document.body).backgroundColor"
    colours = {"light": "rgb(255, 255, 255)", "dark": "rgb(21, 23, 26)"}
    assert window.ask(ground) == colours[scheme] and min(window.ask(CONTRASTS)) >= 4.5
    for chosen in ("light", "dark"):
        window.ask("document.getElementById('theme').click()")
        assert window.ask(ground) == colours[chosen] and min(window.ask(CONTRASTS)) >= 4.5
        assert window.ask("document.getElementById('theme').textContent") == f"Theme: {chosen}"
    window.ask("document.getElementById('theme').click()")
    assert window.ask(ground) == colours[scheme] and window.errors == []


def test_names_are_text_and_a_grid_of_attention_is_shown(window, tmp_path):
    window.open(visualize.explore(Odd(), torch.rand(1, 8, 8), tmp_path / "odd.html", title="<b>&amp;"))
    assert window.ask("[document.title, document.querySelector('h1').textContent]") == ["<b>&amp;"] * 2
    assert window.ask("document.querySelector('#layer option').textContent") == "</script><b>&'\""
    assert window.ask("document.querySelectorAll('b').length") == 0 and window.errors == []
    model, image = drawn(DAttention(16, 4, 2, 8)), torch.randn(16, 8, 8, generator=torch.Generator().manual_seed(0))
    (item,) = visualize.record(model, image)
    window.open(visualize.explore(model, image, tmp_path / "attention.html"))
    found = torch.tensor(window.ask(POINTS.format("moved")))
    torch.testing.assert_close(found, item.positions(0, 0), atol=2e-3, rtol=0)
    assert window.errors == []


def test_the_policy_stops_what_is_not_the_page(window, tmp_path):
    """Otherwise the tests above would not show that nothing is loaded or made of strings."""
    window.open(visualize.explore(DCNv1(1, 1, 3, padding=1), torch.rand(1, 8, 8), tmp_path / "page.html"))
    window.ask(
        "(() => { const script = document.createElement('script'); script.textContent = 'window.ran = 1'; "
        "document.body.append(script); const image = new Image(); image.src = 'https://localhost/x.png'; "
        "document.body.append(image); })()"
    )
    window.ask("new Promise((done) => setTimeout(done, 100))")
    assert window.ask("window.ran === undefined")
    assert len([error for error in window.errors if "Content Security Policy" in error]) == 2
