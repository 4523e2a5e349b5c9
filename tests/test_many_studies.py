# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Many studies in one run: finished ones are skipped, parts are run apart, and a table and a page show all of them."""

from __future__ import annotations

import csv
import json
import os
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from builders import bundle_workflow
from monai.data import MetaTensor
from PIL import Image
from studies import LPS, PREPROCESSING, TINY, brain_volume, evaluate, hidden, load, results, write_study

from scripts.contrasts import StudyError
from scripts.data.datalist import find_studies
from scripts.inference.panel import draw_panel
from scripts.inference.postprocessing import FinishPredictiond, study_scale
from scripts.inference.preprocessing import list_studies
from scripts.inference.resume import describe_file
from scripts.inference.summary import write_summary
from scripts.inference.writer import StudyWriter
from scripts.networks.sscf import SSCFNet
from scripts.networks.weights import save_weights

#: FLAIR is twice as bright as T1 and T1ce; nobody had T2 with FLAIR.
STATISTICS = {
    "log_ratios": [
        [0.0, np.log(2), np.log(2), None],
        [-np.log(2), 0.0, 0.0, 0.5],
        [-np.log(2), 0.0, 0.0, 0.5],
        [None, -0.5, -0.5, 0.0],
    ],
    "studies": 3,
}


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_weights(tmp_path / "model.pt", SSCFNet(**TINY), {"preprocessing": PREPROCESSING, "intensities": STATISTICS})
    return tmp_path / "model.pt"


def run(tmp_path: Path, run_id: str = "inference", **settings: object) -> int:
    """A run of ``inference.json`` over ``in`` into ``out``; gives how many studies were computed."""
    paths = {"dataset_dir": tmp_path / "in", "output_dir": tmp_path / "out", "ckpt_path": tmp_path / "model.pt"}
    run_id = "run" if run_id == "inference" else run_id
    made = bundle_workflow("inference", run_id=run_id, **{**paths, "amp": False, "handlers": [], **settings})
    made.run()
    return len(made.evaluator.seconds) if run_id == "run" else 0


def test_finished_studies_are_skipped_until_something_changes(tmp_path: Path, weights: Path) -> None:
    paths = {name: write_study(tmp_path / "in" / name, ["t1", "t2"], name) for name in ("A1", "B2", "C3")}
    assert run(tmp_path) == 3
    before = results(tmp_path / "out")
    assert run(tmp_path) == 0 and results(tmp_path / "out") == before
    # a new time alone changes nothing, new content does, and so does a result that is gone
    os.utime(paths["A1"]["t1"], ns=(1, 1))
    nib.save(nib.Nifti1Image(brain_volume(5), LPS), paths["B2"]["t2"])
    (tmp_path / "out" / "C3" / "C3_seg.nii.gz").unlink()
    assert run(tmp_path) == 2
    # another contrast, other settings, other weights, or the wish
    write_study(tmp_path / "in" / "A1", ["flair"], "A1")
    assert run(tmp_path) == 1
    assert run(tmp_path, output_scale=1000.0) == 3
    save_weights(weights, SSCFNet(**TINY), {"preprocessing": PREPROCESSING})
    assert run(tmp_path, output_scale=1000.0) == 3
    assert run(tmp_path, output_scale=1000.0) == 0
    assert run(tmp_path, output_scale=1000.0, overwrite=True) == 3


@pytest.mark.parametrize("values", [".img", ".img.gz"])
@pytest.mark.parametrize("named", ["header", "values"])
def test_content_of_a_pair_of_files_is_that_of_both(tmp_path: Path, values: str, named: str) -> None:
    for ending in (".hdr", values):
        (tmp_path / f"a{ending}").write_bytes(b"old")
    path = str(tmp_path / ("a.hdr" if named == "header" else f"a{values}"))
    before = describe_file(path)
    for ending in (".hdr", values):
        (tmp_path / f"a{ending}").write_bytes(b"new")
        after = describe_file(path)
        assert after["sha256"] != before["sha256"]
        before = after


