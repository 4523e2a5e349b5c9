# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Structural similarity of images: a score, and a term of the loss."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

_BELL = [math.exp(-((i - 5) ** 2) / (2 * 1.5**2)) for i in range(11)]
#: Windows of SSIM along one axis: that of Wang et al. (2004), and the default of scikit-image.
GAUSSIAN, UNIFORM = tuple(value / sum(_BELL) for value in _BELL), (1 / 7,) * 7


def window_mean(images: torch.Tensor, spatial_dims: int, window: Sequence[float]) -> torch.Tensor:
    """Mean under a separable window (weights along one axis) over the last dimensions, inside the image alone.

    Every spatial side becomes shorter by the length of the window less 1. A sum of shifted copies along one axis after
    the other is some fifty times as fast on a CPU as a dense 3-D convolution.
    """
    for axis in range(-spatial_dims, 0):
        length = images.shape[axis] - len(window) + 1
        mean = images.narrow(axis, 0, length) * window[0]
        for shift, weight in enumerate(window[1:], start=1):
            mean.add_(images.narrow(axis, shift, length), alpha=weight)
        images = mean
    return images


def ssim_map(
    prediction: torch.Tensor,
    target: torch.Tensor,
    spatial_dims: int,
    margin: int = 0,
    data_range: torch.Tensor | float = 1.0,
    window: Sequence[float] = GAUSSIAN,
    unbiased: bool = False,
) -> torch.Tensor:
    """Structural similarity at every window position, K1 = 0.01, K2 = 0.03.

    Args:
        prediction: any leading dimensions, then the spatial ones.
        target: the same shape.
        spatial_dims: 2 or 3.
        margin: background (0) added on every side; half a window gives a value for every pixel, 0 one for each window
            in the image.
        data_range: of the intensities.
        window: weights along one axis.
        unbiased: variances are those of a sample.

    Returns:
        The map, every spatial side longer by what was added less what the window reaches.
    """
    prediction, target = (F.pad(image, [margin] * (2 * spatial_dims)) for image in (prediction, target))
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    mean_g, mean_t, squares, product = (
        window_mean(image, spatial_dims, window)
        for image in (prediction, target, prediction**2 + target**2, prediction * target)
    )
    count = len(window) ** spatial_dims
    factor = count / (count - 1) if unbiased else 1.0
    means_product, means_squares = mean_g * mean_t, mean_g**2 + mean_t**2
    luminance = (2 * means_product + c1) / (means_squares + c1)
    return luminance * (2 * factor * (product - means_product) + c2) / (factor * (squares - means_squares) + c2)


def slice_ssim_map(prediction: torch.Tensor, target: torch.Tensor, margin: int = 0) -> torch.Tensor:
    """``ssim_map`` of ... x H x W slices with the defaults of scikit-image's ``structural_similarity``."""
    return ssim_map(prediction, target, 2, margin, window=UNIFORM, unbiased=True)
