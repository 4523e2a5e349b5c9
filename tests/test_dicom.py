# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""DICOM output: what is written reads back as what was computed, where the source lies, as derived and synthetic."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from builders import TINY_CHANNELS, bundle_workflow, write_dicom_series
from monai.bundle import ConfigWorkflow
from monai.transforms import LoadImage

from scripts.contrasts import StudyError
from scripts.inference.dicom import DicomStudyWriter, segmentation
from scripts.networks.sscf import SSCFNet
from scripts.networks.weights import save_weights

pydicom = pytest.importorskip("pydicom", reason="DICOM output needs pydicom")
highdicom = pytest.importorskip("highdicom", reason="DICOM output needs highdicom")

#: Oblique, voxels of 2 x 2 x 3 mm.
AFFINE = np.array([[1.92, -0.56, 0, -7], [0.56, 1.92, 0, 5], [0, 0, 3, 11], [0, 0, 0, 1]])
LPS = np.diag([-1, -1, 1, 1])


def write_study(folder: Path, *keys: str) -> None:
    x, y, z = np.mgrid[-1:1:24j, -1:1:20j, -1:1:6j]
    brain = x**2 + y**2 + z**2 < 0.9
    for seed, key in enumerate(keys):
        values = brain * np.random.default_rng(seed).integers(1, 900, brain.shape)
        write_dicom_series(folder / key.upper(), values, AFFINE, key)


