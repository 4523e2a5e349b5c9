# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Files of weights and training states: what is kept, what is passed over, and what a user is told."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from builders import assert_same, tiny_net
from ignite.engine import Engine, Events
from torch import nn

from scripts.contrasts import StudyError
from scripts.networks.weights import read_settings, read_state, save_weights, with_weights
from scripts.training.checkpoint import BestModel, LastModel, TrainingCheckpoint


class Run:
    """A training of one linear layer with a checkpoint after each epoch."""

    def __init__(self, directory: Path, seed: int = 0, width: int = 3, **options: object) -> None:
        torch.manual_seed(seed)
        self.net = nn.Linear(width, 2)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=0.1)
        self.epochs: list[int] = []
        self.engine = Engine(self._train)
        self.engine.add_event_handler(Events.EPOCH_STARTED, lambda e: self.epochs.append(e.state.epoch))
        objects = {"net": self.net, "optimizer": self.optimizer}
        self.checkpoint = TrainingCheckpoint(directory, objects, **options)  # type: ignore[arg-type]
        self.checkpoint.attach(self.engine)
        # MONAI's engines have a device
        self.engine.state.device = torch.device("cpu")

    def _train(self, engine: Engine, batch: float) -> None:
        self.optimizer.zero_grad()
        self.net(torch.full((1, self.net.in_features), batch + engine.state.epoch)).square().sum().backward()
        self.optimizer.step()

    def run(self, epochs: int) -> Run:
        # as MONAI's Workflow does, so that Ignite keeps the state
        self.engine.state.max_epochs = epochs
        self.engine.run([0.1, 0.2], max_epochs=epochs)
        return self

    def state(self) -> dict:
        return {"net": self.net.state_dict(), "optimizer": self.optimizer.state_dict()}


def files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def names(*epochs: int) -> list[str]:
    return sorted(f"checkpoint_epoch={epoch}.pt" for epoch in epochs)


# --------------------------------------------------------------------------------------------------- training state
def test_resumed_run_equals_an_unbroken_one(tmp_path: Path) -> None:
    unbroken = Run(tmp_path / "a").run(5)
    Run(tmp_path / "b").run(3)
    resumed = Run(tmp_path / "b", seed=9).run(5)
    assert unbroken.epochs == [1, 2, 3, 4, 5] and resumed.epochs == [4, 5]
    assert_same(resumed.state(), unbroken.state())
    assert resumed.engine.state.iteration == 10


@pytest.mark.parametrize("keep", [2, 4])
def test_newest_checkpoints_are_kept(keep: int, tmp_path: Path) -> None:
    run = Run(tmp_path, keep=keep).run(11)
    assert files(tmp_path) == names(*range(12 - keep, 12))
    # by number: in the order of names epoch 9 comes after 10 and 11
    assert [path.name for path in run.checkpoint.files()] == [f"checkpoint_epoch={e}.pt" for e in range(12 - keep, 12)]
    assert Run(tmp_path, keep=keep).run(12).epochs == [12]


def test_interval_between_checkpoints(tmp_path: Path) -> None:
    Run(tmp_path, interval=2, keep=5).run(5)
    assert files(tmp_path) == names(2, 4)
    assert Run(tmp_path, interval=2, keep=5).run(6).epochs == [5, 6]


def test_keeping_a_single_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep must be at least 2"):
        Run(tmp_path, keep=1)


def test_failed_write_leaves_the_complete_checkpoints_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Run(tmp_path).run(2)

    def full_disk(state: object, file: object) -> None:
        file.write(b"half of it")  # type: ignore[attr-defined]
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full_disk)
        with pytest.raises(OSError, match="No space"):
            Run(tmp_path).run(3)
    assert files(tmp_path) == names(1, 2)
    assert Run(tmp_path).run(3).epochs == [3]


def test_unreadable_checkpoints_are_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    unbroken = Run(tmp_path, keep=4).run(4)
    written = (tmp_path / names(4)[0]).read_bytes()
    middle = slice(len(written) // 2, len(written) // 2 + 128)  # more than the zeros between two tensors
    changed = written[: middle.start] + bytes(byte ^ 1 for byte in written[middle]) + written[middle.stop :]
    for epoch, content in ((4, changed), (3, b"no checkpoint")):
        (tmp_path / names(epoch)[0]).write_bytes(content)
    with caplog.at_level(logging.WARNING):
        resumed = Run(tmp_path, seed=9, keep=4).run(4)
    assert [names(e)[0] in r.getMessage() for e, r in zip((4, 3), caplog.records, strict=True)] == [True, True]
    assert resumed.epochs == [3, 4]
    assert_same(resumed.state(), unbroken.state())
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:100])
    assert Run(tmp_path).run(2).epochs == [1, 2]


