# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Formats other than NIfTI: NRRD, MetaImage and folders with a DICOM series, found and read."""

from __future__ import annotations

import shutil
from pathlib import Path

import itk
import nibabel as nib
import numpy as np
import pytest
import torch
from builders import write_dicom_series

from scripts.contrasts import StudyError
from scripts.data.datalist import find_studies, single_study
from scripts.data.transforms import LoadStudyd

SHAPE = (12, 10, 6)
#: Oblique, voxels of 1.5 x 2 x 3 mm.
AFFINE = np.array([[1.44, -0.56, 0, -7], [0.42, 1.92, 0, 5], [0, 0, 3, 11], [0, 0, 0, 1]])


def volume(seed: int = 0) -> np.ndarray:
    """X x Y x Z whole numbers with a background of 0."""
    values = np.random.default_rng(seed).integers(1, 900, SHAPE)
    values[:2] = 0
    return values


def write_with_itk(path: Path, values: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = itk.image_from_array(np.ascontiguousarray(values.astype(np.int16).T))
    axes = np.diag([-1, -1, 1, 1]) @ AFFINE  # ITK is LPS
    spacing = np.linalg.norm(axes[:3, :3], axis=0)
    image.SetOrigin(axes[:3, 3].tolist())
    image.SetSpacing(spacing.tolist())
    image.SetDirection(itk.matrix_from_array(axes[:3, :3] / spacing))
    itk.imwrite(image, str(path))
    return path


def assert_read(item: dict, expected: dict[str, np.ndarray]) -> None:
    """Values and place of every contrast of an item as it is loaded."""
    data = LoadStudyd()(item)
    for index, key in enumerate(("flair", "t1", "t1ce", "t2")):
        assert bool(data["has_contrast"][index]) == (key in expected)
        wanted = expected.get(key, np.zeros(SHAPE))
        assert torch.equal(data["image"][index].as_tensor(), torch.as_tensor(wanted, dtype=torch.float32))
    np.testing.assert_allclose(data["image"].affine, AFFINE, atol=1e-5)


@pytest.mark.parametrize("ending", ["nrrd", "nhdr", "mha", "mhd", "nii"])
def test_studies_of_every_format_are_found_and_read(tmp_path, ending):
    files = {
        key: write_with_itk(tmp_path / "p1" / f"p1_{key}.{ending}", volume(k)) for k, key in enumerate(("t1", "t2"))
    }
    (item,) = find_studies(tmp_path)
    assert item == {"study": "p1", "patient": "p1", **{key: str(path) for key, path in files.items()}}
    assert_read(item, {"t1": volume(0), "t2": volume(1)})
    assert single_study(**files)[0]["study"] == "p1"


def test_pair_of_files_is_taken_as_nifti_and_refused_as_analyze(tmp_path):
    path = str(tmp_path / "a.hdr")
    nib.save(nib.Nifti1Pair(volume().astype(np.int16), AFFINE), path)
    assert_read({"t1": path}, {"t1": volume()})
    nib.save(nib.AnalyzeImage(volume().astype(np.int16), np.diag([-1.5, 2, 3, 1])), path)
    for name in (path, str(tmp_path / "a.img")):
        with pytest.raises(StudyError, match="which does not tell right from left: convert it"):
            LoadStudyd()({"t1": name})


@pytest.mark.parametrize("ending", ["nrrd", "mha"])
def test_what_itk_converted_from_nifti_is_read(tmp_path, ending):
    nifti = write_with_itk(tmp_path / "a.nii.gz", volume(0))
    itk.imwrite(itk.imread(str(nifti)), str(tmp_path / f"p1_t1.{ending}"))  # with fields of the NIfTI header
    assert_read({"t1": str(tmp_path / f"p1_t1.{ending}")}, {"t1": volume(0)})


def test_formats_of_a_study_may_differ(tmp_path):
    write_with_itk(tmp_path / "p1_t1.nrrd", volume(0))
    write_with_itk(tmp_path / "p1_t2.nii.gz", volume(1))
    write_with_itk(tmp_path / "p2_t1.mha", volume(2))
    first, second = find_studies(tmp_path)
    assert (first["study"], second["study"]) == ("p1", "p2")
    assert_read(first, {"t1": volume(0), "t2": volume(1)})


def test_two_formats_of_one_contrast_are_refused(tmp_path):
    write_with_itk(tmp_path / "p1_t1.nrrd", volume())
    write_with_itk(tmp_path / "p1_t1.mha", volume())
    (item,) = find_studies(tmp_path)
    assert "two files for t1" in item["failure"]


@pytest.mark.parametrize(
    "names",
    [
        {"flair": "p1/FLAIR", "t1ce": "p1/T1Gd"},
        {"flair": "p1/3.000000-FLAIR", "t1ce": "p1/4.000000-T1_post"},
        {"flair": "p1_flair", "t1ce": "p1_t1ce"},
        {"flair": "p1/p1_flair", "t1ce": "p1/p1_t1ce"},
    ],
    ids=lambda names: names["flair"],
)
def test_dicom_series_are_found_by_the_name_of_their_folder(tmp_path, names):
    for seed, name in enumerate(names.values()):
        write_dicom_series(tmp_path / name, volume(seed), AFFINE)
    write_dicom_series(tmp_path / "p1" / "localizer", volume(9), AFFINE)
    (item,) = find_studies(tmp_path)
    assert item == {"study": "p1", "patient": "p1", **{key: str(tmp_path / name) for key, name in names.items()}}
    assert_read(item, {"flair": volume(0), "t1ce": volume(1)})
    loose = single_study(**{key: tmp_path / name for key, name in names.items()})[0]
    assert_read(loose, {"flair": volume(0), "t1ce": volume(1)})


def test_name_of_a_study_of_loose_series(tmp_path):
    for name in ("caseA_t1", "caseA_t2", "one/T1", "one/T2"):
        write_dicom_series(tmp_path / name, volume(), AFFINE)
    assert single_study(t1=tmp_path / "caseA_t1", t2=tmp_path / "caseA_t2")[0]["study"] == "caseA"
    assert single_study(t1=tmp_path / "one" / "T1", t2=tmp_path / "one" / "T2")[0]["study"] == "one"


def test_pattern_names_folders_of_series_too(tmp_path):
    write_dicom_series(tmp_path / "p1" / "301-dark", volume(), AFFINE)
    (item,) = find_studies(tmp_path, {"flair": "*-dark"})
    assert item["study"] == "p1" and item["flair"] == str(tmp_path / "p1" / "301-dark")


def test_folder_with_two_series_is_refused(tmp_path):
    one = write_dicom_series(tmp_path / "p1" / "FLAIR", volume(0), AFFINE)
    for path in write_dicom_series(tmp_path / "other", volume(1), AFFINE).iterdir():
        shutil.copy(path, one / f"second_{path.name}")
    with pytest.raises(StudyError, match="holds 2 DICOM series, not one"):
        LoadStudyd()({"flair": str(one)})


def test_folder_without_a_series_is_refused(tmp_path):
    with pytest.raises(StudyError, match="holds no DICOM series: give the folder"):
        LoadStudyd()({"flair": str(tmp_path)})


def test_series_without_a_slice_is_refused(tmp_path):
    series = write_dicom_series(tmp_path / "p1" / "FLAIR", volume(), AFFINE)
    (series / "IM003").unlink()
    with pytest.raises(StudyError, match="3 to 6 mm apart: some are missing"):
        LoadStudyd()({"flair": str(series)})


def test_damaged_series_is_refused(tmp_path):
    series = write_dicom_series(tmp_path / "p1" / "FLAIR", volume(), AFFINE)
    for path in series.iterdir():
        path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(StudyError):
        LoadStudyd()({"flair": str(series)})
