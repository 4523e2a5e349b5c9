# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Federated training with ``monai.fl.client.MonaiAlgo``: parameters are exchanged, the bank of a site never is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from monai.engines import Evaluator, SupervisedEvaluator, SupervisedTrainer, Trainer
from monai.fl.utils.exchange_object import ExchangeObject
from monai.fl.utils.filters import Filter
from torch import nn

from ..evaluation.evaluator import SliceEvaluator
from ..networks.settings import SETTINGS_KEY
from ..training.trainer import SSCFTrainer


class _NamedTrainer(SupervisedTrainer):
    """A ``SupervisedTrainer`` in name, which ``MonaiAlgo`` asks for, made as a ``Trainer``."""

    def __init__(self, **arguments: Any) -> None:
        Trainer.__init__(self, **arguments)


class _NamedEvaluator(SupervisedEvaluator):
    """A ``SupervisedEvaluator`` in name, made as an ``Evaluator``."""

    def __init__(self, **arguments: Any) -> None:
        Evaluator.__init__(self, **arguments)


class FederatedTrainer(SSCFTrainer, _NamedTrainer):  # type: ignore[misc]
    """``SSCFTrainer`` whose ``network`` is what ``MonaiAlgo`` exchanges; arguments as there."""

    @property
    def network(self) -> ExchangedParameters:  # type: ignore[override]
        """The parameters of the network that is trained."""
        return ExchangedParameters(self.training_step.net)


class FederatedEvaluator(SliceEvaluator, _NamedEvaluator):  # type: ignore[misc]
    """``SliceEvaluator`` as ``MonaiAlgo`` takes it; arguments as there. Its weights are read into, never out."""


class ExchangedParameters(nn.Module):
    """Reads and writes the parameters of a network, and no buffer: neither its bank nor its settings.

    Args:
        network: whose parameters they are.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._network = [network]  # in a list, so that it is no submodule

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:  # type: ignore[override]
        """Copies of the parameters by name."""
        return {name: value.detach().clone() for name, value in self._network[0].named_parameters()}

    def load_state_dict(self, state_dict: Mapping[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        """Writes parameters; all have to be there."""
        lacking = set(dict(self._network[0].named_parameters())) - set(state_dict)
        if lacking:
            raise ValueError(f"the weights lack {len(lacking)} parameters, such as {sorted(lacking)[0]}.")
        return self._network[0].load_state_dict(state_dict, strict=False)


class LeaveBankOut(Filter):
    """Takes the bank and the settings out of weights that come from a file, as ``ModelType.BEST_MODEL`` does."""

    def __call__(self, data: ExchangeObject, extra: dict | None = None) -> ExchangeObject:
        """See ``Filter``."""
        weights = data.weights or {}
        data.weights = {k: v for k, v in weights.items() if not k.startswith("bank_") and k != SETTINGS_KEY}
        return data
