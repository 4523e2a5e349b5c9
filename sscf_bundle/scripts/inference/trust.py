# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""How far the result of a study can be trusted: scores from a few slices, and one verdict with its reasons."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..contrasts import CONTRAST_KEYS, CONTRASTS, NUM_CONTRASTS
from ..data.randomness import stable_hash
from ..networks.blocks import channel_statistics
from ..networks.retrieval import key_distances
from ..networks.sscf import SSCFNet, network_input
from ..networks.weights import read_state

#: Key of the settings in the weights that holds what ``calibrate`` found.
TRUST_KEY = "trust"
#: Scores of a contrast, in the order that the calibration keeps them.
SCORES = ("distance", "features", "consistency")
#: Slices with brain for each one that scores are from.
_SLICES_FOR_ONE = 45
_ENHANCEMENT = (
    "T1ce is synthetic: contrast enhancement cannot be inferred reliably from other contrasts, so neither its presence "
    "nor its absence in this volume means anything."
)


def central_slices(image: torch.Tensor, number: int) -> torch.Tensor:
    """At most ``number`` axial slices from the middle of the brain, evenly spread: 8 x X x Y x Z to N x 8 x X x Y."""
    z = (image[:NUM_CONTRASTS] > -1).flatten(0, 2).any(dim=0).nonzero().flatten()
    # thick slices are few, and the cost of the scores must stay a small part of the study's
    number = min(number, max(1, len(z) // _SLICES_FOR_ONE))
    places = torch.linspace(0.3, 0.7, number) if number > 1 else torch.tensor([0.5])
    chosen = z[(places * (len(z) - 1)).round().long().unique()]
    return image[..., chosen].permute(3, 0, 1, 2).contiguous()


@torch.no_grad()
def study_scores(
    slices: torch.Tensor, available: Sequence[bool], network: SSCFNet, patient: int | None = None
) -> dict[str, dict[str, float]]:
    """Scores of each available contrast; all grow with doubt.

    Args:
        slices: N x 8 x X x Y network input, on the device of the network.
        available: which contrasts there are.
        network: in evaluation mode.
        patient: hash of a patient whose own entries of the bank are not looked at.

    Returns:
        By contrast key: ``distance``, log of the distance to the nearest key of the bank relative to the norm of the
        own; ``features``, mean deviation of the channel statistics from those in the bank, in standard deviations; and,
        where another contrast is there, ``consistency``, mean absolute error of the contrast synthesized from the
        others, of a range of 1.
    """
    bank, given = network.stored_bank(), [i for i, kept in enumerate(available) if kept]
    usable = bank.present & (bank.patient != (patient or 0)).unsqueeze(1)
    module = network.for_scenario(available)
    mask = torch.zeros_like(slices[:, : network.num_tumor_classes])
    features = module.encode(slices, mask, given)
    if network.two_passes and network.with_segmentation:
        allowed = usable.any(dim=1).unsqueeze(0).expand(len(slices), -1)
        logits, _ = module.segment(features, bank, allowed)
        features = module.encode(slices, torch.sigmoid(logits.float()).to(slices.dtype), given)
    found: dict[str, dict[str, float]] = {}
    for row, i in enumerate(given):
        scores = found[CONTRAST_KEYS[i]] = {}
        entries = usable[:, i]
        if entries.any():
            key = network.retrieval_key([scale[row].unsqueeze(1) for scale in features])[:, 0]
            square = key.square().sum(dim=1)
            nearest = (key_distances(key, bank, i)[:, entries].amin(dim=1) + square).clamp(min=1e-12)
            scores["distance"] = float((0.5 * torch.log(nearest / square.clamp(min=1e-12))).mean())
            per_scale = [channel_statistics(scale[row].unsqueeze(1).float()) for scale in features]
            own = [torch.cat([s[part][:, 0] for s in per_scale], dim=1) for part in (0, 1)]
            deviations = [
                ((value - table[entries, i].mean(0)) / table[entries, i].std(0, unbiased=False).clamp(min=1e-3)).abs()
                for value, table in zip(own, (bank.mean, bank.std), strict=True)
            ]
            scores["features"] = float(torch.stack([d.clamp(max=20).mean() for d in deviations]).mean())
        if len(given) > 1:
            truth = slices[:, i]
            kept = torch.tensor([j in given and j != i for j in range(NUM_CONTRASTS)], device=slices.device)
            others = network_input(slices[:, :NUM_CONTRASTS], kept.expand(len(slices), -1))
            brain = (slices[:, :NUM_CONTRASTS] > -1).any(dim=1)
            single = network.for_scenario(kept.tolist())
            single.targets, single.target_index = [i], single.target_index.new_tensor([i])
            pred = single(others)[:, i]
            scores["consistency"] = float((pred - truth).abs()[brain].mean() / 2)
    return found


def place(name: str, contrast: str, number: int) -> str:
    """Under which key the calibration keeps a score: consistency depends on how many contrasts there are."""
    return f"{contrast} of {number}" if name == "consistency" else contrast


def worst(
    scores: Mapping[str, Mapping[str, float]], reference: Mapping[str, Any], names: Sequence[str]
) -> float | None:
    """Greatest of some scores in standard deviations above the mean of the calibration; ``None`` without any."""
    values = [
        (value - reference[name][key][0]) / reference[name][key][1]
        for contrast, of_contrast in scores.items()
        for name, value in of_contrast.items()
        if name in names and (key := place(name, contrast, len(scores))) in reference[name]
    ]
    return max(values) if values else None


class TrustAssessor:
    """Scores and verdict of a study.

    Args:
        reference: of ``calibrate``; ``None`` for weights that were never calibrated.
        number: of slices that the scores are from at most; each costs about as much as in the synthesis itself, once
            for each available contrast.
        reject: a study is rejected from this many times the limit of review on.
    """

    def __init__(self, reference: Mapping[str, Any] | None = None, number: int = 3, reject: float = 2.0) -> None:
        self.reference, self.number, self.reject = reference, number, reject

    def __call__(self, item: Mapping[str, Any], network: nn.Module, device: torch.device | str) -> dict[str, Any]:
        """Judge one study.

        Args:
            item: after ``inference_transforms``.
            network: on ``device``, in evaluation mode; other networks than ``SSCFNet`` get no scores.
            device: where to compute.

        Returns:
            ``scores``, ``verdict`` (``pass``, ``review``, ``reject`` or ``not calibrated``), ``reasons``, ``warnings``.
        """
        available = [bool(kept) for kept in item["has_contrast"]]
        scores: dict[str, Any] = {}
        if isinstance(network, SSCFNet) and network.synthesis and network.with_ccp:
            patient = stable_hash(str(item.get("patient", item["study"])))
            with torch.inference_mode():
                slices = central_slices(torch.as_tensor(item["image"]), self.number).to(device)
                scores = {"contrasts": study_scores(slices, available, network, patient)}
        reasons = [found["finding"] for found in item.get("checks", ())]
        verdict = "review" if reasons else "pass"
        if self.reference is None or not scores:
            verdict = verdict if reasons else "not calibrated"
            reasons.append("There is no calibration in the weights, so no score can be judged.")
        else:
            for name, parts in (("out_of_distribution", SCORES[:2]), ("consistency", SCORES[2:])):
                value = worst(scores["contrasts"], self.reference, parts)
                limit = self.reference["limits"][name]
                if value is None or limit is None:
                    continue
                scores[name] = value
                if value > limit:
                    reasons.append(f"The score {name} is {value:.1f}, above the limit {limit:.1f} of the calibration.")
                    verdict = "reject" if value > self.reject * limit or verdict == "reject" else "review"
        synthetic_t1ce = not available[CONTRASTS.index("T1ce")]
        return {
            "scores": scores,
            "verdict": verdict,
            "reasons": reasons,
            "warnings": [_ENHANCEMENT] if synthetic_t1ce else [],
        }


def read_reference(path: str | Path) -> dict[str, Any] | None:
    """What ``calibrate`` put into a file of weights, ``None`` if nothing, for configs."""
    return read_state(path)[1].get(TRUST_KEY)


def calibrate(
    items: Sequence[Mapping[str, Any]], transform: Any, network: SSCFNet, number: int = 3, margin: float = 1.25
) -> dict[str, Any]:
    """Mean and spread of every score of some complete, sound patients, and the limits that hold for all of them.

    Each patient is judged complete, and with every choice of three and of two contrasts.

    Args:
        items: of a datalist. The own entries of a patient in the bank are never looked at.
        transform: see ``inference_transforms``.
        network: in evaluation mode.
        number: of slices, see ``TrustAssessor``.
        margin: of the limits above the worst of these patients, each judged by the others.

    Returns:
        By score and contrast mean and standard deviation; ``limits``, ``patients``.
    """
    assessor, rows = TrustAssessor(None, number), []
    device = next(network.parameters()).device
    subsets = [kept for kept in itertools.product((True, False), repeat=NUM_CONTRASTS) if sum(kept) > 1]
    for item in items:
        whole = transform({k: v for k, v in item.items() if k != "seg"})
        image, patient = torch.as_tensor(whole["image"])[None, :NUM_CONTRASTS], []
        for kept in map(torch.tensor, subsets):
            shown = {**whole, "image": network_input(image, kept[None])[0], "has_contrast": kept}
            patient.append(assessor(shown, network.eval(), device)["scores"]["contrasts"])
        rows.append(patient)

    def spread(chosen: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
        found: dict[str, dict[str, list[float]]] = {name: {} for name in SCORES}
        for scores in itertools.chain.from_iterable(chosen):
            for contrast, of_contrast in scores.items():
                for name, value in of_contrast.items():
                    found[name].setdefault(place(name, contrast, len(scores)), []).append(value)
        table: dict[str, Any] = {name: {} for name in SCORES}
        for name, by_key in found.items():
            for key, values in by_key.items():
                # few patients: no spread is taken for less than 5% of the level
                deviation = max(float(np.std(values)), 0.05 * abs(float(np.mean(values))), 1e-4)
                table[name][key] = [float(f"{v:.4g}") for v in (np.mean(values), deviation)]
        return table

    reference, limits = spread(rows), {}
    for name, parts in (("out_of_distribution", SCORES[:2]), ("consistency", SCORES[2:])):
        left_out = []
        for k, patient in enumerate(rows):
            others = spread(rows[:k] + rows[k + 1 :] if len(rows) > 2 else rows)
            left_out += [worst(scores, others, parts) for scores in patient]
        known = [value for value in left_out if value is not None]
        limits[name] = float(f"{max(margin * max(known), 3.0):.4g}") if known else None
    return {**reference, "limits": limits, "patients": len(rows)}
