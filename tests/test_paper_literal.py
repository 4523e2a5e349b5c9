# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""The paper as printed: its overlay trains and evaluates, and each switch of it is the equation or the sentence."""

from __future__ import annotations

import json
import math
from collections import deque
from pathlib import Path

import pytest
import torch
from builders import (
    BUNDLE_ROOT,
    TINY_CHANNELS,
    config_files,
    random_batch,
    random_entries,
    tiny_net,
    tiny_run,
    tiny_step,
    train_in_process,
)

from scripts.contrasts import StudyError, scenario_table
from scripts.evaluation.bootstrap import read_scores
from scripts.networks.availability import network_input
from scripts.networks.blocks import scale_statistics
from scripts.networks.memory_bank import MemoryBank
from scripts.networks.retrieval import active_pairs
from scripts.networks.weights import network_from_weights, read_state
from scripts.training.bank_builder import BankAsItStands
from scripts.training.losses import DiscriminatorLoss, GeneratorLoss, dependency_loss, draw_entries
from scripts.training.step import SSCFTrainingStep

LITERAL = {"head": "sigmoid", "keys": "each_scale", "scale_sources": False, "entry": "literal", "aggregation": "concat"}
AVAILABLE = scenario_table()[torch.tensor([4, 9, 12])]


def set_up(**changes: object) -> tuple[SSCFTrainingStep, dict[str, torch.Tensor], dict]:
    """A literal step with a bank, a batch, and the step's output."""
    step, batch = tiny_step(filled=4, **{**LITERAL, **changes}), random_batch(AVAILABLE)
    return step, batch, step(**batch)


# -------------------------------------------------------------------------------------------------------- the overlay
def test_overlay_trains_and_is_evaluated(phantom_cohort: Path, tmp_path: Path) -> None:
    chosen = [18, 19, 20]  # a phantom has 40 slices
    overrides = tiny_run(
        phantom_cohort, tmp_path, slice_choice=chosen, key_size=4, bank_size=12, max_epochs=2, best_by="ssim"
    )
    workflow = train_in_process(config_files("train", "paper_literal"), overrides)
    parser = workflow.parser
    net, step = parser.get_parsed_content("network"), parser.get_parsed_content("training_step")
    assert set(parser.get_parsed_content("train#dataset").index[:, 1].tolist()) == set(chosen)
    # full maps of every scale are the keys, the last weights are kept, and the bank is that of the training
    sides = [64, 32, 16, 8, 4]
    assert net.key_lengths == [c * s * s for c, s in zip(overrides["channels"], sides, strict=True)]
    state = read_state(tmp_path / "model_last.pt")[0]
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(state[name], parameter.detach())
    expected = net.compile_bank(step.bank.entries())
    torch.testing.assert_close(state["bank_value"], expected.value.detach())
    assert torch.equal(state["bank_key"], expected.key) and torch.equal(state["bank_patient"], expected.patient)
    assert step.bank.slice_id[: step.bank.size].unique().numel() < int(step.bank.count)  # a slice is there twice
    best = parser.get_parsed_content("best_model")
    assert best.metric == "ssim" and best.best == parser.get_parsed_content("validate#evaluator").state.metrics["ssim"]

    evaluation = {"lpips": False, "protocols": ["per_slice"], "reference_methods": [], "bootstrap_samples": 10}
    evaluation |= {"ckpt_path": str(tmp_path / "model_last.pt"), "scenarios": ["FLAIR+T2"]}
    train_in_process(config_files("train", "paper_literal", "evaluate"), overrides | evaluation)
    frame = read_scores(tmp_path / "evaluation" / "scores.csv")
    assert {"per_slice", "segmentation", "segmentation_per_slice"} == set(frame["protocol"])
    metadata = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())["metadata"]
    assert metadata["scored_slices"] == chosen and metadata["scaling"] == "per_slice"
    assert network_from_weights(tmp_path / "model_last.pt").num_classes == 3


def test_overlay_has_every_switch() -> None:
    overlay = json.loads((BUNDLE_ROOT / "configs" / "paper_literal.json").read_text())
    table = (BUNDLE_ROOT / "docs" / "design.md").read_text()
    for key in overlay:
        assert f"`{key.rpartition('#')[2]}" in table, f"docs/design.md does not name {key}"
    assert eval(overlay["slice_choice"][1:]) == list(range(70, 80)) and overlay["segmentation_weight"] == 1


def test_unknown_score_for_the_best_model_is_refused(phantom_cohort: Path, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="best_by has no mse: choose from psnr, ssim, dice"):
        train_in_process(config_files("train"), tiny_run(phantom_cohort, tmp_path, best_by="mse"))


