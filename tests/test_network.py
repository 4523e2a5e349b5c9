# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""The network as a whole: no leakage of missing contrasts, no mixing of samples, one tensor in and one out."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from builders import TINY_CHANNELS, all_availabilities, generator, random_batch, random_entries, tiny_net, tiny_step

from scripts.contrasts import scenario_table
from scripts.networks.availability import network_input, read_availability
from scripts.networks.blocks import PRESETS
from scripts.networks.memory_bank import BankEntries, CompiledBank
from scripts.networks.precision import half_weights
from scripts.networks.retrieval import active_pairs
from scripts.networks.sscf import SSCFNet
from scripts.training.step import SSCFTrainingStep, cell_labels

MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def outputs_to_sum(output: dict) -> torch.Tensor:
    """One number through which every differentiable output sends a gradient."""
    total = output["pred"].square().sum() + output["contrast_maps"].square().sum() + output["class_map"].square().sum()
    return total + sum(f.square().sum() for f in output["predicted"])


# ---------------------------------------------------------------------------------------------------------- leakage
@MODES
@pytest.mark.parametrize("junk", ["noise", "nan", "inf", "other contrast"])
def test_missing_targets_do_not_reach_the_prediction(training: bool, junk: str) -> None:
    step = tiny_step().train(training)
    available = scenario_table()  # all 14 scenarios in one batch
    batch = random_batch(available)
    missing = ~available[:, :, None, None].expand(batch["target"].shape)
    with torch.no_grad():
        reference = step(**batch)
        replaced = {
            "noise": 3 * torch.randn(batch["target"].shape, generator=generator(9)),
            "nan": torch.full_like(batch["target"], float("nan")),
            "inf": torch.full_like(batch["target"], float("inf")),
            "other contrast": batch["target"].roll(1, dims=1),
        }[junk]
        output = step(**{**batch, "target": torch.where(missing, replaced, batch["target"])})
    for name in ("pred", "logits", "class_map"):
        assert torch.equal(output[name], reference[name]), name
    for changed, before in zip(output["predicted"], reference["predicted"], strict=True):
        assert torch.equal(changed, before)
    # the test has power: the same change does reach the targets of the feature loss and the new entries
    assert not torch.equal(output["features"][0], reference["features"][0])
    assert not torch.equal(output["entries"].prototype, reference["entries"].prototype)


@MODES
def test_gradient_of_the_prediction_to_missing_targets_is_exactly_zero(training: bool) -> None:
    step = tiny_step().train(training)
    available = scenario_table()
    batch = random_batch(available)
    target = batch["target"].clone().requires_grad_()
    output = step(**{**batch, "target": target})
    (gradient,) = torch.autograd.grad(output["pred"].square().sum(), target, retain_graph=True)
    assert torch.equal(gradient, torch.zeros_like(gradient))
    # the graph is not simply cut: the class maps that train the head on all contrasts do depend on missing targets
    (gradient,) = torch.autograd.grad(output["contrast_maps"].square().sum(), target)
    assert (gradient.flatten(2).abs().sum(dim=2)[~available] > 0).all()


@MODES
def test_gradients_stay_finite_when_missing_targets_hold_nan(training: bool) -> None:
    step = tiny_step().train(training)
    available = scenario_table()
    batch = random_batch(available)
    target = batch["target"].masked_fill(~available[:, :, None, None], float("nan")).requires_grad_()
    outputs_to_sum(step(**{**batch, "target": target})).backward()
    assert target.grad is not None and torch.isfinite(target.grad).all()
    for name, parameter in step.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("junk", [float("nan"), float("inf"), 7.0])
def test_image_planes_of_missing_contrasts_are_not_read(junk: float) -> None:
    net = with_frozen_bank(tiny_step())
    available = all_availabilities()
    image = random_batch(available)["image"]
    replaced = image.clone()
    replaced[:, :4][~available] = junk
    with torch.no_grad():
        assert torch.equal(net(replaced), net(image))


def test_a_contrast_that_the_study_lacks_is_not_read_and_not_stored() -> None:
    step = tiny_step()
    batch = random_batch(scenario_table())
    batch["has_contrast"][:, 2] = False
    batch["has_contrast"][:, 3] = torch.arange(14) % 2 == 0
    holes = ~batch["has_contrast"][:, :, None, None].expand(batch["target"].shape)
    with torch.no_grad():
        reference = step(**batch)
        batch["target"] = batch["target"].masked_fill(holes, float("nan"))
        # the loader may still have set its availability plane
        batch["image"][:, 6] = 1.0
        batch["image"][:, 2] = 0.3
        output = step(**batch)
    assert torch.equal(output["pred"], reference["pred"])
    assert not (output["available"] & ~batch["has_contrast"]).any()
    assert torch.equal(output["entries"].present, batch["has_contrast"])
    assert all(torch.isfinite(tensor.float()).all() for tensor in output["entries"])


