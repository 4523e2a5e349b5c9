# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""A procedural cohort of skull-stripped brains with a tumor, in the layout of BraTS.

It is a demonstration and a test bed: it lets every config run without a registration or a download. Nothing in it was
fitted to patients, so it is never a source of quality claims; numbers measured on it say that the code works, not how
well it would work.

How a subject is made:

1. Geometry lives on one fixed lattice of 2 mm in head coordinates (u to the left, v to the front, w upward, in mm), so
   that the random numbers do not depend on the number of voxels: a coarse ``shape`` shows the same subject coarsely.
   Only smooth functions (signed distances, band-limited noise) are kept there. Cubic B-splines carry them to the
   voxels, where sharp boundaries are cut from them as partial volumes.
2. Sulci are the zero level of band-limited noise that hardly changes along the radius, which makes sheets that are
   perpendicular to the surface; cortex is what lies within about 3 mm of the surface or of such a sheet.
3. Intensities come from proton density, T1, T2 and the concentration of gadolinium through the signal equations of spin
   echo (T1, T1ce, T2) and inversion recovery (FLAIR), then a bias field and Rician noise.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import fft, ndimage
from tqdm import tqdm

from ..contrasts import CONTRAST_KEYS, MASK_KEY, StudyError

FloatArray = NDArray[np.float32]
Fields = dict[str, FloatArray]

#: Number of voxels of a BraTS volume, which at 1 mm is also the field of view in mm.
FULL_SHAPE = (240, 240, 155)
#: Labels of BraTS.
LABEL_NCR, LABEL_ED, LABEL_ET = 1, 2, 4
#: Written to every header: a cohort of another version of this module is not taken for a finished one.
VERSION = 1

#: Spacing of the geometry lattice in mm and the lattice itself in head coordinates; it holds the largest brain.
_STEP = 2.0
_AXES = tuple(np.arange(low, high + _STEP, _STEP, dtype=np.float32) for low, high in ((-80, 80), (-98, 94), (-90, 78)))
#: Voxel position (mm from the center of the first full-size voxel) of the head's origin, and direction of its axes.
_ORIGIN = (119.5, 117.0, 83.0)
_SIGNS = (1.0, -1.0, 1.0)


class Tissue(NamedTuple):
    """Proton density (relative to water), T1 and T2 in ms at 3 T."""

    pd: float
    t1: float
    t2: float


#: Typical values at 3 T; every subject varies them by some percent.
TISSUES: Mapping[str, Tissue] = {
    "wm": Tissue(0.70, 840.0, 70.0),
    "gm": Tissue(0.82, 1450.0, 96.0),
    "dg": Tissue(0.79, 1180.0, 78.0),  # deep gray matter: iron shortens T2
    "csf": Tissue(1.00, 4200.0, 1200.0),
    "ed": Tissue(0.86, 1620.0, 150.0),
    "et": Tissue(0.85, 1500.0, 115.0),
    "ncr": Tissue(0.95, 2700.0, 240.0),
    "net": Tissue(0.86, 1700.0, 150.0),
    "choroid": Tissue(0.86, 1500.0, 130.0),
    "vessel": Tissue(0.60, 1650.0, 35.0),  # low PD and T2 stand in for the flow void
}
#: Tissues whose parameters are mixed within a voxel; CSF and blood are mixed as signals (their T1 and T2 are too far).
_SOLID = ("wm", "gm", "dg", "ed", "et", "ncr", "net", "choroid")


def spin_echo(pd: ArrayLike, t1: ArrayLike, t2: ArrayLike, tr: float, te: float) -> NDArray:
    """Signal of a spin echo, ``PD (1 - exp(-TR / T1)) exp(-TE / T2)``.

    Args:
        pd: proton density, any shape.
        t1: T1 in ms, broadcastable to ``pd``.
        t2: T2 in ms, broadcastable to ``pd``.
        tr: repetition time in ms.
        te: echo time in ms.

    Returns:
        Signal in the units of ``pd``.
    """
    return np.asarray(pd) * (1 - np.exp(-tr / np.asarray(t1))) * np.exp(-te / np.asarray(t2))


def inversion_recovery(pd: ArrayLike, t1: ArrayLike, t2: ArrayLike, tr: float, te: float, ti: float) -> NDArray:
    """Magnitude signal of an inversion recovery, ``PD |1 - 2 exp(-TI / T1) + exp(-TR / T1)| exp(-TE / T2)``.

    Args:
        pd: proton density, any shape.
        t1: T1 in ms, broadcastable to ``pd``.
        t2: T2 in ms, broadcastable to ``pd``.
        tr: repetition time in ms.
        te: echo time in ms.
        ti: inversion time in ms.

    Returns:
        Signal in the units of ``pd``.
    """
    t1 = np.asarray(t1)
    return np.asarray(pd) * np.abs(1 - 2 * np.exp(-ti / t1) + np.exp(-tr / t1)) * np.exp(-te / np.asarray(t2))


# ---------------------------------------------------------------------------------------------------- interpolation


def _spline_taps(start: float, step: float, count: int, points: FloatArray) -> tuple[NDArray[np.intp], FloatArray]:
    """Indices and weights (each 4 x points) of the uniform cubic B-spline on ``start + step * arange(count)``."""
    position = (points.astype(np.float64) - start) / step
    base = np.floor(position)
    t = position - base
    weights = np.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3]) / 6
    index = np.clip(base[None] + np.arange(-1, 3)[:, None], 0, count - 1)
    return index.astype(np.intp), weights.astype(np.float32)


def _interpolate(field: FloatArray, taps: Sequence[tuple[NDArray[np.intp], FloatArray]]) -> FloatArray:
    """Evaluates B-spline coefficients on a regular grid, one axis after the other.

    Elementwise sums instead of matrix products: the result does not depend on the number of BLAS threads.
    """
    for axis, (index, weights) in enumerate(taps):
        shape = [1] * field.ndim
        shape[axis] = -1
        total = np.take(field, index[0], axis) * weights[0].reshape(shape)
        for tap in range(1, 4):
            total += np.take(field, index[tap], axis) * weights[tap].reshape(shape)
        field = total
    return field


