# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""The training engine: scenario per sample, generator step, discriminator step, moving average, bank update."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Events
from monai.engines import Trainer
from monai.engines.utils import IterationEvents
from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import get_ema_multi_avg_fn

from .contrasts import scenario_table
from .losses import DiscriminatorLoss, Discriminators, GeneratorLoss
from .memory_bank import BankEntries, MemoryBank
from .network import SSCFNet, SSCFTrainingStep, network_input
from .randomness import hash_uniform

#: What a slice dataset gives and the engine needs.
BATCH_KEYS = ("target", "label", "has_contrast", "has_mask", "patient", "slice_id")


def draw_scenarios(slice_id: torch.Tensor, has_contrast: torch.Tensor, seed: int, epoch: int) -> torch.Tensor:
    """Draws one scenario for each sample, a function of (seed, epoch, slice).

    Of the 14 scenarios, those that leave at least one contrast that the study has are equally probable.

    Args:
        slice_id: B int64.
        has_contrast: B x K boolean, at least one True in each row.
        seed: seed of the run.
        epoch: present epoch.

    Returns:
        B x K boolean, the available contrasts S.
    """
    table = scenario_table(slice_id.device)
    usable = (table.unsqueeze(0) & has_contrast.unsqueeze(1)).any(dim=2)  # B x 14
    rank = (hash_uniform(slice_id, seed, epoch, "scenario") * usable.sum(dim=1, keepdim=True)).to(torch.int64)
    order = usable.to(torch.int64).cumsum(dim=1) - 1
    chosen = ((order == rank) & usable).to(torch.int64).argmax(dim=1)
    return table[chosen] & has_contrast


class MovingAverage:
    """Bias-corrected exponential moving average of a network's parameters.

    Without the correction a short run would keep its initial weights: with decay 0.999 a third of them after 1000
    steps. After step t the average weighs step i by decay^(t - i), normalized to 1.

    Args:
        source: the trained network.
        average: a network of the same structure that holds the average; its buffers are left alone.
        decay: in [0, 1); 0 follows the source.

    Raises:
        ValueError: for a decay outside [0, 1).
    """

    def __init__(self, source: nn.Module, average: nn.Module, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}.")
        self.source, self.average, self.decay, self.steps = source, average, decay, 0
        with torch.no_grad():
            for target, parameter in zip(average.parameters(), source.parameters(), strict=True):
                target.requires_grad_(False).copy_(parameter)

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the parameters of one more step."""
        self.steps += 1
        weight = (1 - self.decay) / (1 - self.decay**self.steps)
        get_ema_multi_avg_fn(1 - weight)(list(self.average.parameters()), list(self.source.parameters()), None)

    def state_dict(self) -> dict[str, Any]:
        """Averaged parameters and the number of steps."""
        return {"parameters": {n: p.detach() for n, p in self.average.named_parameters()}, "steps": self.steps}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores ``state_dict``."""
        for name, parameter in self.average.named_parameters():
            parameter.copy_(state["parameters"][name])
        self.steps = state["steps"]


