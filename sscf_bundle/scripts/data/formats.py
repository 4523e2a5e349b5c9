# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""File formats: what is a volume on disk, a file (NIfTI, NRRD, MetaImage) or a folder with one DICOM series."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import itk
import nibabel as nib
import numpy as np
from monai.data import MetaTensor
from monai.transforms import LoadImage

from ..contrasts import StudyError

_VOLUME = re.compile(r"^(?P<stem>.+)\.(?:nii(?:\.gz)?|nrrd|nhdr|mha|mhd)$", re.IGNORECASE | re.DOTALL)
#: Greatest difference between the distances of neighboring slices of a series, as a share of the distance.
_UNEVEN = 0.01


def volume_stem(path: Path) -> str | None:
    """Name of a volume without what tells its format; ``None`` for a file of another format."""
    match = _VOLUME.match(path.name)
    if match is not None:
        return match["stem"]
    return path.name if path.is_dir() else None


def holds_dicom(folder: str | os.PathLike[str], names: Sequence[str]) -> bool:
    """Whether one of the files of a folder is a DICOM file, whatever its name."""
    for path in (Path(folder, name) for name in names if _VOLUME.match(name) is None):
        with suppress(OSError), path.open("rb") as file:
            if file.read(132)[128:] == b"DICM":
                return True
    return False


def read_volume(path: str) -> MetaTensor:
    """Read a file, or the one DICOM series in a folder, as ``monai.transforms.LoadImage`` does, float32.

    Raises:
        StudyError: when a folder holds several series, slices of a series are missing, or a file holds colors or is
            Analyze 7.5.
    """
    reader = None  # by the name of the file
    if os.path.isdir(path) and _VOLUME.match(os.path.basename(path)) is None:
        _check_series(path)
        reader = "ITKReader"
    elif path.lower().endswith((".nii", ".nii.gz", ".hdr", ".img", ".img.gz")):
        header = nib.load(path).header
        if not isinstance(header, nib.Nifti1Header):
            raise StudyError(f"{path} is Analyze 7.5, which does not tell right from left: convert it to NIfTI.")
        if header.get_data_dtype().fields:
            raise StudyError(f"{path} holds colors: give the volume of intensities.")
    # readers keep state between reading and decoding, so that threads must not share one
    return LoadImage(reader=reader, image_only=True, dtype=np.float32)(path)


def _check_series(folder: str) -> None:
    """Refuse what the reader would take a part of, or would space evenly."""
    names = itk.GDCMSeriesFileNames.New()
    # as the reader of MONAI tells series apart
    names.SetUseSeriesDetails(True)
    names.AddSeriesRestriction("0008|0021")
    names.SetDirectory(folder)
    series = names.GetSeriesUIDs()
    if not series:
        raise StudyError(f"{folder} holds no DICOM series: give the folder with its files, or a file.")
    if len(series) > 1:
        raise StudyError(f"{folder} holds {len(series)} DICOM series, not one: give each series a folder of its own.")
    places = []
    for name in names.GetFileNames(series[0]):
        image = itk.GDCMImageIO.New(FileName=name)
        image.ReadImageInformation()
        places.append([image.GetOrigin(axis) for axis in range(3)])
    steps = np.linalg.norm(np.diff(np.asarray(places), axis=0), axis=1)
    if len(steps) and not np.allclose(steps, np.median(steps), rtol=_UNEVEN, atol=0):
        raise StudyError(
            f"The slices in {folder} are {steps.min():.3g} to {steps.max():.3g} mm apart: some are missing or come "
            "from another series, so export it again."
        )
