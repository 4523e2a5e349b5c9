# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""DICOM output: each synthetic contrast as an MR series, the mask as a segmentation object."""

from __future__ import annotations

import datetime
import os
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from monai.utils import optional_import

from ..contrasts import CONTRAST_KEYS, CONTRAST_NAMES, MASK_KEY, TUMOR_CLASSES, StudyError
from .writer import StudyWriter

if TYPE_CHECKING:
    from pydicom import Dataset

# not everybody who runs the bundle writes DICOM
pydicom, _has_pydicom = optional_import("pydicom")
highdicom, _has_highdicom = optional_import("highdicom")

#: What is taken over from the source: whose it is, the study, and what places it in space. All else is of the scan.
_PATIENT_AND_STUDY = (
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "PatientAge", "PatientIdentityRemoved"),
    *("DeidentificationMethod", "StudyInstanceUID", "StudyDate", "StudyTime", "StudyID", "AccessionNumber"),
    *("ReferringPhysicianName", "StudyDescription", "SpecificCharacterSet", "FrameOfReferenceUID"),
    *("PositionReferenceIndicator", "PatientPosition", "BodyPartExamined"),
)
_PLANE = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness", "SpacingBetweenSlices")
#: Stored value of what the network knows as 1.
_FULL_SCALE = 4095
#: Greatest distance in mm between a slice of the source and that of the volume it became.
_TOLERANCE = 0.01
_MAKER = "sscf_bundle"


class DicomStudyWriter(StudyWriter):
    """Writes what ``StudyWriter`` writes, and the same as DICOM, for studies that are DICOM series.

    ``<output_dir>/<study>/dicom/`` gets a folder ``<study>_<key>_synthetic`` with an MR series for each missing
    contrast, and ``<study>_seg.dcm``, a binary segmentation object with the segments of ``mask_labels``. Geometry,
    patient and study are those of the contrast whose grid the volumes have; **names of patients are written as they are
    there.**

    Args:
        mask_labels: tumor class to its value in the volumes.
        options: of ``StudyWriter``.

    Raises:
        StudyError: when pydicom or highdicom is not installed; from the call, when that contrast is no folder
            with a DICOM series, or what ``StudyWriter`` refuses.
    """

    def __init__(self, mask_labels: Mapping[str, int], **options: Any) -> None:
        if not (_has_pydicom and _has_highdicom):
            raise StudyError("DICOM output needs two more packages: pip install pydicom highdicom.")
        super().__init__(**options)
        self.mask_labels = dict(mask_labels)

    def add(self, folder: Path, data: Mapping[Hashable, Any]) -> None:
        """Write the DICOM of one study."""
        study, pred = str(data["study"]), data["pred"]
        given = [key for key, kept in zip(CONTRAST_KEYS, data["has_contrast"], strict=True) if kept]
        sources = read_series(data[data.get("grid", given[0])], pred.affine.numpy(), pred.shape[1:])
        made_from, version = ", ".join(CONTRAST_NAMES[key] for key in given), self.bundle["bundle_version"]
        new = folder / "dicom"
        new.mkdir()
        for number, (key, volume) in enumerate(zip(data["output_keys"], pred.as_tensor().numpy(), strict=True)):
            # X x Y x Z to slices of rows and columns
            slices = volume.transpose(2, 1, 0)
            if key == MASK_KEY:
                segmentation(slices, sources, self.mask_labels, version).save_as(new / f"{study}_{MASK_KEY}.dcm")
                continue
            series_folder = new / f"{study}_{key}_synthetic"
            series_folder.mkdir()
            values = np.rint(slices * (_FULL_SCALE / data["output_scale"][key])).clip(0, _FULL_SCALE)
            pixels = values.astype(np.uint16)
            series = synthetic_series(pixels, sources, CONTRAST_NAMES[key], made_from, 9000 + number, version)
            for index, dataset in enumerate(series, start=1):
                dataset.save_as(series_folder / f"{index:04d}.dcm", enforce_file_format=True)


def read_series(folder: str | os.PathLike[str], affine: np.ndarray, shape: Sequence[int]) -> list[Dataset]:
    """The images of a DICOM series, in the order of the slices of the volume that it became.

    Args:
        folder: with one series.
        affine: 4 x 4, from voxels to mm in RAS.
        shape: X, Y, Z of the volume.

    Raises:
        StudyError: when ``folder`` is none, or its images do not lie where the volume has its slices.
    """
    if not os.path.isdir(folder):
        raise StudyError(f"{folder} is no folder with a DICOM series: leave DICOM output out, or give DICOM.")
    slices: dict[int, Dataset] = {}
    to_voxel = np.linalg.inv(affine)
    for path in sorted(Path(folder).iterdir()):
        if not path.is_file() or not pydicom.misc.is_dicom(path):
            continue
        dataset = pydicom.dcmread(path)
        x, y, z = map(float, dataset.get("ImagePositionPatient", (np.nan,) * 3))
        place = np.array([-x, -y, z, 1.0])  # LPS to RAS
        index = (to_voxel @ place)[2]
        if np.isfinite(index):
            index = round(index)
            off = np.linalg.norm(affine @ [0, 0, index, 1] - place)
            if off < _TOLERANCE and (dataset.Columns, dataset.Rows) == tuple(shape[:2]):
                slices[index] = dataset
    if sorted(slices) != list(range(shape[2])):
        raise StudyError(
            f"The images in {folder} do not lie where its volume has slices ({len(slices)} of {shape[2]} do): enhanced "
            "or incomplete series cannot be written as DICOM, so leave DICOM output out."
        )
    return [slices[index] for index in range(shape[2])]