@dataclass(frozen=True)
class _Voxels:
    """The voxels of one shape that lie in the reach of the lattice, and among them the brain."""

    shape: tuple[int, int, int]
    box: tuple[slice, slice, slice]
    taps: tuple[tuple[NDArray[np.intp], FloatArray], ...]
    width: float  # mm over which a boundary is blurred by the extent of a voxel

    def sample(self, field: FloatArray, mask: NDArray[np.bool_] | None = None) -> FloatArray:
        """Values of a lattice field: the box, or with ``mask`` (box-shaped) the flat array of its voxels."""
        values = _interpolate(field, self.taps)
        return values if mask is None else values[mask]


def _spacing(shape: Sequence[int]) -> tuple[float, float, float]:
    """Voxel size in mm, such that the field of view is that of BraTS."""
    return tuple(full / n for full, n in zip(FULL_SHAPE, shape, strict=True))


def _make_voxels(shape: tuple[int, int, int]) -> _Voxels:
    box, taps = [], []
    for n, step, origin, sign, axis in zip(shape, _spacing(shape), _ORIGIN, _SIGNS, _AXES, strict=True):
        head = sign * ((np.arange(n) + 0.5) * step - 0.5 - origin)
        inside = np.flatnonzero((head >= axis[0]) & (head <= axis[-1]))
        box.append(slice(int(inside[0]), int(inside[-1]) + 1))
        taps.append(_spline_taps(float(axis[0]), _STEP, len(axis), head[inside].astype(np.float32)))
    return _Voxels(shape, tuple(box), tuple(taps), 1.1 * float(np.mean(_spacing(shape))))


# ------------------------------------------------------------------------------------------------------------ noise


def _smooth_noise(rng: np.random.Generator, scale: float, parity: int = 0, asymmetry: float = 1.0) -> FloatArray:
    """Smooth noise of unit variance on the lattice.

    Args:
        rng: source of the coefficients.
        scale: distance of the B-spline knots in mm; the correlation length is about twice as long.
        parity: 1 for a field that is the same in both hemispheres, -1 for one of opposite sign (lateral shifts).
        asymmetry: share (0 to 1, in standard deviations) that does not respect the parity.

    Returns:
        float32 array of the shape of the lattice.
    """
    halves = [int(np.ceil(np.abs(axis).max() / scale)) + 2 for axis in _AXES]
    coefficients = rng.standard_normal([2 * h + 1 for h in halves], dtype=np.float32)
    if parity:
        even = (coefficients + parity * coefficients[::-1]) / np.sqrt(2)
        coefficients = np.sqrt(1 - asymmetry**2) * even + asymmetry * coefficients
    taps = [_spline_taps(-h * scale, scale, 2 * h + 1, axis) for h, axis in zip(halves, _AXES, strict=True)]
    # the sum of squares of the B-spline weights is 151 / 315 per axis on average
    return _interpolate(coefficients.astype(np.float32), taps) * np.float32((315 / 151) ** 1.5)


def _band_noise(rng: np.random.Generator, wavelength: float, size: int = 64, step: float = 4.0) -> FloatArray:
    """Periodic noise of unit variance, ``size``^3 at ``step`` mm, with energy only around one wavelength (mm)."""
    spectrum = fft.rfftn(rng.standard_normal((size,) * 3, dtype=np.float32))
    full, half = fft.fftfreq(size, step), fft.rfftfreq(size, step)
    k = np.sqrt(full[:, None, None] ** 2 + full[None, :, None] ** 2 + half[None, None, :] ** 2)
    noise = fft.irfftn(spectrum * np.exp(-0.5 * ((k * wavelength - 1) / 0.16) ** 2), s=(size,) * 3)
    return (noise / noise.std()).astype(np.float32)


def _fold(
    rng: np.random.Generator, points: Sequence[FloatArray], near: NDArray[np.bool_], wavelength: float, step: float
) -> FloatArray:
    """Signed distance in mm to folding sheets on the lattice; at most a quarter of the wavelength.

    Both hemispheres share most of the pattern. ``arctan2`` makes the distance exact for plane waves and keeps it
    bounded where the gradient vanishes.

    Args:
        rng: source of the noise.
        points: where the noise is looked up, three lattice arrays in mm.
        near: lattice points that matter; elsewhere the look-up is saved.
        wavelength: twice the distance between two sheets, in mm.
        step: spacing of the noise in mm, at most a quarter of the wavelength.

    Returns:
        float32 array of the shape of the lattice.
    """
    noises = [ndimage.spline_filter(_band_noise(rng, wavelength, step=step), order=3, mode="grid-wrap") for _ in "sa"]
    x, y, z = (p[near] / step for p in points)
    mirrored, lateral = (
        ndimage.map_coordinates(coefficients, [side, y, z], order=3, mode="grid-wrap", prefilter=False)
        for coefficients, side in zip(noises, (np.abs(x), x), strict=True)
    )
    noise = np.zeros(near.shape, np.float32)
    noise[near] = 0.8 * mirrored + 0.6 * lateral
    slope = np.sqrt(sum(g**2 for g in np.gradient(noise, _STEP)))
    k = 2 * np.pi / wavelength
    return (np.arctan2(k * noise, slope) / k).astype(np.float32)


# ------------------------------------------------------------------------------------------------- shapes (lattice)


def _ellipsoid(
    points: Sequence[FloatArray], center: Sequence[float], axes: Sequence[ArrayLike], power: float = 2.0
) -> FloatArray:
    """First-order signed distance in mm (positive inside, at most 60) to a superellipsoid."""
    scaled = [np.abs((p - c) / a) for p, c, a in zip(points, center, axes, strict=True)]
    radius = np.maximum(sum(s**power for s in scaled), 1e-6) ** (1 / power)
    slope = np.sqrt(sum((s ** (power - 1) / a) ** 2 for s, a in zip(scaled, axes, strict=True)))
    slope = slope * radius ** (1 - power)
    return np.minimum((1 - radius) / np.maximum(slope, 1e-4), 60).astype(np.float32)


def _capsule(
    points: Sequence[FloatArray], start: Sequence[float], end: Sequence[float], r0: float, r1: float
) -> FloatArray:
    """Signed distance in mm (positive inside) to a tube whose radius goes from ``r0`` to ``r1``."""
    direction = np.subtract(end, start).astype(np.float32)
    offset = [p - np.float32(s) for p, s in zip(points, start, strict=True)]
    t = sum(o * d for o, d in zip(offset, direction, strict=True)) / float(direction @ direction)
    t = np.clip(t, 0, 1)
    distance = np.sqrt(sum((o - t * d) ** 2 for o, d in zip(offset, direction, strict=True)))
    return (r0 + t * (r1 - r0) - distance).astype(np.float32)


