# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.


"""Experiments: named runs over seeds and folds at an equal budget, each in a process of its own, then their tables."""

from __future__ import annotations

import functools
import itertools
import json
import logging
import os
import queue
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from monai.bundle import ConfigParser
from monai.bundle.utils import merge_kv
from tqdm import tqdm

from ..contrasts import StudyError, exit_on_user_error
from ..data.datalist import cross_validation_splits, find_studies, split_patients, write_split
from .figures import runs_panel
from .report import PANEL_CAPTION, write_page
from .tables import Runs, Table, read_runs, standard_tables, write_tables

logger = logging.getLogger(__name__)

#: Endings of the ids that say where something lies, not what is computed.
_PLACES = ("_dir", "_path", "_file", "bundle_root")


@dataclass(frozen=True)
class Experiment:
    """One row of a table: what is laid over the common base.

    Args:
        configs: names of configs below ``configs/`` without the suffix, as ``ablations/ccp``.
        overrides: of single ids.
        evaluation_overrides: of single ids in its evaluations alone.
        share: of the budget, above 0.
        after: experiment whose weights this one starts from (its configs read ``pretrained_path``).
        weights_of: experiment whose weights are evaluated; nothing is trained.
        evaluated: False for what is only a step of another experiment.
        writes: file of the weights in its folder by the id that takes its path, where it is not ``last_ckpt_path``.
    """

    configs: Sequence[str] = ()
    overrides: Mapping[str, Any] = field(default_factory=dict)
    evaluation_overrides: Mapping[str, Any] = field(default_factory=dict)
    share: float = 1.0
    after: str | None = None
    weights_of: str | None = None
    evaluated: bool = True
    writes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """What is done with the weights of the experiments.

    Args:
        configs: overlays, as those of ``Experiment``.
        run_id: of the overlay.
        overrides: of single ids.
        uses: for each id of the overlay that takes the file of other weights, the experiment that trains them.
        only: experiments or sets for which it is done; None means all.
    """

    configs: Sequence[str]
    run_id: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    uses: Mapping[str, str] = field(default_factory=dict)
    only: Sequence[str] | None = None


