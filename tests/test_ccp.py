# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Cross-contrast prediction equals equations 8 and 9 written as loops over samples, targets and sources."""

from __future__ import annotations

import math
import shutil
from unittest.mock import patch

import numpy as np
import pytest
import torch
from builders import all_availabilities, compute_in_float64, generator, random_entries, tiny_net

from scripts.contrasts import scenario_table
from scripts.networks.blocks import scale_statistics
from scripts.networks.ccp import CCP
from scripts.networks.memory_bank import CompiledBank
from scripts.networks.retrieval import active_pairs, key_distances, mean_prototype, retrieve, usable_for_pairs
from scripts.networks.sscf import SSCFNet

K, C = 4, 8


def make_bank(entries: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> CompiledBank:
    draw = generator(seed)
    key = torch.randn((entries, K, C), generator=draw, dtype=dtype)
    return CompiledBank(
        key=key,
        key_square=(key * key).sum(dim=2),
        mean=torch.randn((entries, K, C), generator=draw, dtype=dtype),
        std=torch.rand((entries, K, C), generator=draw, dtype=dtype) + 0.2,
        value=torch.zeros(entries, K, 1, 1),
        gram=torch.zeros(entries, K, 1, 1),
        present=torch.ones(entries, K, dtype=torch.bool),
        patient=torch.arange(entries),
    )


def make_net(spatial_dims: int = 2) -> SSCFNet:
    """A network of one scale and with no segmentation branch, whose CCP is eq. 9 as it stands."""
    torch.manual_seed(3)
    net = SSCFNet(spatial_dims, (C,), bank_size=1, key_size=1, entry="literal", segmentation="none")
    with torch.no_grad():
        for parameter in net.ccp.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return net


def literal_nearest(query: np.ndarray, bank: CompiledBank, allowed: np.ndarray, t: int, s: int) -> int | None:
    """l* of eq. 8: Euclidean distance over all entries that the sample may use and that have both contrasts."""
    best, nearest = math.inf, None
    for entry in range(bank.key.shape[0]):
        if not (allowed[entry] and bank.present[entry, s] and bank.present[entry, t]):
            continue
        distance = math.sqrt(sum((float(a) - float(b)) ** 2 for a, b in zip(query, bank.key[entry, s], strict=True)))
        if distance < best:
            best, nearest = distance, entry
    return nearest


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def literal_candidate(
    ccp: CCP, feature: np.ndarray, t: int, mu: np.ndarray | None, sigma: np.ndarray | None
) -> np.ndarray:
    """AdaIN (eq. 8) with the prototype's mu and sigma, then CBAM of target t. feature: C x spatial."""
    weights = {name: p.detach().double().numpy() for name, p in ccp.named_parameters()}
    axes = tuple(range(1, feature.ndim))
    wide = (slice(None),) + (None,) * len(axes)
    center, own = feature.mean(axis=axes), np.sqrt(feature.var(axis=axes) + 1e-5)
    mu, sigma = (center, own) if mu is None or sigma is None else (mu, sigma)
    styled = sigma[wide] * (feature - center[wide]) / own[wide] + mu[wide]

    def shared_mlp(pooled: np.ndarray) -> np.ndarray:
        hidden = np.maximum(weights["squeeze_weight"][t] @ pooled + weights["squeeze_bias"][t], 0)
        return weights["excite_weight"][t] @ hidden + weights["excite_bias"][t]

    channel = sigmoid(shared_mlp(styled.mean(axis=axes)) + shared_mlp(styled.max(axis=axes)))
    refined = channel[wide] * styled
    pooled = np.stack([refined.mean(axis=0), refined.max(axis=0)])
    kernel = weights["spatial.weight"][t]
    reach = kernel.shape[-1] // 2
    padded = np.pad(pooled, [(0, 0)] + [(reach, reach)] * len(axes))
    gate = np.empty(feature.shape[1:])
    for place in np.ndindex(*gate.shape):
        window = padded[(slice(None), *(slice(p, p + kernel.shape[-1]) for p in place))]
        gate[place] = (window * kernel).sum() + weights["spatial.bias"][t]
    return sigmoid(gate)[None] * refined


def literal_ccp(
    ccp: CCP,
    feature: torch.Tensor,
    key: torch.Tensor,
    available: torch.Tensor,
    bank: CompiledBank,
    allowed: torch.Tensor,
) -> np.ndarray:
    """F_CCP of eq. 9: gamma over the concatenation of K candidates, zero where a contrast is no source.

    Rows of available contrasts are their own features.
    """
    gamma = ccp.gamma_weight.detach().double().numpy()
    bias = ccp.gamma_bias.detach().double().numpy()
    c = feature.shape[2]
    out = np.zeros(tuple(feature.shape))
    for b in range(feature.shape[0]):
        sources = [s for s in range(K) if available[b, s]]
        for t in range(K):
            if available[b, t]:
                out[b, t] = feature[b, t].double().numpy()
                continue
            out[b, t] += bias[t].reshape((-1,) + (1,) * (feature.dim() - 3))
            concatenated = np.zeros((K * c, *feature.shape[3:]))
            for s in sources:
                entry = literal_nearest(key[b, s].numpy(), bank, allowed[b].numpy(), t, s)
                prototype = (None, None)
                if entry is not None:
                    prototype = (bank.mean[entry, t].double().numpy(), bank.std[entry, t].double().numpy())
                concatenated[s * c : (s + 1) * c] = literal_candidate(
                    ccp, feature[b, s].double().numpy(), t, *prototype
                )
            convolution = np.concatenate([gamma[t, s] for s in range(K)], axis=1)  # C x K C, a 1x1 convolution
            scale = (K - 1) / max(len(sources), 1)
            out[b, t] += scale * np.tensordot(convolution, concatenated, axes=(1, 0))
    return out


def run(
    net: SSCFNet,
    feature: torch.Tensor,
    key: torch.Tensor,
    available: torch.Tensor,
    bank: CompiledBank,
    allowed: torch.Tensor,
) -> torch.Tensor:
    """What the synthesis branch predicts of features that are retrieved by keys of their own."""
    with patch.object(net, "retrieval_key", lambda _: key):
        _, (predicted,) = net.synthesize([feature], scale_statistics([feature]), available, bank, allowed)
    return predicted


def pair_distances(key: torch.Tensor, bank: CompiledBank, source: torch.Tensor) -> torch.Tensor:
    """B x P x L distances of the source's keys."""
    distances = torch.stack([key_distances(key[:, i], bank, i) for i in range(K)], dim=1)
    return distances.gather(1, source.unsqueeze(2).expand(-1, -1, distances.shape[2]))


def compare(result: torch.Tensor, expected: np.ndarray, tolerance: float) -> None:
    np.testing.assert_allclose(
        result.detach().double().numpy(), expected, rtol=0, atol=tolerance * np.abs(expected).max()
    )


def test_active_pairs_are_exactly_missing_times_available() -> None:
    available = all_availabilities()
    target, source, active = active_pairs(available)
    assert target.shape == source.shape == active.shape == (16, 4)
    for row in range(16):
        pairs = [(int(t), int(s)) for t, s, a in zip(target[row], source[row], active[row], strict=True) if a]
        expected = [(t, s) for t in range(K) for s in range(K) if not available[row, t] and available[row, s]]
        assert sorted(pairs) == sorted(expected)
        if pairs:  # an idle pair reads no missing contrast
            assert available[row, source[row]].all()
    assert int(target.min()) >= 0 and int(target.max()) < K and int(source.min()) >= 0 and int(source.max()) < K


@pytest.mark.parametrize("space", [(5, 6), (3, 4, 3)], ids=["2d", "3d"])
def test_ccp_equals_equations_8_and_9_for_all_scenarios_in_float64(
    monkeypatch: pytest.MonkeyPatch, space: tuple[int, ...]
) -> None:
    compute_in_float64(monkeypatch)
    net = make_net(len(space)).double()
    available = all_availabilities()  # the 14 scenarios, and none and all available
    feature = torch.randn((16, K, C, *space), generator=generator(1), dtype=torch.float64) * 2 + 0.5
    key = torch.randn((16, K, C), generator=generator(2), dtype=torch.float64)
    case = (feature, key, available, make_bank(5, dtype=torch.float64), torch.ones(16, 5, dtype=torch.bool))
    result = run(net, *case)
    assert result.shape == feature.shape
    compare(result, literal_ccp(net.ccp[0], *case), 1e-12)


def test_network_predicts_by_equations_8_and_9_at_every_scale() -> None:
    """Each scale with its own part of the retrieved statistics, beside the mean of the available features."""
    net, available = tiny_net().eval(), scenario_table()[[1, 7, 13]]
    bank = net.new_bank((32, 32))
    bank.enqueue(random_entries(bank, range(5)))
    images, allowed = torch.rand((3, K, 32, 32), generator=generator(1)), torch.ones(3, 6, dtype=torch.bool)
    with torch.no_grad():
        compiled = net.compile_bank(bank.entries())
        out = net.run_branches(images, available, compiled, allowed)
    key, start = net.retrieval_key(out.second), 0
    for ccp, feature, predicted in zip(net.ccp, out.second, out.predicted, strict=True):
        part = slice(start, start := start + feature.shape[2])
        of_scale = compiled._replace(mean=compiled.mean[..., part], std=compiled.std[..., part])
        expected = literal_ccp(ccp, feature, key, available, of_scale, allowed)
        for b, shown in enumerate(available):
            expected[b, ~shown.numpy()] += feature[b, shown].double().mean(dim=0).numpy()
        compare(predicted, expected, 1e-4)


def test_ccp_equals_equations_8_and_9_in_float32_with_partial_studies_and_masked_entries() -> None:
    net = make_net()
    feature = torch.randn((14, K, C, 4, 6), generator=generator(1)) * 2 + 0.5
    key = torch.randn((14, K, C), generator=generator(2))
    bank = make_bank(6)._replace(present=torch.rand((6, K), generator=generator(4)) > 0.3)
    allowed = torch.rand((14, 6), generator=generator(5)) > 0.4
    allowed[3] = False
    case = (feature, key, scenario_table(), bank, allowed)
    compare(run(net, *case), literal_ccp(net.ccp[0], *case), 1e-5)


def test_retrieval_finds_the_euclidean_nearest_usable_entry_of_every_pair() -> None:
    """l* of eq. 8 over entries that are allowed (not the patient's own) and hold both contrasts of the pair."""
    bank = make_bank(12)
    key = bank.key + 10
    bank = bank._replace(
        key=key, key_square=key.square().sum(dim=2), present=torch.rand((12, K), generator=generator(1)) > 0.4
    )
    query = torch.randn((32, K, C), generator=generator(2)) + 10  # far from the origin compared with their distances
    allowed = torch.rand((32, 12), generator=generator(3)) > 0.5
    allowed[7] = False
    target, source, active = active_pairs(all_availabilities().repeat(2, 1))
    usable = usable_for_pairs(bank, allowed, target, source)
    index, found = retrieve(pair_distances(query, bank, source), usable), usable.any(dim=2)
    seen = {True: 0, False: 0}
    for b in range(32):
        for p in range(4):
            if not active[b, p]:
                continue
            t, s = int(target[b, p]), int(source[b, p])
            expected = literal_nearest(query[b, s].numpy(), bank, allowed[b].numpy(), t, s)
            assert bool(found[b, p]) == (expected is not None)
            seen[expected is not None] += 1
            if expected is not None:
                assert int(index[b, p]) == expected
    assert seen[True] > 50 and seen[False] > 3


def test_features_of_missing_contrasts_reach_nothing_and_get_no_gradient() -> None:
    net, available = make_net(), all_availabilities()
    feature = torch.randn((16, K, C, 4, 4), generator=generator(1))
    others = (torch.randn((16, K, C), generator=generator(2)), available, make_bank(3), torch.ones(16, 3).bool())
    result = run(net, feature, *others)
    for junk in (torch.zeros(()), torch.tensor(1e6), torch.randn(feature.shape, generator=generator(9))):
        replaced = torch.where(available[:, :, None, None, None], feature, junk).requires_grad_()
        again = run(net, replaced, *others)
        assert torch.equal(again, result)
        torch.where(available[:, :, None, None, None], 0.0, again).square().sum().backward()
        assert replaced.grad is not None
        assert torch.equal(replaced.grad[~available], torch.zeros_like(replaced.grad[~available]))
        read = available & (available.sum(dim=1) < K).unsqueeze(1)
        assert torch.isfinite(replaced.grad).all()
        assert (replaced.grad[read].flatten(1).abs().sum(dim=1) > 0).all()


@pytest.mark.parametrize("space", [(5, 6), (3, 4, 3)], ids=["2d", "3d"])
@pytest.mark.parametrize("row", range(14))
def test_one_scenario_for_all_samples_gives_what_the_mixed_batch_gives(row: int, space: tuple[int, ...]) -> None:
    net, bank, available = make_net(len(space)), make_bank(4), scenario_table()[row]
    feature = torch.randn((3, K, C, *space), generator=generator(1)) * 2 + 0.5
    allowed = torch.rand((3, 4), generator=generator(5)) > 0.4
    allowed[1] = False
    expected = run(net, feature, net.retrieval_key([feature]), available.expand(3, -1), bank, allowed)
    scenario = net.for_scenario(available.tolist())
    (result,) = scenario.predict([[feature[:, i] for i in scenario.sources]], bank, allowed)
    torch.testing.assert_close(result.transpose(0, 1), expected[:, scenario.targets], rtol=0, atol=1e-5)


def test_memory_layout_of_the_features_does_not_change_the_result() -> None:
    net = make_net()
    feature = torch.randn((14, K, C, 6, 4), generator=generator(1))
    key = torch.randn((14, K, C), generator=generator(2))
    others = (key, scenario_table(), make_bank(4), torch.ones(14, 4, dtype=torch.bool))
    last = feature.permute(1, 0, 3, 4, 2).contiguous().permute(1, 0, 4, 2, 3)
    result = run(net, last, *others)
    torch.testing.assert_close(result, run(net, feature, *others), rtol=0, atol=1e-5)
    assert result[:, 0].is_contiguous(memory_format=torch.channels_last)


def test_random_retrieval_draws_among_usable_entries_whatever_their_distance() -> None:
    torch.manual_seed(0)
    usable = torch.tensor([[[True, False, True, True]]]).expand(400, 1, 4)
    index = retrieve(torch.tensor([[[0.0, -5.0, 3.0, 9.0]]]).expand(400, 1, 4), usable, "random")
    counts = torch.bincount(index.flatten(), minlength=4)
    assert counts[1] == 0 and (counts[[0, 2, 3]] > 90).all()


def test_mean_prototype_equals_a_loop_over_usable_entries() -> None:
    bank = make_bank(5)
    usable = torch.rand((2, 3, 5), generator=generator(1)) > 0.5
    usable[1, 2] = False
    target = torch.tensor([[0, 3, 1], [2, 2, 0]])
    result = mean_prototype(bank.std, usable, target)
    for b in range(2):
        for p in range(3):
            rows = [bank.std[entry, target[b, p]].double() for entry in range(5) if usable[b, p, entry]]
            expected = sum(rows) / len(rows) if rows else torch.zeros(C, dtype=torch.float64)
            torch.testing.assert_close(result[b, p].double(), expected, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_half_precision_has_the_gradient_of_the_eager_one() -> None:
    net, bank = make_net(), make_bank(1)
    available = torch.tensor([[True, False, False, False], [False, True, True, False]])

    def forward(feature: torch.Tensor) -> torch.Tensor:
        allowed = torch.ones(2, 1, dtype=torch.bool)
        return net.synthesize([feature], scale_statistics([feature]), available, bank, allowed)[1][0]

    def gradient(function) -> torch.Tensor:
        feature = torch.randn((2, K, C, 16, 16), generator=generator(1)).bfloat16().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = function(feature)
        out.float().square().sum().backward()
        return feature.grad.float()

    eager, compiled = gradient(forward), gradient(torch.compile(forward, dynamic=False))
    assert torch.isfinite(compiled).all()
    # maxima that half precision makes equal may send their gradient elsewhere
    assert (eager - compiled).norm() < 0.1 * eager.norm()
