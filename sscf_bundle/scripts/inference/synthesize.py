# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""One study from Python."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from ..data.transforms import StudyCompose
from ..networks.precision import half_pays
from ..networks.weights import load_weights, network_from_weights, read_settings
from .evaluator import provenance
from .inferer import BrainSliceInferer, predict
from .postprocessing import prediction_transforms, read_statistics
from .preprocessing import inference_transforms, list_studies
from .writer import StudyWriter

_BUNDLE_ROOT = Path(__file__).resolve().parents[2]


def synthesize_study(
    flair: str | os.PathLike[str] | None = None,
    t1: str | os.PathLike[str] | None = None,
    t1ce: str | os.PathLike[str] | None = None,
    t2: str | os.PathLike[str] | None = None,
    output_dir: str | os.PathLike[str] = "eval",
    study: str | None = None,
    ckpt_path: str | os.PathLike[str] | None = None,
    device: torch.device | str | None = None,
    amp: bool | None = None,
    sw_batch_size: int = 8,
    output_scale: float = 1.0,
    mask_labels: Mapping[str, int] | None = None,
    intensities: str = "relative",
    resample: bool | str = False,
    preprocessing: StudyCompose | None = None,
    network: nn.Module | None = None,
) -> dict[str, Path]:
    """Fill in one study.

    Example::

        paths = synthesize_study(flair="a_flair.nii.gz", t2="a_t2.nii.gz", output_dir="filled")
        paths["t1ce"]  # filled/a/a_t1ce_synthetic.nii.gz

    Args:
        flair: path of the FLAIR volume, ``None`` if it is missing; likewise ``t1``, ``t1ce`` and ``t2``.
        t1: see ``flair``.
        t1ce: see ``flair``.
        t2: see ``flair``.
        output_dir: the study gets a folder in here, see ``StudyWriter``.
        study: name of the study; by default what the file names have in common.
        ckpt_path: weights; by default ``models/model.pt`` of this bundle.
        device: where to compute; by default a GPU if there is one.
        amp: compute with autocast; by default where ``half_pays``.
        sw_batch_size: number of slices in one call of the network.
        output_scale: see ``FinishPredictiond``.
        mask_labels: see ``FinishPredictiond``.
        intensities: ``"relative"``, or ``"study"`` for the scale of the study, where the weights have statistics of it.
        resample: see ``LoadStudyd``.
        preprocessing: by default ``inference_transforms`` with the settings in the weights.
        network: by default the one that the weights are of; if one is given and ``ckpt_path`` is ``None``, it keeps its
            weights, and ``preprocessing`` has to be given too.

    Returns:
        Path of each written volume, by its key: the missing ones of ``flair``, ``t1``, ``t1ce`` and ``t2``, and
        ``seg``.

    Raises:
        StudyError: when the study or the weights cannot be used.
    """
    item = list_studies(None, flair, t1, t1ce, t2, study)[0]
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    amp = half_pays(device) if amp is None else amp
    sha256 = None
    if network is None and ckpt_path is None:
        ckpt_path = _BUNDLE_ROOT / "models" / "model.pt"
    weights = "" if ckpt_path is None else str(ckpt_path)
    if network is None:
        network = network_from_weights(weights)
    if ckpt_path is not None:
        sha256 = load_weights(network, weights)
    if preprocessing is None:
        preprocessing = inference_transforms(**read_settings(weights), resample=resample)
    data = preprocessing(item)
    data.update(provenance(network, item["patient"], sha256))
    inferer = BrainSliceInferer(sw_batch_size=sw_batch_size)
    data["pred"] = predict(data["image"], network.to(device), inferer, device, torch.bfloat16 if amp else None)
    statistics = read_statistics(str(ckpt_path), intensities)
    return StudyWriter(output_dir)(prediction_transforms(preprocessing, output_scale, mask_labels, statistics)(data))
