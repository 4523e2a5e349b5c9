# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Scores over all scenarios: a value for each study and target, then the mean of a scenario, then that of all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ignite.distributed as idist
import torch
from ignite.metrics import Metric

from ..contrasts import NUM_CONTRASTS, REGIONS, SCENARIOS, class_masks, label_map, region_masks, scenario_table
from ..networks.blocks import expand_dims_like, masked_mean
from ..ssim import slice_ssim_map

#: PSNR of identical images is infinite and would ruin a mean.
MAX_PSNR = 100.0


def psnr(mean_square: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of a mean square error at data range 1, at most ``MAX_PSNR``."""
    return (-10 * torch.log10(mean_square)).clamp(max=MAX_PSNR)


def scale_by_slice(images: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (... x H x W) scaled so that each slice of the target, of the same shape, is from 0 to 1.

    Returns:
        The scaled images; and, of shape ``...``, where the target is not constant.
    """
    low = target.amin(dim=(-2, -1), keepdim=True)
    span = target.amax(dim=(-2, -1), keepdim=True) - low
    return (images - low) / torch.where(span > 0, span, 1.0), (span > 0)[..., 0, 0]


def fill_background(images: torch.Tensor, inputs: torch.Tensor, available: torch.Tensor) -> torch.Tensor:
    """Sets everything outside the union of the available brains to background (-1), the same for every method.

    ``images`` and ``inputs`` are B x K x spatial in [-1, 1], ``available`` is B x K; only these of ``inputs`` are read.
    """
    brain = ((inputs > -1) & expand_dims_like(available, inputs)).any(dim=1, keepdim=True)
    return torch.where(brain, images, torch.full_like(images, -1.0))


def mean_of_available(target: torch.Tensor, available: torch.Tensor) -> torch.Tensor:
    """Reference method: every missing contrast is the mean of the available ones. Shapes as in ``fill_background``."""
    return masked_mean(target, available).unsqueeze(1).expand_as(target)


def zero_filling(target: torch.Tensor, available: torch.Tensor) -> torch.Tensor:
    """Reference method: every missing contrast is background. Shapes as in ``fill_background``."""
    return torch.full_like(target, -1.0)


def reference_output(reference_method: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable[[dict], dict]:
    """Output transform for ``ScenarioScores`` that puts a reference method in the place of the network's images."""

    def transform(output: dict) -> dict:
        images = reference_method(output["target"], output["available"])
        return {**output, "pred": torch.cat([images, torch.zeros_like(output["pred"][:, NUM_CONTRASTS:])], dim=1)}

    return transform


class ScenarioScores(Metric):
    """PSNR and SSIM of the missing contrasts and Dice of the segmentation branch, by study, scenario and contrast.

    PSNR and SSIM are means over slices, the numbers of an evaluation of these slices by the protocol ``per_slice``.
    Dice is of the study's evaluated slices together, both empty = 1, one empty = 0. A study that lacks a contrast which
    a scenario gives is not counted in that scenario. ``compute`` gives the mean over the 14 scenarios of the mean over
    their targets of the mean over studies.

    Args:
        studies: names, in the order of ``study_index``.
        output_transform: from ``engine.state.output`` to the dict that ``update`` takes.
        prefix: put before the names of the scores, for a reference method.
        with_dice: also give Dice; False for reference methods, which have no mask.
        device: where the sums live.
    """

    required_output_keys = tuple(
        ["pred", "target", "unclipped", "label", "available", "has_contrast", "has_mask", "study_index", "scenario"]
    )

    def __init__(
        self,
        studies: Sequence[str],
        output_transform: Callable = lambda output: output,
        prefix: str = "",
        with_dice: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        self.studies, self.prefix, self.with_dice = list(studies), prefix, with_dice
        super().__init__(output_transform=output_transform, device=device)

    def reset(self) -> None:
        """Forgets everything."""
        shape = (len(self.studies), len(SCENARIOS))
        self._image = torch.zeros(*shape, NUM_CONTRASTS, 3, dtype=torch.float64, device=self._device)
        self._mask = torch.zeros(*shape, len(REGIONS), 4, dtype=torch.float64, device=self._device)

    @torch.no_grad()
    def update(self, output: Sequence[torch.Tensor]) -> None:
        """Takes in a batch.

        Args:
            output: in the order of ``required_output_keys``: ``pred`` B x 7 x H x W, ``target`` B x K x H x W in
                [-1, 1], ``unclipped`` the same without clipping, ``label`` B x 1 x H x W classes, ``available``,
                ``has_contrast`` B x K, ``has_mask``, ``study_index`` and ``scenario`` B.
        """
        pred, target, unclipped, label, available, has_contrast, has_mask, study_index, scenario = output
        target = target.float()
        images = fill_background(pred[:, :NUM_CONTRASTS].float(), target, available)
        truth = (unclipped.float() + 1) / 2
        ours, valid = scale_by_slice(((images + 1) / 2).clamp(0, 1), truth)
        ours, theirs = ours.clamp(0, 1), scale_by_slice(truth, truth)[0]
        peak = psnr(((ours - theirs) ** 2).mean(dim=(-2, -1)))
        similarity = slice_ssim_map(ours, theirs).mean(dim=(-2, -1))
        # a study that lacks a contrast of the scenario was given less than the scenario says
        complete = (available == scenario_table(available.device)[scenario]).all(dim=1)
        evaluated = ~available & has_contrast & complete.unsqueeze(1) & valid & peak.isfinite()
        rows = torch.stack([peak, similarity, torch.ones_like(peak)], dim=2).double()
        rows = torch.where(evaluated.unsqueeze(2), rows, 0.0).to(self._device)
        index = (study_index.to(self._device), scenario.to(self._device))
        self._image.index_put_(index, rows, accumulate=True)

        classes = label_map(pred[:, NUM_CONTRASTS:])
        ours, theirs = (region_masks(class_masks(c)).flatten(2) for c in (classes, label))
        counts = torch.stack([(ours & theirs).sum(2), ours.sum(2), theirs.sum(2), torch.ones_like(ours[..., 0])], dim=2)
        counts = counts.double() * (has_mask & complete).view(-1, 1, 1)
        self._mask.index_put_(index, counts.to(self._device), accumulate=True)

    def tables(self) -> dict[str, torch.Tensor]:
        """Scores of every study and scenario, NaN where nothing was evaluated.

        Returns:
            ``psnr``, ``ssim``: studies x 14 x K; ``dice``: studies x 14 x 3 (WT, TC, ET).
        """
        image: Any = idist.all_reduce(self._image.clone())
        mask: Any = idist.all_reduce(self._mask.clone())
        mean = image[..., :2] / image[..., 2:]  # 0 / 0 = NaN
        overlap, ours, theirs, seen = mask.unbind(dim=3)
        dice = torch.where(ours + theirs > 0, 2 * overlap / (ours + theirs), 1.0)
        return {"psnr": mean[..., 0], "ssim": mean[..., 1], "dice": torch.where(seen > 0, dice, float("nan"))}

    def compute(self) -> dict[str, float]:
        """The means over scenarios, as ``<prefix>psnr``, ``<prefix>ssim``, ``<prefix>dice_WT`` and so on."""
        tables = self.tables()
        scores = {
            f"{self.prefix}{name}": float(tables[name].nanmean(dim=0).nanmean(dim=1).nanmean())
            for name in ("psnr", "ssim")
        }
        if self.with_dice:
            dice = tables["dice"].nanmean(dim=0).nanmean(dim=0)
            scores |= {f"{self.prefix}dice_{name}": float(dice[k]) for k, name in enumerate(REGIONS)}
            scores[f"{self.prefix}dice"] = float(dice.nanmean())
        return scores
