"""What README.md and docs/ tell to do is done: each block runs, or NOT_RUN says why it is not; the site builds.

All pages share one folder that has what they name. A command runs as it is written, with a tiny model and few images
added; torchrun's are run as one process. What a command writes is removed before it.
"""

import doctest
import importlib
import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from html import unescape
from importlib.util import find_spec
from pathlib import Path
from textwrap import dedent

import pytest
import timm
import torch
import typer
from PIL import Image
from torch.distributed.run import get_args_parser
from typer.core import TyperGroup

import eit
from eit.analysis import report
from eit.cli.app import app
from eit.config import load_recipe, recipe_names
from eit.data.prepare_imagenet import prepare_imagenet
from eit.errors import UserError
from eit.training.global_batch import out_of_memory_advice
from eit.weights.load import sample_images
from tests.data.test_layouts import RNG, write_idx, write_tiny_imagenet
from tests.data.test_prepare_imagenet import good
from tests.data.test_prepare_imagenet import write as write_archives
from tests.helpers.commands import run_eit
from tests.helpers.images import save_digits
from tests.helpers.shared import require
from tests.helpers.training import TINY

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

# The start of a command, or a block's language -> why it is not run. `eit` is parsed all the same, with its recipe.
NOT_RUN = {
    "```bibtex": "nothing to run",
    "make demo": "installs the package anew",
    "make test": "runs this",
    "make gpu": "needs a GPU; test_gpu_command.py::test_a_dry_run_does_every_part_and_leaves_few_small_files",
    "python benchmarks/pack.py": "minutes; test_pack.py has a small set",
    "apt-get install": "changes the machine",
    "eit export digits": "half a minute; exports of runs/pets are run; "
    "test_exporter.py::test_predictions_and_accuracy_are_those_of_the_weights",
    "eit train photos data.root=data/photos": "needs photos of tools/make_photos.py; test_train.py makes its own",
    "pip install": "changes the environment",
    "uv venv": "changes the environment",
    "#!/bin/bash": "needs Slurm; its signal: test_signals.py::test_slurms_warning_saves_and_ends",
    "eit export runs/pets --int8": "may cost accuracy on so few images; "
    "test_exporter.py::test_int8_is_smaller_and_its_accuracy_is_measured",
    "eit push runs/pets --repo": "needs the hub; test_hub.py::test_pushed_to_the_hub_and_back",
    "eit predict hf-hub:": "needs the hub; test_hub.py::test_pushed_to_the_hub_and_back",
    "python examples/segmentation.py": "minutes; test_dense.py::test_the_example_trains_and_draws",
    "python tests/helpers/chaos.py": "20 minutes; a short form: "
    "test_reliability.py::test_runs_killed_at_random_come_back_identical",
    "eit demo": "serves until Ctrl-C; test_page.py::test_an_example_gives_classes_and_layers",
    "from gradio_client": "needs a page; test_page.py::test_a_program_gets_the_predictions_of_eit_predict",
    "python pets-space/app.py": "serves until Ctrl-C; test_hub.py::test_a_space_predicts_offline",
    "hf upload": "needs the hub",
    "eit bench eit_mini": "minutes; test_bench.py::test_runtimes_batches_and_modes_are_measured",
    "python benchmarks/scale.py": "10 minutes, of measuring",
    "eit bench --self-check": "minutes; test_self_check.py::test_the_choice_is_used_by_later_processes",
    "eit reproduce run small_data --budget s": "minutes to hours; test_runs.py::test_finished_runs_are_kept",
    "eit reproduce tables frequency": "after hours; "
    "test_tables.py::test_tables_come_from_results_alone_without_weights",
    "eit reproduce again": "after a run; test_runs.py::test_a_run_again_is_identical_or_within_the_spread",
    "eit reproduce curve": "after days; test_published.py::test_a_run_is_compared_epoch_by_epoch",
    "python tools/make_digits.py": "needs 40 packages of fonts",
    "eit train digits_in_the_wild": "hours; its result: test_digits.py",
    "python tools/include_digits.py": "after hours; its result: test_digits.py",
    "python tools/release_weights.py": "after hours; test_tables.py::test_weights_are_prepared_for_a_release",
    "eit train cifar100 data.root=data data.download=true": "downloads; "
    "test_layouts.py::test_downloads_go_to_torchvision",
    "eit train cifar10 data.dataset=hfds/": "downloads; test_layouts.py::test_a_hugging_face_set_through_timm",
    "eit train cifar10 data.dataset=torch/": "wants CIFAR's own files; "
    "test_layouts.py::test_a_torchvision_set_through_timm",
    "eit train cifar10 data.dataset=tfds/": "tensorflow-datasets is no dependency",
    "eit train imagenet_mini data.root=imagenet name=student loss.teacher=timm/regnety_160": "downloads 320 MB; "
    "test_loss.py::test_a_timm_teacher_with_a_file_of_weights",
}
# What the pages name that is elsewhere here
ELSEWHERE = {
    "https://bucket.example/imagenet-shards": "imagenet-shards",
    "/path/to/imagenet": "imagenet",
    "/data/imagenet": "imagenet",
    "/usr/share/datasets/fashion-mnist": "fashion-mnist",
    "model.name=timm/resnet50 model.pretrained=true": "model.name=timm/test_resnet model.pretrained=false",
}
# Nothing is fetched, and nothing waits for a network
ALONE = dict(
    CUDA_VISIBLE_DEVICES="",
    OMP_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
    https_proxy="http://127.0.0.1:9",
    TORCH_HOME="cache",
)
# Of blocks with this code, a part of what they print
PRINTED = {"print(found.image, found.labels)": "cat.jpg [('", "field.shape": "torch.Size([5, 5]) (8, 8)"}
TINY_MODEL = [word for word in TINY if word.startswith("model.")]
FEW = ["data.image_size=16", "data.batch_size=8", "data.workers=0", "train.epochs=1", "train.warmup_epochs=0"]


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    text: str

    def commands(self):
        """Of a shell block: its command lines, whole. A script is one command."""
        if self.text.startswith("#!"):
            return [self.text]
        lines = self.text.replace("\\\n", " ").splitlines()
        if self.language == "console":
            lines = [line[2:] for line in lines if line.startswith("$ ")]
        return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def blocks(page):
    text = page.read_text()
    for found in re.finditer(r"^( *)```(\w*)\n(.*?)^\1```$", text, flags=re.DOTALL | re.MULTILINE):
        line = text.count("\n", 0, found.start()) + 1
        yield Block(str(page.relative_to(ROOT)), line, found[2], dedent(found[3]))


