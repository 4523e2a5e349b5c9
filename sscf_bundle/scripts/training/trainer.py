# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""The training engine: scenarios, network step, discriminator step, moving average, bank update."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import ignite.distributed as idist
import ignite.handlers
import torch
from ignite.engine import Engine, Events
from monai.engines import Trainer
from monai.engines.utils import IterationEvents
from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from ..contrasts import NUM_CONTRASTS, StudyError, scenario_table
from ..data.randomness import hash_uniform
from ..networks.availability import network_input
from ..networks.blocks import expand_dims_like
from ..networks.memory_bank import BankEntries, MemoryBank
from .losses import Draw, GeneratorLoss, draw_entries, samples_to_judge
from .step import Scenario, SSCFTrainingStep

logger = logging.getLogger(__name__)

#: What a slice dataset gives and the engine needs.
BATCH_KEYS = ("target", "label", "has_contrast", "has_mask", "patient", "slice_id")


def draw_scenarios(
    ids: torch.Tensor, has_contrast: torch.Tensor, seed: int, epoch: int, numbers: Sequence[int] | None = None
) -> torch.Tensor:
    """Draws one scenario for each sample, a function of (seed, epoch, id).

    Of the allowed scenarios, those that leave at least one contrast that the study has are equally probable.

    Args:
        ids: B int64.
        has_contrast: B x K boolean, at least one True in each row.
        seed: seed of the run.
        epoch: present epoch.
        numbers: allowed numbers of available contrasts; None allows all 14 scenarios.

    Returns:
        B x K boolean, the available contrasts S.
    """
    table = scenario_table(ids.device)
    usable = (table.unsqueeze(0) & has_contrast.unsqueeze(1)).any(dim=2)  # B x 14
    if numbers is not None:
        usable = usable & torch.isin(table.sum(dim=1), torch.tensor(numbers, device=ids.device))
    rank = (hash_uniform(ids, seed, epoch, "scenario") * usable.sum(dim=1, keepdim=True)).to(torch.int64)
    order = usable.to(torch.int64).cumsum(dim=1) - 1
    chosen = ((order == rank) & usable).to(torch.int64).argmax(dim=1)
    return table[chosen] & has_contrast


class Curriculum:
    """Numbers of available contrasts that scenarios may have, by epoch.

    Args:
        phases: pairs of a last epoch and the numbers allowed until then, for example ``[[10, [3]], [20, [2, 3]]]``;
            afterwards all scenarios are drawn. None or an empty list is no curriculum.

    Raises:
        ValueError: unless last epochs ascend and each phase allows some of 1 to 3.
    """

    def __init__(self, phases: Sequence[Sequence[Any]] | None = None) -> None:
        try:
            self.phases = [(int(last), tuple(int(n) for n in numbers)) for last, numbers in phases or ()]
            lasts = [last for last, _ in self.phases]
            possible = all(n and all(1 <= number < NUM_CONTRASTS for number in n) for _, n in self.phases)
        except (TypeError, ValueError):
            lasts, possible = [], False
        if lasts != sorted(set(lasts)) or not possible:
            raise ValueError(
                f"a curriculum is pairs of an ascending last epoch and some of 1 to {NUM_CONTRASTS - 1} contrasts, got "
                f"{phases}."
            )

    def numbers(self, epoch: int) -> tuple[int, ...] | None:
        """Allowed numbers in an epoch (from 1); None allows all."""
        return next((numbers for last, numbers in self.phases if epoch <= last), None)


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
        self._pairs = list(average.parameters()), list(source.parameters())

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the parameters of one more step."""
        self.steps += 1
        weight = (1 - self.decay) / (1 - self.decay**self.steps)
        get_ema_multi_avg_fn(1 - weight)(*self._pairs, None)

    def state_dict(self) -> dict[str, Any]:
        """Averaged parameters and the number of steps."""
        return {"parameters": {n: p.detach() for n, p in self.average.named_parameters()}, "steps": self.steps}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores ``state_dict``."""
        for name, parameter in self.average.named_parameters():
            parameter.copy_(state["parameters"][name])
        self.steps = state["steps"]


