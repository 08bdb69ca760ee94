"""Shards: the same batches as the folder they were written from, and every sample once where they come in turn."""

import json
import pickle
import struct
import tarfile
import threading
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eit
from eit import distributed, streams
from eit.checkpoint import read_card, save_weights
from eit.config import Augment, Data, load_recipe
from eit.data import open_data, open_evaluation
from eit.errors import UserError
from eit.evaluate import evaluate
from eit.images import View
from eit.loader import evaluation_loader, train_loader
from eit.plan import Plan
from eit.readers import INFO, ImageStream
from eit.shard import write_shards
from eit.streams import StreamLoader
from eit.train import train
from tests.conftest import TINY, require, run_eit, save_digits
from tests.test_train import log, same, train_until_killed, weights

CPU = torch.device("cpu")
VIEW = View(16, 16, "bicubic", (0.5,) * 3, (0.5,) * 3)


def shards_of(folder, count=4, val_count=2):
    out = folder.parent / f"shards{count}"
    write_shards(*open_data(Data(root=str(folder))), out, count, val_count)
    return out


def everything(loader, epoch=0):
    loader.prepare()
    return [(x, y) for x, y, _ in loader.epoch(epoch)]


def one_colour(folder, count=40):
    """A folder whose images can be told apart: image i is of colour i."""
    for part, n in (("train", count), ("val", 10)):
        for i in range(n):
            file = folder / part / f"class{i % 2}" / f"{i:03d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), (i, i, i)).save(file)
    return folder


def numbers(x):
    """Which images of `one_colour` a normalised batch holds."""
    return ((x[:, 0, 8, 8] * 0.5 + 0.5) * 255).round().int().tolist()


# -- With random access


@pytest.mark.parametrize("augment", [Augment(pad_crop=1, hflip=0.5), Augment(crop_scale=(0.5, 1.0), erasing=0.5)])
def test_shards_and_folder_give_identical_batches(folder, augment):
    (folder / "train" / "digit0" / "a.b.jpeg").write_bytes((folder / "train" / "digit0" / "000.png").read_bytes())
    with Image.open(folder / "train" / "digit0" / "001.png") as image:
        image.save(folder / "train" / "digit0" / "c.bmp")
    sources = Data(root=str(folder)), Data(root=str(shards_of(folder)))
    (train_a, val_a), (train_b, val_b) = map(open_data, sources)
    assert train_a.digest() == train_b.digest() and val_a.digest() == val_b.digest()
    plan = Plan(len(train_a), 4, 1, 1, 1, 0)
    batches = [everything(train_loader(t, VIEW, plan, Data(workers=0), augment, CPU)) for t in (train_a, train_b)]
    assert len(batches[0]) == 9
    for (x, y), (u, v) in zip(*batches, strict=True):
        assert torch.equal(x, u) and torch.equal(y, v)
    for (_, a), (_, b) in zip(*(evaluation_loader(v, VIEW, 5, 0, CPU) for v in (val_a, val_b)), strict=True):
        assert torch.equal(a.images, b.images)


def test_a_run_moves_from_the_folder_to_the_shards(folder, monkeypatch):
    def recipe(root, out):
        return load_recipe("cifar10", [*TINY, f"data.root={root}", f"out={folder.parent / out}"])

    whole = recipe(folder, "whole")
    train(whole)
    train_until_killed(recipe(folder, "moved"), 5, monkeypatch)
    moved = recipe(shards_of(folder), "moved")
    train(moved)
    assert same(weights(whole.run_folder()), weights(moved.run_folder()))


def test_arrays_and_members_can_be_sharded_too(folder, tmp_path):
    digits = open_data(Data(root="sklearn:digits"))
    write_shards(*digits, tmp_path / "a", 3, 1)
    again = open_data(Data(root=str(tmp_path / "a")))
    write_shards(*again, tmp_path / "b", 2, 1)
    for images in (again[0], open_data(Data(root=str(tmp_path / "b")))[0]):
        assert images.digest() == digits[0].digest()
        assert np.array_equal(np.asarray(images.read(7, 1)), digits[0].sources[7])