def not_run(text):
    """The entries of NOT_RUN that stand for a command, or for ```language."""
    return [start for start in NOT_RUN if text.startswith(start)]


def eit_words(command):
    """The words behind `eit` of each command in a line or a script."""
    for line in command.replace("\\\n", " ").splitlines():
        if found := re.search(r"(?:^|-m )eit (.*)", line):
            yield split(found[1])[0]


def split(command):
    """The words of a command, and the file that its output goes to, if any."""
    words = shlex.split(command, comments=True)
    return (words[:-2], words[-1]) if words[-2:-1] == [">"] else (words, None)


# -- What the pages name ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """The folder in which the pages' commands run: data, weights and runs of the names that they use."""
    world = tmp_path_factory.mktemp("docs")
    pets = save_digits(world / "pets", classes=2, train=8, val=2)
    for part in ("train", "val"):
        for old, new in (("digit0", "cat"), ("digit1", "dog")):
            (pets / part / old).rename(pets / part / new)
    for name in ("train/cat/001.jpg", "train/dog/002.png", "val/cat/101.jpg", "val/dog/102.webp"):
        Image.effect_noise((20, 16), 60).convert("RGB").save(pets / name)
    shutil.copytree(pets / "val", world / "more-pets")
    shutil.copytree(pets / "val" / "cat", world / "photos")
    shutil.copy(pets / "train" / "cat" / "001.jpg", world / "cat.jpg")
    shutil.copy(sample_images("digits")[-1], world / "7.png")
    save_digits(world / "cars", train=4, val=2)
    prepare_imagenet(write_archives(good(), world / "DOWNLOADS"), world / "imagenet")
    write_tiny_imagenet(world / "tiny-imagenet-200")
    (world / "fashion-mnist").mkdir()
    for part, n in (("train", 12), ("t10k", 6)):
        write_idx(world / "fashion-mnist" / f"{part}-images-idx3-ubyte", RNG.integers(0, 256, (n, 28, 28), "u1"), True)
        write_idx(world / "fashion-mnist" / f"{part}-labels-idx1-ubyte", (RNG.permutation(n) % 3).astype("u1"), True)
    for name, family, data in (
        ("eit", "eit", "pets"),
        ("lsra", "lsra", "pets"),
        ("vit", "vit", "pets"),
        ("imagenet", "eit", "imagenet"),
    ):
        run(world, f"eit train cifar10 data.root={data} name={name} model.family={family}")
    for name in ("pets", "pets-large"):
        shutil.copytree(world / "runs" / "eit", world / "runs" / name)
    for name in ("pets-hub", "small-data-smoke-digits-eit"):
        run(world, f"eit push runs/pets --to {name}")
    for name in ("shards", "imagenet-shards"):
        run(world, f"eit data shard imagenet {name}")
    torch.save({"model": eit.create_model("eit_mini", num_classes=3).state_dict()}, world / "best_checkpoint.pth")
    torch.save(timm.create_model("vit_tiny_patch16_224").state_dict(), world / "vit_tiny.pth")
    (world / "names.txt").write_text("cat\ndog\nowl\n")
    analysis = world / "results" / "analysis"
    shutil.copytree(ROOT / "results" / "analysis", analysis)
    for i, folder in enumerate(sorted((analysis / "images").iterdir())):
        for image in sorted(folder.iterdir())[1:]:
            image.unlink()
        if i > 3:
            shutil.rmtree(folder)
    (world / "tests").symlink_to(ROOT / "tests")
    return world