class SynthesisTrainer(Trainer):
    """Trains any network that fills in missing contrasts.

    In each iteration: augment the batch, draw a scenario for each sample, step the network, step the discriminators,
    update the moving average. Nothing waits for the device. All randomness is a function of (seed, epoch, slice).

    The network is trained through a step, ``step(image, target, label, has_contrast, has_mask, patient, slice_id,
    scenario)``, see ``SSCFTrainingStep``. It returns a dictionary with ``pred`` (B x 7 x spatial, a function of
    ``image`` alone) and ``available`` (B x 4), and with whatever else the loss reads: a term of the loss whose inputs
    the step does not give is left out.

    After an iteration ``state.output`` holds the detached losses; after an epoch ``state.metrics`` holds their means as
    ``train_<name>``, and a non-finite mean stops the run. A subclass may replace ``draw_bank_entries``,
    ``generator_scores``, ``compute_discriminator_loss``, ``on_iteration_end`` and ``epoch_metrics``.

    Args:
        device: device of networks and batches.
        max_epochs: number of epochs.
        train_data_loader: batches of ``SliceDataset`` items.
        step: the training forward pass or its DDP or compiled wrapper.
        training_step: the plain training forward pass.
        optimizer: of the network.
        loss: objective of the network, see ``GeneratorLoss``; may be compiled.
        discriminators: the plain discriminators; None trains without an adversarial part.
        discriminator_step: the discriminators or their DDP wrapper; None means ``discriminators``.
        discriminator_optimizer: of the discriminators.
        discriminator_loss: objective of the discriminators, see ``DiscriminatorLoss``.
        perceptual: distance of images for the loss, see ``PerceptualDistance``; None computes none.
        average: moving average, updated after each step of the optimizer; None keeps none.
        seed: of scenarios, draws and augmentation.
        accumulation_steps: batches for one step of the optimizers; a shorter rest at the end of an epoch makes a step.
        augmentation: changes a batch, ``augmentation(batch, seed, epoch) -> batch``, see ``Augmentation``.
        curriculum: phases of ``Curriculum``; None draws from all scenarios in all epochs.
        shared_scenarios: draw one scenario for all samples of a batch, which costs less than half, in the place of one
            for each sample; a batch of studies that have no contrast in common falls back to the latter.
        reconstructions: with ``shared_scenarios`` how many of the available contrasts, drawn for each batch, are
            decoded; None decodes all. The losses stay unbiased.
        amp: train with autocast to bfloat16.
        train_handlers: Ignite handlers; None stands for one that a config disables.

    Raises:
        ValueError: for settings that make no sense.
    """

    def __init__(
        self,
        device: torch.device | str,
        max_epochs: int,
        train_data_loader: DataLoader | Sequence,
        step: nn.Module,
        training_step: nn.Module,
        optimizer: Optimizer,
        loss: nn.Module,
        discriminators: nn.Module | None = None,
        discriminator_step: nn.Module | None = None,
        discriminator_optimizer: Optimizer | None = None,
        discriminator_loss: nn.Module | None = None,
        perceptual: Any = None,
        average: MovingAverage | None = None,
        seed: int = 0,
        accumulation_steps: int = 1,
        augmentation: Callable[[dict[str, torch.Tensor], int, int], dict[str, torch.Tensor]] | None = None,
        curriculum: Sequence[Sequence[Any]] | None = None,
        shared_scenarios: bool = False,
        reconstructions: int | None = None,
        amp: bool = True,
        train_handlers: Sequence | None = None,
    ) -> None:
        if accumulation_steps < 1:
            raise ValueError(f"accumulation_steps must be at least 1, got {accumulation_steps}.")
        if reconstructions is not None and (reconstructions < 1 or not shared_scenarios):
            raise ValueError("reconstructions must be at least 1 and needs shared_scenarios.")
        if discriminators is not None and (discriminator_optimizer is None or discriminator_loss is None):
            raise ValueError("discriminators need an optimizer and a loss.")
        if not len(train_data_loader):
            raise StudyError(
                "An epoch has less than one batch, which compile and drop_last leave out: give a smaller batch_size."
            )
        super().__init__(
            device=device,
            max_epochs=max_epochs,
            data_loader=train_data_loader,
            non_blocking=True,
            amp=amp,
            decollate=False,
        )
        self.step, self.training_step, self.optimizer, self.loss = step, training_step, optimizer, loss
        self.discriminators, self.discriminator_optimizer = discriminators, discriminator_optimizer
        self.discriminator_step = discriminators if discriminator_step is None else discriminator_step
        self.discriminator_loss, self.perceptual, self.average = discriminator_loss, perceptual, average
        self.seed, self.accumulation_steps = seed, accumulation_steps
        self.augmentation, self.curriculum = augmentation, Curriculum(curriculum)
        self.shared_scenarios, self.reconstructions = shared_scenarios, reconstructions
        self._totals: dict[str, torch.Tensor] = {}
        self._batches = self._samples = 0
        self.add_event_handler(Events.EPOCH_STARTED, SynthesisTrainer._open_epoch)
        # before the handlers of the user, so that they find the means of the epoch
        self.add_event_handler(Events.EPOCH_COMPLETED, SynthesisTrainer._close_epoch)
        # and before StatsHandler's, which would print a traceback where a run ends with one sentence
        self.add_event_handler(Events.EXCEPTION_RAISED, SynthesisTrainer._raise)
        if train_handlers is not None:
            self._register_handlers([handler for handler in train_handlers if handler is not None])

    # ------------------------------------------------------------------------------------ what a subclass may replace
    def draw_bank_entries(self, batch: dict[str, torch.Tensor]) -> Draw | None:
        """Bank entries for the dependency loss of a batch; None here."""
        return None

    def generator_scores(self, output: dict[str, Any], batch: dict[str, torch.Tensor]) -> torch.Tensor | None:
        """Scores of the synthesized images for the loss of the network, B x K x patches; None without discriminators.

        Args:
            output: of the step.
            batch: of ``prepare``; ``missing`` are the contrasts with a target in T.
        """
        if self.discriminators is None:
            return None
        return self.discriminators(output["pred"][:, :NUM_CONTRASTS], batch["samples"])

    def perceptual_distances(self, output: dict[str, Any], batch: dict[str, torch.Tensor]) -> torch.Tensor | None:
        """Distances between synthesized and true missing contrasts, B x K, 0 elsewhere; None without ``perceptual``."""
        if self.perceptual is None:
            return None
        pairs = batch["missing_pairs"].unbind(1)
        fake, real = ((images[pairs].float() + 1) / 2 for images in (output["pred"], batch["target"]))
        with torch.no_grad():
            known = self.perceptual.features(real)
        distances = self.perceptual(self.perceptual.features(fake), known)
        return distances.new_zeros(batch["missing"].shape).index_put(pairs, distances)

    def compute_discriminator_loss(self, output: dict[str, Any], batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Scalar loss of the discriminators, without a gradient to the network; arguments as ``generator_scores``."""
        fake, target, missing = output["pred"][:, :NUM_CONTRASTS].detach(), batch["target"], batch["missing"]
        # what is not judged may hold anything, NaN where the study lacks it
        shown = torch.where(expand_dims_like(missing, target), target, fake)
        samples = [torch.cat([rows, rows + len(fake)]) for rows in batch["samples"]]
        assert self.discriminator_step is not None and self.discriminator_loss is not None
        real_scores, fake_scores = self.discriminator_step(torch.cat([shown, fake]), samples).chunk(2)
        return self.discriminator_loss(real_scores, fake_scores, missing)

    def on_iteration_end(self, output: dict[str, Any]) -> None:
        """Called with the output of the step when the iteration's gradients have been used."""

    def epoch_metrics(self) -> dict[str, torch.Tensor]:
        """Scalars for ``state.metrics`` at the end of an epoch, beside the means of the losses."""
        return {}

    # ------------------------------------------------------------------------------------------------------ iteration
    def prepare(self, batchdata: dict[str, Any]) -> dict[str, torch.Tensor]:
        """A batch on the device, augmented, with its scenario.

        Returns:
            The arguments of the step, ``missing`` (B x K), with ``perceptual`` ``missing_pairs`` (its M x 2 indices),
            ``samples``, see ``samples_to_judge``, and ``occurrence`` (B int64), the place of a sample in its epoch:
            what is drawn for a sample depends on it, so that a slice that comes twice in an epoch is another sample
            each time.
        """
        epoch, move = self.state.epoch, {"device": self.state.device, "non_blocking": self.non_blocking}
        # drawn on the host, which has to know how many samples lack a contrast without waiting for the device
        has_contrast = batchdata["has_contrast"].cpu()
        number = torch.arange(self._samples, self._samples + len(has_contrast))
        occurrence = number * idist.get_world_size() + idist.get_rank()
        self._samples += len(has_contrast)
        drawn, scenario = self.draw_batch_scenarios(occurrence, has_contrast)
        batch = {k: batchdata[k].to(**move) for k in BATCH_KEYS} | {"occurrence": occurrence.to(**move)}
        if self.augmentation is not None:
            batch = self.augmentation(batch, self.seed, epoch)
        missing = ~drawn & has_contrast
        source = batch.pop("source", batch["target"])
        if self.perceptual is not None:
            batch["missing_pairs"] = missing.nonzero().to(**move)
        return {
            **batch,
            "scenario": scenario,
            "image": network_input(source, drawn.to(**move)),
            "missing": missing.to(**move),
            "samples": [rows.to(**move) for rows in samples_to_judge(missing)],
        }

    def draw_batch_scenarios(
        self, occurrence: torch.Tensor, has_contrast: torch.Tensor
    ) -> tuple[torch.Tensor, Scenario | None]:
        """Available contrasts of a batch (B x K, on the CPU), and their ``Scenario`` if all samples share it."""
        numbers = self.curriculum.numbers(self.state.epoch)
        common = has_contrast.all(dim=0, keepdim=True)
        if not self.shared_scenarios or not common.any():
            return draw_scenarios(occurrence, has_contrast, self.seed, self.state.epoch, numbers), None
        first = occurrence[:1]
        drawn = draw_scenarios(first, common, self.seed, self.state.epoch, numbers)
        sources = [i for i, given in enumerate(drawn[0].tolist()) if given]
        if self.reconstructions is not None:
            order = hash_uniform(first, self.seed, self.state.epoch, "reconstruction", len(sources))[0].argsort()
            sources = [sources[i] for i in order[: self.reconstructions].tolist()]
        return drawn.expand(has_contrast.shape), Scenario(tuple(drawn[0].tolist()), tuple(sources))

    def _iteration(self, engine: SynthesisTrainer, batchdata: dict[str, Any]) -> dict[str, torch.Tensor]:
        device = engine.state.device
        batch = engine.state.batch = self.prepare(batchdata)
        position = (engine.state.iteration - 1) % engine.state.epoch_length
        window = position // self.accumulation_steps
        share = min(self.accumulation_steps, engine.state.epoch_length - window * self.accumulation_steps)
        last = (position + 1) % self.accumulation_steps == 0 or position + 1 == engine.state.epoch_length
        targets = [batch[k] for k in BATCH_KEYS]

        if self.discriminators is not None:
            self.discriminators.requires_grad_(False)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.amp):
            output = self.step(batch["image"], *targets, batch["scenario"])
            fake_scores = self.generator_scores(output, batch)
            distances = self.perceptual_distances(output, batch)
        engine.fire_event(IterationEvents.FORWARD_COMPLETED)
        terms = self.loss(output, *targets[:4], fake_scores, self.draw_bank_entries(batch), distances)
        engine.fire_event(IterationEvents.LOSS_COMPLETED)
        (terms["loss"] / share).backward()
        engine.fire_event(IterationEvents.BACKWARD_COMPLETED)
        losses = {name: value.detach() for name, value in terms.items()}

        if self.discriminators is not None:
            self.discriminators.requires_grad_(True)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.amp):
                judged = self.compute_discriminator_loss(output, batch)
            (judged / share).backward()
            losses["discriminator"] = judged.detach()

        if last:
            for optimizer in (self.optimizer, self.discriminator_optimizer):
                if optimizer is not None:
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
            if self.average is not None:
                self.average.update()
        self.on_iteration_end(output)

        totals = {name: self._totals[name] for name in losses if name in self._totals}
        if totals:
            sums = torch._foreach_add([*totals.values()], [losses[name] for name in totals])
            totals = dict(zip(totals, sums, strict=True))
        self._totals |= losses | totals
        self._batches += 1
        engine.state.output = losses
        engine.fire_event(IterationEvents.MODEL_COMPLETED)
        return losses

    def _raise(self, error: BaseException) -> None:
        raise error

    def _open_epoch(self) -> None:
        self._samples = 0
        self.step.train()
        if self.discriminators is not None:
            self.discriminators.train()

    def _close_epoch(self) -> None:
        """Means of the losses over the epoch and ``epoch_metrics``, to ``state.metrics``."""
        for name, total in self._totals.items():
            self.state.metrics[f"train_{name}"] = float(total) / self._batches
        for name, value in self.epoch_metrics().items():
            self.state.metrics[name] = float(value)
        self._totals, self._batches = {}, 0
        broken = [name for name, value in self.state.metrics.items() if value != value or abs(value) == float("inf")]
        if broken:
            raise StudyError(
                f"{', '.join(broken)} became non-finite in epoch {self.state.epoch}: lower the learning rate or switch "
                "mixed precision off, then start again; the run goes on from the last checkpoint."
            )


