# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Experiments: named runs over seeds and folds at an equal budget, as a plan of commands, and then their tables."""

from __future__ import annotations

import functools
import json
import logging
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import pandas as pd
from monai.bundle import ConfigParser
from monai.bundle.utils import merge_kv

from ..checked_settings import checked_settings, refuse_unknown
from ..contrasts import StudyError
from ..data.datalist import cross_validation_splits, find_studies, split_patients, write_whole
from .tables import Table

logger = logging.getLogger(__name__)

#: Endings of the ids that say where something lies, not what is computed.
_PLACES = ("_dir", "scripts_path", "_file", "bundle_root")
#: Ids that are not checked: another machine may run the plan, and the others are given by a step itself.
_UNCHECKED = ("device", "seed", "split_studies")
_BUDGET = ("max_epochs", "decay_start", "epoch_samples")


def make_splits(
    directory: str | Path,
    dataset_dir: str | Path,
    file_pattern: Mapping[str, str] | None = None,
    patient_pattern: str | None = None,
    folds: int | None = None,
    fractions: Sequence[float] = (0.7, 0.1, 0.2),
    split_file: str | Path | None = None,
    validation_fraction: float = 0.1,
    held_out: Sequence[str] = (),
    seed: int = 0,
) -> dict[str, dict[str, list[str]]]:
    """A split for each fold, each patient outside the untouched part being tested once: its studies by its file.

    Args:
        directory: of ``fold_<f>.json``, and of ``untouched.json``, a split with the untouched part as its test part for
            the one final run. Nothing is written to it here.
        dataset_dir, file_pattern, patient_pattern: see ``find_studies``.
        folds: of the cross-validation by patient, at least 2; None makes one split by ``fractions``.
        fractions: of training, validation and test patients where ``folds`` and ``split_file`` are None.
        split_file: the one split to use in the place of folds, as ``split_patients`` reads it.
        validation_fraction: see ``cross_validation_splits``.
        held_out: names of studies or patients that no fold contains, the untouched part, all studies of each patient.
        seed: of the splits.

    Raises:
        StudyError: if the studies cannot be split so.
    """
    directory = Path(directory).absolute()
    items = find_studies(Path(dataset_dir).expanduser(), file_pattern, patient_pattern)
    unknown = sorted(set(held_out) - {name for item in items for name in (item["study"], item["patient"])})
    if unknown:
        raise StudyError(
            f"The held-out part names {unknown[0]}, which is no study and no patient of the data set: correct or "
            "remove it."
        )
    untouched = {item["patient"] for item in items if {item["study"], item["patient"]} & set(held_out)}
    used = [item for item in items if item["patient"] not in untouched]
    if split_file is not None:
        splits = [split_patients(items, fractions, seed, str(Path(split_file).expanduser()))]
        shared = {item["patient"] for part in splits[0].values() for item in part} & untouched
        if shared:
            raise StudyError(f"{split_file} has {min(shared)} of held_out: give one of the two, or take it out of one.")
    elif folds is None:
        splits = [split_patients(used, fractions, seed)]
    else:
        splits = cross_validation_splits(used, folds, validation_fraction, seed)
    parts = {f"fold_{fold}": split for fold, split in enumerate(splits)}
    if untouched:
        final = split_patients(used, (1 - validation_fraction, validation_fraction, 0), seed)
        parts["untouched"] = final | {"test": [item for item in items if item["patient"] in untouched]}
    if not all(split["validation"] for split in parts.values()):
        raise StudyError(
            "A split has no study for the validation: give more than 0 as validation_fraction and in split_fractions, "
            "or name some in split_file."
        )
    return {
        str(directory / f"{name}.json"): {part: [item["study"] for item in chosen] for part, chosen in split.items()}
        for name, split in parts.items()
    }


