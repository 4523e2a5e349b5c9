# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The training engine: scenarios, moving average, steps of both networks, bank, several processes."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from builders import TINY_CHANNELS, generator, random_batch, random_entries, tiny_net, tiny_step
from monai.engines.utils import IterationEvents
from monai.networks.nets import PatchDiscriminator
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.modules.conv import _ConvNd
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torchvision.models import alexnet

import scripts.training.trainer
from scripts.contrasts import NUM_CONTRASTS, SCENARIOS, StudyError, scenario_table
from scripts.data.slices import EpochSampler
from scripts.evaluation.protocols import PerceptualDistance
from scripts.networks.memory_bank import BankEntries
from scripts.networks.plain_unet import PlainUNet
from scripts.training.losses import DiscriminatorLoss, Discriminators, GeneratorLoss
from scripts.training.step import SSCFTrainingStep
from scripts.training.trainer import (
    BATCH_KEYS,
    Curriculum,
    MovingAverage,
    SSCFTrainer,
    SynthesisTrainer,
    copy_network,
    draw_scenarios,
    gather_entries,
    in_memory_format,
    linear_decay,
)

SIZE = (32, 32)
CPU = torch.device("cpu")
COMPLETE = torch.ones(1, NUM_CONTRASTS, dtype=torch.bool)


# --------------------------------------------------------------------------------------------------------- scenarios
def ids(number: int) -> torch.Tensor:
    return torch.arange(number, dtype=torch.int64) * 7919 - 12345


def subsets() -> torch.Tensor:
    """All 15 sets of contrasts that a study may have."""
    return torch.cat([scenario_table(), COMPLETE])


def test_all_scenarios_of_a_complete_study_are_drawn_equally_often() -> None:
    number = 14000
    drawn = draw_scenarios(ids(number), COMPLETE.expand(number, -1), seed=3, epoch=1)
    counts = torch.tensor([(drawn == torch.tensor(row, dtype=torch.bool)).all(dim=1).sum() for row in SCENARIOS])
    assert counts.sum() == number
    assert float(((counts - 1000.0) ** 2 / 1000.0).sum()) < 34.5  # chi-square of 13 degrees of freedom at 0.1%


def test_scenario_depends_on_seed_epoch_and_slice_alone() -> None:
    number = 200
    complete = COMPLETE.expand(number, -1)
    drawn = draw_scenarios(ids(number), complete, seed=3, epoch=5)
    order = torch.randperm(number, generator=generator(0))
    assert torch.equal(draw_scenarios(ids(number)[order], complete, 3, 5), drawn[order])
    assert torch.equal(draw_scenarios(ids(number)[17:18], COMPLETE, 3, 5), drawn[17:18])
    for seed, epoch in ((4, 5), (3, 6)):
        other = draw_scenarios(ids(number), complete, seed, epoch)
        assert 0.8 < float((other != drawn).any(dim=1).float().mean()) < 1


@pytest.mark.parametrize("has", subsets().tolist())
def test_scenario_of_an_incomplete_study_is_one_that_leaves_something(has: list[bool]) -> None:
    number = 11000
    contrasts = torch.tensor(has)
    drawn = draw_scenarios(ids(number), contrasts.expand(number, -1), seed=1, epoch=1)
    assert bool(drawn.any(dim=1).all()) and not bool((drawn & ~contrasts).any())
    left = [tuple(bool(a and b) for a, b in zip(row, has, strict=True)) for row in SCENARIOS]
    left = [row for row in left if any(row)]
    for row in set(left):
        expected = left.count(row) / len(left)
        share = float((drawn == torch.tensor(row)).all(dim=1).double().mean())
        assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / number) + 1e-12


@pytest.mark.parametrize("extreme", [0.0, 1 - 2**-24])
def test_extreme_random_numbers_give_a_scenario_too(extreme: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scripts.training.trainer, "hash_uniform", lambda i, *_: torch.full((*i.shape, 1), extreme))
    drawn = draw_scenarios(ids(15), subsets(), 0, 0)
    assert bool(drawn.any(dim=1).all()) and not bool((drawn & ~subsets()).any())
    place = 0 if extreme == 0 else -1
    for has, row in zip(subsets(), drawn, strict=True):
        usable = [scenario & has for scenario in scenario_table() if bool((scenario & has).any())]
        assert torch.equal(row, usable[place])


