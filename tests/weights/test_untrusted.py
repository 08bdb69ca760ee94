"""Files of strangers: refused, or harmless. Malicious pickles are in test_checkpoint, test_state and test_readers."""

import json
import os
import struct

import numpy as np
import pytest
import safetensors.torch
import torch
import typer.testing
import yaml
from PIL import Image

import eit
from eit import plain_yaml
from eit.cli.app import app
from eit.config import load_recipe
from eit.data.datasets import open_data
from eit.data.folders import list_images
from eit.weights.formats import save_weights
from eit.weights.load import load
from tests.helpers.commands import run_eit
from tests.helpers.images import save_digits
from tests.helpers.training import TINY
from tests.weights.test_load import SMALL, card

# -- Headers that lie


def safetensors_of(header, data=b""):
    text = json.dumps(header).encode() if isinstance(header, dict) else header
    return struct.pack("<Q", len(text)) + text + data


TENSOR = dict(dtype="F32", shape=[2], data_offsets=[0, 8])


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 2**63) + b"{}",  # a header of exabytes
        struct.pack("<Q", 2**40) + b"{}",
        safetensors_of(dict(w=TENSOR | dict(shape=[2**40], data_offsets=[0, 2**42]))),  # a tensor of terabytes
        safetensors_of(dict(w=TENSOR | dict(shape=[2**62, 8]))),  # that overflows
        safetensors_of(dict(w=TENSOR | dict(data_offsets=[8, 0])), bytes(8)),
        safetensors_of(dict(w=TENSOR | dict(data_offsets=[-8, 0])), bytes(8)),
        safetensors_of(dict(w=TENSOR, v=TENSOR), bytes(8)),  # two tensors in one place
        safetensors_of(dict(w=TENSOR), bytes(7)),
        safetensors_of(dict(w=TENSOR), bytes(80)),
        safetensors_of(b"[" * 100_000),
        safetensors_of(b'{"w": {"dtype": "F32"'),
        safetensors_of(b"\xff\xfe"),
        b"",
        b"\0" * 8,
    ],
    ids=lambda content: repr(content[:40]),
)
def test_a_safetensors_file_with_a_lying_header_is_one_line(tmp_path, content):
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(eit.UserError, match=r"w\.safetensors") as error:
        load(tmp_path / "w.safetensors")
    assert "\n" not in str(error.value)


def test_a_description_of_a_model_that_does_not_fit_its_tensors_allocates_nothing(tmp_path):
    """A few bytes that ask for a model of terabytes."""
    big = card(arguments=SMALL_ARGUMENTS | dict(embed_dim=65_536, depth=1000, num_heads=1))
    save_weights(tmp_path / "w.safetensors", dict(head=torch.zeros(1)), big)
    with pytest.raises(eit.UserError, match="does not fit the model"):
        load(tmp_path / "w.safetensors")


SMALL_ARGUMENTS = {k: v for k, v in SMALL.items() if k != "img_size"}


# -- Recipes


