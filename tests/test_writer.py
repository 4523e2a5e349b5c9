# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""From a prediction to files: geometry, record, and folders that appear complete or not at all."""

from __future__ import annotations

import json
import os
import shutil
import stat
from concurrent.futures import ThreadPoolExecutor

import nibabel as nib
import numpy as np
import pytest
import torch
from builders import BUNDLE_ROOT
from monai.data import ITKWriter, MetaTensor
from studies import (
    GRIDS,
    LPS,
    PREPROCESSING,
    SHAPE,
    TINY,
    CopyNet,
    affine_of,
    brain_volume,
    fill_with,
    hidden,
    load,
    results,
    scaled,
    write_study,
)

from scripts.contrasts import CONTRAST_KEYS, StudyError
from scripts.data.randomness import stable_hash
from scripts.inference import writer as module
from scripts.inference.inferer import BrainSliceInferer
from scripts.inference.postprocessing import FinishPredictiond, prediction_transforms
from scripts.inference.preprocessing import FindStudyd, inference_transforms, list_studies
from scripts.inference.synthesize import synthesize_study
from scripts.inference.writer import StudyWriter
from scripts.networks.sscf import SSCFNet
from scripts.networks.weights import save_weights


@pytest.mark.parametrize("grid", GRIDS)
def test_voxels_go_back_exactly(tmp_path, grid):
    affine = affine_of(GRIDS[grid])
    shape = (6, 40, 36) if grid.startswith("sagittal") else SHAPE
    paths = write_study(tmp_path / "in", ["flair", "t2"], affine=affine, shape=shape)
    written = fill_with(CopyNet(source=0), paths, tmp_path / "out", output_scale=2.0)
    assert sorted(written) == ["seg", "t1", "t1ce"]
    flair, union = scaled(paths["flair"]), (load(paths["flair"]) > 0) | (load(paths["t2"]) > 0)
    for key in ("t1", "t1ce"):
        image = nib.load(written[key])
        assert image.get_data_dtype() == np.float32 and image.shape == shape
        np.testing.assert_array_equal(image.affine, nib.load(paths["flair"]).affine)
        np.testing.assert_allclose(load(written[key]), 2 * flair, atol=1e-6)
        assert (load(written[key])[~union] == 0).all()
    mask = nib.load(written["seg"])
    assert mask.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(mask.affine, nib.load(paths["flair"]).affine)
    value = 2 * flair - 1
    clear = (np.abs(value) > 1e-4) & (np.abs(value - 0.6) > 1e-4)
    expected = np.select([value > 0.6, value > 0], [4, 2], 0)
    np.testing.assert_array_equal(load(written["seg"])[clear], expected[clear])


def test_union_of_brains_bounds_the_output(tmp_path):
    class Bright(CopyNet):
        def forward(self, image):
            return torch.ones_like(image[:, :7])

    paths = write_study(tmp_path / "in", ["t1", "t2"])
    written = fill_with(Bright(), paths, tmp_path / "out")
    union = (load(paths["t1"]) > 0) | (load(paths["t2"]) > 0)
    np.testing.assert_array_equal(load(written["flair"]), union.astype(np.float32))
    # of equal probabilities the first class wins
    np.testing.assert_array_equal(load(written["seg"]), 2 * union)


@pytest.mark.parametrize("spacing", [0.6, 1.7])
def test_resampled_study_goes_back_smoothly_and_stays_in_the_brain(tmp_path, spacing):
    shape = (70, 60, 4)
    x, y, _ = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    smooth = np.where(x**2 + y**2 < 0.6, 1000 + 400 * x + 300 * np.sin(2 * y), 0).astype(np.float32)
    path = tmp_path / "X_t1.nii.gz"
    nib.save(nib.Nifti1Image(smooth, np.diag([-spacing, -spacing, 2, 1])), path)
    written = fill_with(
        CopyNet(source=1), {"t1": path}, tmp_path / "out", preprocessing=inference_transforms(image_size=64)
    )
    result, expected = load(written["t2"]), np.clip(smooth / np.percentile(smooth[smooth > 0], 99.5), 0, 1)
    assert result.shape == shape and (result[smooth == 0] == 0).all()
    inside = x**2 + y**2 < 0.4
    assert np.abs(result - expected)[inside].max() < 0.02