def test_curriculum_allows_its_numbers_until_its_last_epochs() -> None:
    curriculum = Curriculum([[2, [3]], [5, [1, 2]]])
    assert [curriculum.numbers(epoch) for epoch in (1, 2, 3, 5, 6)] == [(3,), (3,), (1, 2), (1, 2), None]
    assert Curriculum().numbers(1) is None
    number = 600
    for numbers in ((3,), (1, 2)):
        drawn = draw_scenarios(ids(number), COMPLETE.expand(number, -1), 0, 1, numbers)
        assert {tuple(row) for row in drawn.tolist()} == {
            tuple(map(bool, row)) for row in SCENARIOS if sum(row) in numbers
        }
    # a study that has one contrast still gets a scenario
    drawn = draw_scenarios(ids(15), subsets(), 0, 1, (3,))
    assert bool(drawn.any(dim=1).all()) and not bool((drawn & ~subsets()).any())


@pytest.mark.parametrize("phases", [[[5, [1]], [2, [2]]], [[5, [4]]], [[5, [0]]], [[5, []]]])
def test_wrong_curriculum_is_refused(phases: list) -> None:
    with pytest.raises(ValueError, match="curriculum"):
        Curriculum(phases)


# ----------------------------------------------------------------------------------------------------- moving average
def averaged(decay: float) -> MovingAverage:
    torch.manual_seed(0)
    source = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()
    return MovingAverage(source, copy.deepcopy(source), decay)


def walk(average: MovingAverage, steps: int, seed: int) -> list[list[torch.Tensor]]:
    """Moves the source at random; returns its parameters after each step."""
    draw = generator(seed)
    history = []
    for _ in range(steps):
        with torch.no_grad():
            for parameter in average.source.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
        average.update()
        history.append([p.detach().clone() for p in average.source.parameters()])
    return history


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99, 0.9999])
def test_moving_average_is_the_normalized_weighted_sum_of_all_steps_before_and_after_a_resume(decay: float) -> None:
    stopped, average = averaged(decay), averaged(decay)
    history = walk(stopped, 5, seed=1)
    average.load_state_dict(stopped.state_dict())
    average.source.load_state_dict(stopped.source.state_dict())
    history += walk(average, 35, seed=2)
    steps = len(history)
    weights = [decay ** (steps - 1 - i) for i in range(steps)]
    for k, parameter in enumerate(average.average.parameters()):
        literal = sum(w * past[k] for w, past in zip(weights, history, strict=True)) / sum(weights)
        torch.testing.assert_close(parameter, literal, rtol=1e-10, atol=1e-10)


def test_moving_average_starts_at_the_source_and_leaves_its_own_buffers_alone() -> None:
    source = nn.BatchNorm1d(2)
    held = nn.BatchNorm1d(2)
    with torch.no_grad():
        source.weight.fill_(3.0)
        source.running_mean.fill_(5.0)
    average = MovingAverage(source, held, 0.9)
    assert torch.equal(held.weight, source.weight) and not held.weight.requires_grad
    average.update()
    assert float(held.running_mean.abs().sum()) == 0


@pytest.mark.parametrize("decay", [1.0, -0.1])
def test_moving_average_refuses_a_decay_out_of_range(decay: float) -> None:
    with pytest.raises(ValueError, match="decay must be in"):
        averaged(decay)


# ------------------------------------------------------------------------------------------------------- the trainer
def training_batch(number: int, seed: int = 0, first_patient: int = 1000) -> dict[str, torch.Tensor]:
    batch = random_batch(scenario_table()[:1].expand(number, -1), SIZE, seed, first_patient)
    return {key: batch[key] for key in BATCH_KEYS}


def rows(batch: dict[str, torch.Tensor], start: int, stop: int) -> dict[str, torch.Tensor]:
    return {key: value[start:stop] for key, value in batch.items()}


