# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""What a score means: the protocols under which a synthesized contrast is compared with the true one.

Every protocol takes predictions in [0, 1] and target in the same scaling, and gives one value for each study, contrast,
region and score. ``docs/evaluation.md`` has the definitions in words.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import lpips
import torch
from monai.transforms import generate_spatial_bounding_box
from torch import nn

from ..checked_settings import refuse_unknown
from ..contrasts import StudyError, class_masks, region_masks
from ..ssim import GAUSSIAN, UNIFORM, slice_ssim_map, ssim_map
from .metrics import psnr, scale_by_slice

#: What the windows of SSIM reach beyond their centers: that of volumes, and that of slices.
REACH, SLICE_REACH = len(GAUSSIAN) // 2, len(UNIFORM) // 2

#: Sides of boxes are multiples of this, so that boxes of many slices have one size and form one batch.
BOX_STEP = 16

#: One value, a tensor without dimensions, for each region and score; NaN where it is not defined.
Scores = dict[tuple[str, str], torch.Tensor]


class StudyTarget(NamedTuple):
    """What a prediction for one study is compared with.

    Args:
        images: Z x K x H x W, background 0: slices, or a volume along any of its axes, in the scaling of the
            prediction. Volumes are in [0, 1]; slices may exceed 1, where the prediction cannot.
        brain: Z x H x W boolean, union of the true contrasts above background.
        tumor: Z x H x W boolean, whole tumor; all False without a mask.
        slice_axis: axis of a volume, 0 to 2, across which the network's slices lie.
    """

    images: torch.Tensor
    brain: torch.Tensor
    tumor: torch.Tensor
    slice_axis: int = 2


def masked_average(values: torch.Tensor, mask: torch.Tensor, dims: int | tuple[int, ...]) -> torch.Tensor:
    """Mean inside a mask over ``dims``; NaN where the mask is empty, and none from NaN outside it."""
    mask = mask.expand(values.shape)
    return torch.where(mask, values, 0.0).sum(dims) / mask.sum(dims)


def bounding_box(mask: torch.Tensor, margin: int = 0) -> tuple[slice, ...]:
    """Smallest box around a mask that is not empty, with ``margin`` pixels on every side where the array has them."""
    first, stop = generate_spatial_bounding_box(mask[None], margin=margin, allow_smaller=True)
    return tuple(map(slice, first, stop))


def quantile_with_background(values: torch.Tensor, fraction: float, total: int) -> torch.Tensor:
    """Quantile of values >= 0 among which there are zeros that the tensor does not hold, in ``total`` so many.

    It is interpolated between order statistics, as by ``numpy.quantile``: a tensor without dimensions.
    """
    flat = values.flatten()
    position = fraction * (total - 1)
    low = int(position)
    zeros = total - flat.numel()

    def order_statistic(rank: int) -> torch.Tensor:
        return flat.kthvalue(rank - zeros + 1).values if rank >= zeros else flat.new_zeros(())

    lower = order_statistic(low)
    return lower + (position - low) * (order_statistic(min(low + 1, total - 1)) - lower)


