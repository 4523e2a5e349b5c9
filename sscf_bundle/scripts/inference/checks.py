# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Quick checks of the volumes of a study, before anything is computed: each finding is a code and one sentence."""

from __future__ import annotations

import itertools
import json
import math
import os
import time
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.config import KeysCollection
from monai.transforms import MapTransform
from scipy import ndimage

from ..contrasts import CONTRAST_KEYS, CONTRASTS, StudyError
from ..data.transforms import LoadStudyd, StudyCompose

#: Codes of the findings.
CHECKS = ("not_skull_stripped", "not_coregistered", "normalized", "unusual_intensities", "mislabelled")
#: Spacing in mm of the grid that shapes are compared on.
_COARSE = 4.0
_QUANTILES = (0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98)
_BINS = 24
_STATISTICS = Path(__file__).resolve().parents[2] / "configs" / "input_statistics.json"


def coarse_volumes(image: torch.Tensor, spacing: Sequence[float]) -> torch.Tensor:
    """C x X x Y x Z averaged over cells of about 4 mm."""
    cells = [max(1, round(_COARSE / float(step))) for step in spacing]
    cells = [min(cell, size) for cell, size in zip(cells, image.shape[1:], strict=True)]
    # the last cells may be incomplete: a brain at the far edge counts too
    return F.avg_pool3d(image[None], cells, ceil_mode=True)[0]


def volume_features(volume: np.ndarray) -> np.ndarray:
    """What tells the contrasts apart: quantiles of the brain relative to the 99.5th percentile, and of its depths.

    Args:
        volume: X x Y x Z coarse intensities, 0 outside the brain.

    Returns:
        Quantiles, the spread of the upper tail, and the mean of the rim and of the middle of the brain.
    """
    brain = volume > 0
    values = volume[brain]
    top = np.percentile(values, 99.5)
    depth = ndimage.distance_transform_edt(np.pad(brain, 1))[1:-1, 1:-1, 1:-1]
    rim, middle = (depth > 0) & (depth <= 2), depth > 0.7 * depth.max()
    tail = math.log(max(float(values.max()), 1e-12) / max(float(np.percentile(values, 95)), 1e-12))
    quantiles = np.quantile(values, _QUANTILES) / top
    return np.array([*quantiles, tail, volume[rim].mean() / top, volume[middle].mean() / top])


def shape_features(volume: np.ndarray, spacing: Sequence[float]) -> dict[str, float]:
    """Share of the field that is not 0, volume in ml, and how bright the outermost cells are against the inner ones."""
    head = volume > 0
    depth = ndimage.distance_transform_edt(np.pad(head, 1))[1:-1, 1:-1, 1:-1]
    rim, inner = (depth > 0) & (depth <= 1.5), depth > 3
    shell = volume[rim].mean() / volume[inner].mean() if inner.any() else 0.0
    ml = head.sum() * float(np.prod(spacing)) * np.prod([max(1, round(_COARSE / float(s))) for s in spacing]) / 1000
    return {"filled": float(head.mean()), "ml": float(ml), "shell": float(shell)}


def mutual_information(one: np.ndarray, other: np.ndarray) -> float:
    """Normalized mutual information of two sets of values."""
    joint, _, _ = np.histogram2d(one, other, bins=_BINS)
    joint /= max(joint.sum(), 1)

    def entropy(p: np.ndarray) -> float:
        return float(-(p[p > 0] * np.log(p[p > 0])).sum())

    return (entropy(joint.sum(0)) + entropy(joint.sum(1))) / max(entropy(joint.ravel()), 1e-6)


def alignment(one: np.ndarray, other: np.ndarray, step: float = 1.0, angle: float = 4.0) -> tuple[float, float]:
    """How two coarse volumes lie on each other.

    Args:
        one: X x Y x Z.
        other: the same.
        step: shift to try, in cells along each axis, both ways.
        angle: rotation to try, in degrees about each axis, both ways.

    Returns:
        Dice overlap of the brains, and how much mutual information grows relative to that above 1 by the best of 12
        small movements; a volume that lies well grows little or shrinks.
    """
    a, b = one > 0, other > 0
    dice = 2 * float((a & b).sum()) / max(int(a.sum() + b.sum()), 1)
    inside = ndimage.binary_erosion(a & b, iterations=2)
    if inside.sum() < 1000:
        return dice, 0.0
    # blurred alike, or what interpolation smooths would look better for that alone
    one, other = (ndimage.gaussian_filter(v, 0.5) for v in (one, other))
    top = [np.percentile(v[inside], 99) for v in (one, other)]
    fixed = np.minimum(one[inside], top[0])
    places = np.argwhere(inside).astype(np.float64)
    center = places.mean(axis=0)

    def score(turn: np.ndarray, shift: np.ndarray) -> float:
        moved = (places - center) @ turn.T + center + shift
        values = ndimage.map_coordinates(other, moved.T, order=1, mode="nearest")
        return mutual_information(fixed, np.minimum(values, top[1])) - 1

    own, best = score(np.eye(3), np.zeros(3)), 0.0
    for axis, sign in itertools.product(range(3), (-1, 1)):
        turn, (i, j) = np.eye(3), [k for k in range(3) if k != axis]
        c, s = math.cos(math.radians(angle)), sign * math.sin(math.radians(angle))
        turn[i, i], turn[i, j], turn[j, i], turn[j, j] = c, -s, s, c
        best = max(best, score(turn, np.zeros(3)), score(np.eye(3), sign * step * np.eye(3)[axis]))
    return dice, best / max(own, 1e-6) - 1


