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

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import nn

from ..contrasts import CONTRAST_KEYS, CONTRASTS, NUM_CONTRASTS, StudyError, scenario_name
from ..data.randomness import stable_hash
from ..networks.availability import network_input
from ..networks.blocks import scale_statistics
from ..networks.retrieval import key_distances
from ..networks.sscf import SSCFNet
from ..networks.weights import read_state

#: Key of the settings in the weights that holds what ``calibrate`` found.
TRUST_KEY = "trust"
#: The two scores of a study, and the scores of a contrast that each is the worst of.
OVERALL = {"out_of_distribution": ("distance", "features"), "consistency": ("consistency",)}
SCORES = tuple(name for names in OVERALL.values() for name in names)
#: Scores that are expected of a synthetic contrast, and their digits.
EXPECTED = {"psnr": 1, "ssim": 3}
_ENHANCEMENT = (
    "T1ce is synthetic: contrast enhancement cannot be inferred reliably from other contrasts, so neither its presence "
    "nor its absence in this volume means anything."
)


def patients_in_bank(network: nn.Module) -> set[int]:
    """Hashes of the patients whose slices a network retrieves from; none for a network without a bank."""
    if not hasattr(network, "bank_patient"):
        return set()
    filled = network.get_buffer("bank_present").any(dim=1)
    return set(network.get_buffer("bank_patient")[filled].tolist())


