# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""From the files of a study to the scaled, cropped volume that the network sees, and the way back for ``Invertd``."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, cast

import nibabel as nib
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import (
    CastToTyped,
    Compose,
    CropForeground,
    CropForegroundd,
    MapTransform,
    Orientation,
    Orientationd,
    ResampleToMatch,
    Spacingd,
)
from monai.utils import convert_to_dst_type, ensure_tuple, ensure_tuple_rep

from ..contrasts import CONTRAST_KEYS, FAILURE_KEY, MASK_KEY, NUM_CONTRASTS, TUMOR_CLASSES, StudyError, find_study_error
from .formats import read_volume

#: Voxel sizes in mm that a study can have; a header in meters or micrometers is outside.
VOXEL_SIZES = (0.05, 50.0)
#: Greatest distance in mm between the corners of two volumes of one study.
GRID_TOLERANCE = 1e-2
#: Share of negative among the voxels other than 0 up to which negative values count as interpolation's overshoot and
#: are set to 0; above it the volume is taken for z-scored and refused.
MAX_NEGATIVE = 0.05
#: Mask coding of BraTS: enhancing tumor is 4 up to 2021 and 3 from 2023 on, never both in one file.
BRATS_MASK_VALUES = {"NET": (1,), "ED": (2,), "ET": (4, 3)}

_REPAIR = "repair the header or export the file again"
#: Endings of NIfTI; ITK keeps fields of its header when it writes another format.
_NIFTI = (".nii", ".nii.gz", ".hdr", ".img", ".img.gz")
#: Codes of complex numbers in a NIfTI header.
_COMPLEX = (32, 1792, 2048)

logger = logging.getLogger(__name__)


