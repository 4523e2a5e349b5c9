# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
from monai.data import MetaTensor
from scipy.ndimage import affine_transform
from scipy.spatial.transform import Rotation

from scripts.data.registration import registered_affine
from scripts.data.transforms import LoadStudyd
from scripts.demo.phantom import make_phantom, phantom_affine

SHAPE = (60, 60, 40)  # voxels of 4 mm
AFFINE = phantom_affine(SHAPE)


@pytest.fixture(scope="module")
def pose() -> np.ndarray:
    """A turn of 6 degrees about the middle of the head and a shift of 5 mm."""
    center = (AFFINE @ [*(np.asarray(SHAPE) / 2), 1])[:3]
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_euler("xyz", [4, -2, 4], degrees=True).as_matrix()
    matrix[:3, 3] = center - matrix[:3, :3] @ center + [3, -4, 1]
    return matrix


@pytest.fixture(scope="module")
def study(tmp_path_factory, pose) -> dict[str, str]:
    """FLAIR and T2 of a phantom that moved between them, which the affine on file does not tell."""
    volumes = make_phantom(0, 0, SHAPE)
    voxels = np.linalg.inv(AFFINE) @ pose @ AFFINE
    volumes["t2"] = affine_transform(volumes["t2"], voxels[:3, :3], voxels[:3, 3], order=1)
    item = {"study": "S"}
    for key in ("flair", "t2"):
        item[key] = str(tmp_path_factory.mktemp("study") / f"S_{key}.nii.gz")
        nib.save(nib.Nifti1Image(volumes[key], AFFINE), item[key])
    return item


def test_registration_finds_how_the_head_moved(study, pose):
    fixed, moving = (MetaTensor(nib.load(study[key]).get_fdata(), affine=AFFINE).float() for key in ("flair", "t2"))
    found = registered_affine(fixed, moving)
    inside = np.argwhere(moving.numpy() > 0)[::100]
    distance = ((found - pose @ AFFINE) @ np.c_[inside, np.ones(len(inside))].T)[:3]
    assert np.linalg.norm(distance, axis=0).mean() < 1.0


def test_a_registered_contrast_lies_where_it_would_without_the_movement(study):
    unmoved = make_phantom(0, 0, SHAPE)["t2"]
    before, after = LoadStudyd()(study)["image"], LoadStudyd(register=True)(study)["image"]
    similarity = [np.corrcoef(image[3].numpy()[unmoved > 0], unmoved[unmoved > 0])[0, 1] for image in (before, after)]
    assert similarity[1] > 0.75 > 0.5 > similarity[0], similarity
    np.testing.assert_array_equal(after[0], before[0])
