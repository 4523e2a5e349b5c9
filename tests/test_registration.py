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

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import itk
import nibabel as nib
import numpy as np
import pytest
from builders import config_files
from monai.bundle import ConfigParser, create_workflow
from monai.data import MetaTensor
from scipy.ndimage import affine_transform
from scipy.spatial.transform import Rotation
from studies import PREPROCESSING, TINY, results

from scripts.contrasts import StudyError
from scripts.data.registration import RigidRegistration
from scripts.data.transforms import LoadStudyd
from scripts.demo.phantom import make_phantom, phantom_affine
from scripts.networks.sscf import SSCFNet
from scripts.networks.weights import save_weights

SHAPE = (60, 60, 40)  # voxels of 4 mm
AFFINE = phantom_affine(SHAPE)
NUMBERS = ("sampling", "iterations", "bins", "levels")


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


@pytest.fixture(scope="module")
def register() -> RigidRegistration:
    """With the numbers of ``inference.json``."""
    parser = ConfigParser()
    parser.read_config(config_files("inference"))
    return RigidRegistration(**{name: parser[f"register_{name}"] for name in NUMBERS})


def test_registration_finds_how_the_head_moved(study, pose, register):
    fixed, moving = (MetaTensor(nib.load(study[key]).get_fdata(), affine=AFFINE).float() for key in ("flair", "t2"))
    found = register(fixed, moving)
    inside = np.argwhere(moving.numpy() > 0)[::100]
    distance = ((found - pose @ AFFINE) @ np.c_[inside, np.ones(len(inside))].T)[:3]
    assert np.linalg.norm(distance, axis=0).mean() < 1.0


def test_each_volume_that_is_registered_is_a_line_of_the_log(study, caplog):
    steps = []

    def told() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.name == "scripts.data.transforms"]

    def register(fixed: MetaTensor, moving: MetaTensor) -> np.ndarray:
        steps.append(told())
        return moving.affine.numpy()

    item = {"study": "S", "t1": study["flair"], "t1ce": study["t2"]}
    caplog.set_level("INFO")
    LoadStudyd()(item)
    assert told() == []
    item["t2"] = str(shutil.copy(study["t2"], study["t2"].replace("S_t2", "S_other")))
    LoadStudyd(resample="t2", register=register)(item)
    # each is told before it begins
    lines = ["Study S: registering t1 to t2", "Study S: registering t1ce to t2"]
    assert steps == [lines[:1], lines]


def test_a_registered_contrast_lies_where_it_would_without_the_movement(study, register):
    unmoved = make_phantom(0, 0, SHAPE)["t2"]
    before, after = LoadStudyd()(study)["image"], LoadStudyd(register=register)(study)["image"]
    similarity = [np.corrcoef(image[3].numpy()[unmoved > 0], unmoved[unmoved > 0])[0, 1] for image in (before, after)]
    assert similarity[1] > 0.75 > 0.5 > similarity[0], similarity
    np.testing.assert_array_equal(after[0], before[0])


@contextmanager
def itk_threads(number: int) -> Iterator[None]:
    threads = itk.MultiThreaderBase
    before = threads.GetGlobalMaximumNumberOfThreads(), threads.GetGlobalDefaultNumberOfThreads()
    threads.SetGlobalMaximumNumberOfThreads(number)
    threads.SetGlobalDefaultNumberOfThreads(number)
    yield
    threads.SetGlobalMaximumNumberOfThreads(before[0])
    threads.SetGlobalDefaultNumberOfThreads(before[1])


def test_registering_run_that_goes_on_with_other_threads_ends_with_the_same_files(study, tmp_path):
    save_weights(tmp_path / "model.pt", SSCFNet(**TINY), {"preprocessing": PREPROCESSING})
    rows = [f"{name},{study['flair']},{study['t2']}" for name in ("A1", "B2")]
    (tmp_path / "studies.csv").write_text("\n".join(["study,flair,t2", *rows]))

    def run(output_dir: str, **settings: object) -> int:
        made = create_workflow(
            config_file=config_files("inference")[0], workflow_type="inference", logging_file=False, device="cpu",
            ckpt_path=str(tmp_path / "model.pt"), amp=False, handlers=[], datalist_file=str(tmp_path / "studies.csv"),
            output_dir=str(tmp_path / output_dir), page=False, register=True, **settings,
        )  # fmt: skip
        made.run()
        return len(made.evaluator.seconds)

    with itk_threads(4):
        assert run("whole") == 2
    with itk_threads(1):
        assert run("resumed", shard="1/2") == 1
    with itk_threads(3):
        assert run("resumed") == 1
    assert results(tmp_path / "whole") == results(tmp_path / "resumed")


@pytest.mark.parametrize(
    "wrong", [{"sampling": 0.0}, {"sampling": 1.5}, {"iterations": 0}, {"bins": 4}, {"levels": [2, 0]}, {"levels": []}]
)
def test_numbers_of_the_registration_that_cannot_be_are_refused(wrong):
    with pytest.raises(StudyError, match=f"register_{next(iter(wrong))} must be|and register_bins at least"):
        RigidRegistration(**{"sampling": 0.1, "iterations": 60, "bins": 50, "levels": [4, 2, 1], **wrong})