def test_a_stopped_writer_goes_on_and_writes_the_same(folder, monkeypatch):
    whole = shards_of(folder)
    from eit import shard

    original, calls = shard._write_shard, []

    def stopping(file, images, indices):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(file.name)
        original(file, images, indices)

    out = folder.parent / "stopped"
    pair = open_data(Data(root=str(folder)))
    monkeypatch.setattr(shard, "_write_shard", stopping)
    with pytest.raises(KeyboardInterrupt):
        write_shards(*pair, out, 4, 2)
    assert not (out / INFO).exists()
    with pytest.raises(UserError, match="holds other shards"):
        write_shards(*pair, out, 5, 2)
    monkeypatch.setattr(shard, "_write_shard", lambda *a: (calls.append(a[0].name), original(*a)))
    write_shards(*pair, out, 4, 2)
    assert len(calls) == len(set(calls)) == 6
    for file in whole.glob("*.tar"):
        assert file.read_bytes() == (out / file.name).read_bytes()
    assert write_shards(*pair, out, 4, 2)["shards"] == 6 and len(calls) == 6  # complete already


def test_a_folder_with_something_in_it_is_left_alone(folder):
    with pytest.raises(UserError, match="holds something else: give a new folder"):
        write_shards(*open_data(Data(root=str(folder))), folder, 4, 2)


def test_an_unfinished_folder_is_named(folder):
    out = shards_of(folder)
    (out / INFO).unlink()
    with pytest.raises(UserError, match=r"_info\.json is missing: eit data shard, which writes it last, did not end"):
        open_data(Data(root=str(out)))


def test_odd_images_are_stored_too_and_unreadable_ones_named(folder):
    train = folder / "train" / "digit0"
    Image.new("CMYK", (16, 16), (10, 20, 30, 40)).save(train / "ink.tif")
    images = open_data(Data(root=str(folder)))[0]
    again = open_data(Data(root=str(shards_of(folder))))[0]
    i = images.names.index("digit0/ink.tif")
    assert again.names[i] == images.names[i] and again.read(i, 3).tobytes() == images.read(i, 3).tobytes()
    (train / "bad.bmp").write_bytes(b"BM")
    with pytest.raises(UserError, match=r"digit0/bad\.bmp cannot be read, and so not put into a shard"):
        shards_of(folder, 3)


def damage_info(root):
    (root / INFO).write_text("{}")


def lose_a_shard(root):
    (root / "train-00002.tar").unlink()


def truncate(root):
    file = root / "train-00001.tar"
    file.write_bytes(file.read_bytes()[:3000])


def empty(root):
    with tarfile.open(root / "train-00001.tar", "w"):
        pass


def no_tar(root):
    (root / "train-00001.tar").write_bytes(b"x" * 2000)


def other_class(root):
    info = json.loads((root / INFO).read_text())
    (root / INFO).write_text(json.dumps(info | dict(classes=["a", "b"])))


def no_label(root):
    with tarfile.open(root / "train-00001.tar", "a") as tar:
        tar.addfile(tarfile.TarInfo("7.png"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_info, "_info.json does not describe"),
        (lose_a_shard, "train-00002.tar cannot be read: No such file"),
        (truncate, "train-00001.tar has 1 samples, _info.json says 9"),
        (empty, "train-00001.tar has 0 samples, _info.json says 9"),
        (no_tar, "train-00001.tar cannot be read: "),
        (other_class, "is of class 2, _info.json has 2"),
        (no_label, "sample 7 has no image, or no class number in 7.cls"),
    ],
)
def test_damaged_shards_are_one_line(folder, damage, message):
    root = shards_of(folder)
    damage(root)
    with pytest.raises(UserError) as error:
        open_data(Data(root=str(root)))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_more_shards_than_images(folder):
    for counts, message in (((37, 2), "37 shards for 36 images of train: set --count 36"), ((3, 13), "--val-count 12")):
        with pytest.raises(UserError, match=message):
            shards_of(folder, *counts)
        assert not (folder.parent / f"shards{counts[0]}").exists()


# -- In turn, through webdataset and timm's reader


def require_webdataset():
    require(find_spec("webdataset") is not None, "webdataset is not installed")


