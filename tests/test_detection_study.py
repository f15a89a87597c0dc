"""The study of deformable RoI pooling in detectors, in small: stages, table, pictures."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

for _name in (
    "pytorch_lightning", "timm", "mmengine", "torchmetrics", "torchvision", "sklearn", "pycocotools", "matplotlib",
):  # fmt: skip
    pytest.importorskip(_name)
from matplotlib.image import imread  # noqa: E402
from studies.detection import ARMS, run_study  # noqa: E402
from studies.stages import over_seeds, percent, write_table  # noqa: E402

from dcn_plugin.finetune import load_exported, run  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs" / "detection"
PAIR = ["rfcn", "rfcn-deformable"]


def small(tmp_path):
    return {
        "data.root": str(tmp_path / "scenes"), "data.scenes": dict(train=4, val=2, test=5), "data.batch_size": 2,
        "trainer.max_epochs": 1, "trainer.enable_progress_bar": False, "model.box_score_thresh": 0.0,
    }  # fmt: skip


def test_study_gives_numbers_table_and_pictures_and_reuses_what_is_finished(tmp_path, capsys):
    work_dir, options = tmp_path / "work", small(tmp_path)
    study = run_study(CONFIGS, work_dir, [0, 1], PAIR, options)
    rows = {row["arm"]: row for row in study["rows"]}
    assert list(rows) == PAIR
    for arm, row in rows.items():
        assert row["parameters"] == sum(
            p.numel() for p in load_exported(work_dir / "seed0" / arm / "export").parameters()
        )
        for name in ("AP", "AP50", "AP75", "train_seconds", "cpu_seconds"):
            assert row[name]["mean"] == pytest.approx(statistics.fmean(row[name]["values"]))
            assert row[name]["spread"] == pytest.approx(statistics.stdev(row[name]["values"]))
        assert all(0 <= value <= 1 for value in row["AP50"]["values"]) and row["cpu_seconds"]["mean"] > 0
    assert rows["rfcn"]["parameters"] < rows["rfcn-deformable"]["parameters"]
    # What the table says is what testing the checkpoint again says.
    stage = json.loads((work_dir / "seed1" / "rfcn-deformable" / "result.json").read_text())
    assert stage["config"]["seed"] == 1
    tested = run(stage["config"], tmp_path / "again", "test", stage["checkpoint"])
    assert tested["test_map"] == rows["rfcn-deformable"]["AP"]["values"][1] == stage["AP"]

    lines = study["table"].splitlines()
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1 and "±" in study["table"]
    assert (work_dir / "results.md").read_text() == study["table"]
    written = json.loads((work_dir / "results.json").read_text())
    assert written["seeds"] == [0, 1] and written["rows"] == study["rows"]
    assert set(study["files"]) == {"results", "rfcn_detections", "rfcn-deformable_detections", "rfcn-deformable_bins"}
    for name in set(study["files"]) - {"results"}:
        pixels = imread(study["files"][name])
        assert min(pixels.shape[:2]) > 100 and pixels.std() > 0.01, name

    capsys.readouterr()
    again = run_study(CONFIGS, work_dir, [0, 1], PAIR, options)
    printed = capsys.readouterr().out
    assert printed.count("reused") == 4 and "started" not in printed and again["rows"] == study["rows"]
    # As if the power had gone between the last epoch and the evaluation of one arm; the other is another budget.
    state = work_dir / "seed0" / "rfcn" / "result.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "finished": False}))
    resumed = run_study(CONFIGS, work_dir, [0], PAIR, options)
    printed = capsys.readouterr().out
    assert printed.count("reused") == 1 and printed.count("resumed") == 1 and "started" not in printed
    assert resumed["rows"][0]["AP"]["values"] == rows["rfcn"]["AP"]["values"][:1]
    assert resumed["rows"][0]["AP"]["spread"] is None and "±" not in resumed["table"]
    assert resumed["rows"][0]["train_seconds"]["mean"] > rows["rfcn"]["train_seconds"]["values"][0]


def test_script_runs_an_arm(tmp_path):
    options = [f"{key}={value}" for key, value in small(tmp_path).items() if key != "data.scenes"]
    options += ["data.scenes.train=2", "data.scenes.val=1", "data.scenes.test=1", "model.min_size=64"]
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "detection_study.py", "--arms", "faster-rcnn-deformable", "--work-dir", "w",
         "--cfg-options", *options, "model.max_size=64"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "| Faster R-CNN | deformable" in done.stdout and "w/pictures/faster-rcnn-deformable_bins.png" in done.stdout
    assert (tmp_path / "w" / "seed0" / "faster-rcnn-deformable" / "best.ckpt").is_file()


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(
    ("seeds", "message"),
    [([], "at least one"), ([0, 0], "each once"), ([-1], "got -1"), ([0.5], "got 0.5"), ([True], "got True")],
)
def test_bad_seeds_are_named(tmp_path, seeds, message):
    from studies.digits import run_study as run_digits

    with pytest.raises(ValueError, match=f"seeds: .*{message}"):
        run_study(CONFIGS, tmp_path, seeds)
    with pytest.raises(ValueError, match=f"seeds: .*{message}"):
        run_digits(CONFIGS, tmp_path, seeds)
    assert not list(tmp_path.iterdir())


def test_an_unknown_option_is_named_before_training(tmp_path):
    with pytest.raises(ValueError, match="data: unknown key 'scens'"):
        run_study(CONFIGS, tmp_path, [0], ["rfcn"], {"data.scens": 3})


def test_every_arm_has_a_config():
    for _, _, config in ARMS.values():
        assert (CONFIGS / config).is_file()


def test_mean_spread_and_table_by_hand():
    outcomes = [dict(AP=value, train_seconds=10.0, cpu_seconds=8.0) for value in (0.5, 0.6, 0.7)]
    row = over_seeds(outcomes, ["AP"])
    assert row["AP"]["mean"] == pytest.approx(0.6) and row["AP"]["spread"] == pytest.approx(0.1)
    assert percent(row["AP"]) == "60.0 ± 10.0" and percent(over_seeds(outcomes[:1], ["AP"])["AP"]) == "50.0"
    assert write_table(["a", "long"], [["more", "b"]]) == "| a    | long |\n|------|------|\n| more | b    |\n"