@MODES
def test_samples_do_not_influence_each_other(training: bool) -> None:
    step = tiny_step().train(training)
    batch = random_batch(scenario_table())
    order = torch.randperm(14, generator=generator(3))
    with torch.no_grad():
        together = step(**batch)["pred"]
        permuted = step(**{name: tensor[order] for name, tensor in batch.items()})["pred"]
        torch.testing.assert_close(permuted, together[order], rtol=0, atol=1e-5)
        alone = step(**{name: tensor[5:6] for name, tensor in batch.items()})["pred"]
        torch.testing.assert_close(alone, together[5:6], rtol=0, atol=1e-5)
        # neighbors that hold NaN
        image = batch["image"].clone()
        image[6:, :4] = float("nan")
        poisoned = step(**{**batch, "image": image})["pred"]
        torch.testing.assert_close(poisoned[:6], together[:6], rtol=0, atol=1e-5)


def test_entries_of_the_own_patient_do_not_influence_the_prediction() -> None:
    step = tiny_step(filled=0)
    batch = random_batch(scenario_table())
    past = random_batch(scenario_table()[:4], seed=5, first_patient=10)
    past["patient"] = torch.tensor([1000, 1001, 10, 11])  # the first two are other slices of patients 1000 and 1001
    step.bank.enqueue(step(**past)["entries"])
    with torch.no_grad():
        reference = step(**batch)["pred"]
        for field in ("key", "mean", "std", "prototype"):
            getattr(step.bank, field)[0] *= 3
        # bring the entry near to every query, so that it would be retrieved if it could be
        step.bank.key[0] = step(**batch)["entries"].key[0]
        changed = step(**batch)["pred"]
    same = [torch.equal(a, b) for a, b in zip(changed, reference, strict=True)]
    assert same[0]  # patient 1000 does not see its own entry
    assert sum(same) < 7  # the others do


@MODES
def test_forward_leaves_the_bank_alone(training: bool) -> None:
    step = tiny_step().train(training)
    before = {name: tensor.clone() for name, tensor in step.bank.state_dict().items()}
    output = step(**random_batch(scenario_table()))
    assert all(torch.equal(tensor, before[name]) for name, tensor in step.bank.state_dict().items())
    assert not any(tensor.requires_grad for tensor in output["entries"])


# ------------------------------------------------------------------------------------------------- shapes and variants
@pytest.mark.parametrize("size", [(16, 16), (48, 80), (96, 32)])
@pytest.mark.parametrize("filled", [0, 3], ids=["empty bank", "partly filled bank"])
def test_forward_is_finite_for_0_to_4_available_contrasts_at_any_size(size: Sequence[int], filled: int) -> None:
    net = tiny_net().eval()
    bank = net.new_bank((48, 48))  # the compiled bank serves images of another size
    if filled:
        bank.enqueue(random_entries(bank, range(filled)))
        net.load_bank(net.compile_bank(bank.entries()))
    image = random_batch(all_availabilities(), size)["image"]
    with torch.no_grad():
        pred = net(image)
    assert pred.shape == (16, 7, *size)
    assert torch.isfinite(pred).all()
    assert pred[:, :4].abs().max() <= 1
    assert pred[:, 4:].min() >= 0 and pred[:, 4:].max() <= 1