def test_leftovers_of_a_killed_process_are_removed_and_other_files_are_not(tmp_path: Path) -> None:
    Run(tmp_path).run(1)
    others = ["notes.txt", "tmpabc_1234", "checkpoint_epoch=best.pt", ".model.pt.0123.new"]
    for name in (".checkpoint_epoch=1.pt.0123.new", *others):
        (tmp_path / name).write_text("x")
    assert Run(tmp_path).run(2).epochs == [2]
    assert files(tmp_path) == sorted([*names(1, 2), *others])


@pytest.mark.parametrize("resume", [False, "false", "False"])
def test_without_resuming_older_checkpoints_are_removed(resume: object, tmp_path: Path) -> None:
    Run(tmp_path).run(3)
    fresh = Run(tmp_path, resume=resume).run(1)
    assert fresh.epochs == [1] and files(tmp_path) == names(1)
    assert Run(tmp_path, resume=True).run(2).epochs == [2]
    assert Run(tmp_path, resume="true").run(3).epochs == [3]


def test_checkpoint_of_another_network_ends_the_run_with_one_sentence(tmp_path: Path) -> None:
    Run(tmp_path).run(2)
    with pytest.raises(StudyError, match="does not fit the configured run") as raised:
        Run(tmp_path, width=4).run(3)
    assert "\n" not in str(raised.value) and str(tmp_path) in str(raised.value)
    assert files(tmp_path) == names(1, 2)


def test_run_does_not_go_on_with_other_settings(tmp_path: Path) -> None:
    Run(tmp_path, settings={"seed": 3, "betas": (0.5, 0.9)}).run(1)
    with pytest.raises(StudyError, match=r"seed is 3, not 4\): restore the settings"):
        Run(tmp_path, settings={"seed": 4, "betas": (0.5, 0.9)}).run(2)
    assert Run(tmp_path, settings={"seed": 3, "betas": [0.5, 0.9]}).run(2).epochs == [2]


