# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""From a prediction on the network's grid to finished volumes on the grid on file."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import Invertd, MapTransform

from ..checked_settings import refuse_unknown
from ..contrasts import CONTRAST_KEYS, MASK_KEY, NUM_CONTRASTS, TUMOR_CLASSES, StudyError, label_map, scenario_name
from ..data.transforms import StudyCompose
from ..networks.settings import CORRECTION_KEY, for_network_range
from ..networks.weights import read_state
from .preprocessing import FILE_BRAIN_KEY

#: Volumes of a finished prediction in channel order, as keys of written files.
OUTPUT_KEYS = (*CONTRAST_KEYS, MASK_KEY)
#: Label values of BraTS to 2021; ET is 3 from 2023 on.
BRATS_MASK_LABELS = {"NET": 1, "ED": 2, "ET": 4}


class CorrectPredictiond(MapTransform):
    """Apply slope and offset of the study's scenario to its missing contrasts.

    Args:
        keys: key of the prediction, 7 x X x Y x Z with contrasts in [-1, 1]; the item has ``"image"``, whose planes of
            availability tell the scenario.
        correction: see ``read_correction``.
    """

    def __init__(self, keys: KeysCollection = "pred", correction: Mapping[str, Any] | None = None) -> None:
        super().__init__(keys)
        self.correction = correction or {}

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        planes = torch.as_tensor(d["image"])[NUM_CONTRASTS:].flatten(1)[:, 0] > 0.5
        d["correction"] = self.correction.get(scenario_name(planes.tolist()), {})
        for key in self.key_iterator(d) if d["correction"] else ():
            d[key] = d[key].clone()
            for contrast, (slope, offset, _) in d["correction"].items():
                slope, offset = for_network_range(slope, offset)
                d[key][CONTRAST_KEYS.index(contrast)].mul_(slope).add_(offset)
        return d


