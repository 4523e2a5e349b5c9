# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""What is written lies voxel on voxel over what was given, whatever its orientation, grid, type and header."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy.ndimage import binary_erosion
from studies import fill_with
from torch import nn

from scripts.contrasts import CONTRAST_KEYS, SCENARIOS
from scripts.inference.preprocessing import inference_transforms

AXES = [
    "".join(names[axis][sign] for axis, sign in zip(order, signs, strict=True))
    for order in ((0, 1, 2), (1, 0, 2), (2, 1, 0), (1, 2, 0))
    for signs in product((0, 1), repeat=3)
    for names in [("LR", "PA", "IS")]
]
OBLIQUE = ("none", "7 degrees", "20 degrees about every axis", "shear")
SPACINGS = ((1.0, 1.0, 1.0), (1.0, 1.0, 5.0), (0.6, 0.6, 3.0), (1.5, 1.2, 1.0), (2.0, 2.0, 2.0))
MATRICES = ((22, 26, 9), (23, 21, 4), (24, 24, 1))
TYPES = ("u1", "<i2", ">i2", "<u2", "<f4", ">f4", "<f8", "scaled <i2")
HEADERS = ("both", "sform", "qform", "nifti2", "uncompressed", "trailing axis")
PLACES = ("inside", "at the edge")
COUNT = 300