@pytest.mark.parametrize(
    "changes",
    [
        {"channels": (4, 8, 8, 8, 8)},
        {"channels": (8, 4, 12, 4, 16), "key_size": 1},
        {"channels": [4, 4, 8, 8, 20], "key_size": 3},
        {"channels": (16, 16, 16, 16, 32), "bank_size": 1},
        {"prototype": "mean"},
        {"aggregation": "concat"},
        {"prototype": "mean", "aggregation": "concat"},
        {"norm": "INSTANCE"},
        {"norm": ["group", {"num_groups": 2, "affine": False}], "act": ["prelu", {}]},
        {"act": "RELU"},
    ],
    ids=str,
)
def test_every_setting_trains_a_step(changes: dict[str, object]) -> None:
    settings = {"bank_size": 5, **changes}
    step = tiny_step(filled=min(3, settings["bank_size"]), **settings)  # type: ignore[call-overload]
    output = step(**random_batch(scenario_table()[[0, 5, 12]]))
    widths = settings.get("channels", TINY_CHANNELS)
    assert output["pred"].shape == (3, 7, 32, 32)
    assert output["logits"].shape == (3, 3, 32, 32)
    assert output["class_map"].shape == (3, 4, 4)
    assert output["contrast_maps"].shape == (3, 4, 4, 4)
    expected = [(3, 4, c, 32 // 2**j, 32 // 2**j) for j, c in enumerate(widths)]  # type: ignore[arg-type]
    assert [tuple(f.shape) for f in output["predicted"]] == expected
    assert [tuple(f.shape) for f in output["features"]] == expected
    outputs_to_sum(output).backward()
    for name, parameter in step.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


def test_training_step_works_in_3d() -> None:
    size = (16, 32, 16)
    step = tiny_step(size=size, filled=2, spatial_dims=3, channels=(4, 4, 4, 4, 8))
    output = step(**random_batch(scenario_table()[[1, 11]], size))
    assert output["pred"].shape == (2, 7, *size)
    outputs_to_sum(output).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in step.parameters())
    step.bank.enqueue(output["entries"])
    net = with_frozen_bank(step)
    with torch.no_grad():
        assert torch.isfinite(net(random_batch(scenario_table()[:1], size)["image"])).all()


def test_every_parameter_is_in_the_graph_with_an_empty_bank() -> None:
    """The first step of a run, distributed included, must find a gradient for every parameter."""
    step = tiny_step(filled=0)
    outputs_to_sum(step(**random_batch(scenario_table()[[3]]))).backward()
    for name, parameter in step.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


def with_frozen_bank(step: SSCFTrainingStep) -> SSCFNet:
    """The network of a step, in eval mode, that reads what is in the training bank."""
    step.net.load_bank(step.net.compile_bank(step.bank.entries()))
    return step.net.eval()


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_presets_build(preset: str) -> None:
    with torch.device("meta"):  # shapes only
        net = SSCFNet(channels=preset, bank_size=4)
    assert net.channels == PRESETS[preset]
    widths = [encoder.stages[-1].conv2.conv.out_channels for encoder in net.encoders]
    assert widths == [PRESETS[preset][-1]] * 4


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"channels": "huge"}, "channels must be numbers or one of .* got 'huge'"),
        ({"segmentation": "other"}, "segmentation must be one of citim, plain, none"),
        ({"prediction": "other"}, "prediction must be one of"),
        ({"retrieval": "farthest"}, "retrieval must be one of"),
        ({"prototype": "median"}, "prototype must be one of sum, mean"),
        ({"aggregation": "max"}, "aggregation must be one of attention, concat"),
        ({"segmentation": "none", "synthesis": False}, "computes nothing"),
        ({"mask_input": False, "closed_loop": False}, "set mask_input to true"),
        ({"norm": "BATCH"}, "batch normalization"),
        ({"norm": ("batch", {"affine": True})}, "batch normalization"),
        ({"norm": ["SyncBatch", {}]}, "batch normalization"),
    ],
    ids=str,
)
def test_unknown_settings_and_batch_normalization_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_net(**changes)


def test_sizes_and_scenarios_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 16"):
        SSCFTrainingStep(tiny_net(), (32, 40))
    for available in ([False] * 4, [True] * 3):
        with pytest.raises(ValueError, match="4 truth values, one of them true"):
            tiny_net().for_scenario(available)


# ------------------------------------------------------------------------------------------------------------ branches
def test_training_and_inference_agree_when_no_own_entry_is_masked() -> None:
    for changes in ({}, {"prototype": "mean", "aggregation": "concat"}):
        step = tiny_step(**changes)
        net = with_frozen_bank(step)
        batch = random_batch(scenario_table())
        with torch.no_grad():
            torch.testing.assert_close(net(batch["image"]), step(**batch)["pred"], rtol=0, atol=1e-6)
            # and the bank matters: an empty one gives something else
            for name in CompiledBank._fields:
                getattr(net, f"bank_{name}").zero_()
            assert (net(batch["image"]) - step(**batch)["pred"]).abs().max() > 1e-3


