"""The study of alignment for video, in small: clips and their flow, arms, table, resuming."""

import json
import statistics

import pytest
import torch

for _name in ("pytorch_lightning", "timm", "mmengine", "torchmetrics", "torchvision", "sklearn", "matplotlib"):
    pytest.importorskip(_name)
from matplotlib.image import imread  # noqa: E402
from studies.moving_digits import MovingDigits  # noqa: E402
from studies.video import ARMS, Restorer, load_network, run_study, warp  # noqa: E402

from dcn_plugin.layers import SecondOrderDeformableAlignment, sampling_layers  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = dict(train_clips=4, test_clips=2, batch_size=2, epochs=2, channels=4, offset_groups=2, frames=3, size=24)
CLIPS = dict(clips=3, frames=4, size=40, digits=2, speed=2.0, noise=0.0, flow_error=0.0, seed=0)


def test_flows_lead_to_the_frame_before():
    """Of the whole frame but its border and the digits' edges, where a sample mixes two layers."""
    for clip in [MovingDigits("train", **CLIPS)[index] for index in range(3)]:
        assert clip.noisy.shape == clip.clean.shape == (4, 1, 40, 40) and clip.flows.shape == (3, 2, 40, 40)
        assert torch.equal(clip.noisy, clip.clean) and 0 <= clip.clean.min() and clip.clean.max() <= 1
        found, wanted = warp(clip.clean[:-1], clip.flows), clip.clean[1:]
        inside = (slice(None), slice(None), slice(3, -3), slice(3, -3))
        still = (clip.clean[:-1] - wanted)[inside].abs().mean()
        assert (found - wanted)[inside].abs().mean() < 0.5 * still
        assert (found - wanted)[inside].abs().median() < 0.02 < still


def test_all_pixels_of_a_texture_move_alike():
    """Without digits every pixel moves alike, and a frame is the one before, moved."""
    clip = MovingDigits("train", **CLIPS | dict(digits=0, clips=1))[0]
    flow = clip.flows[0, :, 0, 0]
    assert (clip.flows == flow[:, None, None]).all() and 0 < flow.abs().max() <= 2
    rows, columns = torch.meshgrid(torch.arange(40), torch.arange(40), indexing="ij")
    x, y = (columns + flow[0]).round().long(), (rows + flow[1]).round().long()
    near = ((x >= 0) & (x < 40) & (y >= 0) & (y < 40))[3:-3, 3:-3]
    assert near.any()
    moved = clip.clean[0, 0][y.clamp(0, 39), x.clamp(0, 39)]
    error = (moved - clip.clean[1, 0]).abs()[3:-3, 3:-3][near].mean()
    wrong = clip.clean[0, 0][(2 * rows - y).clamp(0, 39), (2 * columns - x).clamp(0, 39)]  # the other way
    assert error < 0.5 * (wrong - clip.clean[1, 0]).abs()[3:-3, 3:-3].mean()


def test_clips_follow_from_seed_split_and_number():
    options = CLIPS | dict(noise=0.3, flow_error=1.5)
    one, again = MovingDigits("train", **options), MovingDigits("train", **options)
    assert all(torch.equal(a, b) for a, b in zip(one[1], again[1], strict=True))
    others = MovingDigits("test", **options)[1], MovingDigits("train", **options | dict(seed=1))[1], one[2]
    assert all(not torch.equal(one[1].clean, other.clean) for other in others)
    clean = MovingDigits("train", **CLIPS)
    assert (one[1].noisy - one[1].clean).std() == pytest.approx(0.3, rel=0.05)
    assert torch.equal(one[1].clean, clean[1].clean)
    assert 0.5 < (one[1].flows - clean[1].flows).std() < 2
    with pytest.raises(IndexError):
        one[3]


def test_warping_is_torchs_grid_sample():
    x, flow = torch.randn(2, 3, 8, 9), 3 * torch.randn(2, 2, 8, 9)
    rows, columns = torch.meshgrid(torch.arange(8), torch.arange(9), indexing="ij")
    grid = torch.stack((2 * (columns + flow[:, 0]) / 8 - 1, 2 * (rows + flow[:, 1]) / 7 - 1), -1)
    expected = torch.nn.functional.grid_sample(x, grid, align_corners=True)
    torch.testing.assert_close(warp(x, flow), expected, rtol=1e-4, atol=1e-4)


