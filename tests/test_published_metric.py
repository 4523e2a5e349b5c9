# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""The protocol ``per_slice``, in evaluation and in validation, against scikit-image run on the files themselves."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch.utils.data import DataLoader

from scripts.contrasts import CONTRAST_KEYS, CONTRASTS, REGIONS
from scripts.data.datalist import find_studies
from scripts.data.slices import SliceDataset, prepare_slices
from scripts.data.transforms import study_transforms
from scripts.evaluation.bootstrap import summarize
from scripts.evaluation.evaluator import ScenarioSlices, SliceScenarios, list_scenarios
from scripts.evaluation.metrics import ScenarioScores, fill_background
from scripts.evaluation.protocols import PerSliceProtocol
from scripts.evaluation.scores import StudyScores

REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "brats"
SCENARIO = "FLAIR+T2"


def write_synthetic(folder: Path) -> list[dict]:
    """Two studies with vessels: some voxels far above the 99.5th percentile, which the network's scaling clips."""
    items = []
    for seed in (0, 1):
        draw, item = np.random.default_rng(seed), {"study": f"S{seed}", "patient": f"P{seed}"}
        brain = np.zeros((56, 52, 9), bool)
        brain[9 + seed : 45, 7:47, 1:] = True
        labels = np.zeros(brain.shape, np.uint8)
        for z in range(2, 8):
            labels[20 : 22 + z, 20:28, z], labels[20:24, 20:24, z], labels[22:24, 22:26, z] = 2, 1, 4
        for key in CONTRAST_KEYS:
            smooth = 500 + 300 * np.sin(np.arange(52)[:, None] / 5 + seed) + draw.integers(0, 200, brain.shape)
            volume = np.where(draw.random(brain.shape) < 0.002, 4 * smooth, smooth)
            item[key] = str(folder / f"S{seed}_{key}.nii.gz")
            nib.save(nib.Nifti1Image(np.where(brain, volume, 0).astype(np.int16), np.diag([-1, -1, 1, 1])), item[key])
        item["seg"] = str(folder / f"S{seed}_seg.nii.gz")
        nib.save(nib.Nifti1Image(labels, np.diag([-1, -1, 1, 1])), item["seg"])
        items.append(item)
    return items


def predict(image: torch.Tensor) -> torch.Tensor:
    """A network of a formula: every contrast from what is available, and some mask; B x 7 x H x W."""
    mean = (image[:, :4] * image[:, 4:]).sum(1, keepdim=True) / image[:, 4:].sum(1, keepdim=True).clamp(min=1)
    images = (1.1 * mean.roll(1, 2) + 0.05).clamp(-1, 1).expand(-1, 4, -1, -1)
    return torch.cat([images, (mean > 0.2).float() * torch.tensor([0.6, 0.7, 0.5]).view(1, 3, 1, 1)], dim=1)


def literal(item: dict, size: int, count: int, scaling: str) -> dict[tuple[str, str], float]:
    """Scores from the files: scikit-image with its defaults on slices scaled by their own range, Dice in loops."""

    def volume(key: str) -> np.ndarray:
        return np.asanyarray(nib.as_closest_canonical(nib.load(item[key])).dataobj).astype(np.float64)

    raw = {name: volume(key) for name, key in zip(CONTRASTS, CONTRAST_KEYS, strict=True)}
    label = volume("seg")
    brain = np.any([v > 0 for v in raw.values()], axis=0)
    frame = []
    for axis in (0, 1):
        hit = np.flatnonzero(brain.any(axis=tuple({0, 1, 2} - {axis})))
        start = hit[0] - (size - (hit[-1] + 1 - hit[0])) // 2
        assert start >= 0 and start + size <= brain.shape[axis]
        frame.append(slice(start, start + size))
    order = np.lexsort((brain.sum((0, 1)), (label > 0).sum((0, 1))))
    slices = {name: v[*frame].transpose(2, 0, 1)[np.sort(order[-count:])] for name, v in raw.items()}
    labels = label[*frame].transpose(2, 0, 1)[np.sort(order[-count:])]
    if scaling == "brain":
        unit = {name: np.percentile(v[v > 0], 99.5) for name, v in raw.items()}
        shown = {name: np.clip(slices[name] / unit[name], 0, 1) for name in raw}
    else:
        shown = {name: np.stack([(s - s.min()) / (s.max() - s.min()) for s in slices[name]]) for name in raw}
    available = torch.tensor([name in SCENARIO.split("+") for name in CONTRASTS])
    given = torch.from_numpy(2 * np.stack([shown[name] for name in CONTRASTS], 1) - 1).half().float()
    planes = available.view(1, 4, 1, 1).expand_as(given)
    made = predict(torch.cat([torch.where(planes, given, -1.0), planes.float()], 1))
    images = fill_background(made[:, :4], given, available.expand(len(given), -1)).double().numpy()
    out = {}
    for k, name in enumerate(CONTRASTS):
        pairs = []
        for z in range(count):
            t, g = slices[name][z], (images[z, k] + 1) / 2
            if scaling == "brain":
                g = (g * unit[name] - t.min()) / (t.max() - t.min())  # in intensities, then as the true slice
            t, g = (t - t.min()) / (t.max() - t.min()), np.clip(g, 0, 1)
            pairs.append((peak_signal_noise_ratio(t, g, data_range=1), structural_similarity(t, g, data_range=1)))
        out[name, "psnr"], out[name, "ssim"] = np.mean(pairs, axis=0)
    codes = {"ED": (2,), "ET": (3, 4), "NET": (1,)}
    classes = np.where(made[:, 4:].max(1).values < 0.5, 0, made[:, 4:].argmax(1) + 1)
    for name, members in REGIONS.items():
        ours = np.isin(classes, [("ED", "ET", "NET").index(m) + 1 for m in members])
        theirs = np.isin(labels, [code for m in members for code in codes[m]])
        found = [2 * (a & b).sum() / (a.sum() + b.sum()) for a, b in zip(ours, theirs, strict=True) if b.any()]
        out[name, "dice"] = np.mean(found) if found else np.nan
    return out


