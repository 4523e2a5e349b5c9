# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Half precision: which type a device computes in, and whether it pays there."""

from __future__ import annotations

import torch


def half_dtype(device: torch.device | str) -> torch.dtype:
    """bfloat16, or float16 on a GPU that lacks it."""
    lacks = torch.device(device).type == "cuda" and not torch.cuda.is_bf16_supported()
    return torch.float16 if lacks else torch.bfloat16


def half_pays(device: torch.device | str) -> bool:
    """Whether autocast makes a device faster: a GPU, or a CPU with bfloat16 instructions (AVX512-BF16 or AMX)."""
    if torch.device(device).type != "cpu":
        return True
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # not public, so they may be missing
    return any(getattr(torch.cpu, name, lambda: False)() for name in probes)