def test_codes_and_units_are_kept_but_nothing_that_names_a_patient(tmp_path):
    image = nib.Nifti1Image(brain_volume(0), LPS)
    image.set_qform(LPS, code=1)
    image.set_sform(LPS, code=4)
    image.header.set_xyzt_units("mm", "sec")
    image.header["descrip"], image.header["db_name"] = b"JANE DOE", b"JANE DOE"
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"JANE DOE"))
    nib.save(image, tmp_path / "a_flair.nii.gz")
    written = fill_with(CopyNet(), {"flair": tmp_path / "a_flair.nii.gz"}, tmp_path / "out")
    header = nib.load(written["t1"]).header
    assert (int(header["qform_code"]), int(header["sform_code"])) == (1, 4)
    assert header.get_xyzt_units() == ("mm", "sec")
    assert b"JANE" not in header.binaryblock and not header.extensions
    assert b"not for clinical use" in header["descrip"].item()


def test_other_formats_give_nifti_with_the_same_affine(tmp_path):
    writer = ITKWriter(output_dtype=np.float32)
    writer.set_data_array(brain_volume(0), channel_dim=None)
    writer.set_metadata({"affine": LPS}, resample=False)
    writer.write(tmp_path / "a.mha")
    written = fill_with(CopyNet(1), {"t1": tmp_path / "a.mha"}, tmp_path / "out")
    np.testing.assert_allclose(nib.load(written["t2"]).affine, LPS)
    nib.save(nib.Nifti1Image(brain_volume(0), LPS), tmp_path / "same.nii.gz")
    np.testing.assert_allclose(load(written["t2"]), scaled(tmp_path / "same.nii.gz"), atol=1e-6)


# ----------------------------------------------------------------------------------------------- scenarios and record
def test_record(tmp_path):
    paths = write_study(tmp_path / "in", ["flair", "t2"], "P1")
    network = SSCFNet(**TINY)
    network.bank_present[0] = True
    network.bank_patient[0] = stable_hash("P1")
    save_weights(tmp_path / "model.pt", network, {"preprocessing": PREPROCESSING})
    written = synthesize_study(**paths, output_dir=tmp_path / "out", ckpt_path=tmp_path / "model.pt", device="cpu")
    for key in ("t1", "t1ce"):
        assert load(written[key]).min() >= 0 and 0 < load(written[key]).max() <= 1
    record = json.loads((tmp_path / "out/P1/P1_synthesis.json").read_text())
    assert record["available"] == ["FLAIR", "T2"] and record["synthesized"] == ["T1", "T1ce"]
    assert record["inputs"] == {"flair": "P1_flair.nii.gz", "t2": "P1_t2.nii.gz"}
    assert record["patient_in_bank"] is True and len(record["weights_sha256"]) == 64
    assert record["weights_came_with_bundle"] is False
    version = json.loads((BUNDLE_ROOT / "configs" / "metadata.json").read_text())["version"]
    assert "not for clinical use" in record["notice"] and record["bundle_version"] == version
    assert sorted(record["intensity_scale"]) == ["flair", "t2"]
    assert str(tmp_path) not in json.dumps(record)


def test_mask_labels(tmp_path):
    paths = write_study(tmp_path / "in", ["t1"])
    written = fill_with(CopyNet(1), paths, tmp_path / "out", mask_labels={"ED": 7, "ET": 9, "NET": 11})
    assert set(np.unique(load(written["seg"]))) == {0, 7, 9}
    for labels in ({"ED": 1, "ET": 2}, *({"ED": wrong, "ET": 1, "NET": 2} for wrong in (0, 1.5, True, "a"))):
        with pytest.raises(StudyError, match="mask_labels must map"):
            FinishPredictiond(mask_labels=labels)


@pytest.mark.parametrize("scale", [0, 1e39, np.inf, np.nan])
def test_scale_that_a_file_cannot_hold_is_refused(scale):
    with pytest.raises(StudyError, match="output_scale must be greater than 0 and at most 3"):
        FinishPredictiond(output_scale=scale)


def test_values_that_are_not_finite_are_not_written(tmp_path):
    statistics = {"log_ratios": [[100.0] * 4] * 4}
    with pytest.raises(StudyError, match="t1 has NaN or infinite values: use another output_scale"):
        fill_with(CopyNet(), write_study(tmp_path / "in", ["flair"]), tmp_path / "out", statistics=statistics)
    assert not any((tmp_path / "out").iterdir())