def synthetic_series(
    values: np.ndarray, sources: Sequence[Dataset], contrast: str, made_from: str, number: int, version: str
) -> list[Dataset]:
    """One synthetic contrast as the MR images of a new series.

    Args:
        values: Z x rows x columns, uint16 up to 4095.
        sources: Z images of the contrast that gives patient, study and geometry.
        contrast: name of what was synthesized.
        made_from: names of the available contrasts.
        number: of the series.
        version: of the bundle.
    """
    now = datetime.datetime.now()
    series_uid = pydicom.uid.generate_uid(prefix=None)
    purpose = pydicom.sr.codedict.codes.DCM.SourceImageForImageProcessingOperation
    made = []
    for index, (pixels, source) in enumerate(zip(values, sources, strict=True), start=1):
        image = pydicom.Dataset()
        for keyword in (*_PATIENT_AND_STUDY, *_PLANE):
            if keyword in source:
                image[keyword] = source[keyword]
        for keyword in ("StudyID", "AccessionNumber", "ReferringPhysicianName", "PositionReferenceIndicator"):
            image.setdefault(keyword, "")
        image.setdefault("BodyPartExamined", "BRAIN")
        image.SOPClassUID = pydicom.uid.MRImageStorage
        image.SOPInstanceUID = pydicom.uid.generate_uid(prefix=None)
        image.ImageType = ["DERIVED", "SECONDARY", "OTHER"]
        image.Modality = "MR"
        image.SeriesInstanceUID, image.SeriesNumber, image.InstanceNumber = series_uid, number, index
        image.SeriesDescription = f"SYNTHETIC {contrast} (SSCF), not for diagnosis"
        image.ImageComments = "Synthetic image, estimated by a neural network. For research only."
        image.DerivationDescription = f"Synthesized from {made_from} by SSCF"
        reference = pydicom.Dataset()
        reference.ReferencedSOPClassUID, reference.ReferencedSOPInstanceUID = source.SOPClassUID, source.SOPInstanceUID
        code = pydicom.Dataset()
        code.CodeValue, code.CodingSchemeDesignator = purpose.value, purpose.scheme_designator
        code.CodeMeaning = purpose.meaning
        reference.PurposeOfReferenceCodeSequence = [code]
        image.SourceImageSequence = [reference]
        image.Manufacturer, image.ManufacturerModelName, image.SoftwareVersions = _MAKER, "SSCF", version
        image.BurnedInAnnotation = "NO"
        image.SeriesDate = image.ContentDate = image.InstanceCreationDate = now.strftime("%Y%m%d")
        image.SeriesTime = image.ContentTime = image.InstanceCreationTime = now.strftime("%H%M%S")
        # nothing was scanned: research mode, no echo
        image.ScanningSequence, image.SequenceVariant, image.ScanOptions = "RM", "NONE", ""
        image.MRAcquisitionType, image.EchoTime, image.EchoTrainLength, image.RepetitionTime = "", None, None, None
        image.Rows, image.Columns = pixels.shape
        image.SamplesPerPixel, image.PhotometricInterpretation, image.PixelRepresentation = 1, "MONOCHROME2", 0
        image.BitsAllocated, image.BitsStored, image.HighBit = 16, 12, 11
        image.WindowCenter, image.WindowWidth = (_FULL_SCALE + 1) / 2, _FULL_SCALE + 1
        image.PixelData = np.ascontiguousarray(pixels).astype("<u2").tobytes()
        image.file_meta = pydicom.dataset.FileMetaDataset()
        image.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        made.append(image)
    return made


def segmentation(mask: np.ndarray, sources: Sequence[Dataset], mask_labels: Mapping[str, int], version: str) -> Dataset:
    """The tumor mask as an object with a binary segment for each class, numbered in the order of ``mask_labels``.

    ``mask`` is Z x rows x columns with these values, ``sources`` are as for ``synthetic_series``.
    """
    codes = pydicom.sr.codedict.codes
    kinds = {"ED": codes.SCT.Edema, "ET": codes.NCIt.EnhancingLesion, "NET": codes.NCIt.NonEnhancingLesion}
    algorithm = highdicom.AlgorithmIdentificationSequence(
        name="SSCF", family=codes.DCM.ArtificialIntelligence, version=version
    )
    ordered = sorted(TUMOR_CLASSES, key=lambda name: mask_labels[name])
    numbers = np.zeros(mask.shape, np.uint8)
    for number, name in enumerate(ordered, start=1):
        numbers[mask == mask_labels[name]] = number
    return highdicom.seg.Segmentation(
        source_images=list(sources),
        pixel_array=numbers,
        segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[
            highdicom.seg.SegmentDescription(
                segment_number=number,
                segment_label=name,
                segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure,
                segmented_property_type=kinds[name],
                algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
                algorithm_identification=algorithm,
            )
            for number, name in enumerate(ordered, start=1)
        ],
        series_instance_uid=pydicom.uid.generate_uid(prefix=None),
        series_number=9100,
        sop_instance_uid=pydicom.uid.generate_uid(prefix=None),
        instance_number=1,
        manufacturer=_MAKER,
        manufacturer_model_name="SSCF",
        software_versions=version,
        device_serial_number="none",
        content_label="TUMOR",
        content_description="Predicted tumor mask (SSCF), not for diagnosis",
        series_description="PREDICTED TUMOR (SSCF), not for diagnosis",
    )
