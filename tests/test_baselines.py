# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Baselines: shapes, no leak of missing contrasts, losses and curriculum of MM-GAN, whole runs of the configs."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import pytest
import torch
from builders import (
    TINY_CHANNELS,
    all_availabilities,
    assert_same,
    bundle_workflow,
    config_files,
    generator,
    random_batch,
    tiny_run,
    train_in_process,
)
from monai.bundle import ConfigParser
from torch import nn

from scripts.contrasts import StudyError, scenario_table
from scripts.networks.availability import network_input
from scripts.networks.mmgan import MMGANGenerator
from scripts.networks.plain_unet import PlainUNet
from scripts.networks.weights import load_weights, network_from_weights, save_weights
from scripts.research.baselines import MMGANDiscriminator, MMGANDiscriminatorLoss, MMGANTrainer, PlainTrainingStep
from scripts.training.losses import GeneratorLoss
from scripts.training.trainer import Curriculum, draw_scenarios

#: Small networks of both kinds.
BUILDERS = {"unet": lambda: PlainUNet(2, TINY_CHANNELS), "mmgan": lambda: MMGANGenerator(2, (4, 8, 8, 8), dropout=0.0)}
TINY_MMGAN = {"channels": [4, 8, 8, 8], "dropout": 0.0, "curriculum": [[1, [3]], [2, [2, 3]]]}


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return BUILDERS[name]()


def inputs(size: tuple[int, int] = (32, 32), seed: int = 0) -> torch.Tensor:
    target = torch.rand((14, 4, *size), generator=generator(seed)) * 2 - 1
    return network_input(target, scenario_table())


@pytest.mark.parametrize("name", BUILDERS)
def test_four_contrasts_and_three_probabilities_of_any_scenario(name: str) -> None:
    target = torch.rand((16, 4, 48, 80), generator=generator(0)) * 2 - 1
    pred = network(name)(network_input(target, all_availabilities()))
    assert pred.shape == (16, 7, 48, 80) and pred.isfinite().all()
    assert pred[:, :4].abs().max() <= 1 and (pred[:, 4:] >= 0).all() and (pred[:, 4:] <= 1).all()