def make_trainer(
    loader: Any, epochs: int = 1, rate: float = 1e-3, adam: bool = False, distributed: bool = False, **changes: Any
) -> SSCFTrainer:
    """A trainer of tiny networks on the CPU whose bank holds four slices of other patients."""
    step = tiny_step(size=SIZE)
    torch.manual_seed(1)
    discriminators = Discriminators([PatchDiscriminator(2, 4, 1, num_layers_d=2, norm="INSTANCE") for _ in range(4)])
    optimizer = torch.optim.Adam if adam else torch.optim.SGD
    wrap = (lambda m: DistributedDataParallel(m, broadcast_buffers=False)) if distributed else (lambda m: m)
    return SSCFTrainer(
        device=CPU,
        max_epochs=epochs,
        train_data_loader=loader,
        step=wrap(step),
        training_step=step,
        optimizer=optimizer(step.parameters(), lr=rate),
        discriminators=discriminators,
        discriminator_step=wrap(discriminators),
        discriminator_optimizer=optimizer(discriminators.parameters(), lr=rate),
        average=MovingAverage(step.net, copy_network(step.net, CPU), 0.9),
        amp=False,
        **{"loss": GeneratorLoss(), "discriminator_loss": DiscriminatorLoss(), **changes},
    )


def weights(trainer: SynthesisTrainer) -> dict[str, torch.Tensor]:
    modules = {"net": trainer.training_step.net, "discriminators": trainer.discriminators}
    return {f"{n}.{k}": p.detach().clone() for n, m in modules.items() for k, p in m.named_parameters()}


def farthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert list(one) == list(other)
    return max(float((one[k] - other[k]).abs().max()) for k in one)


def all_finite(tensors: Sequence[torch.Tensor]) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in tensors)


def test_an_epoch_without_a_batch_and_another_network_are_refused() -> None:
    with pytest.raises(StudyError, match="less than one batch"):
        make_trainer([])
    with pytest.raises(StudyError, match="is a PlainUNet, not an SSCFNet: put the overlay of its baseline"):
        SSCFTrainingStep(PlainUNet(2, TINY_CHANNELS), SIZE)  # type: ignore[arg-type]


def test_loss_falls_on_a_batch_that_is_shown_again_and_again() -> None:
    batch = training_batch(4)
    # smooth images and lesions, as noise cannot be learned; a class that is absent would be a constant in the Dice term
    batch["target"] = torch.nn.functional.avg_pool2d(batch["target"], 9, 1, 4)
    batch["target"] = batch["target"] / batch["target"].abs().amax()
    batch["label"] = torch.zeros_like(batch["label"])
    for k in range(3):
        batch["label"][..., 8:20, 4 + 8 * k : 12 + 8 * k] = k + 1
    trainer = make_trainer([batch], epochs=40, rate=3e-3, adam=True)
    history: list[dict[str, float]] = []
    trainer.add_event_handler(
        IterationEvents.MODEL_COMPLETED, lambda e: history.append({k: float(v) for k, v in e.state.output.items()})
    )
    trainer.run()
    # the segmentation branch has a small part in the objective and is slower
    falls = {"loss": 0.8, "synthesis": 0.8, "reconstruction": 0.8, "discriminator": 0.8, "bce": 0.97, "dice": 0.997}
    for name, share in falls.items():
        first, last = (sum(h[name] for h in part) / 8 for part in (history[:8], history[-8:]))
        assert last < share * first, name
    assert trainer.state.metrics["train_loss"] == pytest.approx(history[-1]["loss"])
    assert trainer.average.steps == 40


