# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Settings are checked, errors are one sentence, and the bundle works from any folder."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from builders import BUNDLE_ROOT, TINY_CHANNELS, bundle_workflow, config_files, run_bundle, run_python, tiny_run
from monai.bundle import ConfigParser, ConfigWorkflow

from scripts.checked_settings import checked_settings, refuse_unknown, unused_settings
from scripts.contrasts import StudyError, find_study_error
from scripts.networks.sscf import SSCFNet
from scripts.networks.weights import save_weights

PREPROCESSING = {"image_size": 48, "spacing": 2.0, "scaling": "brain"}


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    network = SSCFNet(channels=TINY_CHANNELS, bank_size=5)
    save_weights(tmp_path / "weights" / "model.pt", network, {"preprocessing": PREPROCESSING})
    return tmp_path / "weights" / "model.pt"


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("max_epoch", 3, "There is no setting max_epoch: did you mean max_epochs?"),
        ("train#dataloade#batch_size", 3, "did you mean"),
        ("max_epochs", "three", "max_epochs must be a whole number, got 'three'."),
        ("max_epochs", 2.5, "max_epochs must be a whole number"),
        ("batch_size", True, "batch_size must be a whole number"),
        ("learning_rate", "small", "learning_rate must be a number"),
        ("beta", 3, "beta must be a list"),
        ("compile", "perhaps", "compile must be True or False, got 'perhaps'."),
        ("device", "nonsense", "device must be cpu, cuda or cuda:<number>, got 'nonsense'."),
        ("device", "cuda:99", "There is no device cuda:99 here"),
        ("num_workers", -1, "num_workers must be at least 0, got -1."),
        ("num_workers", "two", "num_workers must be a whole number, got 'two'."),
        ("amp", "perhaps", "amp must be True or False, got 'perhaps'."),
        # what a config gives by an expression or a reference is known too
        ("quiet", 3, "quiet must be True or False, got 3."),
        ("discriminator_learning_rate", "small", "discriminator_learning_rate must be a number"),
        ("train#dataloader#batch_size", 0.5, "train#dataloader#batch_size must be a whole number"),
        ("max_epochs", None, "max_epochs must be a whole number, got None."),
        ("ctdl_entries", -1, "ctdl_entries must be at least 0, got -1."),
        ("run_id", "training", "There is no setting run_id"),  # unless it is known elsewhere
        ("batch_size", 0, "batch_size must be at least 1, got 0."),
        ("max_epochs", 0, "max_epochs must be at least 1, got 0."),
        ("learning_rate", -1.0, "learning_rate must be at least 0, got -1.0."),
        ("settings", 3, "settings must be a mapping"),
        # --name without a value is True to the command line
        ("output_dir", True, "output_dir needs a value, got True."),
        ("bank_samples", True, "bank_samples needs a value, got True."),
    ],
)
def test_wrong_setting_is_refused(name: str, value: object, words: str) -> None:
    with pytest.raises(StudyError) as raised:
        checked_settings(config_files("train"), {name: value})
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_epochs", 3),
        ("learning_rate", 1),
        ("channels", [4, 8, 8, 8, 8]),
        ("device", "cpu"),
        ("batch_size", "$2 * 2"),
        ("epoch_samples", 8),
        ("split_file", None),
        ("spacing", "$None"),
        ("image_size", 64),
        ("dataset_dir", {"_target_": "x"}),
        ("checkpoint#directory", "x"),
        ("loss::own_maps", False),  # an argument that the config does not give
        ("tracking_uri", "x"),  # of MONAI's tracking
        ("run_id", "training"),
        ("output_dir", "no"),  # a folder of this name
        ("output_dir", 2026),
        ("resample", True),
        ("train#handlers#5#disable", True),
    ],
)
def test_right_setting_is_taken_as_it_is(name: str, value: object) -> None:
    assert checked_settings(config_files("train"), {name: value}, ("tracking_uri", "run_id")) == {}


def test_holding_a_setting_against_an_object_builds_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where the phantoms of the demonstration would be made
    given = {"dataset_dir": "/data/own", "output_dir": "/data/out"}
    assert checked_settings(config_files("train", "demo_train"), given) == {}
    assert not list(tmp_path.iterdir())