@pytest.mark.parametrize("naming", ["study", "bids"])
def test_study_whose_name_cannot_be_written_fails_before_the_network_and_stops_no_other(
    tmp_path: Path, weights: Path, naming: str
) -> None:
    paths = write_study(tmp_path / "in", ["t1"])
    wrong = ["a/b", "../x", ".x", "x" * 300] + (["\u00fc"] if naming == "bids" else [])
    rows = [{"study": name, "t1": paths["t1"]} for name in (*wrong, "good")]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    settings = {"dataset_dir": None, "datalist_file": str(tmp_path / "list.json"), "naming": naming}
    paths = {"output_dir": tmp_path / "out", "ckpt_path": weights, "amp": False, "handlers": []}
    workflow = bundle_workflow("inference", **paths, **settings)
    with pytest.raises(StudyError, match=f"{len(wrong)} of {len(wrong) + 1} studies failed"):
        workflow.run()
    assert list(workflow.evaluator.seconds) == ["good"]  # type: ignore[attr-defined]
    reasons = [failure["reason"] for failure in json.loads((tmp_path / "out" / "failures.json").read_text())]
    assert all(reason.endswith(": give another name.") for reason in reasons)


def test_broken_off_run_goes_on_and_ends_with_the_same_files(tmp_path: Path, weights: Path) -> None:
    for name in ("A1", "B2", "C3"):
        write_study(tmp_path / "in" / name, ["t1"], name)
    run(tmp_path, output_dir=str(tmp_path / "whole"))
    run(tmp_path, shard="1/3")
    # what a kill leaves of the next study
    (tmp_path / "out" / f".B2.{'0' * 32}.new").mkdir()
    (tmp_path / "out" / "C3").mkdir()
    (tmp_path / "out" / "C3" / "C3_seg.nii.gz").write_bytes(b"")
    os.utime(tmp_path / "out" / f".B2.{'0' * 32}.new", (1, 1))
    assert run(tmp_path) == 2 and not hidden(tmp_path / "out")
    whole, resumed = results(tmp_path / "whole"), results(tmp_path / "out")
    for found in (whole, resumed):
        assert found.pop("index.html") and found.pop("summary.csv")  # they name times
    assert whole == resumed


def test_parts_make_the_whole_with_one_table(tmp_path: Path, weights: Path) -> None:
    names = [f"S{i}" for i in range(5)]
    for name in names:
        write_study(tmp_path / "in" / name, ["t1"], name)
    (tmp_path / "in" / "S3" / "S3_t1.nii.gz").write_bytes(b"damaged")
    found = [[item["study"] for item in list_studies(tmp_path / "in", shard=f"{part}/3")] for part in (1, 2, 3)]
    assert found == [["S0", "S3"], ["S1", "S4"], ["S2"]]
    for part in (1, 2, 3):
        try:
            run(tmp_path, shard=f"{part}/3")
        except StudyError as error:
            assert part == 1 and "failures_1_of_3.json" in str(error)
    (tmp_path / "out" / "summary.csv").unlink()
    run(tmp_path, "summarizing")
    rows = list(csv.DictReader((tmp_path / "out" / "summary.csv").open()))
    assert [(row["study"], row["status"]) for row in rows] == [
        (name, "failed" if name == "S3" else "written") for name in names
    ]
    # a whole run takes the place of its parts
    write_study(tmp_path / "in" / "S3", ["t1"], "S3")
    assert run(tmp_path) == 1 and not list((tmp_path / "out").glob("failures*"))
    for wrong in ("4/3", "0/3", "half"):
        with pytest.raises(StudyError, match="shard must be a part"):
            list_studies(tmp_path / "in", shard=wrong)
    one = tmp_path / "in" / "S3" / "S3_t1.nii.gz"
    for given, words in (
        ({"dataset_dir": tmp_path / "in", "t1": one}, "more than one is given"),
        ({"dataset_dir": tmp_path / "in", "study": "S3"}, "study names the study of flair, "),
        ({"t1": one, "shard": "2/4"}, "shard is a part of many studies"),
    ):
        with pytest.raises(StudyError, match=words):
            list_studies(**given)


