# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""A whole training step and inference on a CUDA device that is not there: a tensor on another device is an error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from unittest.mock import patch

import pytest
import torch
from builders import TINY_CHANNELS
from monai.losses import PatchAdversarialLoss
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from benchmarks.training import build_trainer, synthetic_batch
from scripts.contrasts import SCENARIOS, scenario_table
from scripts.evaluation.metrics import ScenarioScores
from scripts.networks.availability import network_input
from scripts.training.step import Scenario
from scripts.training.trainer import SSCFTrainer

SIZE = 32
CASES = {"default": {}, "shared": {"shared_scenarios": True, "reconstructions": 1, "bank_samples": 1}}
CASES["literal"] = {
    "network_def#head": "sigmoid",
    "network_def#keys": "each_scale",
    "aggregation": "concat",
    "entry": "literal",
    "head_weight": 0.0,
    "training_step#refresh": False,
    "loss#printed_order": True,
}


def apply(module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
    """``Module._apply`` with new parameters: it would swap tensors, which it cannot do with fake ones."""
    for child in module.children():
        apply(child, change)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[name] = nn.Parameter(change(parameter.detach()), parameter.requires_grad)
    for name, buffer in module._buffers.items():
        module._buffers[name] = None if buffer is None else change(buffer)
    return module


@pytest.fixture
def fake_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    monkeypatch.setattr(nn.Module, "_apply", apply)

    def target(_: PatchAdversarialLoss, scores: torch.Tensor, real: bool) -> torch.Tensor:
        return torch.full_like(scores, float(real))

    # MONAI's asks for the tensor type by its name, for which a driver must be there
    monkeypatch.setattr(PatchAdversarialLoss, "get_target_tensor", target)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield torch.device("cuda:0")


def build(device: torch.device, **changes: object) -> SSCFTrainer:
    settings = {"width": list(TINY_CHANNELS), "batch_size": 2, "bank_size": 4, "image_size": SIZE}
    loader = {"train#dataloader": [0], "discriminator_channels": 4}
    trainer, _ = build_trainer(str(device), **settings, **loader, **changes)
    trainer.state.epoch, trainer.state.iteration, trainer.state.epoch_length = 1, 1, 1
    return trainer


def step(trainer: SSCFTrainer) -> dict[str, torch.Tensor]:
    """One iteration; what is read on the host, scenarios and what discriminators judge, is given.

    Without a driver autograd's engine refuses a CUDA graph: gradients are then zeros, and all else is as it is.
    """

    def backward(loss: torch.Tensor) -> None:
        assert loss.requires_grad
        for parameter in [*trainer.training_step.parameters(), *trainer.discriminators.parameters()]:
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None

    table = torch.tensor([SCENARIOS[4], SCENARIOS[4 if trainer.shared_scenarios else 9]], dtype=torch.bool)
    sources = tuple(i for i, given in enumerate(SCENARIOS[4]) if given)
    scenario = Scenario(tuple(map(bool, SCENARIOS[4])), sources[:1]) if trainer.shared_scenarios else None
    with (
        pytest.MonkeyPatch.context() as patched,
        patch.object(trainer, "draw_batch_scenarios", return_value=(table, scenario)),
        patch("scripts.training.trainer.samples_to_judge", lambda _: [torch.tensor([0, 1]) for _ in range(4)]),
    ):
        if not torch.cuda.is_available():
            patched.setattr(torch.Tensor, "backward", backward)
        trainer._open_epoch()
        return trainer._iteration(trainer, synthetic_batch(2, (SIZE, SIZE)))


@pytest.mark.parametrize("name", CASES)
def test_training_step_keeps_to_its_device(fake_device: torch.device, name: str) -> None:
    trainer = build(fake_device, **CASES[name])
    before = trainer.bank.key._version
    losses = step(trainer)
    assert {"ctdl", "bce", "synthesis", "feature", "adversarial", "discriminator"} <= set(losses)
    assert all(isinstance(value, FakeTensor) and value.device == fake_device for value in losses.values())
    assert trainer.bank.key._version > before and trainer.bank.key.device == fake_device
    assert all(value.device == fake_device for value in trainer.epoch_metrics().values())


@pytest.mark.parametrize("name", ["default", "literal"])
def test_inference_and_scores_keep_to_their_device(fake_device: torch.device, name: str) -> None:
    net = build(fake_device, **CASES[name]).training_step.net.eval()
    target = torch.zeros(2, 4, SIZE, SIZE, device=fake_device)
    for scenario in (0, 4):
        available = scenario_table(fake_device)[[scenario] * 2]
        image = network_input(target, available)
        with torch.no_grad():
            pred = net(image)
            alone = net.for_scenario([bool(given) for given in SCENARIOS[scenario]])(image)
        assert pred.device == alone.device == fake_device and pred.shape == alone.shape == (2, 7, SIZE, SIZE)
        scores = ScenarioScores(["a"], device=fake_device)
        whole, place = torch.ones(2, 4, dtype=torch.bool, device=fake_device), torch.zeros(2, device=fake_device).long()
        label = torch.zeros(2, 1, SIZE, SIZE, device=fake_device, dtype=torch.uint8)
        scores.update([pred, target, target, label, available, whole, whole[:, 0], place, place + scenario])
        assert scores.tables()["psnr"].device == fake_device


@pytest.mark.parametrize("place", ["bank.patient", "net.bank_mean", "net.citim.psi.bias"])
def test_tensor_on_the_wrong_device_is_found(fake_device: torch.device, place: str) -> None:
    trainer = build(fake_device)
    module = trainer.training_step
    *path, name = place.split(".")
    for part in path:
        module = getattr(module, part)
    wrong = torch.zeros_like(getattr(module, name), device="cpu")
    if name in module._buffers:
        module._buffers[name] = wrong
    else:
        module._parameters[name] = torch.nn.Parameter(wrong)
    with pytest.raises(RuntimeError, match="device"):
        if path == ["net"]:  # the stored bank is read in inference alone
            module.eval()(torch.zeros(2, 8, SIZE, SIZE, device=fake_device))
        else:
            step(trainer)
