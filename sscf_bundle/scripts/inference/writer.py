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

import datetime
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

from ..checked_settings import refuse_unknown
from ..contrasts import CONTRAST_KEYS, CONTRAST_NAMES, MASK_KEY, StudyError
from ..data.datalist import write_whole
from .panel import draw_panel
from .resume import describe_file, read_record
from .summary import write_summary

_BUNDLE_ROOT = Path(__file__).resolve().parents[2]
#: Header fields that place a volume in space; no others are taken over, because some may name the patient.
_GEOMETRY_FIELDS = (
    *("pixdim", "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d"),
    *("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"),
)
#: Folders that a killed run was writing, and the age in seconds from which they are taken for such.
_LEFTOVER = re.compile(r"\..*\.[0-9a-f]{32}\.new", re.DOTALL)
_ABANDONED = 3600
#: Bytes of a study's name that leave room for what is written of it: names of files have 255 at most.
_LONGEST_NAME = 200
#: Fewest whole numbers that a contrast may be rounded to.
_LEVELS = 100
#: What later steps may add to an item for the record.
_FINDINGS = (
    *("checks", "scores", "prototypes", "expected", "verdict", "reasons", "warnings"),
    *("correction", "seconds_of_checks"),
)
#: What BIDS calls a contrast: entity of a contrast agent, suffix.
_BIDS_NAMES = {"flair": ("", "FLAIR"), "t1": ("", "T1w"), "t1ce": ("_ce-gadolinium", "T1w"), "t2": ("", "T2w")}
_NOTICE = "Synthetic volumes and masks for research only, not for clinical use."

logger = logging.getLogger(__name__)


class StudyFiles:
    """Names of what is written of a study.

    Attributes: ``folder`` below the output folder, ``volumes`` (file names by key of ``OUTPUT_KEYS``), ``record`` and
    ``panel``.

    Args:
        study: name of the study.
        naming: ``"study"``, or ``"bids"``, which turns a name that is none of BIDS into a subject.

    Raises:
        StudyError: when files cannot be named so.
    """

    def __init__(self, study: str, naming: str = "study") -> None:
        long = len(os.fsencode(study)) > _LONGEST_NAME
        if study != Path(study).name or study.startswith(".") or not study.isprintable() or long:
            raise StudyError(f"The study name {study!r} cannot name a folder: give another name.")
        if naming == "study":
            self.folder, stem = Path(study), study
            self.volumes = {key: f"{study}_{key}_synthetic.nii.gz" for key in CONTRAST_KEYS}
            self.volumes[MASK_KEY] = f"{study}_{MASK_KEY}.nii.gz"
        else:
            match = re.match(r"(sub-[A-Za-z0-9]+)(?:_(ses-[A-Za-z0-9]+))?(?=_|$)", study)
            entities = [e for e in match.groups() if e] if match else ["sub-" + re.sub(r"[^A-Za-z0-9]", "", study)]
            if entities == ["sub-"]:
                raise StudyError(f"The study name {study!r} has no letter or digit of BIDS: give another name.")
            self.folder, stem = Path(*entities, "anat"), "_".join(entities)
            self.volumes = {
                key: f"{stem}{agent}_desc-synthetic_{suffix}.nii.gz" for key, (agent, suffix) in _BIDS_NAMES.items()
            }
            self.volumes[MASK_KEY] = f"{stem}_desc-synthetic_dseg.nii.gz"
            stem += "_desc-synthetic"
        self.record, self.panel = f"{stem}_synthesis.json", f"{stem}_panel.png"


