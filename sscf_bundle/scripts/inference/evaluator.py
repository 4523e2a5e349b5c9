# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""The engine of inference: one study after the other, read ahead and written in the background."""

from __future__ import annotations

import logging
import os
import time
from collections import defaultdict, deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from monai.engines import Evaluator
from monai.engines.utils import IterationEvents
from monai.inferers import Inferer
from torch import nn

from ..contrasts import FAILURE_KEY, StudyError
from ..data.randomness import stable_hash
from ..networks.weights import load_weights
from .inferer import predict
from .preprocessing import FILE_BRAIN_KEY, failure_reason
from .trust import TrustAssessor, patients_in_bank
from .writer import StudyWriter

#: What of an item is not needed once its prediction is on the grid on file.
_PREPROCESSED_KEYS = ("image", "label", "brain", FILE_BRAIN_KEY)

logger = logging.getLogger(__name__)


class StudyEvaluator(Evaluator):
    """Fill in one study after the other; a study that fails is noted and never stops the others.

    Studies are written by threads in the background while the next ones are computed. After ``run``, which returns
    when all is written, ``written`` maps each finished study to the paths that the writer gave, and ``failures`` is a
    list of ``{"study": ..., "reason": ...}``, both in the order of the data loader; ``seconds`` is the time of the
    network by study. Handlers find the prediction at ``IterationEvents.MODEL_COMPLETED`` and no
    longer after it.

    Args:
        device: of the network.
        val_data_loader: gives lists of one item, ``DataLoader(StudyDataset(...), 1, collate_fn=no_collation)``.
        network: one tensor to one tensor, as ``SSCFNet``, on ``device``.
        inferer: how the network is called.
        postprocessing: see ``prediction_transforms``.
        writer: ``prepare`` before the first study, a call with each finished item, ``finish`` after the last one;
            ``StudyWriter``, or ``StudyScores`` of the evaluation, which scores what the other one writes.
        ckpt_path: ``state_dict`` to load when the run starts; ``None`` takes the network as it is.
        val_handlers: Ignite handlers.
        amp: run the network with autocast to bfloat16.
        num_writers: number of threads that write. No more than this many finished studies are in memory beside the one
            that is being computed. 0 writes each study before the next is computed.
        trust: judges each study.
    """

    def __init__(
        self,
        device: torch.device | str,
        val_data_loader: Any,
        network: nn.Module,
        inferer: Inferer,
        postprocessing: Any,
        writer: StudyWriter | Any,
        ckpt_path: str | os.PathLike[str] | None = None,
        val_handlers: Sequence | None = None,
        amp: bool = False,
        num_writers: int = 1,
        trust: TrustAssessor | None = None,
    ) -> None:
        super().__init__(
            device=device,
            val_data_loader=val_data_loader,
            postprocessing=postprocessing,
            val_handlers=val_handlers,
            amp=amp,
            decollate=False,
        )
        self.network, self.inferer, self.writer = network, inferer, writer
        self.ckpt_path, self.num_writers, self.trust = ckpt_path, num_writers, trust
        self.weights_sha256: str | None = None
        self.seconds: dict[str, float] = defaultdict(float)
        self.failures: list[dict[str, str]] = []
        self.written: dict[str, dict[str, Path]] = {}
        self._threads: ThreadPoolExecutor | None = None
        self._pending: deque[tuple[str, Future[dict[str, Path]]]] = deque()

    def run(self, global_epoch: int = 1) -> None:  # type: ignore[override]
        """Fill in all studies; ``global_epoch`` as of ``monai.engines.Evaluator``.

        Raises:
            StudyError: when the weights or the output folder cannot be used, or, after all others are done, when a
                study failed.
        """
        if self.ckpt_path is not None:
            # the frame may be larger than that of the training, for a larger brain
            used = getattr(self.writer, "settings", {})
            trained = {name: used[name] for name in ("spacing", "scaling") if name in used}
            self.weights_sha256 = load_weights(self.network, str(self.ckpt_path), trained)
        self.writer.prepare()
        self.failures, self.written = [], {}
        self.seconds.clear()
        self._threads = ThreadPoolExecutor(self.num_writers, "writer") if self.num_writers else None
        try:
            if self.state.epoch_length != 0:  # else every study was finished before
                super().run(global_epoch)
            self._collect(0)
        finally:
            # after an interruption, what is being written is completed and what waits is dropped
            if self._threads is not None:
                self._threads.shutdown(cancel_futures=True)
            self._threads = None
            self._pending.clear()
        self.writer.finish(self.failures, len(self.failures) + len(self.written))

    def _iteration(self, engine: StudyEvaluator, batchdata: list[dict]) -> list[dict]:  # type: ignore[override]
        item = batchdata[0]
        study = str(item["study"])
        done: Future[dict[str, Path]] = Future()
        # before the network runs, because from then on one study more is in memory
        self._collect(self.num_writers)
        engine.state.output = [{}]
        try:
            if FAILURE_KEY in item:
                raise StudyError(item[FAILURE_KEY])
            started = time.perf_counter()
            pred = predict(item["image"], self.network, self.inferer, engine.state.device, self.amp)
            self.seconds[study] += time.perf_counter() - started
            engine.state.output = [{**self._findings(item), "seconds": self.seconds[study], "pred": pred}]
            del pred
            engine.fire_event(IterationEvents.FORWARD_COMPLETED)
            engine.fire_event(IterationEvents.MODEL_COMPLETED)
            # the network's input would only fill the memory
            finished = {k: v for k, v in {**item, **engine.state.output[0]}.items() if k not in _PREPROCESSED_KEYS}
            if self._threads is None:
                done.set_result(self.writer(finished))
            else:
                done = self._threads.submit(self.writer, finished)
        except Exception as error:
            done.set_exception(error)
        # the engine would hold them until the next study is there
        engine.state.batch, engine.state.output = [], [{}]
        self._pending.append((study, done))
        return engine.state.output

    def _findings(self, item: dict) -> dict[str, Any]:
        """What the record tells of the making and of the trust in a study.

        ``patient_in_bank`` says that the network retrieves from the patient's own slices, which makes the result better
        than it can be for a new patient.
        """
        patient = str(item.get("patient", item["study"]))
        in_bank = stable_hash(patient) in patients_in_bank(self.network)
        if in_bank:
            logger.warning("Patient %s is in the memory bank of the network: its result is no test of it.", patient)
        found: dict[str, Any] = {"weights_sha256": self.weights_sha256, "patient_in_bank": in_bank}
        times = {"checks": item["check_seconds"]} if "check_seconds" in item else {}
        if self.trust is not None:
            started = time.perf_counter()
            found |= self.trust(item, self.network, self.state.device)
            times["trust"] = time.perf_counter() - started
        return {**found, "seconds_of_checks": times} if times else found

    def _collect(self, remaining: int) -> None:
        """Note how the oldest studies went, and wait for them, until only so many are unfinished."""
        while len(self._pending) > remaining or (self._pending and self._pending[0][1].done()):
            study, done = self._pending.popleft()
            error = done.exception()
            if error is None:
                self.written[study] = done.result()
            else:
                reason = failure_reason(error, study)
                logger.error("Study %s failed: %s", study, reason)
                self.failures.append({"study": study, "reason": reason})
