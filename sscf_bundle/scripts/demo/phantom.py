# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""A procedural cohort of skull-stripped brains with a tumor, in the layout of BraTS: a test bed, nothing more.

An ellipsoid with folds of gray matter, ventricles, and a tumor: FLAIR and T2 show its edema, T1ce alone its rim, and
its core is necrotic. Everything is a function of position in mm, so that a coarse shape shows the same subject.
Numbers measured on it say that the code works, never how well it would work on patients.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

import nibabel as nib
import numpy as np
from scipy.interpolate import BSpline
from tqdm import tqdm

from ..contrasts import CONTRAST_KEYS, MASK_KEY, StudyError

#: Number of voxels of a BraTS volume, which at 1 mm is also the field of view in mm.
FULL_SHAPE = (240, 240, 155)
#: Labels of BraTS.
LABEL_NCR, LABEL_ED, LABEL_ET = 1, 2, 4
#: Intensity of each tissue in the order of ``CONTRAST_KEYS``. The rim differs from edema on T1ce alone.
TISSUES = {
    "wm": (300, 700, 720, 260),
    "gm": (430, 520, 540, 420),
    "csf": (90, 200, 210, 1000),
    "edema": (800, 430, 440, 780),
    "rim": (800, 430, 1150, 780),
    "core": (360, 260, 280, 900),
}
_NAMES = tuple(TISSUES)
#: Written to every header: a cohort of another version of this module is not taken for a finished one.
_VERSION = 2


def _smooth_noise(rng: np.random.Generator, shape: Sequence[int], step: float) -> np.ndarray:
    """Noise of about unit variance and a wavelength of some ``step`` mm: cubic B-splines with random weights."""
    weights = []
    for length, count in zip(FULL_SHAPE, shape, strict=True):
        knots = np.arange(-3, int(length / step) + 5) * step
        positions = (np.arange(count) + 0.5) * length / count
        weights.append(BSpline.design_matrix(positions, knots, 3).toarray())
    lattice = rng.standard_normal([w.shape[1] for w in weights])
    # a sum of splines with independent weights has a standard deviation of about 0.33
    return np.einsum("ia,jb,kc,abc->ijk", *weights, lattice, optimize=True) / 0.33


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
    if seed < 0 or subject < 0:
        raise ValueError(f"seed and subject must not be negative, got seed={seed} and subject={subject}.")
    if len(shape) != 3 or min(shape) < 8:
        raise ValueError(f"shape must have three entries of at least 8 voxels, got {tuple(shape)}.")
    # only the last stream depends on the shape
    rng, grain = (np.random.default_rng(s) for s in np.random.SeedSequence([seed, subject]).spawn(2))
    x, y, z = (
        ((np.arange(count) + 0.5) * length / count - length / 2).reshape([-1 if i == axis else 1 for i in range(3)])
        for axis, (length, count) in enumerate(zip(FULL_SHAPE, shape, strict=True))
    )

    radii = np.array([68.0, 86.0, 64.0]) * rng.uniform(0.94, 1.04, 3)
    depth = 1 - np.sqrt((x / radii[0]) ** 2 + (y / radii[1]) ** 2 + (z / radii[2]) ** 2)
    depth = depth + 0.015 * _smooth_noise(rng, shape, 25.0)  # 0 at the surface, 1 in the middle
    brain = depth > 0
    folds = np.abs(_smooth_noise(rng, shape, 11.0))
    tissue = np.full(shape, _NAMES.index("wm"), np.uint8)
    tissue[(depth < 0.07) | ((folds < 0.35) & (depth < 0.4))] = _NAMES.index("gm")
    tissue[(folds < 0.08) & (depth < 0.25)] = _NAMES.index("csf")
    size = rng.uniform(0.8, 1.3)
    for side in (-1, 1):
        ventricle = ((x - 13 * side) / 8) ** 2 + ((y + 5) / 30) ** 2 + ((z - 5) / 14) ** 2
        tissue[ventricle < size] = _NAMES.index("csf")

    center = np.array([rng.choice([-1, 1]) * rng.uniform(26, 36), rng.uniform(-38, 38), rng.uniform(-16, 20)])
    core, rim, edema = rng.uniform(6, 11), rng.uniform(4, 6), rng.uniform(8, 16)
    distance = np.sqrt((x - center[0]) ** 2 + (y - center[1]) ** 2 + (z - center[2]) ** 2)
    distance = distance + 2.0 * _smooth_noise(rng, shape, 14.0)
    enhancing = rng.random() > 1 / 6
    labels = np.zeros(shape, np.uint8)
    for radius, label, name in (
        (core + rim + edema, LABEL_ED, "edema"),
        (core + rim, LABEL_ET, "rim") if enhancing else (core + rim, LABEL_NCR, "core"),
        (core, LABEL_NCR, "core"),
    ):
        inside = (distance < radius) & brain
        if name == "edema":  # it stays out of fluid
            inside &= tissue != _NAMES.index("csf")
        labels[inside], tissue[inside] = label, _NAMES.index(name)

    volumes: dict[str, np.ndarray] = {}
    for k, key in enumerate(CONTRAST_KEYS):
        values = np.array([TISSUES[name][k] for name in _NAMES], np.float64)[tissue]
        values *= np.exp(0.06 * _smooth_noise(rng, shape, 70.0) + 0.04 * _smooth_noise(rng, shape, 6.0))
        values = rng.uniform(0.8, 1.6) * (values + grain.normal(0, 12, shape))
        volumes[key] = np.where(brain, np.rint(values).clip(1, 9999), 0).astype(np.float32)
    volumes[MASK_KEY] = labels
    return volumes