def test_unet_starts_with_few_tumor_and_takes_presets_and_volumes() -> None:
    assert network("unet")(inputs())[:, 4:].mean().item() == pytest.approx(0.02, abs=0.01)
    for spatial_dims, channels in ((2, "tiny"), (3, TINY_CHANNELS)):
        net = PlainUNet(spatial_dims, channels)
        assert net(torch.ones(1, 8, *[16] * spatial_dims)).shape == (1, 7, *[16] * spatial_dims)
    with pytest.raises(ValueError, match="channels must be numbers or one of"):
        PlainUNet(2, "huge")
    with pytest.raises(ValueError, match="channels must be numbers or one of"):
        PlainUNet(2, 5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch normalization"):
        PlainUNet(2, TINY_CHANNELS, norm="BATCH")


def test_mmgan_has_the_published_size_and_takes_slices_of_192() -> None:
    with torch.device("meta"):
        generator_, discriminator = MMGANGenerator(), MMGANDiscriminator()
        assert generator_(torch.zeros(1, 8, 192, 192)).shape == (1, 7, 192, 192)
    sizes = [sum(p.numel() for p in net.parameters()) / 1e6 for net in (generator_, discriminator)]
    assert sizes == pytest.approx([54.41, 2.79], abs=0.01)


def test_mmgan_pads_with_background_and_crops_again() -> None:
    net, image = network("mmgan").eval(), inputs((24, 40))
    padded = torch.cat([torch.full((14, 4, 32, 48), -1.0), torch.zeros(14, 4, 32, 48)], dim=1)
    padded[:, :4, 4:28, 4:44] = image[:, :4]
    padded[:, 4:] = image[:, 4:].amax(dim=(2, 3), keepdim=True)
    assert torch.equal(net(image), net(padded)[:, :, 4:28, 4:44])


def test_mmgan_keeps_available_contrasts_and_has_no_mask() -> None:
    image, available = inputs(), scenario_table()
    pred = network("mmgan")(image)
    assert torch.equal(pred[:, :4][available], image[:, :4][available])
    assert not torch.equal(pred[:, :4][~available], image[:, :4][~available]) and not pred[:, 4:].any()


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("training", [True, False])
def test_missing_truth_does_not_reach_the_prediction(name: str, training: bool) -> None:
    step = PlainTrainingStep(network(name)).train(training)
    batch = random_batch(scenario_table())
    batch["has_contrast"][:, 0] = False  # which is not available then
    output = step(**batch)
    assert not output["available"][:, 0].any() and torch.equal(output["available"][:, 1:], scenario_table()[:, 1:])
    assert ("logits" in output) == (name == "unet")
    hidden = dict(batch)
    missing = ~scenario_table()[:, :, None, None]
    hidden["target"] = torch.where(missing, torch.nan, batch["target"])
    # also where a stray value stands in the channel of a missing contrast
    hidden["image"] = torch.cat([torch.where(missing, torch.nan, batch["image"][:, :4]), batch["image"][:, 4:]], dim=1)
    hidden["label"] = torch.zeros_like(batch["label"])
    assert torch.equal(step(**hidden)["pred"], output["pred"])


@pytest.mark.parametrize("name", BUILDERS)
def test_samples_of_a_batch_do_not_mix(name: str) -> None:
    net, image = network(name).train(), inputs()
    together = net(image)
    for k in (0, 13):
        torch.testing.assert_close(net(image[k : k + 1])[0], together[k], atol=1e-5, rtol=0)


def test_weights_of_another_network_are_refused_by_name(tmp_path: Path) -> None:
    save_weights(tmp_path / "model.pt", network("unet"))
    with pytest.raises(StudyError, match="they are weights of PlainUNet, not of MMGANGenerator"):
        load_weights(network("mmgan"), tmp_path / "model.pt")


def test_weights_of_a_baseline_are_fine_tuned_with_its_overlay(tmp_path: Path) -> None:
    save_weights(
        tmp_path / "unet.pt", network("unet"), {"preprocessing": {"image_size": 32, "spacing": 4.0, "scaling": "brain"}}
    )
    parser = ConfigParser()
    parser.read_config(config_files("train", "baselines/unet", "finetune"))
    parser.update({"pretrained_path": str(tmp_path / "unet.pt"), "device": "cpu"})
    step = parser.get_parsed_content("training_step")
    assert isinstance(step, PlainTrainingStep) and isinstance(step.net, PlainUNet)
    assert_same(dict(step.net.named_parameters()), dict(network("unet").named_parameters()))


@pytest.mark.parametrize(("name", "config"), [("unet", "train"), ("mmgan", "baselines/mmgan")])
def test_losses_of_the_config_fall_on_one_batch(name: str, config: str) -> None:
    parser = ConfigParser()
    parser.read_config(config_files("train", config))
    loss, step = parser.get_parsed_content("loss"), PlainTrainingStep(network(name))
    batch = random_batch(scenario_table()[[3, 12]])
    batch["target"] = batch["target"] * 0.2 + torch.tensor([-0.5, 0.0, 0.3, 0.6])[:, None, None]
    batch["image"] = network_input(batch["target"], scenario_table()[[3, 12]])
    truth = [batch[key] for key in ("target", "label", "has_contrast", "has_mask")]
    optimizer = torch.optim.Adam(step.parameters(), lr=0.01)
    history = []
    for _ in range(30):
        terms = loss(step(**batch), *truth)
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
        history.append({term: float(value.detach()) for term, value in terms.items()})
    assert history[-1]["synthesis"] < 0.5 * history[0]["synthesis"]
    if name == "unet":
        assert history[-1]["bce"] < history[0]["bce"] and history[-1]["dice"] < history[0]["dice"]


# -------------------------------------------------------------------------------------------------- MM-GAN's training
def test_objective_of_mmgan_is_its_own_over_the_recipe_too() -> None:
    parser = ConfigParser()
    parser.read_config(config_files("train", "recipe/common", "recipe/3_full_size", "baselines/mmgan"))
    weights = parser.get_parsed_content("loss").weights
    assert {name for name, weight in weights.items() if weight} == {"synthesis", "adversarial"}


def mmgan_trainer(discriminators: nn.Module | None) -> SimpleNamespace:
    """What ``score`` and ``compute_discriminator_loss`` of the trainer read."""
    return SimpleNamespace(
        discriminators=discriminators,
        discriminator_step=discriminators,
        discriminator_loss=MMGANDiscriminatorLoss(),
        stacks=MMGANTrainer.stacks,
    )


class Sums(nn.Module):
    """Scores that depend on every voxel of both stacks, with one weight to learn."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))

    def forward(self, shown: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        return (self.weight * shown * (1 + real.roll(1, dims=1))).flatten(2)


def mmgan_batch() -> tuple[dict, dict]:
    """A step's output and its batch: the 14 scenarios; T2 of the second study does not exist and holds NaN."""
    available = scenario_table()
    batch = random_batch(available, (4, 4))
    batch["has_contrast"][1, 3] = False
    batch["target"][1, 3] = torch.nan
    batch["missing"] = ~available & batch["has_contrast"]
    pred = (torch.rand((14, 7, 4, 4), generator=generator(4)) * 2 - 1).requires_grad_()
    return {"pred": pred, "available": available & batch["has_contrast"]}, batch


def literal_stacks(pred: torch.Tensor, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """f and x of MM-GAN, contrast by contrast."""
    x = batch["target"].clone()
    x[1, 3] = -1.0
    f = x.clone()
    for b in range(14):
        for k in range(4):
            if batch["missing"][b, k]:
                f[b, k] = pred[b, k]
    return f, x


def test_generator_loss_of_the_config_counts_missing_contrasts_alone() -> None:
    parser = ConfigParser()
    parser.read_config(config_files("train", "baselines/mmgan"))
    loss: GeneratorLoss = parser.get_parsed_content("loss")
    output, batch = mmgan_batch()
    pred, discriminator = output["pred"], Sums()
    scores = MMGANTrainer.generator_scores(mmgan_trainer(discriminator), output, batch)  # type: ignore[arg-type]
    terms = loss(output, batch["target"], batch["label"], batch["has_contrast"], batch["has_mask"], fake_scores=scores)
    f, x = literal_stacks(pred, batch)
    judged = discriminator(f, x)
    total = 0.0
    for b in range(14):
        missing = [k for k in range(4) if batch["missing"][b, k]]
        for k in missing:
            l1 = (pred[b, k] - batch["target"][b, k]).abs().mean()
            total += (0.1 * ((judged[b, k] - 1) ** 2).mean() + 0.9 * l1) / len(missing) / 14
    assert set(terms) == {"loss", "synthesis", "adversarial"}
    torch.testing.assert_close(terms["loss"], total)
    (gradient,) = torch.autograd.grad(terms["loss"], pred)
    assert gradient.isfinite().all()
    assert (gradient[:, :4].flatten(2).abs().amax(dim=2) > 0).equal(batch["missing"])


def test_discriminator_learns_a_label_for_each_contrast_and_gives_the_generator_no_gradient() -> None:
    output, batch = mmgan_batch()
    discriminator = Sums()
    judged = MMGANTrainer.compute_discriminator_loss(mmgan_trainer(discriminator), output, batch)  # type: ignore[arg-type]
    f, x = literal_stacks(output["pred"].detach(), batch)
    total = torch.zeros(())
    for b in range(14):
        existing = [k for k in range(4) if batch["has_contrast"][b, k]]
        for k in existing:
            label = 0.0 if batch["missing"][b, k] else 1.0
            real = ((discriminator(x, x)[b, k] - 1) ** 2).mean()
            fake = ((discriminator(f, x)[b, k] - label) ** 2).mean()
            total = total + 0.5 * (real + fake) / len(existing) / 14
    torch.testing.assert_close(judged, total)
    judged.backward()
    assert discriminator.weight.grad.isfinite() and output["pred"].grad is None


def test_discriminator_judges_each_contrast_by_all_of_both_stacks() -> None:
    torch.manual_seed(0)
    net = MMGANDiscriminator(2, 4)
    shown, real = (torch.rand((2, 4, 32, 32), generator=generator(k)).requires_grad_() for k in (1, 2))
    scores = net(shown, real)
    assert scores.shape[:2] == (2, 4)
    for stack in torch.autograd.grad(scores[0, 2].sum(), (shown, real)):
        assert (stack[0].flatten(1).abs().amax(dim=1) > 0).all() and not stack[1].any()


def test_curriculum_of_the_config_goes_from_one_missing_contrast_to_all_scenarios() -> None:
    parser = ConfigParser()
    parser.read_config(config_files("train", "baselines/mmgan"))
    curriculum = Curriculum(parser.get_parsed_content("curriculum"))
    ids, has = torch.arange(400), torch.ones(400, 4, dtype=torch.bool)
    for epochs, numbers in (((1, 10), {3}), ((11, 20), {2, 3}), ((21, 60), {1, 2, 3})):
        for epoch in epochs:
            drawn = draw_scenarios(ids, has, 0, epoch, curriculum.numbers(epoch))
            assert set(drawn.sum(dim=1).tolist()) == numbers
    # the learning rate is constant to the last epoch
    factor = parser.get_parsed_content("lr_scheduler#lr_lambda")
    assert {factor(epoch) for epoch in range(60)} == {1.0}


# ------------------------------------------------------------------------------------------------------------ configs
@pytest.mark.parametrize(("name", "changes"), [("unet", {}), ("mmgan", TINY_MMGAN)])
def test_configs_train_validate_infer_and_evaluate(
    name: str, changes: dict, tmp_path: Path, phantom_cohort: Path
) -> None:
    # a rate at which four epochs already show
    overrides = tiny_run(phantom_cohort, tmp_path, learning_rate=0.005, epoch_samples=16, **changes)
    configs = config_files("train", f"baselines/{name}")
    workflow = train_in_process(configs, overrides)
    with (tmp_path / "validation.csv").open() as file:
        assert [int(row["epoch"]) for row in csv.DictReader(file)] == [2, 4]
    trainer = workflow.parser.get_parsed_content("train#trainer")
    # an untrained network gives gray, 0.8 away from the truth, which is mostly background
    assert trainer.state.metrics["train_synthesis"] < 0.7
    losses = set(trainer.state.output)
    segmented = {"bce", "dice", "reconstruction", "tumor"} if name == "unet" else set()
    assert losses == {"loss", "synthesis", "adversarial", "discriminator"} | segmented
    kind = type(workflow.parser.get_parsed_content("average_network"))
    assert type(network_from_weights(tmp_path / "model.pt")) is kind
    assert not (tmp_path / "bank_slices.json").exists()

    (test_study,) = json.loads((tmp_path / "split.json").read_text())["test"]
    shutil.copytree(phantom_cohort / test_study, tmp_path / "in" / test_study)
    for left_out in ("t1", "seg"):
        (tmp_path / "in" / test_study / f"{test_study}_{left_out}.nii.gz").unlink()
    paths = {"dataset_dir": tmp_path / "in", "output_dir": tmp_path / "filled", "ckpt_path": tmp_path / "model.pt"}
    bundle_workflow("inference", **paths).run()
    made = nib.load(tmp_path / "filled" / test_study / f"{test_study}_t1_synthetic.nii.gz")
    given = nib.load(phantom_cohort / test_study / f"{test_study}_t1.nii.gz")
    assert made.shape == given.shape and made.get_fdata().max() > 0

    overrides |= {"protocols": ["volume"], "lpips": False, "scenarios": ["FLAIR+T2"]}
    train_in_process([*configs, *config_files("evaluate")], overrides)
    with (tmp_path / "evaluation" / "scores.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["method"] == "network"]
    assert {row["study"] for row in rows} == {test_study}
    assert {row["of"] for row in rows if row["score"] == "psnr"} == {"T1", "T1ce"}
    assert any(row["score"] == "dice" for row in rows) == (name == "unet")
