"""The examples run as a user runs them: what they save predicts, and starting from our weights is what helped."""

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models import load_state_dict

import eit
from eit.export.hub import write_folder
from eit.weights.formats import save_weights
from eit.weights.load import INCLUDED, read_card
from tests.helpers.commands import run_eit
from tests.helpers.images import save_digits
from tests.helpers.shared import require

pytestmark = pytest.mark.project
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Four classes of which chance names a quarter; digit10 comes before digit2, but not in timm's order."""
    folder = save_digits(tmp_path_factory.mktemp("examples") / "images", classes=4, train=40, val=15, size=8)
    for part in ("train", "val"):
        (folder / part / "digit3").rename(folder / part / "digit10")
    return folder


def run(*words):
    """What a command says, on either stream. One thread: two wait for each other where others work too."""
    done = subprocess.run(
        list(map(str, words)),
        env=os.environ | dict(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1", PYTHON=sys.executable),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def predicted_top1(out, images):
    """Of the validation images, by `eit predict`."""
    done = run_eit("predict", out, images / "val", "--top", 1)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"/val/(\w+)/\d+\.png +(\w+) [\d.]+%$", done.stdout, re.MULTILINE)
    assert len(found) == 60
    return 100 * sum(truth == label for truth, label in found) / 60


@pytest.mark.parametrize("example", ["hf_trainer", "lightning_module"])
def test_fine_tuning_in_another_librarys_loop(example, images, tmp_path):
    out = tmp_path / "tuned"
    said = run(sys.executable, EXAMPLES / f"{example}.py", images, out, "--epochs", 3)
    reached = re.search(rf"^top-1 ([\d.]+)% of 60 images; next: eit predict {out} IMAGE", said, re.MULTILINE)
    assert reached and float(reached[1]) > 90  # 25 from initial values: the next test
    assert predicted_top1(out, images) == pytest.approx(float(reached[1]), abs=0.01)
    card = read_card(out)
    assert card.classes == ["digit0", "digit1", "digit10", "digit2"]
    assert card.metrics == pytest.approx(dict(val_top1=float(reached[1])), abs=0.01) and card.recipe is None


def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    cells = json.loads((EXAMPLES / "quickstart.ipynb").read_text())["cells"]
    lines = [line for cell in cells if cell["cell_type"] == "code" for line in "".join(cell["source"]).splitlines()]
    command = re.compile(r"^!eit (.*)")
    script = [command.sub(lambda found: f"main({shlex.split(found[1])})", line) for line in lines]
    start = ["import matplotlib, sys", "matplotlib.use('agg')", "from tests.helpers.commands import run_eit"]
    start += ["def main(words): done = run_eit(*words); assert done.returncode == 0, done.stderr"]
    (tmp_path / "notebook.py").write_text("\n".join([*start, *script]))
    environment = dict(PYTHONPATH=os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, "notebook.py"],
        cwd=tmp_path,
        env=os.environ | environment | dict(OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "high-frequency share after each layer: ['0." in done.stdout
    assert (tmp_path / "runs" / "notebook" / "best.safetensors").is_file()


def test_the_same_steps_from_initial_values_learn_nothing(images, tmp_path):
    card = read_card("digits")
    torch.manual_seed(0)
    save_weights(tmp_path / "initial.safetensors", card.create_model().state_dict(), card)
    words = ["--epochs", 3, "--weights", tmp_path / "initial.safetensors"]
    said = run(sys.executable, EXAMPLES / "hf_trainer.py", images, tmp_path / "tuned", *words)
    assert float(re.search(r"^top-1 ([\d.]+)%", said, re.MULTILINE)[1]) < 50


def test_the_lightning_module_slows_down_the_first_layers():
    model = eit.load("digits")
    module = runpy.run_path(str(EXAMPLES / "lightning_module.py"))["FineTune"](model, epochs=3)
    (optimizer,), _ = module.configure_optimizers()
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates[id(model.head.weight)] == pytest.approx(3e-3)
    for i, block in enumerate(model.blocks):
        assert rates[id(block.attn.qkv.weight)] == pytest.approx(3e-3 * 0.75 ** (len(model.blocks) - i))


# train.py cannot be had from a package index. This has the options of it that say what is made of which weights, and
# does with them what it does.
STAND_IN = """
import argparse, importlib
import timm, torch
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.optim import create_optimizer_v2
parser = argparse.ArgumentParser()
for option in ("--data-dir", "--device", "--model", "--output", "--experiment"):
    parser.add_argument(option, required=True)
for option in ("--num-classes", "--in-chans", "--epochs"):
    parser.add_argument(option, type=int, required=True)
parser.add_argument("--device-modules", nargs="+", default=[])
parser.add_argument("--pretrained", action="store_true")
args = parser.parse_known_args()[0]
for module in args.device_modules:
    importlib.import_module(module)
torch.manual_seed(0)
model = timm.create_model(args.model, args.pretrained, num_classes=args.num_classes, in_chans=args.in_chans)
look = resolve_data_config(vars(args), model=model)
dataset = create_dataset("", args.data_dir, split="train")
loader = create_loader(dataset, batch_size=32, is_training=True, no_aug=True, use_prefetcher=False, num_workers=0,
    **{k: look[k] for k in ("input_size", "interpolation", "mean", "std")})
optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05)
for epoch in range(args.epochs):
    for images, labels in loader:
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
best = f"{args.output}/{args.experiment}/model_best.pth.tar"
torch.save(dict(state_dict=model.state_dict(), args=args, epoch=epoch), best)
"""


def test_what_timms_train_script_makes_of_our_weights(images, tmp_path):
    (tmp_path / "train.py").write_text(STAND_IN)
    out = tmp_path / "tuned"
    said = run(EXAMPLES / "timm_train.sh", tmp_path / "train.py", images, out, "--epochs", 3)
    assert said.splitlines()[-1] == f"next: eit predict {out} IMAGE..."
    assert predicted_top1(out, images) > 90
    assert read_card(out).classes == ["digit0", "digit1", "digit2", "digit10"]
    saved, best = load_state_dict(out / "model_best.pth.tar"), load_file(out / "best.safetensors")
    assert saved.keys() == best.keys() and all(torch.equal(saved[k], best[k]) for k in saved)


@pytest.mark.slow
def test_timms_own_train_script(images, tmp_path):
    train_py = os.environ.get("TIMM_TRAIN", "")
    require(bool(train_py), "TIMM_TRAIN does not name the train.py of timm's repository")
    said = run(EXAMPLES / "timm_train.sh", train_py, images, tmp_path / "tuned", "--epochs", 3)
    best = re.search(r"^\*\*\* Best metric: ([\d.]+) \(epoch \d\)$", said, re.MULTILINE)
    assert best and float(best[1]) > 90
    assert predicted_top1(tmp_path / "tuned", images) == pytest.approx(float(best[1]), abs=0.01)


def test_what_the_timm_example_says_of_heads(tmp_path):
    file = INCLUDED["digits"]
    card, state = read_card(file), load_file(file)
    arguments = card.arguments | dict(img_size=card.size)
    for classes in (4, 10):
        overlay = dict(file=str(file), num_classes=-1)  # --pretrained-path
        model = timm.create_model("eit_mini", True, pretrained_cfg_overlay=overlay, num_classes=classes, **arguments)
        for name, value in model.state_dict().items():
            assert name.startswith("head.") != torch.equal(value, state[name]), name
    write_folder("digits", tmp_path)
    for classes in (4, 10):
        model = timm.create_model(f"local-dir:{tmp_path}", True, num_classes=classes)
        for name, value in model.state_dict().items():
            assert torch.equal(value, state[name]) == (classes == 10 or not name.startswith("head.")), name
    same = timm.create_model("eit_mini", checkpoint_path=str(file), num_classes=10, **arguments)  # --initial-checkpoint
    assert all(torch.equal(value, state[name]) for name, value in same.state_dict().items())
    with pytest.raises(RuntimeError, match=r"size mismatch for head\.weight"):
        timm.create_model("eit_mini", checkpoint_path=str(file), num_classes=4, **arguments)


def test_the_timm_example_says_what_it_takes():
    done = subprocess.run([EXAMPLES / "timm_train.sh", "train.py"], capture_output=True, text=True)
    assert done.returncode == 2 and "TRAIN_PY IMAGES OUT" in done.stderr
