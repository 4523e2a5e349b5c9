# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Trainings that end by the clock, and those that start from the weights of an earlier stage."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import torch
from ignite.engine import Engine, Events
from torch import nn

from ..contrasts import StudyError

logger = logging.getLogger(__name__)


class TimeLimit:
    """Ends a training after some minutes, counted from its start and with its validations.

    Args:
        minutes: of wall time, above 0.

    Raises:
        ValueError: for 0 minutes or less.
    """

    def __init__(self, minutes: float) -> None:
        if minutes <= 0:
            raise ValueError(f"minutes must be above 0, got {minutes}.")
        self.minutes, self.end = minutes, 0.0

    def attach(self, engine: Engine) -> None:
        """Starts the clock at ``STARTED`` and looks at it after every iteration."""
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def start(self, engine: Engine) -> None:
        """Starts the clock."""
        self.end = time.monotonic() + 60 * self.minutes

    def __call__(self, engine: Engine) -> None:
        if time.monotonic() > self.end:
            engine.logger.info(f"{self.minutes} minutes have passed: the training ends here")
            engine.terminate()


def with_shared_weights(network: nn.Module, path: str | Path) -> nn.Module:
    """The network with those tensors of a file that it has too; its bank and whatever is new stay as they are.

    Args:
        network: of the second stage.
        path: state_dict of the first stage, which may lack parts of the network.

    Raises:
        StudyError: if the file cannot be read or shares nothing with the network.
    """
    try:
        state = torch.load(Path(path).expanduser(), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever the unpickler and the zip reader do
        raise StudyError(f"{path} cannot be read as weights of the first stage: train it first.") from error
    ours = {name for name, _ in network.named_parameters()}
    shared = {
        name: value
        for name, value in state.items()
        if name in ours and value.shape == network.get_parameter(name).shape
    }
    if not shared:
        raise StudyError(f"{path} has no tensor of this network: give the weights of its first stage.")
    network.load_state_dict(shared, strict=False)
    logger.info("%d of %d tensors are those of %s", len(shared), len(ours), path)
    return network
