# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Finished volumes as NIfTI in the geometry of the input, each study complete or not at all."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from ..contrasts import CONTRAST_KEYS, CONTRASTS, MASK_KEY, StudyError

_BUNDLE_ROOT = Path(__file__).resolve().parents[2]
#: Header fields that place a volume in space; no others are taken over, because some may name the patient.
_GEOMETRY_FIELDS = (
    *("pixdim", "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d"),
    *("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"),
)
#: Folders that a killed run was writing, and the age in seconds from which they are taken for such.
_LEFTOVER = re.compile(r"\..*\.[0-9a-f]{32}\.new", re.DOTALL)
_ABANDONED = 3600
_NOTICE = "Synthetic volumes and masks for research only, not for clinical use."

logger = logging.getLogger(__name__)


class StudyWriter:
    """Write what was missing of a study, each study into a folder of its own.

    ``<output_dir>/<study>/`` gets ``<study>_<key>_synthetic.nii.gz`` (float32) for each missing contrast,
    ``<study>_seg.nii.gz`` (uint8) and ``<study>_synthesis.json``, which says what was made from what. Shape, affine,
    qform, sform and units are those of the first available contrast on file; nothing else of its header is taken over.
    A new folder appears complete or not at all. In one that stands, files of these names are replaced one by one, each
    complete; the record goes first and comes last, so that results without a record are unfinished. Other files stay.

    Args:
        output_dir: folder for all studies; made if needed.

    Raises:
        StudyError: from the call, when the folder of the study holds its input, or the study's name is no folder name.
    """

    def __init__(self, output_dir: str | os.PathLike[str]) -> None:
        self.output_dir = Path(str(output_dir)).expanduser()

    def prepare(self) -> None:
        """Make the output folder, so that a wrong one shows before anything is computed, and clear what was left over.

        Raises:
            StudyError: when it cannot be made or written to.
        """
        try:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.output_dir).close()
        except OSError as error:
            raise StudyError(
                f"The folder {self.output_dir} cannot be written to ({error.strerror}): choose another output_dir."
            ) from error
        for path in self.output_dir.glob(".*.new"):
            # another run may be writing a younger one
            if _LEFTOVER.fullmatch(path.name) and time.time() - path.stat().st_mtime > _ABANDONED:
                shutil.rmtree(path, ignore_errors=True)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[str, Path]:
        """Write one study.

        Args:
            data: item after ``prediction_transforms``: ``study``, the paths of its contrasts, ``has_contrast``,
                ``output_keys``, ``pred`` (one X x Y x Z volume for each), and what the evaluator adds for the record.

        Returns:
            Path of each written volume, by its key (one of ``OUTPUT_KEYS``).
        """
        study = str(data["study"])
        folder = self.output_dir / study
        available = [bool(kept) for kept in data["has_contrast"]]
        inputs = {key: str(data[key]) for key, kept in zip(CONTRAST_KEYS, available, strict=True) if kept}
        if study != Path(study).name or study.startswith(".") or not study.isprintable():
            raise StudyError(f"The study name {study!r} cannot name a folder: give another name.")
        if any(Path(path).resolve().parent == folder.resolve() for path in inputs.values()):
            raise StudyError(f"{folder} holds the input of the study: choose another output_dir.")

        names = {key: f"{study}_{key}_synthetic.nii.gz" for key in CONTRAST_KEYS} | {
            MASK_KEY: f"{study}_{MASK_KEY}.nii.gz"
        }
        record_name = f"{study}_synthesis.json"
        made = data["output_keys"]
        # hidden, so that find_studies never sees it; in the same folder, so that renaming is one step
        new = self.output_dir / f".{study}.{uuid.uuid4().hex}.new"
        try:
            new.mkdir(parents=True)
            geometry = _read_geometry(next(iter(inputs.values())))
            for key, volume in zip(made, data["pred"].as_tensor(), strict=True):
                _save_volume(volume, data["pred"].affine, geometry, new / names[key], is_mask=key == MASK_KEY)
            record = self._record(data, inputs, {key: names[key] for key in made})
            (new / record_name).write_text(json.dumps(record, indent=2) + "\n")
            _place(new, folder, set(names.values()), record_name)
        except OSError as error:
            raise StudyError(f"{folder} cannot be written: {error.strerror or error}.") from error
        finally:
            shutil.rmtree(new, ignore_errors=True)
        logger.info("Study %s: %s written.", study, ", ".join(made))
        return {key: folder / names[key] for key in made}

    def finish(self, failures: Sequence[Mapping[str, str]], total: int) -> None:
        """Write ``failures.json``, or take that of an earlier run away where nothing failed.

        Args:
            failures: study and reason of each.
            total: number of studies.

        Raises:
            StudyError: when there are failures.
        """
        report = self.output_dir / "failures.json"
        if not failures:
            report.unlink(missing_ok=True)
            return
        report.write_text(json.dumps(list(failures), indent=2) + "\n")
        shown = ", ".join(failure["study"] for failure in failures[:5]) + (", ..." if len(failures) > 5 else "")
        raise StudyError(f"{len(failures)} of {total} studies failed: {shown}; {report} gives the reasons.")

    def _record(
        self, data: Mapping[Hashable, Any], inputs: Mapping[str, str], outputs: Mapping[str, str]
    ) -> dict[str, Any]:
        """What was made from what, for the JSON file beside the volumes."""
        metadata = json.loads((_BUNDLE_ROOT / "configs" / "metadata.json").read_text())
        named = dict(zip(CONTRAST_KEYS, CONTRASTS, strict=True))
        return {
            "notice": _NOTICE,
            "study": data["study"],
            "available": [named[key] for key in inputs],
            "synthesized": [named[key] for key in outputs if key in named],
            "inputs": {key: Path(path).name for key, path in inputs.items()},
            "inputs_synthesized_by_others": [key for key in data.get("synthesized", ()) if key in inputs],
            "outputs": dict(outputs),
            "intensity_scale": {
                key: float(value)
                for key, value in zip(CONTRAST_KEYS, data.get("intensity_scale", ()), strict=False)
                if key in inputs
            },
            "patient_in_bank": data.get("patient_in_bank"),
            "weights_sha256": data.get("weights_sha256"),
            "weights_came_with_bundle": data.get("weights_sha256") == metadata.get("weights_sha256"),
            "bundle": metadata["name"],
            "bundle_version": metadata["version"],
        }