@pytest.fixture
def streamed(tmp_path):
    require_webdataset()
    return Data(root=str(shards_of(one_colour(tmp_path / "colours"))), dataset="wds/colours", workers=0)


def test_webdataset_itself_reads_the_shards(streamed):
    import webdataset

    info = json.loads(Path(streamed.root, INFO).read_text())
    files = [f"{streamed.root}/{name}" for name in info["splits"]["train"]["filenames"]]
    samples = list(webdataset.WebDataset(files, shardshuffle=False).decode("pil"))
    assert len(samples) == sum(info["splits"]["train"]["shard_lengths"]) == 40
    assert all(s["cls"] == s["png"].getpixel((0, 0))[0] % 2 and s["json"]["name"].endswith(".png") for s in samples)


def stream(config, epoch=0, world=1, rank=0, batch=5, first_step=0, seed=0):
    images, _ = open_data(config)
    assert isinstance(images, ImageStream) and images.classes == ["class0", "class1"] and len(images) == 40
    plan = Plan(40, batch, 1, world, 1, seed)
    loader = train_loader(images, VIEW, plan, config, Augment(), CPU)
    assert isinstance(loader, StreamLoader)
    loader.prepare()
    return [numbers(x) for x, _, _ in loader.epoch(epoch, first_step)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_gives_every_sample_once_an_epoch_in_an_order_of_counters(streamed, workers):
    config = streamed.model_copy(update=dict(workers=workers))
    first = stream(config)
    assert sorted(chain(*first)) == list(range(40))
    torch.manual_seed(3)
    assert stream(config) == first
    assert stream(config, epoch=1) != first and sorted(chain(*stream(config, epoch=1))) == list(range(40))
    assert stream(config, seed=1) != first
    assert stream(config, first_step=3) == first[3:]


def test_worker_processes_are_sent_no_loader(streamed, monkeypatch):
    sent = []
    monkeypatch.setattr(streams, "DataLoader", lambda turn, **_: sent.append(turn) or [])
    with pytest.raises(UserError, match="ended after 0 of 8 batches"):
        stream(streamed)
    prepare = pickle.dumps(sent[0].prepare)
    assert b"ImageTransform" in prepare and not any(
        n in prepare for n in (b"StreamLoader", b"Normaliser", b"BadImages")
    )


def test_a_stream_is_evaluated_once_a_sample_on_any_number_of_ranks(streamed, monkeypatch):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 2))
    folder_val = open_evaluation(Data(root=streamed.root))
    expected = evaluate(model, evaluation_loader(folder_val, VIEW, 4, 0, CPU))
    val = open_evaluation(streamed)
    for workers in (0, 2):
        found = evaluate(model, evaluation_loader(val, VIEW, 4, workers, CPU))
        assert (found.confusion, found.images) == (expected.confusion, 10)
        assert found.loss == pytest.approx(expected.loss)
    for world in (2, 3):
        monkeypatch.setattr(distributed, "world_size", lambda world=world: world)
        seen = Counter()
        for rank in range(world):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            for _, batch in evaluation_loader(val, VIEW, 4, 0, CPU):
                seen.update(numbers(batch.images))
        assert seen == Counter(range(10))


