# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Does each part of SSCF act? What changes when a part is taken out, and which term of the objective moves it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import pandas as pd
import torch
from ignite.engine import Engine, Events
from torch import nn

from ..contrasts import NUM_CONTRASTS, class_masks
from ..evaluation.evaluator import SliceEvaluator
from ..networks.blocks import expand_dims_like
from ..networks.ccp import CCP
from ..networks.sscf import SSCFNet
from ..training.trainer import BATCH_KEYS, SSCFTrainer

logger = logging.getLogger(__name__)

#: Parameters of a part, by the first name in the network.
GROUPS = ("encoders", "segmentation_decoder", "citim", "ccp", "synthesis_decoders")


@contextmanager
def changed(tensors: Iterable[torch.Tensor], change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Gives tensors other values."""
    kept = [(tensor, tensor.detach().clone()) for tensor in tensors]
    with torch.no_grad():
        for tensor, value in kept:
            tensor.copy_(change(value))
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in kept:
                tensor.copy_(value)


def mean_over_space(maps: torch.Tensor) -> torch.Tensor:
    """B x C x spatial maps of the same shape that hold their means over space."""
    return expand_dims_like(maps.flatten(2).mean(dim=2), maps).expand_as(maps)


@contextmanager
def after(owners: Iterable[nn.Module], name: str, function: Callable) -> Iterator[None]:
    """Lets a method of some objects give ``function`` of its result."""
    with ExitStack() as stack:
        for owner in owners:
            method = getattr(owner, name)
            stack.enter_context(patch.object(owner, name, lambda *args, method=method: function(method(*args))))
        yield


def interventions(net: SSCFNet, label: Callable[[], torch.Tensor]) -> dict[str, AbstractContextManager]:
    """Contexts that each take out one part of a network, by what they do; what the network lacks is left out.

    ``label`` gives the B x 1 x spatial classes of the batch that is being shown.
    """
    found: dict[str, AbstractContextManager] = {}
    if net.with_citim:
        found["CITIM zero"] = after([net.citim], "forward", torch.zeros_like)
        found["CITIM constant over space"] = after([net.citim], "forward", mean_over_space)
        found["CITIM, classes of the bank exchanged"] = changed([net.bank_value], lambda value: value.roll(1, dims=2))
    if net.two_passes:

        def second_pass(mask: Callable[[torch.Tensor], torch.Tensor]) -> AbstractContextManager:
            encode = net.encode
            return patch.object(
                net, "encode", lambda images, seen: encode(images, mask(seen).to(seen.dtype) if seen.any() else seen)
            )

        def annotated(seen: torch.Tensor) -> torch.Tensor:
            return class_masks(label().to(seen.device))

        found["mask of the second pass zero"] = second_pass(torch.zeros_like)
        found["mask of the second pass true"] = second_pass(annotated)
    if net.with_ccp:
        modules = [module for module in net.modules() if isinstance(module, CCP)]
        weights = [t for ccp in modules for t in (ccp.gamma_weight, ccp.gamma_bias)]
        found["CCP zero"] = changed(weights, torch.zeros_like)
        found["retrieval random"] = patch.object(net, "retrieval", "random")
        found["retrieval mean of the bank"] = patch.object(net, "retrieval", "mean")
        found["AdaIN with its own statistics"] = after(
            [net], "retrieve", lambda result: (*result[:2], torch.zeros_like(result[2]))
        )
        found["CBAM, channel attention constant"] = after(modules, "channel_attention", lambda a: a.mean().expand_as(a))
        spatial = [ccp.spatial for ccp in modules]
        found["CBAM, spatial attention constant"] = after(spatial, "forward", mean_over_space)
    if net.companion is not None:
        found["companion"] = patch.object(net, "companion", None)
    return found


def effects(evaluator: SliceEvaluator) -> pd.DataFrame:
    """Scores of a validation, and what becomes of them and of the predictions without each part.

    The evaluator is of an ``SSCFNet``, without a handler that freezes the bank anew.

    Returns:
        A row for each intervention: ``image_change``, mean absolute change of the missing contrasts (of a range of 2);
        ``mask_change``, that of the probabilities within the tumor; and all scores.
    """
    whole: list[torch.Tensor] = []
    changes: list[list[float]] = []

    def compare(engine: Engine) -> None:
        output: Any = engine.state.output
        position = len(changes)
        pred = output["pred"].cpu()
        if len(whole) == position:
            whole.append(pred)
        difference = (pred - whole[position]).abs()
        missing, tumor = (~output["available"] & output["has_contrast"]).cpu(), (output["label"] > 0).cpu()
        images, masks = difference[:, :NUM_CONTRASTS][missing], difference[:, NUM_CONTRASTS:]
        changes.append([float(images.mean()), float((masks * tumor).sum() / (3 * tumor.sum().clamp(min=1)))])

    evaluator.add_event_handler(Events.ITERATION_COMPLETED, compare)
    rows = {}
    state: Any = evaluator.state
    cases: dict[str, AbstractContextManager] = {"nothing": nullcontext()}
    cases |= interventions(cast(SSCFNet, evaluator.network), lambda: state.batch["label"])
    for name, context in cases.items():
        logger.info("diagnosis without: %s", name)
        changes.clear()
        with context:
            evaluator.run()
        image, mask = torch.tensor(changes).mean(dim=0).tolist()
        scores = {key: value for key, value in evaluator.state.metrics.items() if isinstance(value, float)}
        rows[name] = {"image_change": image, "mask_change": mask, **scores}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("without")


def gradient_shares(trainer: SSCFTrainer, batches: Iterable[dict[str, torch.Tensor]]) -> pd.DataFrame:
    """Who moves the weights: share of each term of the objective in its value and in the gradients of each part.

    Nothing is trained. The bank is filled with all ``batches`` first.

    Returns:
        A row for each term: ``value``, the weighted term over the sum of all; and for each of ``GROUPS`` the norm of
        its gradient over the sum of the norms of all terms.
    """
    step, shares = trainer.training_step, []
    parameters = [(name, p) for name, p in step.net.named_parameters() if p.requires_grad]
    for repetition in range(2):
        for batch in batches:
            prepared = trainer.prepare(batch)
            batch_arguments = [prepared[key] for key in BATCH_KEYS]
            output = step(prepared["image"], *batch_arguments, prepared["scenario"])
            if repetition == 0:
                trainer.on_iteration_end(output)
                continue
            terms = trainer.loss(
                output,
                *batch_arguments[:4],
                trainer.generator_scores(output, prepared),
                trainer.draw_bank_entries(prepared),
                trainer.perceptual_distances(output, prepared),
            )
            rows = {}
            for name, weight in trainer.loss.weights.items():
                if weight and name in terms:
                    value = weight * terms[name]
                    gradients = torch.autograd.grad(
                        value, [p for _, p in parameters], retain_graph=True, allow_unused=True
                    )
                    squares = dict.fromkeys(GROUPS, 0.0)
                    for (parameter, _), gradient in zip(parameters, gradients, strict=True):
                        group = parameter.split(".")[0]
                        if gradient is not None and group in squares:
                            squares[group] += float(gradient.square().sum())
                    rows[name] = {"value": float(value), **{g: s**0.5 for g, s in squares.items()}}
            table = pd.DataFrame.from_dict(rows, orient="index")
            shares.append(table / table.sum().clip(lower=1e-12))
    return (sum(shares) / len(shares)).rename_axis("term")


def diagnose(
    evaluator: SliceEvaluator, trainer: SSCFTrainer, loader: Iterable, number: int, output_dir: str | Path
) -> None:
    """Writes ``diagnosis.md`` with the tables of ``effects`` and ``gradient_shares``, and each as a CSV file.

    ``gradient_shares`` gets the first ``number`` batches of the training loader.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    tables = {"effects": effects(evaluator), "gradient_shares": gradient_shares(trainer, list(islice(loader, number)))}
    for name, table in tables.items():
        table.to_csv(folder / f"{name}.csv")
    text = "\n\n".join(f"## {name}\n\n{table.to_markdown(floatfmt='.4f')}" for name, table in tables.items())
    (folder / "diagnosis.md").write_text(f"# Diagnosis\n\n{text}\n")
    logger.info("diagnosis written to %s", folder / "diagnosis.md")