def region_dice(prediction: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Dice of WT, TC and ET over all given slices together; both empty = 1, one empty = 0.

    Takes Z x 1 x spatial classes and gives 3 values, in the order of ``REGIONS``.
    """
    ours, theirs = (region_masks(class_masks(c)).transpose(0, 1).flatten(1) for c in (prediction, label))
    both = ours.sum(1) + theirs.sum(1)
    return torch.where(both > 0, 2 * (ours & theirs).sum(1) / both, 1.0)


def slice_dice(prediction: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Dice of WT, TC and ET of each slice, averaged over the slices that have the region, as the published code does.

    Shapes as in ``region_dice``; NaN without a slice that has the region.
    """
    each = torch.stack([region_dice(ours[None], theirs[None]) for ours, theirs in zip(prediction, label, strict=True)])
    return masked_average(each, region_masks(class_masks(label)).flatten(2).any(dim=2), 0)


class PerceptualDistance(nn.Module):
    """LPIPS (Zhang et al. 2018, version 0.1, AlexNet) of gray images, with the features of each image computed once.

    Equal to ``lpips.LPIPS(net="alex")`` of images in [-1, 1] with three equal channels. Sides of at least 31 pixels.

    Args:
        weights: file with the AlexNet of torchvision, a whole checkpoint or its ``features.N.weight`` and ``.bias``
            alone; None lets ``lpips`` download it.
        device: where it computes.

    Raises:
        StudyError: if the weights cannot be had, or do not fit.
    """

    def __init__(self, weights: str | Path | None = None, device: torch.device | str = "cpu") -> None:
        super().__init__()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torchvision's, about how lpips asks for its AlexNet
                self.model = lpips.LPIPS(net="alex", pnet_rand=weights is not None, verbose=False)
        except OSError as error:  # urllib's errors are of this kind
            raise StudyError(
                "LPIPS needs AlexNet, which could not be downloaded: give a file of torchvision's alexnet as "
                "lpips_weights, or leave LPIPS out: --lpips False, or --perceptual_weight 0 of a training."
            ) from error
        if weights is not None:
            self._load(Path(weights).expanduser())
        self.requires_grad_(False).eval().to(device)

    def _load(self, path: Path) -> None:
        if not path.is_file():
            raise StudyError(f"There is no file {path}: correct lpips_weights.")
        try:
            given = torch.load(path, map_location="cpu", weights_only=True)
            # slice2.3.weight of the package is features.3.weight of torchvision
            names = {name: f"features.{name.split('.', 1)[1]}" for name in self.model.net.state_dict()}
            self.model.net.load_state_dict({name: given[source] for name, source in names.items()})
        except Exception as error:  # torch.load raises whatever the unpickler and the zip reader do
            raise StudyError(f"{path} does not hold torchvision's AlexNet: give its alexnet weights.") from error

    def fingerprint(self) -> str:
        """SHA-256 of all weights in use, however they were obtained."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def features(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Normalized features of five layers of images, B x H x W in [0, 1]."""
        scaled = self.model.scaling_layer((2 * images - 1).unsqueeze(1).expand(-1, 3, -1, -1))
        return [lpips.normalize_tensor(layer) for layer in self.model.net(scaled)]

    def forward(self, ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> torch.Tensor:
        """Distances of B pairs from their features; 0 means equal."""
        parts = [lin((a - b) ** 2).mean(dim=(1, 2, 3)) for lin, a, b in zip(self.model.lins, ours, theirs, strict=True)]
        return torch.stack(parts).sum(dim=0)


class Protocol(ABC):
    """A way to compare a synthesized contrast with the true one.

    ``start`` takes the target of a study, once; ``score`` then compares any number of predictions with it.

    Args:
        available: numbers of available contrasts of the scenarios in which the protocol is defined.

    Raises:
        StudyError: for another number than 1 to 3.
    """

    #: One line for each value of the column ``protocol``, for the metadata of an evaluation.
    definitions: Mapping[str, str]
    #: Whether it scores whole studies on the grid on file; else slices on the network's grid.
    whole: bool = False

    def __init__(self, available: Sequence[int] = (1, 2, 3)) -> None:
        refuse_unknown("available", available, (1, 2, 3))
        self.available = tuple(available)

    @abstractmethod
    def start(self, target: StudyTarget) -> None:
        """Prepares what depends on the target alone."""

    @abstractmethod
    def score(self, contrast: int, prediction: torch.Tensor) -> dict[str, Scores]:
        """Scores of one prediction.

        Args:
            contrast: index of the contrast.
            prediction: Z x H x W in [0, 1], background filled.

        Returns:
            For each name in ``definitions`` its scores.
        """


class PerSliceProtocol(Protocol):
    """What the published code computes: 2-D slices, each scaled by its own range, the defaults of scikit-image.

    Target (not clipped) and prediction are both scaled by the minimum and maximum of the true slice in the evaluated
    frame, the prediction is clipped to [0, 1], and the data range is 1. PSNR, SSIM (``slice_ssim_map``, windows inside
    the frame), LPIPS and NMSE (sum of squared errors / sum of squares of the scaled target) are means over slices; a
    slice where the target is constant is left out. Regions, over the slices with tumor: ``tumor_box`` is the crop to
    the bounding box of the whole tumor, each side rounded up to a multiple of ``BOX_STEP``, at least ``min_box``, moved
    into the frame; ``tumor`` is inside the mask (PSNR and NMSE from the errors inside, the SSIM map averaged inside,
    LPIPS of the box with everything outside the mask 0).

    Args:
        lpips: the perceptual distance; None leaves it out.
        min_box: smallest side of a box, in pixels; AlexNet needs 31, the window of SSIM 7.
    """

    definitions = {
        "per_slice": "2-D slices, unclipped target and prediction scaled by the true slice's minimum and maximum, "
        "prediction clipped to that range, data range 1, SSIM with the uniform window of 7 of scikit-image, mean over "
        "slices, as the published code"
    }

    def __init__(self, lpips: PerceptualDistance | None = None, min_box: int = 32) -> None:
        super().__init__()
        self.lpips, self.min_box = lpips, min_box

    def start(self, target: StudyTarget) -> None:
        images, self.tumor = target.images.transpose(0, 1), target.tumor  # K x R x H x W, R x H x W
        self.raw = images
        self.images, self.valid = scale_by_slice(images, images)
        self.has_tumor = self.tumor.any(dim=(1, 2))
        first, size = tumor_boxes(self.tumor, self.min_box)
        self.box = _rectangles(first, size, self.tumor.shape)
        # the windows that lie in the box, by their centers
        self.inner_box = _rectangles(first + SLICE_REACH, size - 2 * SLICE_REACH, self.tumor.shape)
        # boxes of one size form one batch: the slices they are of, the pixels of their rows and of their columns
        self.crops: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        for shape in size[self.has_tumor].unique(dim=0):
            members = (self.has_tumor & (size == shape).all(dim=1)).nonzero().flatten()
            y, x = (torch.arange(n, device=first.device) for n in shape.tolist())
            rows, columns = first[members].unbind(dim=1)
            self.crops.append((members, rows.view(-1, 1, 1) + y.view(1, -1, 1), columns.view(-1, 1, 1) + x))
        self._features: dict[int, list[list[torch.Tensor]]] = {}

    def score(self, contrast: int, prediction: torch.Tensor) -> dict[str, Scores]:
        target, valid = self.images[contrast], self.valid[contrast]
        prediction = scale_by_slice(prediction, self.raw[contrast])[0].clamp(0, 1)
        error, power = (prediction - target) ** 2, target**2
        similarity = slice_ssim_map(prediction, target, margin=SLICE_REACH)
        everywhere = torch.ones_like(self.box)
        # values of slices, and of which slices
        per_slice: dict[tuple[str, str], tuple[torch.Tensor, torch.Tensor]] = {}
        for region, mask, rows in (
            ("whole", everywhere, valid),
            ("tumor_box", self.box, valid & self.has_tumor),
            ("tumor", self.tumor, valid & self.has_tumor),
        ):
            per_slice[region, "psnr"] = psnr(masked_average(error, mask, (1, 2))), rows
            share = torch.where(mask, error, 0.0).sum((1, 2)) / torch.where(mask, power, 0.0).sum((1, 2))
            per_slice[region, "nmse"] = share, rows & share.isfinite()
        inner = torch.zeros_like(everywhere)
        inner[:, SLICE_REACH:-SLICE_REACH, SLICE_REACH:-SLICE_REACH] = True
        for region, mask in (("whole", inner), ("tumor_box", self.inner_box), ("tumor", self.tumor)):
            per_slice[region, "ssim"] = masked_average(similarity, mask, (1, 2)), per_slice[region, "psnr"][1]
        if self.lpips is not None:
            if contrast not in self._features:
                self._features[contrast] = self._perceive(target)
            distances = [
                self.lpips(ours, theirs)
                for ours, theirs in zip(self._perceive(prediction), self._features[contrast], strict=True)
            ]
            per_slice["whole", "lpips"] = distances[0], valid
            for region, parts in (("tumor_box", distances[1::2]), ("tumor", distances[2::2])):
                joined = torch.full_like(distances[0], float("nan"))
                for (members, *_), values in zip(self.crops, parts, strict=True):
                    joined[members] = values
                per_slice[region, "lpips"] = joined, valid & self.has_tumor
        return {"per_slice": {key: masked_average(value, rows, 0) for key, (value, rows) in per_slice.items()}}

    def _perceive(self, images: torch.Tensor) -> list[list[torch.Tensor]]:
        """Features of R x H x W: of whole slices, then of each batch of boxes as they are and with the tumor alone."""
        assert self.lpips is not None
        found = [self.lpips.features(images)]
        for members, rows, columns in self.crops:
            index = members.view(-1, 1, 1), rows, columns
            found.append(self.lpips.features(images[index]))
            found.append(self.lpips.features(torch.where(self.tumor[index], images[index], 0.0)))
        return found


def tumor_boxes(tumor: torch.Tensor, min_box: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes around the tumor of slices: sides rounded up, centered on the bounding box, moved into the frame.

    Of R x H x W boolean first pixel and side, each R x 2 int64; the box of a slice without tumor means nothing.
    """
    first, size = [], []
    for axis in (1, 2):
        length = tumor.shape[axis]
        hit = tumor.any(dim=3 - axis).to(torch.uint8)
        start = hit.argmax(dim=1)
        stop = length - hit.flip(1).argmax(dim=1)
        side = torch.ceil((stop - start) / BOX_STEP).long() * BOX_STEP
        side = side.clamp(min=min_box).clamp(max=length)
        size.append(side)
        first.append(((start + stop - side) // 2).clamp(min=0).minimum(length - side))
    return torch.stack(first, dim=1), torch.stack(size, dim=1)


def _rectangles(first: torch.Tensor, size: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Masks R x H x W of rectangles, from first pixels and sides R x 2."""
    inside = []
    for axis in (0, 1):
        pixel = torch.arange(shape[axis + 1], device=first.device)
        start = first[:, axis : axis + 1]
        inside.append((pixel >= start) & (pixel < start + size[:, axis : axis + 1]))
    return inside[0].unsqueeze(2) & inside[1].unsqueeze(1)


class VolumeProtocol(Protocol):
    """The whole 3-D study on the grid on file, inside the brain.

    1 is the 99.5th percentile of the true volume's brain, the data range is 1. PSNR is of the squared error pooled over
    the brain (union of the true contrasts above background), NMSE the sum of squared errors / the sum of squares of
    the target in it, SSIM the 3-D map (outside the volume is background) averaged over it. Region ``tumor``: the same
    inside the whole tumor. ``jump``, of the whole brain alone, is ``slice_jump``.
    """

    whole = True
    definitions = {
        "volume": "3-D study on the grid on file, 99.5th percentile of the true volume's brain = 1, data range 1, "
        "pooled over the brain mask (union of the true contrasts) or the tumor mask"
    }

    def start(self, target: StudyTarget) -> None:
        self.crop = bounding_box(target.brain | target.tumor)
        self.images = target.images.transpose(0, 1)[(slice(None), *self.crop)]
        self.masks = {"whole": target.brain[self.crop], "tumor": target.tumor[self.crop]}
        self.slice_axis = target.slice_axis

    def score(self, contrast: int, prediction: torch.Tensor) -> dict[str, Scores]:
        target, prediction = self.images[contrast], prediction[self.crop]
        error, power = (prediction - target) ** 2, target**2
        similarity = ssim_map(prediction, target, 3, margin=REACH)
        scores: Scores = {}
        for region, mask in self.masks.items():
            mean_error = masked_average(error, mask, (0, 1, 2))
            scores[region, "psnr"] = psnr(mean_error)
            scores[region, "nmse"] = mean_error / masked_average(power, mask, (0, 1, 2))
            scores[region, "ssim"] = masked_average(similarity, mask, (0, 1, 2))
        scores["whole", "jump"] = slice_jump(prediction, target, self.masks["whole"], self.slice_axis)
        return {"volume": scores}


def slice_jump(prediction: torch.Tensor, target: torch.Tensor, mask: torch.Tensor, slice_axis: int) -> torch.Tensor:
    """How much the brightness of a volume jumps from one slice to the next, beyond what the acquired one does.

    Slices that are synthesized one by one can differ in brightness. The error of a slice less that of the one below it,
    averaged over the voxels that both have in ``mask``, is such a jump; the result is the root of the mean square,
    weighted by these voxels. An offset of the volume and blur within the slices leave it as it is.

    Volumes have any order of axes, the slices lie across ``slice_axis``. In units of the intensities, 0 if slices fit
    together as in ``target``; NaN without a pair.
    """
    size, within = mask.shape[slice_axis] - 1, tuple(axis for axis in range(3) if axis != slice_axis)
    both = mask.narrow(slice_axis, 0, size) & mask.narrow(slice_axis, 1, size)
    step = masked_average((prediction - target).diff(dim=slice_axis), both, within)
    weight = both.sum(dim=within)
    return (torch.nan_to_num(step).square() * weight).sum().div(weight.sum()).sqrt()


class BraSynProtocol(Protocol):
    """The metrics of the BraSyn challenge, which has one contrast missing; studies with tumor only.

    ``brasyn``: target and prediction are clipped to their own 0.5th and 99.5th percentile of the volume on file and
    scaled to [0, 1]; regions ``tumor`` and ``healthy`` are the mean 3-D SSIM over the volume of both images multiplied
    by the tumor mask or by its complement, with the larger intensity range of the two products as data range. The
    zeros dominate both: a prediction without any tumor has a ``tumor`` SSIM near 1.

    ``brasyn_reference``: both are clipped and scaled by the 0.5th and 99.5th percentile of the true brain outside the
    tumor; SSIM map averaged inside the tumor, MSE and PSNR inside the tumor, data range 1.

    """

    whole = True
    definitions = {
        "brasyn": "3-D on the grid on file, each volume scaled by its own 0.5th and 99.5th percentile, mean SSIM over "
        "the volume of the images times the tumor mask (tumor) or its complement (healthy)",
        "brasyn_reference": "3-D, both volumes scaled by the 0.5th and 99.5th percentile of the true brain outside the "
        "tumor, data range 1, SSIM map, MSE and PSNR inside the tumor mask",
    }
    fractions = (0.005, 0.995)

    def __init__(self, available: Sequence[int] = (3,)) -> None:
        super().__init__(available)

    def start(self, target: StudyTarget) -> None:
        self.has_tumor = bool(target.tumor.any())
        if not self.has_tumor:
            return
        self.voxels = target.tumor.numel()
        self.windows = math.prod(n - 2 * REACH for n in target.tumor.shape)
        # with the background in every window that sees anything else
        self.crop = bounding_box(target.brain | target.tumor, 2 * REACH)
        self.images = target.images.transpose(0, 1)[(slice(None), *self.crop)]
        self.tumor = target.tumor[self.crop]
        self.inner = bounding_box(self.tumor, 2 * REACH)
        # what the windows of tumor voxels reach
        self.around = bounding_box(self.tumor, REACH)

    def score(self, contrast: int, prediction: torch.Tensor) -> dict[str, Scores]:
        if not self.has_tumor:
            return {}
        target, prediction = self.images[contrast], prediction[self.crop]
        ours, theirs = (self._own_scale(image) for image in (prediction, target))
        scores: Scores = {("healthy", "ssim"): self._cuboid_ssim(ours, theirs, ~self.tumor)}
        scores["tumor", "ssim"] = self._cuboid_ssim(ours[self.inner], theirs[self.inner], self.tumor[self.inner])

        tissue = target[(target > 0) & ~self.tumor]
        if not tissue.numel():
            return {"brasyn": scores}
        low, high = (quantile_with_background(tissue, fraction, tissue.numel()) for fraction in self.fractions)
        ours, theirs = (((image[self.around] - low) / (high - low)).clamp(0, 1) for image in (prediction, target))
        mask = self.tumor[self.around]
        # what is put around the box is seen only where the brain ends there, and then it is background
        similarity = ssim_map(ours, theirs, 3, margin=REACH)
        error = masked_average((ours - theirs) ** 2, mask, (0, 1, 2))
        reference: Scores = {
            ("tumor", "ssim"): masked_average(similarity, mask, (0, 1, 2)),
            ("tumor", "mse"): error,
            ("tumor", "psnr"): psnr(error),
        }
        return {"brasyn": scores, "brasyn_reference": reference}

    def _own_scale(self, image: torch.Tensor) -> torch.Tensor:
        low, high = (quantile_with_background(image, fraction, self.voxels) for fraction in self.fractions)
        return torch.where(high > low, ((image - low) / (high - low)).clamp(0, 1), 0.0)

    def _cuboid_ssim(self, ours: torch.Tensor, theirs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Mean over the windows of the volume, of which those that see nothing but zeros have an SSIM of 1."""
        ours, theirs = ours * mask, theirs * mask
        data_range = torch.maximum(ours.amax() - ours.amin(), theirs.amax() - theirs.amin())
        similarity = ssim_map(ours, theirs, 3, data_range=data_range)
        return 1 - (1 - similarity).sum() / self.windows