def _smooth_max(a: FloatArray, b: FloatArray, width: float) -> FloatArray:
    """Maximum of two signed distances with a fillet of some ``width`` mm where they meet."""
    return (0.5 * (a + b + np.sqrt((a - b) ** 2 + width**2))).astype(np.float32)


def _sheet(distance: FloatArray, excess: FloatArray) -> FloatArray:
    """Distance to a sheet that ends where ``excess`` (mm beyond its edge) becomes positive."""
    return np.hypot(distance, np.maximum(excess, 0))


def _head_points(rng: np.random.Generator) -> list[FloatArray]:
    """Anatomical coordinates (three arrays in mm) of the lattice: size, pose and smooth deformation of this subject."""
    grid = np.meshgrid(*_AXES, indexing="ij", copy=False)
    tilt = np.deg2rad(rng.normal(0, [2.0, 1.5, 2.5]))
    size = np.clip(rng.normal(1.0, 0.025) * rng.normal([0.99, 1.01, 1.0], 0.015), 0.93, 1.05)
    (ca, cb, cg), (sa, sb, sg) = np.cos(tilt), np.sin(tilt)
    rotation = np.array([[cg, -sg, 0], [sg, cg, 0], [0, 0, 1]]) @ np.array([[cb, 0, sb], [0, 1, 0], [-sb, 0, cb]])
    rotation = (rotation @ np.array([[1, 0, 0], [0, ca, -sa], [0, sa, ca]])) / size[:, None]
    points = [sum(np.float32(rotation[i, j]) * grid[j] for j in range(3)) for i in range(3)]
    for i, parity in enumerate((-1, 1, 1)):
        points[i] = points[i] + 1.8 * _smooth_noise(rng, 36, parity, 0.4) + 0.7 * _smooth_noise(rng, 14, parity, 0.7)
    return points


def _envelope(points: Sequence[FloatArray]) -> Fields:
    """Depths in mm below the surface of the brain (``depth``) and of its parts, negative outside; lattice shape."""
    x, y, z = points
    # flat base, narrow front
    axes = (66 - 0.05 * y - 0.0006 * np.maximum(y - 20, 0) ** 2, 83.0, np.where(z > 0, 64.0, 38.0 + 0.06 * np.abs(x)))
    cerebrum = _ellipsoid(points, (0, -2, 0), axes, 2.25)
    mirrored = (np.abs(x), y, z)
    temporal = _ellipsoid(mirrored, (43, 6, -26), (21, 38, 21), 2.2)
    cerebrum = _smooth_max(cerebrum, temporal, 6)
    cerebellum = _ellipsoid(mirrored, (20, -52, -43), (28, 28, 20))
    pons = _ellipsoid(points, (0, -18, -38), (16, 13, 14))
    stem = np.maximum(_capsule(points, (0, -17, -12), (0, -34, -82), 13.5, 9.0), pons)
    depth = _smooth_max(_smooth_max(cerebrum, cerebellum, 2), stem, 3)
    return {"depth": depth, "cerebrum": cerebrum, "cerebellum": cerebellum, "stem": stem}


def _ventricles(points: Sequence[FloatArray], size: float) -> FloatArray:
    """Signed distance in mm (positive inside) to the four ventricles; ``size`` scales their caliber."""
    x, y, z = points
    mirrored = (np.abs(x), y, z)
    horns = (
        ((8.5, 34, 1), (10, 18, 9), 3.2, 5.2),  # frontal horn
        ((10, 18, 9), (14, -12, 16), 5.2, 5.0),  # body
        ((14, -12, 16), (25, -38, 6), 5.0, 6.8),  # atrium
        ((25, -38, 6), (22, -60, 1), 5.6, 2.0),  # occipital horn
        ((25, -38, 6), (34, -14, -20), 4.6, 2.2),  # temporal horn
    )
    lateral = np.maximum.reduce([_capsule(mirrored, a, b, size * r0, size * r1) for a, b, r0, r1 in horns])
    # the septum keeps the two sides apart
    lateral = np.minimum(lateral, np.abs(x) - 1.2)
    third = _ellipsoid(points, (0, -8, -4), (1.2 + 1.3 * size, 15, 10))
    fourth = _ellipsoid(points, (0, -39, -40), (5 * size + 2, 5, 9))
    return np.maximum(np.maximum(lateral, third), fourth).astype(np.float32)


def _nuclei(points: Sequence[FloatArray]) -> FloatArray:
    """Signed distance in mm (positive inside) to putamen with pallidum, thalamus and caudate of both sides."""
    x, y, z = points
    side = np.abs(x)
    turned = (side * 0.966 + (y - 2) * 0.259, (y - 2) * 0.966 - side * 0.259, z)
    lentiform = _ellipsoid(turned, (24.5, -6, 1), (6.5, 16, 10))
    thalamus = _ellipsoid((side * 0.94 + y * 0.34, y * 0.94 - side * 0.34, z), (5.5, -19, 4), (8, 14, 9))
    caudate = _ellipsoid((side, y, z), (16.5, 22, 6), (5, 10, 10))
    tail = _capsule((side, y, z), (18, 14, 14), (22, -14, 20), 3.6, 2.0)
    return np.maximum.reduce([lentiform, thalamus, caudate, tail])


def _fissures(points: Sequence[FloatArray], parts: Fields) -> FloatArray:
    """Distance in mm to the large fissures: interhemispheric, Sylvian with insula, tentorium, ambient cistern."""
    x, y, z = points
    side = np.abs(x)
    below = (-10 - 60 / (1 + np.exp(-np.clip((y - 40) / 4, -30, 30)))) - z
    callosum = _ellipsoid((np.zeros_like(x), y, z), (0, -6, 3), (1, 46, 25))
    # behind the callosum the sheet must stay above the tentorium, in front it reaches the base
    interhemispheric = _sheet(x, np.maximum(callosum, below))
    axis = z + 6 - 0.38 * (10 - y)
    ends = np.maximum(y - 26, -34 - y)
    sylvian = _sheet(axis, np.maximum(40 - side, ends))
    insula = _sheet(side - 41, np.maximum(np.abs(axis - 3) - 12, np.abs(y - 2) - 20))
    tentorium = _sheet((parts["cerebrum"] - parts["cerebellum"]) / 2, parts["stem"])
    ambient = _sheet(parts["stem"], np.maximum(z + 14, -30 - z))
    return np.minimum.reduce([interhemispheric, sylvian + 0.4, insula, tentorium, ambient + 0.3]).astype(np.float32)


