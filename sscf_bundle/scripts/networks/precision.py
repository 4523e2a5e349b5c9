# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Half precision: which type a device computes in, whether it pays there, and weights that are cast together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd


def half_pays(device: torch.device | str) -> bool:
    """Whether autocast to bfloat16 makes a device faster: a GPU or a CPU with instructions for it (AVX512-BF16 or AMX).

    There is no float16: with the weights of the bundle it gives NaN.
    """
    kind = torch.device(device).type
    if kind != "cpu":
        return kind != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # not public, so they may be missing
    return any(getattr(torch.cpu, name, lambda: False)() for name in probes)


def half_weights(network: nn.Module, but: Sequence[nn.Module] = ()) -> AbstractContextManager[None]:
    """Context in which the convolutions of a network find their weights in the type of autocast already.

    One kernel casts them all, and one their gradients, where autocast takes one for each. Without autocast nothing
    changes, nor where torch.compile joins the casts with what reads them.

    Args:
        network: all of whose parameters are on one device.
        but: convolutions that are left alone, since their weights are read elsewhere.
    """
    device = next(network.parameters()).device.type
    if torch.compiler.is_compiling() or not torch.is_autocast_enabled(device):
        return nullcontext()
    convolutions = [m for m in network.modules() if isinstance(m, _ConvNd) and m not in but]
    return _with_cast_weights(convolutions, torch.get_autocast_dtype(device))


@contextmanager
def _with_cast_weights(modules: Sequence[nn.Module], dtype: torch.dtype) -> Iterator[None]:
    own = [(m, name, p) for m in modules for name, p in m._parameters.items() if p is not None]
    try:
        for (module, name, _), half in zip(own, _Cast.apply(dtype, *(p for _, _, p in own)), strict=True):
            module._parameters[name] = half
        yield
    finally:
        for module, name, parameter in own:
            module._parameters[name] = parameter


class _Cast(torch.autograd.Function):
    """Casts many float32 tensors at once, and their gradients back."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        return _cast(tensors, dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        whole = iter(_cast([g for g in gradients if g is not None], torch.float32))
        return None, *(None if g is None else next(whole) for g in gradients)


def _cast(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    cast = [torch.empty_like(t, dtype=dtype) for t in tensors]
    torch._foreach_copy_(cast, list(tensors))
    return tuple(cast)