def test_table_and_page_show_what_the_records_say(tmp_path: Path) -> None:
    findings = {
        "scores": {"doubt": 0.123456, "contrasts": {"t1": {"far": 2}}},
        "verdict": "review",
        "reasons": ["far", "dark"],
    }
    findings |= {"checks": {"skull": "left on"}, "seconds": 1.26}
    for name, more in (("A1", {"checks": {"skull": "not judged"}}), ("<b>B2", findings)):
        folder = tmp_path / name
        folder.mkdir()
        record = {"study": name, "available": ["T1"], "synthesized": ["T2"], **more}
        (folder / f"{name}_synthesis.json").write_text(json.dumps(record))
    (tmp_path / "<b>B2" / "<b>B2_panel.png").write_bytes(b"")
    (tmp_path / ".C3.new").mkdir()
    (tmp_path / ".C3.new" / "C3_synthesis.json").write_text(json.dumps({"study": "C3"}))
    (tmp_path / "failures.json").write_text(json.dumps([{"study": "D4", "reason": "is <damaged>"}]))
    write_summary(tmp_path)
    by_name = {row["study"]: row for row in csv.DictReader((tmp_path / "summary.csv").open())}
    assert sorted(by_name) == ["<b>B2", "A1", "D4"]
    told = by_name["<b>B2"]
    assert (told["verdict"], told["reasons"], told["checks"]) == ("review", "far dark", "skull: left on")
    assert (told["score doubt"], told["score contrasts t1 far"], told["seconds"]) == ("0.1235", "2", "1.3")
    assert by_name["D4"]["reasons"] == "is <damaged>" and by_name["A1"]["verdict"] == ""
    page = (tmp_path / "index.html").read_text()
    # the page has the same columns whatever the rows: no parts of a score, and what checks found in the reasons
    assert "score doubt" in page and "score consistency" in page and "score contrasts" not in page
    assert "left on" not in page and "not judged" in page
    assert "&lt;b&gt;B2" in page and "<b>B2" not in page and "is &lt;damaged&gt;" in page
    assert 'src="%3Cb%3EB2/%3Cb%3EB2_panel.png"' in page and "3 studies, 1 failed" in page
    with pytest.raises(StudyError, match="There is no folder"):
        write_summary(tmp_path / "nowhere")
    # nothing is fetched from elsewhere
    assert "http" not in page and "//" not in page.replace("// what is empty", "")


def test_panel_shows_the_slice_of_the_mask_with_the_right_on_the_left(tmp_path: Path) -> None:
    # the first voxels are at the patient's right front
    acquired, pred = torch.zeros(4, 30, 20, 5, dtype=torch.uint8), torch.zeros(2, 30, 20, 5)
    acquired[1, :, :, 2], acquired[1, :5, :5, 3] = 100, 255
    acquired[1, :, :, 3].clamp_(min=10)
    pred[1, 10:20, 5:15, 3] = 4
    affine = np.diag([-1.0, -1.0, 2.0, 1.0])
    item = {"pred": MetaTensor(pred, affine=affine), "output_keys": ("t2", "seg"), "acquired": acquired}
    item |= {"has_contrast": torch.tensor([False, True, False, False]), "output_scale": {"t2": 1.0}}
    draw_panel(tmp_path / "panel.png", item)
    pixels = np.asarray(Image.open(tmp_path / "panel.png"))
    assert pixels.shape == (236, 2 * 330, 3)
    rows, columns = np.nonzero(pixels[16:, :330].min(axis=2) > 200)
    assert rows.max() < 60 and columns.max() < 60  # the right front is at the top left
    red = (pixels == (255, 60, 60)).all(axis=2)
    assert all(red[:, part * 330 : (part + 1) * 330].any() for part in range(2))
    assert (pixels[-5, 330:] == 0).all()


def test_thousands_of_studies_are_listed_in_seconds(tmp_path: Path) -> None:
    for i in range(2000):
        (tmp_path / f"P{i:05d}").mkdir()
        for key in ("flair", "t1", "t2"):
            (tmp_path / f"P{i:05d}" / f"P{i:05d}_{key}.nii.gz").touch()
    started = time.perf_counter()
    items = find_studies(tmp_path)
    # a few tenths of a second; twenty times that where the time grows with the square
    assert len(items) == 2000 and time.perf_counter() - started < 10


