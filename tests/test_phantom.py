# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""The phantom cohort: reproducible, contrasts that show what they should, plausible masks, and the layout of BraTS."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from builders import bundle_workflow
from scipy import ndimage

from scripts.contrasts import CONTRAST_KEYS, MASK_KEY, StudyError
from scripts.demo import phantom
from scripts.demo.phantom import (
    FULL_SHAPE,
    LABEL_ED,
    LABEL_ET,
    LABEL_NCR,
    incomplete_study,
    make_phantom,
    phantom_affine,
    write_phantom_cohort,
)

SHAPE = (60, 60, 40)
MEDIUM = (120, 120, 78)
KEYS = (*CONTRAST_KEYS, MASK_KEY)


@pytest.fixture(scope="module")
def subjects() -> list[dict[str, np.ndarray]]:
    """Three subjects."""
    return [make_phantom(0, subject, SHAPE) for subject in range(3)]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two subjects on disk."""
    return write_phantom_cohort(tmp_path_factory.mktemp("cohort"), 2, seed=0, shape=SHAPE, num_workers=2)


@pytest.fixture(scope="module")
def medium() -> dict[str, np.ndarray]:
    """Subject 2 at 2 mm."""
    return make_phantom(0, 2, MEDIUM)


def test_same_arguments_give_the_same_bytes(subjects):
    again = make_phantom(0, 1, SHAPE)
    assert list(again) == list(KEYS)
    for key in KEYS:
        assert again[key].tobytes() == subjects[1][key].tobytes()


def test_subjects_and_seeds_differ(subjects):
    other_seed = make_phantom(1, 0, SHAPE)
    for key in KEYS:
        assert not np.array_equal(subjects[0][key], subjects[1][key])
        assert not np.array_equal(subjects[0][key], other_seed[key])


def test_types_background_and_labels(subjects):
    for volumes in subjects:
        brain = volumes["t1"] > 0
        assert 0.15 < brain.mean() < 0.30
        assert ndimage.label(brain, np.ones((3, 3, 3)))[1] <= 3
        assert not brain[[0, -1]].any() and not brain[:, [0, -1]].any() and not brain[..., -1].any()
        for key in CONTRAST_KEYS:
            assert volumes[key].dtype == np.float32 and volumes[key].shape == SHAPE
            assert np.array_equal(volumes[key] > 0, brain)
            assert np.array_equal(volumes[key], np.rint(volumes[key]))
            assert np.median(volumes[key][brain]) > 100 and volumes[key].max() < 10000
        assert volumes[MASK_KEY].dtype == np.uint8
        assert set(np.unique(volumes[MASK_KEY])) <= {0, 1, 2, 4}
        assert (volumes[MASK_KEY] > 0).sum() > 20
        assert brain[volumes[MASK_KEY] > 0].all()


def test_each_contrast_shows_what_it_should_of_the_tumor(medium):
    labels, brain = medium[MASK_KEY], medium["t1"] > 0
    median = {
        name: {key: np.median(medium[key][mask]) for key in CONTRAST_KEYS}
        for name, mask in {
            "healthy": brain & (labels == 0),
            "edema": labels == LABEL_ED,
            "rim": labels == LABEL_ET,
            "core": labels == LABEL_NCR,
        }.items()
    }
    for key in ("flair", "t2"):
        assert median["edema"][key] > 1.5 * median["healthy"][key]
    # the rim cannot be told from edema but on T1ce
    ratio = {key: median["rim"][key] / median["edema"][key] for key in CONTRAST_KEYS}
    assert ratio["t1ce"] > 2 and all(0.9 < ratio[key] < 1.1 for key in ("flair", "t1", "t2"))
    # necrosis: dark on T1 and T1ce, bright on T2
    assert all(median["core"][key] < 0.6 * median["healthy"][key] for key in ("t1", "t1ce"))
    assert median["core"]["t2"] > 2 * median["healthy"]["t2"]


def test_a_coarse_shape_shows_the_same_subject(subjects):
    fine = make_phantom(0, 0, (120, 120, 80))
    pooled = {key: fine[key].reshape(60, 2, 60, 2, 40, 2).mean((1, 3, 5)) for key in ("t1", "flair")}
    brain = ndimage.binary_erosion(subjects[0]["t1"] > 0)
    for key, volume in pooled.items():
        assert np.corrcoef(volume[brain], subjects[0][key][brain])[0, 1] > 0.75
    tumor = [v[MASK_KEY] > 0 for v in (fine, subjects[0])]
    assert tumor[0].sum() / 8 == pytest.approx(tumor[1].sum(), rel=0.15)


def test_some_tumors_do_not_enhance():
    enhancing = [bool((make_phantom(0, s, (40, 40, 26))[MASK_KEY] == LABEL_ET).any()) for s in range(40)]
    assert 25 < sum(enhancing) < 40


@pytest.mark.parametrize("arguments", [(-1, 0, SHAPE), (0, -1, SHAPE), (0, 0, (60, 60)), (0, 0, (60, 60, 4))])
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match="must"):
        make_phantom(*arguments)


def test_affine_is_that_of_brats_and_keeps_the_field_of_view():
    expected = np.array([[-1, 0, 0, 0], [0, -1, 0, 239], [0, 0, 1, 0], [0, 0, 0, 1]], dtype=float)
    assert np.array_equal(phantom_affine(), expected)
    full = [expected @ [*corner, 1] for corner in ((-0.5,) * 3, np.array(FULL_SHAPE) - 0.5)]
    coarse = [phantom_affine(SHAPE) @ [*corner, 1] for corner in ((-0.5,) * 3, np.array(SHAPE) - 0.5)]
    np.testing.assert_allclose(full, coarse)


def test_layout_and_headers(cohort, subjects):
    assert [path.name for path in cohort] == ["Phantom_0_000", "Phantom_0_001"]
    assert sorted(p.name for p in cohort[0].parent.iterdir()) == ["Phantom_0_000", "Phantom_0_001"]
    for path, volumes in zip(cohort, subjects, strict=False):
        assert sorted(p.name for p in path.iterdir()) == sorted(f"{path.name}_{key}.nii.gz" for key in KEYS)
        for key in KEYS:
            image = nib.load(path / f"{path.name}_{key}.nii.gz")
            assert image.get_data_dtype() == (np.uint8 if key == MASK_KEY else np.int16)
            assert nib.aff2axcodes(image.affine) == ("L", "P", "S")
            np.testing.assert_allclose(image.affine, phantom_affine(SHAPE))
            np.testing.assert_allclose(image.header.get_zooms(), np.divide(FULL_SHAPE, SHAPE), rtol=1e-6)
            assert np.array_equal(np.asarray(image.dataobj), volumes[key])


def test_writing_again_touches_only_what_is_missing(cohort):
    def times() -> dict[str, int]:
        return {p.name: p.stat().st_mtime_ns for path in cohort for p in path.iterdir()}

    before = times()
    assert write_phantom_cohort(cohort[0].parent, 2, seed=0, shape=SHAPE) == cohort
    assert times() == before
    (cohort[1] / f"{cohort[1].name}_t2.nii.gz").unlink()
    write_phantom_cohort(cohort[0].parent, 2, seed=0, shape=SHAPE, num_workers=1)
    after = times()
    assert set(after) == set(before)
    assert all((after[name] == before[name]) == name.startswith(cohort[0].name) for name in before)


def test_demo_training_with_another_seed_is_refused_before_anything_is_written(tmp_path):
    write_phantom_cohort(tmp_path / "phantom", 1, seed=0, shape=SHAPE)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    workflow = bundle_workflow("train", "demo_train", seed=1, output_dir=tmp_path, phantom_subjects=1)
    with pytest.raises(StudyError, match="holds phantoms of seed 0, not 1: give --seed 0 or another --output_dir"):
        workflow.run()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_nothing_half_written_after_a_failure(tmp_path, monkeypatch):
    def fail(image, path):
        if "_t2" in str(path):
            raise OSError("disk full")
        Path(path).write_bytes(b"")

    monkeypatch.setattr(phantom.nib, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        write_phantom_cohort(tmp_path, 1, shape=(24, 24, 16))
    assert list(tmp_path.iterdir()) == []


def test_incomplete_study_leaves_out_contrasts_and_mask(cohort, tmp_path):
    copy = incomplete_study(cohort[0], tmp_path / "inbox")
    assert copy == tmp_path / "inbox" / cohort[0].name
    assert sorted(p.name for p in copy.iterdir()) == [f"{copy.name}_{key}.nii.gz" for key in ("t1", "t2")]
    for path in copy.iterdir():
        assert path.read_bytes() == (cohort[0] / path.name).read_bytes()
    # more is missing now than what lies there: refused, and nothing is deleted
    with pytest.raises(StudyError, match="is to be left out"):
        incomplete_study(cohort[0], tmp_path / "inbox", missing=("t1", "t1ce", "flair"))
    with pytest.raises(StudyError, match="does not exist"):
        incomplete_study(copy, tmp_path / "outbox", missing=("t1",))
    with pytest.raises(StudyError, match="is to be left out"):
        incomplete_study(cohort[0], cohort[0].parent)
    assert len(list(cohort[0].iterdir())) == len(KEYS)


@pytest.mark.parametrize("missing", [("pd",), CONTRAST_KEYS])
def test_incomplete_study_refuses_nonsense(cohort, tmp_path, missing):
    with pytest.raises(ValueError, match="some, not all"):
        incomplete_study(cohort[0], tmp_path, missing=missing)
