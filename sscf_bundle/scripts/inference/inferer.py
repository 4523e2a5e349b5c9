# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""The forward path of a study: slice by slice, for the one scenario that a study has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from monai.inferers import Inferer
from monai.networks import eval_mode
from monai.utils import convert_to_dst_type
from torch import nn

from ..contrasts import NUM_CONTRASTS, TUMOR_CLASSES, StudyError

#: Slices are padded to multiples of this, as the five scales of the network need.
_DIVISOR = 16


class BrainSliceInferer(Inferer):
    """Slice-by-slice inference that leaves out axial slices without brain.

    Takes B x 8 x X x Y x Z (four contrasts in [-1, 1] with background -1, four planes of 0/1 availability) and gives
    B x 7 x X x Y x Z (four contrasts in [-1, 1], three probabilities). A slice in which every contrast is -1 is not
    shown to the network: its contrasts are -1 and its probabilities 0.

    A volume has one scenario. It is read once for each volume, and a network that has ``for_scenario`` (``SSCFNet``) is
    asked for a module that computes for this scenario alone; any other network is called as it is.

    Args:
        sw_batch_size: number of slices in one call of the network.
        compile: call the network through ``torch.compile``, once for each scenario. The last batch of a volume is then
            filled up with copies of its last slice, so that its shape is known already.
    """

    def __init__(self, sw_batch_size: int = 8, compile: bool = False) -> None:
        super().__init__()
        self.sw_batch_size, self.compile = sw_batch_size, compile
        self._network: Callable[..., torch.Tensor] | None = None
        self._modules: dict[tuple[bool, ...], Callable[..., torch.Tensor]] = {}

    def __call__(
        self, inputs: torch.Tensor, network: Callable[..., torch.Tensor], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """B x 8 x X x Y x Z ``inputs`` by a ``network`` of slices to B x 7 x X x Y x Z float32.

        The result is a ``MetaTensor`` if ``inputs`` is one. All other arguments are ignored.
        """
        volume = inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs
        out = volume.new_zeros(volume.shape[0], NUM_CONTRASTS + len(TUMOR_CLASSES), *volume.shape[2:])
        out[:, :NUM_CONTRASTS] = -1
        for sample, result in zip(volume, out, strict=True):
            # one reduction at a time is several times faster than all at once
            highest = sample[:NUM_CONTRASTS].amax(dim=0).amax(dim=0).amax(dim=0)
            available = sample[NUM_CONTRASTS:].flatten(1).amax(dim=1) > 0.5
            # the one synchronization of a volume; NaN counts as brain, and so comes to light
            *has_brain, flair, t1, t1ce, t2 = torch.cat([~(highest <= -1), available]).tolist()
            slices = [z for z, kept in enumerate(has_brain) if kept]
            if not slices:
                continue
            module = self._module(network, (flair, t1, t1ce, t2))
            self._predict(sample, result, torch.tensor(slices, device=volume.device), module)
        return convert_to_dst_type(out, inputs)[0] if isinstance(inputs, MetaTensor) else out

    def _module(self, network: Callable[..., torch.Tensor], available: tuple[bool, ...]) -> Callable[..., torch.Tensor]:
        """What to call for a scenario."""
        specialize = getattr(network, "for_scenario", None) if any(available) else None
        if not self.compile:
            return network if specialize is None else specialize(available)
        if network is not self._network:
            self._network, self._modules = network, {}
        if available not in self._modules:
            module = network if specialize is None else specialize(available)
            self._modules[available] = torch.compile(module, dynamic=False)
        return self._modules[available]

    def _predict(
        self, sample: torch.Tensor, result: torch.Tensor, index: torch.Tensor, module: Callable[..., torch.Tensor]
    ) -> None:
        """Write the prediction for some slices of a volume (8 x X x Y x Z) to ``result`` (7 x X x Y x Z)."""
        padding: list[int] = []  # in the order of torch.nn.functional.pad
        for extent in (sample.shape[2], sample.shape[1]):
            missing = -extent % _DIVISOR
            padding += [missing // 2, missing - missing // 2]
        left, top = padding[2], padding[0]
        axial, axial_result = sample.permute(3, 0, 1, 2), result.permute(3, 0, 1, 2)
        for part in index.split(self.sw_batch_size):
            fill = self.sw_batch_size - len(part) if self.compile else 0
            batch = _pad_slices(axial[torch.cat([part, part[-1:].expand(fill)])], padding)
            pred = module(batch)[: len(part), :, left : left + sample.shape[1], top : top + sample.shape[2]]
            axial_result[part] = pred.to(result.dtype)


def predict(
    image: torch.Tensor, network: nn.Module, inferer: Inferer, device: torch.device | str, amp: bool = False
) -> torch.Tensor:
    """Run the network over one study, 8 x X x Y x Z after ``inference_transforms``; ``amp`` is autocast to bfloat16.

    Returns:
        7 x X x Y x Z float32: contrasts in [-1, 1], probabilities.

    Raises:
        StudyError: when the prediction is not finite.
    """
    device = torch.device(device)
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=amp)
    with eval_mode(network), torch.inference_mode(), autocast:
        pred = inferer(image[None].to(device, non_blocking=True), network)[0].float()
    # NaN passes through both extrema
    if not torch.isfinite(torch.stack(torch.as_tensor(pred).aminmax())).all():
        raise StudyError("The prediction holds NaN or infinite values: run without amp, or check the weights.")
    return pred


def _pad_slices(images: torch.Tensor, padding: Sequence[int]) -> torch.Tensor:
    """Pad N x 8 x X x Y: contrasts with background, planes of availability with 0."""
    if not any(padding):
        return images
    contrasts, planes = images[:, :NUM_CONTRASTS], images[:, NUM_CONTRASTS:]
    return torch.cat([F.pad(contrasts, padding, value=-1.0), F.pad(planes, padding)], dim=1)