@pytest.mark.parametrize(
    "text",
    [
        "name: !!python/object/apply:os.mkdir [ran]",
        "name: !!python/name:os.mkdir",
        "model: !!python/object/new:os.mkdir [ran]",
        "name: !custom x",
        "a: &a [x]\nb: &b [*a, *a, *a]\n",
        "a: &a\n  b: *a\n",
    ],
)
def test_a_recipe_with_tags_or_anchors_runs_nothing(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(eit.UserError) as error:
        load_recipe("r.yaml")
    assert "\n" not in str(error.value) and not (tmp_path / "ran").exists()
    done = run_eit("train", "r.yaml", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("eit: ") and done.stderr.count("\n") == 1


def test_a_recipe_of_nested_anchors_that_would_fill_the_memory_ends_at_once(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    (tmp_path / "r.yaml").write_text("\n".join(lines))
    done = run_eit("train", tmp_path / "r.yaml", cwd=tmp_path, timeout=30)
    assert done.returncode == 2 and len(done.stderr) < 500, done.stderr[:500]


# -- Names


NAMES = [
    "..",
    "../../etc/passwd",
    "a/b",
    "[red]cat[/red]",
    "[/]",
    "\x1b[2J\x1b]0;title\x07",
    "a\nb",
    "%s {x} $HOME",
    "<b>",
]


def call(capsys, *words, status=0):
    """What the command prints, in this process; nothing that moves a terminal's cursor."""
    found = typer.testing.CliRunner().invoke(app, list(map(str, words)))
    assert found.exit_code == status, found.output
    output = found.output + "".join(capsys.readouterr())
    assert "\x1b" not in output
    return found.stdout


def test_class_names_with_separators_or_markup_are_names_and_nothing_else(tmp_path, monkeypatch, capsys):
    """From weights, which are a stranger's: shown by predict, eval and its tables, with nothing written elsewhere."""
    model = eit.create_model("eit_mini", num_classes=len(NAMES), **SMALL)
    save_weights(tmp_path / "w.safetensors", model.state_dict(), card(classes=NAMES, guessed=("classes",)))
    pixels = np.zeros((16, 16, 3), np.uint8)
    for i in range(len(NAMES)):
        (tmp_path / "data" / f"class{i}").mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / "data" / f"class{i}" / "x.png")
    monkeypatch.chdir(tmp_path)
    shown = call(capsys, "predict", "w.safetensors", "data", "--top", "9")
    assert "../../etc/passwd" in shown and "[red]cat[/red]" in shown and "[/]" in shown
    assert len(shown.splitlines()) == len(NAMES)
    lines = call(capsys, "predict", "w.safetensors", "data", "--json", "--top", "9").splitlines()
    assert [{label["label"] for label in json.loads(line)["labels"]} for line in lines] == [set(NAMES)] * len(NAMES)
    before = {p for p in tmp_path.rglob("*") if p.is_file()}
    for file in ("m.png", "m.csv"):
        call(capsys, "eval", "w.safetensors", "--data", "data", "--confusion", file, "--workers", "0")
    after = {p for p in tmp_path.rglob("*") if p.is_file()}
    assert after - before == {tmp_path / "m.png", tmp_path / "m.csv"}


def test_folders_named_like_markup_train_and_are_shown_as_they_are(tmp_path, monkeypatch, capsys):
    folder = save_digits(tmp_path / "data")
    names = ["[red]", "[bold]", "\x1b[2J"]
    for part in ("train", "val"):
        for i, name in enumerate(names):
            (folder / part / f"digit{i}").rename(folder / part / name)
    monkeypatch.chdir(tmp_path)
    call(capsys, "train", "cifar10", *TINY, "data.root=data", "out=run")
    assert "[red]" in call(capsys, "eval", "run", "--confusion", "m.png", "--workers", "0")
    (folder / "train" / "[red]" / "[bold]\x1b[2J.png").write_bytes(b"nothing")
    assert "[bold]" in call(capsys, "data", "check", "data", status=1)


# -- Links, and files that are none


def test_a_link_out_of_the_data_folder_shows_nothing_of_what_is_there(folder, tmp_path):
    """A link to an image is an image, as in many subsets of ImageNet; one to anything else is an unreadable one."""
    secret = tmp_path / "secret.txt"
    secret.write_text("password 1234")
    (folder / "train" / "digit0" / "link.png").symlink_to(secret)
    (folder / "train" / "digit1" / "link.png").symlink_to(folder / "val" / "digit1" / "000.png")
    (folder / "train" / "digit1" / "gone.png").symlink_to(tmp_path / "gone.png")
    train_images, _ = open_data(load_recipe("cifar10", [f"data.root={folder}"]).data)
    read, faults = 0, []
    for i in range(len(train_images)):
        try:
            train_images.read(i, 3)
            read += 1
        except eit.data.images.UnreadableImage as error:
            faults.append(str(error))
    assert read == 37
    assert len(faults) == 2 and "link.png: no image" in faults[0] and "gone.png: No such file" in faults[1]
    assert "1234" not in "".join(faults)
    assert secret.read_text() == "password 1234"


def test_links_in_a_circle_end(folder):
    inside = folder / "train" / "digit0"
    before = list_images(inside).files
    (inside / "itself").symlink_to(inside)
    (inside / "above").symlink_to(folder / "train")
    (inside / "root").symlink_to("/")
    (inside / "broken").symlink_to("nowhere")
    assert list_images(inside).files == before
    other = folder / "val" / "digit0"  # beside it, links are followed
    (inside / "more").symlink_to(other)
    assert len(list_images(inside).files) == len(before) + len(list_images(other).files)
    for name in "abc":  # in turn from one to the other
        (other / name).symlink_to(inside)
        (inside / name).symlink_to(other)
    assert len(list_images(inside).files) < 100


def test_a_pipe_named_like_an_image_is_not_waited_for(folder):
    os.mkfifo(folder / "val" / "digit0" / "pipe.png")
    _, val = open_data(load_recipe("cifar10", [f"data.root={folder}"]).data)
    number = next(i for i, name in enumerate(val.names) if name.endswith("pipe.png"))
    with pytest.raises(eit.data.images.UnreadableImage, match="pipe.png: no regular file"):
        val.read(number, 3)


def test_the_last_of_yaml_stays_safe():
    """The loader of recipes makes text, lists and mappings alone."""
    with pytest.raises(eit.UserError, match="tag"):
        plain_yaml.read_yaml("a: !!python/object/apply:os.system ['true']", dict[str, str])
    assert issubclass(plain_yaml.Loader, yaml.constructor.BaseConstructor)
    assert not issubclass(plain_yaml.Loader, yaml.constructor.SafeConstructor)


def test_weights_of_nothing_are_refused(tmp_path):
    safetensors.torch.save_file({}, tmp_path / "w.safetensors")
    with pytest.raises(eit.UserError, match="holds no weights"):
        load(tmp_path / "w.safetensors")
