# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Quick checks of the volumes of a study, before anything is computed: each finding is a code and one sentence.

A coarse volume has intensities >= 0, averaged over cells of about 4 mm (X x Y x Z), and 0 outside the brain.
"""

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
from scipy import ndimage, stats

from ..checked_settings import refuse_unknown
from ..contrasts import CONTRASTS, StudyError

#: Codes of the findings.
CHECKS = (
    *("not_skull_stripped", "not_coregistered", "normalized", "unusual_intensities"),
    *("mislabelled", "noisy", "blurred", "uneven"),
)
#: What is measured of each contrast and has the same limit for all.
QUALITY = ("noise", "blur", "sides")
#: What is measured; the limits in ``configs/input_statistics.json`` hold for these alone. Spacing in mm of the grid for
#: shapes, quantiles of the intensities, bins of mutual information, the movements that are tried
#: (cells along each axis, degrees about each axis, both ways), and slices for noise and blur.
_COARSE, _QUANTILES, _BINS = 4.0, (0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98), 24
_SHIFT, _ANGLE = 1.0, 4.0
_GRAIN_SLICES = 8
_STATISTICS = Path(__file__).resolve().parents[2] / "configs" / "input_statistics.json"


def coarse_volumes(image: torch.Tensor, spacing: Sequence[float]) -> torch.Tensor:
    """C x X x Y x Z intensities averaged over cells of about 4 mm; ``spacing`` in mm."""
    cells = [max(1, round(_COARSE / float(step))) for step in spacing]
    cells = [min(cell, size) for cell, size in zip(cells, image.shape[1:], strict=True)]
    # the last cells may be incomplete: a brain at the far edge counts too
    return F.avg_pool3d(image[None], cells, ceil_mode=True)[0]


def volume_features(volume: np.ndarray) -> np.ndarray:
    """What tells the contrasts apart: quantiles of a coarse volume relative to the 99.5th percentile, and its depths.

    Returns:
        Ten numbers: seven quantiles, ln(maximum / 95th percentile), and the mean of the rim (two outermost cells) and
        of the middle of the brain (70% of the greatest depth on); all but the third last relative to the 99.5th
        percentile, in [0, 1] but for the brightest 0.5%.
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
    """What tells a head from a brain, of a coarse volume and the spacing on file in mm.

    Returns:
        ``filled``, share of the field above 0, in [0, 1]; ``ml``, the volume of that; ``shell``, mean of the outermost
        cells relative to that deeper than three cells (0 where there are none).
    """
    head = volume > 0
    depth = ndimage.distance_transform_edt(np.pad(head, 1))[1:-1, 1:-1, 1:-1]
    rim, inner = (depth > 0) & (depth <= 1.5), depth > 3
    shell = volume[rim].mean() / volume[inner].mean() if inner.any() else 0.0
    ml = head.sum() * float(np.prod(spacing)) * np.prod([max(1, round(_COARSE / float(s))) for s in spacing]) / 1000
    return {"filled": float(head.mean()), "ml": float(ml), "shell": float(shell)}


def grain(volume: torch.Tensor) -> dict[str, float]:
    """Noise and blur of a volume on file (X x Y x Z, 0 outside the brain), from a few slices in its middle.

    Returns:
        ``noise``, robust standard deviation of the second differences along both axes (Immerkaer 1996; white noise
        gives its own, edges and smooth tissue next to nothing) relative to the 99.5th percentile; ``blur``, how many
        times greater first differences are: 1 for white noise, at most 1000. Both are 0 where the slices are too small.
    """
    z = (volume > 0).any(dim=0).any(dim=0).nonzero().flatten()
    places = torch.linspace(0.2, 0.8, _GRAIN_SLICES) * (len(z) - 1)
    slices = volume[..., z[places.round().long().unique()]].permute(2, 0, 1).contiguous()[:, None]
    nothing = {"noise": 0.0, "blur": 0.0}
    if min(slices.shape[2:]) < 3:
        return nothing
    inside = -F.max_pool2d(-(slices > 0).float(), 3, stride=1) > 0
    if not inside.any():
        return nothing
    line = slices.new_tensor([1.0, -2.0, 1.0])
    second = F.conv2d(slices, line.outer(line)[None, None] / 6)[inside].abs().median()
    first = (slices[:, :, 1:-1, 1:-1] - slices[:, :, :-2, 1:-1])[inside].abs().median() / math.sqrt(2)
    values = slices[slices > 0]
    top = float(np.percentile(values[::4] if len(values) > 4000 else values, 99.5))
    blur = min(float(first / second.clamp(min=1e-12)), 1000.0)
    return {"noise": float(second) / 0.6745 / top, "blur": blur}