# -- Running them -----------------------------------------------------------------------------------------------------


def run(world, command):
    """Run a command line in the folder `world`; raise where it fails."""
    for theirs, ours in ELSEWHERE.items():
        command = command.replace(theirs, ours)
    words, file = split(command)
    if words[0] == "torchrun":
        words = words[words.index("-m") + 1 :]
    if words[0] == "eit":
        words = small(words[1:])
        for made in writes(words, world):
            shutil.rmtree(made, ignore_errors=True)
        done = run_eit(*words, cwd=world, env=ALONE, timeout=120)
        if done.returncode:
            raise AssertionError(f"status {done.returncode} of: {command}\n{done.stdout}{done.stderr}")
        if file:
            (world / file).write_text(done.stdout)
    else:
        assert words[0] == "python", f"nothing runs {words[0]}: add it here, or to NOT_RUN"
        finish(command, start_python(world, *words[1:]))


def small(words):
    """The words of a command, with few images and a tiny model, where they name no other one."""
    match words:
        case ["train", recipe, *given]:
            model = [] if any(word.startswith("model.name=") for word in given) else TINY_MODEL
            return ["train", recipe, *model, *given, *FEW]
        case ["data", "show", *_] | ["finetune", *_]:
            return [*words, *FEW]
        case ["lr", recipe, *given]:
            return ["lr", recipe, *TINY_MODEL, *given, *FEW, "--steps", "10"]
        case ["data", "shard", *_]:
            return [*words, "--count", "2", "--val-count", "1"]
        case ["eval", *_]:
            words = [{"224": "48", "288": "64"}.get(word, word) for word in words]
            return [*words, "--workers", "0", "--batch-size", "2"]  # a batch is filled up: 64 would cost as many
        case ["bench", *_]:
            quick = ["--no-memory", "--rounds", "1", "--batch-size", "1", "--precision", "fp32", "--runtime", "eager"]
            return [*words, *quick]
        case ["analyze", *_]:
            few = [] if "results/analysis/images" in words else ["--images", "2", "--pictures", "1"]
            size = ["--size", "64"] if "eit_mini" in words else []
            return [*words, *few, *size, "--workers", "0"]
    return words


def writes(words, world):
    """The folders that a command makes anew."""
    match words:
        case ["train", recipe, *given] if recipe in recipe_names():
            return [world / load_recipe(recipe, given).run_folder()]
        case ["train", recipe, *given]:
            return [world / load_recipe(str(world / recipe), given).run_folder()]
        case ["finetune", folder, *_]:
            return [world / "runs" / folder]
        case ["data", "shard", _, target, *_] | ["data", "prepare", _, _, target, *_]:
            return [world / target]
    return []


def start_python(world, *arguments):
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=world,
        env=os.environ | ALONE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(command, process):
    """What a started process printed; raise where it fails."""
    out, err = process.communicate(timeout=120)
    if process.returncode:
        raise AssertionError(f"status {process.returncode} of: {command}\n{out}{err}")
    return out


def named(text):
    """The paths that a drawing of a folder names, with * for the letters that stand for a number."""
    root, *lines = text.splitlines()
    words = re.findall(r"(?<!\S)[\w./-]+/|(?<![\w.])\w[\w-]*\.(?:html|jsonl?|png|safetensors|yaml)\b", "\n".join(lines))
    return [root + re.sub(r"\bN\b", "*", word) for word in words]


