# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Histogram matching against scikit-image, the order of similarity, and what the reference_method may read."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from builders import generator
from skimage.exposure import match_histograms

from scripts.contrasts import CONTRASTS
from scripts.evaluation.reference_methods import LEVELS, SIMILARITY, NearestContrast, brain_histogram, mean_histograms


def on_levels(shape: tuple[int, ...], seed: int, power: float = 1.0) -> torch.Tensor:
    """Values above background that lie exactly on 400 of the levels."""
    drawn = (torch.rand(shape, generator=generator(seed)) ** power * 400).floor() * 10 + 1
    return drawn / ((LEVELS - 1) / 2) - 1


def study(seed: int, background: float = 0.3) -> torch.Tensor:
    """3 x 4 x 20 x 20: contrasts with different histograms and one brain."""
    images = torch.stack([on_levels((3, 20, 20), 10 * seed + k, 0.5 + k) for k in range(4)], dim=1)
    outside = torch.rand((3, 1, 20, 20), generator=generator(seed + 99)) < background
    return torch.where(outside, -1.0, images)


def test_order_of_similarity_names_every_other_contrast() -> None:
    assert tuple(SIMILARITY) == CONTRASTS
    for target, order in SIMILARITY.items():
        assert sorted((target, *order)) == sorted(CONTRASTS)
    assert [order[0] for order in SIMILARITY.values()] == ["T2", "T1ce", "T1", "FLAIR"]


def test_histogram_counts_the_brain_alone() -> None:
    histogram = brain_histogram(torch.tensor([-1.0, -1.0, 0.0, 0.0, 1.0, -1 + 2 / (LEVELS - 1)]))
    expected = torch.zeros(LEVELS, dtype=torch.float64)
    expected[[1, (LEVELS - 1) // 2, LEVELS - 1]] = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64)
    assert torch.equal(histogram, expected)
    assert not brain_histogram(torch.full((3,), -1.0)).any()


def test_every_study_counts_the_same_in_the_mean_histogram() -> None:
    studies = [
        {"target": study(0), "has_contrast": torch.ones(4, dtype=torch.bool)},
        {"target": study(1, background=0.9), "has_contrast": torch.tensor([True, False, True, True])},
    ]
    means = mean_histograms(studies)
    one, other = (torch.stack([brain_histogram(s["target"][:, k]) for k in range(4)]) for s in studies)
    expected = (one + other) / 2
    expected[1] = one[1]
    torch.testing.assert_close(means, expected)


@pytest.mark.parametrize(
    "given", [c for n in (1, 2, 3) for c in itertools.combinations(range(4), n)], ids=lambda c: "+".join(map(str, c))
)
def test_nearest_contrast_is_matched_and_the_missing_ones_are_not_read(given: tuple[int, ...]) -> None:
    training = study(3)
    histograms = torch.stack([brain_histogram(training[:, k]) for k in range(4)])
    images = study(4)
    available = torch.tensor([k in given for k in range(4)]).expand(3, 4)
    shown = torch.where(available[..., None, None], images, torch.nan)
    result = NearestContrast(histograms)(shown, available)
    assert result.shape == images.shape and not result.isnan().any()
    for k, name in enumerate(CONTRASTS):
        if k in given:
            assert torch.equal(result[:, k], images[:, k])
            continue
        source = images[:, next(i for i in map(CONTRASTS.index, SIMILARITY[name]) if i in given)]
        expected = source.double().numpy().copy()
        brain = expected > -1
        reference = training[:, k].double().numpy()
        expected[brain] = match_histograms(expected[brain], reference[reference > -1])
        np.testing.assert_allclose(result[:, k].numpy(), expected, atol=1e-6)


def test_contrast_that_no_training_study_has_is_copied() -> None:
    images = study(5)
    result = NearestContrast(torch.zeros(4, LEVELS))(images, torch.tensor([[True, False, False, False]]).expand(3, 4))
    assert torch.equal(result[:, 3], images[:, 0])