def test_bottleneck_is_fused_over_the_zero_filled_concatenation_scaled_by_the_number_available() -> None:
    """Section 2.1: F^5 is a 1x1 convolution over the features of S; K / |S| keeps its size over scenarios."""
    step = tiny_step()
    net, seen = step.net, {}
    net.citim.register_forward_pre_hook(lambda _m, args: seen.update(feature=args[0].detach()))
    run_branches = net.run_branches
    net.run_branches = lambda *args: seen.setdefault("out", run_branches(*args))  # type: ignore[method-assign]
    available = scenario_table()
    with torch.no_grad():
        step(**random_batch(available))
    bottleneck = seen["out"].first[-1].double().numpy()
    weight = net.fuse_bottleneck.weight.detach().double().flatten(1).numpy()
    bias = net.fuse_bottleneck.bias.detach().double().numpy()
    for b in range(14):
        parts = [bottleneck[b, i] * (4 / int(available[b].sum())) * float(available[b, i]) for i in range(4)]
        expected = np.tensordot(weight, np.concatenate(parts), axes=(1, 0)) + bias[:, None, None]
        np.testing.assert_allclose(seen["feature"][b].numpy(), expected, rtol=0, atol=1e-4)


def test_decoders_get_predicted_features_of_missing_and_own_features_of_available_contrasts() -> None:
    step = tiny_step()
    given: list[list[torch.Tensor]] = []
    for decoder in step.net.synthesis_decoders:
        decoder.register_forward_pre_hook(lambda _m, args: given.append([f.detach() for f in args[0]]))
    available = scenario_table()
    output = step(**random_batch(available))
    for i in range(4):
        for j in range(5):
            for b in range(14):
                source = output["features"] if available[b, i] else output["predicted"]
                assert torch.equal(given[i][j][b], source[j][b, i].detach()), (i, j, b)


def test_context_of_citim_is_added_to_the_fused_bottleneck() -> None:
    net = tiny_step().net
    torch.nn.init.normal_(net.citim.phi.weight)
    seen: list[torch.Tensor] = []
    for part in (net.fuse_bottleneck, net.citim):
        part.register_forward_hook(lambda module, arguments, result: seen.append(result))
    net.segmentation_decoder.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0][-1]))
    net.load_bank(net.compile_bank(tiny_step().bank.entries()))
    net(random_batch(scenario_table()[:2])["image"])
    fused, context, joined = seen
    assert context.any()
    torch.testing.assert_close(joined, fused + context)


@pytest.mark.parametrize("closed", [True, False])
def test_the_loop_is_differentiable_where_it_is_closed(closed: bool) -> None:
    """The gradient of the synthesized images alone reaches the segmentation branch through the soft mask."""
    step = tiny_step(closed_loop=closed)
    available = scenario_table()
    images = step(**random_batch(available))["pred"][:, :4]
    torch.where(available[:, :, None, None], 0.0, images).square().sum().backward()
    for part in (step.net.segmentation_decoder, step.net.fuse_bottleneck, step.net.citim.phi, step.net.citim.head):
        for name, parameter in part.named_parameters():
            assert (parameter.grad is not None and bool(parameter.grad.any())) == closed, name


def test_retrieval_enters_as_nothing_at_first() -> None:
    """An untrained network predicts features as the mean of the available ones, and its mask does not see the bank."""
    torch.manual_seed(0)
    net = SSCFNet(channels=TINY_CHANNELS, bank_size=6, key_size=2)
    available = scenario_table()
    images = random_batch(available)["image"]
    step = SSCFTrainingStep(net, (32, 32))
    with torch.no_grad():
        step.bank.enqueue(step(**random_batch(available[:4], seed=3, first_patient=10))["entries"])
        bank = net.compile_bank(step.bank.entries())
        allowed = bank.present.any(dim=1).expand(14, -1)
        out = net.run_branches(images[:, :4], available, bank, allowed)
        alone = net.run_branches(images[:, :4], available, bank, torch.zeros_like(allowed))
    assert torch.equal(out.logits, alone.logits)
    for j, predicted in enumerate(out.predicted):
        for b, row in enumerate(available):
            mean = out.second[j][b, row].mean(dim=0)
            for k in (~row).nonzero().flatten():
                torch.testing.assert_close(predicted[b, k], mean, atol=1e-6, rtol=1e-5)


def test_tumor_classes_are_rare_at_first() -> None:
    torch.manual_seed(0)
    net = SSCFNet(channels=TINY_CHANNELS, bank_size=1)
    with torch.no_grad():
        probabilities = net(random_batch(scenario_table())["image"])[:, 4:]
    assert 0.005 < probabilities.mean() < 0.1


def test_second_pass_sees_the_soft_mask_and_the_first_sees_none() -> None:
    step = tiny_step()
    masks: list[torch.Tensor] = []
    step.net.encoders[0].register_forward_pre_hook(lambda _m, args: masks.append(args[0][:, 1:].detach()))
    output = step(**random_batch(scenario_table()))
    assert len(masks) == 2
    assert torch.equal(masks[0], torch.zeros_like(masks[0]))
    torch.testing.assert_close(masks[1], torch.sigmoid(output["logits"]).detach())


