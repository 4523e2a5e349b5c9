# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Draws are a function of (seed, epoch, sample id, stream) and nothing else, and they are uniform."""

from __future__ import annotations

import hashlib

import pytest
import torch

from scripts.data.randomness import hash_uniform, stable_hash

_WORD = (1 << 64) - 1


def literal_mix(x: int) -> int:
    """The published SplitMix64 finalizer on unsigned Python integers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _WORD
    return x ^ (x >> 31)


def literal_uniform(sample: int, seed: int, epoch: int, stream: str, count: int) -> list[float]:
    digest = hashlib.blake2b(f"{seed}/{epoch}/{stream}".encode(), digest_size=8).digest()
    base = literal_mix((sample & _WORD) ^ int.from_bytes(digest, "big"))
    numbers = []
    for k in range(1, count + 1):
        word = literal_mix((base + k * 0x9E3779B97F4A7C15) & _WORD)
        numbers.append((word >> 33) / 2**31)
    return numbers


def test_stable_hash_has_known_values() -> None:
    assert stable_hash("BraTS20_Training_001") == 6870055325857752736
    assert stable_hash("BraTS20_Training_001/70") == 2944534595219834105
    assert stable_hash("") == -1970711489451281740


def test_stable_hash_fits_int64_and_separates_names() -> None:
    values = [stable_hash(f"patient-{k}/{k % 155}") for k in range(5000)]
    assert len(set(values)) == 5000
    assert torch.tensor(values, dtype=torch.int64).tolist() == values
    assert min(values) < 0 < max(values)  # signed: the sign bit is used


@pytest.mark.parametrize("seed,epoch,stream", [(0, 0, "scenario"), (7, 599, "augment"), (-3, 12, "order")])
def test_hash_uniform_equals_literal_splitmix64(seed: int, epoch: int, stream: str) -> None:
    samples = [0, 1, -1, 2**62, -(2**63), 2**63 - 1, stable_hash("a/1")]
    drawn = hash_uniform(torch.tensor(samples, dtype=torch.int64), seed, epoch, stream, count=3)
    assert drawn.dtype == torch.float32 and drawn.shape == (7, 3)
    expected = torch.tensor([literal_uniform(s, seed, epoch, stream, 3) for s in samples])
    assert torch.equal(drawn, expected)


@pytest.mark.parametrize("ids", ["counter", "hashes"])
def test_hash_uniform_is_uniform(ids: str) -> None:
    count, bins = 40000, 20
    samples = torch.arange(count) if ids == "counter" else torch.tensor([stable_hash(str(k)) for k in range(count)])
    drawn = hash_uniform(samples, seed=3, epoch=5, stream="scenario")[:, 0]
    assert drawn.min() >= 0 and drawn.max() < 1
    observed = torch.histc(drawn, bins=bins, min=0, max=1)
    chi_square = ((observed - count / bins) ** 2 / (count / bins)).sum()
    assert chi_square < 43.8  # 99.9% quantile of chi-square with 19 degrees of freedom
    assert chi_square > 5  # a counter that walks evenly through [0, 1) would have almost none


def test_hash_uniform_does_not_depend_on_order_or_batching() -> None:
    samples = torch.tensor([stable_hash(str(k)) for k in range(64)])
    together = hash_uniform(samples, 1, 2, "scenario", count=2)
    order = torch.randperm(64)
    assert torch.equal(hash_uniform(samples[order], 1, 2, "scenario", count=2), together[order])
    alone = torch.cat([hash_uniform(s.view(1), 1, 2, "scenario", count=2) for s in samples])
    assert torch.equal(alone, together)
    assert torch.equal(hash_uniform(samples.view(8, 8), 1, 2, "scenario", count=2), together.view(8, 8, 2))
    # asking for more numbers does not change the first ones
    assert torch.equal(hash_uniform(samples, 1, 2, "scenario", count=5)[:, :2], together)


def test_hash_uniform_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    samples = torch.arange(5)
    first = hash_uniform(samples, 1, 2, "scenario")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(hash_uniform(samples, 1, 2, "scenario"), first)


@pytest.mark.parametrize(
    "other", [(2, 2, "scenario"), (1, 3, "scenario"), (1, 2, "augment")], ids=["seed", "epoch", "stream"]
)
def test_draws_of_another_seed_epoch_or_stream_are_uncorrelated(other: tuple[int, int, str]) -> None:
    samples = torch.arange(20000)
    first = hash_uniform(samples, 1, 2, "scenario")[:, 0]
    second = hash_uniform(samples, *other)[:, 0]
    assert torch.corrcoef(torch.stack([first, second]))[0, 1].abs() < 4 / 20000**0.5


def test_numbers_of_one_sample_and_of_neighbor_samples_are_uncorrelated() -> None:
    drawn = hash_uniform(torch.arange(20000), 1, 2, "scenario", count=2)
    assert torch.corrcoef(drawn.t())[0, 1].abs() < 4 / 20000**0.5
    neighbors = torch.stack([drawn[:-1, 0], drawn[1:, 0]])
    assert torch.corrcoef(neighbors)[0, 1].abs() < 4 / 20000**0.5


def test_hash_uniform_never_returns_one() -> None:
    # for this id all 31 bits are set, which float32 rounds to 1.0; an index floor(u * n) would then leave its range
    sample = 3897441723381657849
    value = literal_uniform(sample, 0, 0, "top", 1)[0]
    assert value < 1 and torch.tensor(value, dtype=torch.float64).float() == 1.0
    drawn = hash_uniform(torch.tensor([sample]), 0, 0, "top")
    assert 0.9999999 < drawn.item() < 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_hash_uniform_is_the_same_on_a_gpu() -> None:
    samples = torch.tensor([stable_hash(str(k)) for k in range(1000)])
    drawn = hash_uniform(samples.cuda(), 4, 2, "scenario", count=3)
    assert drawn.is_cuda
    assert torch.equal(drawn.cpu(), hash_uniform(samples, 4, 2, "scenario", count=3))
