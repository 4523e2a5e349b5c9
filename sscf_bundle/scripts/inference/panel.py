# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""The picture of one study on the page of a run: acquired and synthetic contrasts with the outline of the mask."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import binary_erosion

from ..contrasts import CONTRAST_KEYS, CONTRAST_NAMES, MASK_KEY

#: Height of a tile in pixels, that of its title, and the color of the outline.
_HEIGHT, _TITLE, _OUTLINE = 220, 16, (255, 60, 60)


def draw_panel(path: Path, data: Mapping[Hashable, Any]) -> None:
    """Draw the axial slice with the largest mask, or else the most brain; the patient's right is on the left.

    Args:
        path: PNG file.
        data: item after ``prediction_transforms`` with ``"acquired"`` (``KeepAcquiredd``).
    """
    affine = data["pred"].affine.numpy()
    volumes = dict(zip(data["output_keys"], data["pred"].as_tensor(), strict=True))
    mask = volumes.pop(MASK_KEY, None)
    acquired = zip(CONTRAST_KEYS, data["acquired"], data["has_contrast"], strict=True)
    # title, volume, what is white
    tiles = [(f"{CONTRAST_NAMES[key]} acquired", volume, 255.0) for key, volume, given in acquired if given]
    tiles += [
        (f"{CONTRAST_NAMES[key]} SYNTHETIC", volume, data["output_scale"][key]) for key, volume in volumes.items()
    ]

    to_ras = nib.orientations.io_orientation(affine)
    sizes = np.linalg.norm(affine[:3, :3], axis=0)[np.argsort(to_ras[:, 0])]
    turned = [np.asarray(volume) for volume in ([] if mask is None else [mask]) + [tile[1] for tile in tiles]]
    turned = [nib.orientations.apply_orientation(volume, to_ras) for volume in turned]
    areas = [np.count_nonzero(volume, axis=(0, 1)) for volume in turned[:2]]
    z = int((areas[0] if areas[0].any() else areas[1]).argmax())
    slices = [volume[:, :, z] for volume in turned]
    columns, rows = np.nonzero(np.any(slices, axis=0))
    slices = [one[columns.min() : columns.max() + 1, rows.min() : rows.max() + 1] for one in slices]
    width = max(1, round(_HEIGHT * slices[0].shape[0] * sizes[0] / (slices[0].shape[1] * sizes[1])))
    outline = None
    if mask is not None:
        inside = _tile(255.0 * (slices.pop(0) > 0), width, Image.Resampling.NEAREST) > 0
        outline = inside & ~binary_erosion(inside)
    panel = Image.new("RGB", (width * len(tiles), _HEIGHT + _TITLE))
    draw = ImageDraw.Draw(panel)
    for number, ((title, _, white), volume) in enumerate(zip(tiles, slices, strict=True)):
        pixels = np.repeat(_tile(volume * (255 / white), width, Image.Resampling.BILINEAR)[..., None], 3, axis=2)
        if outline is not None:
            pixels[outline] = _OUTLINE
        panel.paste(Image.fromarray(pixels), (number * width, _TITLE))
        draw.text((number * width + 3, 2), title, fill=(255, 220, 90) if "SYNTHETIC" in title else (220, 220, 220))
    panel.save(path)


def _tile(values: np.ndarray, width: int, resampling: int) -> np.ndarray:
    """A slice in RAS as rows and columns of the panel: front at the top, right on the left."""
    pixels = Image.fromarray(np.clip(values, 0, 255).astype(np.uint8)[::-1, ::-1].T)
    return np.asarray(pixels.resize((width, _HEIGHT), resampling))