@dataclass(frozen=True)
class Experiment:
    """One row of a table: what is laid over the common base."""

    configs: Sequence[str] = ()  #: names of configs below ``configs/`` without the suffix, as ``ablations/ccp``.
    overrides: Mapping[str, Any] = field(default_factory=dict)  #: of single ids.
    evaluation_overrides: Mapping[str, Any] = field(default_factory=dict)  #: of single ids in its evaluations alone.
    run_id: str = "training"  #: of its configs; another one makes weights of others without a training.
    share: float = 1.0  #: of the budget, above 0.
    #: for each id of its configs that takes other weights, ``pretrained_path`` for one, the experiment that makes them.
    uses: Mapping[str, str] = field(default_factory=dict)
    weights_of: str | None = None  #: experiment whose weights are evaluated; nothing is trained.
    evaluated: bool = True  #: False for what is only a step of another experiment.
    #: file of the weights in its folder by the id that takes its path, where it is not ``last_ckpt_path``.
    writes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """What is done with the weights of the experiments."""

    configs: Sequence[str]  #: overlays, as those of ``Experiment``.
    run_id: str  #: of the overlays.
    overrides: Mapping[str, Any] = field(default_factory=dict)  #: of single ids.
    #: for each id of the overlay that takes the file of other weights, the experiment that trains them.
    uses: Mapping[str, str] = field(default_factory=dict)
    only: Sequence[str] | None = None  #: experiments or sets for which it is done; None means all.


@dataclass(frozen=True, eq=False)
class Step:
    """Makes or evaluates the weights of one experiment, seed and fold; all of its files begin with ``path``."""

    path: Path  #: folder of the run and name of the step.
    run_id: str  #: of the config.
    config: Mapping[str, Any]  #: all settings of the step, written to ``<path>.json``.
    writes: Path  #: what it must leave behind.
    needs: Sequence[Path]  #: steps that must be finished before.

    def file(self, suffix: str) -> Path:
        """``json`` the settings, ``log`` what was printed, ``started`` and ``done`` empty, their times count."""
        return self.path.with_name(f"{self.path.name}.{suffix}")

    def command(self, bundle_root: Path) -> str:
        """Line for a shell, which is the same whoever runs it."""
        python = [sys.executable, "-m", "monai.bundle", "run", self.run_id, "--config_file", str(self.file("json"))]
        root, written = shlex.quote(str(bundle_root)), shlex.quote(str(self.writes))
        started, log, done = (shlex.quote(str(self.file(suffix))) for suffix in ("started", "log", "done"))
        run = f"{{ {shlex.join(python)} && ls {written}; }} > {log} 2>&1"
        return f"cd {root} && touch {started} && {run} && touch {done}"

    def other_setting(self) -> str | None:
        """An id that an earlier call set to another value, places aside; None where there is none."""
        if not self.file("json").is_file():
            return None
        before, now = _read(self.file("json")), json.loads(json.dumps(self.config))

        def value(config: Mapping[str, Any], key: str) -> Any:
            # of weights the experiment, seed, fold and file: the folder may have been moved
            return Path(str(config.get(key))).parts[-4:] if key.endswith("_path") else config.get(key)

        keys = sorted(key for key in {*before, *now} if not key.endswith(_PLACES))
        return next((key for key in keys if value(before, key) != value(now, key)), None)

    def is_finished(self) -> bool:
        """Whether it was done with these settings, after what it needs, and its file is still there."""
        done = self.file("done")
        if not (done.is_file() and self.writes.is_file() and self.other_setting() is None):
            return False
        needed = [path.with_name(f"{path.name}.done") for path in self.needs]
        return all(file.is_file() and file.stat().st_mtime <= done.stat().st_mtime for file in needed)

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file("done").unlink(missing_ok=True)
        self.file("json").write_text(json.dumps(self.config, indent=1) + "\n")

    def run(self, bundle_root: Path) -> str:
        """Runs the command; the reason of a failure, empty where there is none."""
        status = subprocess.run(self.command(bundle_root), shell=True).returncode
        if not status:
            return ""
        log = self.file("log")
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        return f"it ended with status {status} ({lines[-1] if lines else 'no output'}), see {log}"