def run_block(world, block, done):
    """Do what the block tells, unless it is Python, but for the commands that are in `done`."""
    if block.language in ("bash", "console"):
        syntax = subprocess.run(["bash", "-n"], input="\n".join(block.commands()), capture_output=True, text=True)
        assert not syntax.stderr, syntax.stderr
        for command in block.commands():
            plain = " ".join(shlex.split(command, comments=True))
            if plain.startswith("eit analyze"):
                plain = plain.removesuffix(" --out report")  # the same pages by another name
            if not not_run(command) and plain not in done:
                done.add(plain)
                run(world, command)
    elif block.language == "yaml":
        (world / "block.yaml").write_text(block.text)
        load_recipe(str(world / "block.yaml"))
    elif block.text.startswith("eit: "):
        assert block.text.strip() in MESSAGES
    elif block.text.partition("\n")[0].endswith("/"):
        found = named(block.text)
        missing = [name for name in found if not any(world.glob(name))]
        assert found and not missing, f"not there: {', '.join(missing)}"
    elif not block.language:
        missing = [word for word in block.text.split() if not (world / word).is_file()]
        assert not missing, f"not there: {', '.join(missing)}"
    elif block.language != "python":
        assert not_run(f"```{block.language}"), f"nothing runs ```{block.language}: add it here, or to NOT_RUN"


MESSAGES = [f"eit: {out_of_memory_advice(load_recipe('cifar10', ['data.batch_size=512', 'data.image_size=224']))}"]
DONE: set[str] = set()


@pytest.mark.project
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_of_a_page_runs(page, world, monkeypatch):
    faults = []
    draw = report.figures
    # Drawing takes most of the time of `eit analyze`; those of many models are drawn
    monkeypatch.setattr(report, "figures", lambda measured: draw(measured) if len(measured) > 5 else [])

    def attempt(block, action, *arguments):
        try:
            action(*arguments)
        except (AssertionError, UserError, ValueError, subprocess.TimeoutExpired) as error:
            faults.append(f"{block.page}:{block.line}: {error}")

    found = list(blocks(page))
    for block in found:
        attempt(block, run_block, world, block, DONE)
    # Last, and side by side, for most of their time goes into imports
    python = [block for block in found if block.language == "python" and not not_run(block.text)]
    started = [(block, start_python(world, "-c", block.text)) for block in python]
    for block, process in started:
        attempt(block, check_printed, block, process)
    assert not faults, "\n\n".join(faults)


def check_printed(block, process):
    out = finish("python", process)
    for code, printed in PRINTED.items():
        assert code not in block.text or printed in out, out


def test_every_fence_belongs_to_a_block():
    for page in PAGES:
        assert 2 * len(list(blocks(page))) == len(re.findall(r"^ *```", page.read_text(), re.MULTILINE)), page.name


def test_what_is_not_run_stands_in_a_page_and_names_tests_that_exist():
    found = [block for page in PAGES for block in blocks(page)]
    texts = [f"```{block.language}" for block in found]
    texts += [c for block in found if block.language in ("bash", "console") for c in block.commands()]
    texts += [block.text for block in found if block.language == "python"]
    used = {start for text in texts for start in not_run(text)}
    assert used == set(NOT_RUN)
    assert_tests_exist(" ".join(NOT_RUN.values()))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_its_commands_exist_and_its_recipes_are_valid(page):
    for block in blocks(page):
        for line in block.commands() if block.language in ("bash", "console") else ():
            if found := re.search(r"torchrun (.*?) -m eit ", line.replace("\\\n", " "), re.DOTALL):
                get_args_parser().parse_args([*shlex.split(found[1]), "script"])
            for words in eit_words(line):
                parse(words)
    for found in re.finditer(r"`eit ([a-z]+(?: [a-z-]+)?)", page.read_text()):
        resolve(found[1].split())


def resolve(words):
    """The command that words begin with, as the program finds it, and the words behind it."""
    command, context = typer.main.get_command(app), None
    while isinstance(command, TyperGroup) and words:
        context = command.make_context("eit", [words[0]], parent=context)
        command, words = command.commands[words[0]], words[1:]
    return command, context, words


def parse(words):
    """Parse a command as the program does, and check its recipe; raise where it would be refused."""
    command, context, words = resolve(words)
    given = command.make_context("eit", list(words), parent=context).params
    if given.get("overrides") and given.get("recipe") != "mine.yaml":
        load_recipe(given.get("recipe", "photos"), given["overrides"])


# -- What the pages say of tests --------------------------------------------------------------------------------------


def assert_tests_exist(text):
    for file, name in re.findall(r"\b(test_\w+\.py)::(\w+)", text):
        texts = [path.read_text() for path in (ROOT / "tests").rglob(file)]
        assert any(f"\ndef {name}(" in text for text in texts), f"{file}::{name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_tests_that_a_page_names_exist(page):
    assert_tests_exist(page.read_text())


