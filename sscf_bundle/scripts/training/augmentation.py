# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Augmentation of whole batches on the device: affine maps of image and mask, intensities of each contrast."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from ..data.randomness import hash_uniform


class Augmentation:
    """Random affine maps and intensities, each sample by its own numbers, a function of (seed, epoch, occurrence).

    Images are interpolated linearly and masks by the nearest voxel through one map. What comes from outside the image
    and what was background is exactly -1, values stay in [-1, 1], and a contrast that the study lacks is -1. A strength
    of 0 is the identity: with all of them 0 the batch is returned as it is.

    Args:
        rotation: largest angle in degrees, about the center, in the plane of the first two axes.
        scale: largest relative change of size, in [0, 1): factors lie between 1 - ``scale`` and 1 + ``scale``.
        translation: largest shift, as a part of the image's side.
        flip: probability of mirroring left and right, the first spatial axis.
        gamma: intensities in [0, 1] are raised to a power between 1 / (1 + ``gamma``) and 1 + ``gamma``, drawn for each
            contrast.
        brightness: intensities in [0, 1] are multiplied by 1 - ``brightness`` to 1 + ``brightness``, drawn for each
            contrast, and clipped.

    Raises:
        ValueError: for a negative strength, or ``scale``, ``flip`` or ``brightness`` out of range.
    """

    def __init__(
        self,
        rotation: float = 0.0,
        scale: float = 0.0,
        translation: float = 0.0,
        flip: float = 0.0,
        gamma: float = 0.0,
        brightness: float = 0.0,
    ) -> None:
        strengths = {
            "rotation": rotation,
            "scale": scale,
            "translation": translation,
            "flip": flip,
            "gamma": gamma,
            "brightness": brightness,
        }
        for name, value in strengths.items():
            if value < 0 or (name in ("scale", "brightness") and value >= 1) or (name == "flip" and value > 1):
                raise ValueError(f"{name} of the augmentation is out of range, got {value}.")
        self.rotation, self.scale, self.translation, self.flip = math.radians(rotation), scale, translation, flip
        self.gamma, self.brightness = gamma, brightness

    def __call__(self, batch: dict[str, torch.Tensor], seed: int, epoch: int) -> dict[str, torch.Tensor]:
        """Augments ``target`` and ``label``, and makes ``source``.

        Args:
            batch: with ``target`` (B x K x spatial in [-1, 1]), ``label`` (B x 1 x spatial classes), ``has_contrast``
                (B x K) and ``occurrence`` (B int64, of the sample in its epoch); it is not changed.
            seed: of the run.
            epoch: present epoch.

        Returns:
            The batch with new ``target`` and ``label``, and ``source``: ``target`` with other intensities, which the
            network is shown in its place. The target keeps its own, since nothing could predict how they were changed.
        """
        target, label = batch["target"], batch["label"]
        over_space = (..., *(None for _ in target.shape[2:]))
        if self.rotation or self.scale or self.translation or self.flip:
            grid = F.affine_grid(self.maps(batch["occurrence"], seed, epoch, target.shape[2:]), [*target.shape], False)
            # shifted by 1, so that zeros from outside are background
            target = F.grid_sample(target + 1, grid, "bilinear", "zeros", False) - 1
            label = F.grid_sample(label.to(target.dtype), grid, "nearest", "zeros", False).to(label.dtype)
            target = torch.where(batch["has_contrast"][over_space], target.clamp(-1, 1), -1.0)
        source = target
        if self.gamma or self.brightness:
            b, k = target.shape[:2]
            drawn = 2 * hash_uniform(batch["occurrence"], seed, epoch, "intensity", 2 * k).view(b, 2, k) - 1
            power = (drawn[:, 0] * math.log(1 + self.gamma)).exp()[over_space]
            factor = (1 + self.brightness * drawn[:, 1])[over_space]
            source = ((((target + 1) / 2).clamp(min=0) ** power * factor) * 2 - 1).clamp(-1, 1)
            source = torch.where(batch["has_contrast"][over_space], source, -1.0)
        return {**batch, "target": target, "source": source, "label": label}

    def maps(self, occurrence: torch.Tensor, seed: int, epoch: int, size: torch.Size) -> torch.Tensor:
        """Affine maps from the new to the old image (B x D x (D + 1) float32), as ``affine_grid`` takes them."""
        dims = len(size)
        drawn = hash_uniform(occurrence, seed, epoch, "affine", 3 + dims)
        angle, zoom, mirror = (2 * drawn[:, 0] - 1) * self.rotation, (2 * drawn[:, 1] - 1) * self.scale, drawn[:, 2]
        cos, sin = angle.cos() / (1 + zoom), angle.sin() / (1 + zoom)
        sign = torch.where(mirror < self.flip, -1.0, 1.0)
        linear = torch.diag_embed((1 / (1 + zoom)).unsqueeze(1).repeat(1, dims))
        linear[:, 0, 0], linear[:, 0, 1], linear[:, 1, 0], linear[:, 1, 1] = sign * cos, -sign * sin, sin, cos
        # axes in coordinates from -1 to 1, which differ in length where the sides do
        for row in range(dims):
            for column in range(dims):
                if size[column] != size[row]:
                    linear[:, row, column] *= size[column] / size[row]
        shift = 2 * self.translation * (2 * drawn[:, 3:] - 1)
        # affine_grid counts axes from the last
        return torch.cat([linear.flip(1, 2), shift.flip(1).unsqueeze(2)], dim=2)
