"""Pages and figures come from results alone."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest

import eit
from eit.config import load_recipe
from eit.reproduce import experiment as experiments
from eit.reproduce.runs import read_results
from eit.reproduce.tables import digest, figure, stale_file
from tests.helpers.commands import run_eit
from tests.reproduce.conftest import TINY

ROOT = Path(__file__).parents[2]


def test_tables_come_from_results_alone_without_weights(ran, tmp_path):
    shutil.copytree(ran, tmp_path / "clone", ignore=shutil.ignore_patterns("*.safetensors", "checkpoints", "*.png"))
    done = run_eit("reproduce", "tables", "tiny.yaml", cwd=tmp_path / "clone")
    assert done.returncode == 0
    pages = [base / "results" / "tiny" / "tiny" / "README.md" for base in (ran, tmp_path / "clone")]
    assert pages[0].read_text() == pages[1].read_text()
    assert (pages[1].parent / "figure.png").exists()


@pytest.mark.slow
def test_two_processes_make_the_same_pages(ran, tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    done = run_eit("reproduce", "run", "tiny.yaml", "--only", "seed-0", cwd=tmp_path, ranks=2)
    assert done.returncode == 0, done.stderr
    one, two = (base / "results" / "tiny" / "tiny" / "digits-eit-seed-0" for base in (ran, tmp_path))
    assert load_recipe(str(two / "recipe.yaml")).data.batch_size == 32
    before, after = (json.loads((folder / "measured.json").read_text()) for folder in (one, two))
    assert before["images"] == after["images"] and before["trained"]["share"] == pytest.approx(
        after["trained"]["share"], rel=0.05
    )
    assert done.stdout.count("# tiny, budget tiny") == 1
    again = run_eit("reproduce", "tables", "tiny.yaml", cwd=tmp_path, ranks=2)
    assert again.returncode == 0 and again.stdout.count("# tiny, budget tiny") == 1


def test_tables_of_an_experiment_that_was_changed_since_are_refused(ran, tmp_path):
    shutil.copytree(ran / "results", tmp_path / "results")
    (tmp_path / "tiny.yaml").write_text(TINY.replace("depth: 2", "depth: 3"))
    done = run_eit("reproduce", "tables", "tiny.yaml", cwd=tmp_path)
    assert done.returncode == 2 and "model.depth: 2 -> 3" in done.stderr


def test_a_page_or_a_figure_that_disagrees_with_its_runs_is_seen(ran, tmp_path):
    shutil.copytree(ran / "results", tmp_path / "results")
    experiment = experiments.load(str(ran / "tiny.yaml"))
    assert stale_file(experiment, "tiny", tmp_path / "results") is None
    folder = tmp_path / "results" / "tiny" / "tiny"
    page = (folder / "README.md").read_text()
    (folder / "README.md").write_text(page.replace("holds", "does not hold"))
    assert stale_file(experiment, "tiny", tmp_path / "results").name == "README.md"
    (folder / "README.md").write_text(page)
    measured = folder / "digits-eit-seed-0" / "measured.json"
    values = json.loads(measured.read_text())
    values["trained"]["share"][0] += 0.1  # which the page does not show
    measured.write_text(json.dumps(values))
    assert stale_file(experiment, "tiny", tmp_path / "results").name == "figure.png"


def test_figures_of_each_experiment_are_drawn(ran, tmp_path):
    experiment = experiments.load(str(ran / "tiny.yaml"))
    for name in ("tiny", "frequency", "diversity"):
        own = experiment.model_copy(update=dict(name=name))
        results = tmp_path / "results"
        shutil.copytree(ran / "results" / "tiny", results / name, dirs_exist_ok=True)
        file = tmp_path / f"{name}.png"
        figure(own, read_results(own, "tiny", results), file)
        assert file.stat().st_size > 5000
    assert digest(read_results(experiment, "tiny", ran / "results"))


def test_weights_are_prepared_for_a_release(ran, tmp_path, capsys):
    results = tmp_path / "results"
    first = experiments.load("small_data").cells("smoke")[:3]
    for cell, name in zip(first, ("digits-eit-seed-0", "digits-eit-seed-1", "digits-vit-seed-0"), strict=True):
        shutil.copytree(ran / "results" / "tiny" / "tiny" / name, cell.folder(results))
        (cell.folder(results) / "recipe.yaml").write_text(cell.recipe(results, {}).to_yaml())
    release = runpy.run_path(str(ROOT / "tools" / "release_weights.py"))["main"]
    release(str(tmp_path / "out"), str(results))
    name = "small-data-smoke-digits-eit"
    assert (tmp_path / "out" / name / "README.md").exists()
    assert (tmp_path / "out" / "SHA256SUMS").read_text().endswith(f"  {name}.zip\n")
    assert eit.load(tmp_path / "out" / name).card.metrics
    card = (tmp_path / "out" / name / "README.md").read_text()
    assert "Trained with eit" in card and "those after the last epoch" in card
    assert (tmp_path / "out" / name / "curves.png").exists()
    for cell in first:
        (cell.folder(results) / "final.safetensors").unlink()
    with pytest.raises(SystemExit, match="no weights in "):
        release(str(tmp_path / "out"), str(results))
    assert "eit reproduce run small_data --budget smoke --results FOLDER trains it" in capsys.readouterr().out


def test_the_tool_for_a_release_says_how_it_is_used(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["release_weights.py"])
    with pytest.raises(SystemExit, match="^usage: python tools/release_weights.py OUT"):
        runpy.run_path(str(ROOT / "tools" / "release_weights.py"), run_name="__main__")
