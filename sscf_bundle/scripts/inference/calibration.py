# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""What checks and verdicts are held against, measured on complete, sound studies."""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn

from ..contrasts import CONTRAST_KEYS, CONTRASTS, FAILURE_KEY, NUM_CONTRASTS, SCENARIOS, StudyError, scenario_name
from ..data.cohort import Cohort
from ..data.datalist import write_whole
from ..data.randomness import stable_hash
from ..data.transforms import LoadStudyd, StudyCompose
from ..networks.availability import network_input
from ..networks.sscf import SSCFNet
from .checks import QUALITY, grid_of, label_odds, measure
from .preprocessing import StudyDataset
from .trust import EXPECTED, OVERALL, SCORES, TrustAssessor, central_slices, has_scores, patients_in_bank, place, worst

logger = logging.getLogger(__name__)

_LEAST_PATIENTS = 3
#: Scores of all studies and choices of contrasts of a patient.
Patient: TypeAlias = Sequence[Mapping[str, Any]]


def complete_studies(cohort: Cohort, transform: Callable[[Any], Any], part: str = "validation") -> Iterator[dict]:
    """The studies of a part of the split of a cohort, preprocessed, one after the other.

    One that cannot be read or lacks a contrast is named in the log and in ``cohort.failures``, so that
    ``cohort.finish`` tells of it.

    Raises:
        StudyError: at the end, if no study could be used.
    """
    items = [{k: v for k, v in item.items() if k != "seg"} for item in cohort.parts[part]]
    usable = 0
    dataset = StudyDataset(items, transform)
    for k in range(len(items)):
        item = dataset[k]
        reason = item.get(FAILURE_KEY)
        if reason is None and not bool(item["has_contrast"].all()):
            lacking = [name for name, given in zip(CONTRASTS, item["has_contrast"], strict=True) if not given]
            reason = f"Study {item['study']} lacks {', '.join(lacking)}: a calibration needs all four contrasts."
        if reason is None:
            usable += 1
            logger.info("Study %s, %d of %d.", item["study"], k + 1, len(items))
            yield item
        else:
            logger.error("Study %s failed: %s", item["study"], reason)
            cohort.failures.append({"study": item["study"], "reason": reason})
    if not usable:
        raise StudyError(f"None of {len(items)} studies can be used: give complete studies of sound patients.")


def measure_cohort(cohort: Cohort) -> list[dict[str, Any]]:
    """``measure`` of the complete studies of a cohort, for ``fit``."""
    studies = (item["image"] for item in complete_studies(cohort, StudyCompose([LoadStudyd()])))
    return [measure(image.as_tensor(), *grid_of(image.affine), [True] * NUM_CONTRASTS) for image in studies]


def fit(studies: Sequence[Mapping[str, Any]], margin: float, slack: Mapping[str, float]) -> dict[str, Any]:
    """Limits of the checks from complete, sound studies.

    Args:
        studies: of ``checks.measure``, each with all four contrasts.
        margin: room that limits leave beyond what was seen, as a share of its range (features) or of its extreme.
        slack: least value of the limits ``filled`` (share of the field), ``odds`` (log odds), ``top`` (intensity),
            ``noise``, ``blur`` and ``sides``, and what is added to those of ``dice`` and ``gain`` besides.

    Returns:
        What ``checks.findings`` takes: a linear discriminant ``weights`` (4 x features + 1), ``low`` and ``high`` of
        the features by contrast, and ``limits`` of shape, alignment, names and intensities.
    """
    x = np.array([[study["features"][i] for i in range(NUM_CONTRASTS)] for study in studies])
    weights = _discriminant(x)
    low, high = x.min(axis=0), x.max(axis=0)
    room = margin * (high - low)
    shapes = [shape for study in studies for shape in study["shape"].values()]
    pairs = [pair for study in studies for pair in study["pairs"].values()]
    limits = {name: (1 + margin) * max(shape[name] for shape in shapes) for name in ("filled", "ml", "shell")}
    limits["filled"] = max(limits["filled"], slack["filled"])
    for name in QUALITY:
        most = max(quality[name] for study in studies for quality in study["quality"].values())
        limits[name] = max((1 + margin) * most, slack[name])
    limits["dice"] = 1 - (1 + margin) * (1 - min(dice for dice, _ in pairs)) - slack["dice"]
    gain = max(gain for _, gain in pairs)  # below 0 where nothing gains
    limits["gain"] = gain + margin * abs(gain) + slack["gain"]
    # each study judged by the others
    left_out = [_discriminant(np.delete(x, k, axis=0)) for k in range(len(x))] if len(x) > 2 else [weights] * len(x)
    odds = [label_odds(study["features"], {"weights": w})[0] for study, w in zip(studies, left_out, strict=True)]
    limits["odds"] = max((1 + margin) * max(odds), slack["odds"])
    limits["top"] = slack["top"]
    result = {"weights": weights, "low": low - room, "high": high + room}
    rounded = {name: [[float(f"{v:.5g}") for v in row] for row in value] for name, value in result.items()}
    return {"studies": len(studies), **rounded, "limits": {k: float(f"{v:.4g}") for k, v in limits.items()}}


