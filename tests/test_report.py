# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Logs and figures of a run, and the report of several."""

from __future__ import annotations

import base64
import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from builders import config_files, generator, make_scores, random_batch, tiny_net, tiny_run, write_scores, write_study
from ignite.engine import Engine
from monai.bundle import ConfigParser

from scripts.contrasts import SCENARIOS, StudyError, scenario_name
from scripts.evaluation.panels import ScenarioPanels, ScoreLog, scenario_panel
from scripts.networks.availability import network_input
from scripts.networks.weights import save_weights
from scripts.research.figures import (
    demo_figure,
    difference_plot,
    one_missing_panel,
    patient_plot,
    predict_one_missing,
    runs_panel,
)
from scripts.research.report import write_report


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


def test_rows_from_the_same_epoch_on_are_replaced_and_others_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "new" / "validation.csv"
    for epoch, psnr in ((10, 20.0), (2, 10.0), (10, 21.5)):
        log_scores(path, epoch, psnr=psnr, ssim=0.5, key_psnr=psnr, scores={"psnr": psnr})
    rows = read_csv(path)
    assert [(row["epoch"], float(row["psnr"])) for row in rows] == [("2", 10.0), ("10", 21.5)]
    assert list(rows[0]) == ["epoch", "psnr", "ssim"] and list(path.parent.iterdir()) == [path]
    # a log of other scores is continued, and TensorBoard gets them where it is asked for
    log_scores(path, 11, tmp_path / "board", psnr=11.0, new=4.0)
    assert read_csv(path)[1:] == [
        {"epoch": "10", "psnr": "21.5", "new": ""},
        {"epoch": "11", "psnr": "11.0", "new": "4.0"},
    ]
    (events,) = (tmp_path / "board").iterdir()
    assert b"validation/psnr" in events.read_bytes()
    log_scores(path, 3, psnr=9.0)  # of a training that began anew
    assert [row["epoch"] for row in read_csv(path)] == ["2", "3"]


# ---------------------------------------------------------------------------------------------------------- panels
def filled_in(number: int) -> dict[str, torch.Tensor]:
    """Output of an evaluator for slices of which T1ce and T2 were given."""
    available = torch.tensor([[False, False, True, True]]).expand(number, -1)
    batch = {**random_batch(available, (16, 12)), "available": available}
    scenario = [scenario_name(row) for row in SCENARIOS].index("T1ce+T2")
    pred = torch.rand((number, 7, 16, 12), generator=generator(5)) * 1.5 - 0.75
    return {**batch, "pred": pred, "scenario": torch.full((number,), scenario)}


def test_panel_shows_target_and_prediction_of_each_sample() -> None:
    batch = filled_in(2)
    axes = np.array(scenario_panel(batch).axes).reshape(2, 10)
    for r in range(2):
        for k in range(4):
            expected = batch["target"] if k >= 2 else batch["pred"]
            np.testing.assert_array_equal(axes[r, 5 + k].images[0].get_array(), expected[r, k].numpy().T)
            np.testing.assert_array_equal(axes[r, k].images[0].get_array(), batch["target"][r, k].numpy().T)
        titles = [axis.get_title() for axis in axes[r, 5:]]
        assert titles == ["FLAIR (synthetic)", "T1 (synthetic)", "T1ce (input)", "T2 (input)", "T1ce+T2"]
        # the class colors of the annotated mask: transparent exactly where there is no tumor
        opaque = axes[r, 4].images[1].get_array()[..., 3] > 0
        np.testing.assert_array_equal(opaque, batch["label"][r, 0].numpy().T > 0)


@pytest.mark.parametrize("batches", [1, 3])
def test_every_evaluation_has_one_panel(batches: int, tmp_path: Path) -> None:
    batch = filled_in(4)
    engine = Engine(lambda *_: batch)
    ScenarioPanels(tmp_path, rows=2).attach(engine)
    engine.run(range(batches), max_epochs=2)
    (file,) = tmp_path.iterdir()
    assert file.read_bytes().count(b"validation/panel") == 2


# --------------------------------------------------------------------------------------------------------- one study
def write_result(target: dict, folder: Path, key: str, offset: float = 0.0) -> Path:
    """The true volume as a perfect network would write it, or a little brighter within the brain."""
    image = nib.load(target[key])
    values = image.get_fdata(dtype=np.float32)
    values = np.clip(values / np.percentile(values[values > 0], 99.5), 0, 1)
    values = np.where(values > 0, values + offset, 0).astype(np.float32)
    folder.mkdir(exist_ok=True, parents=True)
    path = folder / f"{target['study']}_{key}_synthetic.nii.gz"
    nib.save(nib.Nifti1Image(values, image.affine), path)
    return path