@pytest.mark.parametrize("changes", [{}, {"prototype": "mean", "normalize_prototypes": False}], ids=["sum", "mean"])
def test_entries_hold_what_design_says_of_both_passes(changes: dict[str, object]) -> None:
    """G = b W_l^T, W_l of the first pass (eq. 1, 2); key, mu and sigma of the second (eq. 8); y by priority (eq. 5)."""
    step = tiny_step(size=(64, 64), **changes)
    net, seen = step.net, {}
    run_branches = net.run_branches
    net.run_branches = lambda *args: seen.setdefault("out", run_branches(*args))  # type: ignore[method-assign]
    batch = random_batch(scenario_table()[[0, 9]], (64, 64))
    batch["has_mask"][1] = False
    with torch.no_grad():
        output = step(**batch)
    entries: BankEntries = output["entries"]
    first, second = ([f.double().numpy() for f in getattr(seen["out"], name)] for name in ("first", "second"))
    maps = output["contrast_maps"].double().numpy()
    for b in range(2):
        for i in range(4):
            feature = first[-1][b, i].reshape(TINY_CHANNELS[-1], -1)
            if not changes:
                feature = feature - feature.mean(axis=1, keepdims=True)
                feature = feature / np.sqrt((feature**2).mean(axis=1, keepdims=True) + 1e-5)
            mass = maps[b, i].sum(axis=1)
            expected = feature @ maps[b, i].T / (np.where(mass < 0.5, np.inf, mass) if changes else 1)
            np.testing.assert_allclose(entries.prototype[b, i].numpy(), expected, rtol=0, atol=1e-4)
            with torch.no_grad():
                head = net.citim.head(torch.from_numpy(first[-1][b : b + 1, i]).float())
            torch.testing.assert_close(entries.class_map[b, i], head[0], rtol=0, atol=1e-5)
            mean = np.concatenate([f[b, i].mean(axis=(1, 2)) for f in second])
            std = np.concatenate([np.sqrt(f[b, i].var(axis=(1, 2)) + 1e-5) for f in second])
            np.testing.assert_allclose(entries.mean[b, i].numpy(), mean, rtol=0, atol=1e-4)
            np.testing.assert_allclose(entries.std[b, i].numpy(), std, rtol=0, atol=1e-4)
            pooled = second[-1][b, i].reshape(TINY_CHANNELS[-1], 2, 2, 2, 2).mean(axis=(2, 4))  # 4 x 4 cells to 2 x 2
            np.testing.assert_allclose(entries.key[b, i].numpy(), pooled.reshape(-1), rtol=0, atol=1e-4)
    assert torch.equal(entries.label, cell_labels(batch["label"], 16))
    assert torch.equal(output["cells"], entries.label)
    for name in ("has_mask", "patient", "slice_id"):
        assert torch.equal(getattr(entries, name), batch[name])


