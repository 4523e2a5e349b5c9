# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Loading, checking, scaling, cropping and the way back to the grid on file."""

from __future__ import annotations

import gzip
import logging
import math
import os

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from monai.data import MetaTensor, NibabelReader
from monai.inferers import SliceInferer
from monai.transforms import Invertd

from scripts.contrasts import CONTRAST_KEYS, StudyError, find_study_error
from scripts.data.transforms import (
    AddAvailabilityd,
    BrainMaskd,
    CropBraind,
    LoadStudyd,
    ScaleBraind,
    ScaleSliced,
    study_transforms,
)

SHAPE = (24, 20, 6)
LPS = np.array([[-1.0, 0, 0, 5], [0, -1, 0, 30], [0, 0, 2, -7], [0, 0, 0, 1]])


def brain_volume(seed: int, shape=SHAPE, radius: float = 0.35) -> np.ndarray:
    """Random positive intensities in an ellipsoid that is off the center, 0 around it."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.linspace(-0.5, 0.5, n) for n in shape], indexing="ij"), -1)
    inside = np.linalg.norm(grid - [0.08, -0.05, 0], axis=-1) < radius
    return np.where(inside, rng.integers(1, 3000, shape), 0).astype(np.int16)


def write(path, array, affine=LPS) -> str:
    nib.save(nib.Nifti1Image(array, affine), path)
    return str(path)


@pytest.fixture
def study(tmp_path):
    """Item with four contrasts and a mask with the BraTS values 1, 2, 4."""
    item = {"study": "S1", "patient": "S1"}
    for index, key in enumerate(CONTRAST_KEYS):
        item[key] = write(tmp_path / f"S1_{key}.nii.gz", brain_volume(index))
    mask = np.zeros(SHAPE, np.uint8)
    mask[10:16, 8:10], mask[12:14, 8], mask[12, 8] = 2, 4, 1
    item["seg"] = write(tmp_path / "S1_seg.nii.gz", mask)
    return item


def test_load_stacks_in_contrast_order(study):
    out = LoadStudyd()(study)
    assert isinstance(out["image"], MetaTensor) and out["image"].dtype == torch.float32
    for index, key in enumerate(CONTRAST_KEYS):
        np.testing.assert_array_equal(out["image"][index], nib.load(study[key]).get_fdata())
        assert out[key] == study[key]
    assert out["has_contrast"].tolist() == [True] * 4 and bool(out["has_mask"])
    np.testing.assert_array_equal(out["image"].affine, LPS)
    raw = nib.load(study["seg"]).get_fdata()
    expected = np.select([raw == 2, raw == 4, raw == 1], [1, 2, 3], 0)
    assert out["label"].dtype == torch.uint8 and isinstance(out["label"], MetaTensor)
    np.testing.assert_array_equal(out["label"][0], expected)


def test_coded_sform_counts_where_the_voxel_sizes_do_not_fit_it(study):
    """Left behind by tools that write the sform alone; MONAI's reader takes the uncoded qform in its place."""
    for key in (*CONTRAST_KEYS, "seg"):
        image = nib.load(study[key])
        image.header["pixdim"][1:4], image.header["qform_code"] = 1, 0
        image.header["quatern_b"] = image.header["quatern_c"] = image.header["quatern_d"] = 0
        nib.save(image, study[key])
    out = LoadStudyd()(study)
    np.testing.assert_array_equal(nib.load(study["t1"]).affine, LPS)
    for name in ("image", "label"):
        np.testing.assert_array_equal(out[name].affine, LPS)
    np.testing.assert_array_equal(out["image"].meta["original_affine"], LPS)


def test_missing_contrasts_and_mask(study):
    out = LoadStudyd()({"study": "S1", "t1": None, "t2": study["t2"]})
    assert out["has_contrast"].tolist() == [False, False, False, True]
    assert not out["image"][:3].any() and out["image"][3].any()
    assert not out["has_mask"] and not out["label"].any() and out["label"].shape == (1, *SHAPE)