def _anatomy(rng: np.random.Generator, parts: Fields, points: Sequence[FloatArray]) -> Fields:
    """All lattice fields of the healthy brain.

    Args:
        rng: source of the folding and of the subject's age-like traits.
        parts: from :func:`_envelope`.
        points: anatomical coordinates after the mass effect.

    Returns:
        Lattice arrays in mm unless said otherwise.
    """
    atrophy = float(rng.uniform(0.0, 1.0))
    x, y, z = points
    # fold along the radius: the noise is looked up close to the surface point above each point
    surface = np.clip(1 - parts["cerebrum"] / np.maximum(np.sqrt(x**2 + y**2 + z**2), 8), 0.3, 1.2)
    stretch = 0.22 + 0.78 / surface
    lifted = [(p * stretch).astype(np.float32) for p in points]
    near = parts["depth"] > -8
    folia = np.sqrt((0.8 * x) ** 2 + (y + 30) ** 2 + (z + 36) ** 2) + 1.5 * _smooth_noise(rng, 9)
    roughness = 0.5 * _smooth_noise(rng, 3) + 0.4 * _smooth_noise(rng, 7)
    fields = {
        **parts,
        "depth": parts["depth"] + roughness.astype(np.float32),
        "fold": _fold(rng, lifted, near, 22.0, 4.0),
        "fold_depth": 18 + 6.0 * _smooth_noise(rng, 8, 1, 0.5),
        "branch": _fold(rng, lifted, near, 16.0, 3.0),
        "branch_depth": 6.0 + 4.0 * _smooth_noise(rng, 7),
        "fissure": _fissures(points, parts),
        "ventricle": _ventricles(points, 0.75 + 0.55 * atrophy + float(rng.uniform(0, 0.15))),
        "nuclei": _nuclei(points),
        "folia": folia,
        "gap": np.full_like(x, 0.42 + 0.35 * atrophy) * np.exp(0.22 * _smooth_noise(rng, 12)),
        "thickness": 2.4 + 0.25 * _smooth_noise(rng, 10),
        "vessel": _smooth_noise(rng, 7),
        "choroid": _capsule((np.abs(x), y, z), (17, -18, 14.5), (25, -38, 4), 1.3, 3.2) + 0.7 * _smooth_noise(rng, 3),
    }
    return {name: field.astype(np.float32) for name, field in fields.items()}


# ------------------------------------------------------------------------------------------------------------ tumor


@dataclass(frozen=True)
class _Tumor:
    """Traits of one tumor; lengths in mm."""

    radius: float
    enhancing: bool
    rim: float
    nonenhancing: float
    edema: float
    mass: float
    stretch: tuple[float, float, float]


def _draw_tumor(rng: np.random.Generator) -> _Tumor:
    enhancing = bool(rng.random() >= 1 / 6)
    radius = float(np.clip(np.exp(rng.normal(np.log(16.0), 0.33)), 7.5, 27))
    return _Tumor(
        radius=radius,
        enhancing=enhancing,
        rim=float(rng.uniform(2.0, 3.5) + 0.06 * radius),
        nonenhancing=float(rng.uniform(0.5, 1.8)),
        edema=float(rng.uniform(8, 26) if enhancing else rng.uniform(3, 10)),
        mass=float(rng.uniform(0.1, 0.4)),
        stretch=tuple(float(v) for v in rng.uniform(0.8, 1.2, 3)),
    )


def _place_tumor(
    rng: np.random.Generator, tumor: _Tumor, parts: Fields, points: Sequence[FloatArray]
) -> tuple[float, float, float]:
    """Head coordinates in mm of a place in one of the hemispheres, below the cortex and beside the ventricles."""
    clear = _ventricles(points, 1.0) < -(3 + 0.35 * tumor.radius)
    depth = parts["cerebrum"]
    x, y, z = points
    allowed = clear & (depth > 8 + 0.55 * tumor.radius) & (depth < 38) & (np.abs(x) > 12) & (z > -12)
    allowed &= np.abs(y) < 66
    if not allowed.any():  # a very large tumor in a small brain
        allowed = clear & (depth > 14) & (np.abs(x) > 12)
    index = np.argwhere(allowed)[int(rng.integers(int(allowed.sum())))]
    return tuple(float(axis[i]) for axis, i in zip(_AXES, index, strict=True))


def _offsets(center: Sequence[float]) -> list[FloatArray]:
    return list(np.meshgrid(*[axis - np.float32(c) for axis, c in zip(_AXES, center, strict=True)], indexing="ij"))


def _mass_effect(
    tumor: _Tumor, center: Sequence[float], parts: Fields, points: Sequence[FloatArray]
) -> list[FloatArray]:
    """Anatomical coordinates after the tumor has pushed the tissue away; the surface of the brain stays in place."""
    offsets = _offsets(center)
    ratio = np.sqrt(sum(o**2 for o in offsets)) / tumor.radius
    pull = tumor.mass * np.exp(-0.5 * (ratio / 1.4) ** 2) * np.clip(parts["depth"] / 18, 0, 1)
    return [(p - pull * o).astype(np.float32) for p, o in zip(points, offsets, strict=True)]


def _travel_time(slowness: FloatArray, start: NDArray[np.bool_], sweeps: int) -> FloatArray:
    """Shortest travel time from ``start`` through a medium (Bellman-Ford over the 26 neighbors of a lattice point).

    Args:
        slowness: time per mm, lattice box.
        start: where the time is 0.
        sweeps: number of relaxations, each of which reaches one lattice point farther.

    Returns:
        Time, infinite where it has not arrived.
    """
    time = np.where(start, np.float32(0), np.float32(np.inf))
    for _ in range(sweeps):
        padded = np.pad(time, 1, constant_values=np.inf)
        for shift in np.ndindex(3, 3, 3):
            if shift == (1, 1, 1):
                continue
            length = np.float32(_STEP * np.sqrt(sum((s - 1) ** 2 for s in shift)))
            view = padded[tuple(slice(s, s + n) for s, n in zip(shift, time.shape, strict=True))]
            np.minimum(time, view + length * slowness, out=time)
    return time