@pytest.mark.parametrize("message", ["one line.", "Error(s) in loading Linear:\n\tone line.\n\tanother line.", ""])
def test_first_thing_that_does_not_fit_is_named_however_long_the_message_is(
    message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, expected = Run(tmp_path).run(1), "one line" if message else "RuntimeError"
    save_weights(tmp_path / "model.pt", run.net)

    def load(*_: object) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr(nn.Linear, "load_state_dict", load)
    with pytest.raises(StudyError, match=rf"does not fit \({expected}\): "):
        with_weights(run.net, tmp_path / "model.pt")
    with pytest.raises(StudyError, match=rf"does not fit the configured run \({expected}\): "):
        Run(tmp_path).run(2)


def test_checkpoint_without_a_part_ends_the_run_with_one_sentence(tmp_path: Path) -> None:
    run = Run(tmp_path)
    del run.checkpoint.objects["optimizer"]
    run.run(1)
    with pytest.raises(StudyError, match="optimizer"):
        Run(tmp_path).run(2)


# ----------------------------------------------------------------------------------------------------------- models
def evaluator(scores: list[float], net: nn.Module) -> Engine:
    """Each run gives the next score and marks the network with it."""
    left = iter(scores)

    def evaluate(engine: Engine, _: object) -> None:
        engine.state.metrics["psnr"] = next(left)
        nn.init.constant_(net.weight, engine.state.metrics["psnr"])

    return Engine(evaluate)


def test_best_model_is_the_one_with_the_highest_score(tmp_path: Path) -> None:
    net, path = nn.Linear(1, 1), tmp_path / "models" / "model.pt"
    engine = evaluator([3.0, float("nan"), 5.0, 5.0, 4.0], net)
    best = BestModel(path, net, "psnr")
    best.attach(engine)
    held = []
    for _ in range(5):
        engine.run([0], max_epochs=1)
        held.append(float(torch.load(path, weights_only=True)["weight"]))
    assert held == [3, 3, 5, 5, 5] and best.best == 5 and files(path.parent) == ["model.pt"]

    restored = BestModel(path, net, "psnr")
    restored.load_state_dict(best.state_dict())
    assert (restored.best, restored.epoch) == (best.best, best.epoch)
    lower = evaluator([4.9], net)
    restored.attach(lower)
    lower.run([0])
    assert float(torch.load(path, weights_only=True)["weight"]) == 5
    # dB are no scale for a Dice of at most 1
    other = BestModel(path, net, "dice")
    other.load_state_dict(best.state_dict())
    assert other.best == float("-inf")


@pytest.mark.parametrize("validated", [False, True])
def test_last_model_is_frozen_and_stands_in_for_a_best_one(validated: bool, tmp_path: Path) -> None:
    net = nn.Linear(1, 1)
    best = BestModel(tmp_path / "model.pt", net, "psnr")
    if validated:
        engine = evaluator([3.0], net)
        best.attach(engine)
        engine.run([0])

    def freeze(engine: Engine) -> None:
        nn.init.constant_(net.weight, 7.0)

    trainer = Engine(lambda *_: nn.init.constant_(net.weight, 1.0))
    LastModel(tmp_path / "last" / "model_last.pt", net, freeze, best).attach(trainer)  # type: ignore[arg-type]
    trainer.run([0])
    assert float(torch.load(tmp_path / "last" / "model_last.pt", weights_only=True)["weight"]) == 7
    assert float(torch.load(tmp_path / "model.pt", weights_only=True)["weight"]) == (3 if validated else 7)


def test_best_score_of_another_validation_does_not_count(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def best(metric: str, count: int) -> BestModel:
        return BestModel(tmp_path / "model.pt", nn.Linear(1, 1), metric, validation={"count": count})

    first = best("psnr", 20)
    first.best, first.epoch = 30.0, 4
    for metric, count in (("psnr", 20), ("psnr", 5), ("ssim", 20)):
        again = best(metric, count)
        again.load_state_dict(first.state_dict())
        same = (metric, count) == ("psnr", 20)
        assert (again.best, again.epoch) == ((30.0, 4) if same else (float("-inf"), 0))
    assert "count is 20, not 5" in caplog.text and "metric is 'psnr', not 'ssim'" in caplog.text


def test_models_have_their_settings_inside_and_no_leftovers(tmp_path: Path) -> None:
    net = nn.Linear(1, 1)
    (tmp_path / ".model.pt.0123.new").write_text("half a model")
    best = BestModel(
        tmp_path / "model.pt", net, "psnr", {"preprocessing": {"image_size": 96, "spacing": 2.0, "scaling": "brain"}}
    )
    engine = evaluator([3.0], net)
    best.attach(engine)
    engine.run([0])
    assert files(tmp_path) == ["model.pt"]
    assert read_settings(tmp_path / "model.pt") == {"image_size": 96, "spacing": 2.0, "scaling": "brain"}


def test_half_precision_on_disk_is_for_large_tensors_alone(tmp_path: Path) -> None:
    net = tiny_net(bank_size=300)
    net.bank_key.normal_().mul_(200)  # whose squares are more than float16 holds
    save_weights(tmp_path / "model.pt", net, half=True)
    state, own = read_state(tmp_path / "model.pt")[0], net.state_dict()
    halved = {name for name, value in state.items() if value.dtype == torch.float16}
    large = {name for name, value in own.items() if value.is_floating_point() and value.numel() > 1024}
    assert "bank_key" in halved == large - {"bank_key_square"}
    assert torch.equal(state["bank_key_square"], state["bank_key"].float().square().sum(dim=2))
    for name in set(state) - {"bank_key_square"}:
        assert torch.equal(state[name], own[name].to(state[name].dtype)), name


def test_what_half_precision_cannot_hold_is_not_written(tmp_path: Path) -> None:
    net = tiny_net(bank_size=300)
    net.bank_mean.fill_(1e6)
    with pytest.raises(StudyError, match=r"bank_mean is too large for half precision.*use --half False"):
        save_weights(tmp_path / "model.pt", net, half=True)
    assert not list(tmp_path.iterdir())


def test_weights_for_a_config_are_loaded(tmp_path: Path) -> None:
    saved = tiny_net(0)
    torch.save(saved.state_dict(), tmp_path / "model.pt")
    assert_same(with_weights(tiny_net(1), tmp_path / "model.pt").state_dict(), saved.state_dict())
    with pytest.raises(StudyError, match="does not fit"):
        with_weights(tiny_net(bank_size=7), tmp_path / "model.pt")