class StudyCompose(Compose):
    """``monai.transforms.Compose`` that lets a ``StudyError`` through as it is; arguments as there."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().__call__(*args, **kwargs)
        except RuntimeError as error:
            reason = find_study_error(error)
            if reason is None:
                raise
            raise reason from None


class LoadStudyd(MapTransform):
    """Read and check the files of one study and stack them; what is missing is filled with zeros.

    The item maps contrast keys to paths; absent keys and ``None`` mean a missing contrast. The paths stay in the item.
    Added entries (X x Y x Z is the shape on file):

    - ``"image"``: 4 x X x Y x Z float32 ``MetaTensor`` in the order of ``CONTRAST_KEYS``, raw intensities >= 0;
    - ``"label"``: 1 x X x Y x Z uint8 ``MetaTensor``, 0 background, k + 1 for ``TUMOR_CLASSES[k]``, 0 without mask;
    - ``"has_contrast"``: bool tensor of 4; ``"has_mask"``: bool scalar tensor;
    - ``"grid"``: the key of the contrast whose grid this is.

    Args:
        mask_values: tumor class (or ``"background"``) to the value or values that mean it in a mask file. ``None`` is
            the BraTS coding: 1 is NET, 2 is ED, and 4 or 3 is ET; a file with both is refused, because 4 is then
            something else (BraTS 2024 codes resection cavities so). A binary lesion mask needs its own coding, for
            example ``{"ED": 1}``.
        resample: take a volume on another grid to that of the reference, by the affines on file, instead of refusing
            it: True for the first contrast as the reference, or the key of a contrast, which is the reference where a
            study has it. Volumes on the same grid whose axes are flipped or in another order are always taken.
        register: lays each contrast on the reference, where it is resampled, see ``RigidRegistration``; ``None`` leaves
            it where it is. A mask belongs to the reference and stays where it is.

    Raises:
        ValueError: when ``mask_values`` or ``resample`` make no sense.
        StudyError: from the call, when there is no contrast, one file is given twice, or a file is missing, unreadable,
            damaged, not 3-D, complex, not finite, negative, empty, constant, without a sound affine in mm, of another
            shape or position than the others, or holds an unknown mask value.
    """

    def __init__(
        self,
        mask_values: Mapping[str, int | Sequence[int]] | None = None,
        resample: bool | str | None = False,
        register: Callable[[MetaTensor, MetaTensor], np.ndarray] | None = None,
    ) -> None:
        super().__init__(CONTRAST_KEYS, allow_missing_keys=True)
        self.one_code_per_class = mask_values is None
        self.mask_values = {
            name: tuple(ensure_tuple(codes))
            for name, codes in (BRATS_MASK_VALUES if mask_values is None else mask_values).items()
        }
        unknown = set(self.mask_values) - {*TUMOR_CLASSES, "background"}
        codes = [code for values in self.mask_values.values() for code in values]
        if unknown or len(set(codes)) < len(codes) or any(c == 0 for c in codes):
            raise ValueError(
                f"mask_values must map {', '.join(TUMOR_CLASSES)} or background to distinct values other than 0, "
                f"got {self.mask_values}."
            )
        if resample not in (None, False, True, *CONTRAST_KEYS):
            raise ValueError(f"resample must be True, False or one of {', '.join(CONTRAST_KEYS)}, got {resample!r}.")
        self.resample = resample
        self.register = register

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        if d.get(FAILURE_KEY):
            raise StudyError(d[FAILURE_KEY])
        paths = {key: str(d[key]) for key in CONTRAST_KEYS if d.get(key)}
        if not paths:
            raise StudyError(
                f"Study {d.get('study', d.get(MASK_KEY, '(without name)'))} has no contrast: give at least one of "
                f"{', '.join(CONTRAST_KEYS)}."
            )
        reference = self.resample if self.resample in paths else next(iter(paths))
        first_path = paths[reference]
        if len({os.path.realpath(path) for path in paths.values()}) < len(paths):
            raise StudyError(f"{' and '.join(paths)} name one file twice: give each contrast its own file.")
        first = self._read_contrast(first_path)
        image = torch.zeros((NUM_CONTRASTS, *first.shape), dtype=torch.float32)
        for channel, key in enumerate(CONTRAST_KEYS):
            if key == reference:
                image[channel] = first.as_tensor()
            elif key in paths:
                volume = self._read_contrast(paths[key])
                if self.register is not None:
                    logger.info("Study %s: registering %s to %s", d.get("study", first_path), key, reference)
                    volume.affine = torch.as_tensor(self.register(first, volume))
                image[channel] = self._on_grid(first, first_path, volume, paths[key]).as_tensor()
        d["grid"] = reference
        meta = dict(first.meta)
        # of a stack of files; with it Spacingd takes every entry image_... of the item, such as the image_path of MONAI
        # Label, for metadata
        meta.pop("filename_or_obj", None)
        d["image"] = MetaTensor(image, meta=meta)
        d["has_contrast"] = torch.tensor([key in paths for key in CONTRAST_KEYS])

        mask_path = d.get(MASK_KEY)
        label = torch.zeros(image.shape[1:], dtype=torch.uint8)
        if mask_path:
            mask = self._on_grid(first, first_path, self._read(str(mask_path)), str(mask_path), is_mask=True)
            label = self._internal_classes(mask.as_tensor(), str(mask_path))
        d["label"] = MetaTensor(label[None], meta=dict(meta))
        d["has_mask"] = torch.tensor(bool(mask_path))
        return d

    def _read(self, path: str) -> MetaTensor:
        """One file as a 3-D float32 ``MetaTensor``."""
        if not os.path.exists(path):
            raise StudyError(f"{path} does not exist: correct the path or leave this file out.")
        if not os.access(path, os.R_OK):
            raise StudyError(f"{path} may not be read: change its permissions or leave this file out.")
        try:
            volume = read_volume(path)
        except StudyError:
            raise
        except np.linalg.LinAlgError as error:
            raise StudyError(f"{path} has no valid affine in its header: {_REPAIR}.") from error
        except Exception as error:  # readers raise whatever their decoders do
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160].rstrip(".")
            raise StudyError(
                f"{path} cannot be read ({reason}): it is damaged or of another format, so copy or export it again."
            ) from error
        if volume.ndim > 3 and set(volume.shape[3:]) == {1}:
            meta = dict(volume.meta)
            volume = MetaTensor(volume.as_tensor().reshape(volume.shape[:3]), meta=meta)
        if volume.ndim != 3:
            raise StudyError(
                f"{path} is {volume.ndim}-D with shape {_times(volume.shape)}, not one 3-D volume: split it into one "
                "file for each contrast."
            )
        # a file with a trailing axis must leave the same trace as one without
        volume.meta["original_channel_dim"] = float("nan")
        if int(volume.meta.get("datatype", 0)) in _COMPLEX:
            raise StudyError(f"{path} holds complex numbers: give the magnitude image.")
        if "sform_code" in volume.meta and path.lower().endswith(_NIFTI):
            # the reader puts the qform, coded or not, in the place of an sform that does not fit the voxel sizes
            # copies: one tensor of the header's memory under two names came out of loading processes as zeros at times
            volume.affine = volume.affine.new_tensor(cast(nib.Nifti1Image, nib.load(path)).affine)
            volume.meta["original_affine"] = volume.affine.clone()
        axes = volume.affine[:3, :3]
        sizes = axes.norm(dim=0)
        if not volume.affine.isfinite().all() or torch.linalg.det(axes).abs() <= 1e-2 * sizes.prod():
            raise StudyError(f"{path} has no valid affine in its header: {_REPAIR}.")
        if not ((sizes > VOXEL_SIZES[0]) & (sizes < VOXEL_SIZES[1])).all():
            raise StudyError(
                f"{path} has voxels of {' x '.join(f'{size:.3g}' for size in sizes.tolist())} mm, so its header "
                f"seems to be in another unit: {_REPAIR}."
            )
        return volume

    def _read_contrast(self, path: str) -> MetaTensor:
        """One contrast as float32, checked, with overshoot below 0 removed."""
        volume = self._read(path)
        values = volume.as_tensor()
        # NaN passes through both extrema
        if not torch.isfinite(torch.stack(values.aminmax())).all():
            raise StudyError(f"{path} holds NaN or infinite values, or some above 3.4e38: repair or export it again.")
        # rescaling leaves a background of some -1e-7
        negative = int(torch.count_nonzero(values < -1e-4 * values.abs().max()))
        if negative > MAX_NEGATIVE * int(torch.count_nonzero(values)):
            raise StudyError(
                f"{path} has negative values in {negative} voxels as a z-scored volume has: give the skull-stripped "
                "volume before intensity normalization, with background 0."
            )
        values.clamp_(min=0)
        foreground = int(torch.count_nonzero(values))
        if foreground == 0:
            raise StudyError(f"{path} is 0 everywhere: it holds no brain, so export it again or leave it out.")
        if float(values.max()) == float(values[values > 0].min()):
            raise StudyError(f"{path} holds one value only, as a mask does: give the volume itself.")
        return volume

    def _on_grid(
        self, first: MetaTensor, first_path: str, other: MetaTensor, path: str, is_mask: bool = False
    ) -> MetaTensor:
        """``other`` on the grid of ``first``, axes in its order, resampled if that is asked for; else refused."""
        axcodes = nib.aff2axcodes(first.affine.numpy())
        if nib.aff2axcodes(other.affine.numpy()) != axcodes:
            other = cast(MetaTensor, Orientation(axcodes=axcodes, labels=None)(other[None])[0])
        same_grid = first.shape == other.shape and torch.allclose(first.affine, other.affine, atol=1e-3)
        if (self.resample or self.register is not None) and not same_grid:
            mode = "nearest" if is_mask else "bilinear"
            moved = ResampleToMatch(mode, padding_mode="zeros", dtype=np.float32)(other[None], first[None])
            other = cast(MetaTensor, moved[0])
            # what interpolation leaves of nothing is no brain
            other[other < 1e-4 * other.max()] = 0
            if not is_mask and not other.any():
                raise StudyError(f"{path} and {first_path} have no place in common: register the files of the study.")
        if first.shape != other.shape:
            raise StudyError(
                f"{path} has shape {_times(other.shape)} but {first_path} has {_times(first.shape)}: register all "
                "files of a study to one grid, or give --resample True if they are registered already."
            )
        upper = np.asarray(first.shape) - 1
        corners = np.asarray([[*(upper * bits), 1.0] for bits in np.ndindex(2, 2, 2)]).T
        offset = (first.affine.numpy() - other.affine.numpy()) @ corners
        distance = float(np.linalg.norm(offset[:3], axis=0).max())
        if distance > GRID_TOLERANCE:
            raise StudyError(
                f"{path} and {first_path} have different affines (corners up to {distance:.3g} mm apart): register "
                "all files of a study to one grid, or give --resample True if they are registered already."
            )
        return other

    def _internal_classes(self, mask: torch.Tensor, path: str) -> torch.Tensor:
        """Label map of the bundle from the values on file."""
        present = torch.unique(mask[mask != 0]).tolist()
        known = {code for codes in self.mask_values.values() for code in codes}
        unknown = [value for value in present if value not in known]
        if unknown:
            shown = ", ".join(f"{value:g}" for value in unknown[:5]) + (", ..." if len(unknown) > 5 else "")
            raise StudyError(
                f"{path} holds the unknown label value {shown}: expected are 0, "
                f"{', '.join(str(v) for v in sorted(known))}; set mask_values to the coding of your masks."
            )
        for name, codes in self.mask_values.items():
            both = [code for code in codes if code in present]
            if self.one_code_per_class and len(both) > 1:
                raise StudyError(
                    f"{path} holds the values {' and '.join(str(v) for v in sorted(both))}, which both mean {name} in "
                    "the BraTS coding: set mask_values to the coding of your masks."
                )
        if self.one_code_per_class and present == [1]:
            logger.warning("%s holds no value but 1, read as NET; a binary lesion mask needs mask_values.", path)
        label = torch.zeros(mask.shape, dtype=torch.uint8)
        for index, name in enumerate(TUMOR_CLASSES, start=1):
            for code in self.mask_values.get(name, ()):
                label[mask == code] = index
        return label


class BrainMaskd(MapTransform):
    """Add the union of the available brains (voxels > 0 in any contrast), to be called before scaling.

    The mask gives the crop, the brain fraction of a slice, and the region outside of which every method is given the
    same background. It is a 1 x X x Y x Z uint8 ``MetaTensor``. A study without a brain is refused.

    Args:
        keys: key of the stacked contrasts, intensities >= 0.
        brain_key: key of the mask.
    """

    def __init__(self, keys: KeysCollection = "image", brain_key: str = "brain") -> None:
        super().__init__(keys)
        self.brain_key = brain_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            # the maximum first: a comparison of every contrast would be a volume of its own
            d[self.brain_key] = (d[key].amax(dim=0, keepdim=True) > 0).to(torch.uint8)
            if not d[self.brain_key].any():
                raise StudyError(f"Study {d.get('study')} holds no brain after resampling: check its affine.")
        return d


class ScaleBraind(MapTransform):
    """Scale each contrast by a percentile of its brain: divide, clip to [0, 1], map to [-1, 1].

    Background and missing contrasts become -1. The percentiles are kept in ``scale_key`` (float32 tensor of 4, raw
    intensity that became 1; 0 where the contrast is missing), so that a contrast can be given its intensities back.

    Args:
        keys: key of the stacked contrasts, 4 x X x Y x Z with intensities >= 0.
        percentile: percentile of the voxels > 0, in (0, 100].
        scale_key: key of the percentiles.
        clip: else what is brighter than the percentile exceeds 1.
    """

    def __init__(
        self,
        keys: KeysCollection = "image",
        percentile: float = 99.5,
        scale_key: str = "intensity_scale",
        clip: bool = True,
    ) -> None:
        super().__init__(keys)
        self.clip = clip
        self.percentile = percentile
        self.scale_key = scale_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            values = d[key].as_tensor() if isinstance(d[key], MetaTensor) else d[key]
            scaled = torch.full_like(values, -1)
            scale = torch.zeros(len(values))
            for channel, volume in enumerate(values):
                # numpy, because torch.quantile refuses more than 2^24 values
                brain = volume[volume > 0].numpy()
                if brain.size:
                    scale[channel] = float(np.percentile(brain, self.percentile))
                    torch.div(volume, scale[channel], out=scaled[channel])
                    scaled[channel].clamp_(0, 1 if self.clip else None).mul_(2).sub_(1)
            d[key] = convert_to_dst_type(scaled, d[key])[0]
            d[self.scale_key] = scale
        return d


class ScaleSliced(MapTransform):
    """Scale every axial slice of every contrast by its own minimum and maximum to [-1, 1], as the paper's code does.

    A constant slice, and so every slice of a missing contrast, becomes -1.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            low = d[key].amin(dim=(1, 2), keepdim=True)
            span = d[key].amax(dim=(1, 2), keepdim=True) - low
            d[key] = (d[key] - low) / torch.where(span > 0, span, 1) * 2 - 1
        return d