class SSCFTrainer(Trainer):
    """Trains SSCF: the network by eq. 11 + 14, the discriminators by eq. 15.

    In each iteration: draw a scenario for each sample, step the network, step the discriminators, update the moving
    average, then write the bank with the entries of all processes in rank order. Nothing waits for the device. All
    randomness is a function of (seed, epoch, slice).

    After an iteration ``state.output`` holds the detached losses; after an epoch ``state.metrics`` holds their means as
    ``train_<name>``, and a non-finite mean stops the run.

    Args:
        device: device of networks and batches.
        max_epochs: number of epochs.
        train_data_loader: batches of ``SliceDataset`` items.
        step: the training forward pass, ``SSCFTrainingStep`` or its DDP or compiled wrapper.
        training_step: the plain ``SSCFTrainingStep``, for its bank.
        optimizer: of the network.
        discriminators: the plain discriminators.
        discriminator_step: the discriminators or their DDP wrapper.
        discriminator_optimizer: of the discriminators.
        loss: objective of the network.
        discriminator_loss: objective of the discriminators.
        average: moving average, updated after each step of the optimizer.
        seed: of scenarios and draws.
        accumulation_steps: batches for one step of the optimizers; a shorter rest at the end of an epoch makes a step.
        inferer: kept for the bundle's ``train#inferer``; training calls the networks themselves.
        amp: train with autocast.
        amp_dtype: dtype of autocast; None means ``half_dtype`` of the device.
        grad_scaler: of the losses; None means ``loss_scaler`` of the device. Give it, to have it in the checkpoints.
        epoch_length: batches of an epoch; None means the length of the loader.
        train_handlers: Ignite handlers.
        non_blocking: copy batches asynchronously.
        postprocessing: applied to ``state.output``; normally None.

    Raises:
        ValueError: for ``accumulation_steps`` below 1.
    """

    def __init__(
        self,
        device: torch.device | str,
        max_epochs: int,
        train_data_loader: Iterable,
        step: nn.Module,
        training_step: SSCFTrainingStep,
        optimizer: Optimizer,
        discriminators: Discriminators,
        discriminator_step: nn.Module,
        discriminator_optimizer: Optimizer,
        loss: GeneratorLoss,
        discriminator_loss: DiscriminatorLoss,
        average: MovingAverage,
        seed: int = 0,
        accumulation_steps: int = 1,
        inferer: Callable | None = None,
        amp: bool = True,
        amp_dtype: torch.dtype | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
        epoch_length: int | None = None,
        train_handlers: Sequence | None = None,
        non_blocking: bool = True,
        postprocessing: Callable | None = None,
    ) -> None:
        if accumulation_steps < 1:
            raise ValueError(f"accumulation_steps must be at least 1, got {accumulation_steps}.")
        super().__init__(
            device=device,
            max_epochs=max_epochs,
            data_loader=train_data_loader,
            epoch_length=epoch_length,
            non_blocking=non_blocking,
            postprocessing=postprocessing,
            handlers=None,
            amp=amp,
            decollate=False,
        )
        self.step, self.training_step, self.optimizer = step, training_step, optimizer
        self.discriminators, self.discriminator_step = discriminators, discriminator_step
        self.discriminator_optimizer = discriminator_optimizer
        self.loss, self.discriminator_loss, self.average = loss, discriminator_loss, average
        self.seed, self.accumulation_steps, self.inferer = seed, accumulation_steps, inferer
        self.amp_dtype = amp_dtype or half_dtype(self.state.device)
        self.grad_scaler = grad_scaler or loss_scaler(self.state.device, amp)
        self._totals: dict[str, torch.Tensor] = {}
        self._batches = 0
        # before the handlers of the user, so that they find the means of the epoch
        self.add_event_handler(Events.EPOCH_COMPLETED, SSCFTrainer._close_epoch)
        # and before StatsHandler's, which would print a traceback where a run ends with one sentence
        self.add_event_handler(Events.EXCEPTION_RAISED, SSCFTrainer._raise)
        if train_handlers is not None:
            self._register_handlers(train_handlers)

    @property
    def bank(self) -> MemoryBank:
        """The training bank."""
        return self.training_step.bank

    def _iteration(self, engine: SSCFTrainer, batchdata: dict[str, Any]) -> dict[str, torch.Tensor]:  # type: ignore[override]
        device = engine.state.device
        batch = {k: batchdata[k].to(device, non_blocking=engine.non_blocking) for k in BATCH_KEYS}
        target, label, has_contrast = batch["target"], batch["label"], batch["has_contrast"]
        engine.state.batch = batch
        position = (engine.state.iteration - 1) % engine.state.epoch_length
        window = position // self.accumulation_steps
        share = min(self.accumulation_steps, engine.state.epoch_length - window * self.accumulation_steps)
        last = (position + 1) % self.accumulation_steps == 0 or position + 1 == engine.state.epoch_length

        epoch = engine.state.epoch
        available = draw_scenarios(batch["slice_id"], has_contrast, self.seed, epoch)
        priority = hash_uniform(batch["slice_id"], self.seed, epoch, "ctdl", self.bank.size)
        missing = ~available & has_contrast
        image = network_input(target, available)

        self.step.train()
        self.discriminators.train().requires_grad_(False)
        with torch.autocast(device.type, dtype=self.amp_dtype, enabled=self.amp):
            output = self.step(
                image, target, label, has_contrast, batch["has_mask"], batch["patient"], batch["slice_id"]
            )
            fake = output["pred"][:, : target.shape[1]]
            fake_scores = self.discriminators(fake)
        engine.fire_event(IterationEvents.FORWARD_COMPLETED)
        ctdl = self.loss.sampled_ctdl(
            output,
            self.bank.entries(),
            self.bank.count,
            priority,
            label,
            has_contrast,
            batch["patient"],
            stride=2 ** (len(self.training_step.net.channels) - 1),
        )
        terms = self.loss(output, target, label, has_contrast, batch["has_mask"], ctdl, fake_scores)
        engine.fire_event(IterationEvents.LOSS_COMPLETED)
        self.grad_scaler.scale(terms["loss"] / share).backward()
        engine.fire_event(IterationEvents.BACKWARD_COMPLETED)

        self.discriminators.requires_grad_(True)
        with torch.autocast(device.type, dtype=self.amp_dtype, enabled=self.amp):
            shown = torch.where(missing.view(missing.shape + (1,) * (target.dim() - 2)), target, fake.detach())
            scores = self.discriminator_step(torch.cat([shown, fake.detach()]))
        real_scores, fake_scores = scores.chunk(2)
        judged = self.discriminator_loss(real_scores, fake_scores, missing)
        self.grad_scaler.scale(judged / share).backward()

        if last:
            for optimizer in (self.optimizer, self.discriminator_optimizer):
                self.grad_scaler.step(optimizer)
                optimizer.zero_grad(set_to_none=True)
            self.grad_scaler.update()
            self.average.update()
        self.bank.enqueue(gather_entries(output["entries"]))

        losses = {name: value.detach() for name, value in terms.items()} | {"discriminator": judged.detach()}
        for name, value in losses.items():
            self._totals[name] = self._totals[name] + value if name in self._totals else value
        self._batches += 1
        engine.state.output = losses
        engine.fire_event(IterationEvents.MODEL_COMPLETED)
        return losses

    def _raise(self, error: BaseException) -> None:
        raise error

    def _close_epoch(self) -> None:
        """Means of the losses over the epoch and the state of the bank, to ``state.metrics``."""
        for name, total in self._totals.items():
            self.state.metrics[f"train_{name}"] = float(total) / self._batches
        for name, value in self.bank.statistics().items():
            self.state.metrics[f"bank_{name}"] = float(value)
        self._totals, self._batches = {}, 0
        broken = [name for name, value in self.state.metrics.items() if value != value or abs(value) == float("inf")]
        if broken:
            raise SystemExit(
                f"{', '.join(broken)} became non-finite in epoch {self.state.epoch}: lower the learning rate or switch "
                "mixed precision off, then start again; the run goes on from the last checkpoint."
            )