def _read_geometry(path: str) -> nib.Nifti1Header | None:
    """The fields of a NIfTI header that place the volume in space; ``None`` for other formats."""
    try:
        source = nib.load(path).header
    except (OSError, nib.filebasedimages.ImageFileError):
        # another reader of MONAI took it, for example of a DICOM folder
        return None
    if not isinstance(source, nib.Nifti1Header):
        return None
    header = nib.Nifti1Header()
    for field in _GEOMETRY_FIELDS:
        header[field] = source[field]
    return header


def _save_volume(
    volume: torch.Tensor, affine: torch.Tensor, geometry: nib.Nifti1Header | None, path: Path, is_mask: bool
) -> None:
    """Write one X x Y x Z volume as NIfTI."""
    array = volume.numpy().astype(np.uint8 if is_mask else np.float32, copy=False)
    if geometry is None:
        image = nib.Nifti1Image(array, affine.numpy())
        image.set_qform(image.affine, code="scanner")
        image.header.set_xyzt_units("mm")
    else:
        header = geometry.copy()
        header.set_data_dtype(array.dtype)
        header.set_data_shape(array.shape)
        image = nib.Nifti1Image(array, header.get_best_affine(), header)
    image.header["descrip"] = b"SSCF predicted mask" if is_mask else b"SSCF synthetic, not for clinical use"
    nib.save(image, path)


def _place(new: Path, folder: Path, ours: set[str], record_name: str) -> None:
    """Bring the files of ``new`` to ``folder``, which then has those of ``ours`` that ``new`` has, and the record."""
    try:
        new.rename(folder)
        return
    except OSError as error:
        if not folder.exists():
            raise
        if not folder.is_dir():
            raise StudyError(f"{folder} is a file: remove it or choose another output_dir.") from error
    (folder / record_name).unlink(missing_ok=True)
    for name in ours - set(os.listdir(new)):
        (folder / name).unlink(missing_ok=True)
    for path in sorted(new.iterdir(), key=lambda path: path.name == record_name):
        os.replace(path, folder / path.name)
