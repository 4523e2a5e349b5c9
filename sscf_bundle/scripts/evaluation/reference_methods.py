# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Reference methods: what a network must beat. Each takes the place of the network's images in an evaluation.

A reference method maps the contrasts (B x K x spatial in [-1, 1], of which the available ones are read) and the
availability (B x K boolean) to B x K x spatial. Two of them, ``mean_of_available`` and ``zero_filling``, are in
``metrics``, since validation shows them too.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..contrasts import CONTRASTS, NUM_CONTRASTS

#: For each target, the contrasts from the most to the least similar one: by weighting (T1 with T1ce, FLAIR with T2),
#: then by the rank correlation over brain voxels of BraTS studies.
SIMILARITY = {
    "FLAIR": ("T2", "T1", "T1ce"),
    "T1": ("T1ce", "FLAIR", "T2"),
    "T1ce": ("T1", "FLAIR", "T2"),
    "T2": ("FLAIR", "T1", "T1ce"),
}
#: Levels of a histogram over [-1, 1], as fine as the float16 of the slice cache is near 1.
LEVELS = 4097


def brain_histogram(images: torch.Tensor) -> torch.Tensor:
    """Shares of the ``LEVELS`` among the voxels above background, float64; all 0 where there is only background."""
    counts = torch.bincount(_levels(images[images > -1]), minlength=LEVELS).double()
    return counts / counts.sum().clamp(min=1)


def mean_histograms(studies: Iterable[dict[str, torch.Tensor]]) -> torch.Tensor:
    """Mean histogram of each contrast over studies, each study counting the same: K x ``LEVELS`` float64.

    ``studies`` have ``target`` (Z x K x H x W in [-1, 1]) and ``has_contrast`` (K).
    """
    total, number = torch.zeros(NUM_CONTRASTS, LEVELS, dtype=torch.float64), torch.zeros(NUM_CONTRASTS, 1)
    for study in studies:
        for k in range(NUM_CONTRASTS):
            if study["has_contrast"][k]:
                total[k] += brain_histogram(study["target"][:, k])
                number[k] += 1
    return total / number.clamp(min=1)


def match_histogram(image: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """An image in [-1, 1] with its brain histogram matched to another: ``LEVELS`` shares, not all 0.

    The cumulative share of a level in the image is looked up, by linear interpolation, in the cumulative shares of
    the reference, as ``skimage.exposure.match_histograms`` does with the values that occur.
    """
    wanted = brain_histogram(image).cumsum(0)
    occurring = reference > 0
    known = reference.cumsum(0)[occurring]
    values = torch.linspace(-1, 1, LEVELS, dtype=wanted.dtype, device=wanted.device)[occurring]
    right = torch.searchsorted(known, wanted).clamp(max=len(known) - 1)
    left = (right - 1).clamp(min=0)
    gap = known[right] - known[left]
    part = torch.where(gap > 0, (wanted - known[left]) / gap, 1.0).clamp(0, 1)
    table = (values[left] + part * (values[right] - values[left])).to(image)
    return torch.where(image > -1, table[_levels(image)], image)


class NearestContrast:
    """Reference method: every missing contrast is the most similar available one with its brain histogram matched.

    The histogram is matched to that of the target contrast in the training studies, see ``mean_histograms``.
    """

    def __init__(self, histograms: torch.Tensor) -> None:
        self.histograms = histograms

    def __call__(self, target: torch.Tensor, available: torch.Tensor) -> torch.Tensor:
        """Fills in one study (Z x K x H x W in [-1, 1]), whose slices all have the same available contrasts."""
        given = available[0].tolist()
        images = []
        for k, name in enumerate(CONTRASTS):
            if given[k]:
                images.append(target[:, k])
                continue
            image = target[:, next(i for i in map(CONTRASTS.index, SIMILARITY[name]) if given[i])]
            reference = self.histograms[k].to(target.device)
            images.append(match_histogram(image, reference) if reference.any() else image)
        return torch.stack(images, dim=1)


def _levels(images: torch.Tensor) -> torch.Tensor:
    return ((images + 1) * ((LEVELS - 1) / 2)).round().long().clamp(0, LEVELS - 1)
