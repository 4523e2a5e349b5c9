# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Logs, tables and pictures of a run."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Engine
from matplotlib.figure import Figure
from test_metrics import complete_batch, score
from test_slices import write_study

import scripts.report
from scripts.metrics import floor_output, mean_of_available
from scripts.report import (
    EvaluationReport,
    ScenarioPanels,
    ScoreLog,
    compare_study,
    demo_picture,
    scenario_panel,
)


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# ------------------------------------------------------------------------------------------------------- score log
def log_scores(path: Path, epoch: int, log_dir: Path | None = None, **scores: object) -> None:
    """One run of an evaluator that gives these scores."""
    engine = Engine(lambda *_: None)
    ScoreLog(path, log_dir).attach(engine)
    # as MONAI's Evaluator counts: one epoch, by the number of the trainer's
    engine.state.epoch, engine.state.max_epochs = epoch - 1, epoch
    engine.state.metrics.update(scores)
    engine.run([0], max_epochs=epoch)


def test_row_of_the_same_epoch_is_replaced_and_others_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "new" / "validation.csv"
    for epoch, psnr in ((10, 20.0), (2, 10.0), (10, 21.5)):
        log_scores(path, epoch, psnr=psnr, ssim=0.5, key_psnr=psnr, scores={"psnr": psnr})
    rows = read_csv(path)
    assert [(row["epoch"], float(row["psnr"])) for row in rows] == [("2", 10.0), ("10", 21.5)]
    assert list(rows[0]) == ["epoch", "psnr", "ssim"]


def test_log_of_other_scores_can_be_continued(tmp_path: Path) -> None:
    path = tmp_path / "validation.csv"
    log_scores(path, 1, psnr=10.0, old=3.0)
    log_scores(path, 2, psnr=11.0, new=4.0)
    assert read_csv(path) == [
        {"epoch": "1", "psnr": "10.0", "new": ""},
        {"epoch": "2", "psnr": "11.0", "new": "4.0"},
    ]


def test_tensorboard_gets_the_scores_where_it_is_asked_for(tmp_path: Path) -> None:
    log_scores(tmp_path / "a.csv", 1, psnr=10.0)
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]
    log_scores(tmp_path / "a.csv", 1, tmp_path / "board", psnr=10.0)
    (events,) = (tmp_path / "board").iterdir()
    assert b"validation/psnr" in events.read_bytes()


# ---------------------------------------------------------------------------------------------------------- report
def test_report_has_the_means_the_facts_and_every_score(tmp_path: Path) -> None:
    batch = complete_batch(2)
    batch["pred"][:, :4] += 0.1
    names = ["study0", "study1"]
    ours = score(batch, studies=2)
    floor = score(floor_output(mean_of_available)(batch), studies=2, prefix="floor_", with_dice=False)
    weights = tmp_path / "model.pt"
    weights.write_bytes(b"weights")
    engine = Engine(lambda *_: None)
    EvaluationReport([ours, floor], tmp_path / "out", {"part": "test", "weights": str(weights)}).attach(engine)
    engine.run([0])
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert report["means"] == ours.compute() | floor.compute()
    assert {"psnr", "ssim", "dice_WT", "floor_psnr"} <= set(report["means"]) and "floor_dice" not in report["means"]
    facts = report["facts"]
    assert facts["part"] == "test" and facts["studies"] == names
    assert facts["sha256"] == hashlib.sha256(b"weights").hexdigest()
    rows = read_csv(tmp_path / "out" / "scores.csv")
    assert len(rows) == len(ours.rows()) + len(floor.rows()) == 2 * (2 + 2 + 3) + 2 * (2 + 2)
    mean = np.mean([float(row["value"]) for row in rows if row["score"] == "psnr"])
    assert report["means"]["psnr"] == pytest.approx(mean)


# ---------------------------------------------------------------------------------------------------------- panels
def test_panel_shows_truth_and_prediction_of_each_sample() -> None:
    batch = complete_batch(2)
    batch["pred"][:, :4] = torch.rand(batch["target"].shape) * 1.5 - 0.75
    figure = scenario_panel(batch)
    axes = np.array(figure.axes).reshape(2, 10)
    for r in range(2):
        for k in range(4):
            shown = axes[r, 5 + k].images[0].get_array()
            expected = batch["target"] if k >= 2 else batch["pred"]
            np.testing.assert_array_equal(shown, expected[r, k].numpy().T)
            np.testing.assert_array_equal(axes[r, k].images[0].get_array(), batch["target"][r, k].numpy().T)
        titles = [axis.get_title() for axis in axes[r, 5:]]
        assert titles[:4] == ["FLAIR (synthetic)", "T1 (synthetic)", "T1ce (input)", "T2 (input)"]
        assert titles[4] == "T1ce+T2"
        # the class colors of the annotated mask: transparent exactly where there is no tumor
        opaque = axes[r, 4].images[1].get_array()[..., 3] > 0
        np.testing.assert_array_equal(opaque, batch["label"][r, 0].numpy().T > 0)