def label_odds(features: Mapping[int, np.ndarray], statistics: Mapping[str, Any]) -> tuple[float, tuple[int, ...]]:
    """The likeliest names of some contrasts by the linear classifier of ``fit``.

    Args:
        features: by the index of a contrast as it is named.
        statistics: ``weights``.

    Returns:
        Log odds of the likeliest names against those given, 0 where they agree; the likeliest names.
    """
    weights = np.asarray(statistics["weights"])
    scores = np.stack(list(features.values())) @ weights[:, :-1].T + weights[:, -1]

    def total(labels: Sequence[int]) -> float:
        return float(sum(scores[row, label] for row, label in enumerate(labels)))

    best = max(itertools.permutations(range(len(CONTRASTS)), len(features)), key=total)
    return total(best) - total(list(features)), best


def _discriminant(x: np.ndarray) -> np.ndarray:
    """Weights of a linear discriminant, the constant last: studies x 4 x features to 4 x (features + 1)."""
    means = x.mean(axis=0)
    within = (x - means).reshape(-1, x.shape[2])
    covariance = within.T @ within / max(len(within) - len(CONTRASTS), 1)
    # shrunk towards its diagonal, because studies are few
    inverse = np.linalg.inv(0.8 * covariance + 0.2 * np.diag(np.diag(covariance)) + 1e-6 * np.eye(len(covariance)))
    return np.hstack([means @ inverse, -0.5 * np.einsum("ki,ij,kj->k", means, inverse, means)[:, None]])


def measure(image: torch.Tensor, spacing: Sequence[float], available: Sequence[bool]) -> dict[str, Any]:
    """All measurements of a study.

    Args:
        image: 4 x X x Y x Z intensities on file, >= 0.
        spacing: of the voxels, in mm.
        available: which contrasts there are.

    Returns:
        ``features``, ``shape`` and ``top`` by the index of a contrast, ``pairs`` (of ``alignment``) by two.
    """
    coarse = coarse_volumes(image, spacing).numpy()
    given = [i for i, kept in enumerate(available) if kept]
    return {
        "features": {i: volume_features(coarse[i]) for i in given},
        "shape": {i: shape_features(coarse[i], spacing) for i in given},
        "top": {i: float(image[i].max()) for i in given},
        "pairs": {(given[0], i): alignment(coarse[given[0]], coarse[i]) for i in given[1:]},
    }


def fit(studies: Sequence[Mapping[str, Any]], margin: float = 0.25) -> dict[str, Any]:
    """Statistics of the input from complete, sound studies.

    Args:
        studies: of ``measure``, each with all four contrasts.
        margin: of the limits, relative to the range that was seen.

    Returns:
        What ``findings`` takes: a linear discriminant ``weights`` (4 x features + 1), ``low`` and ``high`` of the
        features by contrast, and limits of the shape and of the alignment.
    """
    x = np.array([[study["features"][i] for i in range(len(CONTRASTS))] for study in studies])
    weights = _discriminant(x)
    low, high = x.min(axis=0), x.max(axis=0)
    room = margin * (high - low)
    shapes = [shape for study in studies for shape in study["shape"].values()]
    pairs = [pair for study in studies for pair in study["pairs"].values()]
    limits = {name: (1 + margin) * max(shape[name] for shape in shapes) for name in ("filled", "ml", "shell")}
    limits["dice"] = 1 - (1 + margin) * (1 - min(dice for dice, _ in pairs)) - 0.02
    gain = max(gain for _, gain in pairs)  # below 0 where nothing gains
    limits["gain"] = gain + margin * abs(gain) + 0.01
    # each study judged by the others
    left_out = [_discriminant(np.delete(x, k, axis=0)) for k in range(len(x))] if len(x) > 2 else [weights] * len(x)
    odds = [label_odds(study["features"], {"weights": w})[0] for study, w in zip(studies, left_out, strict=True)]
    limits["odds"] = max((1 + margin) * max(odds), 2.0)
    result = {"weights": weights, "low": low - room, "high": high + room}
    rounded = {name: [[float(f"{v:.5g}") for v in row] for row in value] for name, value in result.items()}
    return {"studies": len(studies), **rounded, "limits": {k: float(f"{v:.4g}") for k, v in limits.items()}}


