# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""A plain U-Net as the companion of SSCFNet: what it adds, and how trained ones are joined."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch
from builders import TINY_CHANNELS, bundle_workflow, random_batch, tiny_net

from scripts.contrasts import StudyError, scenario_table
from scripts.inference.trust import study_scores
from scripts.networks.memory_bank import CompiledBank
from scripts.networks.plain_unet import PlainUNet
from scripts.networks.weights import is_intact, network_from_weights, read_state, save_weights, with_companion

PREPROCESSING = {"image_size": 64, "spacing": 4.0, "scaling": "brain"}


def written(path: Path, network: torch.nn.Module, **changes: object) -> Path:
    save_weights(path, network, {"preprocessing": PREPROCESSING | changes})
    return path


def test_images_are_the_mean_of_both_networks_and_the_mask_is_of_the_first(tmp_path: Path) -> None:
    alone, unet = tiny_net().eval(), PlainUNet(2, TINY_CHANNELS).eval()
    joined = with_companion(alone, written(tmp_path / "unet.pt", unet))
    image = random_batch(scenario_table())["image"]
    with torch.no_grad():
        ours, theirs, both = alone(image), unet(image), joined(image)
    torch.testing.assert_close(both[:, :4], (ours[:, :4] + theirs[:, :4]) / 2)
    assert torch.equal(both[:, 4:], ours[:, 4:]) and not torch.allclose(ours[:, :4], theirs[:, :4])


def test_a_joined_network_is_written_and_read_as_one(tmp_path: Path) -> None:
    joined = with_companion(tiny_net().eval(), written(tmp_path / "unet.pt", PlainUNet(2, TINY_CHANNELS)))
    read = network_from_weights(written(tmp_path / "both.pt", joined))
    image = random_batch(scenario_table())["image"]
    with torch.no_grad():
        assert torch.equal(read(image), joined(image))
    assert read.read_settings()["arguments"]["companion"] == list(TINY_CHANNELS)
    # another companion takes the place of the first
    other = with_companion(read, written(tmp_path / "wide.pt", PlainUNet(2, (8, 8, 8, 8, 16))))
    assert other.read_settings()["arguments"]["companion"] == [8, 8, 8, 8, 16]


def test_companions_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    net = tiny_net()
    with pytest.raises(StudyError, match="no plain U-Net: train one with"):
        with_companion(net, written(tmp_path / "sscf.pt", tiny_net()))
    unet = written(tmp_path / "other.pt", PlainUNet(2, TINY_CHANNELS))
    with pytest.raises(StudyError, match="PlainUNet takes no companion: give the weights of an SSCFNet"):
        with_companion(PlainUNet(2, TINY_CHANNELS), unet)
    path = written(tmp_path / "unet.pt", PlainUNet(2, TINY_CHANNELS), spacing=2.0)
    with pytest.raises(StudyError, match=r"spacing is 2\.0, not 4\.0"):
        with_companion(net, path, PREPROCESSING)
    with pytest.raises(ValueError, match="no images that a companion could join"):
        tiny_net(synthesis=False, companion=TINY_CHANNELS)


def test_joining_keeps_the_bank_and_the_limits_and_leaves_a_correction_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    net, unet = tiny_net(), PlainUNet(2, TINY_CHANNELS)
    net.load_bank(CompiledBank(*(torch.ones_like(tensor) for tensor in net.stored_bank())))
    measured = {"trust": {"patients": 9}, "correction": {"patients": 3, "scenarios": {}}}
    save_weights(tmp_path / "sscf.pt", net, {"preprocessing": PREPROCESSING, **measured})
    paths = {
        "source_path": tmp_path / "sscf.pt",
        "companion_path": written(tmp_path / "unet.pt", unet),
        "site_path": tmp_path / "site.pt",
        "output_dir": tmp_path / "out",
    }
    bundle_workflow("train", "build_bank", run_id="joining", **paths).run()
    state, settings, _ = read_state(tmp_path / "site.pt")
    assert settings["arguments"]["companion"] == list(TINY_CHANNELS) and settings["preprocessing"] == PREPROCESSING
    assert settings["trust"] == measured["trust"] and "correction" not in settings
    assert (
        "Left out, as measured with the network and bank of the weights without a companion: correction" in caplog.text
    )
    for prefix, part in (("", net), ("companion.", unet)):
        assert all(
            torch.equal(state[prefix + name], value) for name, value in part.state_dict().items() if name != "settings"
        )
    with pytest.raises(StudyError, match="No companion is given"):
        with_companion(net, None)


def test_scores_of_trust_do_not_depend_on_a_companion(tmp_path: Path) -> None:
    for mask_input in (True, False):
        net = tiny_net(mask_input=mask_input).eval()
        joined = with_companion(net, written(tmp_path / "unet.pt", PlainUNet(2, TINY_CHANNELS)))
        image = random_batch(scenario_table()[-1:])["image"]
        available = scenario_table()[-1].tolist()
        assert study_scores(image, available, joined) == study_scores(image, available, net)


def test_weights_that_are_handed_on_are_compressed(tmp_path: Path) -> None:
    net = tiny_net(channels=(16, 16, 16, 16, 16))
    save_weights(tmp_path / "model.pt", net, {"preprocessing": PREPROCESSING}, half=True)
    records = zipfile.ZipFile(tmp_path / "model.pt").infolist()
    assert sum(record.compress_size for record in records) < 0.95 * sum(record.file_size for record in records)
    assert is_intact(tmp_path / "model.pt") and [path.name for path in tmp_path.iterdir()] == ["model.pt"]
    read = network_from_weights(tmp_path / "model.pt")
    given = dict(net.named_parameters())
    for name, value in read.named_parameters():
        assert value.numel() <= 1024 or torch.equal(value, given[name].half().float()), name