def test_each_file_is_read_once(study, monkeypatch):
    calls = []
    decode = NibabelReader.get_data
    monkeypatch.setattr(NibabelReader, "get_data", lambda r, img: calls.append(img.get_filename()) or decode(r, img))
    study_transforms(32)(study)
    assert sorted(calls) == sorted(study[key] for key in (*CONTRAST_KEYS, "seg"))


@pytest.mark.parametrize("values,raw,internal", [(None, 3, 2), ({"ED": 1}, 1, 1), ({"ET": 1, "background": [4]}, 4, 0)])
def test_mask_coding(study, tmp_path, values, raw, internal):
    study["seg"] = write(tmp_path / "m.nii.gz", np.where(brain_volume(0) > 0, raw, 0).astype(np.float32))
    label = LoadStudyd(mask_values=values)(study)["label"]
    np.testing.assert_array_equal(label[0], np.where(brain_volume(0) > 0, internal, 0))


def test_binary_mask_is_pointed_out(study, tmp_path, caplog):
    study["seg"] = write(tmp_path / "lesions.nii.gz", (brain_volume(0) > 0).astype(np.uint8))
    with caplog.at_level(logging.WARNING):
        assert LoadStudyd()(study)["label"].max() == 3
    assert "lesions.nii.gz" in caplog.text and "mask_values" in caplog.text


@pytest.mark.parametrize("values", [{"WT": 1}, {"ED": 1, "ET": 1}, {"ED": 0}])
def test_senseless_mask_values(values):
    with pytest.raises(ValueError, match="mask_values"):
        LoadStudyd(mask_values=values)


def truncated(path):
    write(path, np.random.default_rng(0).integers(1, 3000, (40, 40, 40)).astype(np.int16))
    path.write_bytes(path.read_bytes()[:20000])


def with_value(value):
    array = brain_volume(1).astype(np.float32)
    array[12, 9, 3] = value
    return array


def shifted(mm):
    affine = LPS.copy()
    affine[0, 3] += mm
    return affine


def with_header(first, content):
    """A file with other bytes in its header."""

    def make(path):
        file = bytearray(nib.Nifti1Image(brain_volume(1), LPS).to_bytes())
        file[first : first + len(content)] = content
        path.write_bytes(gzip.compress(file))

    return make


def sheared():
    affine = LPS.copy()
    affine[:3, 1] = affine[:3, 0] + [0, 1e-3, 0]
    return affine


def z_scored():
    array = brain_volume(1).astype(np.float32)
    inside = array > 0
    return np.where(inside, (array - array[inside].mean()) / array[inside].std(), 0).astype(np.float32)