def test_a_webdataset_run_over_two_processes_sees_every_sample(streamed, tmp_path):
    """torchrun; every rank writes down which images it trained on."""
    watch = tmp_path / "watch"
    (watch / "eit_watch").mkdir(parents=True)
    (watch / "sitecustomize.py").write_text(
        "import os, builtins\n"
        "if 'RANK' in os.environ:\n"
        "    import eit.streams as streams, json\n"
        "    original = streams.StreamLoader.epoch\n"
        "    def epoch(self, epoch, first_step=0):\n"
        "        for batch in original(self, epoch, first_step):\n"
        "            numbers = ((batch.images[:, 0, 8, 8] * 0.5 + 0.5) * 255).round().int().tolist()\n"
        f"            with open('{tmp_path}/seen-' + os.environ['RANK'], 'a') as f:\n"
        "                f.write(json.dumps([epoch, numbers]) + '\\n')\n"
        "            yield batch\n"
        "    streams.StreamLoader.epoch = epoch\n"
    )
    plain = ["augment.pad_crop=0", "augment.hflip=0", "data.mean=[0.5,0.5,0.5]", "data.std=[0.5,0.5,0.5]"]
    words = [
        *TINY,
        *plain,
        f"data.root={streamed.root}",
        "data.dataset=wds/colours",
        "data.batch_size=4",
        "data.workers=1",
    ]
    done = run_eit("train", "cifar10", *words, f"out={tmp_path / 'run'}", ranks=2, env={"PYTHONPATH": str(watch)})
    assert done.returncode == 0, done.stderr
    for epoch in (0, 1):
        seen = [
            [n for line in (tmp_path / f"seen-{rank}").read_text().splitlines() for n in json.loads(line)[1]
             if json.loads(line)[0] == epoch]
            for rank in (0, 1)
        ]  # fmt: skip
        assert len(seen[0]) == len(seen[1]) == 20
        assert sorted(seen[0] + seen[1]) == list(range(40))
    assert log(tmp_path / "run")[1]["val_top1"] is not None


def test_a_streamed_run_that_died_continues_to_the_same_weights(streamed, tmp_path, monkeypatch):
    def recipe(name, *more):
        words = [*TINY, f"data.root={streamed.root}", "data.dataset=wds/colours", "train.save_every=2", *more]
        return load_recipe("cifar10", [*words, f"out={tmp_path / name}"])

    train(recipe("whole"))
    train_until_killed(recipe("broken"), 7, monkeypatch)
    with pytest.raises(UserError, match=r"another data\.workers: 0, now 1"):
        train(recipe("broken", "data.workers=1"))
    train(recipe("broken"))
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "broken"))


def test_what_a_stream_cannot_do_is_one_line(streamed, tmp_path):
    for workers in (5, 3):
        with pytest.raises(UserError, match=rf"4 shards cannot be shared by 1 x {workers} .*: set data.workers="):
            stream(streamed.model_copy(update=dict(workers=workers)))
    with pytest.raises(UserError, match="write a multiple of 3"):
        stream(streamed, world=3)
    images, _ = open_data(streamed)
    for augment, config, message in (
        (Augment(repeats=3), streamed, "augment.repeats=3 needs images with random access"),
        (Augment(), streamed.model_copy(update=dict(cache=True)), "data.cache=true needs images with random access"),
        (
            Augment(crop_scale=(0.08, 1)),
            streamed.model_copy(update=dict(backend="simplejpeg")),
            "data.backend=simplejpeg .* of image files: data.dataset=wds/colours comes in turn",
        ),
    ):
        with pytest.raises(UserError, match=message):
            train_loader(images, VIEW, Plan(40, 5, 1, 1, 1, 0), config, augment, CPU)
    with pytest.raises(UserError, match="these images come in turn already"):
        write_shards(images, images, tmp_path / "again", 2, 1)
    info = json.loads(Path(streamed.root, INFO).read_text())
    del info["classes"]
    Path(streamed.root, INFO).write_text(json.dumps(info))
    with pytest.raises(UserError, match="does not name its classes: set data.classes=N or a file of names"):
        open_data(streamed)
    assert open_data(streamed.model_copy(update=dict(classes=2)))[0].classes == ["0", "1"]
    (tmp_path / "names.txt").write_text("red\nblue\n")
    assert open_data(streamed.model_copy(update=dict(classes=str(tmp_path / "names.txt"))))[0].classes == [
        "red",
        "blue",
    ]


@pytest.mark.parametrize("root", ["pipe:touch {0}/ran #", "http://x/';touch {0}/ran;'"])
def test_an_address_that_is_a_command_is_refused(streamed, tmp_path, root):
    with pytest.raises(UserError, match="is refused, for a shell would see it"):
        open_data(streamed.model_copy(update=dict(root=root.format(tmp_path))))
    info = json.loads(Path(streamed.root, INFO).read_text())
    info["splits"]["train"]["filenames"][0] = f"pipe:touch {tmp_path}/ran #"
    Path(streamed.root, INFO).write_text(json.dumps(info))
    with pytest.raises(UserError, match="refused|missing"):
        open_data(streamed)
    assert not (tmp_path / "ran").exists()