def _tumor_fields(rng: np.random.Generator, tumor: _Tumor, center: Sequence[float], fields: Fields) -> Fields:
    """Lattice fields of the tumor: ``core`` and ``edema`` (positive inside, mm), ``rim`` (mm), ``lobule`` (noise)."""
    offsets = _offsets(center)
    distance = np.sqrt(sum((o / s) ** 2 for o, s in zip(offsets, tumor.stretch, strict=True)))
    ripple = 0.15 * _smooth_noise(rng, 0.55 * tumor.radius) + 0.05 * _smooth_noise(rng, 4)
    core = tumor.radius * (1 + np.clip(ripple, -0.45, 0.45)) - distance
    healthy = _healthy(fields, _STEP)
    slowness = healthy["wm"] + 3.2 * healthy["gm"] + 3.0 * healthy["dg"] + 25.0 * healthy["csf"]
    slowness = slowness * np.exp(0.45 * _smooth_noise(rng, 9)) + np.where(fields["depth"] > 0, 0, 50)
    reach = 1.35 * max(tumor.stretch) * tumor.radius + tumor.edema + 8
    box = tuple(
        slice(int(np.searchsorted(axis, c - reach)), int(np.searchsorted(axis, c + reach)))
        for axis, c in zip(_AXES, center, strict=True)
    )
    inside = core > 0
    inside[tuple(int(np.argmin(np.abs(axis - c))) for axis, c in zip(_AXES, center, strict=True))] = True
    # an integer number of sweeps that lets the front pass around obstacles
    time = _travel_time(slowness[box].astype(np.float32), inside[box], int(tumor.edema / _STEP * 1.6) + 4)
    edema = np.full_like(core, -20.0)
    edema[box] = np.maximum(tumor.edema - time, -20.0)
    rim = tumor.rim * np.exp(0.35 * _smooth_noise(rng, 6) + 0.2 * _smooth_noise(rng, 3))
    found = {
        "core": core,
        "edema": edema,
        "rim": np.maximum(rim, 1.2),
        "lobule": _smooth_noise(rng, 0.6 * tumor.radius) + 0.3 * _smooth_noise(rng, 4),
        "uptake": _smooth_noise(rng, 5) + 0.6 * _smooth_noise(rng, 2.5),
    }
    return {name: field.astype(np.float32) for name, field in found.items()}


# --------------------------------------------------------------------------------------------------- partial volumes


def _ramp(distance: FloatArray, width: float) -> FloatArray:
    """Share of a voxel of some ``width`` (mm) that lies inside a plane boundary at a signed ``distance``."""
    return np.clip(distance * np.float32(1 / width) + np.float32(0.5), 0, 1)


def _healthy(fields: Fields, width: float) -> Fields:
    """Partial volumes of CSF, gray, white and deep gray matter, blood vessels and choroid plexus.

    Args:
        fields: samples of the fields of :func:`_anatomy`, all of one shape.
        width: extent of a voxel in mm.

    Returns:
        Arrays of the same shape for ``csf, gm, wm, dg, vessel, choroid``; their sum is 1.
    """
    depth, gap = fields["depth"], fields["gap"]
    fold = np.abs(fields["fold"])
    sheet = np.minimum(
        _sheet(fold, depth - np.minimum(fields["fold_depth"], 26)),
        _sheet(np.abs(fields["branch"]), depth - np.minimum(fields["branch_depth"], 11)) + 0.15,
    )
    # the spline rounds the crease of the fissures' distance off by about 0.6 mm
    sheet = np.minimum(sheet, np.maximum(fields["fissure"] - 0.85, 0))
    # sulci are open at the surface and almost closed in the depth
    gap = gap * (0.55 + 1.5 * np.exp(-np.maximum(depth, 0) / 4.5))
    csf = np.maximum(_ramp(gap - sheet, width) - _ramp(-gap - sheet, width), _ramp(0.7 - depth, width))
    white = _ramp(np.minimum(depth - 0.7, sheet - gap) - fields["thickness"], width)

    # cerebellum: thin concentric folia around a white core
    phase = fields["folia"] * np.float32(1 / 6.2)
    leaf = _sheet(np.abs(phase - np.floor(phase) - 0.5) * 6.2, fields["cerebellum"] - 12)
    leaf = np.minimum(leaf, np.maximum(fields["cerebellum"] - 1, 0))
    cerebellum = _ramp(fields["cerebellum"] - np.maximum(fields["cerebrum"], 0), 2 * width)
    folia_csf = np.maximum(0.55 * _ramp(0.45 - leaf, width), _ramp(0.7 - depth, width))
    csf_cerebellum = np.where(fields["fissure"] < 1.6, np.maximum(folia_csf, csf), folia_csf)
    csf = csf + cerebellum * (csf_cerebellum - csf)
    white = white + cerebellum * (_ramp(leaf - 2.0, width) - white)
    stem = _ramp(fields["stem"], width)
    csf = np.where(fields["fissure"] < 1.6, csf, csf * (1 - stem)) + stem * _ramp(0.7 - depth, width)
    white = white + stem * (0.8 - white)

    nuclei = _ramp(fields["nuclei"], width)
    csf = csf * (1 - nuclei)
    chamber = _ramp(fields["ventricle"], width)
    # ependyma and the depth of the brain are white: no cortex lines the ventricles
    lining = _ramp(fields["ventricle"] + 4, 4 * width) * (depth > 14)
    white = np.maximum(white, lining)
    choroid = chamber * _ramp(fields["choroid"], width) * 0.8
    csf = np.clip(np.maximum(csf, chamber) - choroid, 0, 1)
    # veins run along the sulci: a curve where the sheet meets the zero level of another noise
    vein = _ramp(0.75 - np.hypot(sheet, 9.0 * fields["vessel"]), width) * (depth < 12) * (1 - chamber)
    vessel = np.minimum(0.8 * vein, csf)
    csf = csf - vessel
    rest = np.clip(1 - csf - choroid - vessel, 0, 1)
    dg = np.minimum(nuclei, rest)
    rest = rest - dg
    wm = rest * white
    return {"csf": csf, "gm": rest - wm, "wm": wm, "dg": dg, "vessel": vessel, "choroid": choroid}