def central_slices(image: torch.Tensor, number: int, slices_for_one: int) -> torch.Tensor:
    """Axial slices from the middle of the brain (30 to 70% of its height), evenly spread: N x 8 x X x Y, N >= 1.

    Args:
        image: 8 x X x Y x Z network input.
        number: of slices at most.
        slices_for_one: slices with brain for each one that is taken: thick ones are few, and scores must cost little.
    """
    z = (image[:NUM_CONTRASTS] > -1).flatten(0, 2).any(dim=0).nonzero().flatten()
    number = min(number, max(1, len(z) // slices_for_one))
    places = torch.linspace(0.3, 0.7, number) if number > 1 else torch.tensor([0.5])
    chosen = z[(places * (len(z) - 1)).round().long().unique()]
    return image[..., chosen].permute(3, 0, 1, 2).contiguous()


@torch.no_grad()
def study_scores(
    slices: torch.Tensor,
    available: Sequence[bool],
    network: SSCFNet,
    patient: int | None = None,
    num_prototypes: int = 0,
) -> tuple[dict[str, dict[str, float]], dict[str, list[dict[str, Any]]]]:
    """Scores of each available contrast, all of which grow with doubt, and where the missing ones come from.

    Args:
        slices: N x 8 x X x Y network input, on the device of the network.
        available: which contrasts there are.
        network: in evaluation mode.
        patient: hash of a patient whose own entries of the bank the scores do not look at.
        num_prototypes: how many entries of the bank are named for each missing contrast.

    Returns:
        Scores by contrast key: ``distance``, ln of the distance to the nearest key of the bank relative to the norm of
        the own, a mean over slices; ``features``, mean deviation of the channel statistics (mu and sigma of eq. 8) from
        those in the bank, in standard deviations, each at most 20; and, where another contrast is there,
        ``consistency``, mean absolute error in the brain of the contrast synthesized from the others, in [0, 1].

        Prototypes by the key of each missing contrast, the most used first: ``entry`` (slot of the bank), ``share`` of
        the retrievals of eq. 8 (one for each slice and available contrast) and mean ``distance`` of the keys relative
        to the norm of the own. Empty for a network that retrieves otherwise than by the nearest key of one scale.
    """
    bank, given = network.stored_bank(), [i for i, kept in enumerate(available) if kept]
    usable = bank.present & (bank.patient != (patient or 0)).unsqueeze(1)
    module = network.for_scenario(available)
    mask = torch.zeros_like(slices[:, : network.num_tumor_classes])
    features = module.encode(slices, mask, given)
    brain = (slices[:, :NUM_CONTRASTS] > -1).any(dim=1)
    # the network itself looks at all entries
    allowed = bank.present.any(dim=1).expand(len(slices), -1)
    if network.two_passes:
        logits, _ = module.segment(features, bank, usable.any(dim=1).expand(len(slices), -1))
        features = module.encode(slices, torch.sigmoid(logits.float()).to(slices.dtype), given)
    found: dict[str, dict[str, float]] = {}
    relative: dict[int, torch.Tensor] = {}
    for row, i in enumerate(given):
        scores = found[CONTRAST_KEYS[i]] = {}
        entries = usable[:, i]
        if entries.any():
            key = network.retrieval_key([scale[row].unsqueeze(1) for scale in features])[:, 0]
            square = key.square().sum(dim=1)
            distances = key_distances(key, bank, i)
            nearest = (distances[:, entries].amin(dim=1) + square).clamp(min=1e-12)
            scores["distance"] = float((0.5 * torch.log(nearest / square.clamp(min=1e-12))).mean())
            relative[i] = ((distances + square[:, None]).clamp(min=0) / square[:, None].clamp(min=1e-12)).sqrt()
            own = [t[:, 0] for t in scale_statistics([scale[row].unsqueeze(1).float() for scale in features])]
            deviations = [
                ((value - table[entries, i].mean(0)) / table[entries, i].std(0, unbiased=False).clamp(min=1e-3)).abs()
                for value, table in zip(own, (bank.mean, bank.std), strict=True)
            ]
            scores["features"] = float(torch.stack([d.clamp(max=20).mean() for d in deviations]).mean())
        if len(given) > 1:
            kept = torch.tensor([j in given and j != i for j in range(NUM_CONTRASTS)], device=slices.device)
            single = network.for_scenario(kept.tolist())
            single.targets, single.target_index = [i], single.target_index.new_tensor([i])
            single.companion = None  # so that limits hold with any
            if network.two_passes:
                # the mask of the first pass, and with it every feature, is another without this contrast
                pred = single(network_input(slices[:, :NUM_CONTRASTS], kept.expand(len(slices), -1)))[:, i]
            else:
                others = [[f for j, f in zip(given, scale, strict=True) if j != i] for scale in features]
                pred = single.decode(i, [scale[0] for scale in single.predict(others, bank, allowed)])[:, 0]
            scores["consistency"] = float((pred - slices[:, i]).abs()[brain].mean() / 2)
    prototypes: dict[str, list[dict[str, Any]]] = {}
    if num_prototypes and network.retrieval == "nearest" and len(network.key_lengths) == 1:
        for i in module.targets:
            # as the network itself retrieves, the patient's own entries included
            known = [relative[j].masked_fill(~(bank.present[:, i] & bank.present[:, j]), math.inf) for j in relative]
            prototypes[CONTRAST_KEYS[i]] = _most_used(known, num_prototypes)
    return found, prototypes


def _most_used(distances: Sequence[torch.Tensor], number: int) -> list[dict[str, Any]]:
    """The nearest entries of some queries (each N x L), counted."""
    if not distances:
        return []
    nearest, entry = torch.cat(list(distances)).min(dim=1)
    by_entry: dict[int, list[float]] = {}
    for slot, distance in zip(entry.tolist(), nearest.tolist(), strict=True):
        if math.isfinite(distance):
            by_entry.setdefault(slot, []).append(distance)
    chosen = sorted(by_entry, key=lambda slot: (-len(by_entry[slot]), slot))[:number]
    return [
        {
            "entry": slot,
            "share": round(len(by_entry[slot]) / len(entry), 3),
            "distance": round(sum(by_entry[slot]) / len(by_entry[slot]), 3),
        }
        for slot in chosen
    ]


def place(name: str, contrast: str, number: int) -> str:
    """Key under which the calibration keeps a score: consistency depends on the number of available contrasts."""
    return f"{contrast} of {number}" if name == "consistency" else contrast


def worst(
    scores: Mapping[str, Mapping[str, float]], reference: Mapping[str, Any], names: Sequence[str]
) -> float | None:
    """The greatest of the scores of these names over the contrasts of a study, ``None`` without any.

    It is in standard deviations above the mean of ``reference``, which ``calibrate`` gives by score and ``place``.
    """
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
        number: of slices that the scores are from at most; each costs about as much as in the synthesis itself, once
            for each available contrast.
        slices_for_one: slices with brain for each one of these.
        reject: a study is rejected from this many times the limit of review on.
        num_prototypes: how many entries of the bank are named for each missing contrast.
        reference: of ``calibrate``; ``None`` for weights that were never calibrated.
    """

    def __init__(
        self,
        number: int,
        slices_for_one: int,
        reject: float,
        num_prototypes: int = 0,
        reference: Mapping[str, Any] | None = None,
    ) -> None:
        if slices_for_one < 1:
            raise StudyError(f"trust_slices_for_one must be at least 1, got {slices_for_one}.")
        self.reference, self.reject = reference, reject
        self.number, self.slices_for_one, self.num_prototypes = number, slices_for_one, num_prototypes

    def __call__(self, item: Mapping[str, Any], network: nn.Module, device: torch.device | str) -> dict[str, Any]:
        """Judge one study, after ``inference_transforms``; other networks than ``SSCFNet`` get no scores.

        Returns:
            ``scores`` (those of ``study_scores`` under ``contrasts``, those of ``OVERALL`` in standard deviations, and
            ``doubt``, the greatest of these and of the ``doubts`` of the input, relative to their limits),
            ``prototypes``, ``expected`` (of each missing contrast, where the weights know it: median and worst PSNR
            and SSIM, see ``expected_scores``), ``verdict`` (``pass``, ``review``, ``reject`` or ``not calibrated``),
            ``reasons`` and ``warnings``, sentences.
        """
        available = [bool(kept) for kept in item["has_contrast"]]
        scores: dict[str, Any] = {}
        prototypes: dict[str, Any] = {}
        if has_scores(network):
            patient = stable_hash(str(item.get("patient", item["study"])))
            with torch.inference_mode():
                image = torch.as_tensor(item["image"])
                slices = central_slices(image, self.number, self.slices_for_one).to(device)
                scores["contrasts"], prototypes = study_scores(slices, available, network, patient, self.num_prototypes)
        reasons = [found["finding"] for found in item.get("checks", ())]
        verdict = "review" if reasons else "pass"
        doubt = list(item.get("doubts", {}).values())
        if not scores:
            verdict = verdict if reasons else "not calibrated"
            reasons.append("Only an SSCFNet with ccp has scores to judge a study by.")
        elif self.reference is None:
            verdict = verdict if reasons else "not calibrated"
            reasons.append("There is no calibration in the weights, so no score can be judged: run calibrating.")
        else:
            for name, parts in OVERALL.items():
                value = worst(scores["contrasts"], self.reference, parts)
                limit = self.reference["limits"][name]
                if value is None or limit is None:
                    continue
                scores[name] = value
                doubt.append(value / limit)
                if value > limit:
                    reasons.append(f"The score {name} is {value:.1f}, its limit {limit:.1f}: look at input and result.")
                    verdict = "reject" if value > self.reject * limit or verdict == "reject" else "review"
        if doubt:
            scores["doubt"] = max(doubt)
        return {
            "scores": scores,
            "prototypes": prototypes,
            "expected": self._expected(available),
            "verdict": verdict,
            "reasons": reasons,
            "warnings": [] if available[CONTRASTS.index("T1ce")] else [_ENHANCEMENT],
        }

    def _expected(self, available: Sequence[bool]) -> dict[str, Any]:
        """What synthetic contrasts of this scenario were worth in other patients; empty where the weights tell none."""
        known = (self.reference or {}).get("expected", {})
        named = {
            contrast: {score: {"median": values[2 * k], "worst": values[2 * k + 1]} for k, score in enumerate(EXPECTED)}
            for contrast, values in known.get("scenarios", {}).get(scenario_name(available), {}).items()
        }
        return {"patients": known["patients"], "contrasts": named} if named else {}


def has_scores(network: nn.Module) -> TypeGuard[SSCFNet]:
    """Whether studies can be judged by the bank of a network: an ``SSCFNet`` that retrieves from it."""
    return isinstance(network, SSCFNet) and network.synthesis and network.with_ccp


def read_reference(path: str | Path) -> dict[str, Any] | None:
    """What ``calibrate`` put into a file of weights, ``None`` if nothing, for configs."""
    return read_state(path)[1].get(TRUST_KEY)