def test_one_volume_for_platforms(tmp_path):
    paths = write_study(tmp_path / "in", ["t1", "t2"])
    preprocessing = inference_transforms(image_size=48)
    item = preprocessing({"image": paths["t2"], "image_path": paths["t2"], "target": "t1ce"})
    assert item["has_contrast"].tolist() == [False, True, False, True] and item["study"] == "S1"
    item["pred"] = BrainSliceInferer()(item["image"][None], CopyNet(1))[0]
    out = prediction_transforms(preprocessing)(item)["pred"]
    assert isinstance(out, MetaTensor) and out.shape == (1, *SHAPE)
    np.testing.assert_allclose(out.affine, LPS)
    np.testing.assert_allclose(out[0], scaled(paths["t1"]), atol=1e-6)
    with pytest.raises(StudyError, match="target"):
        prediction_transforms(preprocessing)({**item, "target": "t3"})


def test_find_study_by_folder_or_file(tmp_path):
    first = write_study(tmp_path / "S1", ["t1", "flair"], "S1")
    write_study(tmp_path / "S2", ["t2"], "S2")
    for image in (tmp_path / "S1", first["flair"]):
        found = FindStudyd()({"image": str(image)})
        assert {key: found.get(key) for key in CONTRAST_KEYS} == {"t1ce": None, "t2": None, **first}
    with pytest.raises(StudyError, match="2 studies"):
        FindStudyd()({"image": str(tmp_path)})
    assert FindStudyd()({"t1": "x", "image": "y"}) == {"t1": "x", "image": "y"}


# ------------------------------------------------------------------------------------------------------------- writing
def test_overwriting_replaces_our_files_only(tmp_path):
    folder = tmp_path / "out" / "S1"
    written = fill_with(CopyNet(), write_study(tmp_path / "in", ["flair"]), tmp_path / "out")
    assert sorted(written) == ["seg", "t1", "t1ce", "t2"]
    (folder / "notes.txt").write_text("mine")
    written = fill_with(CopyNet(), write_study(tmp_path / "in", ["flair", "t1ce"]), tmp_path / "out")
    assert set(os.listdir(folder)) == {
        "notes.txt",
        "S1_t1_synthetic.nii.gz",
        "S1_t2_synthetic.nii.gz",
        "S1_seg.nii.gz",
        "S1_synthesis.json",
    }
    assert not hidden(tmp_path / "out")
    # other users may read what the umask lets them
    (tmp_path / "plain").mkdir()
    assert stat.S_IMODE(folder.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


@pytest.mark.parametrize("finished_before", [False, True])
def test_nothing_half_written_stays(tmp_path, monkeypatch, finished_before):
    paths = write_study(tmp_path / "in", ["flair", "t1"])
    before = set()
    if finished_before:
        fill_with(CopyNet(), paths, tmp_path / "out")
        before = {(p, p.stat().st_mtime_ns) for p in (tmp_path / "out").rglob("*")}
    save, calls = nib.save, []

    def fail_later(image, path):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        save(image, path)

    monkeypatch.setattr(module.nib, "save", fail_later)
    with pytest.raises(StudyError, match=r"S1 cannot be written: No space left on device\.$"):
        fill_with(CopyNet(), paths, tmp_path / "out")
    assert {(p, p.stat().st_mtime_ns) for p in (tmp_path / "out").rglob("*")} == before and len(calls) == 2


@pytest.mark.parametrize("step", range(4))
def test_a_kill_while_results_are_replaced_hides_nothing(tmp_path, monkeypatch, step):
    paths = write_study(tmp_path / "in", ["flair", "t1"])
    folder = tmp_path / "out" / "S1"
    fill_with(CopyNet(), paths, tmp_path / "out")
    (folder / "notes.txt").write_text("mine")
    expected, replace, calls = results(folder), os.replace, []

    def kill(source, target):
        calls.append(target)
        if len(calls) > step:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", kill)
    # a killed process clears nothing
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **options: None)
    with pytest.raises(KeyboardInterrupt):
        fill_with(CopyNet(), paths, tmp_path / "out")
    monkeypatch.undo()
    assert (folder / "notes.txt").read_text() == "mine" and not (folder / "S1_synthesis.json").exists()
    (left,) = hidden(tmp_path / "out")
    StudyWriter(tmp_path / "out").prepare()
    assert hidden(tmp_path / "out") == [left]  # another run may be writing it
    os.utime(tmp_path / "out" / left, (0, 0))
    StudyWriter(tmp_path / "out").prepare()
    assert not hidden(tmp_path / "out")
    fill_with(CopyNet(), paths, tmp_path / "out")
    assert results(folder) == expected