def test_every_promise_of_a_run_names_its_tests():
    rows = re.findall(r"^\| (?!---|what happens|file).*$", (ROOT / "docs" / "reliability.md").read_text(), re.MULTILINE)
    assert len(rows) >= 25 and all(".py::test_" in row for row in rows)


# -- The site ---------------------------------------------------------------------------------------------------------

PUBLIC = {f"eit.{name}": f"eit.{module}.{name}" for name, module in eit._PUBLIC.items()}
PUBLIC |= {
    name: name
    for name in (
        "eit.inference.predict.Prediction",
        "eit.inference.evaluate.Metrics",
    )
}


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    require(find_spec("mkdocstrings") is not None, "mkdocs-material and mkdocstrings are not installed")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        env=os.environ | dict(NO_MKDOCS_2_WARNING="1"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    return folder


@pytest.mark.project
@pytest.mark.parametrize("name", PUBLIC)
def test_the_site_has_the_signature_and_the_words_of_every_public_name(site, name):
    whole = (site / "api.html").read_text()
    found = re.search(rf'<h3 id="{re.escape(PUBLIC[name])}".*?(?=<h[23] id|</article>)', whole, re.DOTALL)
    assert found, f"{name} is not on the page"
    section = unescape(re.sub(r"<[^>]*>", "", found[0])).strip()
    module, _, plain = PUBLIC[name].rpartition(".")
    public = getattr(importlib.import_module(module), plain)
    assert section.startswith(name)
    assert " ".join(inspect.getdoc(public).splitlines()[0].replace("`", "").split()) in " ".join(section.split())
    if public is not UserError:
        assert not {p for p in inspect.signature(public).parameters if not re.search(rf"\b{p}\b", section)}


def references(page):
    """(tag, attributes, address) of what a page of the site links to or loads."""
    html = re.sub(r"<pre.*?</pre>", "", page.read_text(), flags=re.DOTALL)
    for tag, attributes in re.findall(r"<(\w+)((?:\s[^<>]*)?)>", html):
        for address in re.findall(r'\s(?:src|href)="?([^"\s>]+)', attributes):
            yield tag, attributes, unescape(address)


@pytest.mark.project
def test_the_site_shows_the_figures_of_the_readme_and_its_links_lead_somewhere(site):
    shown = re.findall(r"!\[[^]]*\]\(([^)]+)\)", PAGES[0].read_text())
    images = [address for tag, _, address in references(site / "index.html") if tag == "img"]
    assert [Path(address).name for address in images if address.endswith(".png")] == [Path(p).name for p in shown]
    for page in site.rglob("*.html"):
        for _, _, address in references(page):
            if not re.match(r"[a-z]+:|#", address) and page.name != "404.html":
                assert (page.parent / address.partition("#")[0].partition("?")[0]).is_file(), f"{page.name}: {address}"


@pytest.mark.project
def test_the_site_has_tables_and_lists_where_the_pages_have_them(site):
    for page in PAGES:
        path = page.relative_to(ROOT / "docs") if page.is_relative_to(ROOT / "docs") else Path("index.md")
        html = (site / path.with_suffix(".html")).read_text()
        html = re.sub(r"<pre.*?</pre>", "", html, flags=re.DOTALL)
        assert html.count("<table>") >= len(re.findall(r"^\| ---", page.read_text(), re.MULTILINE)), page.name
        lost = re.search(
            r"<p>(?:(?!</p>).)*\n(?:- |\d\. |\| )[^\n]*", html, re.DOTALL
        )  # GitHub wants no empty line before
        assert not lost, f"{page.name}: {lost[0]}"


@pytest.mark.project
def test_no_page_of_the_site_loads_anything_from_another_host(site):
    for page in site.rglob("*.html"):
        for tag, attributes, address in references(page):
            if tag != "a" and not (tag == "link" and 'rel="canonical"' in attributes):
                assert not re.match(r"(?:https?:)?//", address), f"{page.name} loads {address}"
        assert not re.search(r"@import|url\(['\"]?(?:https?:)?//", page.read_text()), page.name
    for sheet in site.rglob("*.css"):
        assert not re.search(r"@import|url\(['\"]?(?:https?:)?//", sheet.read_text()), sheet.name


@pytest.mark.project
def test_the_site_has_no_helper_of_the_pages(site):
    assert not [file for file in site.glob("*.py")]


@pytest.mark.parametrize("module", sorted({"config", *eit._PUBLIC.values()}))
def test_the_examples_of_docstrings_run(module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # one of them trains
    assert not doctest.testmod(importlib.import_module(f"eit.{module}")).failed
