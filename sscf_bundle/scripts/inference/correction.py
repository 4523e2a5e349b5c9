# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Brightness and contrast of synthetic images as the scanners of a site give them.

How bright a tissue is relative to the brightest of the brain differs between sites, and no other contrast tells it.
Some complete studies of a site do: a slope and an offset for each scenario and missing contrast.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform
from torch import nn

from ..contrasts import CONTRAST_KEYS, NUM_CONTRASTS, SCENARIOS, StudyError, scenario_name
from ..data.cohort import Cohort
from ..data.randomness import stable_hash
from ..data.transforms import StudyCompose
from ..networks.availability import network_input
from ..networks.correction_table import CORRECTION_KEY, for_network_range
from ..networks.sscf import SSCFNet
from ..networks.weights import read_state
from .calibration import complete_studies
from .trust import central_slices, patients_in_bank

logger = logging.getLogger(__name__)

_LEAST_PATIENTS = 3


@torch.no_grad()
def fit_correction(cohort: Cohort, transform: StudyCompose, network: nn.Module, number: int) -> dict[str, Any]:
    """Slope and offset that take synthetic contrasts to the acquired ones of some complete studies, by least squares.

    One is kept where it lowers the error of patients that it was not fitted to, each left out in turn. Every patient
    has the same weight; those in the bank of the network are left out, for they are synthesized too well.

    Args:
        cohort: see ``complete_studies``; its part ``training`` is read.
        transform: see ``inference_transforms``.
        network: in evaluation mode.
        number: of slices of each study, from the middle of the brain.

    Returns:
        ``patients``, their number, and ``scenarios``: by scenario and key of the missing contrast slope and offset of
        intensities in [0, 1] and the mean gain in dB of the patients left out.

    Raises:
        StudyError: for less than three patients.
    """
    device, known = next(network.parameters()).device, patients_in_bank(network)
    moments: dict[tuple[str, str], dict[str, list[np.ndarray]]] = defaultdict(lambda: defaultdict(list))
    for item in complete_studies(cohort, transform, "training"):
        patient = str(item.get("patient", item["study"]))
        if stable_hash(patient) in known:
            logger.warning("Patient %s is in the memory bank of the network and is left out.", patient)
            continue
        images = central_slices(torch.as_tensor(item["image"]), number, 1)[:, :NUM_CONTRASTS].to(device)
        for scenario in SCENARIOS:
            kept = torch.tensor(scenario, dtype=torch.bool, device=device)
            module = network.for_scenario(kept.tolist()) if isinstance(network, SSCFNet) else network
            pred = module(network_input(images, kept.expand(len(images), -1)))
            brain = (images[:, kept] > -1).any(dim=1)
            for i in (~kept).nonzero().flatten().tolist():
                p, t = (((x[:, i][brain] + 1) / 2).double() for x in (pred.clamp(-1, 1), images))
                values = torch.stack([p.mean(), t.mean(), (p * p).mean(), (p * t).mean(), (t * t).mean()])
                moments[scenario_name(scenario), CONTRAST_KEYS[i]][patient].append(values.cpu().numpy())
    patients = max((len(by_patient) for by_patient in moments.values()), default=0)
    if patients < _LEAST_PATIENTS:
        raise StudyError(
            f"A correction needs {_LEAST_PATIENTS} patients or more that are not in the bank, got {patients}."
        )
    scenarios: dict[str, dict[str, list[float]]] = {}
    for (name, contrast), by_patient in moments.items():
        rows = np.stack([np.mean(values, axis=0) for values in by_patient.values()])
        gains = []
        for k, row in enumerate(rows):
            line = _line(np.delete(rows, k, axis=0).mean(axis=0))
            gains.append(10 * np.log10(_error(row, (1.0, 0.0)) / _error(row, line)))
        if np.mean(gains) > 0:
            found = (*_line(rows.mean(axis=0)), float(np.mean(gains)))
            scenarios.setdefault(name, {})[contrast] = [float(f"{v:.4g}") for v in found]
    helped = [gain for by_contrast in scenarios.values() for *_, gain in by_contrast.values()]
    told = "Corrected: %d of %d missing contrasts of all scenarios, by %.2f dB in patients left out."
    logger.info(told, len(helped), len(moments), sum(helped) / max(len(helped), 1))
    return {"patients": patients, "scenarios": scenarios}


def _line(moments: Sequence[float]) -> tuple[float, float]:
    """Slope and offset of least squares from the means of p, t, p p, p t and t t."""
    p, t, pp, pt, _ = moments
    slope = (pt - p * t) / (pp - p * p) if pp - p * p > 1e-8 else 1.0
    return float(slope), float(t - slope * p)


def _error(moments: Sequence[float], line: tuple[float, float]) -> float:
    """Mean squared error of ``slope`` p + ``offset`` against t, at least 1e-12."""
    (p, t, pp, pt, tt), (a, b) = moments, line
    return max(float(a * a * pp + 2 * a * b * p + b * b - 2 * a * pt - 2 * b * t + tt), 1e-12)


def read_correction(path: str, correct: bool) -> dict[str, Any] | None:
    """The scenarios of ``fit_correction`` in a file of weights, ``None`` if there are none or none are wanted."""
    found = read_state(path)[1].get(CORRECTION_KEY) if correct else None
    return None if found is None else found["scenarios"]


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