def test_the_flow_to_the_second_frame_is_composed():
    """Of a constant velocity it is twice the flow, but for what comes from outside."""
    network = Restorer("deformable", 4, 2)
    seen = []
    network.align.merge.register_sampling_hook(lambda layer, samples: seen.append(samples.offset))
    flows = torch.tensor([1.0, -2.0]).view(1, 1, 2, 1, 1).expand(1, 3, 2, 12, 12)
    network(torch.rand(1, 4, 1, 12, 12), flows)
    assert [offset[0, [0, 1, -2, -1], 6, 6].tolist() for offset in seen] == [
        [-2.0, 1.0, 0.0, 0.0], [-2.0, 1.0, -4.0, 2.0], [-2.0, 1.0, -4.0, 2.0],
    ]  # fmt: skip


def test_arms_table_picture_and_what_is_finished(tmp_path, capsys):
    study = run_study(tmp_path, [0, 1], options=SMALL, progress=False)
    rows = {row["arm"]: row for row in study["rows"]}
    assert list(rows) == list(ARMS)
    for arm, row in rows.items():
        assert row["psnr"]["mean"] == pytest.approx(statistics.fmean(row["psnr"]["values"]))
        network = load_network(tmp_path / "seed0" / arm / "network.pt")
        assert row["parameters"] == sum(p.numel() for p in network.parameters())
        assert bool(sampling_layers(network)) == (arm == "deformable")
        # What the table says is what the file gives: the mean over all pixels of both clips, by hand.
        values = SMALL | dict(digits=2, speed=3.0, noise=0.25, flow_error=1.0)
        how = {name: values[name] for name in ("frames", "size", "digits", "speed", "noise", "flow_error")}
        clips = MovingDigits("test", 2, seed=0, **how)
        noisy, clean, flows = (torch.stack(part) for part in zip(*(clips[0], clips[1]), strict=True))
        with torch.no_grad():
            error = (network(noisy, flows).clamp(0, 1) - clean).square().mean()
        assert row["psnr"]["values"][0] == pytest.approx(-10 * error.log10().item(), abs=1e-3)
    assert rows["none"]["parameters"] == rows["flow"]["parameters"] < rows["deformable"]["parameters"]
    assert isinstance(network.align.merge, SecondOrderDeformableAlignment)
    lines = study["table"].splitlines()
    assert len(lines) == 5 and len({len(line) for line in lines}) == 1 and "±" in study["table"]
    assert (tmp_path / "results.md").read_text() == study["table"]
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == study["rows"]
    assert imread(study["files"]["restored"]).std() > 0.01
    capsys.readouterr()
    assert run_study(tmp_path, [0, 1], options=SMALL, progress=False)["rows"] == study["rows"]
    assert capsys.readouterr().out.count("reused") == 6


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run_study(tmp_path_factory.mktemp("whole"), [0], ["deformable"], SMALL, progress=False)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_arm_goes_on_where_it_was(tmp_path, capsys, monkeypatch, error, whole):
    draw, drawn = MovingDigits.__getitem__, []

    def stops(clips, index):
        drawn.append(index)
        if len(drawn) == 6:  # in the second of two epochs of four clips
            raise error("stopped")
        return draw(clips, index)

    with monkeypatch.context() as patch:
        patch.setattr(MovingDigits, "__getitem__", stops)
        with pytest.raises((error, SystemExit)):
            run_study(tmp_path / "parts", [0], ["deformable"], SMALL, progress=False)
    assert not (tmp_path / "parts" / "seed0" / "deformable" / "network.pt").exists()
    capsys.readouterr()
    parts = run_study(tmp_path / "parts", [0], ["deformable"], SMALL, progress=False)
    assert "resumed" in capsys.readouterr().out
    assert parts["rows"][0]["psnr"]["values"] == whole["rows"][0]["psnr"]["values"]


@pytest.mark.parametrize(
    ("arms", "options", "message"),
    [
        ([], {}, "arms: expected some of none, flow, deformable"),
        (["flow", "flow"], {}, "arms: .*each once"),
        (["warp"], {}, "arms: expected some of"),
        (["flow"], dict(chanels=3), "options: unknown key 'chanels'"),
        (["flow"], dict(epochs=0), "epochs: expected 1 or more, got 0"),
        (["flow"], dict(noise=float("nan")), "noise: expected 0 or more, got nan"),
        (["none", "deformable"], dict(offset_groups=3), "in_channels: expected a multiple of offset_groups"),
    ],
)
def test_what_cannot_be_right_is_told_before_training(tmp_path, arms, options, message):
    with pytest.raises(ValueError, match=message):
        run_study(tmp_path / "work", [0], arms, options)
    with pytest.raises(TypeError, match="epochs: expected an integer, got 1.5"):
        run_study(tmp_path / "work", [0], ["flow"], dict(epochs=1.5))
    assert not (tmp_path / "work").exists()