def _with_tumor(tissues: Fields, fields: Fields, tumor: _Tumor, width: float) -> tuple[Fields, NDArray[np.uint8]]:
    """Adds the tumor to the partial volumes.

    Args:
        tissues: from :func:`_healthy`.
        fields: samples of all lattice fields, of the same shape.
        tumor: its traits.
        width: extent of a voxel in mm.

    Returns:
        Partial volumes with ``ed, et, ncr, net`` added (their sum is still 1), and the label map of BraTS.
    """
    core = _ramp(fields["core"], width)
    # never in a ventricle and never outside; sulci within the core are effaced
    room = (1 - _ramp(fields["ventricle"] + 1, width)) * _ramp(fields["depth"] - 1, width)
    core = core * room
    if tumor.enhancing:
        necrotic = _ramp(fields["core"] - fields["rim"], width)
        lobule = np.clip(2.5 * (fields["lobule"] - tumor.nonenhancing), 0, 1)
        shares = {"ncr": necrotic, "net": (1 - necrotic) * lobule, "et": (1 - necrotic) * (1 - lobule)}
    else:
        shares = {"ncr": 0 * core, "net": 1 + 0 * core, "et": 0 * core}
    swollen = _ramp(fields["edema"], width) * (1 - core)
    mixed = {name: fraction * (1 - core) for name, fraction in tissues.items()}
    # the water content rises toward the tumor; cortex takes up less of it
    strength = swollen * (0.55 + 0.45 * np.clip(fields["edema"] / 9, 0, 1))
    taken = {"wm": strength, "gm": 0.55 * strength, "dg": 0.6 * strength}
    mixed["ed"] = sum(mixed[name] * share for name, share in taken.items())
    for name, share in taken.items():
        mixed[name] = mixed[name] * (1 - share)
    mixed.update({name: core * share for name, share in shares.items()})

    labels = np.zeros(core.shape, np.uint8)
    labels[(swollen > 0.5) & (tissues["csf"] + tissues["vessel"] + tissues["choroid"] < 0.4)] = LABEL_ED
    inside = core > 0.5
    labels[inside] = LABEL_NCR
    labels[inside & (shares["et"] > 0.5)] = LABEL_ET
    labels[room < 0.5] = 0
    return mixed, labels


# ------------------------------------------------------------------------------------------------------ intensities


@dataclass(frozen=True)
class _Scanner:
    """Protocol of one examination: times in ms, relaxivity in 1 / (mM s), uptake in mM."""

    t1: tuple[float, float]
    t1ce: tuple[float, float]
    t2: tuple[float, float]
    flair: tuple[float, float, float]
    relaxivity: float
    uptake: float
    gain: dict[str, float]
    noise: dict[str, float]
    bias: dict[str, float]


def _draw_scanner(rng: np.random.Generator) -> _Scanner:
    tr, te = rng.uniform(420, 640), rng.uniform(8, 13)
    flair_tr, csf_t1 = rng.uniform(8000, 10000), TISSUES["csf"].t1
    null = csf_t1 * (np.log(2) - np.log1p(np.exp(-flair_tr / csf_t1)))  # inversion time at which CSF gives no signal
    return _Scanner(
        t1=(float(tr), float(te)),
        t1ce=(float(tr * rng.uniform(0.92, 1.1)), float(te * rng.uniform(0.95, 1.1))),
        t2=(float(rng.uniform(3500, 6000)), float(rng.uniform(82, 110))),
        flair=(float(flair_tr), float(rng.uniform(85, 125)), float(null * rng.uniform(0.95, 1.03))),
        relaxivity=float(rng.uniform(3.6, 4.6)),
        uptake=float(rng.uniform(0.2, 0.5)),
        gain={key: float(1600 * np.exp(rng.normal(0, 0.3))) for key in CONTRAST_KEYS},
        noise={key: float(rng.uniform(0.010, 0.028)) for key in CONTRAST_KEYS},
        bias={key: float(rng.uniform(0.03, 0.09)) for key in CONTRAST_KEYS},
    )


def _draw_tissues(rng: np.random.Generator) -> dict[str, Tissue]:
    """Tissue parameters of one subject."""
    return {
        name: Tissue(*(float(v * np.exp(rng.normal(0, s))) for v, s in zip(t, (0.012, 0.035, 0.035), strict=True)))
        for name, t in TISSUES.items()
    }


def _signals(
    tissues: Fields, textures: Sequence[FloatArray], uptake: FloatArray, table: Mapping[str, Tissue], scanner: _Scanner
) -> Fields:
    """Noise-free signals of the four contrasts.

    Args:
        tissues: partial volumes, flat arrays of the brain's voxels.
        textures: relative deviations of PD, T1 and T2, flat.
        uptake: noise of unit variance that modulates the concentration of gadolinium, flat.
        table: tissue parameters of the subject.
        scanner: protocol.

    Returns:
        Flat arrays by contrast key, relative to the gain of the scanner.
    """
    solid = sum(tissues[name] for name in _SOLID) + np.float32(1e-6)
    pd, t1, t2 = (
        # where nothing is solid the value has no weight, but must not be 0
        (sum(tissues[name] * np.float32(table[name][i]) for name in _SOLID) + np.float32(1e-6))
        / solid
        * (1 + textures[i])
        for i in range(3)
    )
    gadolinium = scanner.uptake * tissues["et"] * np.clip(1 + 0.35 * uptake, 0.25, 2.2)
    gadolinium = gadolinium + 0.5 * tissues["choroid"] + 0.04 * tissues["net"] * np.clip(uptake, 0, 2)
    # the blood volume of normal tissue
    gadolinium = (gadolinium + 0.035 * tissues["gm"] + 0.035 * tissues["dg"] + 0.018 * tissues["wm"]) / solid
    rate = np.float32(scanner.relaxivity / 1000)
    t1_post = 1 / (1 / t1 + rate * gadolinium)
    blood, csf = table["vessel"], table["csf"]
    blood_post = Tissue(1.0, float(1 / (1 / blood.t1 + rate * 1.2)), blood.t2)

    def combined(of_solid: NDArray, of_csf: ArrayLike, of_blood: ArrayLike) -> FloatArray:
        mixed = solid * of_solid + tissues["csf"] * np.float32(of_csf) + tissues["vessel"] * np.float32(of_blood)
        return mixed.astype(np.float32)

    echo = {"t1": (t1, blood, scanner.t1), "t1ce": (t1_post, blood_post, scanner.t1ce), "t2": (t1, blood, scanner.t2)}
    found = {
        key: combined(spin_echo(pd, t, t2, *p), spin_echo(*csf, *p), spin_echo(*b, *p))
        for key, (t, b, p) in echo.items()
    }
    p = scanner.flair
    found["flair"] = combined(
        inversion_recovery(pd, t1, t2, *p), inversion_recovery(*csf, *p), inversion_recovery(*blood, *p)
    )
    return found


