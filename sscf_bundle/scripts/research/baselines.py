# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""How what SSCF is compared with is trained: networks without a bank, and MM-GAN with its discriminator."""

from __future__ import annotations

from typing import Any

import torch
from monai.networks.nets import PatchDiscriminator
from torch import nn

from ..contrasts import NUM_CONTRASTS
from ..networks.availability import read_availability
from ..networks.blocks import expand_dims_like
from ..networks.plain_unet import PlainUNet
from ..training.losses import set_mean
from ..training.trainer import SynthesisTrainer


class PlainTrainingStep(nn.Module):
    """Training forward pass of a network that has no bank.

    Args:
        net: B x 8 x spatial to B x 7 x spatial. Of a ``PlainUNet`` the logits are given too, so that the segmentation
            losses apply; another network has no mask to train.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(
        self,
        image: torch.Tensor,
        target: torch.Tensor,
        label: torch.Tensor,
        has_contrast: torch.Tensor,
        *_: Any,
        **__: Any,
    ) -> dict[str, torch.Tensor]:
        """Runs the network; only ``image`` reaches it, the other arguments are those of ``SSCFTrainingStep``.

        Returns:
            ``pred``: B x 7 x spatial; ``available``: B x 4; ``logits``: B x 3 x spatial, if the network gives them.
        """
        available = read_availability(image) & has_contrast
        if not isinstance(self.net, PlainUNet):
            return {"pred": self.net(image), "available": available}
        images, logits = self.net.run(image[:, :NUM_CONTRASTS], read_availability(image))
        return {"pred": torch.cat([images, torch.sigmoid(logits)], dim=1), "logits": logits, "available": available}


class MMGANDiscriminator(nn.Module):
    """Discriminator of MM-GAN: one PatchGAN that judges every contrast of a stack, given the real stack.

    It is pix2pix's (MONAI's ``PatchDiscriminator``, three layers); the published code halves once more. ``channels``
    are of the first layer.
    """

    def __init__(self, spatial_dims: int = 2, channels: int = 64) -> None:
        super().__init__()
        self.net = PatchDiscriminator(
            spatial_dims, channels, 2 * NUM_CONTRASTS, NUM_CONTRASTS, num_layers_d=3, norm="INSTANCE"
        )

    def forward(self, shown: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """Scores of each contrast of ``shown``, given ``real`` (both B x 4 x spatial): B x 4 x patches."""
        return self.net(torch.cat([shown, real], dim=1))[-1].flatten(2)


class MMGANDiscriminatorLoss(nn.Module):
    """Least squares with a label for each contrast: L_D = (|D(x, x) - 1|^2 + |D(f, x) - a|^2) / 2.

    x is the real stack, f the same with its missing contrasts synthesized, and a is 0 for these and 1 for the others.
    A mean over the patches, then the contrasts that the study has, then the samples.
    """

    def forward(
        self, real: torch.Tensor, fake: torch.Tensor, missing: torch.Tensor, has_contrast: torch.Tensor
    ) -> torch.Tensor:
        """Scalar from B x 4 x patches scores of x and f; ``missing`` and ``has_contrast`` are B x 4."""
        on_real = (real.float() - 1).square().mean(dim=2)
        on_fake = (fake.float() - (~missing).unsqueeze(2).float()).square().mean(dim=2)
        return 0.5 * set_mean(on_real + on_fake, has_contrast)


class MMGANTrainer(SynthesisTrainer):
    """Trains MM-GAN: the discriminator sees whole stacks, in which available contrasts are real.

    Of the generator's loss, ``GeneratorLoss(beta=(0.9, 0, 0, 0, 0.1))`` is L_G = 0.1 |D(f, x) - 1|^2 + 0.9 |f - x|,
    both over the missing contrasts. The curriculum is the trainer's. Arguments are those of ``SynthesisTrainer`` with
    an ``MMGANDiscriminator`` and an ``MMGANDiscriminatorLoss``.
    """

    @staticmethod
    def stacks(output: dict[str, Any], batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The stack f with synthesized missing contrasts and the real stack x, each B x 4 x spatial.

        A contrast that the study lacks is background in both.
        """
        target = batch["target"]
        real = torch.where(expand_dims_like(batch["has_contrast"], target), target, -1.0)
        return torch.where(expand_dims_like(batch["missing"], target), output["pred"][:, :NUM_CONTRASTS], real), real

    def generator_scores(self, output: dict[str, Any], batch: dict[str, torch.Tensor]) -> torch.Tensor | None:
        """Scores of the contrasts of f, B x 4 x patches; None without a discriminator."""
        return None if self.discriminators is None else self.discriminators(*self.stacks(output, batch))

    def compute_discriminator_loss(self, output: dict[str, Any], batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Loss of the discriminator, without a gradient to the generator."""
        fake, real = (stack.detach() for stack in self.stacks(output, batch))
        assert self.discriminator_step is not None and self.discriminator_loss is not None
        # one call for both, as DistributedDataParallel wants it
        on_real, on_fake = self.discriminator_step(torch.cat([real, fake]), torch.cat([real, real])).chunk(2)
        return self.discriminator_loss(on_real, on_fake, batch["missing"], batch["has_contrast"])