# which file is replaced, how, and what the sentence must say beside the file's name
BAD_FILES = {
    "absent": ("t1", lambda p: None, "does not exist"),
    "truncated": ("t1", truncated, "cannot be read"),
    "not a NIfTI file": ("t1", lambda p: p.write_bytes(gzip.compress(b"hello")), "cannot be read"),
    "shape": ("t1", lambda p: write(p, brain_volume(1, (24, 20, 7))), r"24 x 20 x 7 but .*S1_flair.* has 24 x 20 x 6"),
    "affine": ("t1", lambda p: write(p, brain_volume(1), shifted(0.5)), r"S1_flair.*affines \(corners up to 0.5 mm"),
    "singular affine": ("t1", with_header(296, bytes(16)), "no valid affine"),
    "NaN": ("t1", lambda p: write(p, with_value(np.nan)), "NaN or infinite"),
    "infinite": ("t1", lambda p: write(p, with_value(np.inf)), "NaN or infinite"),
    "4-D": ("t1", lambda p: write(p, np.stack([brain_volume(1)] * 2, -1)), "4-D with shape 24 x 20 x 6 x 2"),
    "2-D": ("t1", lambda p: write(p, brain_volume(1)[..., 3]), "2-D"),
    "complex": ("t1", lambda p: write(p, brain_volume(1).astype(np.complex64)), "complex numbers"),
    "float64": ("t1", lambda p: write(p, brain_volume(1) * 1e37), "or some above 3.4e38"),
    "colors": ("t1", lambda p: write(p, np.zeros(SHAPE, [(c, np.uint8) for c in "RGB"])), "holds colors"),
    "flat affine": ("t1", lambda p: write(p, brain_volume(1), np.diag([1, 1, 1e-4, 1])), "no valid affine|voxels of"),
    "dependent axes": ("t1", lambda p: write(p, brain_volume(1), sheared()), "no valid affine"),
    "NaN in the affine": ("t1", with_header(296, np.float32(np.nan).tobytes()), "no valid affine"),
    "meters": ("t1", lambda p: write(p, brain_volume(1), LPS * 1e-3), "voxels of 0.001 x 0.001 x 0.002 mm"),
    "micrometers": ("t1", lambda p: write(p, brain_volume(1), LPS * 1e3), "voxels of 1e\\+03 x"),
    "constant": ("t1", lambda p: write(p, (brain_volume(1) > 0).astype(np.uint8)), "one value only"),
    "negative": ("t1", lambda p: write(p, z_scored()), "negative values .* before intensity normalization"),
    "empty": ("t1", lambda p: write(p, np.zeros(SHAPE, np.int16)), "0 everywhere"),
    "unknown label": ("seg", lambda p: write(p, np.full(SHAPE, 7, np.uint8)), "unknown label value 7"),
    "NaN in the mask": ("seg", lambda p: write(p, with_value(np.nan) * 0), "unknown label value nan"),
    "two codes for ET": ("seg", lambda p: write(p, (brain_volume(1) % 5).astype(np.uint8)), "values 3 and 4"),
    "mask shape": ("seg", lambda p: write(p, np.zeros((24, 20, 7), np.uint8)), "24 x 20 x 7"),
    "mask affine": ("seg", lambda p: write(p, np.zeros(SHAPE, np.uint8), shifted(2)), "affines"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files(study, tmp_path, kind):
    key, make, words = BAD_FILES[kind]
    path = tmp_path / f"bad_{key}.nii.gz"
    make(path)
    study[key] = str(path)
    for transform in (LoadStudyd(), study_transforms(32)):
        with pytest.raises(StudyError, match=words) as caught:
            transform(study)
        message = str(caught.value)
        assert str(path) in message and "\n" not in message and message.endswith(".") and ". " not in message
    assert find_study_error(RuntimeError("other")) is None


def test_no_contrast(study):
    with pytest.raises(StudyError, match="Study S1 has no contrast: give at least one of flair, t1"):
        LoadStudyd()({"study": "S1", "seg": study["seg"]})


@pytest.mark.parametrize("axes", [1, 3])
def test_what_is_accepted(study, tmp_path, axes):
    # axes of one volume, rounding in the header, interpolation overshoot
    study["t1"] = write(tmp_path / "axis.nii.gz", brain_volume(1)[..., *[None] * axes])
    study["t2"] = write(tmp_path / "overshoot.nii.gz", with_value(-40.0), shifted(1e-3))
    # other byte order, a background of -1e-7 from rescaling
    study["flair"] = write(tmp_path / "order.nii.gz", brain_volume(0).astype(">f4"))
    study["t1ce"] = write(tmp_path / "rescaled.nii.gz", brain_volume(2).astype(np.float32) - 1e-7)
    out = study_transforms(32)(study)
    assert out["image"].shape == (4, 32, 32, 6) and float(out["image"].min()) == -1
    loaded = LoadStudyd()(study)["image"]
    np.testing.assert_array_equal(loaded[0], brain_volume(0))
    assert float(loaded.min()) == 0


def test_axes_in_another_order_are_the_same_grid(study, tmp_path):
    expected = LoadStudyd()(study)
    for key in ("t1", "seg"):
        image = nib.load(study[key]).as_reoriented(nib.orientations.axcodes2ornt("SAL"))
        study[key] = str(tmp_path / f"turned_{key}.nii.gz")
        nib.save(image, study[key])
    found = LoadStudyd()(study)
    assert torch.equal(found["image"], expected["image"]) and torch.equal(found["label"], expected["label"])


def test_another_grid_of_the_same_frame_is_resampled_where_asked_for(study, tmp_path):
    coarse = nib.Nifti1Image(brain_volume(1, (12, 10, 6)).astype(np.float32), LPS @ np.diag([2, 2, 1, 1]))
    study["t1"] = str(tmp_path / "coarse_t1.nii.gz")
    nib.save(coarse, study["t1"])
    with pytest.raises(StudyError, match="--resample True"):
        LoadStudyd()(study)
    out = LoadStudyd(resample=True)(study)
    assert out["image"].shape[1:] == SHAPE
    np.testing.assert_allclose(out["image"][1][::2, ::2], coarse.get_fdata(), rtol=1e-4, atol=0.01)
    chosen = LoadStudyd(resample="t1")(study)
    assert chosen["grid"] == "t1" and chosen["image"].shape[1:] == coarse.shape
    nib.save(nib.Nifti1Image(brain_volume(1), shifted(500)), tmp_path / "far.nii.gz")
    with pytest.raises(StudyError, match="no place in common"):
        LoadStudyd(resample=True)({**study, "t1": str(tmp_path / "far.nii.gz")})


def test_one_file_for_two_contrasts(study):
    with pytest.raises(StudyError, match="name one file twice"):
        LoadStudyd()({**study, "t2": study["t1"]})


def test_a_file_that_may_not_be_read(study, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: "t1" not in os.path.basename(path))  # root may read anything
    with pytest.raises(StudyError, match="may not be read: change its permissions"):
        LoadStudyd()(study)


def test_scale_brain_against_a_loop(study):
    out = ScaleBraind()(LoadStudyd()({**study, "t1ce": None}))
    for channel, key in enumerate(CONTRAST_KEYS):
        if key == "t1ce":
            assert (out["image"][channel] == -1).all() and out["intensity_scale"][channel] == 0
            continue
        raw = nib.load(study[key]).get_fdata()
        values = sorted(v for v in raw.ravel() if v > 0)
        position = 0.995 * (len(values) - 1)
        low = math.floor(position)
        top = values[low] + (position - low) * (values[min(low + 1, len(values) - 1)] - values[low])
        expected = np.array([min(v / top, 1.0) * 2 - 1 if v > 0 else -1.0 for v in raw.ravel()]).reshape(SHAPE)
        np.testing.assert_allclose(out["image"][channel], expected, atol=1e-6)
        assert float(out["intensity_scale"][channel]) == pytest.approx(top)


def test_scale_slice_against_a_loop(study):
    loaded = LoadStudyd()({**study, "t2": None})
    loaded["image"][0] += 100 * torch.arange(SHAPE[2])  # slices without background have minima of their own
    out = ScaleSliced("image")(loaded)["image"]
    for channel, raw in enumerate(loaded["image"].numpy()):
        for z in range(SHAPE[2]):
            low, high = raw[..., z].min(), raw[..., z].max()
            expected = (raw[..., z] - low) / (high - low) * 2 - 1 if high > low else np.full(SHAPE[:2], -1.0)
            np.testing.assert_allclose(out[channel, ..., z], expected, atol=1e-6)


def test_scaling_leaves_its_input_alone(study):
    loaded = LoadStudyd()(study)
    before = loaded["image"].clone()
    ScaleBraind()(loaded), ScaleSliced("image")(loaded), BrainMaskd()(loaded)
    assert torch.equal(loaded["image"], before)


@pytest.mark.parametrize("scaling", ["brain", "per_slice"])
def test_whole_preprocessing(study, scaling):
    out = study_transforms(32, scaling=scaling)(study)
    assert out["image"].shape == (4, 32, 32, 6) and out["image"].dtype == torch.float32
    assert out["label"].shape == out["brain"].shape == (1, 32, 32, 6)
    assert out["label"].dtype == out["brain"].dtype == torch.uint8
    assert float(out["image"].min()) == -1 and float(out["image"].max()) == 1
    # padding is background in every output, and nothing of brain or tumor is lost
    assert (out["image"][:, 0] == -1).all() and not out["label"][:, 0].any()
    assert int(out["brain"].sum()) == np.count_nonzero(brain_volume(0))
    assert int((out["label"] > 0).sum()) == np.count_nonzero(nib.load(study["seg"]).get_fdata())
    for axis in (1, 2):
        where = torch.nonzero(out["brain"].amax(dim=[d for d in range(4) if d != axis])).flatten()
        assert abs(int(where[0]) - (31 - int(where[-1]))) <= 1
    # turned to RAS: x and y run against the file
    world = out["image"].affine @ torch.tensor([16.0, 16, 3, 1], dtype=torch.float64)
    voxel = np.rint(np.linalg.inv(LPS) @ world.numpy()).astype(int)[:3]
    np.testing.assert_array_equal(out["image"].affine[:3, :3], np.diag([1, 1, 2]))
    raw = nib.load(study["t1"]).get_fdata()[tuple(voxel)]
    if scaling == "brain":
        value = (float(out["image"][1, 16, 16, 3]) + 1) / 2 * float(out["intensity_scale"][1])
        assert value == pytest.approx(min(raw, float(out["intensity_scale"][1])), rel=1e-5)


def test_wrong_settings():
    with pytest.raises(ValueError, match="scaling"):
        study_transforms(scaling="z")
    with pytest.raises(ValueError, match="spacing must be greater than 0"):
        study_transforms(spacing=0)
    with pytest.raises(ValueError, match="multiple of 16"):
        study_transforms(image_size=100)


@pytest.mark.parametrize("size,expected", [(16, (16, 16)), ((32, 16), (32, 16))])
def test_a_wide_brain_is_never_cut(size, expected):
    brain = torch.zeros(1, 50, 30, 4)
    brain[:, 3:43, 10:24] = 1
    out = CropBraind(("image", "brain"), size=size, pad_value=(-1, 0))({"image": brain * 2 - 1, "brain": brain})
    assert out["brain"].shape == (1, 48, expected[1], 4)
    assert out["brain"].sum() == brain.sum() and torch.equal(out["image"] + 1, out["brain"] * 2)


def invert(transform, out, pred):
    # as in inference, where the prediction of a MetaTensor is one; Invertd skips a plain tensor with a warning
    item = {**out, "pred": MetaTensor(pred)}
    return Invertd("pred", transform, orig_keys="image", nearest_interp=False)(item)["pred"]


@pytest.mark.parametrize("size", [16, 32])
def test_inverse_is_exact_without_resampling(study, size):
    transform = study_transforms(size)
    out = transform(study)
    pred = torch.cat([(out["image"].as_tensor() + 1) / 2, out["label"].as_tensor().float(), out["brain"].as_tensor()])
    back = invert(transform, out, pred)
    assert back.shape == (6, *SHAPE)
    np.testing.assert_array_equal(back.affine, LPS)
    for channel, key in enumerate(CONTRAST_KEYS):
        raw = nib.load(study[key]).get_fdata()
        scale = float(out["intensity_scale"][channel])
        np.testing.assert_allclose(back[channel], np.clip(raw / scale, 0, 1), atol=1e-6)
    np.testing.assert_array_equal(back[4], LoadStudyd()(study)["label"][0])
    np.testing.assert_array_equal(back[5], brain_volume(0) > 0)


def test_resampling_is_in_the_plane_only_and_goes_back(tmp_path):
    affine = np.diag([0.5, 0.5, 3.0, 1.0])
    shape = (40, 36, 5)
    smooth = np.where(brain_volume(0, shape) > 0, 1000 + 10 * np.arange(40)[:, None, None], 0).astype(np.float32)
    path = write(tmp_path / "fine.nii.gz", smooth, affine)
    mask = write(tmp_path / "mask.nii.gz", (smooth > 1200).astype(np.uint8) * 2, affine)
    transform = study_transforms(32)
    out = transform({"study": "S", "t1": path, "seg": mask})
    assert out["image"].shape == (4, 32, 32, 5)
    np.testing.assert_allclose(out["image"].affine.diagonal()[:3], [1, 1, 3])
    assert set(torch.unique(out["label"]).tolist()) == {0, 1} and out["label"].dtype == torch.uint8
    back = invert(transform, out, (out["image"] + 1) / 2)
    assert back.shape == (4, *shape)
    np.testing.assert_allclose(back.affine, affine, atol=1e-6)
    inside = brain_volume(0, shape, 0.25) > 0
    restored = back[1].numpy() * float(out["intensity_scale"][1])
    np.testing.assert_allclose(restored[inside], smooth[inside], rtol=0.02)
    kept = study_transforms(48, spacing=None)({"study": "S", "t1": path})
    np.testing.assert_allclose(kept["image"].affine.diagonal()[:3], [0.5, 0.5, 3])


def test_brain_at_the_edge_of_the_field_of_view_keeps_its_intensity(tmp_path):
    slab = np.full((16, 16, 4), 500, np.int16)
    slab[8, 8] = 1000
    out = study_transforms(32)({"study": "S", "t1": write(tmp_path / "slab.nii.gz", slab, np.diag([1.5, 1.5, 3, 1]))})
    brain = out["image"][1][out["brain"][0] > 0]
    assert len(brain) == 24 * 24 * 4
    assert float(brain.min() + 1) / 2 * float(out["intensity_scale"][1]) == pytest.approx(500, rel=1e-5)


def test_spacing_within_one_percent_is_not_resampled(tmp_path):
    path = write(tmp_path / "x.nii.gz", brain_volume(0), np.diag([0.995, 1.005, 1, 1]))
    out = study_transforms(32)({"study": "S", "t1": path})
    assert int(out["brain"].sum()) == np.count_nonzero(brain_volume(0))
    np.testing.assert_allclose(out["image"].affine.diagonal()[:2], [0.995, 1.005], atol=1e-6)


def test_inverse_keeps_what_is_predicted_beside_the_brain(tmp_path):
    """A brain as wide as a multiple of 16 at 2 mm, in a file of 1 mm: its border is interpolated from both sides."""
    brain = np.zeros((60, 60, 3), np.int16)
    brain[10:42, 10:42] = 100
    brain[12, 12] = 90  # a volume of one value is taken for a mask
    transform = study_transforms(32, spacing=2.0)
    out = transform({"study": "S", "t1": write(tmp_path / "t1.nii.gz", brain, np.eye(4))})
    assert torch.count_nonzero(out["brain"][0].amax(dim=(1, 2))) == 16
    back = invert(transform, out, torch.ones(1, *out["image"].shape[1:]))
    np.testing.assert_allclose(back[0].numpy()[brain > 0], 1, atol=1e-5)


def test_availability_planes_and_slice_inference(study):
    transform = study_transforms(32)
    out = transform(study)
    out["has_contrast"] = torch.tensor([True, False, True, False])
    shown = AddAvailabilityd("image")(out)
    image = shown["image"]
    assert image.shape == (8, 32, 32, 6)
    assert torch.equal(image[[0, 2]], out["image"][[0, 2]]) and (image[[1, 3]] == -1).all()
    assert [plane.unique().tolist() for plane in image[4:]] == [[1], [0], [1], [0]]
    inferer = SliceInferer(roi_size=(32, 32), spatial_dim=2, sw_batch_size=4)
    pred = inferer(image[None], lambda x: (x[:, :4] + 1) / 2)[0]
    assert invert(transform, shown, pred).shape == (4, *SHAPE)


DATA = REPOSITORY.parent / "shared" / "data"


@pytest.mark.skipif(not DATA.is_dir(), reason="the studies for development are not here")
def test_real_studies():
    folder = DATA / "brats" / "BraTS2021_00031"
    item = {"study": "S", **{k: str(folder / f"{folder.name}_{k}.nii.gz") for k in (*CONTRAST_KEYS, "seg")}}
    transform = study_transforms()
    out = transform(item)
    assert out["image"].shape == (4, 192, 192, 155)
    raw = nib.load(item["flair"])
    back = invert(transform, out, (out["image"][:1] + 1) / 2)
    expected = np.clip(raw.get_fdata() / float(out["intensity_scale"][0]), 0, 1)
    np.testing.assert_allclose(back[0], expected, atol=1e-6)
    np.testing.assert_array_equal(back.affine, raw.affine)

    folder = DATA / "ms" / "patient07"
    item = {"study": "MS", "t1ce": str(folder / "T1POST.nii.gz"), "seg": str(folder / "GOLD_STANDARD.nii.gz")}
    out = study_transforms(mask_values={"ED": 1})(item)
    assert out["image"].shape == (4, 192, 192, 182) and out["has_contrast"].tolist() == [False, False, True, False]
    assert int(out["label"].sum()) == np.count_nonzero(nib.load(item["seg"]).dataobj)
