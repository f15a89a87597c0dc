"""ncnn, by way of pnnx, computes what our layers do; what it does not is refused by name before there is a file."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from dcn_plugin.layers import DCNv1, DCNv2, DeformConv2d

for _name in ("ncnn", "pnnx", "torchvision"):
    pytest.importorskip(_name)
from test_other_forms import draw, moved  # noqa: E402

from dcn_plugin.export.ncnn import export_ncnn, run_ncnn  # noqa: E402


class Everything(nn.Module):
    """One file for what would be many: pnnx takes a second or two for each."""

    def __init__(self):
        super().__init__()
        uneven = dict(stride=(2, 1), padding=(0, 1, 2, 3), dilation=(1, 2))
        self.layers = nn.ModuleList([
            DCNv2(8, 12, 3, padding=1),
            DCNv1(8, 12, 3, padding=1, bias=False, offset_bound=0.5),
            DCNv2(8, 12, (2, 3), mask_activation="sigmoid", **uneven),
            DCNv2(8, 12, 3, padding=1, groups=2, offset_groups=4),
            DCNv1(8, 8, 3, padding=1, groups=8),
            DCNv1(8, 6, (4, 2), padding="same", offset_groups=2),
        ])  # fmt: skip

    def forward(self, x):
        return tuple(layer(x) for layer in self.layers)


def test_ncnn_agrees_for_every_argument_of_a_layer(tmp_path):
    model, x = moved(Everything()), draw(1, 8, 10, 12)
    path = export_ncnn(model, (x,), tmp_path / "sub/model")
    assert sorted(file.name for file in path.parent.iterdir()) == ["model.bin", "model.param"]
    kinds = [line.split()[0] for line in path.read_text().splitlines()[2:]]
    assert kinds.count("DeformableConv2D") == 3 + 4 + 8 + 2
    with torch.no_grad():
        wanted = model(draw(1, 8, 10, 12).flip(3))
    # Several kernels of ncnn: channels beside each other or one by one, with and without its matrix products.
    for options in ({}, dict(use_packing_layout=False), dict(use_sgemm_convolution=False)):
        for found, of_layer in zip(run_ncnn(path, (x.flip(3),), **options), wanted, strict=True):
            torch.testing.assert_close(found, of_layer, rtol=0, atol=1e-4 * float(of_layer.abs().max()))


def test_positions_on_every_border_and_sizes_that_vary(tmp_path):
    layer = moved(DeformConv2d(5, 12, 3, padding=1))

    def given(height, width):
        edges = torch.tensor([-2, -1.5, -1, -1 + 2**-9, -0.5, 0, 0.5, 1, 1 + 2**-9, 2, 1e6])
        at = edges[torch.randint(len(edges), (2, 9, height, width), generator=torch.Generator().manual_seed(2))]
        offset = torch.empty(1, 18, height, width)
        for axis, (size, taps) in enumerate(((height, torch.arange(9) // 3), (width, torch.arange(9) % 3))):
            # From the first pixel on, or from the last.
            place = torch.where(at[axis] < 0.25, at[axis], size - 2 + at[axis])
            pixel = torch.arange(size).view((-1, 1) if axis == 0 else (1, -1)) - 1
            offset[0, axis::2] = place - pixel - taps.view(9, 1, 1)
        return draw(1, 5, height, width), offset, draw(1, 9, height, width)

    path = export_ncnn(layer, given(9, 11), tmp_path / "model", other_args=given(14, 6))
    with torch.no_grad():
        wanted = layer(*given(7, 8))
    torch.testing.assert_close(run_ncnn(path, given(7, 8))[0], wanted, rtol=0, atol=1e-5)


class Asks(nn.Module):
    """Computes something else once its layer is another one, as it is in the copy that is converted."""

    def __init__(self):
        super().__init__()
        self.layer = DCNv1(4, 4, 3, padding=1)

    def forward(self, x):
        return self.layer(x) if isinstance(self.layer, DCNv1) else 2 * self.layer(x)


def test_ncnn_is_compared_with_the_model_itself_in_eval_mode(tmp_path):
    with pytest.raises(ArithmeticError, match="outputs: expected to agree within 0.0001 of the largest, got 1$"):
        export_ncnn(moved(Asks()), (draw(1, 4, 6, 6),), tmp_path / "model")
    assert not list(tmp_path.iterdir())
    model = nn.Sequential(moved(DCNv1(4, 4, 3)), nn.Dropout()).train()
    export_ncnn(model, (draw(1, 4, 6, 6),), tmp_path / "model")
    assert model.training and model[0].training and type(model[0]) is DCNv1


def test_nothing_is_written_where_outputs_differ(tmp_path):
    layer = moved(DCNv2(8, 4, 3, padding=1))
    (tmp_path / "model.param").write_text("of before")
    with pytest.raises(ArithmeticError, match="outputs: expected to agree within 1e-30"):
        export_ncnn(layer, (draw(1, 8, 9, 9),), tmp_path / "model", tolerance=1e-30)
    assert [file.name for file in tmp_path.iterdir()] == ["model.param"]
    assert (tmp_path / "model.param").read_text() == "of before"


def test_the_script_writes_two_files(tmp_path, monkeypatch, capsys):
    timm = pytest.importorskip("timm")
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: moved(nn.Sequential(DCNv2(3, 4, 3), nn.ReLU())))
    script = str(Path(__file__).resolve().parents[1] / "scripts/export.py")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["export.py", "a model", "--format", "ncnn", "--image-size", "9", *arguments])
        runpy.run_path(script, run_name="__main__")

    run("--out", str(tmp_path / "model.param"))
    assert "of the largest output" in capsys.readouterr().out
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.bin", "model.param"]
    # What cannot be is said before there is a model, which may take long to load.
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: pytest.fail("built"))
    for arguments, words in (
        (("--out", str(tmp_path / "m.ncnn")), "--out: expected a name that ends in .param"),
        (("--out", str(tmp_path / "m.ncnn"), "--tolerance", "0"), "--out: expected a name that ends in .param"),
        (("--out", str(tmp_path / "m.param"), "--batch", "dynamic"), "--batch: expected 1 with --format ncnn"),
        (("--out", str(tmp_path / "m.param"), "--batch", "2"), "--batch: expected 1 with --format ncnn"),
    ):
        with pytest.raises(SystemExit, match=words):
            run(*arguments)
    assert len(list(tmp_path.iterdir())) == 2