# ------------------------------------------------------------------------------------------------------- the network
def test_head_is_sigmoids_of_the_tumor_classes() -> None:
    net = tiny_net(**LITERAL)
    feature = torch.randn(2, TINY_CHANNELS[-1], 2, 2)
    torch.testing.assert_close(net.citim.head(feature), torch.sigmoid(net.citim.head.blocks(feature)).flatten(2))
    assert net.citim.head(feature).shape == (2, 3, 4) and net.bank_value.shape[2] == 3
    _, batch, output = set_up()
    truth = (batch[key] for key in ("target", "label", "has_contrast", "has_mask"))
    with pytest.raises(ValueError, match="head_weight needs a head with background"):
        GeneratorLoss(head_weight=1.0)(output, *truth)


def test_each_scale_retrieves_by_its_own_whole_map() -> None:
    step, batch, _ = set_up(key_size=2)  # F^5 has 2 x 2 cells
    net = step.net
    bank = net.compile_bank(step.bank.entries())
    filled = bank.present.any(dim=1)
    images = batch["target"]
    features = net.encode(images, torch.zeros_like(images[:, :3]))
    seen = []
    retrieve = net.retrieve
    net.retrieve = lambda *args: seen.append(retrieve(*args)) or seen[-1]  # type: ignore[func-returns-value]
    net.synthesize(features, scale_statistics(features), AVAILABLE, bank, filled.expand(3, -1))
    ((mean, std, _),) = seen
    start, offset = 0, 0
    chosen = set()
    for j, feature in enumerate(features):
        maps = feature.flatten(2)  # whole maps
        keys = step.bank.key[:6, :, offset : offset + maps.shape[2]]
        channels = slice(start, start + feature.shape[2])
        target, source, active = active_pairs(AVAILABLE)
        for b, p in active.nonzero().tolist():
            t, s = int(target[b, p]), int(source[b, p])
            distances = [float((maps[b, s] - key[s]).square().sum()) for key in keys[: int(step.bank.count)]]
            best = distances.index(min(distances))
            chosen.add((b, p, best))
            assert torch.equal(mean[b, p, channels], step.bank.mean[best, t, channels]), (j, b, p)
            assert torch.equal(std[b, p, channels], step.bank.std[best, t, channels])
        start, offset = channels.stop, offset + maps.shape[2]
    assert offset == step.bank.key.shape[2]
    assert len({(b, p) for b, p, _ in chosen}) < len(chosen)  # scales do not agree, so that the switch shows


def test_network_of_one_scenario_is_the_same() -> None:
    step, batch, _ = set_up(key_size=2)
    step.net.eval().load_bank(step.net.compile_bank(step.bank.entries()))
    image = network_input(batch["target"], AVAILABLE[:1].expand(3, -1))
    missing = [*(~AVAILABLE[0]).nonzero().flatten().tolist(), 4, 5, 6]
    with torch.no_grad():
        ours, theirs = step.net.for_scenario(AVAILABLE[0].tolist())(image), step.net(image)
    torch.testing.assert_close(ours[:, missing], theirs[:, missing], rtol=1e-4, atol=1e-5)


