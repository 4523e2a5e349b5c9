# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Augmentation moves image and mask together, each sample by its own numbers, and leaves the background alone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from builders import generator, random_batch
from scipy.ndimage import affine_transform
from scipy.stats import kstest

from scripts.contrasts import scenario_table
from scripts.training.augmentation import Augmentation

STRENGTHS = {"rotation": 15.0, "scale": 0.2, "translation": 0.1, "flip": 0.5, "gamma": 0.3, "brightness": 0.2}
SPATIAL = ("rotation", "scale", "translation", "flip")


def disk_batch(number: int = 6, size: tuple[int, ...] = (32, 24)) -> dict[str, torch.Tensor]:
    """Random intensities within a disk; the background is -1 and has no class."""
    batch = random_batch(scenario_table()[:1].expand(number, -1), size)
    axes = torch.meshgrid(*(torch.linspace(-1, 1, s) for s in size), indexing="ij")
    inside = sum(a**2 for a in axes) < 0.6
    batch["target"] = torch.where(inside, batch["target"], -1.0)
    batch["label"] = (batch["label"] * inside).to(torch.uint8)
    batch["has_contrast"][1, 2] = False
    batch["target"][1, 2] = float("nan")
    batch["occurrence"] = torch.arange(number)
    return batch


@pytest.mark.parametrize("size", [(32, 24), (12, 10, 8)], ids=["2d", "3d"])
@pytest.mark.parametrize("names", [tuple(STRENGTHS), SPATIAL, ("gamma", "brightness")], ids=" ".join)
def test_augmented_batch_stays_in_range_and_keeps_what_is_not_there(names: tuple[str, ...], size: Any) -> None:
    batch = disk_batch(size=size)
    result = Augmentation(**{name: STRENGTHS[name] for name in names})(batch, 0, 1)
    target, label = result["source"], result["label"]
    assert target.shape == batch["target"].shape and label.dtype == torch.uint8
    assert bool(torch.isfinite(target).all()) and target.min() >= -1 and target.max() <= 1
    assert bool((target[1, 2] == -1).all())
    assert set(label.unique().tolist()) <= set(batch["label"].unique().tolist())
    corners = target[(..., *(slice(0, 1) for _ in size))]
    assert bool((corners == -1).all())
    assert not torch.equal(target[0], batch["target"][0])
    assert torch.equal(label, batch["label"]) == (names == ("gamma", "brightness"))
    assert bool(torch.isnan(batch["target"][1, 2]).all())  # the given batch is not changed


def test_zero_strength_returns_the_same_tensors() -> None:
    batch = disk_batch()
    result = Augmentation()(batch, 0, 1)
    assert result["target"] is result["source"] is batch["target"] and result["label"] is batch["label"]


def test_each_sample_depends_on_seed_epoch_and_occurrence_alone() -> None:
    batch, augment = disk_batch(), Augmentation(**STRENGTHS)
    whole = augment(batch, 3, 5)
    for i in (4, 1):
        alone = augment({name: value[i : i + 1] for name, value in batch.items()}, 3, 5)
        torch.testing.assert_close(alone["target"][0], whole["target"][i], rtol=0, atol=1e-5)
        assert float((alone["label"][0] != whole["label"][i]).float().mean()) < 0.01
    assert torch.equal(augment(batch, 3, 5)["target"], whole["target"])
    for seed, epoch in ((4, 5), (3, 6)):
        assert not torch.equal(augment(batch, seed, epoch)["target"], whole["target"])


def test_affine_map_is_that_of_a_literal_resampling() -> None:
    """Each sample on its own, through scipy, with the map written out in voxels about the center."""
    size = (32, 24)
    batch, augment = disk_batch(size=size), Augmentation(**{name: STRENGTHS[name] for name in SPATIAL})
    result = augment(batch, 1, 2)
    theta = augment.maps(batch["occurrence"], 1, 2, torch.Size(size)).double().numpy()
    mirrored = set()
    for b in range(len(theta)):
        # back to voxels and to the order of the axes
        scale = np.diag(np.array(size) / 2.0)
        linear = scale @ theta[b, ::-1, 1::-1] @ np.linalg.inv(scale)
        shift = scale @ theta[b, ::-1, 2]
        zoom = math.sqrt(abs(np.linalg.det(linear)))
        # a rotation and perhaps a mirror: no shear, whatever the sides of the image
        np.testing.assert_allclose(linear @ linear.T / zoom**2, np.eye(2), atol=1e-5)
        assert 1 / 1.2 - 1e-6 <= zoom <= 1 / 0.8 + 1e-6
        assert abs(math.degrees(math.atan2(linear[1, 0], linear[1, 1]))) <= 15
        assert bool((np.abs(shift) <= 0.1 * np.array(size) + 1e-5).all())
        mirrored.add(bool(np.linalg.det(linear) < 0))
        center = (np.array(size) - 1) / 2
        offset = center + shift - linear @ center
        for i in (0, 1):
            image = batch["target"][b, i].numpy() + 1
            moved = affine_transform(image.astype(float), linear, offset, order=1, mode="grid-constant", cval=0.0) - 1
            np.testing.assert_allclose(result["target"][b, i].numpy(), moved, atol=1e-3)
        label = affine_transform(batch["label"][b, 0].numpy(), linear, offset, order=0, mode="grid-constant", cval=0)
        assert (result["label"][b, 0].numpy() != label).mean() < 0.01
    assert mirrored == {False, True}