class Experiments:
    """Runs experiments over seeds and folds and writes their tables.

    Every experiment is trained and evaluated by ``python -m monai.bundle run`` in a process of its own, once for each
    seed and fold, in ``<output_dir>/<experiment>/seed_<s>/fold_<f>``. Its configs are the base, the common settings and
    its own, and above them the budget, which is the same for all. Calling it again skips what is finished and goes on
    with what was stopped; a failed run is named, and the others go on without it. All runs share one slice cache. Each
    patient outside the untouched part is tested once for each seed. The checkpoints of a finished training are removed.

    Args:
        experiments: definitions by name, see ``Experiment``.
        names: which to run; those that they need are added. A name of ``sets`` stands for its list.
        output_dir: gets everything.
        bundle_root: folder of ``configs`` and ``scripts``.
        sets: lists of names.
        dataset_dir: folder of the studies; None takes that of the base configs.
        base: configs under every experiment.
        settings: of every experiment, where its own configs do not say otherwise.
        budget: ``max_epochs``, ``decay_start`` and ``epoch_samples`` of every experiment; an experiment's ``share``
            multiplies the first two.
        minutes: wall time of a training instead of the end of its epochs; a training that was stopped before its end
            then starts anew.
        seeds: of the training; every seed has the same splits. A mapping gives them by set or experiment; what is in
            several gets all of theirs, and what is needed those of what needs it.
        folds: of the cross-validation by patient, at least 2; None makes one split by ``fractions``.
        fractions: of training, validation and test patients where ``folds`` and ``split_file`` are None.
        split_file: the one split to use in the place of folds, as ``split_patients`` reads it.
        validation_fraction: see ``cross_validation_splits``.
        held_out: names of studies or patients that no fold contains. ``untouched.json`` is a split with them as its
            test part, for the one final run.
        split_seed: of folds or split.
        file_pattern: see ``find_studies``.
        patient_pattern: see ``find_studies``.
        evaluations: by name, see ``Evaluation``.
        evaluate_with: names of those that are done.
        weights: ``last`` or ``best`` (by the validation) are evaluated.
        tables: see ``standard_tables``.
        paper_values: JSON file with the values of the paper.
        reference: experiment from which the page draws differences.
        draws: of every bootstrap over patients.
        panels: experiments whose images the page shows side by side, of the first seed and fold.
        jobs: runs at the same time.
        threads: of each run on the CPU.
        devices: values of CUDA_VISIBLE_DEVICES, one for each job in turn; None leaves it alone.

    Raises:
        SystemExit: with one sentence, for unknown names and settings that cannot be.
    """

    def __init__(
        self,
        experiments: Mapping[str, Mapping[str, Any]],
        names: str | Sequence[str],
        output_dir: str | Path,
        bundle_root: str | Path = ".",
        sets: Mapping[str, Sequence[str]] | None = None,
        dataset_dir: str | None = None,
        base: Sequence[str] = ("train",),
        settings: Mapping[str, Any] | None = None,
        budget: Mapping[str, Any] | None = None,
        minutes: float | None = None,
        seeds: Sequence[int] | Mapping[str, Sequence[int]] = (0,),
        folds: int | None = None,
        fractions: Sequence[float] = (0.7, 0.1, 0.2),
        split_file: str | Path | None = None,
        validation_fraction: float = 0.1,
        held_out: Sequence[str] = (),
        split_seed: int = 0,
        file_pattern: Mapping[str, str] | None = None,
        patient_pattern: str | None = None,
        evaluations: Mapping[str, Mapping[str, Any]] | None = None,
        evaluate_with: Sequence[str] = (),
        weights: str = "last",
        tables: Mapping[str, Mapping[str, Any]] | None = None,
        paper_values: str | Path | None = None,
        reference: str | None = None,
        draws: int = 2000,
        panels: Sequence[str] = (),
        jobs: int = 1,
        threads: int = 1,
        devices: Sequence[str | int] | None = None,
    ) -> None:
        if weights not in ("last", "best"):
            raise SystemExit(f"weights must be last or best, got {weights!r}.")
        self.experiments = {name: Experiment(**definition) for name, definition in experiments.items()}
        unknown = sorted(set(evaluate_with) - set(evaluations or {}))
        if unknown:
            raise SystemExit(f"There is no evaluation {unknown[0]}: choose from {', '.join(evaluations or {})}.")
        self.evaluations = {name: Evaluation(**(evaluations or {})[name]) for name in evaluate_with}
        self.sets = dict(sets or {})
        self.names = self._with_needs(self._members([names] if isinstance(names, str) else names))
        self.seeds = self._seeds_by_name(seeds)
        # the runs have another working directory
        self.output_dir, self.bundle_root = Path(output_dir).absolute(), Path(bundle_root).absolute()
        self.base, self.settings, self.budget = list(base), dict(settings or {}), dict(budget or {})
        self.minutes, self.folds, self.fractions, self.split_file = minutes, folds, fractions, split_file
        self.validation_fraction, self.held_out, self.split_seed = validation_fraction, list(held_out), split_seed
        self.file_pattern, self.patient_pattern, self.weights = file_pattern, patient_pattern, weights
        self.table_definitions, self.paper_values = dict(tables or {}), paper_values
        self.reference, self.draws, self.panels = reference, draws, list(panels)
        self.jobs, self.threads, self.devices = jobs, threads, devices
        if dataset_dir is None:
            parser = self._parser(self.base, {"output_dir": str(self.output_dir)})
            dataset_dir = parser.get_parsed_content("dataset_dir")
        self.dataset_dir = Path(dataset_dir).expanduser().absolute()

    # --------------------------------------------------------------------------------------------------------- plan
    def _members(self, entries: Sequence[str]) -> list[str]:
        """Names of experiments, where an entry may be a set."""
        return [name for entry in entries for name in self.sets.get(entry, [entry])]

    def _seeds_by_name(self, seeds: Sequence[int] | Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
        """The seeds of every experiment that is run."""
        if not isinstance(seeds, Mapping):
            return {name: list(seeds) for name in self.names}
        found: dict[str, set[int]] = {name: set() for name in self.names}
        for entry, values in seeds.items():
            for name in self._members([entry]):
                if name not in self.experiments:
                    raise SystemExit(f"seeds names {name}, which is no set and no experiment: correct or remove it.")
                if name in found:
                    found[name] |= set(values)
        for name in reversed(self.names):  # what is needed stands before what needs it
            for needed in self._needs(name):
                found[needed] |= found[name]
        lacking = [name for name, values in found.items() if not values]
        if lacking:
            raise SystemExit(f"seeds gives none for {lacking[0]}: name it or a set that has it.")
        return {name: sorted(values) for name, values in found.items()}

    def _evaluations(self, name: str) -> dict[str, Evaluation]:
        """What is done with the weights of an experiment, by label."""
        if not self.experiments[name].evaluated:
            return {}
        return {
            label: evaluation
            for label, evaluation in self.evaluations.items()
            if evaluation.only is None or name in self._members(evaluation.only)
        }

    def _with_needs(self, names: Sequence[str]) -> list[str]:
        """The experiments and those that they need, each behind what it needs."""
        ordered: list[str] = []

        def add(name: str, chain: tuple[str, ...] = ()) -> None:
            if name not in self.experiments:
                raise SystemExit(f"There is no experiment {name}: choose from {', '.join(self.experiments)}.")
            if name in chain:
                raise SystemExit(f"The experiments {' and '.join(chain)} need each other: correct after or weights_of.")
            for needed in self._needs(name):
                add(needed, (*chain, name))
            if name not in ordered:
                ordered.append(name)

        for name in names:
            add(name)
        return ordered

    def _needs(self, name: str) -> list[str]:
        """Experiments whose weights one needs."""
        one = self.experiments[name]
        used = [n for e in self._evaluations(name).values() for n in e.uses.values()]
        return list(dict.fromkeys(n for n in (one.after, one.weights_of, *used) if n is not None))

    def _files(self, configs: Sequence[str]) -> list[str]:
        """Paths of configs by their names; a path stays as it is."""
        folder = self.bundle_root / "configs"
        return [name if name.endswith(".json") else str(folder / f"{name}.json") for name in configs]

    def _parser(self, configs: Sequence[str], overrides: Mapping[str, Any]) -> ConfigParser:
        """The configs, one over the other, with overrides."""
        parser = ConfigParser()
        parser.read_config(self._files(configs))
        for key, value in overrides.items():
            merge_kv(parser, key, value)  # as a config file is read: "+" adds to a list
        return parser

    def _settings_file(self) -> str:
        """Overlay of the common settings, above the base and below the configs of an experiment."""
        path = self.output_dir / "settings.json"
        text = json.dumps(self.settings, indent=1) + "\n"
        # written once: jobs read it at the same time
        if not path.is_file() or path.read_text() != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return str(path)

    def directory(self, name: str, seed: int, fold: int) -> Path:
        """Folder of one run."""
        return self.output_dir / name / f"seed_{seed}" / f"fold_{fold}"

    def weights_file(self, name: str, seed: int, fold: int) -> Path:
        """The evaluated weights of one run."""
        name = self.experiments[name].weights_of or name
        usual = "model.pt" if self.weights == "best" else "model_last.pt"
        return self.directory(name, seed, fold) / next(iter(self.experiments[name].writes.values()), usual)

    def split_files(self) -> list[Path]:
        """Writes the splits and returns their files, one for each fold.

        Raises:
            SystemExit: with one sentence, if the studies cannot be split so.
        """
        items = exit_on_user_error(
            functools.partial(find_studies, self.dataset_dir, self.file_pattern, self.patient_pattern)
        )
        folder = self.output_dir / "splits"
        untouched = {i["patient"] for i in items if {i["study"], i["patient"]} & set(self.held_out)}
        used = [item for item in items if item["patient"] not in untouched]
        if self.split_file is not None:
            path = str(Path(self.split_file).expanduser())
            splits = [
                exit_on_user_error(functools.partial(split_patients, items, self.fractions, self.split_seed, path))
            ]
        elif self.folds is None:
            splits = [exit_on_user_error(functools.partial(split_patients, used, self.fractions, self.split_seed))]
        else:
            options = (self.folds, self.validation_fraction, self.held_out, self.split_seed)
            splits = exit_on_user_error(functools.partial(cross_validation_splits, items, *options))
        if untouched:
            share = self.validation_fraction
            final = split_patients(used, (1 - share, share, 0), self.split_seed)
            write_split(
                final | {"test": [item for item in items if item["patient"] in untouched]}, folder / "untouched.json"
            )
        files = []
        for fold, split in enumerate(splits):
            files.append(folder / f"fold_{fold}.json")
            write_split(split, files[-1])
        return files

    def _common(self, split_file: Path) -> dict[str, Any]:
        """Where things lie, for every run of a fold."""
        return {
            "bundle_root": str(self.bundle_root),
            "dataset_dir": str(self.dataset_dir),
            "cache_dir": str(self.output_dir / "cache"),
            "split_file": str(split_file),
            "file_pattern": self.file_pattern,
            "patient_pattern": self.patient_pattern,
        }

    def prepare(self, split_files: Sequence[Path]) -> int:
        """Fills the slice cache, so that no two runs do the same work.

        Returns:
            The number of training slices of the smallest fold.

        Raises:
            SystemExit: with one sentence, if a study cannot be used.
        """
        counts = []
        for fold, split_file in enumerate(split_files):
            places = {"output_dir": str(self.output_dir / "splits" / f"fold_{fold}")}
            parser = self._parser([*self.base, self._settings_file()], self._common(split_file) | places)
            counts.append(len(parser.get_parsed_content("train#dataset")))
            cohort = parser.get_parsed_content("cohort")
            for part in ("validation", "test"):
                if cohort.parts[part]:
                    cohort.slices(part)
            if cohort.failures:
                raise SystemExit(
                    f"{cohort.failures[0]['reason']} Without it the rows would not be of the same cohort: mend it, "
                    "or leave it out of dataset_dir or name it in held_out."
                )
        return min(counts)

    def too_large(self, training_slices: int) -> dict[str, str]:
        """Experiments that ask for a larger bank than there are training slices, with the reason."""
        reasons = {}
        for name in self.names:
            one = self.experiments[name]
            own = [*(json.loads(Path(file).read_text()) for file in self._files(one.configs)), one.overrides]
            size = next((config["bank_size"] for config in reversed(own) if "bank_size" in config), None)
            if isinstance(size, int) and size > training_slices:
                reasons[name] = f"n/a: {training_slices} training slices cannot fill a bank of {size}"
        return reasons

    # ---------------------------------------------------------------------------------------------------------- run
    def run(self) -> None:
        """Runs everything and writes ``tables`` and ``index.html`` of what is complete.

        Raises:
            SystemExit: with one sentence, if a run failed.
        """
        split_files = self.split_files()
        notes = self.too_large(self.prepare(split_files))
        tasks = [
            (name, seed, fold)
            for seed in sorted({seed for seeds in self.seeds.values() for seed in seeds})
            for fold in range(len(split_files))
            for name in self.names
            if name not in notes and seed in self.seeds[name]
        ]
        self._refuse_other_settings(tasks, split_files)
        devices: queue.Queue[str | int | None] = queue.Queue()
        for job in range(self.jobs):
            devices.put(self.devices[job % len(self.devices)] if self.devices else None)
        futures: dict[tuple[str, int, int], Future[str]] = {}

        def work(name: str, seed: int, fold: int) -> str:
            """Reason of the failure, empty where there is none."""
            for needed in self._needs(name):
                before = futures.get((needed, seed, fold))
                # what is needed stands before it in the queue, so that this wait ends
                if before is None or before.result():
                    return f"it needs {needed}, which was not completed"
            device = devices.get()
            try:
                return self._run_one(name, seed, fold, split_files[fold], device)
            finally:
                devices.put(device)

        failed: dict[tuple[str, int, int], str] = {}
        with ThreadPoolExecutor(self.jobs) as executor:
            try:
                for task in tasks:
                    futures[task] = executor.submit(work, *task)
                names = {future: task for task, future in futures.items()}
                bar = tqdm(as_completed(names), "experiments", len(tasks), unit="run")
                for future in bar:
                    if future.result():
                        task = names[future]
                        failed[task] = future.result()
                        bar.set_postfix(failed=len(failed))
                        logger.error("%s, seed %d, fold %d failed: %s", *task, failed[task])
            except BaseException:
                executor.shutdown(cancel_futures=True)
                raise
        incomplete = {name for name, _, _ in failed}
        notes |= {name: "not complete" for name in incomplete}
        self.report(len(split_files), notes)
        if failed:
            (name, seed, fold), reason = next(iter(failed.items()))
            raise SystemExit(
                f"{len(failed)} of {len(tasks)} runs failed, the others are complete; first {name} (seed {seed}, fold "
                f"{fold}): {reason}; the same command tries them again."
            )

    def _step(
        self, step: str, configs: Sequence[str], overrides: Mapping[str, Any], split_file: Path
    ) -> tuple[list[str], dict[str, Any], dict[str, Any]]:
        """Config files, overrides and what tells whether a finished step was the same one."""
        parser = self._parser(configs, overrides)
        told = {key: value for key, value in parser.get().items() if not key.endswith(_PLACES)}
        told["split"] = json.loads(split_file.read_text())
        return self._files(configs), dict(overrides), json.loads(json.dumps(told))

    def _steps(self, name: str, seed: int, fold: int, split_file: Path) -> dict[str, tuple]:
        """Run id and ``_step`` of everything that one run does."""
        one, folder = self.experiments[name], self.directory(name, seed, fold)
        common = self._common(split_file) | {"seed": seed, "output_dir": str(folder), **one.overrides}
        base = [*self.base, self._settings_file()]
        steps: dict[str, tuple] = {}
        if one.weights_of is None:
            overrides: dict[str, Any] = {**self.budget, **common}
            for key in ("max_epochs", "decay_start"):
                if one.share != 1 and isinstance(overrides.get(key), int):
                    overrides[key] = max(1, round(one.share * overrides[key]))
            overrides |= {
                "ckpt_path": str(folder / "model.pt"),
                "last_ckpt_path": str(folder / "model_last.pt"),
                **{key: str(folder / file) for key, file in one.writes.items()},
            }
            if one.after is not None:
                overrides["pretrained_path"] = str(self.weights_file(one.after, seed, fold))
            if self.minutes is not None:
                limit = {"_target_": "scripts.training.stages.TimeLimit", "minutes": one.share * self.minutes}
                overrides |= {"+train#handlers": [limit], "resume": False}
            configs = [*base, *one.configs]
            steps["training"] = ("training", self._step("training", configs, overrides, split_file))
        for label, evaluation in self._evaluations(name).items():
            overrides = {
                **evaluation.overrides,
                **one.evaluation_overrides,
                **common,
                "ckpt_path": str(self.weights_file(name, seed, fold)),
                "report_dir": str(folder / label),
                **{key: str(self.weights_file(used, seed, fold)) for key, used in evaluation.uses.items()},
            }
            configs = [*base, *one.configs, *evaluation.configs]
            steps[label] = (evaluation.run_id, self._step(label, configs, overrides, split_file))
        return steps

    def _refuse_other_settings(self, tasks: Sequence[tuple[str, int, int]], split_files: Sequence[Path]) -> None:
        """Raises: SystemExit: if a training that was begun here had other settings."""
        for name, seed, fold in tasks:
            steps = self._steps(name, seed, fold, split_files[fold])
            path = self.directory(name, seed, fold) / "training.told.json"
            if "training" in steps and path.is_file():
                before, now = json.loads(path.read_text()), steps["training"][1][2]
                if before != now:
                    key = next(k for k in sorted({*before, *now}) if before.get(k) != now.get(k))
                    raise SystemExit(
                        f"{path.parent} was trained with another {key}: give another output_dir, or remove this folder."
                    )

    def _run_one(self, name: str, seed: int, fold: int, split_file: Path, device: str | int | None) -> str:
        """Does the steps of one run that are not finished; returns the reason of a failure."""
        folder = self.directory(name, seed, fold)
        folder.mkdir(parents=True, exist_ok=True)
        for step, (run_id, (files, overrides, told)) in self._steps(name, seed, fold, split_file).items():
            done, told_file = folder / f"{step}.done", folder / f"{step}.told.json"
            if done.is_file() and told_file.is_file() and json.loads(told_file.read_text()) == told:
                continue
            done.unlink(missing_ok=True)
            told_file.write_text(json.dumps(told, indent=1) + "\n")
            overlay, log = folder / f"{step}.json", folder / f"{step}.log"
            overlay.write_text(json.dumps(overrides, indent=1) + "\n")
            command = [sys.executable, "-m", "monai.bundle", "run", run_id, f"--config_file={[*files, str(overlay)]}"]
            started = time.monotonic()
            status = self.execute(command, log, device)
            if status:
                lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
                return f"{step} ended with status {status} ({lines[-1].strip() if lines else 'no output'}), see {log}"
            weights = self.weights_file(name, seed, fold)
            if step == "training" and not weights.is_file():
                return f"the training ended without writing {weights.name}, see {log}"
            done.write_text(json.dumps({"seconds": round(time.monotonic() - started, 1)}) + "\n")
            if step == "training":
                for checkpoints in list(folder.rglob("checkpoints")):  # a finished run needs its weights alone
                    shutil.rmtree(checkpoints)
        return ""

    def execute(self, command: Sequence[str], log: Path, device: str | int | None) -> int:
        """Runs a command in the bundle's folder, what it prints into a file; returns its exit status."""
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads), "OMP_WAIT_POLICY": "PASSIVE"}
        if device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = str(device)
        with log.open("w") as file:
            return subprocess.run(command, cwd=self.bundle_root, env=environment, stdout=file, stderr=file).returncode

    # ------------------------------------------------------------------------------------------------------- tables
    def runs(self, folds: int, notes: Mapping[str, str]) -> Runs | None:
        """Scores of the complete experiments, the folds of a seed as one; None where there are none."""
        folders = {
            name: {
                seed: [self.directory(name, seed, fold) / label for fold in range(folds) for label in done]
                for seed in self.seeds[name]
            }
            for name in self.names
            if name not in notes and (done := self._evaluations(name))
        }
        return read_runs(folders, self.draws) if folders else None

    def _panel(self, complete: Sequence[str]) -> dict[str, Figure]:
        """Images of the first seed and fold by their caption; empty where none is wanted."""
        shown = {}
        for name in (name for name in self.panels if name in complete):
            folder = self.directory(name, self.seeds[name][0], 0)
            overlays = [
                self._settings_file(),
                *self.experiments[name].configs,
                str(folder / f"{next(iter(self._evaluations(name)))}.json"),
            ]
            shown[name] = {"config_file": self._files([*self.base, *overlays])}
        return {PANEL_CAPTION: runs_panel(shown)} if shown else {}

    def times(self, folds: int) -> Table | None:
        """Wall time of every step, a mean over seeds and folds; None where nothing was recorded."""
        rows = []
        for name in self.names:
            seconds: dict[str, list[float]] = {}
            for seed, fold in itertools.product(self.seeds[name], range(folds)):
                for done in sorted(self.directory(name, seed, fold).glob("*.done")):
                    if text := done.read_text():  # empty, where an earlier version of the bundle wrote it
                        seconds.setdefault(done.stem, []).append(json.loads(text)["seconds"])
            rows += [
                {"row": name, "block": step, "score": "minutes", "mean": statistics.fmean(values) / 60}
                for step, values in seconds.items()
            ]
        if not rows:
            return None
        length = f"{self.minutes} minutes" if self.minutes else ", ".join(f"{k} {v}" for k, v in self.budget.items())
        caption = (
            f"Wall time of one training or evaluation in a process of its own with {self.threads} CPU threads, up to "
            f"{self.jobs} at a time, a mean over seeds and folds; of a stopped training the time since its last start. "
            f"Budget of every training: {length}; common settings: "
            f"{', '.join(f'{key} {value}' for key, value in self.settings.items()) or 'those of the base'}."
        )
        cells = pd.DataFrame(rows).sort_values("block", key=lambda c: c != "training", kind="stable")
        return Table("times", "Times and budget", caption, cells)

    def report(self, folds: int, notes: Mapping[str, str]) -> None:
        """Writes ``tables`` (CSV, Markdown, LaTeX) and ``index.html``."""
        try:
            runs = self.runs(folds, notes)
        except StudyError as error:
            raise SystemExit(str(error)) from error
        if runs is None:
            return
        tables = standard_tables(runs, self.table_definitions, self.paper_values, notes)
        times = self.times(folds)
        tables += [] if times is None else [times]
        write_tables(tables, self.output_dir / "tables")
        write_page(runs, tables, self.output_dir / "index.html", self.reference, self._panel(runs.names))
        logger.info("wrote %s and %s", self.output_dir / "tables", self.output_dir / "index.html")