def test_weights_of_a_stranger_do_not_choose_what_is_opened(tmp_path):
    """The data set that a card names could be a command; a person says it again."""
    card = read_card("digits")
    data = card.recipe["data"] | dict(dataset="wds/x", root=f"pipe:touch {tmp_path}/ran #")
    card = card.model_copy(update=dict(recipe=card.recipe | dict(data=data)))
    save_weights(tmp_path / "w.safetensors", eit.load("digits").state_dict(), card)
    done = run_eit("eval", tmp_path / "w.safetensors")
    assert done.returncode == 2 and "these weights are of data.dataset=wds/x: say so" in done.stderr
    assert not (tmp_path / "ran").exists()


def test_wrong_numbers_in_the_description_are_one_line(streamed):
    info = json.loads(Path(streamed.root, INFO).read_text())
    info["splits"]["validation"]["num_samples"] = 2
    Path(streamed.root, INFO).write_text(json.dumps(info))
    with pytest.raises(UserError, match="more images were read than the 2 it says"):
        list(evaluation_loader(open_evaluation(streamed), VIEW, 2, 0, CPU))
    Path(streamed.root, "train-00001.tar").unlink()
    with pytest.raises(UserError, match=r"train-00001\.tar is missing: _info\.json names it"):
        open_data(streamed)


def test_a_label_beyond_the_classes_is_one_line(tmp_path):
    require_webdataset()
    shards = shards_of(save_digits(tmp_path / "digits"))
    config = Data(root=str(shards), dataset="wds/digits", workers=0, classes=2)
    images, _ = open_data(config)
    loader = train_loader(images, VIEW, Plan(36, 4, 1, 1, 1, 0), config, Augment(), CPU)
    with pytest.raises(UserError, match="wds/digits has label 2, of 2 classes"):
        list(loader.epoch(0))