def test_maps_are_drawn_evenly_from_the_whole_range_of_each_strength() -> None:
    size = np.array([32, 24])
    augment = Augmentation(**{name: STRENGTHS[name] for name in SPATIAL})
    theta = augment.maps(torch.arange(1000), 0, 1, torch.Size(size.tolist())).double().numpy()
    linear = theta[:, ::-1, 1::-1] * size[:, None] / size  # in voxels
    determinant = np.linalg.det(linear)
    drawn = [
        np.degrees(np.arctan2(linear[:, 1, 0], linear[:, 1, 1])) / STRENGTHS["rotation"],
        (np.abs(determinant) ** -0.5 - 1) / STRENGTHS["scale"],
        *theta[:, :, 2].T / 2 / STRENGTHS["translation"],
    ]
    for values in drawn:
        assert kstest(values, "uniform", (-1, 2)).statistic < 0.05
    assert (determinant < 0).mean() == pytest.approx(STRENGTHS["flip"], abs=0.05)
    # each by a number of its own
    assert np.abs(np.triu(np.corrcoef([*drawn, np.sign(determinant)]), 1)).max() < 0.1


def test_intensities_change_by_power_and_factor_of_each_contrast() -> None:
    batch = disk_batch()
    known = batch["has_contrast"]
    result = Augmentation(gamma=0.3, brightness=0.2)(batch, 0, 1)
    before, after = (x.double().add(1).div(2).flatten(2) for x in (batch["target"], result["source"]))
    assert result["target"] is batch["target"]  # the truth is not changed
    fitted = []
    for b, i in known.nonzero().tolist():
        x, y = before[b, i], after[b, i]
        assert bool((y[x == 0] == 0).all())
        kept = (x > 0.05) & (y < 1)
        design = torch.stack([x[kept].log(), torch.ones(int(kept.sum()), dtype=torch.float64)], dim=1)
        solution = torch.linalg.lstsq(design, y[kept].log().unsqueeze(1)).solution
        assert float((design @ solution - y[kept].log().unsqueeze(1)).abs().max()) < 1e-4
        power, factor = float(solution[0]), float(solution[1].exp())
        assert 1 / 1.3 - 1e-4 <= power <= 1.3 + 1e-4 and 0.8 - 1e-4 <= factor <= 1.2 + 1e-4
        fitted.append((round(power, 4), round(factor, 4)))
    assert len(set(fitted)) == len(fitted)


def test_powers_and_factors_are_drawn_evenly_from_their_whole_ranges() -> None:
    gray, occurrence = torch.zeros(1000, 1, 1, 1), torch.arange(1000)
    batch = {"target": gray, "label": gray, "has_contrast": torch.ones(1000, 1).bool(), "occurrence": occurrence}
    power = ((Augmentation(gamma=0.3)(batch, 0, 1)["source"] + 1) / 2).log() / math.log(0.5)
    factor = Augmentation(brightness=0.2)(batch, 0, 1)["source"] + 1
    for values in (power.log() / math.log(1.3), (factor - 1) / 0.2):
        assert kstest(values.flatten().numpy(), "uniform", (-1, 2)).statistic < 0.05


@pytest.mark.parametrize("changes", [{"rotation": -1}, {"scale": 1.0}, {"flip": 1.5}, {"brightness": 1.0}])
def test_strength_out_of_range_is_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        Augmentation(**changes)


def test_flip_alone_mirrors_the_first_axis() -> None:
    batch = disk_batch()
    batch["target"] = torch.rand(batch["target"].shape, generator=generator(9)) * 2 - 1
    result = Augmentation(flip=1.0)(batch, 0, 1)
    expected = batch["target"].flip(2)
    expected[1, 2] = -1
    torch.testing.assert_close(result["target"], expected, rtol=0, atol=1e-5)
    assert torch.equal(result["label"], batch["label"].flip(2))