def test_concatenations_are_not_scaled() -> None:
    net = tiny_net(**LITERAL)
    images = torch.rand(3, 4, 32, 32) * 2 - 1
    features = net.encode(images, torch.zeros_like(images[:, :3]))
    seen = []
    net.fuse_bottleneck.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    bank = net.stored_bank()
    net.segment(features, AVAILABLE, bank, torch.zeros(3, net.bank_size, dtype=torch.bool))
    literal = torch.cat([features[-1][:, k] * AVAILABLE[:, k].view(-1, 1, 1, 1) for k in range(4)], dim=1)
    assert torch.equal(seen[0], literal)

    scaled = tiny_net(**{**LITERAL, "scale_sources": True})  # the same weights
    factor = (3 / AVAILABLE.sum(dim=1)).view(-1, 1, 1, 1, 1)
    nothing = torch.zeros(3, net.bank_size, dtype=torch.bool)
    made = [n.synthesize(features, scale_statistics(features), AVAILABLE, bank, nothing)[1][-1] for n in (net, scaled)]
    bias = net.ccp[-1].gamma_bias.view(1, 4, -1, 1, 1)
    missing = ~AVAILABLE
    torch.testing.assert_close(((made[0] - bias) * factor)[missing], (made[1] - bias)[missing], rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------- the losses
def test_dependency_loss_is_that_of_the_printed_equations() -> None:
    step, batch, output = set_up()
    draw = torch.Generator().manual_seed(0)
    step.bank.label.random_(0, 4, generator=draw)
    cells = torch.randint(0, 4, (3, 4), generator=draw).to(torch.uint8)
    entries, count = step.bank.entries(), int(step.bank.count)
    _, index, usable = draw_entries(torch.rand(3, 6), entries, step.bank.count, batch["patient"], 300, own_patient=True)
    w = output["class_map"].detach() * 1.3  # so that some of P exceed 1
    arguments = (w, output["contrast_maps"], output["available"], cells)
    result = dependency_loss(entries, index, usable, *arguments, own_maps=False, printed_order=True)
    above = 0
    for b in range(3):
        total = 0.0
        for entry in range(count):
            y = torch.nn.functional.one_hot(cells[b].long(), 4).T[1:].double()  # c x N
            y_entry = torch.nn.functional.one_hot(entries.label[entry].long(), 4).T[1:].double()
            m = y.T @ y_entry  # eq. 5 as printed
            for i in range(4):
                p = entries.class_map[entry, i].double().T @ w[b].double()
                above += int((p > 1).sum())
                p = p.clamp(1e-6, 1 - 1e-6)
                total -= float((m * p.log() + (1 - m) * (1 - p).log()).mean()) / 4 / count
        assert float(result[b]) == pytest.approx(total, rel=1e-4)
    assert above > 0
    assert not torch.allclose(result, dependency_loss(entries, index, usable, *arguments, own_maps=False))
    assert not torch.allclose(result, dependency_loss(entries, index, usable, *arguments, printed_order=True))


def test_losses_are_sums_over_the_sets_of_contrasts() -> None:
    _, batch, output = set_up()
    truth = [batch[key] for key in ("target", "label", "has_contrast", "has_mask")]
    scores = torch.rand(3, 4, 5)
    terms = GeneratorLoss(sums=True)(output, *truth, fake_scores=scores)
    images, tumor = output["pred"][:, :4], batch["label"] > 0
    expected = {"synthesis": 0.0, "reconstruction": 0.0, "tumor": 0.0, "adversarial": 0.0}
    judged = 0.0
    for b in range(3):
        for k in range(4):
            error = (images[b, k] - batch["target"][b, k]).abs()
            expected["reconstruction" if AVAILABLE[b, k] else "synthesis"] += float(error.mean()) / 3
            expected["tumor"] += float((error * tumor[b, 0]).mean()) / 3
            if not AVAILABLE[b, k]:
                expected["adversarial"] += float(((scores[b, k] - 1) ** 2).mean()) / 3
                judged += float(((scores[b, k] - 1) ** 2 + (scores[b, k] / 2) ** 2).mean()) / 3
    for name, value in expected.items():
        assert float(terms[name]) == pytest.approx(value, rel=1e-5), name
    assert float(DiscriminatorLoss(sums=True)(scores, scores / 2, ~AVAILABLE)) == pytest.approx(judged, rel=1e-5)
    assert math.isclose(float(terms["feature"]), float(GeneratorLoss()(output, *truth)["feature"]))  # eq. 10: 1 / |T|


# ------------------------------------------------------------------------------------------------------------ the bank
def test_bank_is_a_plain_queue() -> None:
    bank, queue = MemoryBank(5, 4, 3, 5, 2, 3, 6, refresh=False), deque(maxlen=5)
    for seed, ids in enumerate(([1, 2], [2, 3], [4, 4], [1, 5, 6])):
        new = random_entries(bank, ids, seed)
        bank.enqueue(new)
        queue.extend(zip(ids, new.key[:, 0, 0].tolist(), strict=True))
        order = [(int(bank.head) + k) % 5 for k in range(5)] if int(bank.count) == 5 else range(int(bank.count))
        held = [(int(bank.slice_id[k]), float(bank.key[k, 0, 0])) for k in order]
        assert held == list(queue)


def test_entries_of_the_own_patient_are_used() -> None:
    step, batch, _ = set_up()
    step.bank.patient[:] = batch["patient"][0]
    hidden = step(**batch)["pred"][0]
    step.own_patient = True
    assert not torch.allclose(step(**batch)["pred"][0], hidden)
    step.bank.count.zero_()  # of an empty bank, as when all of it is the own patient's
    torch.testing.assert_close(step(**batch)["pred"][0], hidden)


def test_bank_as_it_stands_is_what_the_network_reads() -> None:
    step, _, _ = set_up()
    step.bank.present[4:] = True  # slots that the count does not reach
    BankAsItStands(step.net, step.bank)()
    assert step.net.bank_present.any(dim=1).tolist() == [True] * 4 + [False] * 2
    assert torch.equal(step.net.bank_mean, step.bank.mean[:6])