def side_slope(volume: np.ndarray, axis: int) -> float:
    """How much the brightness of a coarse volume changes along the ``axis`` from left to right.

    Returns:
        Slope of ln(intensity) for each standard deviation of the place along the axis, >= 0: a brain is much the same
        on both sides, but for a tumor. 0 where there is one place only.
    """
    brain = volume > 0
    place = np.argwhere(brain)[:, axis].astype(np.float64)
    if place.std() == 0:
        return 0.0
    values = volume[brain]
    relative = np.log(values / np.median(values)).clip(-1.5, 1.5)  # a rim of partial volume must not decide
    return abs(float(np.cov(place, relative, bias=True)[0, 1])) / float(place.std())


def mutual_information(one: np.ndarray, other: np.ndarray) -> float:
    """Normalized mutual information of two sets of N values, (H(a) + H(b)) / H(a, b), in [1, 2] (Studholme 1999)."""
    joint, _, _ = np.histogram2d(one, other, bins=_BINS)
    return (stats.entropy(joint.sum(0)) + stats.entropy(joint.sum(1))) / max(stats.entropy(joint.ravel()), 1e-6)


def alignment(one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """How two coarse volumes lie on each other.

    Returns:
        Dice overlap of the brains in [0, 1]; and by what share the best of 12 small movements raises normalized
        mutual information less 1: near 0 or below for volumes that lie well, 0 where fewer than 1000 cells overlap.
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
        c, s = math.cos(math.radians(_ANGLE)), sign * math.sin(math.radians(_ANGLE))
        turn[i, i], turn[i, j], turn[j, i], turn[j, j] = c, -s, s, c
        best = max(best, score(turn, np.zeros(3)), score(np.eye(3), sign * _SHIFT * np.eye(3)[axis]))
    return dice, best / max(own, 1e-6) - 1


def label_odds(features: Mapping[int, np.ndarray], statistics: Mapping[str, Any]) -> tuple[float, tuple[int, ...]]:
    """The likeliest names of contrasts by Fisher's linear discriminant (``weights`` of ``calibration.fit``).

    Args:
        features: of ``volume_features``, by the index of a contrast as it is named.
        statistics: has the ``weights``.

    Returns:
        Log odds (natural logarithm, >= 0) of the likeliest names against those given, 0 where they agree; the likeliest
        names, as indices.
    """
    weights = np.asarray(statistics["weights"])
    scores = np.stack(list(features.values())) @ weights[:, :-1].T + weights[:, -1]

    def total(labels: Sequence[int]) -> float:
        return float(sum(scores[row, label] for row, label in enumerate(labels)))

    best = max(itertools.permutations(range(len(CONTRASTS)), len(features)), key=total)
    return total(best) - total(list(features)), best


def grid_of(affine: torch.Tensor) -> tuple[list[float], int]:
    """Spacing in mm, and the axis that runs from left to right, of a 4 x 4 affine to RAS."""
    columns = torch.as_tensor(affine)[:3, :3]
    spacing = columns.norm(dim=0)
    return spacing.tolist(), int((columns[0] / spacing).abs().argmax())


def measure(image: torch.Tensor, spacing: Sequence[float], sides: int, available: Sequence[bool]) -> dict[str, Any]:
    """All measurements of a study on file, 4 x X x Y x Z; ``spacing`` and ``sides`` are of ``grid_of``.

    Returns:
        ``features``, ``shape``, ``quality`` (see ``QUALITY``) and ``top`` by the index of a contrast, ``pairs`` (of
        ``alignment``) by two.
    """
    coarse = coarse_volumes(image, spacing).numpy()
    given = [i for i, kept in enumerate(available) if kept]
    return {
        "features": {i: volume_features(coarse[i]) for i in given},
        "shape": {i: shape_features(coarse[i], spacing) for i in given},
        "quality": {i: {**grain(image[i]), "sides": side_slope(coarse[i], sides)} for i in given},
        "top": {i: float(image[i].max()) for i in given},
        "pairs": {(given[0], i): alignment(coarse[given[0]], coarse[i]) for i in given[1:]},
    }


def findings(
    measured: Mapping[str, Any], statistics: Mapping[str, Any], registered: bool = False
) -> tuple[list[dict[str, str]], dict[str, float]]:
    """What is suspicious of a study, and how near it is to that.

    Args:
        measured: of ``measure``.
        statistics: of ``calibration.fit``.
        registered: whether the contrasts were registered here, so that it helps nobody to advise it.

    Returns:
        ``code``, one of ``CHECKS``, and ``finding``, one sentence, of each finding; by code the worst measurement
        relative to its limit, where there is one: above 1 there is the finding.
    """
    found: list[dict[str, str]] = []
    doubts = dict.fromkeys(("not_skull_stripped", "noisy", "blurred", "uneven", "not_coregistered"), 0.0)

    def judge(code: str, doubt: float, sentence: str) -> None:
        doubts[code] = max(doubts.get(code, 0.0), doubt)
        if doubt > 1:
            found.append({"code": code, "finding": sentence})

    limits, given = statistics["limits"], list(measured["features"])
    for i in given:
        name, shape, quality = CONTRASTS[i], measured["shape"][i], measured["quality"][i]
        relative = {part: shape[part] / limits[part] for part in ("filled", "ml", "shell")}
        about = f"{shape['ml']:.0f} ml, rim {shape['shell']:.2f} times as bright as the inside"
        looks = "has no background of 0" if relative["filled"] > 1 else f"does not look skull-stripped ({about})"
        judge("not_skull_stripped", max(relative.values()), f"{name} {looks}: strip the skull.")
        if measured["top"][i] <= limits["top"]:
            sentence = f"{name} has no value above {measured['top'][i]:.3g}: give intensities as acquired."
            found.append({"code": "normalized", "finding": sentence})
        about = f"standard deviation {100 * quality['noise']:.1f}% of the brightest brain"
        sentence = f"{name} is noisy ({about}): denoise it, or leave it out to have it synthesized."
        judge("noisy", quality["noise"] / limits["noise"], sentence)
        sentence = f"{name} is blurred: give it as acquired, or leave it out to have it synthesized."
        judge("blurred", quality["blur"] / limits["blur"], sentence)
        about = f"one side is {100 * math.expm1(2 * quality['sides']):.0f}% brighter"
        sentence = f"{name} is uneven ({about}): correct the bias field, unless a tumor explains it."
        judge("uneven", quality["sides"] / limits["sides"], sentence)
        features = measured["features"][i][: len(_QUANTILES) + 1]
        low, high = (np.asarray(statistics[end])[:, : len(features)] for end in ("low", "high"))
        if (features < low.min(axis=0)).any() or (features > high.max(axis=0)).any():
            cause = "another scanner, a normalization or a wrong name"
            sentence = f"{name} has intensities as no study of the reference: look for {cause}."
            found.append({"code": "unusual_intensities", "finding": sentence})
    advice = "although it was registered: use another tool" if registered else "so give --register True"
    for (i, j), (dice, gain) in measured["pairs"].items():
        # a limit below 0 is of studies that every small movement makes worse
        moved = gain / limits["gain"] if limits["gain"] > 0 else 1 + gain - limits["gain"]
        # where every one makes it worse, a smaller overlap is of masks that differ, not of a movement
        doubt = max(moved, (gain >= 0) * (1 - dice) / (1 - limits["dice"]))
        about = f"overlap {dice:.2f}, {100 * gain:.0f}% better when moved"
        judge("not_coregistered", doubt, f"{CONTRASTS[j]} does not lie on {CONTRASTS[i]} ({about}), {advice}.")
    odds, best = label_odds(measured["features"], statistics)
    both = [(i, label) for i, label in zip(given, best, strict=True) if i != label]
    wrong = " and ".join(f"{CONTRASTS[i]} looks like {CONTRASTS[label]}" for i, label in both)
    judge("mislabelled", odds / limits["odds"], f"{wrong}: check which file is which.")
    return found, doubts


class CheckStudyd(MapTransform):
    """Add ``"checks"``, the ``findings`` of a study, ``"doubts"`` and ``"check_seconds"``; a study may be refused.

    Args:
        keys: key of the stacked contrasts on the grid on file.
        rejecting: codes of ``CHECKS`` that refuse a study.
        statistics: of ``calibration.fit``, or a JSON file of it; ``None`` is ``configs/input_statistics.json``.
        registered: of ``findings``.

    Raises:
        StudyError: for an unknown code; from the call, for a finding that refuses.
    """

    def __init__(
        self,
        keys: KeysCollection = "image",
        rejecting: Sequence[str] = (),
        statistics: Mapping[str, Any] | str | os.PathLike[str] | None = None,
        registered: bool = False,
    ) -> None:
        super().__init__(keys)
        refuse_unknown("rejecting_checks", rejecting, CHECKS)
        self.rejecting, self.registered = tuple(rejecting), registered
        self.statistics: Mapping[str, Any] = (
            statistics if isinstance(statistics, Mapping) else json.loads(Path(statistics or _STATISTICS).read_text())
        )

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        started = time.perf_counter()
        for key in self.key_iterator(d):
            measured = measure(d[key].as_tensor(), *grid_of(d[key].affine), d["has_contrast"].tolist())
            d["checks"], d["doubts"] = findings(measured, self.statistics, self.registered)
        d["check_seconds"] = time.perf_counter() - started
        for found in d["checks"]:
            if found["code"] in self.rejecting:
                raise StudyError(f"Study {d.get('study')}: {found['finding']}")
        return d