def test_a_stream_shows_the_pixels_of_the_folder(tmp_path):
    """Upright by EXIF, and 16 bits made 8, as everywhere."""
    require_webdataset()
    root = one_colour(tmp_path / "colours")
    for i, file in enumerate(sorted((root / "val" / "class0").iterdir())):
        pixels = np.linspace(0, 65535, 32 * 16).astype(np.uint16).reshape(32, 16)
        if i % 2:
            Image.fromarray(pixels).save(file)
        else:
            exif = Image.Exif()
            exif[0x0112] = 6
            Image.fromarray((pixels // 257).astype(np.uint8)).save(file, exif=exif)
    shards = shards_of(root)
    view = View(16, 16, "bicubic", (0.5,), (0.5,))
    sets = (open_evaluation(Data(root=str(root))), open_evaluation(Data(root=str(shards), dataset="wds/c", workers=0)))
    folder_images, streamed_images = (
        torch.cat([b.images[: b.valid] for _, b in evaluation_loader(images, view, 5, 0, CPU)]) for images in sets
    )
    assert torch.equal(folder_images, streamed_images)


def test_the_command_writes_shards(tmp_path):
    save_digits(tmp_path / "digits")
    done = run_eit("data", "shard", "digits", "shards", "--count", 3, "--val-count", 1, "--json", cwd=tmp_path)
    assert json.loads(done.stdout) == dict(folder="shards", train=36, val=12, shards=4)
    assert json.loads(run_eit("data", "check", "shards", "--json", cwd=tmp_path).stdout)["ok"]


# -- What a stream cannot read


def damage_image(shard):
    """Zeros in the middle of a shard's first image."""
    with tarfile.open(shard) as tar:
        member = next(m for m in tar if m.name.endswith(".png"))
    content = bytearray(shard.read_bytes())
    content[member.offset_data : member.offset_data + member.size] = bytes(member.size)
    shard.write_bytes(content)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_of_a_stream_counts_against_the_budget_and_stops_an_evaluation(streamed, workers, capsys):
    root = Path(streamed.root)
    damage_image(root / "train-00000.tar")
    damage_image(root / "validation-00001.tar")
    config = streamed.model_copy(update=dict(workers=workers, bad_image_budget=0.05))
    train_images, val_images = open_data(config)
    loader = train_loader(train_images, VIEW, Plan(40, 5, 1, 1, 1, 0), config, Augment(), CPU)
    for epoch in (0, 1):
        assert len(list(loader.epoch(epoch))) == 8
        assert len(loader.bad.seen) == 1
        loader.bad.check(1)
    err = capsys.readouterr().err
    assert err.count("unreadable image") == 2 and "wds/colours, before image" in err and "UnidentifiedImage" in err
    with pytest.raises(UserError, match=r"1 of 40 training images are unreadable"):
        loader.bad.allowed = 0
        loader.bad.check(2)  # both of two ranks met it
    with pytest.raises(UserError, match=r"wds/colours.*UnidentifiedImage"):
        list(evaluation_loader(val_images, VIEW, 4, workers, CPU))


@pytest.mark.parametrize(("folder", "workers"), [("shards4", 0), ("it's my shards", 1)])
@pytest.mark.parametrize("how", ["gone", "cut"])
def test_a_lost_shard_stops_a_stream_and_is_named(streamed, workers, how, folder):
    """webdataset would go on with the others, again and again."""
    root = Path(streamed.root).rename(Path(streamed.root).with_name(folder))
    config = streamed.model_copy(update=dict(workers=workers, root=str(root)))
    train_images, val_images = open_data(config)
    for name in ("train-00002.tar", "validation-00001.tar"):
        shard = root / name
        shard.unlink() if how == "gone" else shard.write_bytes(shard.read_bytes()[:700])
    loader = train_loader(train_images, VIEW, Plan(40, 5, 1, 1, 1, 0), config, Augment(), CPU)
    with pytest.raises(UserError, match=r"wds/colours: shard .*train-00002.tar cannot be read") as error:
        for epoch in range(3):
            list(loader.epoch(epoch))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"shard .*validation-00001.tar cannot be read"):
        list(evaluation_loader(val_images, VIEW, 4, workers, CPU))


def test_a_shard_that_is_cut_between_two_samples_is_named_at_the_start(streamed):
    """To webdataset it is whole."""
    shard = Path(streamed.root, "train-00001.tar")
    with tarfile.open(shard) as tar:
        third = tar.getmembers()[6].offset
    shard.write_bytes(shard.read_bytes()[:third])
    with pytest.raises(UserError, match=r"train-00001.tar is cut: it has no end of a tar file"):
        open_data(streamed)


def test_an_image_of_a_stream_with_damaged_exif_or_too_many_pixels_is_an_unreadable_one(streamed, monkeypatch):
    config = streamed.model_copy(update=dict(max_pixels=16 * 16))
    train_images, val_images = open_data(config)
    assert len(list(evaluation_loader(val_images, VIEW, 5, 0, CPU))) == 2
    config = streamed.model_copy(update=dict(max_pixels=100))
    _, val_images = open_data(config)
    with pytest.raises(UserError, match=r"wds/colours.*DecompressionBombError"):
        list(evaluation_loader(val_images, VIEW, 5, 0, CPU))

    def damaged(image):
        if image.getpixel((0, 0))[0] == 7:
            raise struct.error("unpack requires a buffer of 4 bytes")
        return image

    monkeypatch.setattr(streams.ImageOps, "exif_transpose", damaged)
    loader = train_loader(train_images, VIEW, Plan(40, 5, 1, 1, 1, 0), streamed, Augment(), CPU)
    seen = [n for x, _, _ in loader.epoch(0) for n in numbers(x)]
    assert 7 not in seen and len(loader.bad.seen) == 1 and "unpack requires" in next(iter(loader.bad.seen))


def test_a_stream_comes_from_an_object_store(streamed):
    """Over HTTP, as from S3; one shard that the store does not have stops the run."""
    handler = partial(SimpleHTTPRequestHandler, directory=streamed.root)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        config = streamed.model_copy(update=dict(root=f"http://127.0.0.1:{server.server_port}"))
        assert stream(config) == stream(streamed)
        Path(streamed.root, "train-00003.tar").unlink()
        with pytest.raises(UserError, match=r"shard http://127.0.0.1:.*/train-00003.tar cannot be read"):
            stream(config)
    finally:
        server.shutdown()