@pytest.mark.parametrize("batches", [1, 3])
def test_panels_show_the_first_batch_of_each_run(batches: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[float] = []

    def watched(output: dict[str, torch.Tensor]) -> Figure:
        shown.append(float(output["pred"][0, 0, 0, 0]))
        return scenario_panel(output)

    monkeypatch.setattr(scripts.report, "scenario_panel", watched)
    batch = complete_batch(4)
    engine = Engine(lambda _, number: batch | {"pred": torch.full_like(batch["pred"], number)})
    ScenarioPanels(tmp_path, rows=2).attach(engine)
    engine.run([0.1 * (i + 1) for i in range(batches)], max_epochs=2)
    assert shown == [pytest.approx(0.1)] * 2
    (first, second) = tmp_path.iterdir()
    assert all(path.read_bytes().count(b"validation/panel") == 1 for path in (first, second))


# ------------------------------------------------------------------------------------------------- one study's picture
def write_result(truth: dict, folder: Path, key: str, scale: float = 1.0, offset: float = 0.0) -> Path:
    """The true volume as a perfect network would write it, or a little brighter within the brain."""
    image = nib.load(truth[key])
    values = image.get_fdata(dtype=np.float32)
    values = np.clip(values / np.percentile(values[values > 0], 99.5), 0, 1)
    values = scale * np.where(values > 0, values + offset, 0).astype(np.float32)
    folder.mkdir(exist_ok=True, parents=True)
    path = folder / f"{truth['study']}_{key}_synthetic.nii.gz"
    nib.save(nib.Nifti1Image(values, image.affine), path)
    return path


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_perfect_copy_of_a_study_has_the_largest_scores(scale: float, tmp_path: Path) -> None:
    truth = write_study(tmp_path, "Case_1")
    result = {key: write_result(truth, tmp_path / "out", key, scale) for key in ("flair", "t2")}
    scores = compare_study(truth, result, tmp_path / "picture.png", scale)
    floors = ("", "mean_of_available_", "zero_filling_")
    assert set(scores) == {f"{f}{key}_{s}" for f in floors for key in ("flair", "t2") for s in ("psnr", "ssim")}
    for key in ("flair", "t2"):
        assert scores[f"{key}_psnr"] == 100.0 and scores[f"{key}_ssim"] == pytest.approx(1.0, abs=1e-6)
        assert scores[f"zero_filling_{key}_psnr"] < scores[f"mean_of_available_{key}_psnr"] < 20
    assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"


def test_error_of_a_study_is_counted_in_units_of_its_brightest_brain(tmp_path: Path) -> None:
    truth = write_study(tmp_path, "Case_1", mask=False)
    result = {"t1": write_result(truth, tmp_path / "out", "t1", offset=-0.1)}
    scores = compare_study(truth, result, tmp_path / "picture.png")
    # 16 x 12 of 24 x 20 pixels are brain in five slices, 1 x 12 in the sixth; clipping at 0 makes some errors smaller
    squared = 0.1**2 * np.array([16 * 12] * 5 + [1 * 12]) / (24 * 20)
    assert scores["t1_psnr"] == pytest.approx(float(np.mean(-10 * np.log10(squared))), abs=0.4)


def test_picture_of_the_demo_is_of_the_first_test_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    studies = {}
    for name in ("Case_1", "Case_2"):
        (tmp_path / "data" / name).mkdir(parents=True)
        studies[name] = write_study(tmp_path / "data" / name, name)
    (tmp_path / "split.json").write_text(json.dumps({"training": ["Case_1"], "validation": [], "test": ["Case_2"]}))
    folder = tmp_path / "filled" / "Case_2"
    write_result(studies["Case_2"], folder, "t1ce")
    (folder / "Case_2_seg.nii.gz").write_bytes(Path(studies["Case_2"]["seg"]).read_bytes())
    picture = tmp_path / "demo.png"
    scores = demo_picture(tmp_path / "split.json", tmp_path / "data", tmp_path / "filled", picture)
    assert scores["t1ce_psnr"] == 100.0 and picture.is_file()
    printed = capsys.readouterr().out
    assert printed.startswith("Case_2: t1ce PSNR / SSIM 100.00 dB / 1.000 (mean of available ")
    assert printed.count("\n") == 1