def check(items: list[dict], folder: Path, size: int, count: int, scaling: str) -> None:
    transform = study_transforms(size, scaling=scaling, clip=False)
    data = SliceDataset(prepare_slices(items, transform, folder), "largest_tumor", count, unclipped=True)
    assert float(data[0]["target"].max()) <= 1 and (scaling == "per_slice" or float(data[0]["unclipped"].max()) > 1)
    scores = StudyScores([PerSliceProtocol()], whole=False)
    for item in SliceScenarios(data, data, list_scenarios(items, [SCENARIO])):
        pred = predict(item["image"].permute(3, 0, 1, 2))
        scores({**item, "pred": pred.permute(1, 2, 3, 0)})
    values = {
        (row["study"], row["of"], row["protocol"], row["region"], row["score"]): row["value"] for row in scores.rows
    }
    expected = {item["study"]: literal(item, size, count, scaling) for item in items}
    for study, found in expected.items():
        for name in ("T1", "T1ce"):
            assert values[study, name, "per_slice", "whole", "psnr"] == pytest.approx(found[name, "psnr"], abs=5e-3)
            assert values[study, name, "per_slice", "whole", "ssim"] == pytest.approx(found[name, "ssim"], abs=2e-3)
        for name in REGIONS:
            if np.isfinite(found[name, "dice"]):
                assert values[study, name, "segmentation_per_slice", "whole", "dice"] == pytest.approx(
                    found[name, "dice"], abs=2e-3
                )

    # what the validation of a training computes, and chooses the best model by, is the number that is reported
    validation = ScenarioScores(data.studies)
    for batch in DataLoader(ScenarioSlices(data, [SCENARIO]), 5):
        batch["pred"] = predict(batch["image"])
        validation.update([batch[key] for key in validation.required_output_keys])
    rows = [row for row in scores.rows if (row["protocol"], row["region"]) == ("per_slice", "whole")]
    for entry in summarize(pd.DataFrame(rows), 0):
        if (entry["group"], entry["of"]) == ("all", "all") and entry["score"] in ("psnr", "ssim"):
            assert validation.compute()[entry["score"]] == pytest.approx(entry["mean"], rel=1e-5)


@pytest.mark.parametrize("scaling", ["brain", "per_slice"])
def test_scores_are_those_of_scikit_image_on_the_files(tmp_path: Path, scaling: str) -> None:
    check(write_synthetic(tmp_path), tmp_path / "cache", 48, 4, scaling)


@pytest.mark.skipif(not REAL.is_dir(), reason="no real cases in shared/data/brats beside the repository")
def test_scores_are_those_of_scikit_image_on_real_files(tmp_path: Path) -> None:
    complete = [item for item in find_studies(REAL) if all(key in item for key in (*CONTRAST_KEYS, "seg"))]
    check(complete[:1], tmp_path, 192, 20, "brain")