def _acquire(
    signal: FloatArray, bias: FloatArray, reference: float, noise: float, gain: float, rng: np.random.Generator
) -> FloatArray:
    """Bias field, Rician noise (a share of the ``reference`` signal), gain, and rounding to positive integers."""
    sigma = np.float32(noise * reference)
    real = signal * bias + sigma * rng.standard_normal(signal.shape, dtype=np.float32)
    imaginary = sigma * rng.standard_normal(signal.shape, dtype=np.float32)
    # integers, so that a written file holds exactly these values; 0 is kept for the background
    return np.clip(np.rint(np.float32(gain) * np.hypot(real, imaginary)), 1, 32767).astype(np.float32)


# -------------------------------------------------------------------------------------------------------- public API


@dataclass(frozen=True)
class _Subject:
    """Partial volumes of one subject on the voxels of one shape, and what is needed to image them."""

    voxels: _Voxels
    mask: NDArray[np.bool_]  # brain, in the box of the voxels
    tissues: Fields  # flat
    labels: NDArray[np.uint8]  # flat
    uptake: FloatArray  # flat


def _build_subject(rng: np.random.Generator, voxels: _Voxels) -> _Subject:
    """Shapes of the brain and of the tumor, without intensities; ``rng`` is used on the lattice only."""
    head = _head_points(rng)
    parts = _envelope(head)
    tumor = _draw_tumor(rng)
    center = _place_tumor(rng, tumor, parts, head)
    fields = _anatomy(rng, parts, _mass_effect(tumor, center, parts, head))
    fields.update(_tumor_fields(rng, tumor, center, fields))
    brain = voxels.sample(fields["depth"]) > 0
    flat = {name: voxels.sample(field, brain) for name, field in fields.items()}
    tissues, labels = _with_tumor(_healthy(flat, voxels.width), flat, tumor, voxels.width)
    return _Subject(voxels, brain, tissues, labels, flat["uptake"])


def _check(seed: int, subject: int, shape: Sequence[int]) -> tuple[int, int, int]:
    if seed < 0 or subject < 0:
        raise ValueError(f"seed and subject must not be negative, got seed={seed} and subject={subject}.")
    shape = tuple(int(n) for n in shape)
    if len(shape) != 3 or min(shape) < 8:
        raise ValueError(f"shape must have three entries of at least 8 voxels, got {shape}.")
    return shape


def _streams(seed: int, subject: int) -> list[np.random.Generator]:
    """Independent generators for geometry, protocol and voxel noise: only the last depends on the shape."""
    return [np.random.Generator(np.random.PCG64(s)) for s in np.random.SeedSequence([seed, subject]).spawn(3)]


def make_phantom(seed: int, subject: int, shape: Sequence[int] = FULL_SHAPE) -> dict[str, np.ndarray]:
    """One subject of the cohort, with a tumor; about one in six has no enhancing part.

    The same arguments give the same bytes. Array axes run to the left, to the back and upward, as those of BraTS.

    Args:
        seed: seed of the cohort, not negative.
        subject: number of the subject, not negative.
        shape: number of voxels. The field of view is always 240 x 240 x 155 mm, so fewer voxels are larger ones; the
            subject is the same.

    Returns:
        ``flair, t1, t1ce, t2``: float32 volumes of ``shape`` that hold integers, 0 outside the brain and at least 1
        within. ``seg``: uint8 volume, 1 = necrotic or non-enhancing core, 2 = edema, 4 = enhancing tumor.

    Raises:
        ValueError: for a negative number, or a shape that is not three numbers of at least 8.
    """
    shape = _check(seed, subject, shape)
    geometry, protocol, grain = _streams(seed, subject)
    body = _build_subject(geometry, _make_voxels(shape))
    voxels, mask = body.voxels, body.mask

    def draw(scale: float) -> FloatArray:
        return voxels.sample(_smooth_noise(protocol, scale), mask)

    table, scanner = _draw_tissues(protocol), _draw_scanner(protocol)
    textures = [amplitude * (draw(2.0) + draw(5.0)) for amplitude in (0.008, 0.022, 0.022)]
    # lesions are less homogeneous than healthy tissue
    lesion = 1 + 2.0 * (body.tissues["ed"] + body.tissues["net"] + body.tissues["et"]) + 2.0 * body.tissues["ncr"]
    textures[1:] = [np.clip(t * lesion, -0.5, 0.5) for t in textures[1:]]
    signals = _signals(body.tissues, textures, body.uptake, table, scanner)

    volumes = {}
    for key in CONTRAST_KEYS:
        bias = np.exp(scanner.bias[key] * draw(60.0))
        reference = float(np.percentile(signals[key], 75))
        values = _acquire(signals[key], bias, reference, scanner.noise[key], scanner.gain[key], grain)
        volumes[key] = _embed(values, mask, voxels)
    volumes[MASK_KEY] = _embed(body.labels, mask, voxels)
    return volumes


def _embed(values: NDArray, mask: NDArray[np.bool_], voxels: _Voxels) -> np.ndarray:
    """Volume of the full shape from the flat values of the brain."""
    volume = np.zeros(voxels.shape, values.dtype)
    volume[voxels.box][mask] = values
    return volume


def phantom_affine(shape: Sequence[int] = FULL_SHAPE) -> np.ndarray:
    """Affine of a phantom volume (RAS, mm): at full size that of BraTS, else one with the same field of view.

    Args:
        shape: number of voxels.

    Returns:
        4 x 4 float64 matrix.
    """
    step = np.array(_spacing(shape))
    affine = np.diag([-step[0], -step[1], step[2], 1.0])
    first = 0.5 * step - 0.5
    affine[:3, 3] = [-first[0], FULL_SHAPE[1] - 1 - first[1], first[2]]
    return affine + 0.0  # no negative zeros


def _description(seed: int, subject: int) -> str:
    return f"SSCF phantom v{VERSION} seed {seed} subject {subject}"