def test_intensities_of_the_study(tmp_path: Path, weights: Path) -> None:
    assert study_scale(STATISTICS, [0, 400.0, 100.0, 0], "flair") == pytest.approx(400)
    with pytest.raises(StudyError, match="do not tell the intensities of t2"):
        study_scale(STATISTICS, [400.0, 0, 0, 0], "t2")
    with pytest.raises(ValueError, match="output_scale"):
        FinishPredictiond(output_scale=2.0, statistics=STATISTICS)
    paths = write_study(tmp_path / "in", ["t1", "t1ce"])
    run(tmp_path, intensities="study", output_dir=str(tmp_path / "study"))
    run(tmp_path)
    scales = [np.percentile(load(path)[load(path) > 0], 99.5) for path in paths.values()]
    expected = 2 * np.sqrt(scales[0] * scales[1])
    for key, factor in (("flair", expected), ("t2", np.exp(-0.5) * expected / 2)):
        name = f"S1/S1_{key}_synthetic.nii.gz"
        np.testing.assert_allclose(load(tmp_path / "study" / name), factor * load(tmp_path / "out" / name), rtol=1e-5)
    record = json.loads((tmp_path / "study/S1/S1_synthesis.json").read_text())
    assert record["output_scale"]["flair"] == pytest.approx(expected) and record["settings"]["intensities"] == "study"
    save_weights(weights, SSCFNet(**TINY), {"preprocessing": PREPROCESSING})
    with pytest.raises(StudyError, match="holds no intensities of a cohort"):
        run(tmp_path, intensities="study")
    with pytest.raises(StudyError, match="intensities has no natural: choose from relative, study"):
        run(tmp_path, intensities="natural")


def test_type_of_the_reference(tmp_path: Path, weights: Path) -> None:
    write_study(tmp_path / "in", ["t1"])
    with pytest.raises(StudyError, match="1 of 1 studies failed"):
        run(tmp_path, output_dtype="reference")
    (failure,) = json.loads((tmp_path / "out" / "failures.json").read_text())
    assert "do not go into int16: use --output_dtype float32" in failure["reason"]
    run(tmp_path, output_dtype="reference", output_scale=1000.0)
    run(tmp_path, output_scale=1000.0, output_dir=str(tmp_path / "float"))
    name = "S1/S1_t2_synthetic.nii.gz"
    assert load(tmp_path / "out" / name).dtype == np.int16
    np.testing.assert_array_equal(load(tmp_path / "out" / name), np.rint(load(tmp_path / "float" / name)))
    with pytest.raises(StudyError, match="output_dtype has no int8: choose from float32, reference"):
        StudyWriter(tmp_path, output_dtype="int8")


