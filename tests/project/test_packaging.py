"""What is built is whole, and works where only it is installed."""

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import eit
from eit.config import recipe_names

pytestmark = pytest.mark.project
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(wheel, sdist), built from the files that git tracks or would."""
    folder = tmp_path_factory.mktemp("built")
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True).stdout
    wanted = b"\0".join(f for f in files.split(b"\0") if not f.startswith(b"results/") and (ROOT / f.decode()).exists())
    copy = ["tar", "--null", "--files-from=-", "--create", f"--file={folder / 'tracked.tar'}"]
    subprocess.run(copy, cwd=ROOT, check=True, input=wanted)
    (folder / "tree").mkdir()
    subprocess.run(["tar", "--extract", f"--file={folder / 'tracked.tar'}"], cwd=folder / "tree", check=True)
    words = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", folder / "tree"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,), (sdist,) = (folder / "dist").glob("*.whl"), (folder / "dist").glob("*.tar.gz")
    return wheel, sdist


def test_the_wheel_is_whole(built):
    names = set(zipfile.ZipFile(built[0]).namelist())
    source = ROOT / "src"
    wanted = {str(f.relative_to(source)) for f in (source / "eit").rglob("*") if f.is_file()}
    wanted = {name for name in wanted if "__pycache__" not in name}
    assert {n for n in names if n.startswith("eit/")} == wanted
    assert {
        "eit/py.typed",
        "eit/models/published.csv",
        "eit/analysis/report.html.j2",
        "eit/export/model_card.md.j2",
    } <= names
    assert {f"eit/recipes/{name}.yaml" for name in recipe_names()} <= names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert all(name.startswith(("eit/", "eit-")) for name in names)  # no tests, no examples at the top


def test_the_source_distribution_builds_the_same_wheel(built, tmp_path):
    """`python -m build` makes the wheel from the sdist; here, what is in both is compared."""
    wheel, sdist = built
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    own = {f"src/{name}" for name in zipfile.ZipFile(wheel).namelist() if name.startswith("eit/")}
    assert own <= names and {"LICENSE", "README.md", "pyproject.toml"} <= names


def test_installed_alone_it_trains_evaluates_and_predicts(built, tmp_path):
    target = tmp_path / "site"
    words = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, built[0]]
    subprocess.run([*words, "--disable-pip-version-check"], check=True)

    def run(*words):
        env = os.environ | dict(PYTHONPATH=str(target), OMP_NUM_THREADS="1")
        return subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
        ).stdout

    assert run("-c", "import eit; print(eit.__file__)").startswith(str(target))
    assert run("-m", "eit", "--version") == f"eit {eit.__version__}\n"
    assert "top-1 98.61%" in run("-m", "eit", "eval", "digits", "--data", "sklearn:digits", "--workers", "0")
    few = ["train.epochs=1", "train.warmup_epochs=0", "data.workers=0", "model.depth=1", "model.embed_dim=16"]
    assert "run folder runs/digits" in run("-m", "eit", "train", "digits", *few)
    assert (target / "bin" / "eit").is_file()


def test_one_version_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert eit.__version__ == project["version"]
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text()
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == project["version"] and citation["license"] == project["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()[:400]


@pytest.mark.parametrize(
    ("words", "last", "found"),
    [
        ("eit ex", 1, ["export"]),
        ("eit train fash", 2, ["fashion_mnist"]),
        ("eit train digits optim.l", 3, ["optim.lr=", "optim.lr_batch=", "optim.layer_decay="]),
        ("eit recipes show imagenet_m", 3, ["imagenet_mini"]),
    ],
)
def test_the_shell_completes_commands_recipes_and_keys(words, last, found):
    env = dict(_EIT_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=str(last), PYTHONPATH=str(ROOT / "src"))
    done = subprocess.run([Path(sys.executable).with_name("eit")], env=os.environ | env, capture_output=True, text=True)
    assert done.stdout.split() == found


def test_type_checkers_know_the_public_names(tmp_path):
    names = [name for name in eit.__all__ if name != "__version__"]
    lines = ["import eit", *(f"reveal_type(eit.{name})" for name in names)]
    (tmp_path / "uses.py").write_text("\n".join(lines))
    words = [sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml", tmp_path / "uses.py"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    revealed = re.findall(r'Revealed type is "(.*)"', done.stdout)
    assert len(revealed) == len(names) and "Any" not in revealed, done.stdout
