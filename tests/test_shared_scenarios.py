# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""The training step for a batch that shares one scenario computes what the step for mixed scenarios computes."""

from __future__ import annotations

import pytest
import torch
from builders import TINY_CHANNELS, assert_same, random_batch, tiny_step

from scripts.contrasts import scenario_table
from scripts.training.losses import Draw, GeneratorLoss
from scripts.training.step import Scenario

VARIANTS = [
    {},
    {"entry": "literal", "normalize_prototypes": False},
    {"segmentation": "none"},
    {"segmentation": "plain", "closed_loop": False},
    {"prediction": "mean"},
    {"mask_input": False},
    {"synthesis": False},
    {"companion": TINY_CHANNELS},
    {"segmentation": "none", "prediction": "mean"},
]


def loss_of(step, output, batch):
    """All terms but the adversarial, with every filled entry drawn."""
    entries = step.bank.entries()
    index = torch.arange(4).expand(len(batch["image"]), -1)
    draw = Draw(entries, index, torch.ones_like(index, dtype=torch.bool))
    criterion = GeneratorLoss(beta=(100, 30, 50, 50, 0), head_weight=1.0, relative_feature=True)
    truth = [batch[key] for key in ("target", "label", "has_contrast", "has_mask")]
    return criterion(output, *truth, None, draw)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "+".join(map(str, v.values())) or "default")
@pytest.mark.parametrize("number", [0, 5, 8, 12])
def test_shared_scenario_equals_mixed_batch(number, variant):
    available = scenario_table()[number]
    batch = random_batch(available.expand(3, -1), seed=number)
    results = []
    for scenario in (None, Scenario(tuple(available.tolist()), tuple(available.nonzero().flatten().tolist()))):
        step = tiny_step(**variant)
        output = step(**batch, scenario=scenario)
        terms = loss_of(step, output, batch)
        terms["loss"].backward()
        gradients = {n: p.grad for n, p in step.named_parameters() if p.grad is not None and p.grad.any()}
        results.append((output, terms, gradients))
    (mixed, mixed_terms, mixed_gradients), (shared, shared_terms, shared_gradients) = results
    assert mixed_terms.keys() == shared_terms.keys()
    for name, value in mixed_terms.items():
        torch.testing.assert_close(shared_terms[name], value, msg=name, rtol=1e-4, atol=1e-6)
    # without a synthesis branch nothing is decoded, and an available contrast comes back as it was given
    rows = [*shared["decoded"][0].nonzero().flatten().tolist(), 4, 5, 6]
    torch.testing.assert_close(shared["pred"][:, rows], mixed["pred"][:, rows], rtol=1e-4, atol=1e-5)
    assert mixed_gradients.keys() == shared_gradients.keys()
    # biases in front of a normalization have gradients of rounding alone
    scale = max(float(value.abs().max()) for value in mixed_gradients.values())
    for name, value in mixed_gradients.items():
        torch.testing.assert_close(shared_gradients[name], value, rtol=1e-3, atol=1e-5 * scale, msg=name)
    if "entries" in mixed:
        for field, ours, theirs in zip(mixed["entries"]._fields, shared["entries"], mixed["entries"], strict=True):
            if ours.is_floating_point():
                torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4, msg=field)
            else:
                assert_same(ours, theirs, field)
    else:
        assert "entries" not in shared


def test_missing_contrasts_get_no_gradient():
    available = torch.tensor([True, False, True, False])
    batch = random_batch(available.expand(2, -1))
    for scenario in (None, Scenario(tuple(available.tolist()), (0,))):
        step = tiny_step()
        loss_of(step, step(**batch, scenario=scenario), batch)["loss"].backward()
        for i, encoder in enumerate(step.net.encoders):
            moved = any(p.grad is not None and p.grad.any() for p in encoder.parameters())
            assert moved == bool(available[i])


def test_one_reconstruction_in_the_place_of_all_is_unbiased():
    available = torch.tensor([True, True, False, True])
    batch = random_batch(available.expand(2, -1))
    values = {}
    for decoded in ((0, 1, 3), (0,), (1,), (3,)):
        step = tiny_step()
        with torch.no_grad():
            terms = loss_of(step, step(**batch, scenario=Scenario(tuple(available.tolist()), decoded)), batch)
        values[decoded] = torch.stack([terms[name] for name in ("reconstruction", "tumor", "loss")])
    mean = torch.stack([values[(i,)] for i in (0, 1, 3)]).mean(dim=0)
    torch.testing.assert_close(mean, values[(0, 1, 3)])
    assert not torch.allclose(values[(0,)], values[(1,)])


def test_entries_are_made_of_the_first_samples_alone():
    available = scenario_table()[5]
    batch = random_batch(available.expand(3, -1))
    scenario = Scenario(tuple(available.tolist()), ())
    full, short = tiny_step(), tiny_step()
    short.bank_samples = 2
    for given in (None, scenario):
        expected, result = full(**batch, scenario=given)["entries"], short(**batch, scenario=given)["entries"]
        for theirs, ours in zip(expected, result, strict=True):
            torch.testing.assert_close(ours, theirs[:2])
