# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Ignite handlers that write and read weights: resumable training checkpoints, the best and the last model."""

from __future__ import annotations

import json
import logging
import math
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from torch import nn

from ..contrasts import StudyError
from ..networks.settings import differences
from ..networks.weights import first_reason, is_intact, remove_leftovers, save_weights, write_tensors
from .bank_builder import BankFreezer

logger = logging.getLogger(__name__)

_PATTERN = re.compile(r"checkpoint_epoch=(\d+)\.pt")


class TrainingCheckpoint:
    """Saves the whole training state at epoch ends and goes on from the newest readable one.

    The state is written to a temporary file and renamed, and older files are removed only afterwards, so that at any
    moment ``keep`` - 1 complete checkpoints are there. A run that was stopped at any point goes on from its last saved
    epoch when it is started again with the same command.

    Args:
        directory: of the checkpoints.
        objects: what is saved under which name; everything with ``state_dict`` and ``load_state_dict``. What is None is
            left out.
        keep: how many checkpoints are kept, at least 2.
        interval: epochs between checkpoints.
        resume: go on from what is found in ``directory``; if False, a run starts anew and overwrites.
        settings: what must not change between starts of a run, in numbers, texts, lists and mappings.

    Raises:
        ValueError: for ``keep`` below 2.
    """

    def __init__(
        self,
        directory: str | Path,
        objects: Mapping[str, Any],
        keep: int = 3,
        interval: int = 1,
        resume: bool = True,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        if keep < 2:
            raise ValueError(f"keep must be at least 2, so that one complete checkpoint always stays, got {keep}.")
        self.directory, self.keep, self.interval = Path(directory), keep, interval
        self.settings = json.loads(json.dumps(settings or {}))
        self.objects = {name: item for name, item in objects.items() if item is not None}
        # "--resume false" of a command line arrives as text, which is not False
        self.resume = resume.lower() != "false" if isinstance(resume, str) else resume

    def attach(self, engine: Engine) -> None:
        """Loads at ``STARTED``, saves at ``EPOCH_COMPLETED``. Attach it after schedulers and validation."""
        engine.add_event_handler(Events.STARTED, self.load)
        engine.add_event_handler(Events.EPOCH_COMPLETED(every=self.interval), self.save)

    def files(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        found = [(int(m[1]), p) for p in self.directory.glob("*.pt") if (m := _PATTERN.fullmatch(p.name))]
        return [path for _, path in sorted(found)]

    def save(self, engine: Engine) -> None:
        """Writes the state after ``engine.state.epoch`` epochs."""
        state = {name: item.state_dict() for name, item in self.objects.items()}
        state["settings"] = self.settings
        state["engine"] = {"epoch": engine.state.epoch, "max_epochs": engine.state.max_epochs}
        write_tensors(self.directory / f"checkpoint_epoch={engine.state.epoch}.pt", state)
        if idist.get_rank() == 0:
            for old in self.files()[: -self.keep]:
                old.unlink()

    def load(self, engine: Engine) -> None:
        """Restores the newest readable checkpoint, if there is one.

        Raises:
            StudyError: if a checkpoint does not fit the configured networks or settings.
        """
        remove_leftovers(self.directory / "checkpoint_epoch=*.pt")
        if not self.resume:
            if idist.get_rank() == 0:
                for path in self.files():
                    path.unlink()
            return
        for path in reversed(self.files()):
            try:
                if not is_intact(path):
                    raise ValueError("checksums")
                state = torch.load(path, map_location=getattr(engine.state, "device", None), weights_only=True)
            except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
                logger.warning(f"{path} cannot be read ({type(error).__name__}) and is passed over.")
                continue
            try:
                changed = differences(self.settings, state.get("settings", {}))  # none before this was kept
                if changed:
                    raise ValueError(changed)
                for name, item in self.objects.items():
                    item.load_state_dict(state[name])
            except (KeyError, RuntimeError, ValueError) as error:
                raise StudyError(
                    f"{path} does not fit the configured run ({first_reason(error)}): restore the settings it was "
                    "trained with, or give another --output_dir, or --resume false to start anew."
                ) from error
            engine.state.epoch = state["engine"]["epoch"]
            engine.state.iteration = engine.state.epoch * (engine.state.epoch_length or 0)
            logger.info(f"going on after epoch {engine.state.epoch} from {path}")
            if engine.state.epoch >= (engine.state.max_epochs or math.inf):
                logger.warning("This training is complete: a larger max_epochs extends it, resume False starts anew.")
            return


class BestModel:
    """Saves the evaluated network, its frozen bank included, whenever the key metric is the best so far.

    Args:
        path: of the state_dict, normally ``models/model.pt``.
        network: the evaluated network.
        metric: name in the evaluator's ``state.metrics``, larger is better.
        settings: written into the weights, see ``save_weights``.
        validation: what else the score depends on, plain data.
    """

    def __init__(
        self,
        path: str | Path,
        network: nn.Module,
        metric: str,
        settings: Mapping[str, Any] | None = None,
        validation: Mapping[str, Any] | None = None,
    ) -> None:
        self.path, self.network, self.metric, self.settings = Path(path), network, metric, settings
        self.validation = {"metric": metric, **json.loads(json.dumps(validation or {}))}
        self.best, self.epoch = float("-inf"), 0

    def attach(self, engine: Engine) -> None:
        """Compares and saves when the evaluator has completed a run."""
        remove_leftovers(self.path)
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        score = float(engine.state.metrics[self.metric])
        if score > self.best:
            self.best, self.epoch = score, engine.state.epoch
            save_weights(self.path, self.network, self.settings)
            engine.logger.info(f"best {self.metric} so far: {score:.4f} at epoch {self.epoch}, saved {self.path}")

    def state_dict(self) -> dict[str, Any]:
        """Best score, its epoch and what it is of."""
        return {"best": self.best, "epoch": self.epoch, "validation": self.validation}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores ``state_dict``; a score of another metric or of other slices is no best one."""
        changed = differences(self.validation, state["validation"])
        if changed:
            logger.warning("The best model is chosen anew, since its validation is another: %s.", changed)
            return
        self.best, self.epoch = float(state["best"]), int(state["epoch"])


class LastModel:
    """At the end of training, freezes the bank of the averaged network, if it has one, and saves the network.

    Args:
        path: of the state_dict.
        network: the averaged network.
        freezer: freezes its bank; None for a network without a bank.
        best: handler of the best model; where no validation ever ran, the last model is saved in its place too.
        settings: written into the weights, see ``save_weights``.
    """

    def __init__(
        self,
        path: str | Path,
        network: nn.Module,
        freezer: BankFreezer | None = None,
        best: BestModel | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.path, self.network, self.freezer, self.best = Path(path), network, freezer, best
        self.settings = settings

    def attach(self, engine: Engine) -> None:
        """Saves at ``COMPLETED``."""
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        if self.freezer is not None:
            self.freezer(engine)
        save_weights(self.path, self.network, self.settings)
        if self.best is not None and self.best.best == float("-inf"):
            save_weights(self.best.path, self.network, self.settings)
