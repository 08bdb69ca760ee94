"""Run folders, checkpoints and weights of earlier versions load, continue and evaluate."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import eit
from eit.training.run_folder import read_recipe
from eit.training.trainer import train
from eit.weights.formats import read_safetensors

OLD = Path(__file__).parents[1] / "helpers" / "old_run"


@pytest.fixture
def started(tmp_path):
    """A copy of the stopped run, as the recipe of a run in that place."""
    shutil.copytree(OLD / "started", tmp_path / "old")
    return read_recipe(tmp_path / "old").model_copy(update=dict(out=str(tmp_path / "old")))


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_an_old_run_continues_to_the_weights_that_the_old_version_reached(started, capsys):
    summary = train(started)
    assert "from step 70" in capsys.readouterr().err
    reached, _ = read_safetensors(started.run_folder() / "final.safetensors")
    recorded, _ = read_safetensors(OLD / "finished" / "final.safetensors")
    assert reached.keys() == recorded.keys()
    noise = {f"blocks.{i}.attn.qkv.bias" for i in range(2)}  # the gradient of the keys' bias is 0 but for rounding
    for name in recorded.keys() - noise:  # other machines and other numbers of threads round otherwise
        torch.testing.assert_close(reached[name], recorded[name], rtol=1e-3, atol=1e-3, msg=name)
    assert summary["epochs"] == json.loads((OLD / "finished" / "summary.json").read_text())["epochs"]
    for now, before in zip(log(started.run_folder()), log(OLD / "finished"), strict=True):
        assert now.keys() == before.keys() and now["step"] == before["step"]
        assert now["train_loss"] == pytest.approx(before["train_loss"], rel=1e-3)


def test_an_old_run_that_has_ended_is_not_trained_again(tmp_path, capsys):
    shutil.copytree(OLD / "finished", tmp_path / "old")
    recipe = read_recipe(tmp_path / "old").model_copy(update=dict(out=str(tmp_path / "old")))
    summary = json.loads((OLD / "finished" / "summary.json").read_text())
    assert train(recipe) == summary | dict(folder=str(tmp_path / "old"))
    assert "is finished" in capsys.readouterr().err


def test_old_weights_load_with_their_card():
    model = eit.load(OLD / "finished")
    assert (model.card.model, model.card.size, len(model.card.classes)) == ("eit_mini", 8, 10)
    assert model.card.recipe["train"]["epochs"] == 6 and model.card.metrics["val_top1"] > 20
    assert model(torch.zeros(1, 3, 8, 8)).shape == (1, 10)