class SSCFTrainer(SynthesisTrainer):
    """Trains SSCF: the network by eq. 11 + 14, the discriminators by eq. 15.

    A ``SynthesisTrainer`` whose training step is an ``SSCFTrainingStep``. It draws the bank entries of the dependency
    loss and, after an iteration, writes the bank with the entries of all processes in rank order. The metrics of an
    epoch tell of the bank as ``bank_<name>``, see ``MemoryBank.statistics``. Arguments are those of
    ``SynthesisTrainer``.
    """

    training_step: SSCFTrainingStep
    loss: GeneratorLoss

    @property
    def bank(self) -> MemoryBank:
        """The training bank."""
        return self.training_step.bank

    def draw_bank_entries(self, batch: dict[str, torch.Tensor]) -> Draw | None:
        """Entries for the dependency loss, a function of (seed, epoch, occurrence) and the bank; None without it."""
        if not (self.loss.weights["ctdl"] and self.training_step.net.with_citim):
            return None
        priority = hash_uniform(batch["occurrence"], self.seed, self.state.epoch, "ctdl", self.bank.size)
        number, own_patient = self.loss.ctdl_entries, self.training_step.own_patient
        return draw_entries(priority, self.bank.entries(), self.bank.count, batch["patient"], number, own_patient)

    def on_iteration_end(self, output: dict[str, Any]) -> None:
        """Writes the bank."""
        if "entries" in output:
            self.bank.enqueue(gather_entries(output["entries"]))

    def epoch_metrics(self) -> dict[str, torch.Tensor]:
        """State of the bank."""
        if not self.training_step.net.uses_bank:
            return {}
        return {f"bank_{name}": value for name, value in self.bank.statistics().items()}


