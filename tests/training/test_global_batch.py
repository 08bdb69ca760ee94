"""A run goes on with another number of processes: micro-batches keep its global batch, or one line says why not."""

import json

import pytest
import torch

import eit
from eit import distributed
from eit.config import load_recipe
from eit.randomness import Stream
from eit.training import trainer
from eit.training.global_batch import micro_batches_per_step, out_of_memory_advice
from eit.training.run_folder import RunFolder
from eit.training.trainer import train
from tests.helpers.commands import start_ranks, wait_for_all
from tests.helpers.training import TINY, log, recipe, train_until_killed, weights
from tests.test_distributed import DETERMINISTIC


@pytest.fixture
def ranks(monkeypatch):
    """ranks(n): this process is rank 0 of n."""

    def of(world):
        monkeypatch.setattr(distributed, "world_size", lambda: world)
        monkeypatch.setattr(distributed, "on_main", lambda call: call())

    return of


def begin(folder, global_batch, *words):
    """The folder of a run that has a checkpoint; its recipe."""
    r = recipe(folder, *words)
    with RunFolder(r.run_folder(), r) as run:
        run.start_logging({} if global_batch is None else dict(global_batch=global_batch), 0)
    (r.run_folder() / "checkpoints" / "step-3").mkdir(parents=True)
    return r


@pytest.mark.parametrize(
    ("words", "global_batch", "world", "expected"),
    [
        (["data.batch_size=4"], 8, 1, 2),
        (["data.batch_size=4", "train.accumulate=2"], 8, 1, 2),
        (["data.batch_size=4"], 32, 2, 4),
        (["data.batch_size=4", "train.accumulate=3"], 24, 3, 2),
        (["data.batch_size=2", "train.accumulate=4"], 8, 4, 1),
    ],
)
def test_micro_batches_keep_the_global_batch(folder, ranks, capsys, words, global_batch, world, expected):
    r = begin(folder, global_batch, *words)
    ranks(world)
    assert micro_batches_per_step(r) == expected
    said = f"{expected} micro-batches in a step keep the global batch of {global_batch}\n"
    assert capsys.readouterr().err.endswith(said) == (expected != r.train.accumulate)


@pytest.mark.parametrize(("world", "global_batch"), [(2, 8), (1, 4), (8, 32)])
def test_nothing_is_said_where_nothing_changes(folder, ranks, capsys, world, global_batch):
    r = begin(folder, global_batch, "data.batch_size=4")
    ranks(world)
    assert micro_batches_per_step(r) == 1 and capsys.readouterr().err == ""


@pytest.mark.parametrize(("global_batch", "world"), [(8, 3), (8, 4), (16, 3)])
def test_a_number_of_processes_that_cannot_make_it_is_one_line(folder, ranks, global_batch, world):
    """16 images are more than 3 x 4, but no multiple of it."""
    r = begin(folder, global_batch, "data.batch_size=4")
    ranks(world)
    with pytest.raises(eit.UserError) as error:
        micro_batches_per_step(r)
    assert str(error.value) == (
        f"the run has a global batch of {global_batch}, which {world} processes x data.batch_size=4 cannot make: "
        "start another number of processes, or set a data.batch_size that divides it"
    )


def test_a_run_that_has_not_begun_has_the_micro_batches_of_its_recipe(folder, ranks):
    ranks(3)
    assert micro_batches_per_step(recipe(folder, "train.accumulate=5")) == 5
    r = begin(folder, 8, "data.batch_size=4", "train.accumulate=5")
    (r.run_folder() / "checkpoints" / "step-3").rmdir()
    assert micro_batches_per_step(r) == 5


@pytest.mark.parametrize("text", [None, "{}", "{"])
def test_so_has_one_of_which_the_global_batch_is_not_known(folder, ranks, text):
    """Of an earlier version, say."""
    r = begin(folder, None, "data.batch_size=4", "train.accumulate=5")
    file = r.run_folder() / "environment.json"
    file.unlink()
    if text is not None:
        file.write_text(text)
    ranks(3)
    assert micro_batches_per_step(r) == 5


def test_a_batch_that_the_user_has_changed_is_the_users(folder, monkeypatch):
    """Also where it makes another global batch, which is refused."""
    train_until_killed(recipe(folder, "train.save_every=1"), 3, monkeypatch)
    for words, batch in ((["data.batch_size=4"], 4), (["train.accumulate=2"], 16)):
        with pytest.raises(eit.UserError, match=f"another global_batch: 8, now {batch}; set another out="):
            train(recipe(folder, "train.save_every=1", *words))
    r = recipe(folder, "train.save_every=1", "data.batch_size=2", "train.accumulate=4")
    assert micro_batches_per_step(r) == 4 and train(r)["epochs"] == 2


def stop_at_step_3():
    seed = trainer.set_seed

    def set_seed(*counters):
        if counters[0] == Stream.STEP and counters[2] == 3:
            raise KeyboardInterrupt
        seed(*counters)

    trainer.set_seed = set_seed


def test_the_same_command_goes_on_with_one_process_of_two(folder, tmp_path, monkeypatch, capsys):
    """As with torchrun --nnodes=1:2 when a node is lost: to the same weights but for rounding."""
    words = [*DETERMINISTIC, "train.save_every=1", "data.batch_size=4"]
    out = tmp_path / "moved"
    command = ["train", "cifar10", *TINY, *words, f"data.root={folder}", f"out={out}"]
    (error := tmp_path / "stderr").touch()
    stopped = start_ranks(command, [tmp_path] * 2, [(error, error)] * 2, stop_at_step_3)
    assert wait_for_all(stopped, 120) == [130, 130], error.read_text()
    assert (out / "checkpoints" / "step-3").is_dir()
    assert json.loads((out / "environment.json").read_text())["global_batch"] == 8
    train(recipe(folder, *words, f"out={out}"))
    said = capsys.readouterr().err
    assert "2 micro-batches in a step keep the global batch of 8" in said and "from step 3" in said
    whole = recipe(folder, *words, "data.batch_size=8", f"out={tmp_path / 'whole'}")
    train(whole)
    for one, other in zip(log(out), log(tmp_path / "whole"), strict=True):
        assert (one["step"], one["lr"]) == (other["step"], other["lr"])
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-4)
    for name, tensor in weights(tmp_path / "whole").items():
        torch.testing.assert_close(tensor, weights(out)[name], atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    ("overrides", "advice"),
    [
        ([], "set data.batch_size=64 train.accumulate=2, which keeps the global batch"),
        (["data.batch_size=30"], "set data.batch_size=10 train.accumulate=3"),
        (["data.batch_size=2"], "set a smaller data.image_size"),
        (["data.batch_size=15", "augment.mixup=0", "augment.cutmix=0"], "set data.batch_size=5 train.accumulate=3"),
    ],
)
def test_out_of_memory_says_what_to_set(overrides, advice):
    assert advice in out_of_memory_advice(load_recipe("cifar10", overrides))