class PlainStep(nn.Module):
    """The least that a training step is: a network without a bank, a mask or features."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Conv2d(8, 7, 3, padding=1)

    def forward(self, image: torch.Tensor, *_: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"pred": torch.tanh(self.net(image)), "available": image[:, 4:].flatten(2).amax(dim=2) > 0.5}


def test_plain_network_trains_by_the_same_loop_without_discriminators() -> None:
    torch.manual_seed(0)
    step = PlainStep()
    seen: list[torch.Tensor] = []

    def augmentation(batch: dict[str, torch.Tensor], seed: int, epoch: int) -> dict[str, torch.Tensor]:
        assert seed == 5
        return {**batch, "target": torch.full_like(batch["target"], 0.1 * epoch)}

    step.register_forward_hook(lambda module, args, output: seen.append(args[1]))
    trainer = SynthesisTrainer(
        device=CPU,
        max_epochs=3,
        train_data_loader=[training_batch(4)],
        step=step,
        training_step=step,
        optimizer=torch.optim.SGD(step.parameters(), lr=1e-3),
        loss=GeneratorLoss(),
        seed=5,
        augmentation=augmentation,
        curriculum=[[3, [1]]],
        amp=False,
    )
    start = step.net.weight.detach().clone()
    trainer.run()
    assert set(trainer.state.output) == {"loss", "synthesis", "reconstruction", "tumor"}
    assert not torch.equal(start, step.net.weight)
    assert [float(target.mean()) for target in seen] == pytest.approx([0.1, 0.2, 0.3])
    assert trainer.state.batch["image"][:, 4:, 0, 0].sum(dim=1).tolist() == [1, 1, 1, 1]


@pytest.mark.slow
def test_compiled_step_and_loss_are_one_graph_each_however_full_the_bank_is() -> None:
    """Neither the entries of the bank nor the scenario make the compiler start anew."""
    torch.compiler.reset()
    counters.clear()
    batches = [training_batch(2, seed, 1000 + 10 * seed) for seed in range(3)]
    trainer = make_trainer(batches)
    trainer.step, trainer.loss = (
        torch.compile(part, dynamic=False, backend="eager") for part in (trainer.step, trainer.loss)
    )
    # empty, then filled by two entries with each batch
    trainer.bank.count.zero_()
    trainer.run()
    assert int(trainer.bank.count) == 6
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]


def test_accumulated_batches_make_the_step_of_one_large_batch() -> None:
    batch = training_batch(4)
    # slices of one patient do not see each other's entries, so the entry of the first half changes nothing for the rest
    batch["patient"] = torch.full_like(batch["patient"], 1000)
    start = weights(make_trainer([batch]))
    whole = make_trainer([batch], rate=1e-2)
    whole.run()
    halves = make_trainer([rows(batch, 0, 2), rows(batch, 2, 4)], rate=1e-2, accumulation_steps=2)
    halves.run()
    assert whole.average.steps == halves.average.steps == 1
    moved = farthest(start, weights(whole))
    assert moved > 1e-2
    assert farthest(weights(whole), weights(halves)) < 1e-4 * moved
    apart = make_trainer([rows(batch, 0, 2), rows(batch, 2, 4)], rate=1e-2)
    apart.run()
    assert apart.average.steps == 2 and farthest(weights(whole), weights(apart)) > 1e-2 * moved


def test_shorter_rest_of_an_epoch_makes_a_step_of_full_weight() -> None:
    batches = [training_batch(2, seed, 1000 + 10 * seed) for seed in range(3)]
    trainer = make_trainer(batches, epochs=2, accumulation_steps=2)
    trainer.run()
    assert trainer.average.steps == 4
    alone = make_trainer(batches[:1])
    alone.run()
    rest = make_trainer(batches[:1], accumulation_steps=2)
    rest.run()
    assert farthest(weights(alone), weights(rest)) == 0


def test_settings_that_make_no_sense_are_refused() -> None:
    for changes, message in (
        ({"accumulation_steps": 0}, "accumulation_steps must be at least 1"),
        ({"reconstructions": 1}, "needs shared_scenarios"),
        ({"discriminator_loss": None}, "discriminators need an optimizer and a loss"),
    ):
        with pytest.raises(ValueError, match=message):
            make_trainer([training_batch(2)], **changes)


def test_incomplete_studies_train_and_what_they_lack_has_no_influence() -> None:
    batch = training_batch(4)
    batch["has_contrast"] = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 1], [1, 1, 0, 1]], dtype=torch.bool)
    batch["has_mask"] = torch.tensor([True, False, True, False])
    results = []
    for absent in (float("nan"), -1.0):
        known = batch["has_contrast"].view(4, 4, 1, 1)
        trainer = make_trainer([batch | {"target": torch.where(known, batch["target"], absent)}], epochs=3)
        trainer.run()
        assert all_finite(list(weights(trainer).values())) and all_finite(list(trainer.bank.buffers()))
        assert all(math.isfinite(value) for value in trainer.state.metrics.values())
        assert int(trainer.bank.count) == 6
        results.append(weights(trainer))
    assert farthest(*results) == 0


def test_non_finite_loss_ends_the_run_with_one_sentence() -> None:
    batch = training_batch(2)
    batch["target"][0, :, 3, 3] = float("nan")
    trainer = make_trainer([batch], epochs=3)
    with pytest.raises(StudyError) as stopped:
        trainer.run()
    sentence = str(stopped.value)
    assert "train_loss" in sentence and "became non-finite in epoch 1" in sentence
    assert "\n" not in sentence and "train_ctdl" not in sentence
    assert trainer.state.epoch == 1


def test_each_loss_reaches_its_own_networks_alone() -> None:
    # the first of two accumulated batches: gradients are still there when the iteration ends
    trainer = make_trainer([training_batch(2), training_batch(2, 1, 2000)], accumulation_steps=2)
    seen: dict[str, dict[str, torch.Tensor | None]] = {}

    def gradients() -> dict[str, torch.Tensor | None]:
        modules = {"net": trainer.training_step.net, "discriminators": trainer.discriminators}
        return {
            f"{n}.{k}": None if p.grad is None else p.grad.clone()
            for n, m in modules.items()
            for k, p in m.named_parameters()
        }

    @trainer.on(IterationEvents.BACKWARD_COMPLETED)
    def _() -> None:
        seen.setdefault("generator", gradients())

    @trainer.on(IterationEvents.MODEL_COMPLETED)
    def _() -> None:
        seen.setdefault("both", gradients())

    trainer.run()
    for name, after in seen["both"].items():
        before = seen["generator"][name]
        if name.startswith("discriminators"):
            assert before is None and after is not None
        else:
            assert before is not None and after is not None and torch.equal(before, after), name
    # the adversarial term does reach the network through the frozen discriminators
    without = make_trainer([training_batch(2), training_batch(2, 1, 2000)], accumulation_steps=2)
    without.loss = GeneratorLoss(beta=(100.0, 30.0, 50.0, 50.0, 0.0))
    without.run()
    assert farthest(weights(trainer), weights(without)) > 0
    assert all(p.requires_grad for p in trainer.discriminators.parameters())


def test_perceptual_term_is_the_distance_of_the_missing_contrasts_and_reaches_the_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    features = alexnet(weights=None).features.state_dict()
    torch.save({f"features.{name}": tensor for name, tensor in features.items()}, tmp_path / "alexnet.pth")
    distance = PerceptualDistance(tmp_path / "alexnet.pth")
    batch = training_batch(3)
    batch["has_contrast"][0, 3] = False
    batch["target"][0, 3] = float("nan")
    loss = GeneratorLoss(beta=(0, 0, 0, 0, 0), segmentation_weight=0, perceptual_weight=2.0)
    trainer = make_trainer([batch], seed=5, loss=loss, perceptual=distance)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    forward, before = trainer.step.forward, weights(trainer)

    def watched(*inputs: torch.Tensor) -> dict:
        output = forward(*inputs)
        seen.append((output["pred"].detach(), output["available"]))
        return output

    trainer.step.forward = watched  # type: ignore[method-assign]
    trainer.run()
    (pred, available), package = seen[0], distance.model
    expected = []
    for b in range(3):
        missing = [k for k in range(4) if not available[b, k] and batch["has_contrast"][b, k]]
        pairs = [(pred[b, k].expand(1, 3, -1, -1), batch["target"][b, k].expand(1, 3, -1, -1)) for k in missing]
        expected.append(sum(float(package(*pair)) for pair in pairs) / len(pairs) if pairs else 0.0)
    found = trainer.state.output
    assert float(found["perceptual"]) == pytest.approx(sum(expected) / 3, rel=1e-4) and sum(expected) > 0
    assert float(found["loss"]) == pytest.approx(2 * float(found["perceptual"]))
    changed = weights(trainer)
    moved = [name for name in before if not torch.equal(before[name], changed[name])]
    assert any("decoder" in name for name in moved) and any("encoder" in name for name in moved)


def test_available_contrasts_of_a_batch_are_those_that_were_drawn() -> None:
    batch = training_batch(4)
    trainer = make_trainer([batch], epochs=3, seed=11)
    seen: list[torch.Tensor] = []
    forward = trainer.step.forward

    def watched(image: torch.Tensor, *others: torch.Tensor) -> dict:
        seen.append(image.clone())
        return forward(image, *others)

    trainer.step.forward = watched  # type: ignore[method-assign]
    trainer.run()
    for epoch, image in enumerate(seen, start=1):
        drawn = draw_scenarios(torch.arange(4), batch["has_contrast"], 11, epoch).view(4, 4, 1, 1)
        assert torch.equal(image[:, 4:], drawn.expand(4, 4, *SIZE).float())
        assert torch.equal(image[:, :4], torch.where(drawn, batch["target"], -1.0))
    assert not torch.equal(seen[0], seen[1])


def test_reconstructed_contrast_is_drawn_anew_in_every_epoch() -> None:
    trainer = make_trainer([training_batch(2)], shared_scenarios=True, reconstructions=1, curriculum=[[20, [3]]])
    places = set()
    for epoch in range(1, 21):
        trainer.state.epoch = epoch
        _, scenario = trainer.draw_batch_scenarios(torch.arange(2), torch.ones(2, NUM_CONTRASTS).bool())
        assert scenario is not None
        places.add([i for i, given in enumerate(scenario.available) if given].index(*scenario.decoded))
    assert places == {0, 1, 2}


def test_entries_of_the_dependency_loss_are_drawn_anew_in_every_epoch() -> None:
    trainer = make_trainer([training_batch(2)], loss=GeneratorLoss(ctdl_entries=1))
    trainer.bank.enqueue(random_entries(trainer.bank, range(1, trainer.bank.size + 1)))
    slots = set()
    for epoch in range(1, 21):
        trainer.state.epoch = epoch
        draw = trainer.draw_bank_entries({"occurrence": torch.arange(1), "patient": torch.zeros(1, dtype=torch.int64)})
        assert draw is not None and draw.usable.all()
        slots.add(int(draw.slots))
    assert len(slots) > 2


class Rows(Dataset):
    """A batch as a dataset."""

    def __init__(self, batch: dict[str, torch.Tensor]) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return len(self.batch["slice_id"])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {key: value[index] for key, value in self.batch.items()}


def test_number_of_workers_changes_nothing() -> None:
    data = Rows(training_batch(5))
    results = []
    for workers in (0, 2):
        torch.manual_seed(workers)  # state of generators must not matter
        sampler = EpochSampler(data, 8, seed=2)
        loader = DataLoader(data, 2, sampler=sampler, num_workers=workers, persistent_workers=workers > 0)
        trainer = make_trainer(loader, epochs=2)
        trainer.run()
        results.append((weights(trainer), trainer.bank.slice_id.clone(), dict(trainer.state.metrics)))
    (one, bank, metrics), (other, other_bank, other_metrics) = results
    assert farthest(one, other) == 0 and torch.equal(bank, other_bank) and metrics == other_metrics


def test_epoch_metrics_are_means_over_its_batches_and_tell_of_the_bank() -> None:
    batches = [training_batch(2, seed, 1000 + 10 * seed) for seed in range(3)]
    trainer = make_trainer(batches, epochs=2)
    losses: list[float] = []
    trainer.add_event_handler(
        IterationEvents.MODEL_COMPLETED, lambda e: losses.append(float(e.state.output["discriminator"]))
    )
    trainer.run()
    assert trainer.state.metrics["train_discriminator"] == pytest.approx(sum(losses[3:]) / 3)
    assert trainer.state.metrics["bank_effective_size"] == 6 == trainer.state.metrics["bank_patients"]
    assert {"train_loss", "train_synthesis", "train_ctdl", "bank_mean_spread"} <= set(trainer.state.metrics)


# --------------------------------------------------------------------------------------------------- two processes
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_channels_last_is_of_convolutions_alone(spatial_dims: int) -> None:
    last = {2: torch.channels_last, 3: torch.channels_last_3d}[spatial_dims]
    net = in_memory_format(tiny_net(spatial_dims=spatial_dims), channels_last=True)
    convolutions = [m.weight for m in net.modules() if isinstance(m, _ConvNd) and max(m.kernel_size) > 1]
    assert convolutions and all(weight.is_contiguous(memory_format=last) for weight in convolutions)
    own = [m._parameters for m in net.modules() if isinstance(m, _ConvNd)]
    others = {*net.parameters(), *net.buffers()} - {p for parameters in own for p in parameters.values()}
    assert all(tensor.is_contiguous() for tensor in others)


def rank_batches() -> list[dict[str, torch.Tensor]]:
    """Two steps of a batch of four, of which each process takes two."""
    return [training_batch(4, seed, 1000 + 10 * seed) for seed in range(2)]


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    entries = random_entries(tiny_step(filled=0).bank, [10 * rank, 10 * rank + 1], seed=rank)
    gathered = gather_entries(entries)
    # as EpochSampler deals them out
    own = [{name: value[rank::2] for name, value in batch.items()} for batch in rank_batches()]
    trainer = make_trainer(own, rate=1e-2, distributed=True)
    trainer.run()
    state = {
        "weights": weights(trainer),
        "bank": trainer.bank.state_dict(),
        "average": trainer.average.state_dict(),
        "gathered": list(gathered),
    }
    torch.save(state, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_hold_the_same_bank_and_weights_as_one_with_the_whole_batch(tmp_path: Path) -> None:
    mp.start_processes(run_rank, (str(tmp_path),), nprocs=2, start_method="spawn")
    one, other = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    for part in ("weights", "bank"):
        assert list(one[part]) == list(other[part])
        for name, tensor in one[part].items():
            assert torch.equal(tensor, other[part][name]), name
    assert one["average"]["steps"] == other["average"]["steps"] == 2

    bank = tiny_step(filled=0).bank
    parts = [random_entries(bank, [10 * rank, 10 * rank + 1], seed=rank) for rank in range(2)]
    for name, *tensors, ours, theirs in zip(
        BankEntries._fields, *parts, one["gathered"], other["gathered"], strict=True
    ):
        expected = torch.cat(tensors)
        assert torch.equal(ours, expected) and torch.equal(theirs, expected), name
        assert ours.dtype == expected.dtype, name

    start = weights(make_trainer(rank_batches()))
    single = make_trainer(rank_batches(), rate=1e-2)
    single.run()
    moved = farthest(start, weights(single))
    assert farthest(weights(single), one["weights"]) < 1e-3 * moved
    # those of a step lie in the order of the processes, so that the oldest, which have gone, are not the same
    slots = {int(name): slot for slot, name in enumerate(one["bank"]["slice_id"])}
    common = [(slot, slots[name]) for slot, name in enumerate(single.bank.slice_id.tolist()) if name in slots]
    ours, theirs = (list(column) for column in zip(*common, strict=True))
    assert len(common) >= 5
    assert torch.equal(single.bank.patient[ours], one["bank"]["patient"][theirs])
    torch.testing.assert_close(single.bank.mean[ours], one["bank"]["mean"][theirs], rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------- parts
def test_rate_is_full_until_the_decay_starts_and_then_falls_linearly_to_zero() -> None:
    factor = linear_decay(600, 300)
    assert [factor(epoch) for epoch in (0, 150, 300, 450, 599, 600, 700)] == [1, 1, 1, 0.5, 1 / 300, 0, 0]
    constant = linear_decay(10, 10)
    assert [constant(epoch) for epoch in (0, 9, 10)] == [1, 1, 0]


def test_copied_network_shares_nothing_and_evaluates() -> None:
    net = tiny_net().train()
    copied = copy_network(net, CPU)
    assert not copied.training and net.training
    for ours, theirs in zip(net.state_dict().values(), copied.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs) and (ours.numel() == 0 or ours.data_ptr() != theirs.data_ptr())