class StudyWriter:
    """Write what was missing of a study, each study into a folder of its own.

    ``<output_dir>/<study>/`` gets ``<study>_<key>_synthetic.nii.gz`` (float32) for each missing contrast,
    ``<study>_seg.nii.gz`` (uint8) and ``<study>_synthesis.json``, which says what was made from what. Shape, affine,
    qform, sform and units are those of the first available contrast on file; nothing else of its header is taken over.
    A new folder appears complete or not at all. In one that stands, files of these names are replaced one by one, each
    complete; the record goes first and comes last, so that results without a record are unfinished. Other files stay.

    Args:
        output_dir: folder for all studies; made if needed.
        settings: what the results depend on beside input and weights, for the record.
        naming: ``"study"``, or ``"bids"`` for the names of BIDS derivatives, see ``StudyFiles``.
        output_dtype: of the contrasts: ``"float32"``, or ``"reference"`` for that of the contrast whose grid they have,
            where that is NIfTI.
        page: write ``summary.csv`` and ``index.html`` at the end; items with ``"acquired"`` get a panel for it.
        shard: part of the studies that this run has, such as ``"1/4"``; names its file of failures.

    Raises:
        StudyError: when a setting is none of these; from the call, when the folder of the study holds its input or
            another study, the study's name is no folder name, or ``output_dtype`` cannot hold the intensities.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike[str],
        settings: Mapping[str, Any] | None = None,
        naming: str = "study",
        output_dtype: str = "float32",
        page: bool = False,
        shard: str | None = None,
    ) -> None:
        if output_dir is None:
            raise StudyError("output_dir needs the path of a folder, got None.")
        refuse_unknown("naming", [naming], ("study", "bids"))
        refuse_unknown("output_dtype", [output_dtype], ("float32", "reference"))
        self.output_dir = Path(str(output_dir)).expanduser()
        self.settings = json.loads(json.dumps({**(settings or {}), "written_by": type(self).__name__}))
        self.naming, self.output_dtype, self.page = naming, output_dtype, page
        self.failures = self.output_dir / ("failures" + (f"_{shard}".replace("/", "_of_") if shard else "") + ".json")
        metadata = json.loads((_BUNDLE_ROOT / "configs" / "metadata.json").read_text())
        self.bundle = {"bundle": metadata["name"], "bundle_version": metadata["version"]}
        self.weights_sha256 = metadata.get("weights_sha256")

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
        if self.naming == "bids":
            maker = {"Name": self.bundle["bundle"], "Version": self.bundle["bundle_version"]}
            description = {"Name": "Synthetic contrasts", "BIDSVersion": "1.10.0", "DatasetType": "derivative"}
            write_whole(self.output_dir / "dataset_description.json", {**description, "GeneratedBy": [maker]})

    def files(self, study: str) -> StudyFiles:
        """Names of what is written of a study."""
        return StudyFiles(study, self.naming)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[str, Path]:
        """Write one study.

        Args:
            data: item after ``prediction_transforms``: ``study``, the paths of its contrasts, ``has_contrast``,
                ``output_keys``, ``pred`` (one X x Y x Z volume for each), and what the evaluator adds for the record.

        Returns:
            Path of each written volume, by its key (one of ``OUTPUT_KEYS``).
        """
        study = str(data["study"])
        files = self.files(study)
        folder = self.output_dir / files.folder
        available = [bool(kept) for kept in data["has_contrast"]]
        inputs = {key: str(data[key]) for key, kept in zip(CONTRAST_KEYS, available, strict=True) if kept}
        if any(Path(path).resolve().parent == folder.resolve() for path in inputs.values()):
            raise StudyError(f"{folder} holds the input of the study: choose another output_dir.")
        other = read_record(folder / files.record).get("study", study)
        if other != study:
            raise StudyError(f"{folder} holds the results of the study {other}: give one of the two another name.")

        made = data["output_keys"]
        reference = inputs[data.get("grid", next(iter(inputs)))]
        # hidden, so that find_studies never sees it; in the same folder, so that renaming is one step
        new = self.output_dir / f".{study}.{uuid.uuid4().hex}.new"
        try:
            new.mkdir(parents=True)
            source = _read_header(reference)
            dtype: np.dtype = np.dtype(np.float32)
            if self.output_dtype == "reference" and source is not None:
                dtype = source.get_data_dtype().newbyteorder("=")
            for key, volume in zip(made, data["pred"].as_tensor(), strict=True):
                values = volume.numpy()
                if key == MASK_KEY:
                    values = values.astype(np.uint8)
                else:
                    scale = data["output_scale"][key]
                    if dtype.kind in "iu" and not _LEVELS <= scale <= np.iinfo(dtype).max:
                        raise StudyError(
                            f"Intensities of {key} up to {scale:.4g} do not go into {dtype}: use --output_dtype "
                            "float32, or another output_scale or intensities."
                        )
                    if not np.isfinite(values).all():
                        raise StudyError(f"{key} has NaN or infinite values: use another output_scale or intensities.")
                    values = (np.rint(values) if dtype.kind in "iu" else values).astype(dtype, copy=False)
                _save_volume(values, data["pred"].affine, source, new / files.volumes[key], is_mask=key == MASK_KEY)
                if self.naming == "bids":
                    sources = sorted(Path(path).name for path in inputs.values())
                    about = {"Description": _NOTICE, "SkullStripped": True, "Sources": sources}
                    (new / _about(files.volumes[key])).write_text(json.dumps(about) + "\n")
            if "acquired" in data:
                draw_panel(new / files.panel, data)
            self.add(new, data)
            record = self._record(data, inputs, {key: files.volumes[key] for key in made})
            (new / files.record).write_text(json.dumps(record, indent=2) + "\n")
            _place(new, folder, files)
        except OSError as error:
            raise StudyError(f"{folder} cannot be written: {error.strerror or error}.") from error
        finally:
            shutil.rmtree(new, ignore_errors=True)
        judged = [f"Verdict: {record['verdict']}.", *record["reasons"]] if "verdict" in record else []
        logger.info("Study %s: %s written. %s", study, ", ".join(made), " ".join(judged))
        return {key: folder / files.volumes[key] for key in made}

    def add(self, folder: Path, data: Mapping[Hashable, Any]) -> None:
        """Write more of a study into a folder, which comes with the volumes or not at all: here nothing."""

    def finish(self, failures: Sequence[Mapping[str, str]], total: int) -> None:
        """Write ``failures.json``, or take that of an earlier run away where nothing failed, and the page.

        Raises:
            StudyError: when there are failures, of how many of a ``total`` of studies.
        """
        # a whole run takes the place of its parts
        for path in self.output_dir.glob("failures*.json" if self.failures.stem == "failures" else self.failures.name):
            path.unlink()
        if failures:
            write_whole(self.failures, list(failures))
        if self.page:
            write_summary(self.output_dir)
        if not failures:
            return
        shown = ", ".join(failure["study"] for failure in failures[:5]) + (", ..." if len(failures) > 5 else "")
        raise StudyError(f"{len(failures)} of {total} studies failed: {shown}; {self.failures} gives the reasons.")

    def _record(
        self, data: Mapping[Hashable, Any], inputs: Mapping[str, str], outputs: Mapping[str, str]
    ) -> dict[str, Any]:
        """What was made from what, for the JSON file beside the volumes."""
        return {
            "notice": _NOTICE,
            "study": data["study"],
            "available": [CONTRAST_NAMES[key] for key in inputs],
            "synthesized": [CONTRAST_NAMES[key] for key in outputs if key != MASK_KEY],
            "inputs": {key: Path(path).name for key, path in inputs.items()},
            "inputs_synthesized_by_others": [key for key in data.get("synthesized", ()) if key in inputs],
            "grid_of": data.get("grid"),
            "outputs": dict(outputs),
            "intensity_scale": {
                key: float(value)
                for key, value in zip(CONTRAST_KEYS, data.get("intensity_scale", ()), strict=False)
                if key in inputs
            },
            "output_scale": data["output_scale"],
            **{name: data[name] for name in _FINDINGS if name in data},
            "patient_in_bank": data.get("patient_in_bank"),
            "seconds": data.get("seconds"),
            "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "input_files": {key: describe_file(path) for key, path in inputs.items()},
            "settings": self.settings,
            "weights_sha256": data.get("weights_sha256"),
            "weights_came_with_bundle": data.get("weights_sha256") == self.weights_sha256,
            **self.bundle,
        }


def _about(volume: str) -> str:
    """Name of the file of BIDS that describes a volume."""
    return volume.replace(".nii.gz", ".json")


def _read_header(path: str) -> nib.Nifti1Header | None:
    """The header of a NIfTI file; ``None`` for other formats."""
    try:
        source = nib.load(path).header
    except (OSError, nib.filebasedimages.ImageFileError):
        # another reader of MONAI took it, for example of a DICOM folder
        return None
    return source if isinstance(source, nib.Nifti1Header) else None


def _save_volume(
    array: np.ndarray, affine: torch.Tensor, source: nib.Nifti1Header | None, path: Path, is_mask: bool
) -> None:
    """Write one X x Y x Z volume as NIfTI, in the space of ``source``."""
    if source is None:
        image = nib.Nifti1Image(array, affine.numpy())
        image.set_qform(image.affine, code="scanner")
        image.header.set_xyzt_units("mm")
    else:
        header = nib.Nifti1Header()
        for field in _GEOMETRY_FIELDS:
            header[field] = source[field]
        header.set_data_dtype(array.dtype)
        header.set_data_shape(array.shape)
        image = nib.Nifti1Image(array, header.get_best_affine(), header)
    image.header["descrip"] = b"SSCF predicted mask" if is_mask else b"SSCF synthetic, not for clinical use"
    nib.save(image, path)


def _place(new: Path, folder: Path, files: StudyFiles) -> None:
    """Bring the files of ``new`` to ``folder``, which then has those of ``files`` that ``new`` has, the record last."""
    ours = {*files.volumes.values(), *(_about(name) for name in files.volumes.values()), files.panel}
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        new.rename(folder)
        return
    except OSError as error:
        if not folder.exists():
            raise
        if not folder.is_dir():
            raise StudyError(f"{folder} is a file: remove it or choose another output_dir.") from error
    (folder / files.record).unlink(missing_ok=True)
    for name in ours - set(os.listdir(new)):
        (folder / name).unlink(missing_ok=True)
    for path in sorted(new.iterdir(), key=lambda path: path.name == files.record):
        if path.is_dir():
            shutil.rmtree(folder / path.name, ignore_errors=True)
        os.replace(path, folder / path.name)
