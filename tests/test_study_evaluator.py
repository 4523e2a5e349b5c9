# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""The engine of inference: failures, threads, interruptions."""

from __future__ import annotations

import json
import os
import threading
import time

import pytest
import torch
from builders import tiny_net
from studies import CopyNet, evaluate, fill_with, hidden, results, write_study

from scripts.contrasts import StudyError
from scripts.inference.preprocessing import list_studies
from scripts.inference.synthesize import synthesize_study
from scripts.inference.writer import StudyWriter


def truncated(folder):
    path = folder / "BAD_t1.nii.gz"
    path.write_bytes(path.read_bytes()[:200])


def mask_only(folder):
    (folder / "BAD_t1.nii.gz").rename(folder / "BAD_seg.nii.gz")


BAD = {"truncated": (truncated, "cannot be read"), "no contrast": (mask_only, "no contrast")}


@pytest.mark.parametrize("kind", BAD)
def test_one_bad_study_never_stops_the_others(tmp_path, kind, caplog):
    spoil, words = BAD[kind]
    for name in ("BAD", "GOOD"):
        write_study(tmp_path / "in" / name, ["t1"], name)
    spoil(tmp_path / "in" / "BAD")
    (tmp_path / "in" / "GOOD" / "GOOD_seg.nii.gz").write_bytes(b"damaged")  # a mask on file is not needed
    evaluator = evaluate(list_studies(tmp_path / "in"), tmp_path / "out")
    with pytest.raises(StudyError, match=r"^1 of 2 studies failed: BAD; .*failures.json gives the reasons\.$"):
        evaluator.run()
    assert list(evaluator.written) == ["GOOD"] and evaluator.written["GOOD"]["t2"].is_file()
    assert sorted(os.listdir(tmp_path / "out")) == ["GOOD", "failures.json"]
    (failure,) = json.loads((tmp_path / "out" / "failures.json").read_text())
    assert failure["study"] == "BAD" and words in failure["reason"] and "\n" not in failure["reason"]
    (logged,) = [r for r in caplog.records if r.levelname == "ERROR" and r.name == "scripts.inference.evaluator"]
    assert failure["reason"] in logged.getMessage() and not logged.exc_info


def test_unexpected_errors_are_collected_with_traceback(tmp_path, caplog):
    class Moody(CopyNet):
        def forward(self, image):
            pred = super().forward(image)
            if self.slices == len(image):
                raise torch.OutOfMemoryError("out of memory\nTried to allocate much")
            return pred * float("nan") if self.slices == 2 * len(image) else pred

    for name in ("A1", "B2", "C3"):
        write_study(tmp_path / "in" / name, ["t1"], name)
    evaluator = evaluate(list_studies(tmp_path / "in"), tmp_path / "out", Moody())
    with pytest.raises(StudyError, match="2 of 3 studies failed: A1, B2"):
        evaluator.run()
    reasons = {failure["study"]: failure["reason"] for failure in evaluator.failures}
    assert reasons["A1"] == "Unexpected OutOfMemoryError: out of memory; the log has the traceback."
    assert "NaN" in reasons["B2"]
    assert len([record for record in caplog.records if record.exc_info]) == 1
    # the next run without failures takes the list away
    evaluate(list_studies(tmp_path / "in"), tmp_path / "out").run()
    assert sorted(os.listdir(tmp_path / "out")) == ["A1", "B2", "C3"]


class WatchedWriter(StudyWriter):
    """Waits before it writes, so that the network could run ahead; fails for one study."""

    def __init__(self, output_dir, fails: str = "", pause: float = 0.05) -> None:
        super().__init__(output_dir)
        self.fails, self.pause, self.finished = fails, pause, 0

    def __call__(self, data):
        time.sleep(self.pause)
        try:
            if data["study"] == self.fails:
                raise OSError(28, "No space left on device")
            return super().__call__(data)
        finally:
            self.finished += 1