def half_dtype(device: torch.device | str) -> torch.dtype:
    """bfloat16, or float16 on a GPU that lacks it."""
    lacks = torch.device(device).type == "cuda" and not torch.cuda.is_bf16_supported()
    return torch.float16 if lacks else torch.bfloat16


def loss_scaler(device: torch.device | str, amp: bool) -> torch.amp.GradScaler:
    """Loss scaler for mixed precision; enabled where ``amp`` has to use float16."""
    return torch.amp.GradScaler(torch.device(device).type, enabled=amp and half_dtype(device) == torch.float16)


def gather_entries(entries: BankEntries) -> BankEntries:
    """Entries of all processes in rank order, so that every process writes the same bank."""
    if idist.get_world_size() == 1:
        return entries
    return BankEntries(
        *(
            idist.all_gather(tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor).to(tensor.dtype)
            for tensor in entries
        )
    )


def linear_decay(max_epochs: int, decay_start: int) -> Callable[[int], float]:
    """Factor of the learning rate: 1 until ``decay_start``, then linearly to 0 at ``max_epochs`` (section 3.2).

    Args:
        max_epochs: number of epochs.
        decay_start: epochs with the full rate.
    """
    return lambda epoch: min(1.0, max(0.0, (max_epochs - epoch) / max(max_epochs - decay_start, 1)))


def copy_network(network: SSCFNet, device: torch.device | str) -> SSCFNet:
    """A network of the same structure and weights, in eval mode, to hold a moving average and the frozen bank."""
    return copy.deepcopy(network).to(device).eval()