def test_names_of_bids(tmp_path: Path, weights: Path) -> None:
    for name, ending in (("sub-01_ses-a", "T1w"), ("BraTS_7", "t1")):
        folder = tmp_path / "in" / name
        folder.mkdir(parents=True)
        nib.save(nib.Nifti1Image(brain_volume(1), LPS), folder / f"{name}_{ending}.nii.gz")
    assert run(tmp_path, naming="bids") == 2 and run(tmp_path, naming="bids") == 0
    folder = tmp_path / "out" / "sub-01" / "ses-a" / "anat"
    stems = [
        f"sub-01_ses-a_{name}"
        for name in ("ce-gadolinium_desc-synthetic_T1w", *("desc-synthetic_" + s for s in ("FLAIR", "T2w", "dseg")))
    ]
    others = {"sub-01_ses-a_desc-synthetic_panel.png", "sub-01_ses-a_desc-synthetic_synthesis.json"}
    assert set(os.listdir(folder)) == {f"{stem}{ending}" for stem in stems for ending in (".nii.gz", ".json")} | others
    assert (tmp_path / "out" / "sub-BraTS7" / "anat" / "sub-BraTS7_desc-synthetic_T2w.nii.gz").is_file()
    description = json.loads((tmp_path / "out" / "dataset_description.json").read_text())
    assert description["DatasetType"] == "derivative"
    assert json.loads((folder / f"{stems[0]}.json").read_text())["Sources"] == ["sub-01_ses-a_T1w.nii.gz"]
    # whoever reads them as input is told
    items = {item["study"]: item for item in find_studies(tmp_path / "out")}
    assert sorted(items["sub-01_ses-a"]["synthesized"]) == ["flair", "t1ce", "t2"]
    with (tmp_path / "out" / "summary.csv").open() as file:
        assert [row["study"] for row in csv.DictReader(file)] == ["BraTS_7", "sub-01_ses-a"]
    # BraTS_7 and BraTS7 would be one subject
    evaluator = evaluate(
        list_studies(t1=tmp_path / "in" / "BraTS_7" / "BraTS_7_t1.nii.gz", study="BraTS7"),
        None,
        writer=StudyWriter(tmp_path / "out", naming="bids"),
    )
    with pytest.raises(StudyError, match="1 of 1"):
        evaluator.run()
    assert "holds the results of the study BraTS_7" in evaluator.failures[0]["reason"]


def test_list_of_studies(tmp_path: Path, weights: Path) -> None:
    paths = write_study(tmp_path / "in", ["t1", "t2"])
    (tmp_path / "list.csv").write_text(f"study,flair,t1,t2\nX,,in/S1_t1.nii.gz,{paths['t2']}\nY,,,\n")
    with pytest.raises(StudyError, match="1 of 2 studies failed: Y"):
        run(tmp_path, dataset_dir=None, datalist_file=str(tmp_path / "list.csv"))
    assert sorted(os.listdir(tmp_path / "out" / "X"))[0] == "X_flair_synthetic.nii.gz"
    assert "names no contrast" in json.loads((tmp_path / "out" / "failures.json").read_text())[0]["reason"]


def test_another_grid_is_brought_to_that_of_the_reference(tmp_path: Path, weights: Path) -> None:
    write_study(tmp_path / "in", ["t1"])
    coarse = LPS @ np.diag([2, 2, 1, 1])
    nib.save(nib.Nifti1Image(brain_volume(1, (20, 18, 6)), coarse), tmp_path / "in" / "S1_t2.nii.gz")
    with pytest.raises(StudyError, match="1 of 1"):
        run(tmp_path)
    (failure,) = json.loads((tmp_path / "out" / "failures.json").read_text())
    assert "--resample True" in failure["reason"]
    for reference, affine, shape in (
        (True, LPS, (40, 36, 6)),
        ("t2", coarse, (20, 18, 6)),
        ("flair", LPS, (40, 36, 6)),
    ):
        run(tmp_path, resample=reference)
        made = nib.load(tmp_path / "out" / "S1" / "S1_flair_synthetic.nii.gz")
        assert made.shape == shape
        np.testing.assert_array_equal(made.affine, affine)
    with pytest.raises(RuntimeError) as raised:
        run(tmp_path, resample="t3")
    assert "resample must be True, False or one of" in str(raised.value.__cause__)


@pytest.mark.parametrize("shape", [(40, 36, 1), (40, 4, 30), (1, 40, 36)])
def test_single_slices_and_anisotropic_volumes(tmp_path: Path, weights: Path, shape: tuple[int, ...]) -> None:
    axes = {1: LPS, 4: LPS @ np.diag([1, 7, 1, 1])}.get(min(shape), LPS)
    volume = np.random.default_rng(0).integers(1, 900, shape).astype(np.int16)
    (tmp_path / "in").mkdir()
    nib.save(nib.Nifti1Image(volume, axes), tmp_path / "in" / "S1_t1.nii.gz")
    assert run(tmp_path) == 1
    made = nib.load(tmp_path / "out" / "S1" / "S1_t2_synthetic.nii.gz")
    assert made.shape == shape and (made.get_fdata() > 0).any()
    np.testing.assert_array_equal(made.affine, axes)
