# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""The forward path of a study: which slices the network sees, padded how, and what comes back."""

from __future__ import annotations

import pytest
import torch
from builders import random_entries, tiny_net
from monai.data import MetaTensor
from studies import CopyNet

from scripts.contrasts import SCENARIOS, scenario_name
from scripts.inference.inferer import BrainSliceInferer


def network_volume(batch=2, size=(32, 48, 7)) -> torch.Tensor:
    """B x 8 x X x Y x Z input; slice 0 of all and slice 3 of sample 1 are empty; T1ce is missing in sample 0."""
    torch.manual_seed(0)
    images = torch.rand(batch, 4, *size) * 1.8 - 0.8
    images[..., 0] = -1
    planes = torch.ones_like(images)
    images[0, 2], planes[0, 2] = -1, 0
    if batch > 1:
        images[1, ..., 3] = -1
    return torch.cat([images, planes], dim=1)


@pytest.mark.parametrize("sw_batch_size", [1, 4])
def test_slices_without_brain_are_not_run(sw_batch_size):
    volume, network = network_volume(), CopyNet(source=1)
    pred = BrainSliceInferer(sw_batch_size=sw_batch_size)(volume, network)
    assert network.slices == 6 + 5
    assert pred.shape == (2, 7, 32, 48, 7) and type(pred) is torch.Tensor
    for channel in range(4):
        torch.testing.assert_close(pred[:, channel], volume[:, 1])
    empty = [pred[..., 0], pred[1:, ..., 3]]
    for out in empty:
        assert (out[:, :4] == -1).all() and (out[:, 4:] == 0).all()


def test_a_volume_without_brain_never_reaches_the_network():
    volume, network = network_volume(1), CopyNet()
    volume[:, :4] = -1
    pred = BrainSliceInferer()(volume, network)
    assert network.slices == 0 and (pred[:, :4] == -1).all() and (pred[:, 4:] == 0).all()


@pytest.mark.parametrize("size, seen", [((33, 48, 3), (48, 48)), ((17, 50, 3), (32, 64)), ((32, 16, 3), (32, 16))])
def test_odd_sizes_are_padded_with_background_and_keep_their_availability(size, seen):
    shown = []

    class Watched(CopyNet):
        def forward(self, image):
            shown.append(image)
            return super().forward(image)

    volume = network_volume(1, size)
    pred = BrainSliceInferer()(volume, Watched(source=3))
    torch.testing.assert_close(pred[:, 0], volume[:, 3])
    (images,) = shown
    assert images.shape[1:] == (8, *seen) and images[0, 4:].amax(dim=(1, 2)).tolist() == [1, 1, 0, 1]
    assert (images[:, :2] > -1).sum() == (volume[:, :2] > -1).sum()


def scenario_volume(available, size=(32, 48, 5)) -> torch.Tensor:
    """1 x 8 x X x Y x Z input of one scenario; slice 0 is empty."""
    torch.manual_seed(1)
    kept = torch.tensor(available, dtype=torch.bool).view(1, 4, 1, 1, 1)
    images = torch.rand(1, 4, *size) * 1.8 - 0.8
    images[..., 0] = -1
    return torch.cat([torch.where(kept, images, -1.0), kept.expand(images.shape).float()], dim=1)


@pytest.mark.parametrize("available", SCENARIOS, ids=scenario_name)
def test_every_scenario_gives_what_the_plain_network_gives(available):
    network = tiny_net().eval()
    network.load_bank(network.compile_bank(random_entries(network.new_bank((32, 48)), range(6))))
    volume, kept = MetaTensor(scenario_volume(available), affine=torch.diag(torch.tensor([2.0, 2, 3, 1]))), available
    with torch.no_grad():
        inferer = BrainSliceInferer(sw_batch_size=3)
        pred = inferer(volume, network)
        plain = inferer(volume.as_tensor(), lambda image: network(image))
        one = network(volume.as_tensor()[..., 4])
    assert isinstance(pred, MetaTensor) and torch.equal(pred.affine, volume.affine)
    made = [*[i for i in range(4) if not kept[i]], 4, 5, 6]
    torch.testing.assert_close(pred.as_tensor()[:, made], plain[:, made], atol=1e-5, rtol=0)
    torch.testing.assert_close(pred.as_tensor()[:, made, ..., 4], one[:, made], atol=1e-5, rtol=0)
    given = [i for i in range(4) if kept[i]]
    torch.testing.assert_close(pred.as_tensor()[:, given, ..., 1:], volume.as_tensor()[:, given, ..., 1:])


def test_a_scenario_is_asked_for_once_per_volume():
    class Asked(CopyNet):
        scenarios: list = []

        def for_scenario(self, available):
            self.scenarios.append(tuple(available))
            return CopyNet(source=1)

    network, volume = Asked(), network_volume()
    pred = BrainSliceInferer(sw_batch_size=2)(volume, network)
    assert network.scenarios == [(True, True, False, True), (True, True, True, True)] and network.slices == 0
    torch.testing.assert_close(pred[:, 0], volume[:, 1])


def test_compiled_modules_are_kept_and_see_one_shape(monkeypatch):
    compiled, sizes = [], []

    def compile_(module, **options):
        def call(image):
            sizes.append(len(image))
            return module(image)

        compiled.append(options)
        return call

    monkeypatch.setattr(torch, "compile", compile_)
    network, inferer = tiny_net().eval(), BrainSliceInferer(sw_batch_size=3, compile=True)
    with torch.no_grad():
        for available in ((1, 0, 0, 1), (0, 1, 0, 0), (1, 0, 0, 1)):
            volume = scenario_volume(available)
            pred = inferer(volume, network)
            plain = BrainSliceInferer(sw_batch_size=3)(volume, network)
            torch.testing.assert_close(pred, plain, atol=1e-5, rtol=0)
    assert compiled == [{"dynamic": False}] * 2 and sizes == [3, 3] * 3