def _discriminant(x: np.ndarray) -> np.ndarray:
    """Weights of a linear discriminant, the constant last: studies x 4 x features to 4 x (features + 1)."""
    means = x.mean(axis=0)
    within = (x - means).reshape(-1, x.shape[2])
    covariance = within.T @ within / max(len(within) - len(CONTRASTS), 1)
    # shrunk towards its diagonal, because studies are few
    inverse = np.linalg.inv(0.8 * covariance + 0.2 * np.diag(np.diag(covariance)) + 1e-6 * np.eye(len(covariance)))
    return np.hstack([means @ inverse, -0.5 * np.einsum("ki,ij,kj->k", means, inverse, means)[:, None]])


def conformal_limit(values: Sequence[float], coverage: float) -> float | None:
    """What the value of one more patient stays below with at least this probability, if all are exchangeable.

    Split conformal prediction (Vovk et al. 2005): the value of rank ``coverage`` (n + 1), rounded up, of n; ``None``
    where n is too small.
    """
    rank = math.ceil(coverage * (len(values) + 1) - 1e-9)
    return sorted(values)[rank - 1] if 0 < rank <= len(values) else None


def expected_scores(files: Sequence[str | os.PathLike[str]]) -> dict[str, Any]:
    """What synthetic contrasts were worth in patients that the network had never seen.

    Args:
        files: ``scores.csv`` of evaluations of whole studies, each of patients kept out of the training of its network.

    Returns:
        ``patients``, their number, and ``scenarios``: by scenario and key of the contrast the median and the worst PSNR
        (dB) of the protocol ``volume``, and the same of SSIM.

    Raises:
        StudyError: for files that are no such scores, and a patient in two of them.
    """
    import pandas as pd  # filling in studies does without it

    tables: list[pd.DataFrame] = []
    for file in files:
        try:
            table = pd.read_csv(file)
            table = table.query("method == 'network' and protocol == 'volume' and region == 'whole'")
        except (OSError, ValueError, NameError) as error:
            raise StudyError(f"{file} is no scores.csv of an evaluation: {error}") from error
        twice = set(table["patient"]) & {patient for other in tables for patient in other["patient"]}
        if twice or table.empty:
            what = f"patient {min(twice)}, who is in another file too" if twice else "no score of the protocol volume"
            raise StudyError(f"{file} has {what}: give one evaluation of whole studies for each patient.")
        tables.append(table)
    # a target that was synthesized itself has another name
    known = pd.concat(tables).query(f"of in {list(CONTRASTS)}")
    values = known.groupby(["scenario", "of", "score", "patient"])["value"].mean()
    scenarios: dict[str, dict[str, list[float]]] = {}
    for scenario, contrast in sorted({key[:2] for key in values.index}):
        entry = scenarios.setdefault(scenario, {}).setdefault(CONTRAST_KEYS[CONTRASTS.index(contrast)], [])
        for score, digits in EXPECTED.items():
            of_patients = values[scenario, contrast, score]
            entry += [round(float(value), digits) for value in (of_patients.median(), of_patients.min())]
    return {"patients": values.index.unique("patient").size, "scenarios": scenarios}


def judged_patients(
    cohort: Cohort, transform: StudyCompose, network: SSCFNet, assessor: TrustAssessor, part: str
) -> list[Patient]:
    """Scores of the patients of a part of the split, see ``calibrate``; arguments as there.

    Outside of the training part, a patient whose slices are in the bank is named in the log.

    Raises:
        StudyError: see ``complete_studies``.
    """
    device = next(network.parameters()).device
    by_patient: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    subsets = [kept for kept in itertools.product((True, False), repeat=NUM_CONTRASTS) if sum(kept) > 1]
    for whole in complete_studies(cohort, transform, part):
        image = torch.as_tensor(whole["image"])[None, :NUM_CONTRASTS]
        patient = str(whole.get("patient", whole["study"]))
        if part != "training" and stable_hash(patient) in patients_in_bank(network):
            told = "The patient of study %s is in the memory bank of the network: limits may be too narrow."
            logger.warning(told, whole["study"])
        for kept in map(torch.tensor, subsets):
            shown = {**whole, "image": network_input(image, kept[None])[0], "has_contrast": kept}
            by_patient[patient].append(assessor(shown, network.eval(), device)["scores"]["contrasts"])
    return list(by_patient.values())