def findings(measured: Mapping[str, Any], statistics: Mapping[str, Any]) -> list[dict[str, str]]:
    """What is suspicious of a study.

    Args:
        measured: of ``measure``.
        statistics: of ``fit``.

    Returns:
        ``code``, one of ``CHECKS``, and ``finding``, one sentence, of each.
    """
    found: list[dict[str, str]] = []

    def add(code: str, sentence: str) -> None:
        found.append({"code": code, "finding": sentence})

    limits, given = statistics["limits"], list(measured["features"])
    for i in given:
        shape, name = measured["shape"][i], CONTRASTS[i]
        if shape["filled"] > max(limits["filled"], 0.9):
            add("not_skull_stripped", f"{name} has no background of 0: strip the skull.")
        elif shape["ml"] > limits["ml"] or shape["shell"] > limits["shell"]:
            about = f"{shape['ml']:.0f} ml, rim {shape['shell']:.2f} times as bright as the inside"
            add("not_skull_stripped", f"{name} does not look skull-stripped ({about}): strip the skull.")
        if measured["top"][i] <= 1.5:
            add("normalized", f"{name} has no value above {measured['top'][i]:.3g}: give intensities as acquired.")
        features = measured["features"][i][: len(_QUANTILES) + 1]
        low, high = np.asarray(statistics["low"])[:, : len(features)], np.asarray(statistics["high"])
        if (features < low.min(axis=0)).any() or (features > high[:, : len(features)].max(axis=0)).any():
            add("unusual_intensities", f"{name} has intensities distributed as in no study of the reference.")
    for (i, j), (dice, gain) in measured["pairs"].items():
        if dice < limits["dice"] or gain > limits["gain"]:
            about = f"overlap {dice:.2f}, {100 * gain:.0f}% better when moved"
            add("not_coregistered", f"{CONTRASTS[j]} does not lie on {CONTRASTS[i]} ({about}): register them.")
    odds, best = label_odds(measured["features"], statistics)
    if odds > limits["odds"]:
        both = [(i, label) for i, label in zip(given, best, strict=True) if i != label]
        wrong = [f"{CONTRASTS[i]} looks like {CONTRASTS[label]}" for i, label in both]
        add("mislabelled", f"{' and '.join(wrong)}: check which file is which.")
    return found


class CheckStudyd(MapTransform):
    """Add ``"checks"``, the ``findings`` of a study, and ``"check_seconds"``; a study may be refused for them.

    Args:
        keys: key of the stacked contrasts on the grid on file.
        rejecting: codes of ``CHECKS`` that refuse a study.
        statistics: of ``fit``, or a JSON file of it; ``None`` is ``configs/input_statistics.json``.

    Raises:
        StudyError: for an unknown code; from the call, for a finding that refuses.
    """

    def __init__(
        self,
        keys: KeysCollection = "image",
        rejecting: Sequence[str] = (),
        statistics: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(keys)
        unknown = set(rejecting) - set(CHECKS)
        if unknown:
            raise StudyError(f"There is no check {sorted(unknown)[0]}: choose from {', '.join(CHECKS)}.")
        self.rejecting = tuple(rejecting)
        self.statistics: Mapping[str, Any] = (
            statistics if isinstance(statistics, Mapping) else json.loads(Path(statistics or _STATISTICS).read_text())
        )

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        started = time.perf_counter()
        for key in self.key_iterator(d):
            spacing = torch.as_tensor(d[key].affine)[:3, :3].norm(dim=0).tolist()
            d["checks"] = findings(measure(d[key].as_tensor(), spacing, d["has_contrast"].tolist()), self.statistics)
        d["check_seconds"] = time.perf_counter() - started
        for found in d["checks"]:
            if found["code"] in self.rejecting:
                raise StudyError(f"Study {d.get('study')}: {found['finding']}")
        return d


def measure_folder(items: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """``measure`` of complete studies on disk, for ``fit``."""
    load, measured = StudyCompose([LoadStudyd()]), []
    for item in items:
        d = load({key: item[key] for key in (*CONTRAST_KEYS, "study") if key in item})
        if bool(d["has_contrast"].all()):
            spacing = torch.as_tensor(d["image"].affine)[:3, :3].norm(dim=0).tolist()
            measured.append(measure(d["image"].as_tensor(), spacing, [True] * len(CONTRASTS)))
    return measured