class AxialBrainCrop(CropForeground):
    """Crop and pad x and y around the brain and leave z as it is; array version of ``CropBraind``.

    Args:
        size: wanted size in x and y, in pixels.
        divisor: a brain that is wider than ``size`` gets the next multiple of this.
    """

    def __init__(self, size: Sequence[int] | int = 192, divisor: int = 16) -> None:
        super().__init__()
        self.size = ensure_tuple_rep(size, 2)
        self.divisor = divisor
        if any(s <= 0 or s % divisor for s in self.size):
            raise ValueError(f"The image size must be a positive multiple of {divisor}, got {self.size}.")

    def compute_bounding_box(self, img: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Box of the wanted size, centered on the foreground of ``img`` (1 x X x Y x Z), whole in z."""
        start, end = super().compute_bounding_box(img)
        for axis, wanted in enumerate(self.size):
            extent = int(end[axis] - start[axis])
            width = max(wanted, math.ceil(extent / self.divisor) * self.divisor)
            start[axis] -= (width - extent) // 2
            end[axis] = start[axis] + width
        start[2], end[2] = 0, img.shape[3]
        return start, end


class CropBraind(CropForegroundd):
    """Bring x and y to the size of the network, centered on the brain, which is never cut; z stays as it is.

    Invertible: the inverse puts 0 where voxels were cropped, so invert a prediction in [0, 1], not in [-1, 1].
    ``CropForegroundd`` and ``SpatialPadd`` would give the same, but their inverse drops what is predicted beside the
    brain, and resampling back reads that at the brain's border.

    Args:
        keys: keys to crop, C x X x Y x Z; the mask is ``brain``.
        size: size in x and y, multiples of 16; a wider brain gets the next multiple.
        pad_value: what is outside the volume, one value or one for each key.
    """

    def __init__(
        self, keys: KeysCollection, size: Sequence[int] | int = 192, pad_value: Sequence[float] | float = 0
    ) -> None:
        super().__init__(keys, "brain", start_coord_key=None, end_coord_key=None)
        self.cropper = AxialBrainCrop(size)
        self.pad_value = ensure_tuple_rep(pad_value, len(self.keys))

    def __call__(self, data: Mapping[Hashable, torch.Tensor], lazy: bool | None = None) -> dict[Hashable, torch.Tensor]:
        d = dict(data)
        start, end = self.cropper.compute_bounding_box(d[self.source_key])
        for key, value in self.key_iterator(d, self.pad_value):
            d[key] = self.cropper.crop_pad(d[key], start, end, mode="constant", value=value)
        return d


class AddAvailabilityd(MapTransform):
    """Append the four planes of 0/1 availability: 4 channels, scaled to [-1, 1], become the 8 of the network's input.

    What is available is said by ``has_contrast`` (bool tensor of 4). The contrasts it rules out are set to -1, so that
    a complete study can be shown as an incomplete one by changing this entry alone.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            image = d[key].as_tensor() if isinstance(d[key], MetaTensor) else d[key]
            available = torch.as_tensor(d["has_contrast"], dtype=torch.bool, device=image.device)
            # filled in place: taking fresh memory for a volume costs more than computing it
            planes = image.new_empty((2 * len(image), *image.shape[1:]))
            for channel, given in enumerate(available.tolist()):
                planes[channel] = image[channel] if given else -1.0
                planes[len(image) + channel] = float(given)
            d[key] = convert_to_dst_type(planes, d[key])[0]
        return d


def study_transforms(
    image_size: Sequence[int] | int = 192,
    scaling: str = "brain",
    spacing: float | None = 1.0,
    percentile: float = 99.5,
    mask_values: Mapping[str, int | Sequence[int]] | None = None,
    clip: bool = True,
    resample: bool | str | None = False,
    register: Callable[[MetaTensor, MetaTensor], np.ndarray] | None = None,
) -> StudyCompose:
    """The preprocessing of this bundle, the same for training, evaluation and inference.

    Read and check, turn to RAS, resample in the plane where needed, scale, crop and pad. Afterwards ``image`` is
    4 x X x Y x Z float32 in [-1, 1], ``label`` 1 x X x Y x Z uint8 and ``brain`` 1 x X x Y x Z uint8, axial slices are
    ``image[..., z]``, and ``Invertd`` with this transform and ``orig_keys="image"`` takes a prediction in [0, 1] back
    to the grid on file.

    Args:
        image_size: size in x and y after cropping and padding, multiples of 16.
        scaling: ``"brain"`` (``ScaleBraind``) or ``"per_slice"`` (``ScaleSliced``).
        spacing: spacing in x and y, in mm; a study within 1% of it is not resampled. ``None`` keeps every spacing.
        percentile: of ``ScaleBraind``.
        mask_values, resample, register: of ``LoadStudyd``.
        clip: of ``ScaleBraind``. The slice cache is made without, since scores need the target as it is; what it shows
            to networks is clipped.

    Returns:
        An invertible composition of transforms for one datalist item.

    Raises:
        ValueError: when ``scaling``, ``image_size`` or ``spacing`` is not one of the above.
    """
    scalings = {"brain": ScaleBraind("image", percentile, clip=clip), "per_slice": ScaleSliced("image")}
    if scaling not in scalings:
        raise ValueError(f"scaling must be one of {', '.join(scalings)}, got {scaling!r}.")
    if spacing is not None and not spacing > 0:
        raise ValueError(f"spacing must be greater than 0 mm or null, got {spacing!r}.")
    grids = ("image", "label")
    resampling = []
    if spacing is not None:
        near = 0.01 * spacing
        resampling = [
            Spacingd(
                grids,
                pixdim=(spacing, spacing, -1),  # -1 leaves z as it is
                min_pixdim=(spacing - near, spacing - near),
                max_pixdim=(spacing + near, spacing + near),
                # linear weights are never negative, so neither is the result
                mode=("bilinear", "nearest"),
                # outside the field of view lies what is at its edge; with zeros the edge itself would be lost
                padding_mode="border",
                dtype=np.float32,
            ),
            CastToTyped("label", dtype=torch.uint8),
        ]
    return StudyCompose(
        [
            LoadStudyd(mask_values=mask_values, resample=resample, register=register),
            Orientationd(grids, axcodes="RAS", labels=None),
            *resampling,
            BrainMaskd("image"),
            scalings[scaling],
            CropBraind((*grids, "brain"), size=image_size, pad_value=(-1, 0, 0)),
        ]
    )


def _times(shape: Sequence[int]) -> str:
    return " x ".join(str(int(n)) for n in shape)