class CopyNet(nn.Module):
    """Gives the mean of the available contrasts as every contrast, and no tumor."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        given = image[:, 4:].amax(dim=(2, 3), keepdim=True)
        mean = (image[:, :4] * given).sum(dim=1, keepdim=True) / given.sum(dim=1, keepdim=True)
        return torch.cat([mean.expand(-1, 4, -1, -1), torch.zeros_like(image[:, :3])], dim=1)


def affine_of(axes: str, oblique: str, spacing: tuple[float, ...], shape: tuple[int, ...]) -> np.ndarray:
    """Affine of a volume whose array axes point to ``axes`` before it is turned or sheared about its center."""
    turn = np.eye(3)
    if oblique == "shear":
        turn[0, 2] = 0.15
    elif oblique != "none":
        for axis, angle in enumerate((0, 0, 7) if oblique == "7 degrees" else (20, 20, 20)):
            one, other = [i for i in range(3) if i != axis]
            rotation, radians = np.eye(3), np.deg2rad(angle)
            rotation[[one, one, other, other], [one, other, one, other]] = (
                np.cos(radians), -np.sin(radians), np.sin(radians), np.cos(radians),
            )  # fmt: skip
            turn = rotation @ turn
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.linalg.inv(
        nib.orientations.inv_ornt_aff(nib.orientations.axcodes2ornt(axes), shape)[:3, :3]
    )
    affine[:3, :3] *= spacing
    affine[:3, 3] = np.array([4.0, -17.5, 31.25]) - affine[:3, :3] @ (np.array(shape) - 1) / 2
    return affine


def brain(shape: tuple[int, ...], place: str, seed: int) -> np.ndarray:
    """A smooth, lopsided brain with values of 20 to 250."""
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, n) if n > 1 else np.zeros(1) for n in shape], indexing="ij")
    center = 0.1 if place == "inside" else 0.4
    inside = (x - center) ** 2 + (y + center) ** 2 + 0.5 * z**2 < 0.5
    return np.where(inside, 120 + 50 * x + 40 * np.sin(2 * y + seed) + 20 * z, 0)


def write_case(folder: Path, case: tuple, keys: list[str]) -> dict[str, str]:
    """The contrasts of one case on disk; in the order of the array axes of the file."""
    axes, oblique, spacing, matrix, kind, header, place = case
    order = nib.orientations.axcodes2ornt(axes)[:, 0].astype(int)
    shape, steps = (tuple(values[axis] for axis in order) for values in (matrix, spacing))
    affine = affine_of(axes, oblique, steps, shape)
    cls = nib.Nifti2Image if header == "nifti2" else nib.Nifti1Image
    paths = {}
    for number, key in enumerate(keys):
        ornt = nib.orientations.ornt_transform(
            nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(axes)
        )
        values = nib.orientations.apply_orientation(brain(matrix, place, number), ornt)
        if header == "trailing axis":
            values = values[..., None]
        dtype = np.dtype(kind.split()[-1])
        scale = 0.02 if kind.startswith("scaled") else 1
        template = cls(np.rint(values / scale).astype(dtype), None).header.as_byteswapped(
            ">" if kind.startswith(">") else "<"
        )
        template.set_data_dtype(dtype)
        template.set_zooms((*steps, 1.0) if header == "trailing axis" else steps)
        image = cls(np.rint(values) if scale == 1 else values, affine, template)
        image.set_sform(affine, code=0 if header == "qform" else 2)
        # a qform holds no shear, and files of scanners that shear have none
        image.set_qform(None if header == "sform" or oblique == "shear" else affine, code=1, strip_shears=True)
        if header == "sform" or oblique == "shear":
            image.header["qform_code"] = 0
        if scale != 1:
            image.header.set_slope_inter(scale, 0)
        paths[key] = str(folder / f"S_{key}.nii{'' if header == 'uncompressed' else '.gz'}")
        nib.save(image, paths[key])
    return paths


def draw_cases() -> list[tuple]:
    """``COUNT`` cases: every value of every property is in many of them, in ever other company."""
    rng = np.random.default_rng(0)
    columns = []
    for values in (AXES, OBLIQUE, SPACINGS, MATRICES, TYPES, HEADERS, PLACES, SCENARIOS):
        indices = np.resize(np.arange(len(values)), COUNT)
        columns.append([values[index] for index in rng.permutation(indices)])
    cases = list(zip(*columns, strict=True))
    # a qform cannot hold a shear: such a file does not exist
    return [(*case[:5], "both" if case[1] == "shear" and case[5] == "qform" else case[5], *case[6:]) for case in cases]


CASES = draw_cases()
PREPROCESSING = inference_transforms(image_size=32)


# those that are not slow have every value of every property
@pytest.mark.parametrize(
    "number", [pytest.param(n, marks=() if n % 4 == 3 else pytest.mark.slow) for n in range(COUNT)]
)
def test_identity_lands_voxel_on_voxel(tmp_path: Path, number: int) -> None:
    *case, scenario = CASES[number]
    keys = [key for key, given in zip(CONTRAST_KEYS, scenario, strict=True) if given]
    paths = write_case(tmp_path, tuple(case), keys)
    written = fill_with(CopyNet(), paths, tmp_path / "out", preprocessing=PREPROCESSING)
    assert set(written) == {*CONTRAST_KEYS, "seg"} - set(keys)

    first = nib.load(paths[keys[0]])
    given = np.stack([np.asarray(nib.load(paths[key]).dataobj, np.float64).reshape(first.shape[:3]) for key in keys])
    inside = (given > 0).any(axis=0)
    scaled = [np.clip(volume / np.percentile(volume[volume > 0], 99.5), 0, 1) for volume in given]
    expected = np.mean(scaled, axis=0)
    resampled = case[1] == "shear" or min(case[2][:2]) != 1 or max(case[2][:2]) != 1
    for key, path in written.items():
        image, source = nib.load(path), first.header
        assert image.shape == first.shape[:3]
        np.testing.assert_allclose(image.affine, first.affine, rtol=0, atol=1e-5)
        assert [int(image.header[code]) for code in ("qform_code", "sform_code")] == [
            int(source[code]) for code in ("qform_code", "sform_code")
        ]
        assert image.get_data_dtype() == (np.uint8 if key == "seg" else np.float32)
        result = np.asarray(image.dataobj)
        assert np.isfinite(result).all() and (result[~inside] == 0).all()
        if key == "seg":
            continue
        if not resampled:
            np.testing.assert_allclose(result, expected, atol=2e-6)
        else:
            # interpolation smooths the step at the surface, but moves and loses nothing, nor at the edge of the field
            core = binary_erosion(inside, np.ones([1 if n < 10 else 5 for n in inside.shape]), border_value=1)
            assert (result[inside] > 0).mean() > 0.98 and core.sum() > 20
            assert np.corrcoef(result[core], expected[core])[0, 1] > 0.98