class TimeLimit(ignite.handlers.TimeLimit):
    """Ignite's, counted from the start of the training and with its validations."""

    def attach(self, engine: Engine) -> None:
        """Starts the clock at ``STARTED`` and looks at it after every iteration."""
        engine.add_event_handler(Events.STARTED, lambda: setattr(self, "start_time", time.time()))
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)


class LambdaLR(torch.optim.lr_scheduler.LambdaLR):
    """torch's, but a training that goes on has the rate of the schedule of now, not the one in its checkpoint.

    They differ where the training was ended and is extended. Load it after its optimizer.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores ``state_dict`` and sets the rates of the optimizer."""
        super().load_state_dict(state_dict)
        factors = [factor(self.last_epoch) for factor in self.lr_lambdas]
        before, self._last_lr = self._last_lr, [r * f for r, f in zip(self.base_lrs, factors, strict=True)]
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate
        if self._last_lr != before:
            logger.info(
                "The learning rate after epoch %d is %s, not %s: its schedule is not that of the checkpoint.",
                self.last_epoch,
                self._last_lr[0],
                before[0],
            )


def gather_entries(entries: BankEntries) -> BankEntries:
    """Entries of all processes in rank order, so that every process writes the same bank."""
    if idist.get_world_size() == 1:
        return entries
    gathered: list[Any] = [idist.all_gather(t.to(torch.uint8) if t.dtype == torch.bool else t) for t in entries]
    return BankEntries(*(t.to(own.dtype) for t, own in zip(gathered, entries, strict=True)))


def linear_decay(max_epochs: int, decay_start: int) -> Callable[[int], float]:
    """Factor of the learning rate: 1 until ``decay_start``, then linearly to 0 at ``max_epochs`` (section 3.2)."""
    return lambda epoch: min(1.0, max(0.0, (max_epochs - epoch) / max(max_epochs - decay_start, 1)))


def copy_network(network: nn.Module, device: torch.device | str) -> nn.Module:
    """A network of the same structure and weights, in eval mode, to hold a moving average and the frozen bank."""
    return copy.deepcopy(network).to(device).eval()


def in_memory_format(network: nn.Module, channels_last: bool) -> nn.Module:
    """The network, with the weights of its convolutions in the channels-last format where that is asked for."""
    if channels_last:
        torch.nn.utils.convert_conv2d_weight_memory_format(network, torch.channels_last)
        torch.nn.utils.convert_conv3d_weight_memory_format(network, torch.channels_last_3d)
    return network