def test_setting_that_does_not_exist_is_named_where_a_workflow_is_built_by_its_class(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = {"output_dir": str(tmp_path), "bundle_root": str(BUNDLE_ROOT)}
    workflow = ConfigWorkflow(
        config_files("inference"), workflow_type="inference", logging_file=False, overwrte=True, **paths
    )
    workflow.initialize()
    (told,) = [r.getMessage() for r in caplog.records if "No config of this bundle" in r.getMessage()]
    assert told == "No config of this bundle has a setting overwrte: did you mean overwrite?"


def test_text_is_a_truth_value_where_a_workflow_is_built_by_its_class(tmp_path: Path) -> None:
    def built(**settings: object) -> ConfigWorkflow:
        paths = {"output_dir": str(tmp_path), "bundle_root": str(BUNDLE_ROOT)}
        return ConfigWorkflow(
            config_files("inference"), workflow_type="inference", logging_file=False, **paths, **settings
        )

    workflow = built(page="no", amp="off", checks="yes", trust="$not True", register=False)
    workflow.initialize()
    found = [workflow.parser.get_parsed_content(name) for name in ("page", "amp", "checks", "trust", "register")]
    assert found == [False, False, True, False, False]
    with pytest.raises(RuntimeError) as raised:
        built(page="perhaps").initialize()
    assert str(find_study_error(raised.value)) == "page must be True or False, got 'perhaps'."


def test_setting_is_not_held_against_a_name_of_python() -> None:
    with pytest.raises(RuntimeError) as raised:
        bundle_workflow("inference", selff=1)
    assert "did you mean self" not in str(find_study_error(raised.value))


def test_type_of_a_setting_is_not_that_of_another_which_is_given() -> None:
    # by default val_slice_choice is slice_choice, a text
    assert checked_settings(config_files("train"), {"slice_choice": [70, 71], "val_slice_choice": "brain"}) == {}


def test_setting_may_be_of_any_type_that_one_of_the_configs_gives_it() -> None:
    files = config_files("train", "paper_literal")
    assert checked_settings(files, {"slice_choice": "brain"}) == {}
    assert checked_settings(files, {"slice_choice": [70, 71]}) == {}
    with pytest.raises(StudyError, match="slice_choice must be a list"):
        checked_settings(files, {"slice_choice": 3})


def test_text_that_a_config_below_gives_passes_where_the_overlay_counts(tmp_path: Path) -> None:
    files = [str(tmp_path / name) for name in ("below.json", "above.json")]
    for file, content in zip(files, ('{"size": "all"}', '{"size": 3}'), strict=True):
        Path(file).write_text(content)
    assert checked_settings(files, {"size": "none"}) == {}
    with pytest.raises(StudyError, match="size must be at least 0"):
        checked_settings(files, {"size": -1})


def test_text_counts_as_the_truth_value_that_it_says(tmp_path: Path, weights: Path) -> None:
    given = {"compile": "false", "resume": "no", "val_at_start": "True", "amp": "off"}
    expected = {"compile": False, "resume": False, "val_at_start": True, "amp": False}
    assert checked_settings(config_files("train"), given) == expected
    workflow = bundle_workflow("inference", ckpt_path=weights, output_dir=tmp_path, compile="false")
    assert workflow.inferer.compile is False  # type: ignore[attr-defined]


def unused(configs: tuple[str, ...], run: str) -> set[str]:
    parser = ConfigParser()
    parser.read_config(config_files(*configs))
    parser.resolve_macro_and_relative_ids()
    return set(unused_settings(parser, ("initialize", run, "finalize"), parser.get())) - {"_meta_"}


def test_settings_that_a_run_does_not_reach_are_known() -> None:
    assert unused(("train",), "training") == {"imports", "run"}  # training is a copy of run
    baseline, evaluating = unused(("train", "baselines/unet"), "training"), unused(("train", "evaluate"), "evaluating")
    assert {"companion", "retrieval"} <= baseline and not {"channels", "beta", "resume"} & baseline
    assert {"beta", "max_epochs"} <= evaluating and not {"channels", "protocols", "lpips_weights"} & evaluating


def test_part_of_what_a_run_reaches_counts_as_used() -> None:
    parser = ConfigParser({"run": "$@a#b", "a": {"b": {"c": 1}, "d": 2}, "ab": 3})
    names = ["a", "a::b", "a::b::c", "a::d", "ab", "run"]
    assert unused_settings(parser, ["run", "finalize"], names) == ["a::d", "ab"]


def test_setting_without_effect_is_named_in_the_log(
    tmp_path: Path, weights: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = {"ckpt_path": weights, "output_dir": tmp_path, "trust_slices": 3}
    bundle_workflow("inference", "export", run_id="exporting", **given)
    assert "trust_slices changes nothing here" in caplog.text and "ckpt_path changes" not in caplog.text
    caplog.clear()
    bundle_workflow("inference", **given, save_execute_config=False)  # which MONAI reads by itself
    assert "changes nothing" not in caplog.text


def test_unknown_choice_is_refused() -> None:
    refuse_unknown("protocols", ["volume"], ["per_slice", "volume"])
    with pytest.raises(StudyError, match="protocols has no per_slize: choose from per_slice, volume"):
        refuse_unknown("protocols", ["volume", "per_slize"], ["per_slice", "volume"])


def test_setting_whose_default_fails_is_held_against_what_is_given_or_named_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config, nowhere = tmp_path / "config.json", str(tmp_path / "nowhere")
    for default, other in ((nowhere, str(config)), (str(config), nowhere)):
        config.write_text(json.dumps({"path": default, "size": "$len(open(@path).read())"}))
        with pytest.raises(StudyError, match="size must be a whole number, got 'many'"):
            checked_settings(str(config), {"path": other, "size": "many"})
    assert not caplog.records
    config.write_text(json.dumps({"path": nowhere, "size": "$len(open(@path).read())"}))
    assert checked_settings(str(config), {"size": "many"}) == {}
    assert [r.getMessage() for r in caplog.records] == ["size is taken without a check: what the configs give fails."]


@pytest.mark.parametrize(
    ("configs", "name", "value", "words"),
    [
        (["train"], "resample", 3, "resample must be True, False or one of flair, t1, t1ce, t2, got 3."),
        (["train"], "slice_choice", 3, "or a list of slice numbers, got 3."),
        (["train"], "slice_choice", [1.5], r"or a list of slice numbers, got \[1.5\]."),
        (["train"], "file_pattern", 3, "must give a file name glob for each contrast by its key, got 3."),
        (["train"], "curriculum", "late", "a curriculum is pairs of an ascending last epoch"),
        (["train"], "best_by", 3, "best_by has no 3: choose from psnr, ssim, dice."),
        (["train"], "best_by", ["psnr"], r"best_by has no \['psnr'\]"),
        (["train"], "val_scenarios", 3, "scenarios has no 3: choose from FLAIR, "),
        (["train", "evaluate"], "evaluated_part", "tests", "evaluated_part has no tests: choose from training, "),
        (["train", "evaluate"], "evaluated_slices", "ALL", "evaluated_slices has no ALL: choose from all, largest"),
        (["train", "evaluate"], "brasyn_available", [4], "available has no 4: choose from 1, 2, 3."),
        (["train", "evaluate"], "reference_methods", ["x"], "no x: choose from mean_of_available, nearest_contrast, "),
    ],
)
def test_value_that_makes_no_sense_is_refused_where_it_is_used(
    configs: list[str], name: str, value: object, words: str, tmp_path: Path, phantom_cohort: Path
) -> None:
    overrides = tiny_run(phantom_cohort, tmp_path, slice_choice="brain", lpips=False) | {name: value}
    parser = ConfigParser()
    parser.read_config(config_files(*configs))
    parser.update({key: one for key, one in overrides.items() if key in parser})
    used = ("evaluation#datalist", "evaluation#scores") if "evaluate" in configs else ("train#trainer",)
    with pytest.raises(Exception) as raised:  # of MONAI, around ours
        for part in used:
            parser.get_parsed_content(part)
    root: BaseException = raised.value
    while root.__cause__ is not None:
        root = root.__cause__
    assert isinstance(root, ValueError) and re.search(words, str(root)), root


@pytest.mark.parametrize("name", ["naming", "output_dtype", "intensities"])
def test_list_is_no_choice_of_one(name: str, tmp_path: Path, weights: Path) -> None:
    value = {"naming": "bids", "output_dtype": "reference", "intensities": "study"}[name]
    workflow = bundle_workflow("inference", ckpt_path=weights, output_dir=tmp_path, flair=weights, **{name: [value]})
    with pytest.raises(StudyError, match=rf"{name} has no \['{value}'\]"):
        workflow.run()


def test_errors_are_exceptions_in_python(tmp_path: Path, weights: Path) -> None:
    with pytest.raises(RuntimeError) as raised:
        bundle_workflow("inference", sw_batchsize=3)
    assert "did you mean sw_batch_size" in str(find_study_error(raised.value))
    paths = {"ckpt_path": weights, "dataset_dir": tmp_path / "nowhere", "output_dir": tmp_path / "out"}
    with pytest.raises(StudyError, match="nowhere does not exist"):
        bundle_workflow("inference", **paths).run()


def test_mistake_on_the_command_line_is_one_sentence(tmp_path: Path, phantom_cohort: Path) -> None:
    # from an empty folder, without bundle_root
    settings = tiny_run(phantom_cohort, tmp_path / "out", channels="big")
    status, printed = run_bundle("training", config_files("train"), settings, tmp_path / "log.txt", cwd=tmp_path)
    assert status == 1 and "Traceback" not in printed
    assert printed.strip().splitlines()[-1].startswith("channels must be numbers or one of"), printed
    assert not (tmp_path / "out" / "traceback.log").exists()


def test_interruption_is_one_sentence(tmp_path: Path, weights: Path) -> None:
    overrides = {"output_dir": tmp_path / "out", "ckpt_path": weights, "flair": weights}
    overrides["writer"] = "$(_ for _ in ()).throw(KeyboardInterrupt)"
    status, printed = run_bundle("inference", config_files("inference"), overrides, tmp_path / "log.txt", cwd=tmp_path)
    assert status == 130 and "Traceback" not in printed
    assert printed.strip().splitlines()[-1] == "Interrupted: start the same command again to go on.", printed


def test_line_break_in_a_name_breaks_no_sentence() -> None:
    assert str(StudyError("Study a\nb\t\udc80 is damaged.")) == r"Study a\nb\t\udc80 is damaged."


def test_traceback_of_an_unexpected_error_is_in_a_file(tmp_path: Path, weights: Path) -> None:
    overrides = {"output_dir": tmp_path / "out", "ckpt_path": weights, "writer#outputdir": 3, "flair": weights}
    status, printed = run_bundle("inference", config_files("inference"), overrides, tmp_path / "log.txt", cwd=tmp_path)
    assert status == 1 and "Traceback" not in printed
    log = tmp_path / "out" / "traceback.log"
    assert "TypeError" in log.read_text() and "outputdir" in log.read_text()
    assert printed.strip().splitlines()[-1].startswith("Unexpected TypeError: "), printed
    status, printed = run_bundle(
        "inference", config_files("inference"), overrides | {"debug": True}, tmp_path / "log.txt", cwd=tmp_path
    )
    assert status == 1 and "Traceback" in printed and "TypeError" in printed


def test_parts_and_exports_are_had_from_any_folder_without_a_run(tmp_path: Path, weights: Path) -> None:
    config = config_files("inference")[0]
    script = tmp_path / "script.py"
    common = f"config_file={config!r}, ckpt_path={str(weights)!r}"
    script.write_text(
        "from monai.bundle import ckpt_export, create_workflow\n"
        "import sys\n"
        "if sys.argv[1] == 'export':\n"
        f"    ckpt_export(bundle_root={str(BUNDLE_ROOT)!r}, ckpt_file={str(weights)!r}, "
        f"filepath='model.ts', {common})\n"
        "else:\n"
        f"    made = create_workflow(workflow_type='inference', logging_file=False, {common})\n"
        "    print(type(made.network_def).__name__, type(made.preprocessing.transforms[0]).__name__)\n"
    )
    status, printed = run_python([str(script), "parts"], tmp_path / "log.txt", cwd=tmp_path)
    assert status == 0 and "SSCFNet FindStudyd" in printed, printed
    status, printed = run_python([str(script), "export"], tmp_path / "log.txt", cwd=tmp_path)
    assert status == 0, printed
    exported, saved = torch.jit.load(str(tmp_path / "model.ts")).state_dict(), torch.load(weights)
    assert exported.keys() == saved.keys() and all(torch.equal(exported[name], saved[name]) for name in saved)