def test_two_writers_of_one_study_leave_a_whole_one(tmp_path):
    paths = write_study(tmp_path / "in", ["flair", "t1"])
    fill_with(CopyNet(), paths, tmp_path / "alone")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: fill_with(CopyNet(), paths, tmp_path / "out"), range(8)))
    assert results(tmp_path / "out" / "S1") == results(tmp_path / "alone" / "S1") and not hidden(tmp_path / "out")


def test_what_stands_in_the_way_is_left_alone(tmp_path):
    paths = write_study(tmp_path / "in", ["flair", "t1"])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "S1").write_text("mine")
    with pytest.raises(StudyError, match="S1 is a file: remove it"):
        fill_with(CopyNet(), paths, tmp_path / "out")
    assert (tmp_path / "out" / "S1").read_text() == "mine"
    with pytest.raises(StudyError, match="cannot be written to"):
        StudyWriter(tmp_path / "out" / "S1").prepare()
    with pytest.raises(StudyError, match="output_dir needs the path of a folder"):
        StudyWriter(None)
    for name, words in (
        ("x" * 300, "cannot name a folder"),
        ("line\nbreak", "cannot name a folder"),
        ("../elsewhere", "cannot name a folder"),
    ):
        with pytest.raises(StudyError, match=words):
            fill_with(CopyNet(), paths, tmp_path / "out", study=name)


def test_inputs_are_never_overwritten(tmp_path):
    paths = write_study(tmp_path / "S1", ["t1"])
    with pytest.raises(StudyError, match="holds the input"):
        fill_with(CopyNet(), paths, tmp_path)
    assert os.listdir(tmp_path / "S1") == ["S1_t1.nii.gz"]
    with pytest.raises(StudyError, match="lies in dataset_dir"):
        list_studies(tmp_path, output_dir=tmp_path / "out")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link").symlink_to(tmp_path / "S1")
    assert len(list_studies(tmp_path / "data", output_dir=tmp_path / "out")) == 1
    with pytest.raises(StudyError, match="lies in dataset_dir"):
        list_studies(tmp_path / "data", output_dir=tmp_path / "S1")


def test_study_from_python_gets_what_the_run_gives(tmp_path):
    paths = write_study(tmp_path / "in", ["t1", "t2"], "GOOD")
    torch.manual_seed(0)
    save_weights(tmp_path / "model.pt", SSCFNet(**TINY), {"preprocessing": PREPROCESSING})
    options = {"output_dir": tmp_path / "out", "ckpt_path": tmp_path / "model.pt", "device": "cpu", "amp": False}
    written = synthesize_study(**{key: [path] for key, path in paths.items()}, **options)
    assert sorted(written) == ["flair", "seg", "t1ce"]
    record = json.loads((tmp_path / "out/GOOD/GOOD_synthesis.json").read_text())
    assert record["verdict"] in ("review", "not calibrated") and record["warnings"] and record["settings"]["trust"]
    assert {"checks", "scores", "reasons"} <= set(record) and list(record["prototypes"]) == ["flair", "t1ce"]
    assert set(record["seconds_of_checks"]) == {"checks", "trust"}
    for wrong, words in (
        ({"thrust": False}, "no setting thrust: did you mean trust"),
        ({"trust": "perhaps"}, "trust must be True or False"),
        ({"amp": 1}, "amp must be True or False"),
        ({"tracking": "mlflow"}, "no setting tracking"),
        ({"output_dir": None}, "output_dir needs the path of a folder"),
    ):
        with pytest.raises(StudyError, match=words):
            synthesize_study(**paths, **(options | wrong))
    synthesize_study(**paths, **(options | {"amp": "no", "trust": "no"}))
    untrusted = json.loads((tmp_path / "out/GOOD/GOOD_synthesis.json").read_text())
    assert untrusted["settings"]["trust"] is False and "verdict" not in untrusted
    with pytest.raises(StudyError, match="rejecting_checks has no skull"):
        synthesize_study(**paths, **options, rejecting_checks=["skull"])
    code = record["checks"][0]["code"]  # random values are no brain
    with pytest.raises(StudyError, match="Study GOOD: "):
        synthesize_study(**paths, **options, rejecting_checks=[code])
