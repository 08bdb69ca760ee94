"""Commands as a user types them, and what they see when something is wrong."""

import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import eit
from eit.cli import _metrics_text
from eit.inference.evaluate import Metrics
from eit.weights.load import find_weights, read_card
from tests.conftest import TINY, run_eit, save_digits


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with data/ and runs/mine, trained by the command."""
    home = tmp_path_factory.mktemp("home")
    save_digits(home / "data")
    done = run_eit("train", "cifar10", "data.root=data", "name=mine", *TINY, cwd=home)
    assert done.returncode == 0, done.stderr
    assert "run folder runs/mine" in done.stdout and "next: python -m eit eval runs/mine" in done.stdout
    return home


def failed(status, *words, **options):
    done = run_eit(*words, **options)
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr.strip()


def test_version():
    assert run_eit("--version").stdout.strip() == f"eit {eit.__version__}"


def test_version_needs_no_torch():
    code = (
        "import sys; sys.argv = ['eit', '--version']; from eit.cli import app; app(standalone_mode=False); "
        "assert not {'torch', 'timm', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_installed_command_is_this_one():
    command = Path(sys.executable).with_name("eit")
    assert subprocess.run([command, "--version"], capture_output=True, text=True).stdout.startswith("eit ")


def test_models():
    text = run_eit("models").stdout
    assert "25,305,592" in text and "do not ship" in text and "https://github.com/MrHaiPi/EIT" in text
    rows = json.loads(run_eit("models", "--json").stdout)
    assert [row["name"] for row in rows] == eit.list_models()
    assert rows[0]["params"] == 3_512_750 and rows[0]["published_top1"] == 70.0 and rows[0]["tokens"] == 361
    assert not any(row["weights_ship"] for row in rows)


def test_train_without_a_recipe_prints_the_recipes():
    text = run_eit("train").stdout
    assert text == run_eit("recipes").stdout
    assert all(name in text for name in ("digits", "cifar10", "imagenet_large"))


def test_a_recipe_is_shown_resolved(tmp_path):
    text = run_eit("recipes", "show", "digits", "train.epochs=9", "model.family=vit").stdout
    assert "\n  epochs: 9 " in text and "# passes over the training images" in text and "\n  family: vit " in text
    (tmp_path / "mine.yaml").write_text(text)
    assert run_eit("recipes", "show", "mine.yaml", cwd=tmp_path).stdout == text


def test_published_results_are_drawn(tmp_path):
    done = run_eit("models", "--plot", "results.svg", cwd=tmp_path)
    assert "published.csv" in done.stdout
    text = (tmp_path / "results.svg").read_text()
    assert all(f"<!-- {name} -->" in text for name in ("EIT", "DeiT", "Swin", "ResNet", "EIT-mini", "no pyramid"))


def test_what_the_model_will_see_is_drawn(trained):
    words = ["data.root=data", *TINY, "augment.erasing=0.5", "--out", "grid.png", "--images", "5"]
    done = run_eit("data", "show", "cifar10", *words, cwd=trained)
    assert done.stdout == "grid.png: 5 training and 5 validation images\n"
    assert (trained / "grid.png").read_bytes()[:4] == b"\x89PNG"


def test_the_weight_that_ships_predicts_and_says_how_good_it_is(tmp_path):
    """Right after installation: its accuracy is what it says, and what results/ has for its seed."""
    root = Path(__file__).parents[2]
    found = json.loads(run_eit("eval", "digits", "--json", cwd=tmp_path).stdout)
    card = read_card("digits")
    assert found["top1"] == pytest.approx(card.metrics["val_top1"])
    run = root / "results" / "digits" / f"seed-{card.recipe['seed']}"
    assert json.loads((run / "summary.json").read_text())["last_top1"] == pytest.approx(found["top1"])
    assert yaml.safe_load((run / "recipe.yaml").read_text()) == card.recipe
    assert find_weights("eit_digits").stat().st_size < 1_500_000
    subprocess.run([sys.executable, root / "tools" / "demo_images.py", tmp_path / "images"], check=True)
    lines = run_eit("predict", "digits", "images", "--top", 1, cwd=tmp_path).stdout.splitlines()
    assert len(lines) == 6 and all(Path(line.split()[0]).parent.name == line.split()[1] for line in lines)


def test_train_evaluate_predict(trained):
    summary = json.loads((trained / "runs" / "mine" / "summary.json").read_text())
    metrics = json.loads(run_eit("eval", "runs/mine/final.safetensors", "--data", "data", "--json", cwd=trained).stdout)
    assert metrics["images"] == 12 and metrics["top1"] == pytest.approx(summary["last_top1"])
    own = json.loads(run_eit("eval", "runs/mine/final.safetensors", "--json", cwd=trained).stdout)
    assert own | dict(data="") == metrics | dict(data="")
    text = run_eit("eval", "runs/mine/final.safetensors", cwd=trained).stdout
    lines = {line.split()[0]: line.split()[1:] for line in text.splitlines()}
    assert list(lines)[:3] == ["top-1", "loss", "ECE"]  # top-5 of three classes says nothing
    assert lines["class"] == ["images", "top-1", "(recall)", "precision", "f1"]
    found = own["per_class"]["digit2"]
    shown = ["-" if found[key] is None else f"{found[key]:.2f}%" for key in ("top1", "precision", "f1")]
    assert lines["digit2"] == ["4", *shown]

    files = [f"data/val/digit{i}/000.png" for i in range(3)]
    listed = run_eit("predict", "runs/mine", "-", "--top", 2, cwd=trained, stdin="\n".join(files)).stdout
    assert [line.split()[0] for line in listed.splitlines()] == files
    assert all(line.count("%") == 2 for line in listed.splitlines())
    first = json.loads(run_eit("predict", "runs/mine", "data/val/digit0", "--json", cwd=trained).stdout.splitlines()[0])
    assert first["image"] == files[0]
    assert sum(label["probability"] for label in first["labels"]) == pytest.approx(1, abs=1e-4)


def test_evaluation_at_several_sizes_and_crops(trained):
    several = ["--size", 16, "--size", 24, "--crop-ratio", 0.8, "--crop-ratio", 1]
    table = run_eit("eval", "runs/mine", *several, cwd=trained).stdout.splitlines()
    rows = [line.split() for line in table if line.strip() and "─" not in line]
    assert rows[0] == ["size", "crop", "top-1", "loss", "ECE"]
    assert [row[:2] for row in rows[1:]] == [["16", "0.800"], ["16", "1.000"], ["24", "0.800"], ["24", "1.000"]]
    found = json.loads(run_eit("eval", "runs/mine", *several, "--json", cwd=trained).stdout)
    assert [(v["size"], v["resize"], v["crop_ratio"]) for v in found["views"]] == [
        (16, 20, 0.8),
        (16, 16, 1),
        (24, 30, 0.8),
        (24, 24, 1),
    ]
    assert [f"{v['loss']:.4f}" for v in found["views"]] == [row[3] for row in rows[1:]]
    assert len({v["loss"] for v in found["views"]}) == 4
    one = json.loads(run_eit("eval", "runs/mine", "--size", 24, "--crop-ratio", 1, "--json", cwd=trained).stdout)
    assert one == found["views"][3] | {key: value for key, value in found.items() if key != "views"}
    own = json.loads(run_eit("eval", "runs/mine", "--json", cwd=trained).stdout)
    assert own["loss"] == found["views"][1]["loss"] and "confusion" not in own  # the run's own view: 16 of 16


def test_evaluation_with_flips_and_in_low_precision(trained):
    plain, bf16, flip = (
        json.loads(run_eit("eval", "runs/mine", *words, "--json", cwd=trained).stdout)
        for words in ([], ["--precision", "bf16"], ["--flip"])
    )
    assert bf16["loss"] == pytest.approx(plain["loss"], rel=0.02) and bf16["loss"] != plain["loss"]
    assert flip["loss"] == pytest.approx(plain["loss"], rel=0.1) and flip["loss"] != plain["loss"]
    assert [(r["precision"], r["flip"]) for r in (plain, bf16, flip)] == [
        ("fp32", False),
        ("bf16", False),
        ("fp32", True),
    ]


def test_confusions_are_written(trained, tmp_path):
    for name in ("x.png", "x.csv"):
        done = run_eit("eval", "runs/mine", "--json", "--confusion", tmp_path / name, cwd=trained)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    head, *rows = csv.reader((tmp_path / "x.csv").open(newline=""))
    assert head[1:] == [row[0] for row in rows] == ["digit0", "digit1", "digit2"]
    counts = [[int(n) for n in row[1:]] for row in rows]
    metrics = json.loads(done.stdout)
    assert [sum(row) for row in counts] == [4, 4, 4] and sum(counts[i][i] for i in range(3)) == metrics["correct1"]
    assert [counts[i][i] / 0.04 for i in range(3)] == [c["top1"] for c in metrics["per_class"].values()]
    (tmp_path / "folder.csv").mkdir()
    error = failed(2, "eval", "runs/mine", "--confusion", tmp_path / "folder.csv", cwd=trained)
    assert "folder.csv cannot be written: Is a directory" in error


def test_a_table_of_many_classes_shows_the_weakest():
    per_class = {
        f"[b]{i:02d} " + "n" * 50: dict(images=2, top1=100.0 - i, precision=None, f1=50.0) for i in range(24)
    } | {"none": dict(images=0, top1=None, precision=0.0, f1=0.0)}
    figures = dict(images=48, top1=50.0, top5=60.0, loss=1.0, ece=2.0, correct1=24, correct5=29, confusion=[])
    lines = _metrics_text(Metrics(per_class=per_class, **figures)).splitlines()
    assert lines[1].startswith("top-5 60.00%")
    assert lines[4] == "the 10 weakest of 24 classes (--json has all)" and len(lines) == 16
    assert [line.split()[0] for line in lines[6:]] == [f"[b]{i}" for i in range(23, 13, -1)]
    assert len({len(line) for line in lines[5:]}) == 1 and lines[6].endswith("77.00%          -   50.00%")
    per_class = dict(list(per_class.items())[:20])
    assert len(_metrics_text(Metrics(per_class=per_class, **figures)).splitlines()) == 4 + 2 + 20


def test_data_check(trained, tmp_path):
    report = json.loads(run_eit("data", "check", "data", "--json", cwd=trained).stdout)
    assert report["ok"] and report["splits"]["train"]["images"] == 36
    shutil.copytree(trained / "data", tmp_path / "data")
    (tmp_path / "data" / "val" / "digit1").rename(tmp_path / "data" / "val" / "eins")
    done = run_eit("data", "check", tmp_path / "data")
    assert done.returncode == 1
    assert "only in train/: digit1; only in val/: eins" in done.stdout and "not ready to train" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "digit"], "unknown recipe 'digit'; did you mean 'digits'?"),
        (["train", "digits", "model.famly=vit"], "unknown recipe key 'model.famly'; did you mean 'model.family'?"),
        (["train", "digits", "train.epochs=x"], "train.epochs=x: should be a valid integer"),
        (["train", "cifar10"], "data.root is not set"),
        (["train", "cifar10", "data.root=/nowhere"], "eit: /nowhere is not a folder"),
        (["eval", "gone.pth", "--data", "x"], "no weights at gone.pth"),
        (["predict", "gone", "x.png"], "no such image: x.png"),
        (["convert", "gone.pth", "x.safetensors"], "no weights at gone.pth"),
        (["convert", "gone.pth", "x.bin"], "x.bin: the file to write ends in .safetensors"),
        (["data", "check", "/nowhere"], "/nowhere is not a folder"),
        (["eval", "gone", "--precision", "int8"], "--precision int8: one of auto, fp32, tf32, bf16, fp16 is expected"),
        (["eval", "gone", "--confusion", "x.jpg"], "--confusion x.jpg: a name that ends in .png, .pdf, .svg or .csv"),
        (["eval", "gone", "--confusion", "no/x.png"], "--confusion no/x.png: there is no folder no"),
        (
            ["eval", "gone", "--confusion", "x.png", "--size", "8", "--size", "9"],
            "--confusion x.png is of one size and crop ratio; 2 combinations are asked for",
        ),
        (["train", "cifar10", "data.root=.", "data.dataset=wdss/x"], "data.dataset=wdss/x; did you mean 'wds'?"),
        (["recipes", "show", "digit"], "unknown recipe 'digit'; did you mean 'digits'?"),
        (["recipes", "digits"], "No such command 'digits'; a recipe is shown by: recipes show digits"),
        (["train", "cifar10", "data.root=sklearn:iris"], "sklearn:iris is not a folder (sklearn:digits is the one"),
        (["eval", "digits", "--dataset", "pets"], "--dataset pets: a name of timm is expected"),
        (["eval", "digits", "--split", "test"], "--split test is of a data set of timm"),
        (["models", "--plot", "x.png", "--json"], "--plot draws a picture"),
        (["models", "--plot", "x.txt"], "--plot x.txt: a picture ends in .png, .pdf, .svg"),
        (["models", "--plot", "gone/x.png"], "--plot gone/x.png: there is no folder gone"),
        (["data", "show", "cifar10"], "data.root is not set"),
        (["data", "show", "digits", "--out", "x"], "--out x: a picture ends in"),
        (["data", "shard", "/nowhere", "x"], "/nowhere is not a folder"),
        (["data", "prepare", "cifar", "a", "b"], "cifar cannot be prepared: imagenet can"),
        (["data", "prepare", "imagenet", "a", "b"], "a has no ILSVRC2012_devkit_t12.tar.gz"),
        (["eval", "gone", "--device", "gpu"], "device 'gpu' is not one of auto, cpu, mps, cuda, cuda:N"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(tmp_path, words, message):
    error = failed(2, *words, cwd=tmp_path)
    assert error.startswith("eit: ") and message in error and "\n" not in error
    assert not any(tmp_path.iterdir())


def test_mistakes_about_a_trained_model(trained, tmp_path):
    assert "no such image: gone.png" in failed(2, "predict", "runs/mine", "gone.png", cwd=trained)
    (tmp_path / "text.png").write_text("text")
    good = "data/val/digit0/000.png"
    done = run_eit("predict", "runs/mine", tmp_path / "text.png", good, cwd=trained)
    assert (done.returncode, done.stdout.split()[0]) == (2, good)
    assert done.stderr.startswith("eit: ") and "text.png: no image" in done.stderr
    assert "is no run folder" in failed(2, "predict", "data", good, cwd=trained)
    error = failed(2, "eval", "runs/mine", "--size", 16, "--size", 3, cwd=trained)
    assert error == "eit: --size 3: eit_mini makes no token of so few pixels; 4 is the least"
    assert "Invalid value for '--crop-ratio'" in failed(2, "eval", "runs/mine", "--crop-ratio", 1.5, cwd=trained)
    assert "out=data/val/digit0/000.png is a file" in failed(
        2, "train", "cifar10", "data.root=data", f"out={good}", *TINY, cwd=trained
    )
    assert "list on stdin is empty" in failed(2, "predict", "runs/mine", "-", cwd=trained, stdin="")
    save_digits(tmp_path / "other")
    for part in ("train", "val"):
        (tmp_path / "other" / part / "digit1").rename(tmp_path / "other" / part / "eins")
    error = failed(2, "eval", "runs/mine", "--data", tmp_path / "other", cwd=trained)
    assert "classes that the model does not know: eins" in error
    assert "another recipe" in failed(
        2, "train", "cifar10", "data.root=data", "name=mine", *TINY, "seed=1", cwd=trained
    )


def test_classes_are_matched_by_name(trained, tmp_path):
    """A set with a part of the classes is evaluated with the right labels."""
    shutil.copytree(trained / "data" / "val" / "digit2", tmp_path / "digit2")
    whole = json.loads(run_eit("eval", "runs/mine", "--data", "data", "--json", cwd=trained).stdout)
    part = json.loads(run_eit("eval", "runs/mine", "--data", tmp_path, "--json", cwd=trained).stdout)
    assert part["images"] == 4 and part["per_class"]["digit2"] == whole["per_class"]["digit2"]


def test_usage_errors_have_status_2():
    for words, message in (
        (["evaluate"], "No such command 'evaluate'"),
        (["predict"], "Missing argument 'CKPT'; see python -m eit predict -h"),
        (["eval", "x", "--batch-size", "0"], "Invalid value for '--batch-size'"),
        (["train", "digits", "--epochs", "2"], "No such option: --epochs; settings are key=value"),
    ):
        error = failed(2, *words)
        assert message in error and error.startswith("eit: ") and "\n" not in error


def test_help_is_for_people():
    text = run_eit().stdout
    assert text == run_eit("-h").stdout
    assert all(name in text for name in ("train", "eval", "predict", "models", "recipes", "convert", "data"))
    assert "..." not in text.split("Commands")[1]


def test_ctrl_c_while_starting_ends_at_once(tmp_path):
    """Sent into the imports, where an exception would be swallowed by somebody's except."""
    for delay in (0.3, 0.5, 0.9):
        words = [sys.executable, "-m", "eit", "train", "digits"]
        process = subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert process.stderr.read() == "eit: interrupted\n"
