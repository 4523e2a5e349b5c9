# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Small studies on disk, and networks that copy an input, for the tests of inference."""

from __future__ import annotations

import gzip
import json
import os

import nibabel as nib
import numpy as np
import torch
from monai.data import DataLoader
from monai.data.utils import no_collation
from torch import nn

from scripts.contrasts import CONTRAST_KEYS
from scripts.inference.evaluator import StudyEvaluator
from scripts.inference.inferer import BrainSliceInferer, predict
from scripts.inference.postprocessing import prediction_transforms
from scripts.inference.preprocessing import StudyDataset, inference_transforms, list_studies
from scripts.inference.writer import StudyWriter

SHAPE = (40, 36, 6)
TINY = {"channels": [4, 8, 8, 8, 8], "bank_size": 5}
PREPROCESSING = {"image_size": 48, "spacing": 1.0, "scaling": "brain"}
ANGLE = np.deg2rad(7)
GRIDS = {
    "LPS": [[-1, 0, 0, 90], [0, -1, 0, 126], [0, 0, 1, -72]],
    "RAS, thick slices": [[1, 0, 0, -20], [0, 1, 0, -18], [0, 0, 5, 3]],
    "oblique": [[np.cos(ANGLE), -np.sin(ANGLE), 0, 3], [np.sin(ANGLE), np.cos(ANGLE), 0, 4], [0, 0, 3, 5]],
    "sagittal, flipped": [[0, 0, -1, 30], [1, 0, 0, -5], [0, -1, 0, 8]],
    "left-handed": [[-1, 0, 0, 9], [0, 1, 0, 8], [0, 0, 2, 7]],
}


def affine_of(rows) -> np.ndarray:
    return np.vstack([np.asarray(rows, float), [0, 0, 0, 1]])


LPS = affine_of(GRIDS["LPS"])


def brain_volume(seed: int, shape=SHAPE) -> np.ndarray:
    """Random intensities in an ellipsoid that moves with the seed, 0 around it."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.linspace(-0.5, 0.5, n) for n in shape], indexing="ij"), -1)
    inside = np.linalg.norm((grid - [0.08, -0.05 + 0.02 * seed, 0]) / [1, 1, 1.1], axis=-1) < 0.35
    return np.where(inside, rng.integers(1, 3000, shape), 0).astype(np.int16)


def write_study(folder, keys, name="S1", affine=LPS, shape=SHAPE) -> dict[str, str]:
    """Write some contrasts of a study; returns the paths by key."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for key in keys:
        paths[key] = str(folder / f"{name}_{key}.nii.gz")
        nib.save(nib.Nifti1Image(brain_volume(CONTRAST_KEYS.index(key), shape), affine), paths[key])
    return paths


def load(path) -> np.ndarray:
    return np.asanyarray(nib.load(path).dataobj)


def scaled(path) -> np.ndarray:
    values = load(path).astype(np.float64)
    return np.clip(values / np.percentile(values[values > 0], 99.5), 0, 1)


class CopyNet(nn.Module):
    """Gives one input contrast as every contrast; ED where it is bright, ET where it is very bright."""

    def __init__(self, source: int = 0) -> None:
        super().__init__()
        self.source, self.slices = source, 0

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        self.slices += len(image)
        value = image[:, self.source : self.source + 1]
        classes = [(value > 0).float() * 0.7, (value > 0.6).float() * 0.9, torch.full_like(value, 0.4)]
        return torch.cat([value.expand(-1, 4, -1, -1), *classes], dim=1)


def fill_with(network, paths, output_dir, **options):
    """One study as the evaluator does it, on the CPU; what fails is raised as it is.

    ``options`` are ``preprocessing``, ``study``, and those of ``prediction_transforms``.
    """
    preprocessing = options.pop("preprocessing", None) or inference_transforms(image_size=48)
    data = preprocessing(list_studies(**paths, study=options.pop("study", None))[0])
    data["pred"] = predict(data["image"], network, BrainSliceInferer(), "cpu")
    return StudyWriter(output_dir)(prediction_transforms(preprocessing, **options)(data))


def evaluate(items, output_dir, network=None, writer=None, num_workers=0, **options) -> StudyEvaluator:
    preprocessing = inference_transforms(image_size=48)
    dataset = StudyDataset(items, preprocessing)
    loader = DataLoader(dataset, batch_size=1, num_workers=num_workers, collate_fn=no_collation)
    return StudyEvaluator(
        "cpu",
        loader,
        network or CopyNet(),
        BrainSliceInferer(),
        prediction_transforms(preprocessing),
        writer or StudyWriter(output_dir),
        **options,
    )


def hidden(folder) -> list[str]:
    return [name for name in os.listdir(folder) if name.startswith(".")]


def results(folder) -> dict[str, object]:
    """What lies below a folder, without times: of a compressed file the content, of a record all else."""
    return {str(path.relative_to(folder)): _content(path) for path in folder.rglob("*") if path.is_file()}


def _content(path):
    if path.name.endswith("_synthesis.json"):
        return {
            k: v
            for k, v in json.loads(path.read_text()).items()
            if k not in ("seconds", "seconds_of_checks", "written")
        }
    return (gzip.decompress if path.suffix == ".gz" else bytes)(path.read_bytes())
