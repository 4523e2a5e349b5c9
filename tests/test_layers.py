# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Encoders tap features before normalization, decoders leave them alone, and nothing mixes samples or contrasts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from builders import generator

from scripts.networks.blocks import Decoder, Encoder, masked_mean, scale_statistics

CHANNELS = (4, 8, 8, 8, 16)


def test_masked_mean_is_the_mean_over_the_named_contrasts_whatever_the_others_hold() -> None:
    features = torch.randn((16, 4, 3, 2, 5), generator=generator(0), dtype=torch.float64)
    mask = torch.tensor([[bool(row >> i & 1) for i in range(4)] for row in range(16)])
    features[~mask] = float("nan")
    result = masked_mean(features, mask)
    for b in range(16):
        kept = [features[b, i].numpy() for i in range(4) if mask[b, i]]
        expected = sum(kept) / len(kept) if kept else np.zeros((3, 2, 5))
        np.testing.assert_allclose(result[b].numpy(), expected, rtol=0, atol=1e-14)


def test_masked_mean_gives_left_out_contrasts_a_zero_and_finite_gradient() -> None:
    features = torch.randn((2, 4, 3, 4), generator=generator(0))
    features[0, 1] = float("nan")
    features.requires_grad_()
    mask = torch.tensor([[True, False, True, False], [False, True, True, True]])
    masked_mean(features, mask).sum().backward()
    assert features.grad is not None
    expected = torch.tensor([[0.5, 0, 0.5, 0], [0, 1 / 3, 1 / 3, 1 / 3]])[:, :, None, None].expand(features.shape)
    torch.testing.assert_close(features.grad, expected)


@pytest.mark.parametrize("space", [(6, 5), (4, 3, 2)], ids=["2d", "3d"])
def test_statistics_equal_numpy(space: tuple[int, ...]) -> None:
    """The mu and sigma of eq. 8: over space, for each contrast and channel, with epsilon under the root."""
    features = torch.randn((3, 4, 5, *space), generator=generator(1)) * 3 - 2
    mean, std = scale_statistics([features], eps=1e-3)
    values = features.double().numpy()
    for b in range(3):
        for i in range(4):
            for c in range(5):
                plane = values[b, i, c]
                mu = plane.sum() / plane.size
                sigma = np.sqrt(((plane - mu) ** 2).sum() / plane.size + 1e-3)
                assert mean[b, i, c].item() == pytest.approx(mu, abs=1e-5)
                assert std[b, i, c].item() == pytest.approx(sigma, rel=1e-5)


def test_statistics_are_float32_for_half_precision_features() -> None:
    features = (torch.randn((1, 1, 2, 64, 64), generator=generator(2)) + 40).to(torch.bfloat16)
    mean, std = scale_statistics([features])
    assert mean.dtype == torch.float32 and std.dtype == torch.float32
    exact = features.double()
    torch.testing.assert_close(mean.double(), exact.mean(dim=(3, 4)), rtol=1e-5, atol=0)
    torch.testing.assert_close(std.double(), exact.std(dim=(3, 4), correction=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spatial_dims,size", [(2, (32, 48)), (3, (16, 32, 16))], ids=["2d", "3d"])
def test_encoder_halves_the_resolution_at_each_scale_and_decoder_restores_it(
    spatial_dims: int, size: tuple[int, ...]
) -> None:
    encoder, decoder = Encoder(spatial_dims, 4, CHANNELS), Decoder(spatial_dims, CHANNELS, 3)
    features = encoder(torch.randn((2, 4, *size), generator=generator(3)))
    assert [tuple(f.shape) for f in features] == [(2, c, *(s // 2**j for s in size)) for j, c in enumerate(CHANNELS)]
    assert decoder(features).shape == (2, 3, *size)


def active(x: torch.Tensor) -> torch.Tensor:
    return F.leaky_relu(x, 0.1)


def normalized(x: torch.Tensor) -> torch.Tensor:
    return active(F.group_norm(x, 4))


def test_encoder_equals_the_written_out_one_and_taps_each_feature_directly_behind_a_convolution() -> None:
    """F^j passes no normalization or activation, neither before the tap nor in place after it (eq. 8 lives on it)."""
    encoder = Encoder(2, 4, CHANNELS)
    x = torch.randn((1, 4, 32, 32), generator=generator(4))
    for j, (stage, tapped) in enumerate(zip(encoder.stages, encoder(x), strict=True)):
        first, last = (m for m in stage.modules() if isinstance(m, torch.nn.Conv2d))
        x = normalized(F.conv2d(normalized(x) if j else x, first.weight, stride=2 if j else 1, padding=1))
        x = F.conv2d(x, last.weight, last.bias, padding=1)
        torch.testing.assert_close(tapped, x)


def test_decoder_leaves_the_features_it_is_given_unchanged() -> None:
    decoder = Decoder(2, CHANNELS, 1)
    features = [torch.randn((1, c, 32 // 2**j, 32 // 2**j), generator=generator(j)) for j, c in enumerate(CHANNELS)]
    copies = [f.clone() for f in features]
    decoder(features)
    for feature, copy in zip(features, copies, strict=True):
        assert torch.equal(feature, copy)


def test_decoder_equals_the_written_out_one_and_normalizes_no_feature_on_entry() -> None:
    """A normalization on entry would undo the channel statistics that AdaIN (eq. 8) injects."""
    decoder = Decoder(2, CHANNELS, 1)
    features = [torch.randn((1, c, 32 // 2**j, 32 // 2**j), generator=generator(j)) for j, c in enumerate(CHANNELS)]
    x = active(features[-1])
    for stage, skip in zip(decoder.stages, features[-2::-1], strict=True):
        x = torch.cat([stage.up(x), active(skip)], dim=1)
        for block in stage.convs:
            x = normalized(F.conv2d(x, block.conv.weight, padding=1))
    torch.testing.assert_close(decoder(features), decoder.head(x))