def calibrate(
    cohort: Cohort,
    transform: StudyCompose,
    network: SSCFNet,
    assessor: TrustAssessor,
    margin: float,
    least_limit: float,
    least_spread: float,
    coverage: float,
    judged_file: str | None = None,
    folds: Sequence[str] = (),
    score_files: Sequence[str] = (),
) -> dict[str, Any]:
    """Mean and spread of every score of complete, sound patients, and the limits that hold for them.

    Each patient is judged complete, and with every choice of three and of two contrasts. The worst of these is held
    against the other patients; what depends on the network's own features, the parts of ``out_of_distribution``,
    against those that it was trained on, where the split names them: another network has other features. The limit of
    a score is ``conformal_limit`` of its patients, or, where they are too few for that, the greatest with a margin.

    Args:
        cohort: see ``complete_studies``; its part ``validation`` is judged, best of patients that the network never
            saw, and its part ``training``, which may be empty, are those that it was trained on. The own entries of a
            patient in the bank are never looked at.
        transform: see ``inference_transforms``.
        network: in evaluation mode.
        assessor: gives the scores.
        margin: of the limits where patients are few.
        least_limit: least limit, in standard deviations.
        least_spread: least standard deviation of a score, as a share of its mean: patients are few.
        coverage: share of new, sound patients that stay below a limit.
        judged_file: gets the scores of each patient and choice of contrasts, as JSON.
        folds: such files of a cross-validation, each of the patients kept out of the training of its network; they
            are taken in the place of the part ``validation``.
        score_files: see ``expected_scores``; without, no score is expected.

    Returns:
        By score (``SCORES``) and contrast mean and standard deviation; ``limits`` of ``OVERALL`` in standard
        deviations, ``None`` where no patient has the score; ``patients``, their number; ``expected`` of
        ``expected_scores``.

    Raises:
        StudyError: for a network without scores, for a file that does not hold scores of patients, and where some
            networks have training patients and some have not.
    """
    if not has_scores(network):
        raise StudyError("Only an SSCFNet with ccp has scores to calibrate: give its weights as source_path.")
    expected = {"expected": expected_scores(score_files)} if score_files else {}
    own = judged_patients(cohort, transform, network, assessor, "training") if cohort.parts["training"] else []
    judged = []
    for fold in folds:
        try:
            content = json.loads(Path(fold).read_text())
            judged += [(rows, content.get("training", [])) for rows in content["patients"]]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise StudyError(f"{fold} holds no scores of patients: give the judged.json of a calibration.") from error
        if bool(content.get("training")) != bool(own):
            raise StudyError(
                f"{fold} and these weights differ in whether their training patients were judged: name them in the "
                "part training of both split files, or of none."
            )
    if not folds:
        left_out = judged_patients(cohort, transform, network, assessor, "validation")
        judged = [(rows, own) for rows in left_out]
        if judged_file is not None:
            write_whole(judged_file, {"patients": left_out, "training": own})

    def spread(chosen: Sequence[Patient]) -> dict[str, Any]:
        table: dict[str, Any] = {name: {} for name in SCORES}
        for scores in itertools.chain.from_iterable(chosen):
            for contrast, of_contrast in scores.items():
                for name, value in of_contrast.items():
                    table[name].setdefault(place(name, contrast, len(scores)), []).append(value)
        for by_key in table.values():
            for key, values in by_key.items():
                deviation = max(float(np.std(values)), least_spread * abs(float(np.mean(values))), 1e-4)
                by_key[key] = [float(f"{v:.4g}") for v in (np.mean(values), deviation)]
        return table

    def reference(others: Sequence[Patient], training: Sequence[Patient]) -> dict[str, Any]:
        tables = spread(others), spread(training or others)
        return {name: tables[name in OVERALL["out_of_distribution"]][name] for name in SCORES}

    limits: dict[str, float | None] = {}
    for name, parts in OVERALL.items():
        left_out_scores = []
        for k, (patient, training) in enumerate(judged):
            others = reference([p for p, _ in (judged[:k] + judged[k + 1 :] if len(judged) > 2 else judged)], training)
            known = [value for scores in patient if (value := worst(scores, others, parts)) is not None]
            left_out_scores += [max(known)] if known else []
        limit = conformal_limit(left_out_scores, coverage) or (
            margin * max(left_out_scores) if left_out_scores else None
        )
        limits[name] = None if limit is None else float(f"{max(limit, least_limit):.4g}")
    return {**reference([p for p, _ in judged], own), "limits": limits, "patients": len(judged), **expected}


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
