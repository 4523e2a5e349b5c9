# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Downstream task (section 3.6): a segmenter trained on real contrasts reads synthesized ones in their place."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.inferers import Inferer
from monai.networks.nets import BasicUNet
from torch import nn

from ..contrasts import NUM_CONTRASTS, NUM_TUMOR_CLASSES, REGIONS, StudyError, class_masks, label_map
from ..data.cohort import Cohort
from ..data.slices import PreparedSlices, SliceDataset
from ..evaluation.protocols import region_dice
from ..evaluation.scores import Key, StudyScores
from ..networks.weights import read_state, with_weights

#: Method of the scores of the real contrasts.
REAL = "real"


def build_segmenter(spatial_dims: int, channels: Sequence[int]) -> BasicUNet:
    """A standard U-Net from four contrasts to the logits of ED, ET, NET.

    ``channels`` are six widths. The instance normalization of the coarsest scale needs 32 voxels along each axis.
    """
    norm = ("instance", {"affine": True})
    return BasicUNet(spatial_dims, NUM_CONTRASTS, NUM_TUMOR_CLASSES, features=tuple(channels), norm=norm)


def complete_slices(data: Cohort, part: str, **options: Any) -> SliceDataset:
    """Slices of the studies of one part of the split that have all four contrasts and a mask.

    ``options`` are those of ``SliceDataset``. A ``StudyError`` if the part has no complete study.
    """
    dataset = data.slices(part, **options)
    complete = [s for s in dataset._cached if all(s.info["has_contrast"]) and s.info["has_mask"]]
    if not complete:
        raise StudyError(
            f"None of {len(dataset.studies)} studies of the {part} part has all four contrasts and a mask, which the "
            "downstream task needs: give complete studies."
        )
    return SliceDataset(PreparedSlices(complete, dataset.failures), **options)


def segmentation_batch(
    batchdata: Mapping[str, torch.Tensor],
    device: torch.device | str | None = None,
    non_blocking: bool = False,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``prepare_batch`` of MONAI's engines: B x 4 x spatial images, B x 3 x spatial masks of ED, ET, NET."""
    image = batchdata["target"].to(device, non_blocking=non_blocking)
    label = batchdata["label"].to(device, non_blocking=non_blocking)
    return image, class_masks(label).float()


class BrainInferer(Inferer):
    """Runs a segmenter over the slices of a study in batches; where all four contrasts are background, no tumor is."""

    def __init__(self, batch_size: int = 16) -> None:
        super().__init__()
        self.batch_size = batch_size

    def __call__(self, inputs: torch.Tensor, network: Callable, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Args: inputs: Z x 4 x spatial; network: to logits. Returns: Z x 3 x spatial float32 probabilities."""
        logits = torch.cat([network(images, *args, **kwargs) for images in inputs.split(self.batch_size)])
        return torch.sigmoid(logits.float()) * (inputs > -1).any(dim=1, keepdim=True)


def study_dice(output: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Mean Dice of WT, TC and ET of one study, for an Ignite metric."""
    return region_dice(label_map(output["pred"]), label_map(output["label"])).mean()


def load_segmenter(
    path: str | Path, device: torch.device | str, dataset: SliceDataset, preprocessing: Mapping[str, Any]
) -> nn.Module:
    """The segmenter from its weights and the settings in them, in eval mode.

    Raises:
        StudyError: if the file is missing or damaged, if it was trained on patients of ``dataset``, which it shall be
            tested on, or with another preprocessing (``image_size``, ``scaling`` and ``spacing``).
    """
    try:
        known = read_state(path)[1]
    except StudyError as error:
        raise StudyError(
            f"There is no segmenter to test with ({error}) Train one with configs/downstream_train.json first, or give "
            "segmenter_path."
        ) from error
    if "training_patients" not in known:
        raise StudyError(f"{path} holds no segmenter of configs/downstream_train.json: train one, or give its file.")
    shared = set(known["training_patients"]) & set(dataset.patients.tolist())
    if shared:
        raise StudyError(
            f"{path} was trained on {len(shared)} of the patients that it shall be tested on, so the scores would be "
            "too good: use the split of its training (its output_dir or split_file)."
        )
    segmenter = build_segmenter(**known["arguments"])
    with_weights(segmenter, path, preprocessing)
    return segmenter.to(device).eval()


class DownstreamScores(StudyScores):
    """Dice of a segmenter that reads each method's contrasts in the place of the missing ones.

    Rows have the protocol ``downstream``, the score ``dice`` and the methods ``network``, those of the
    reference methods and ``real``: all four real contrasts, as the scenario ``FLAIR+T1+T1ce+T2``. Every method gets the
    same background.

    Args:
        segmenter: images to logits, see ``build_segmenter``.
        segmenter_path: file of its weights, for the metadata.
        reference_methods, device: see ``StudyScores``.
        batch_size: slices in one call of the segmenter.
    """

    def __init__(
        self,
        segmenter: nn.Module,
        segmenter_path: str | Path,
        reference_methods: Mapping[str, Callable] | None = None,
        batch_size: int = 16,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__([], reference_methods, whole=False, device=device)
        self.segmenter, self.inferer = segmenter.eval(), BrainInferer(batch_size)
        path = Path(segmenter_path).expanduser()
        self.segmentation = {
            "downstream": "Dice of the evaluated slices of a study together, both empty 1, one empty 0, of a U-Net "
            "trained on real contrasts that reads the synthesized ones in the place of the missing; method real: all "
            f"four real; only studies with four contrasts and a mask; segmenter {path.name}, SHA-256 "
            f"{hashlib.sha256(path.read_bytes()).hexdigest()}"
        }

    def score(
        self, scenario: Sequence[int], images: Mapping[str, torch.Tensor], classes: torch.Tensor | None, whole: bool
    ) -> dict[Key, torch.Tensor]:
        """Dice of a study, complete and with a mask; arguments as of ``StudyScores.score``."""
        given = torch.tensor(scenario, dtype=torch.bool, device=self._target.device)[:, None, None]
        return self._dice({name: torch.where(given, self._target, 2 * made - 1) for name, made in images.items()})

    def _start(self, data: Mapping[str, Any], whole: bool) -> None:
        super()._start(data, whole)
        self._append(data, (1,) * NUM_CONTRASTS, self._dice({REAL: self._target}))

    def _dice(self, stacks: Mapping[str, torch.Tensor]) -> dict[Key, torch.Tensor]:
        """Dice of the segmenter by method, each of four contrasts in [-1, 1]."""
        values: dict[Key, torch.Tensor] = {}
        for method, stack in stacks.items():
            dice = region_dice(label_map(self.inferer(stack, self.segmenter)), self._label)
            values |= {(name, method, "downstream", "whole", "dice"): dice[k] for k, name in enumerate(REGIONS)}
        return values