def phantom_affine(shape: Sequence[int] = FULL_SHAPE) -> np.ndarray:
    """Affine of a phantom volume (RAS, mm, 4 x 4): at full size that of BraTS, else one with the same field of view."""
    step = np.divide(FULL_SHAPE, shape)
    affine = np.diag([-step[0], -step[1], step[2], 1.0])
    first = 0.5 * step - 0.5
    affine[:3, 3] = [-first[0], FULL_SHAPE[1] - 1 - first[1], first[2]]
    return affine + 0.0  # no negative zeros


def _is_complete(study: Path, shape: tuple[int, ...], description: str) -> bool:
    """Whether a folder holds all five files of this subject and shape."""
    for key in (*CONTRAST_KEYS, MASK_KEY):
        try:
            image = cast(nib.Nifti1Image, nib.load(study / f"{study.name}_{key}.nii.gz"))
        except (OSError, nib.filebasedimages.ImageFileError):
            return False
        if image.shape != shape or bytes(image.header["descrip"]).rstrip(b"\0").decode("latin-1") != description:
            return False
    return True


def _write_subject(directory: Path, seed: int, subject: int, shape: tuple[int, ...]) -> Path:
    """Writes one subject unless it is there; the folder appears under its name only when it is whole."""
    study, description = directory / f"Phantom_{seed}_{subject:03d}", f"SSCF phantom v{_VERSION} {seed} {subject}"
    if _is_complete(study, shape, description):
        return study
    with tempfile.TemporaryDirectory(prefix=".phantom-", dir=directory) as scratch:
        # a folder within the private scratch folder, so that it has the usual permissions after the renaming
        whole = Path(scratch) / study.name
        whole.mkdir()
        for key, volume in make_phantom(seed, subject, shape).items():
            image = nib.Nifti1Image(volume.astype(np.uint8 if key == MASK_KEY else np.int16), phantom_affine(shape))
            image.header.set_xyzt_units("mm")
            image.header["descrip"] = description.encode()
            nib.save(image, whole / f"{study.name}_{key}.nii.gz")
        shutil.rmtree(study, ignore_errors=True)
        whole.rename(study)
    return study


def write_phantom_cohort(
    directory: str | os.PathLike,
    num_subjects: int,
    seed: int = 0,
    shape: Sequence[int] = FULL_SHAPE,
    num_workers: int = 2,
) -> list[Path]:
    """Writes a cohort as ``<directory>/Phantom_<seed>_<nnn>/Phantom_<seed>_<nnn>_{flair,t1,t1ce,t2,seg}.nii.gz``.

    A subject that is already complete with the same seed and shape is not written again; an interruption leaves nothing
    half-written under its name.

    Args:
        directory: made if it does not exist.
        num_subjects: subjects 0 to ``num_subjects - 1``.
        seed: seed of the cohort, not negative.
        shape: number of voxels, see ``make_phantom``.
        num_workers: number of threads; one full-size subject takes about 1 GB while it is made.

    Returns:
        The folders of the subjects, in order.

    Raises:
        ValueError: for negative numbers or a bad shape.
    """
    directory, sizes = Path(directory), tuple(int(n) for n in shape)
    directory.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(num_workers) as pool:
        jobs = [pool.submit(_write_subject, directory, seed, subject, sizes) for subject in range(num_subjects)]
        return [job.result() for job in tqdm(jobs, "phantom cohort", unit="subject")]


def phantom_dataset(
    directory: str | os.PathLike, num_subjects: int, seed: int = 0, shape: Sequence[int] = FULL_SHAPE
) -> str:
    """``write_phantom_cohort`` as the ``dataset_dir`` of a config; arguments as there. Returns ``directory``.

    Raises:
        StudyError: if ``directory`` holds phantoms of another seed, before anything is written.
    """
    others = {path.name.split("_")[1] for path in Path(directory).glob("Phantom_*_*")} - {str(seed)}
    if others:
        raise StudyError(
            f"{directory} holds phantoms of seed {min(others)}, not {seed}: give --seed {min(others)} or another "
            "--output_dir."
        )
    write_phantom_cohort(directory, num_subjects, seed, shape)
    return str(directory)


def incomplete_study(
    study_dir: str | os.PathLike, output_dir: str | os.PathLike, missing: Sequence[str] = ("t1ce", "flair")
) -> Path:
    """Copies a study without some contrasts and without the tumor mask: what a user would bring to inference.

    Args:
        study_dir: a folder in the layout of ``write_phantom_cohort`` (or of BraTS).
        output_dir: the copy becomes ``<output_dir>/<name of the study>``, which is returned.
        missing: keys of the contrasts to leave out, one to three of ``flair, t1, t1ce, t2``.

    Raises:
        ValueError: if ``missing`` names something else or leaves nothing.
        StudyError: if a contrast to be copied does not exist, or one that is to be left out is in the output folder.
    """
    if set(missing) - set(CONTRAST_KEYS) or not set(CONTRAST_KEYS) - set(missing):
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


def incomplete_test_studies(
    split_file: str | os.PathLike, dataset_dir: str | os.PathLike, output_dir: str | os.PathLike, missing: Sequence[str]
) -> str:
    """``incomplete_study`` for the test studies of a split file, as the ``dataset_dir`` of an inference config."""
    for study in json.loads(Path(split_file).read_text())["test"]:
        incomplete_study(Path(dataset_dir) / study, output_dir, missing)
    return str(output_dir)