def test_perfect_copy_of_the_first_test_study_has_the_largest_scores(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    target = write_study(tmp_path / "data", "Case_1")
    for key in ("flair", "t1", "t1ce", "t2"):  # as BraTS has it, from left to right and back to front
        volume = np.asarray(nib.load(target[key]).dataobj)
        nib.save(nib.Nifti1Image(volume, np.diag((-1, -1, 1, 1))), target[key])
    for key in ("flair", "t2"):
        write_result(target, tmp_path / "out" / "Case_1", key)
    (tmp_path / "out" / "Case_1" / "Case_1_seg.nii.gz").write_bytes(Path(target["seg"]).read_bytes())
    (tmp_path / "split.json").write_text(json.dumps({"training": ["Case_2"], "validation": [], "test": ["Case_1"]}))
    path = tmp_path / "study.png"
    scores = demo_figure(str(tmp_path / "split.json"), tmp_path / "data", tmp_path / "out", path)
    reference_methods = ("", "mean_of_available_", "zero_filling_")
    assert set(scores) == {
        f"{f}{key}_{s}" for f in reference_methods for key in ("flair", "t2") for s in ("psnr", "ssim")
    }
    for key in ("flair", "t2"):
        assert scores[f"{key}_psnr"] == 100.0 and scores[f"{key}_ssim"] == pytest.approx(1.0, abs=1e-6)
        assert scores[f"zero_filling_{key}_psnr"] < scores[f"mean_of_available_{key}_psnr"] < 20
    assert path.read_bytes()[:4] == b"\x89PNG"
    printed = capsys.readouterr().out
    assert printed.startswith("Case_1: flair PSNR / SSIM 100.00 dB / 1.000 (mean of available ")
    assert printed.count("\n") == 1


def test_error_of_a_study_is_counted_in_units_of_its_brightest_brain(tmp_path: Path) -> None:
    target = write_study(tmp_path, "Case_1", mask=False)
    write_result(target, tmp_path / "out" / "Case_1", "t1", offset=-0.1)
    scores = demo_figure("Case_1", tmp_path, tmp_path / "out", tmp_path / "study.png")
    # 16 x 12 of 24 x 20 pixels are brain in five slices, 1 x 12 in the sixth; clipping at 0 makes some errors smaller
    squared = 0.1**2 * np.array([16 * 12] * 5 + [1 * 12]) / (24 * 20)
    assert scores["t1_psnr"] == pytest.approx(float(np.mean(-10 * np.log10(squared))), abs=0.4)


# ------------------------------------------------------------------------------------------------------- side by side
def test_each_image_is_made_without_its_own_contrast() -> None:
    network = tiny_net(0).train()
    target = torch.rand(4, 32, 32) * 2 - 1
    target[:, :4] = -1.0  # background of all contrasts
    made = predict_one_missing(network, target)
    assert network.training and made.shape == (4, 32, 32)
    network.eval()
    for k in range(4):
        available = torch.arange(4) != k
        with torch.no_grad():
            alone = network(network_input(target[None], available[None]))[0, k]
        torch.testing.assert_close(made[k, 4:], alone[4:])
        assert bool((made[k, :4] == -1).all())
        # the missing contrast is not read
        other = torch.where(available[:, None, None], target, torch.rand_like(target))
        assert torch.equal(predict_one_missing(network, other)[k], made[k])


def test_methods_stand_side_by_side_with_their_errors_and_the_box_of_the_tumor() -> None:
    target = torch.full((4, 24, 20), -1.0)
    target[:, 3:21, 2:18] = torch.rand(4, 18, 16) * 1.8 - 0.9
    label = torch.zeros(1, 24, 20)
    label[0, 8:11, 5:12] = 2
    made = {"A": target.clone(), "B": target + 0.2}
    figure = one_missing_panel(target, label, made)
    axes = np.array(figure.axes).reshape(8, 6)
    for k, name in enumerate(("FLAIR", "T1", "T1ce", "T2")):
        titles = [axis.get_title() for axis in axes[2 * k]]
        others = [f"{other} (input)" for other in ("FLAIR", "T1", "T1ce", "T2") if other != name]
        assert titles == [*others, f"{name}, target", f"{name}, A", f"{name}, B"]
        # cut to the brain, which begins at 3, 2
        np.testing.assert_array_equal(axes[2 * k, 5].images[0].get_array(), made["B"][k, 3:21, 2:18].numpy().T)
        np.testing.assert_allclose(axes[2 * k + 1, 5].images[0].get_array(), 0.1, atol=1e-6)
        assert float(np.abs(axes[2 * k + 1, 4].images[0].get_array()).max()) == 0
        for axis in axes[2 * k]:
            (box,) = axis.patches
            assert box.get_xy() == (8 - 3 - 0.5, 5 - 2 - 0.5) and (box.get_width(), box.get_height()) == (3, 7)
    assert not one_missing_panel(target, torch.zeros(24, 20), made).axes[0].patches
    with pytest.raises(ValueError, match="no brain"):
        one_missing_panel(torch.full((4, 8, 8), -1.0), label[:, :8, :8], made)


def test_panel_of_runs_takes_the_slice_with_the_largest_tumor(tmp_path: Path, phantom_cohort: Path) -> None:
    runs = {}
    for name, configs in (("SSCF", ("train",)), ("U-Net", ("train", "baselines/unet"))):
        overrides = tiny_run(phantom_cohort, tmp_path, ckpt_path=str(tmp_path / f"{name}.pt"), device="cpu")
        parser = ConfigParser()
        parser.read_config(config_files(*configs))
        parser.update(overrides)
        save_weights(tmp_path / f"{name}.pt", parser.get_parsed_content("network_def"))
        runs[name] = {"config_file": config_files(*configs), **overrides}
    figure = runs_panel(runs)
    (study,) = (item["study"] for item in parser.get_parsed_content("cohort").parts["test"])
    axes = np.array(figure.axes).reshape(8, 6)
    assert [axis.get_title() for axis in axes[0, 4:]] == ["FLAIR, SSCF", "FLAIR, U-Net"]
    assert axes[0, 0].patches  # it has tumor
    shown = [axes[0, column].images[0].get_array() for column in (4, 5)]
    assert not np.allclose(*shown)
    with pytest.raises(StudyError, match="Study Nobody is not in the test part of SSCF"):
        runs_panel(runs, study="Nobody")
    assert runs_panel({"SSCF": runs["SSCF"]}, study=study).axes


def test_plots_show_every_patient_and_every_interval() -> None:
    axis = patient_plot({"A": [1.0, 2.0, 4.0], "B": [3.0]}, "PSNR").axes[0]
    points = [line.get_ydata() for line in axis.lines if line.get_marker() == "."]
    assert [list(p) for p in points] == [[1.0, 2.0, 4.0], [3.0]]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["A", "B"]
    rows = {"A": {"mean": 0.5, "low": 0.2, "high": 0.9}, "B": {"mean": 1.0, "low": None, "high": None}}
    axis = difference_plot(rows, "difference").axes[0]
    (points, _, (intervals,)) = axis.containers[0]
    assert list(points.get_xdata()) == [0.5, 1.0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["A", "B"]
    (first, second) = intervals.get_segments()
    np.testing.assert_allclose(first[:, 0], [0.2, 0.9])
    assert not second.size


# -------------------------------------------------------------------------------------------------------------- report
class Page(HTMLParser):
    """Texts of the table cells, sources of everything that a browser would load, and open tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.sources: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [str(value) for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.cells[-1] += data


def test_report_holds_tables_figures_and_metadata_and_loads_nothing(tmp_path: Path) -> None:
    metadata = {"image_size": 96, "protocols": {"per_slice": "2-D <slices>"}}
    runs = {
        "U-Net": str(write_scores(tmp_path / "unet", make_scores(0), **metadata)),
        "A & B": str(write_scores(tmp_path / "sscf", make_scores(1, 3.0), **metadata)),
    }
    parser = ConfigParser()
    parser.read_config(config_files("report"))
    parser.update({"bundle_root": str(Path(config_files("report")[0]).parents[1]), "runs": runs})
    parser.update({"report_dir": str(tmp_path / "out"), "bootstrap_samples": 50})
    parser.get_parsed_content("run")
    text = (tmp_path / "out" / "index.html").read_text()
    page = Page(text)
    assert page.open == []
    for source in page.sources:
        assert source.startswith("data:image/png;base64,")
        assert base64.b64decode(source.partition(",")[2], validate=True)[:4] == b"\x89PNG"
    # differences and patients of PSNR, LPIPS and Dice
    assert len(page.sources) == 2 * 3
    assert "http" not in text and "<script" not in text and "@import" not in text
    assert {"A & B", "96", "0123456789abcdef", "24.21"} <= set(page.cells)
    assert "2-D &lt;slices&gt;" in text and "Not to be compared with our numbers digit by digit" in text
    numbers = re.findall(r"\*\*(\d+\.\d+)\*\*", (tmp_path / "out" / "tables" / "comparison.md").read_text())
    assert len(numbers) == 8 and set(numbers) <= set(page.cells)
    remark = [cell for cell in page.cells if cell.startswith("PSNR +")]
    assert remark and "difference from U-Net" in page.cells
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["index.html", "tables"]


def test_report_of_nothing_ends_with_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"no scores\.csv in .*none: evaluate this run first"):
        write_report({"A": str(tmp_path / "none")}, tmp_path / "out", {})
    folder = write_scores(tmp_path / "a", make_scores(0))
    with pytest.raises(StudyError, match="reference has no B: choose from A"):
        write_report({"A": str(folder)}, tmp_path / "out", {}, reference="B")
    assert not (tmp_path / "out").exists()