@pytest.mark.parametrize("num_workers, num_writers", [(0, 1), (0, 3), (2, 0), (2, 2)])
def test_workers_and_writers_change_no_result(tmp_path, num_workers, num_writers):
    for name, keys in {"A1": ["t1"], "B2": ["t1"], "C3": ["flair", "t2"], "D4": ["t1ce"], "E5": ["t2"]}.items():
        write_study(tmp_path / "in" / name, keys, name)
    (tmp_path / "in" / "B2" / "B2_t1.nii.gz").write_bytes(b"damaged")
    items, found = list_studies(tmp_path / "in"), []
    for out, options in (("one by one", (0, 0)), ("at once", (num_workers, num_writers))):
        writer = WatchedWriter(tmp_path / out, fails="D4")
        evaluator = evaluate(items, None, tiny_net(), writer, num_workers=options[0], num_writers=options[1])
        with pytest.raises(StudyError):
            evaluator.run()
        assert [failure["study"] for failure in evaluator.failures] == ["B2", "D4"]
        assert "No space left" in evaluator.failures[1]["reason"]
        assert list(evaluator.written) == ["A1", "C3", "E5"] and not hidden(tmp_path / out)
        found.append(results(tmp_path / out))
    assert found[0] == found[1] and len(found[0]) == 5 + 4 + 5 + 1


@pytest.mark.parametrize("num_writers", [0, 1, 2])
def test_few_studies_wait_for_the_disk(tmp_path, num_writers):
    names, waiting = ["A1", "B2", "C3", "D4", "E5"], []

    class Ahead(CopyNet):
        seen = 0

        def for_scenario(self, available):
            waiting.append(self.seen - writer.finished)
            self.seen += 1
            return self

    class Slow(WatchedWriter):
        def __call__(self, data):
            # the network may be that far ahead, and gets the time to run further
            wanted, end = min(names.index(data["study"]) + num_writers + 1, len(names)), time.monotonic() + 20
            while network.seen < wanted and time.monotonic() < end:
                time.sleep(0.005)
            return super().__call__(data)

    writer, network = Slow(tmp_path / "out", pause=0.25), Ahead()
    for name in names:
        write_study(tmp_path / "in" / name, ["t1"], name)
    evaluate(list_studies(tmp_path / "in"), None, network, writer, num_writers=num_writers).run()
    assert max(waiting) == num_writers and writer.finished == 5


@pytest.mark.parametrize("num_writers", [0, 2])
def test_an_interruption_leaves_whole_studies_only(tmp_path, num_writers):
    class Interrupted(CopyNet):
        seen = 0

        def for_scenario(self, available):
            self.seen += 1
            if self.seen == 3:
                raise KeyboardInterrupt
            return self

    for name in ("A1", "B2", "C3", "D4"):
        write_study(tmp_path / "in" / name, ["t1"], name)
    writer = WatchedWriter(tmp_path / "out", pause=0.4)
    evaluator = evaluate(list_studies(tmp_path / "in"), None, Interrupted(), writer, num_writers=num_writers)
    with pytest.raises(KeyboardInterrupt):
        evaluator.run()
    assert sorted(os.listdir(tmp_path / "out")) == ["A1", "B2"]
    assert all(len(os.listdir(tmp_path / "out" / name)) == 5 for name in ("A1", "B2"))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("writer")]


def test_what_to_fill_in(tmp_path):
    for arguments, words in (
        ({}, "No input is given"),
        ({"dataset_dir": tmp_path / "nowhere"}, "does not exist"),
        ({"dataset_dir": tmp_path}, "No study was found"),
        ({"t1": tmp_path / "no.nii.gz"}, "does not exist"),
    ):
        with pytest.raises(StudyError, match=words):
            list_studies(**arguments)
    paths = write_study(tmp_path / "in", ["t1"])
    (item,) = list_studies(**paths, study=12)
    assert item["study"] == "12" and item["t1"] == paths["t1"]


def test_fill_in_raises_one_sentence(tmp_path):
    paths = write_study(tmp_path, ["t1"], "BAD")
    truncated(tmp_path)
    with pytest.raises(StudyError, match="cannot be read"):
        fill_with(CopyNet(), paths, tmp_path / "out")
    with pytest.raises(StudyError, match="train first"):
        synthesize_study(**paths, output_dir=tmp_path / "out", ckpt_path=tmp_path / "none.pt")
    assert not (tmp_path / "out").exists()