class SelectOutputsd(MapTransform):
    """Keep of a prediction only the channels that are wanted, with the contrasts in [0, 1] instead of [-1, 1].

    Wanted are the contrasts that are missing and the mask, or, where the item has ``"target"``, only that one of
    ``OUTPUT_KEYS``: MONAI Label serves one volume at a time. ``"output_keys"`` becomes the tuple of what is wanted, in
    the order of ``OUTPUT_KEYS``. The result has one channel for each contrast in there, then, if the mask is wanted,
    the probabilities of the three tumor classes. ``"segmented"`` becomes whether any of these is above 0, as none is of
    a network without a segmentation branch.

    It comes before ``Invertd``, which takes its time for each channel and fills with 0 what the network did not see:
    -1 there, but background here.

    Args:
        keys: key of the prediction, 7 x X x Y x Z.

    Raises:
        StudyError: from the call, when ``"target"`` is unknown.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        missing = [key for key, given in zip(CONTRAST_KEYS, d["has_contrast"], strict=True) if not given]
        wanted = (*missing, MASK_KEY)
        if d.get("target") is not None:
            refuse_unknown("target", [d["target"]], OUTPUT_KEYS)
            wanted = (d["target"],)
        contrasts = [CONTRAST_KEYS.index(key) for key in wanted if key != MASK_KEY]
        classes = range(NUM_CONTRASTS, NUM_CONTRASTS + len(TUMOR_CLASSES)) if MASK_KEY in wanted else ()
        for key in self.key_iterator(d):
            meta = d[key].meta if isinstance(d[key], MetaTensor) else None
            kept = torch.as_tensor(d[key])[[*contrasts, *classes]]
            kept[: len(contrasts)].add_(1).div_(2)
            d[key] = MetaTensor(kept, meta=meta)
            d["segmented"] = bool(kept[len(contrasts) :].any())
        d["output_keys"] = wanted
        return d


class FinishPredictiond(MapTransform):
    """Make the volumes to write from a prediction on the grid on file.

    The result is a float32 ``MetaTensor`` on the CPU with one X x Y x Z volume for each of ``"output_keys"``: contrasts
    from 0 to their scale, and the label map; all are 0 outside the union of the available brains. ``"output_scale"``
    becomes the scale of each contrast by its key: the intensity of what the network knows as 1.

    Args:
        keys: key of the prediction as ``SelectOutputsd`` leaves it, on the grid on file and on any device.
        output_scale: scale of every contrast.
        mask_labels: tumor class to label value, 1 to 255.
        statistics: gives each contrast a scale of its own instead, from those of the available ones, see
            ``study_scale``.

    Raises:
        StudyError: when ``mask_labels`` does not give every tumor class a label value, or ``output_scale`` is not > 0
            or more than float32 holds.
    """

    def __init__(
        self,
        keys: KeysCollection = "pred",
        output_scale: float = 1.0,
        mask_labels: Mapping[str, int] | None = None,
        statistics: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(keys)
        labels = BRATS_MASK_LABELS if mask_labels is None else mask_labels
        whole = all(type(value) is int and 0 < value < 256 for value in labels.values())
        if set(labels) != set(TUMOR_CLASSES) or not whole:
            raise StudyError(
                f"mask_labels must map {', '.join(TUMOR_CLASSES)} to whole numbers from 1 to 255, got {dict(labels)}."
            )
        if not 0 < output_scale <= torch.finfo(torch.float32).max:
            raise StudyError(f"output_scale must be greater than 0 and at most 3.4e38, got {output_scale}.")
        if statistics is not None and output_scale != 1:
            raise StudyError(f"output_scale is of relative intensities, got {output_scale} with those of the study.")
        self.output_scale, self.statistics = output_scale, statistics
        self.values = torch.tensor([0, *(labels[name] for name in TUMOR_CLASSES)], dtype=torch.float32)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        wanted = d["output_keys"]
        num_contrasts = sum(key != MASK_KEY for key in wanted)
        scales = [self.output_scale] * num_contrasts
        if self.statistics is not None:
            acquired = d["intensity_scale"].tolist()
            scales = [study_scale(self.statistics, acquired, key) for key in wanted[:num_contrasts]]
        d["output_scale"] = dict(zip(wanted, scales, strict=False))
        brain = torch.as_tensor(d[FILE_BRAIN_KEY])[0].bool().cpu()
        for key in self.key_iterator(d):
            pred = torch.as_tensor(d[key])
            # a fifth of the voxels are brain; only these are computed and leave the device
            voxels = pred[:, brain.to(pred.device)]
            values = voxels[:num_contrasts].clamp_(0, 1).mul_(voxels.new_tensor(scales)[:, None])
            if MASK_KEY in wanted:
                classes = label_map(voxels[None, num_contrasts:])[0]
                values = torch.cat([values, self.values.to(pred.device)[classes.long()]])
            # pages of numpy.zeros that stay 0 cost nothing
            finished = torch.from_numpy(np.zeros((len(wanted), *brain.shape), np.float32))
            finished[:, brain] = values.cpu()
            meta = d[key].meta if isinstance(d[key], MetaTensor) else None
            d[key] = MetaTensor(finished, meta=meta)
        return d


def study_scale(statistics: Mapping[str, Any], acquired: Sequence[float], key: str) -> float:
    """The likely scale of the contrast ``key``: the geometric mean of what each acquired one suggests.

    ``statistics`` are of ``intensity_statistics``, ``acquired`` the scales of ``ScaleBraind``, 0 of missing contrasts.

    Raises:
        StudyError: when the cohort of the statistics never had the contrast and an acquired one together.
    """
    ratios = statistics["log_ratios"][CONTRAST_KEYS.index(key)]
    guesses = [math.log(s) + r for s, r in zip(acquired, ratios, strict=True) if s > 0 and r is not None]
    if not guesses:
        raise StudyError(
            f"The statistics in the weights do not tell the intensities of {key}: use --intensities relative."
        )
    return math.exp(sum(guesses) / len(guesses))


def read_statistics(path: str, intensities: str) -> dict[str, Any] | None:
    """What ``intensity_statistics`` put into a file of weights, for configs; ``None`` for relative intensities.

    Raises:
        StudyError: when ``intensities`` is neither, or the weights have no statistics.
    """
    refuse_unknown("intensities", [intensities], ("relative", "study"))
    if intensities == "relative":
        return None
    statistics = read_state(path)[1].get("intensities")
    if statistics is None:
        raise StudyError(
            f"{path} holds no intensities of a cohort, which --intensities study needs: add them with the run "
            "measuring of configs/build_bank.json, or use --intensities relative."
        )
    return statistics


def read_correction(path: str, correct: bool) -> dict[str, Any] | None:
    """The scenarios of ``fit_correction`` in a file of weights, ``None`` if there are none or none are wanted."""
    found = read_state(path)[1].get(CORRECTION_KEY) if correct else None
    return None if found is None else found["scenarios"]


def prediction_transforms(
    preprocessing: StudyCompose,
    output_scale: float = 1.0,
    mask_labels: Mapping[str, int] | None = None,
    statistics: Mapping[str, Any] | None = None,
    correction: Mapping[str, Any] | None = None,
) -> StudyCompose:
    """The postprocessing: a prediction on the network's grid becomes volumes on the grid on file.

    Probabilities are taken back by linear interpolation and turned into a label map there. For a study that was not
    resampled this equals taking back the labels; for others it gives a smooth boundary instead of the network's steps.

    Args:
        preprocessing: the transforms that made ``image``.
        output_scale, mask_labels, statistics: see ``FinishPredictiond``.
        correction: see ``CorrectPredictiond``.

    Returns:
        Transforms for an item with ``image``, ``has_contrast``, ``brain_on_file`` and ``pred`` (7 x X x Y x Z), which
        ``pred`` leaves as ``FinishPredictiond`` gives it. They compute on the device of ``pred``.
    """
    return StudyCompose(
        [
            CorrectPredictiond("pred", correction),
            SelectOutputsd("pred"),
            Invertd("pred", preprocessing, orig_keys="image", nearest_interp=False),
            FinishPredictiond("pred", output_scale, mask_labels, statistics=statistics),
        ]
    )