def _is_complete(study: Path, shape: tuple[int, int, int], description: str) -> bool:
    """Whether a folder holds all five files of this subject and shape."""
    for key in (*CONTRAST_KEYS, MASK_KEY):
        try:
            image = nib.load(study / f"{study.name}_{key}.nii.gz")
        except (OSError, nib.filebasedimages.ImageFileError):
            return False
        if image.shape != shape or bytes(image.header["descrip"]).rstrip(b"\0").decode("latin-1") != description:
            return False
    return True


def _write_subject(directory: Path, seed: int, subject: int, shape: tuple[int, int, int]) -> Path:
    """Writes one subject unless it is there; the folder appears under its name only when it is whole."""
    study, description = directory / f"Phantom_{seed}_{subject:03d}", _description(seed, subject)
    if _is_complete(study, shape, description):
        return study
    volumes, affine = make_phantom(seed, subject, shape), phantom_affine(shape)
    with tempfile.TemporaryDirectory(prefix=".phantom-", dir=directory) as scratch:
        # a folder within the private scratch folder, so that it has the usual permissions after the renaming
        whole = Path(scratch) / study.name
        whole.mkdir()
        for key, volume in volumes.items():
            image = nib.Nifti1Image(volume.astype(np.uint8 if key == MASK_KEY else np.int16), affine)
            image.header.set_xyzt_units("mm")
            image.header["descrip"] = description.encode()
            nib.save(image, whole / f"{study.name}_{key}.nii.gz")
        if study.exists() and not _is_complete(study, shape, description):
            shutil.rmtree(study)
        try:
            whole.rename(study)
        except OSError:
            # another process was faster: its result is the same
            if not _is_complete(study, shape, description):
                raise
    return study


def write_phantom_cohort(
    directory: str | os.PathLike,
    num_subjects: int,
    seed: int = 0,
    shape: Sequence[int] = FULL_SHAPE,
    num_workers: int | None = None,
) -> list[Path]:
    """Writes a cohort as ``<directory>/Phantom_<seed>_<nnn>/Phantom_<seed>_<nnn>_{flair,t1,t1ce,t2,seg}.nii.gz``.

    A subject that is already complete with the same seed and shape is not written again. Each one is written to a
    temporary folder that is then renamed, so an interruption leaves nothing half-written under its name.

    Args:
        directory: made if it does not exist.
        num_subjects: subjects 0 to ``num_subjects - 1``.
        seed: seed of the cohort, not negative.
        shape: number of voxels, see :func:`make_phantom`.
        num_workers: number of threads (NumPy and gzip release the interpreter lock); by default the number of usable
            cores, at most 4. One full-size subject takes up to about 1 GB while it is made.

    Returns:
        The folders of the subjects, in order.

    Raises:
        ValueError: for negative numbers or a bad shape.
    """
    if num_subjects < 0:
        raise ValueError(f"num_subjects must not be negative, got {num_subjects}.")
    shape = _check(seed, 0, shape)
    if num_workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        num_workers = min(4, cores)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        jobs = [pool.submit(_write_subject, directory, seed, subject, shape) for subject in range(num_subjects)]
        try:
            for job in tqdm(as_completed(jobs), total=num_subjects, desc="phantom cohort", unit="subject"):
                job.result()
        except BaseException:
            # do not make the caller wait for subjects that nobody will use
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [job.result() for job in jobs]


def incomplete_study(
    study_dir: str | os.PathLike, output_dir: str | os.PathLike, missing: Sequence[str] = ("t1ce", "flair")
) -> Path:
    """Copies a study without some contrasts and without the tumor mask: what a user would bring to inference.

    Args:
        study_dir: a folder in the layout of :func:`write_phantom_cohort` (or of BraTS).
        output_dir: the copy becomes ``<output_dir>/<name of the study>``.
        missing: keys of the contrasts to leave out, one to three of ``flair, t1, t1ce, t2``.

    Returns:
        The folder of the copy.

    Raises:
        ValueError: if ``missing`` names something else or leaves nothing.
        StudyError: if the study lacks a contrast that is to be copied, or the output folder already holds a file that
            is to be left out.
    """
    unknown = set(missing) - set(CONTRAST_KEYS)
    if unknown or not set(CONTRAST_KEYS) - set(missing):
        raise ValueError(f"missing must be some, not all, of {', '.join(CONTRAST_KEYS)}, got {tuple(missing)}.")
    study, target = Path(study_dir), Path(output_dir) / Path(study_dir).name
    target.mkdir(parents=True, exist_ok=True)
    for key in (*CONTRAST_KEYS, MASK_KEY):
        name = f"{study.name}_{key}.nii.gz"
        if key in missing or key == MASK_KEY:
            # the output folder may be the study itself: nothing is ever deleted
            if (target / name).exists():
                raise StudyError(f"{target / name} is to be left out but exists: choose an empty output folder.")
        elif not (study / name).is_file():
            raise StudyError(f"{study / name} does not exist: add it, or name {key} among the missing contrasts.")
        else:
            shutil.copyfile(study / name, target / name)
    return target


def phantom_dataset(
    directory: str | os.PathLike, num_subjects: int, seed: int = 0, shape: Sequence[int] = FULL_SHAPE
) -> str:
    """``write_phantom_cohort`` as the ``dataset_dir`` of a config.

    Args:
        directory: of the cohort.
        num_subjects: number of subjects.
        seed: of the cohort.
        shape: voxels of a volume.

    Returns:
        ``directory``.
    """
    write_phantom_cohort(directory, num_subjects, seed=seed, shape=tuple(shape))
    return str(directory)


def incomplete_test_studies(
    split_file: str | os.PathLike,
    dataset_dir: str | os.PathLike,
    output_dir: str | os.PathLike,
    missing: Sequence[str] = ("t1ce", "flair"),
) -> str:
    """Incomplete copies of the test studies of a split, as the ``dataset_dir`` of an inference config.

    Args:
        split_file: JSON file of a split, as training writes it.
        dataset_dir: folder of the complete studies.
        output_dir: gets a folder for each test study.
        missing: keys of the contrasts to leave out.

    Returns:
        ``output_dir``.
    """
    for study in json.loads(Path(split_file).read_text())["test"]:
        incomplete_study(Path(dataset_dir) / study, output_dir, missing)
    return str(output_dir)