def workflow(folder: Path, **changes: object) -> ConfigWorkflow:
    torch.manual_seed(0)
    network = SSCFNet(channels=TINY_CHANNELS, bank_size=4, key_size=2)
    with torch.no_grad():
        head = network.get_parameter("segmentation_decoder.head.weight")
        head.copy_(30 * torch.randn(head.shape))  # so that the mask holds every class
    preprocessing = {"image_size": 32, "spacing": 2.0, "scaling": "brain"}
    save_weights(folder / "model.pt", network, {"preprocessing": preprocessing})
    paths = {"dataset_dir": folder / "in", "output_dir": folder / "out", "ckpt_path": folder / "model.pt"}
    return bundle_workflow("inference", "dicom", handlers=[], page=False, **{**paths, **changes})


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of FLAIR and T1 after inference."""
    folder = tmp_path_factory.mktemp("dicom")
    write_study(folder / "in" / "p1", "flair", "t1")
    workflow(folder).run()
    return folder


def images(folder: Path) -> list:
    return [pydicom.dcmread(path) for path in sorted(folder.iterdir())]


def test_folder_has_the_missing_contrasts_and_the_mask(written):
    names = sorted(path.relative_to(written / "out").as_posix() for path in (written / "out").glob("*/*"))
    assert names == [
        *("p1/dicom", "p1/p1_seg.nii.gz", "p1/p1_synthesis.json"),
        *("p1/p1_t1ce_synthetic.nii.gz", "p1/p1_t2_synthetic.nii.gz"),
    ]
    inside = sorted(path.name for path in (written / "out" / "p1" / "dicom").iterdir())
    assert inside == ["p1_seg.dcm", "p1_t1ce_synthetic", "p1_t2_synthetic"]
    assert not [path for path in (written / "out").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("key", ["t1ce", "t2"])
def test_series_reads_back_as_the_volume(written, key):
    volume = nib.load(written / "out" / "p1" / f"p1_{key}_synthetic.nii.gz")
    series = LoadImage("ITKReader", image_only=True)(written / "out" / "p1" / "dicom" / f"p1_{key}_synthetic")
    assert volume.get_fdata().max() > 0.1
    np.testing.assert_allclose(series.numpy() / 4095, volume.get_fdata(), atol=0.51 / 4095)
    np.testing.assert_allclose(series.affine, volume.affine, atol=1e-4)
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-4)


def test_series_says_that_it_is_synthetic_and_whose_it_is(written):
    series = {key: images(written / "out" / "p1" / "dicom" / f"p1_{key}_synthetic") for key in ("t1ce", "t2")}
    source = {image.InstanceNumber: image for image in images(written / "in" / "p1" / "FLAIR")}
    for key, made in series.items():
        assert [image.InstanceNumber for image in made] == [1, 2, 3, 4, 5, 6]
        for image in made:
            scanned = source[image.InstanceNumber]
            assert image.ImageType == ["DERIVED", "SECONDARY", "OTHER"] and image.Modality == "MR"
            assert "SYNTHETIC" in image.SeriesDescription and "not for diagnosis" in image.SeriesDescription
            assert image.DerivationDescription == "Synthesized from FLAIR, T1 by SSCF", key
            for keyword in ("PatientName", "PatientID", "StudyInstanceUID", "FrameOfReferenceUID"):
                assert image[keyword].value == scanned[keyword].value
            for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness"):
                assert image[keyword].value == scanned[keyword].value
            assert image.SourceImageSequence[0].ReferencedSOPInstanceUID == scanned.SOPInstanceUID
            assert image.Manufacturer == "sscf_bundle" and image.EchoTime is None
    made = [image for part in series.values() for image in part]
    seen = [image.SOPInstanceUID for image in (*made, *source.values())]
    assert len(set(seen)) == len(seen)
    assert len({image.SeriesInstanceUID for image in (*made, *source.values())}) == 3


def test_geometry_is_that_of_the_grid(tmp_path):
    write_study(tmp_path / "in" / "p1", "flair", "t1")
    changes = {"dataset_dir": tmp_path / "in", "output_dir": tmp_path / "out", "resample": "t1"}
    workflow(tmp_path, **changes).run()
    scanned = {image.SOPInstanceUID for image in images(tmp_path / "in" / "p1" / "T1")}
    made = images(tmp_path / "out" / "p1" / "dicom" / "p1_t2_synthetic")
    assert {image.SourceImageSequence[0].ReferencedSOPInstanceUID for image in made} == scanned


def test_study_whose_dicom_cannot_be_written_is_done_again(tmp_path, monkeypatch):
    write_study(tmp_path / "in" / "p1", "flair", "t1")

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("scripts.inference.dicom.segmentation", full)
        with pytest.raises(StudyError, match="1 of 1 studies failed: p1"):
            workflow(tmp_path).run()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["failures.json"]
    for overwrite in (False, True):  # the second time in a folder that has one
        workflow(tmp_path, overwrite=overwrite).run()
        assert len(list((tmp_path / "out" / "p1" / "dicom").iterdir())) == 3


def test_segmentation_reads_back_as_the_mask(written):
    mask = nib.load(written / "out" / "p1" / "p1_seg.nii.gz")
    assert set(np.unique(mask.get_fdata())) == {0, 1, 2, 4}
    read = highdicom.seg.segread(written / "out" / "p1" / "dicom" / "p1_seg.dcm")
    labels = [read.get_segment_description(number).segment_label for number in read.segment_numbers]
    kinds = [read.get_segment_description(number).segmented_property_type.meaning for number in read.segment_numbers]
    assert labels == ["NET", "ED", "ET"]
    assert kinds == ["Non-Enhancing Lesion", "Edema", "Enhancing Lesion"]
    assert "not for diagnosis" in read.SeriesDescription and read.PatientID == "4711"
    # on the grid of the source, slices without tumor included
    geometry = highdicom.get_volume_from_series(images(written / "in" / "p1" / "FLAIR")).get_geometry()
    volume = read.get_volume(combine_segments=True).match_geometry(geometry)
    to_file = np.linalg.inv(mask.affine) @ LPS @ volume.affine
    values = np.array([0, 1, 2, 4])[volume.array]
    where = np.argwhere(values >= 0) @ to_file[:3, :3].T + to_file[:3, 3]
    assert np.abs(where - where.round()).max() < 1e-3
    np.testing.assert_array_equal(mask.get_fdata()[tuple(where.round().astype(int).T)], values.ravel())


def test_an_empty_mask_is_written(written):
    sources = images(written / "in" / "p1" / "FLAIR")
    made = segmentation(np.zeros((6, 20, 24)), sources, {"NET": 1, "ED": 2, "ET": 4}, "1.0.0")
    assert not made.pixel_array.any() and len(made.SegmentSequence) == 3


def test_a_study_without_dicom_fails_alone_and_leaves_nothing(tmp_path):
    write_study(tmp_path / "in" / "p1", "t1")
    write_study(tmp_path / "in" / "p2", "t1")
    volume = LoadImage("ITKReader", image_only=True)(tmp_path / "in" / "p2" / "T1")
    nib.save(nib.Nifti1Image(volume.numpy(), volume.affine.numpy()), tmp_path / "in" / "p2" / "p2_t1.nii.gz")
    shutil.rmtree(tmp_path / "in" / "p2" / "T1")
    with pytest.raises(StudyError, match="1 of 2 studies failed: p2"):
        workflow(tmp_path).run()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["failures.json", "p1"]
    (failure,) = json.loads((tmp_path / "out" / "failures.json").read_text())
    assert "is no folder with a DICOM series" in failure["reason"]


def test_without_the_packages_one_sentence_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("scripts.inference.dicom._has_highdicom", False)
    with pytest.raises(StudyError, match=r"pip install pydicom highdicom\.$"):
        DicomStudyWriter({"NET": 1, "ED": 2, "ET": 4}, output_dir=tmp_path)
