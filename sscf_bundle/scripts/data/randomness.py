# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Randomness as a function of (seed, epoch, sample id), so that neither workers nor interruption change a run."""

from __future__ import annotations

import hashlib

import torch

_MASK_31 = (1 << 31) - 1


def stable_hash(text: str) -> int:
    """Signed 64-bit hash of a text, the same on every machine and in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """The SplitMix64 finalizer on int64 tensors (wrap-around multiplication, logical shifts)."""
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def hash_uniform(ids: torch.Tensor, seed: int, epoch: int, stream: str, count: int = 1) -> torch.Tensor:
    """Uniform numbers that depend on nothing but the arguments.

    Args:
        ids: int64 tensor of any shape, one id per sample.
        seed: seed of the run.
        epoch: epoch (or any counter) that makes the draw new.
        stream: name of what is drawn, so that two draws for one sample are independent.
        count: how many numbers for each id.

    Returns:
        float32 tensor of shape ``ids.shape + (count,)`` with values in [0, 1), on the device of ``ids``.
    """
    salt = stable_hash(f"{seed}/{epoch}/{stream}")
    counter = torch.arange(1, count + 1, device=ids.device, dtype=torch.int64) * -7046029254386353131
    state = _mix(_mix(ids.unsqueeze(-1) ^ salt) + counter)
    return ((state >> 33) & _MASK_31).to(torch.float64).div_(1 << 31).float().clamp_(max=1 - 2**-24)