@dataclass
class Experiments:
    """Plans experiments over seeds and folds, runs or prints the plan, and reports what is complete.

    Every experiment is trained and evaluated by ``python -m monai.bundle run`` in a process of its own, once for each
    seed and fold, in ``<output_dir>/<experiment>/seed_<s>/fold_<f>``. Its configs are the base, the common settings and
    its own, and above them the budget, which is the same for all. Finished steps are skipped; a failed step is named,
    and the others go on without it. All runs share one slice cache. The checkpoints of a finished training are removed.

    Raises:
        StudyError: for unknown names and settings that cannot be.
    """

    experiments: Mapping[str, Any]  #: definitions by name, see ``Experiment``.
    names: str | Sequence[str]  #: which to run; those that they need are added. A name of ``sets`` stands for its list.
    output_dir: str | Path  #: gets everything.
    dataset_dir: str | Path  #: folder of the studies.
    splits: Mapping[str, Mapping[str, Sequence[str]]]  #: see ``make_splits``; written before anything runs.
    #: see ``write_report``; called with ``runs``, ``reference``, ``panels``, ``notes`` and ``more_tables``.
    report: Callable[..., None]
    bundle_root: str | Path = "."  #: folder of ``configs`` and ``scripts``.
    sets: Mapping[str, Sequence[str]] = field(default_factory=dict)  #: lists of names.
    file_pattern: Mapping[str, str] | None = None  #: see ``find_studies``.
    patient_pattern: str | None = None  #: see ``find_studies``.
    base: Sequence[str] = ("train",)  #: configs under every training.
    evaluation_base: Sequence[str] = ("train",)  #: configs under every evaluation.
    #: of every experiment, where its own configs do not say otherwise.
    settings: Mapping[str, Any] = field(default_factory=dict)
    #: ``max_epochs``, ``decay_start`` and ``epoch_samples`` of every experiment, all three or none; an experiment's
    #: ``share`` multiplies the first two.
    budget: Mapping[str, Any] = field(default_factory=dict)
    #: wall time of a training instead of the end of its epochs; a training that was stopped before its end then starts
    #: anew.
    minutes: float | None = None
    #: of the training; every seed has the same splits. A mapping gives them by set or experiment; what is in several
    #: gets all of theirs, and what is needed those of what needs it.
    seeds: Sequence[int] | Mapping[str, Sequence[int]] = (0,)
    evaluations: Mapping[str, Any] = field(default_factory=dict)  #: by name, see ``Evaluation``.
    evaluate_with: Sequence[str] = ()  #: names of those that are done.
    weights: str = "last"  #: ``last`` or ``best`` (by the validation) are evaluated.
    #: experiment from which the report draws differences; where it is not complete, the first one.
    reference: str | None = None
    panels: Sequence[str] = ()  #: experiments whose images the report shows side by side, of the first seed and fold.
    dry_run: bool = False  #: print the plan and run nothing.

    def __post_init__(self) -> None:
        # the runs have another working directory
        self.output_dir, self.bundle_root = Path(self.output_dir).absolute(), Path(self.bundle_root).absolute()
        self.split_files = [file for file in self.splits if Path(file).stem != "untouched"]
        refuse_unknown("weights", [self.weights], ("last", "best"))
        refuse_unknown("evaluate_with", self.evaluate_with, list(self.evaluations))
        refuse_unknown("reference", [self.reference], [None, *self.experiments])
        refuse_unknown("panels", self.panels, list(self.experiments))
        self.experiments = {name: Experiment(**definition) for name, definition in self.experiments.items()}
        self.evaluations = {name: Evaluation(**self.evaluations[name]) for name in self.evaluate_with}
        self.names = self._with_needs(self._members([self.names] if isinstance(self.names, str) else self.names))
        self.seeds_of = self._seeds_by_name(self.seeds)

    # --------------------------------------------------------------------------------------------------------- plan
    def _members(self, entries: Sequence[str]) -> list[str]:
        """Names of experiments, where an entry may be a set."""
        return [name for entry in entries for name in self.sets.get(entry, [entry])]

    def _evaluations(self, name: str) -> dict[str, Evaluation]:
        """What is done with the weights of an experiment, by label."""
        chosen = self.evaluations.items() if self.experiments[name].evaluated else ()
        return {label: one for label, one in chosen if one.only is None or name in self._members(one.only)}

    def _needs(self, name: str) -> list[str]:
        """Experiments whose weights one needs."""
        one = self.experiments[name]
        used = [n for e in self._evaluations(name).values() for n in e.uses.values()]
        return [n for n in (*one.uses.values(), one.weights_of, *used) if n is not None]

    def _with_needs(self, names: Sequence[str]) -> list[str]:
        """The experiments and those that they need, each behind what it needs."""
        graph: dict[str, list[str]] = {}
        waiting = list(names)
        while waiting:
            name = waiting.pop(0)
            refuse_unknown("names", [name], [*self.sets, *self.experiments])
            graph[name] = self._needs(name)
            waiting += [needed for needed in graph[name] if needed not in graph]
        try:
            return list(TopologicalSorter(graph).static_order())
        except CycleError as error:
            chain = " and ".join(sorted(set(error.args[1])))
            raise StudyError(f"The experiments {chain} need each other: correct uses or weights_of.") from error

    def _seeds_by_name(self, seeds: Sequence[int] | Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
        """The seeds of every experiment that is run."""
        by_entry = seeds if isinstance(seeds, Mapping) else {name: seeds for name in self.names}
        found: dict[str, set[int]] = {name: set() for name in self.names}
        for entry, values in by_entry.items():
            for name in self._members([entry]):
                refuse_unknown("seeds", [name], [*self.experiments, *self.sets])
                found.setdefault(name, set()).update(values)
        for name in reversed(self.names):  # what is needed stands before what needs it
            for needed in self._needs(name):
                found[needed] |= found[name]
            if not found[name]:
                raise StudyError(f"seeds gives none for {name}: name it or a set that has it.")
        return {name: sorted(found[name]) for name in self.names}

    def _config(self, *layers: Mapping[str, Any] | Sequence[str]) -> ConfigParser:
        """Configs, given by their names, and overrides of single ids as one config, the later over the earlier.

        Raises:
            StudyError: for overrides that do not fit the configs, see ``checked_settings``.
        """
        parser, folder = ConfigParser(), Path(self.bundle_root) / "configs"
        # common settings may be of the trainings or of the evaluations alone
        below = dict.fromkeys(folder / f"{name}.json" for name in (*self.base, *self.evaluation_base))
        for layer in layers:
            if isinstance(layer, Mapping):
                places = str(self.output_dir)  # of a step itself
                given = {k: v for k, v in layer.items() if k not in _UNCHECKED and not str(v).startswith(places)}
                parts = [{**layer, **_checked(tuple(map(str, below)), json.dumps(given))}]
            else:
                files = [folder / f"{name}.json" for name in layer]
                below |= dict.fromkeys(files)
                parts = [_read(file) for file in files]
            for part in parts:
                for key, value in part.items():
                    merge_kv(parser, key, value)  # "+" adds to a list
        return parser

    def directory(self, name: str, seed: int, fold: int) -> Path:
        """Folder of one run."""
        return Path(self.output_dir) / name / f"seed_{seed}" / f"fold_{fold}"

    def _weights(self, name: str, seed: int, fold: int) -> tuple[Path, Path]:
        """The evaluated weights of one run and the step that makes them."""
        name = self.experiments[name].weights_of or name
        one, folder = self.experiments[name], self.directory(name, seed, fold)
        usual = "model.pt" if self.weights == "best" else "model_last.pt"
        return folder / next(iter(one.writes.values()), usual), folder / one.run_id

    def _common(self, fold: int, directory: Path) -> dict[str, Any]:
        """Where things lie, for every step of a fold."""
        places = {"bundle_root": str(self.bundle_root), "cache_dir": str(Path(self.output_dir) / "cache")}
        places["dataset_dir"] = str(Path(self.dataset_dir).expanduser().absolute())
        names = {"file_pattern": self.file_pattern, "patient_pattern": self.patient_pattern}
        return {**places, **names, "split_file": self.split_files[fold], "output_dir": str(directory)}

    def steps(self, name: str, seed: int, fold: int) -> list[Step]:
        """Everything that one run of an experiment (with a seed and a position in ``split_files``) does, in order."""
        one, folder = self.experiments[name], self.directory(name, seed, fold)
        common = {**self._common(fold, folder), "seed": seed, "split_studies": self.splits[self.split_files[fold]]}
        common |= one.overrides
        weights, making = self._weights(name, seed, fold)
        steps = []
        if one.weights_of is None:
            trains = one.run_id == "training"
            overrides = {**(self.budget if trains else {}), **common}
            for key in ("max_epochs", "decay_start"):
                if one.share != 1 and isinstance(overrides.get(key), int):
                    overrides[key] = max(1, round(one.share * overrides[key]))
            if trains:
                overrides |= {"ckpt_path": str(folder / "model.pt"), "last_ckpt_path": str(folder / "model_last.pt")}
            overrides |= {key: str(folder / file) for key, file in one.writes.items()}
            known = self._config(self.base, self.settings, one.configs).get()
            if unread := [key for key in (*one.uses, *one.writes) if key not in known]:
                raise StudyError(
                    f"No config of the experiment {name} has {unread[0]}, so the weights would not be used: correct "
                    "uses or writes, or name the config that reads it."
                )
            others = {key: self._weights(other, seed, fold) for key, other in one.uses.items()}
            overrides |= {key: str(file) for key, (file, _) in others.items()}
            if trains and self.minutes is not None:
                seconds = max(1, round(60 * one.share * self.minutes))
                limit = {"_target_": "scripts.training.trainer.TimeLimit", "limit_sec": seconds}
                overrides |= {"+train#handlers": [limit], "resume": False}
            config = self._config(self.base, self.settings, one.configs, overrides)
            steps.append(Step(making, one.run_id, config.get(), weights, [step for _, step in others.values()]))
        for label, evaluation in self._evaluations(name).items():
            used = {key: self._weights(other, seed, fold) for key, other in evaluation.uses.items()}
            overrides = {
                **evaluation.overrides,
                **one.evaluation_overrides,
                **common,
                "ckpt_path": str(weights),
                "report_dir": str(folder / label),
                **{key: str(file) for key, (file, _) in used.items()},
            }
            config = self._config(self.evaluation_base, self.settings, one.configs, evaluation.configs, overrides)
            needs = [making, *(step for _, step in used.values())]
            written = folder / label / "metrics.json"
            steps.append(Step(folder / label, evaluation.run_id, config.get(), written, needs))
        return steps

    def prepare(self) -> int:
        """Fills the slice cache, so that no two runs do the same work; the training slices of the smallest fold.

        Raises:
            StudyError: if a study cannot be used.
        """
        counts = []
        for fold in range(len(self.split_files)):
            directory = Path(self.output_dir) / "splits" / f"fold_{fold}"
            parser = self._config(self.base, self.settings, self._common(fold, directory))
            counts.append(len(parser.get_parsed_content("train#dataset")))
            cohort = parser.get_parsed_content("cohort")
            for part in ("validation", "test"):
                if cohort.parts[part]:
                    cohort.slices(part)
            if cohort.failures:
                raise StudyError(
                    f"{cohort.failures[0]['reason']} Without it the rows would not be of the same cohort: fix it, "
                    "or leave it out of dataset_dir or name it in held_out."
                )
        return min(counts)

    def _too_large(self, training_slices: int) -> dict[str, str]:
        """Experiments that ask for a larger bank than there are training slices, or need one, with the reason."""
        reasons = {}
        for name in self.names:
            one, folder = self.experiments[name], Path(self.bundle_root) / "configs"
            own = [*(_read(folder / f"{config}.json") for config in one.configs), one.overrides]
            sizes = [layer["bank_size"] for layer in own if "bank_size" in layer]
            if sizes and sizes[-1] > training_slices:
                reasons[name] = f"n/a: {training_slices} training slices cannot fill a bank of {sizes[-1]}"
            for needed in self._needs(name):  # which stands before
                if needed in reasons:
                    reasons[name] = reasons[needed]
        return reasons

    # ---------------------------------------------------------------------------------------------------------- run
    def run(self) -> None:
        """Runs everything that is not finished and writes the report of what is complete, or prints the plan.

        Raises:
            StudyError: if a step failed, or a training that was begun had other settings.
        """
        runs = [
            (name, seed, fold)
            for seed in sorted({seed for seeds in self.seeds_of.values() for seed in seeds})
            for fold in range(len(self.split_files))
            for name in self.names
            if seed in self.seeds_of[name]
        ]
        plan = {step: name for name, seed, fold in runs for step in self.steps(name, seed, fold)}
        if absent := [key for key in _BUDGET if self.budget and key not in self.budget]:
            raise StudyError(f"budget has no {absent[0]}: give all of {', '.join(_BUDGET)}.")
        for step in plan:
            other = step.other_setting()
            if step.run_id == "training" and step.file("log").is_file() and other is not None:
                raise StudyError(
                    f"{step.path.parent} was trained with another {other}: give another output_dir, or remove this "
                    "folder."
                )
        for file, split in self.splits.items():  # not before: what was refused changes nothing
            write_whole(file, split)
        notes = self._too_large(self.prepare())
        plan = {step: name for step, name in plan.items() if name not in notes}
        waiting = []
        for step in plan:  # what is needed stands before what needs it, and is not done once it waits
            if not step.is_finished():
                waiting.append(step)
                step.write()
        if self.dry_run:
            self._print(waiting)
            return
        failed: dict[Path, str] = {}
        for number, step in enumerate(waiting, start=1):
            lacking = [needed for needed in step.needs if needed in failed]
            logger.info("%d of %d: %s", number, len(waiting), step.path)
            reason = f"it needs {lacking[0]}, which was not completed" if lacking else step.run(Path(self.bundle_root))
            if reason:
                failed[step.path] = reason
                logger.error("%s failed: %s", step.path, reason)
        for step in plan:
            if step.run_id == "training" and step.path not in failed:
                for checkpoints in list(step.path.parent.rglob("checkpoints")):  # it needs its weights alone
                    shutil.rmtree(checkpoints)
        notes |= {name: "not complete" for step, name in plan.items() if step.path in failed}
        self._report(notes)
        if failed:
            path, reason = next(iter(failed.items()))
            raise StudyError(
                f"{len(failed)} of {len(plan)} steps failed, the others are complete; first {path}: {reason}; the same "
                "command tries them again."
            )

    def _print(self, waiting: Sequence[Step]) -> None:
        """Prints the plan, and writes what can run at the same time to ``plan_<n>.sh``, one line for each step."""
        levels: dict[Path, int] = {}
        for step in waiting:  # what is needed stands before what needs it
            levels[step.path] = 1 + max((levels.get(needed, 0) for needed in step.needs), default=0)
        for old in Path(self.output_dir).glob("plan_*.sh"):
            old.unlink()
        for level in sorted(set(levels.values())):
            commands = [step.command(Path(self.bundle_root)) for step in waiting if levels[step.path] == level]
            path = Path(self.output_dir) / f"plan_{level}.sh"
            path.write_text("\n".join(commands) + "\n")
            print(f"# {path}: {len(commands)} steps, in any order", *commands, sep="\n")

    # ------------------------------------------------------------------------------------------------------- report
    def times(self) -> list[Table]:
        """Wall time of every step, a mean over seeds and folds; empty where nothing was recorded."""
        rows = [
            {"row": name, "block": done.stem, "score": "minutes", "mean": minutes}
            for name in self.names
            for done in sorted((Path(self.output_dir) / name).glob("seed_*/fold_*/*.done"))
            if (minutes := (done.stat().st_mtime - done.with_suffix(".started").stat().st_mtime) / 60) >= 0
        ]
        if not rows:
            return []
        cells = pd.DataFrame(rows).groupby(["row", "block", "score"], sort=False, as_index=False)["mean"].mean()
        length = f"{self.minutes} minutes" if self.minutes else ", ".join(f"{k} {v}" for k, v in self.budget.items())
        length = length or "that of its config"
        settings = ", ".join(f"{key} {value}" for key, value in self.settings.items()) or "those of the base"
        caption = (
            "Wall time of one training or evaluation in a process of its own, a mean over seeds and folds; of a "
            "stopped training the time since its last start. "
            f"Budget of every training: {length}; common settings: {settings}."
        )
        cells = cells.sort_values("block", key=lambda column: column != "training", kind="stable")
        return [Table("times", "Times and budget", caption, cells)]

    def _report(self, notes: Mapping[str, str]) -> None:
        """The report of the experiments that are complete, the folds of a seed as one; none where none is."""
        folds = range(len(self.split_files))
        done = {name: list(self._evaluations(name)) for name in self.names if name not in notes}
        runs = {
            name: {s: [self.directory(name, s, f) / label for f in folds for label in done[name]] for s in seeds}
            for name, seeds in self.seeds_of.items()
            if done.get(name)
        }
        if runs:
            shown = {name: self.directory(name, self.seeds_of[name][0], 0) for name in self.panels if name in runs}
            self.report(
                runs=runs,
                reference=self.reference if self.reference in runs else None,
                panels={name: {"config_file": [str(f / f"{done[name][0]}.json")]} for name, f in shown.items()},
                notes=notes,
                more_tables=self.times(),
            )


@functools.cache
def _checked(files: tuple[str, ...], given: str) -> dict[str, Any]:
    """``checked_settings`` of JSON, which is the same for every seed and fold."""
    return checked_settings(files, json.loads(given))


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())