def watch_retrieval(net: SSCFNet) -> list[tuple[torch.Tensor, ...]]:
    """Lists what each retrieval is asked for and what it gives: target, source, mean, std, found."""
    given: list[tuple[torch.Tensor, ...]] = []
    retrieve = net.retrieve

    def watched(*args: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        found = retrieve(*args)
        given.append((*args[-2:], *found))
        return found

    net.retrieve = watched  # type: ignore[method-assign]
    return given


def assert_nearest(step: SSCFTrainingStep, given: tuple[torch.Tensor, ...], keys: torch.Tensor, own: bool) -> None:
    """Holds what was retrieved under all scenarios against the nearest entry, with or without the own patient's."""
    available = scenario_table()
    (target, source, mean, _, found), active = given, active_pairs(available)[2]
    chosen = set()
    for b, p in active.nonzero().tolist():
        t, s = int(target[b, p]), int(source[b, p])
        usable = [entry for entry in range(6) if own or int(step.bank.patient[entry]) != 1000 + b]
        distances = {e: (keys[b, s].double() - step.bank.key[e, s].double()).norm().item() for e in usable}
        nearest = min(distances, key=distances.__getitem__)
        assert found[b, p] and torch.equal(mean[b, p], step.bank.mean[nearest, t])
        chosen.add(nearest)
    assert len(chosen) > 1


def test_retrieval_in_the_network_takes_the_nearest_key_of_another_patient() -> None:
    step = tiny_step(filled=0)
    past = random_batch(scenario_table()[:6], seed=5, first_patient=998)
    with torch.no_grad():
        step.bank.enqueue(step(**past)["entries"])
        given = watch_retrieval(step.net)
        output = step(**random_batch(scenario_table()))
    assert_nearest(step, given[0], output["entries"].key, own=False)


# --------------------------------------------------------------------------------------------------- mixed precision
def test_bank_arithmetic_stays_in_float32_under_bfloat16_autocast() -> None:
    """bfloat16 has 8 bits: G, Q, the attention of CITIM and the distances of retrieval would be noise."""
    step = tiny_step()
    net, seen = step.net, {}
    net.citim.register_forward_hook(lambda _m, args, out: seen.update(args=args, context=out.detach()))
    run_branches = net.run_branches
    net.run_branches = lambda *args: seen.setdefault("out", run_branches(*args))  # type: ignore[method-assign]
    with torch.no_grad():
        value, gram = net.citim.fold(step.bank.prototype[:-1], step.bank.present[:-1])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = step(**random_batch(scenario_table()))
        feature, class_map, used_value, used_gram, allowed = seen["args"]
        assert feature.dtype == torch.bfloat16  # autocast was at work in the encoders
        assert class_map.dtype == torch.float32
        assert torch.equal(used_value, value) and torch.equal(used_gram, gram)
        assert seen["context"].dtype == torch.float32
        assert torch.equal(seen["context"], net.citim(feature.float(), class_map, value, gram, allowed))
    maps, entries = output["contrast_maps"], output["entries"]
    assert maps.dtype == torch.float32 and output["logits"].dtype == torch.float32
    feature = seen["out"].first[-1].double().flatten(3)
    feature = (feature - feature.mean(dim=3, keepdim=True)) / (
        feature.var(dim=3, correction=0, keepdim=True) + 1e-5
    ).sqrt()
    exact = feature @ maps.double().transpose(2, 3)
    torch.testing.assert_close(entries.prototype.double(), exact, rtol=1e-5, atol=1e-5)
    for j, feature in enumerate(seen["out"].second):
        start = sum(TINY_CHANNELS[:j])
        mean = entries.mean[:, :, start : start + TINY_CHANNELS[j]].double()
        torch.testing.assert_close(mean, feature.double().mean(dim=(3, 4)), rtol=1e-5, atol=1e-6)


def test_retrieval_under_bfloat16_autocast_finds_the_same_entries() -> None:
    """Keys far from the origin and near to each other, as those of real slices are."""
    step = tiny_step(filled=0)
    batch = random_batch(scenario_table())
    given = watch_retrieval(step.net)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        keys = step(**batch)["entries"].key
        bank = random_entries(step.bank, range(6))
        center = keys.mean(dim=0, keepdim=True)
        step.bank.enqueue(bank._replace(key=center + 0.02 * center.abs().mean() * bank.key))
        given.clear()
        keys = step(**batch)["entries"].key
    assert_nearest(step, given[0], keys, own=True)


def halved_parameters_and_gradients() -> tuple[set[str], dict[str, torch.Tensor | None]]:
    """Of a training step under bfloat16 autocast: parameters that its network has in bfloat16, and all gradients."""
    step, halved = tiny_step(), set()
    own = dict(step.net.named_parameters())
    step.net.fuse_bottleneck.register_forward_pre_hook(
        lambda *_: halved.update(n for n, p in step.net.named_parameters() if p.dtype == torch.bfloat16)
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = step(**random_batch(scenario_table()[[0, 7, 13]]))
    outputs_to_sum(output).backward()
    assert all(p is own[name] for name, p in step.net.named_parameters())
    return halved, {name: p.grad for name, p in own.items()}


def test_step_under_autocast_computes_with_half_weights_and_trains_the_whole_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    halved, gradients = halved_parameters_and_gradients()
    convolutions = [n for n, m in tiny_net().named_modules() if isinstance(m, torch.nn.modules.conv._ConvNd)]
    # CITIM reads phi in float32
    assert {name.rpartition(".")[0] for name in halved} == set(convolutions) - {"citim.phi"}
    monkeypatch.setattr("scripts.training.step.half_weights", lambda *_, **__: nullcontext())
    cast_one_by_one, expected = halved_parameters_and_gradients()
    assert not cast_one_by_one
    for name, gradient in expected.items():
        assert (gradient is None) == (gradients[name] is None), name
        if gradient is not None:
            atol = 2**-6 * float(gradient.abs().max())
            torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=atol, msg=name)


def test_half_weights_give_way_to_the_whole_ones_whatever_happens() -> None:
    net = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 1), torch.nn.Linear(3, 3), torch.nn.Conv2d(3, 2, 1, bias=False))
    own = dict(net.named_parameters())
    with half_weights(net):
        assert all(p is own[name] for name, p in net.named_parameters())  # without autocast
    with pytest.raises(KeyError), torch.autocast("cpu", dtype=torch.bfloat16), half_weights(net, but=[net[2]]):
        halved = {name: p for name, p in net.named_parameters() if p is not own[name]}
        halved["0.weight"].sum().backward()  # and none of the bias
        raise KeyError
    assert {name: p.dtype for name, p in halved.items()} == dict.fromkeys(["0.weight", "0.bias"], torch.bfloat16)
    assert all(p is own[name] for name, p in net.named_parameters())
    assert torch.equal(own["0.weight"].grad, torch.ones(3, 2, 1, 1)) and own["0.bias"].grad is None


