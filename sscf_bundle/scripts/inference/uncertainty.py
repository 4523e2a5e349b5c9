# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Voxel-wise uncertainty of synthesized contrasts: how much the result moves with what should not matter."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from monai.data import MetaTensor
from monai.inferers import Inferer
from monai.transforms import Invertd
from torch import nn

from ..contrasts import CONTRAST_KEYS, NUM_CONTRASTS, StudyError
from ..data.transforms import StudyCompose
from ..networks.retrieval import usable_for_pairs
from ..networks.sscf import SSCFNet
from .inferer import predict
from .preprocessing import FILE_BRAIN_KEY

#: What a map can be made of.
MEMBERS = ("retrieval", "scenarios", "flips")


@contextmanager
def nth_prototype(network: SSCFNet, rank: int) -> Iterator[None]:
    """The network with the prototype of another rank than the nearest (0), where there are as many."""

    def prototypes(
        distance: torch.Tensor, bank: Any, allowed: torch.Tensor, target: torch.Tensor, source: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        usable = usable_for_pairs(bank, allowed, target, source)
        order = distance.masked_fill(~usable, float("inf")).argsort(dim=2)
        last = (usable.sum(dim=2) - 1).clamp(min=0, max=rank)
        index = order.gather(2, last.unsqueeze(2)).squeeze(2)
        return bank.mean[index, target], bank.std[index, target], usable.any(dim=2)

    object.__setattr__(network, "prototypes", prototypes)
    try:
        yield
    finally:
        object.__delattr__(network, "prototypes")


def has_prototypes(network: nn.Module) -> bool:
    """Whether a network could retrieve another prototype than the nearest."""
    return isinstance(network, SSCFNet) and network.with_ccp and int(network.bank_present.any(dim=1).sum()) > 1


class UncertaintyMap:
    """Standard deviation of the prediction over an ensemble, for the missing contrasts.

    Args:
        members: names of ``MEMBERS``: ``retrieval``, the next nearest prototypes instead of the nearest; ``scenarios``,
            one available contrast left out at a time; ``flips``, left and right exchanged.
        preprocessing: the transforms that made ``image``.
        neighbors: number of prototypes, the nearest one included.

    Raises:
        StudyError: for an unknown name.
    """

    def __init__(self, members: Sequence[str], preprocessing: StudyCompose, neighbors: int = 3) -> None:
        self.members = (members,) if isinstance(members, str) else tuple(members)
        unknown = [name for name in self.members if name not in MEMBERS]
        if unknown or not self.members:
            raise StudyError(f"uncertainty has no {(unknown or ['empty list'])[0]}: choose from {', '.join(MEMBERS)}.")
        self.neighbors = neighbors
        self.invert = Invertd("uncertainty", preprocessing, orig_keys="image", nearest_interp=False)

    def spread(
        self, image: torch.Tensor, pred: torch.Tensor, network: nn.Module, run: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """The standard deviation on the grid of the network.

        Args:
            image: 8 x X x Y x Z.
            pred: 7 x X x Y x Z, of ``image`` itself.
            network: what ``run`` calls.
            run: image to prediction.

        Returns:
            4 x X x Y x Z, of a range of 1.
        """
        image = torch.as_tensor(image)
        available = image[NUM_CONTRASTS:].flatten(1).amax(dim=1) > 0.5
        # sums instead of a stack: a volume is large
        first = torch.as_tensor(pred)[:NUM_CONTRASTS].clone()
        total, squares, count = torch.zeros_like(first), torch.zeros_like(first), 1

        def add(other: torch.Tensor) -> None:
            nonlocal count
            difference = torch.as_tensor(other)[:NUM_CONTRASTS] - first
            total.add_(difference)
            squares.add_(difference.square_())
            count += 1

        if "retrieval" in self.members and isinstance(network, SSCFNet) and has_prototypes(network):
            for rank in range(1, self.neighbors):
                with nth_prototype(network, rank):
                    add(run(image))
        if "scenarios" in self.members and int(available.sum()) > 1:
            for i in available.nonzero().flatten().tolist():
                fewer = image.clone()
                fewer[i], fewer[NUM_CONTRASTS + i] = -1, 0
                add(run(fewer))
        if "flips" in self.members:
            add(torch.as_tensor(run(image.flip(1))).flip(1))
        return (squares / count - (total / count).square()).clamp(min=0).sqrt().div_(2)

    def __call__(
        self,
        item: Mapping[str, Any],
        pred: torch.Tensor,
        network: nn.Module,
        inferer: Inferer,
        device: torch.device | str,
        amp_dtype: torch.dtype | None = None,
    ) -> dict[str, MetaTensor]:
        """Maps on the grid on file, relative to the scale of each contrast.

        Args:
            item: after ``inference_transforms``.
            pred: prediction of its image.
            network: see ``predict``.
            inferer: see ``predict``.
            device: see ``predict``.
            amp_dtype: see ``predict``.

        Returns:
            X x Y x Z by key of each missing contrast.
        """

        def run(image: torch.Tensor) -> torch.Tensor:
            return predict(image, network, inferer, device, amp_dtype)

        missing = [i for i, kept in enumerate(item["has_contrast"]) if not kept]
        varies = (
            "flips" in self.members
            or ("retrieval" in self.members and has_prototypes(network))
            or ("scenarios" in self.members and NUM_CONTRASTS - len(missing) > 1)
        )
        if not missing or not varies:  # a map of zeros would say that nothing is in doubt
            return {}
        spread = MetaTensor(self.spread(item["image"], pred, network, run)[missing].cpu())
        inverted: dict[Hashable, Any] = {"uncertainty": spread}
        inverted.update(item)
        finished = self.invert(inverted)["uncertainty"]
        brain = torch.as_tensor(item[FILE_BRAIN_KEY])[0].bool()
        volumes = torch.as_tensor(finished).clamp(min=0) * brain
        return dict(zip((CONTRAST_KEYS[i] for i in missing), volumes, strict=True))
