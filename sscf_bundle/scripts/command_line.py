# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""What ``monai.bundle`` leaves to a bundle: settings that are checked, and errors of one sentence.

MONAI wraps every error in others. Each config calls ``start`` in its ``initialize``.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import logging
import sys
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any

import ignite.distributed as idist
from ignite.engine import Engine, Events
from monai.bundle import ConfigParser, ConfigWorkflow, create_workflow
from monai.bundle.utils import DEFAULT_EXP_MGMT_SETTINGS

from .checked_settings import TRUTH, checked_settings, unused_settings
from .contrasts import StudyError, find_study_error

logger = logging.getLogger(__name__)

_SCRIPTS = Path(__file__).resolve().parent


def start(output_dir: str | Path, debug: bool = False) -> None:
    """Checks what was given to ``create_workflow``, which ``monai.bundle run`` calls, and prepares for errors.

    ``run`` of the workflow raises a ``StudyError`` as it is. On the command line, an error becomes one sentence and the
    exit status 1; the traceback of one that nobody foresaw goes to ``traceback.log``. A setting without effect is named
    in the log, and so is one that does not exist where a workflow was built by its class. There only truth values are
    checked.

    Args:
        output_dir: folder of ``traceback.log``.
        debug: leave tracebacks as they are.

    Raises:
        StudyError: for an unknown id, or a value of another type than the config has.
    """
    main = getattr(sys.modules["__main__"], "__spec__", None)
    if not debug and main is not None and main.name == "monai.bundle.__main__":
        sys.excepthook = functools.partial(_print_error, Path(str(output_dir)) / "traceback.log")
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not create_workflow.__code__:
        frame = frame.f_back
    tracking: Any = DEFAULT_EXP_MGMT_SETTINGS
    monai_knows = {name for settings in tracking.values() for name in settings["configs"]}
    monai_knows |= {*inspect.signature(ConfigWorkflow.__init__).parameters, ConfigParser.meta_key} - {"self"}
    if frame is None:
        _check_settings_of_class(monai_knows)
        return
    workflow, files, given = (frame.f_locals[name] for name in ("workflow_", "config_file", "_args"))
    for name, value in checked_settings(files, given, monai_knows).items():
        workflow.parser[name] = value
    ids = [name.lstrip("+").replace("#", "::") for name in given if name not in monai_knows]
    known = [one for one in ids if one in workflow.parser]
    for name in unused_settings(workflow.parser, (workflow.init_id, workflow.run_id, workflow.final_id), known):
        logger.warning("%s changes nothing here: nothing that this run does refers to it.", name)
    _track(workflow.parser)
    workflow.run = functools.partial(_run, workflow)


def _check_settings_of_class(monai_knows: set[str]) -> None:
    """Takes texts for truth values in a workflow built by its class, and names in the log what nobody knows."""
    workflows = (call.frame.f_locals.get("self") for call in inspect.stack(0))
    workflow = next((one for one in workflows if isinstance(one, ConfigWorkflow)), None)
    if workflow is None:
        return
    files = sorted((_SCRIPTS.parent / "configs").rglob("*.json"))
    known: set[str] = set()
    for file in files:
        content = ConfigParser.load_config_file(file)
        known |= content.keys()
        truths = [name for name, value in content.items() if isinstance(value, bool) or name == "amp"]
        given = workflow.parser.get()
        texts = {name: given[name] for name in truths if isinstance(given.get(name), str)}
        for name, text in texts.items():
            if text.lower() in TRUTH:
                workflow.parser[name] = TRUTH[text.lower()]
            elif not text.startswith(("$", "@", "%")):
                raise StudyError(f"{name} must be True or False, got {text!r}.")
    for name in sorted(set(workflow.parser.get()) - known - monai_knows):
        (near,) = difflib.get_close_matches(name, known, n=1, cutoff=0)
        logger.warning("No config of this bundle has a setting %s: did you mean %s?", name, near)


def _track(parser: ConfigParser) -> None:
    """Fits the handlers that ``--tracking mlflow`` adds to the engines of this bundle."""
    training, validation = (
        [
            one
            for one in parser.get(f"{part}#handlers") or ()
            if isinstance(one, dict) and one.get("_target_") == "MLFlowHandler"
        ]
        for part in ("train", "validate")
    )
    for handler in training:  # MONAI's settings expect the output of a SupervisedTrainer
        handler["output_transform"] = "$lambda output: {'iteration_' + k: float(v) for k, v in output.items()}"
    if training and "evaluation::handlers" in parser:  # which MONAI does not know
        changes = {"artifacts": "@report_dir", "close_on_complete": True}
        parser["evaluation::handlers"].extend(handler | changes for handler in validation)
    if training:
        parser.ref_resolver.reset()


def _run(workflow: ConfigWorkflow) -> Any:
    """Runs a workflow, without the exceptions that MONAI wraps around a ``StudyError``.

    The config of a training, with all that was given, goes to ``config.json`` beside the checkpoints.
    """
    parser = workflow.parser
    try:
        if "trainer.run()" in str(parser.get(workflow.run_id)) and idist.get_rank() == 0:
            path = Path(parser.get_parsed_content("checkpoint#directory")) / "config.json"
            trainer = parser.get_parsed_content("train#trainer")
            # not before a checkpoint is there: a training that is refused changes nothing
            trainer.add_event_handler(Events.EPOCH_COMPLETED, _write_config, parser, path)
        return type(workflow).run(workflow)
    except Exception as error:
        known = find_study_error(error)
        if known is None:
            raise
        raise known from known.__cause__


def _write_config(engine: Engine, parser: ConfigParser, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    parser.export_config_file(parser.get(), path, indent=4, default=str)


def _print_error(path: Path, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """The ``sys.excepthook`` of the command line: one sentence on stderr."""
    if isinstance(error, KeyboardInterrupt):
        print("Interrupted: start the same command again to go on.", file=sys.stderr)
        sys.exit(130)
    if not isinstance(error, Exception):
        sys.__excepthook__(kind, error, trace)
        return
    root: BaseException = error
    while root.__cause__ is not None and not isinstance(root, StudyError):
        root = root.__cause__
    sentence = (str(root).strip().splitlines() or ["no message"])[-1]
    calls = traceback.extract_tb(root.__traceback__)
    # a ValueError of our own is a refusal too, and says what is wrong
    refused = isinstance(root, ValueError) and calls and _SCRIPTS in Path(calls[-1].filename).resolve().parents
    if not isinstance(root, StudyError) and not refused:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.writelines(traceback.format_exception(kind, error, trace))
        sentence = f"Unexpected {type(root).__name__}: {sentence.rstrip('.')}; {path} has the traceback."
    print(sentence, file=sys.stderr)