# ---------------------------------------------------------------------------------------------------- input and labels
def test_network_input_and_read_availability_are_inverse() -> None:
    available = all_availabilities()
    target = torch.rand((16, 4, 16, 32), generator=generator(0)) * 2 - 1
    image = network_input(target.masked_fill(~available[:, :, None, None], float("nan")), available)
    assert image.shape == (16, 8, 16, 32)
    assert torch.equal(read_availability(image), available)
    for b in range(16):
        for i in range(4):
            expected = target[b, i] if available[b, i] else torch.full((16, 32), -1.0)
            assert torch.equal(image[b, i], expected)
            assert torch.equal(image[b, 4 + i], torch.full((16, 32), float(available[b, i])))


def test_availability_survives_zero_padding_and_interpolation() -> None:
    available = all_availabilities()
    image = network_input(torch.zeros(16, 4, 16, 16), available)
    # an inferer pads with zeros: three quarters and then all but one voxel of the planes are lost
    image[:, :, :12] = 0
    image[:, :, :, :12] = 0
    assert torch.equal(read_availability(image), available)
    assert torch.equal(read_availability(torch.nn.functional.pad(image[:, :, -1:, -1:], (15, 0, 15, 0))), available)
    volume = network_input(torch.zeros(16, 4, 2, 3, 4), available)
    assert torch.equal(read_availability(volume), available)
    assert torch.equal(read_availability(volume * 0.51), available)
    assert not read_availability(volume * 0.49).any()


@pytest.mark.parametrize("size,factor", [((12, 8), 4), ((4, 6, 8), 2)], ids=["2d", "3d"])
def test_cell_labels_equal_loops_with_priority_et_net_ed_background(size: Sequence[int], factor: int) -> None:
    """y of eq. 5 at the resolution of F^5: no class is lost that any voxel of the cell has, unless a rarer one wins."""
    label = torch.zeros((6, 1, *size), dtype=torch.int64)
    draw = torch.rand(label.shape, generator=generator(1))
    for k, share in ((1, 0.05), (2, 0.03), (3, 0.04)):
        label[(draw > 0.1 * k) & (draw < 0.1 * k + share)] = k
    label[0] = 0
    result = cell_labels(label, factor)
    assert result.dtype == torch.uint8
    grid = tuple(s // factor for s in size)
    assert result.shape == (6, int(np.prod(grid)))
    for b in range(6):
        for place in np.ndindex(*grid):
            cell = label[b, 0][tuple(slice(p * factor, (p + 1) * factor) for p in place)]
            held = set(cell.flatten().tolist())
            expected = next((k for k in (2, 3, 1) if k in held), 0)  # ET, NET, ED
            assert int(result[b, int(np.ravel_multi_index(place, grid))]) == expected
    assert result.unique().tolist() == [0, 1, 2, 3]


# --------------------------------------------------------------------------------------- one scenario, and variants
#: Ablations of the network, and what their training step must not give.
VARIANTS: list[tuple[dict[str, object], set[str]]] = [
    ({"segmentation": "none", "prediction": "mean"}, {"logits", "class_map", "predicted", "entries"}),
    ({"segmentation": "none"}, {"logits", "class_map"}),
    ({"prediction": "mean"}, {"predicted"}),
    ({"segmentation": "plain", "synthesis": False}, {"class_map", "predicted", "entries"}),
    ({"synthesis": False}, {"predicted"}),
    ({"segmentation": "plain"}, {"class_map"}),
    ({"closed_loop": False}, set()),
    ({"mask_input": False}, set()),
    ({"retrieval": "mean"}, set()),
    ({"aggregation": "concat"}, set()),
    ({"companion": TINY_CHANNELS}, set()),
    ({"entry": "literal", "normalize_prototypes": False}, set()),
    ({}, set()),
]


@pytest.mark.parametrize("changes,absent", VARIANTS, ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_variants_train_infer_and_script_without_the_parts_that_they_lack(
    changes: dict[str, object], absent: set[str]
) -> None:
    reads_bank = changes.get("segmentation", "citim") == "citim" or (
        changes.get("prediction", "ccp") == "ccp" and changes.get("synthesis", True)
    )
    step = tiny_step(filled=4 if reads_bank else 0, **changes)
    available = scenario_table()
    output = step(**random_batch(available))
    companions = {"class_map": {"contrast_maps", "cells"}, "predicted": {"features", "feature_std", "rows"}}
    optional = {"logits", "entries"}.union(companions, *companions.values())
    absent = absent.union(*(companions.get(name, set()) for name in absent))
    assert set(output) == (optional - absent) | {"pred", "available"}
    total = output["pred"].square().sum()
    if "predicted" in output:
        total = total + sum(f.square().sum() for f in output["predicted"])
    if "contrast_maps" in output:
        total = total + output["contrast_maps"].square().sum() + output["class_map"].square().sum()
    total.backward()
    unused = [name for name, p in step.net.named_parameters() if p.grad is None]
    assert not unused
    net, image = step.net.eval(), random_batch(available, (32, 48), seed=4)["image"]
    with torch.no_grad():
        if reads_bank:
            torch.testing.assert_close(torch.jit.script(net)(image), net(image), rtol=0, atol=1e-6)  # an empty bank
        pred = with_frozen_bank(step)(image)
        torch.testing.assert_close(torch.jit.script(net)(image), pred, rtol=0, atol=1e-6)
    assert torch.isfinite(pred).all()
    if changes.get("segmentation") == "none":
        assert torch.equal(pred[:, 4:], torch.zeros_like(pred[:, 4:]))
    if changes.get("synthesis") is False:
        assert torch.equal(pred[:, :4], torch.full_like(pred[:, :4], -1))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["first", "last"])
@pytest.mark.parametrize("changes,absent", VARIANTS, ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_network_for_one_scenario_equals_the_network(
    changes: dict[str, object], absent: set[str], layout: torch.memory_format
) -> None:
    step = tiny_step(filled=0 if "entries" in absent else 4, **changes)
    net = with_frozen_bank(step)
    net.bank_present[:4] &= ~torch.eye(4, dtype=torch.bool)  # each entry lacks a contrast
    image = random_batch(scenario_table(), (32, 48), seed=4)["image"]
    with torch.no_grad():
        expected = net(image)
        net.to(memory_format=layout)
        for row, available in enumerate(scenario_table()):
            # what stands in the planes of missing contrasts and in those of availability is not read
            given = torch.where(available.repeat(2)[:, None, None], image[row], float("nan"))
            result = net.for_scenario(available.tolist())(torch.stack([given, given]))
            missing = [i for i in range(7) if i > 3 or not available[i]]
            torch.testing.assert_close(result[1, missing], expected[row, missing], rtol=0, atol=4e-5)
            kept = available.nonzero().flatten()
            assert torch.equal(result[0, kept], image[row, kept])


def test_network_for_one_scenario_runs_only_what_the_scenario_needs() -> None:
    net, runs = with_frozen_bank(tiny_step()), []
    for name, parts in (("encoder", net.encoders), ("decoder", net.synthesis_decoders)):
        for i, part in enumerate(parts):
            part.register_forward_hook(lambda *_, name=name, i=i: runs.append((name, i)))
    image = random_batch(scenario_table()[:1])["image"]
    with torch.no_grad():
        net.for_scenario([False, True, True, False])(image)
        assert sorted(runs) == [("decoder", 0), ("decoder", 3)] + 2 * [("encoder", 1)] + 2 * [("encoder", 2)]
        runs.clear()
        result = net.for_scenario([True] * 4)(image)
    assert sorted(runs) == [("encoder", i) for i in range(4)]
    assert torch.equal(result[:, :4], image[:, :4])


def test_mean_retrieval_gives_every_slice_the_same_statistics_and_nearest_does_not() -> None:
    image = random_batch(scenario_table()[[0, 0]], seed=6)["image"]
    for mode, same in (("mean", True), ("nearest", False)):
        net = with_frozen_bank(tiny_step(retrieval=mode))
        with torch.no_grad():
            net.bank_key[:2] = net.retrieval_key(net.encode(image[:, :4], torch.zeros(2, 3, 32, 32)))
            net.bank_key_square.copy_(net.bank_key.square().sum(dim=2))
            given = watch_retrieval(net)
            net(image)
        mean = given[0][2]
        assert torch.equal(mean[0], mean[1]) == same
