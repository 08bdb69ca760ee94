"""Shards: the same batches as the folder they were written from, and every sample once where they come in turn."""

import io
import json
import os
import pickle
import struct
import tarfile
import threading
import tracemalloc
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image

import eit
from eit import distributed
from eit.config import Augment, Data, load_recipe
from eit.data import streaming, timm_datasets
from eit.data.datasets import open_data, open_evaluation
from eit.data.images import Preprocessing
from eit.data.layouts import INFO, SHARDING, index_shard
from eit.data.loaders import evaluation_loader, train_loader
from eit.data.order import SampleOrder
from eit.data.shards import write_shards
from eit.data.streaming import StreamLoader
from eit.data.timm_datasets import ImageStream, shard_names
from eit.errors import UserError
from eit.inference.evaluate import evaluate
from eit.training.trainer import train
from eit.weights.formats import save_weights
from eit.weights.load import read_card
from tests.helpers.commands import run_eit
from tests.helpers.images import save_digits
from tests.helpers.shared import require
from tests.helpers.training import TINY, log, same, train_until_killed, weights

CPU = torch.device("cpu")
VIEW = Preprocessing(16, 16, "bicubic", (0.5,) * 3, (0.5,) * 3)


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
    order = SampleOrder(len(train_a), 4, 1, 1, 1, 0)
    batches = [everything(train_loader(t, VIEW, order, Data(workers=0), augment, CPU)) for t in (train_a, train_b)]
    assert len(batches[0]) == 9
    for (x, y), (u, v) in zip(*batches, strict=True):
        assert torch.equal(x, u) and torch.equal(y, v)
    for a, b in zip(*(evaluation_loader(v, VIEW, 5, 0, CPU) for v in (val_a, val_b)), strict=True):
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
    from eit.data import shards

    original, calls = shards._write_shard, []

    def stopping(file, images, indices):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(file.name)
        original(file, images, indices)

    out = folder.parent / "stopped"
    pair = open_data(Data(root=str(folder)))
    monkeypatch.setattr(shards, "_write_shard", stopping)
    with pytest.raises(KeyboardInterrupt):
        write_shards(*pair, out, 4, 2)
    assert not (out / INFO).exists()
    with pytest.raises(UserError, match="holds other shards"):
        write_shards(*pair, out, 5, 2)
    monkeypatch.setattr(shards, "_write_shard", lambda *a: (calls.append(a[0].name), original(*a)))
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


def sparse_tar(file, size=3 << 30):
    """A member that is almost all holes, as GNU tar writes it: 1 KiB that unpacks to `size` zeros."""
    header = bytearray(tarfile.TarInfo("0.png").tobuf(tarfile.GNU_FORMAT))
    header[156:157] = b"S"
    header[483:495] = b"%011o\0" % size
    header[386:410] = b"%011o\0" % 0 + b"%011o\0" % 0
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    file.write_bytes(bytes(header) + bytes(10240))


def packed_tar(file):
    with tarfile.open(file.with_suffix(".gz"), "w:gz") as tar:
        member = tarfile.TarInfo("0.png")
        member.size = 1 << 20
        tar.addfile(member, io.BytesIO(bytes(member.size)))
    file.with_suffix(".gz").replace(file)


def lying_tar(file):
    member = tarfile.TarInfo("0.png")
    member.size = 5 << 30
    file.write_bytes(member.tobuf() + bytes(10240))


def cut_tar(file):
    member = tarfile.TarInfo("0.png")
    member.size = 1 << 29
    file.write_bytes(member.tobuf() + bytes(10240))


def long_note(file):
    with open(file, "wb") as f:
        member = tarfile.TarInfo("0.json")
        member.size = 1 << 28
        f.write(member.tobuf())
        f.truncate((1 << 28) + 4096)  # a file with holes


def long_header(file):
    with open(file, "wb") as f:
        member = tarfile.TarInfo("0.json")
        member.size, member.type = 1 << 32, tarfile.XHDTYPE
        f.write(member.tobuf(tarfile.GNU_FORMAT))
        f.truncate((1 << 32) + 4096)


def link_to_a_shard(file):
    file.rename(file.with_name("other.tar"))
    file.symlink_to("other.tar")


def pipe(file):
    file.unlink()
    os.mkfifo(file)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (sparse_tar, "is sparse"),
        (packed_tar, "cannot be read"),
        (lying_tar, "has 5,368,709,120 bytes, at most"),
        (cut_tar, "is cut: it has 536,870,912 bytes"),
        (long_note, "member 0.json has 268,435,456 bytes"),
        (long_header, "a header or note of more than 1,048,576 bytes"),
        (link_to_a_shard, "it is a link, not a regular file"),
        (pipe, "it is not a regular file"),
    ],
)
def test_a_shard_that_is_not_what_it_seems_is_refused_before_it_is_read(folder, damage, message):
    root = shards_of(folder)
    damage(root / "train-00001.tar")
    tracemalloc.start()
    with pytest.raises(UserError, match=r"shard .*train-00001\.tar cannot be read: ") as error:
        open_data(Data(root=str(root)))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert tracemalloc.get_traced_memory()[1] < 200 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("name", ["../x.tar", "/etc/passwd", "a/../../x", "http://h/x.tar", 7, "", "pipe:x"])
@pytest.mark.parametrize("dataset", [None, "wds/digits"])
def test_a_description_names_files_of_its_own_folder_only(folder, name, dataset):
    root = shards_of(folder)
    info = json.loads((root / INFO).read_text())
    info["splits"]["train"]["filenames"][0] = name
    (root / INFO).write_text(json.dumps(info))
    with pytest.raises(
        UserError, match="a file below its own folder is expected|a shell would execute it|cannot be opened"
    ):
        open_data(Data(root=str(root), dataset=dataset))


@pytest.mark.parametrize("dataset", [None, "wds/digits"])
def test_a_description_that_is_a_pipe_or_a_link_is_not_opened(folder, dataset):
    root = shards_of(folder)
    pipe(root / INFO)
    with pytest.raises(UserError, match=r"_info\.json cannot be read: it is not a regular file"):
        open_data(Data(root=str(root), dataset=dataset))
    (root / INFO).unlink()
    (root / INFO).symlink_to("/dev/zero")
    with pytest.raises(UserError, match=r"_info\.json cannot be read: it is a link"):
        open_data(Data(root=str(root), dataset=dataset))


def test_shards_keep_the_content_digest_of_their_source(folder):
    Image.new("RGB", (16, 16)).save(folder / "train" / "digit0" / "c.bmp")  # stored as another format
    images, _ = open_data(Data(root=str(folder)))
    first = images.content_digest()
    again, _ = open_data(Data(root=str(shards_of(folder))))
    assert again.content_digest() == first
    write_shards(again, again, folder.parent / "twice", 2, 1)
    assert open_data(Data(root=str(folder.parent / "twice")))[0].content_digest() == first
    file = Path(images.sources[5])
    file.write_bytes(file.read_bytes() + b"x")
    assert images.content_digest() != first and images.digest() == again.digest()
    file.write_bytes(file.read_bytes()[:-2] + b"yy")  # of the same size as before
    assert images.content_digest() != first


def test_shards_that_an_earlier_version_wrote_are_complete(folder, capsys):
    pair = open_data(Data(root=str(folder)))
    root = shards_of(folder)
    info = json.loads((root / INFO).read_text())
    del info["source"]["content"]
    (root / INFO).write_text(json.dumps(info))
    write_shards(*pair, root, 4, 2)
    assert "is complete already" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["float", "uint16", "int32"])
def test_images_of_more_than_8_bits_have_the_pixels_of_the_folder(tmp_path, kind):
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for i in range(8):
            file = tmp_path / "data" / part / f"class{i % 2}" / f"{i}.tif"
            file.parent.mkdir(parents=True, exist_ok=True)
            values = rng.integers(0, 4096, (16, 16)).astype(np.float32 if kind == "float" else kind)
            Image.fromarray(values).save(file)
    config = Data(root=str(tmp_path / "data"), pixel_range=(0, 4095))
    images, _ = pair = open_data(config)
    write_shards(*pair, tmp_path / "shards", 2, 2)
    for given in ((0, 4095), None):  # stored in 8 bits, which have their own range
        again, _ = open_data(Data(root=str(tmp_path / "shards"), pixel_range=given))
        for i in range(len(images)):
            assert again.read(i, 3).tobytes() == images.read(i, 3).tobytes()
    if kind == "uint16":  # without a range, 16 bits are kept
        write_shards(*open_data(Data(root=str(tmp_path / "data"))), tmp_path / "kept", 2, 1)
        again, _ = open_data(Data(root=str(tmp_path / "kept"), pixel_range=(0, 4095)))
        assert again.read(3, 1).tobytes() == images.read(3, 1).tobytes()
        streamed = open_evaluation(Data(root=str(tmp_path / "kept"), dataset="wds/x", workers=0, pixel_range=(0, 4095)))
        (batch,) = evaluation_loader(streamed, VIEW, 8, 0, CPU)
        expected = evaluation_loader(pair[1], VIEW, 8, 0, CPU)
        assert torch.equal(batch.images, next(iter(expected)).images)


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
    order = SampleOrder(40, batch, 1, world, 1, seed)
    loader = train_loader(images, VIEW, order, config, Augment(), CPU)
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
    monkeypatch.setattr(streaming, "DataLoader", lambda turn, **_: sent.append(turn) or [])
    with pytest.raises(UserError, match="ended after 0 of 8 batches"):
        stream(streamed)
    prepare = pickle.dumps(sent[0].prepare)
    assert b"ImageTransform" in prepare and not any(
        n in prepare for n in (b"StreamLoader", b"Normaliser", b"BadImages")
    )


def test_a_stream_and_the_folder_have_the_same_figures(streamed):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 2))
    expected = evaluate(model, evaluation_loader(open_evaluation(Data(root=streamed.root)), VIEW, 4, 0, CPU))
    first, second = (
        evaluate(model, evaluation_loader(open_evaluation(streamed), VIEW, 4, workers, CPU)) for workers in (0, 2)
    )
    assert first == second and (first.confusion, first.images) == (expected.confusion, 10)
    assert first.loss == pytest.approx(expected.loss)


def on_rank(monkeypatch, rank, world, loader):
    """What a rank of `world` evaluates, as tuples of numbers, where the other ranks see the rest."""
    monkeypatch.setattr(distributed, "world_size", lambda: world)
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    joined = []
    monkeypatch.setattr(distributed, "gather", lambda seen: (joined.append(seen), [seen, 10 - seen])[1])
    batches = [tuple(numbers(batch.images[: batch.valid])) for batch in loader]
    assert joined == [sum(map(len, batches))]  # once, on a rank without images too
    return batches


@pytest.fixture
def decoded(monkeypatch, tmp_path):
    """Counts the images that timm's reader has decoded since the last call, in any process of this test."""
    from timm.data.readers import reader_wds

    calls, original = tmp_path / "decoded", reader_wds._decode

    def counting(*arguments, **named):
        with open(calls, "a") as f:
            f.write("x")
        return original(*arguments, **named)

    def count():
        n = len(calls.read_text()) if calls.exists() else 0
        calls.unlink(missing_ok=True)
        return n

    monkeypatch.setattr(reader_wds, "_decode", counting)
    return count


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize(
    ("world", "parts"), [(1, [10]), (2, [5, 5]), (3, [5, 3, 2]), (4, [3, 3, 2, 2]), (5, [3, 3, 2, 2, 0])]
)
def test_ranks_and_workers_share_the_shards_of_an_evaluation(tmp_path, monkeypatch, decoded, world, parts, workers):
    """Shards of 3, 3, 2 and 2 images. A rank without a shard decodes nothing."""
    require_webdataset()
    root = shards_of(one_colour(tmp_path / "colours"), 4, 4)
    loader = evaluation_loader(open_evaluation(Data(root=str(root), dataset="wds/c")), VIEW, 2, workers, CPU)
    batches = []
    for rank, part in enumerate(parts):
        own = on_rank(monkeypatch, rank, world, loader)
        assert len(list(chain(*own))) == decoded() == part
        batches += own
    order = [*range(0, 10, 2), *range(1, 10, 2)]  # of the folder, class by class, and so of the shards
    assert sorted(batches) == sorted(tuple(order[a:b]) for a, b in ((0, 2), (2, 3), (3, 5), (5, 6), (6, 8), (8, 10)))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_stream_knows_how_many_batches_a_rank_has(streamed, monkeypatch, world):
    loader = evaluation_loader(open_evaluation(streamed), VIEW, 2, 0, CPU)  # 2 shards of 5
    for rank in range(world):
        assert len(on_rank(monkeypatch, rank, world, loader)) == len(loader.own_blocks)


def test_the_files_of_tensorflow_datasets_are_no_shards():
    """They lie in its own cache, not below data.root, and are no tar files."""
    reader = SimpleNamespace(root="", split_info=SimpleNamespace(filenames=["mnist-test.tfrecord-00000-of-00001"]))
    assert shard_names(reader) == []


def test_a_stream_without_shards_is_shared_batch_by_batch(tmp_path, monkeypatch):
    require(find_spec("datasets") is not None, "the package datasets is not installed")
    folder = one_colour(tmp_path / "colours")
    (folder / "val").rename(folder / "validation")
    val = open_evaluation(Data(root=str(tmp_path / "cache"), dataset=f"hfids/{folder}", classes=2, download=True))
    assert isinstance(val, ImageStream) and not val.shards
    loader = evaluation_loader(val, VIEW, 4, 0, CPU)
    whole = on_rank(monkeypatch, 0, 1, loader)
    assert sorted(chain(*whole)) == list(range(10)) and len(whole) == len(loader.own_blocks) == 3
    for world in (2, 3, 4):
        for rank in range(world):
            assert on_rank(monkeypatch, rank, world, loader) == whole[rank::world]


@pytest.mark.project
def test_processes_share_the_shards_of_an_evaluation(tmp_path):
    """The same figures on three ranks, one of which has no shard, as on one."""
    require_webdataset()
    write_shards(*open_data(Data(root="sklearn:digits")), tmp_path / "shards", 2, 2)
    words = ["eval", "digits", "--data", "shards", "--dataset", "wds/digits", "--batch-size", 64, "--json"]
    figures = [run_eit(*words, "--workers", 1, cwd=tmp_path, ranks=ranks) for ranks in (0, 3)]
    assert [done.returncode for done in figures] == [0, 0], figures[1].stderr
    first, second = (json.loads(done.stdout) for done in figures)
    assert first == second and first["images"] == len(open_data(Data(root="sklearn:digits"))[1])


def note_images(folder):
    """From now on, this rank writes down which images it trains on."""
    original = StreamLoader.epoch

    def noted(self, epoch, first_step=0):
        for batch in original(self, epoch, first_step):
            with open(folder / f"seen-{os.environ['RANK']}", "a") as file:
                print(json.dumps([epoch, numbers(batch.images)]), file=file)
            yield batch

    StreamLoader.epoch = noted


def test_a_webdataset_run_over_two_processes_sees_every_sample(streamed, tmp_path):
    plain = ["augment.pad_crop=0", "augment.hflip=0", "data.mean=[0.5,0.5,0.5]", "data.std=[0.5,0.5,0.5]"]
    words = [
        *TINY,
        *plain,
        f"data.root={streamed.root}",
        "data.dataset=wds/colours",
        "data.batch_size=4",
        "data.workers=1",
    ]
    done = run_eit(
        "train", "cifar10", *words, f"out={tmp_path / 'run'}", ranks=2, prepare=partial(note_images, tmp_path)
    )
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
        with pytest.raises(
            UserError,
            match=rf"4 shards cannot be divided equally among {workers} readers \(1 x data.workers={workers}\): "
            "set data.workers=",
        ):
            stream(streamed.model_copy(update=dict(workers=workers)))
    with pytest.raises(UserError, match="write a multiple of 3"):
        stream(streamed, world=3)
    images, _ = open_data(streamed)
    for augment, config, message in (
        (Augment(repeats=3), streamed, "augment.repeats=3 needs images with random access"),
        (Augment(), streamed.model_copy(update=dict(cache=True)), "data.cache=true needs images with random access"),
    ):
        with pytest.raises(UserError, match=message):
            train_loader(images, VIEW, SampleOrder(40, 5, 1, 1, 1, 0), config, augment, CPU)
    with pytest.raises(UserError, match="these images are a stream"):
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
    with pytest.raises(UserError, match="is refused, because a shell would execute it"):
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
    assert (
        done.returncode == 2
        and "these weights name --dataset wds/x" in done.stderr
        and "--dataset wds/x" in done.stderr
    )
    assert not (tmp_path / "ran").exists()


def test_wrong_numbers_in_the_description_are_one_line(streamed):
    info = json.loads(Path(streamed.root, INFO).read_text())
    info["splits"]["validation"]["num_samples"] = 2
    Path(streamed.root, INFO).write_text(json.dumps(info))
    for workers in (0, 1):
        with pytest.raises(UserError, match="wds/colours: 10 images were read, but it declares 2") as error:
            list(evaluation_loader(open_evaluation(streamed), VIEW, 2, workers, CPU))
        assert error.value.__notes__ == [distributed.ON_MAIN]  # all ranks raise it
    Path(streamed.root, "train-00001.tar").unlink()
    with pytest.raises(UserError, match=r"train-00001\.tar is missing: _info\.json names it"):
        open_data(streamed)


def test_a_label_beyond_the_classes_is_one_line(tmp_path):
    require_webdataset()
    shards = shards_of(save_digits(tmp_path / "digits"))
    config = Data(root=str(shards), dataset="wds/digits", workers=0, classes=2)
    images, _ = open_data(config)
    loader = train_loader(images, VIEW, SampleOrder(36, 4, 1, 1, 1, 0), config, Augment(), CPU)
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
    view = Preprocessing(16, 16, "bicubic", (0.5,), (0.5,))
    sets = (open_evaluation(Data(root=str(root))), open_evaluation(Data(root=str(shards), dataset="wds/c", workers=0)))
    folder_images, streamed_images = (
        torch.cat([b.images[: b.valid] for b in evaluation_loader(images, view, 5, 0, CPU)]) for images in sets
    )
    assert torch.equal(folder_images, streamed_images)


def test_the_command_writes_shards(tmp_path):
    save_digits(tmp_path / "digits")
    done = run_eit("data", "shard", "digits", "shards", "--count", 3, "--val-count", 1, "--json", cwd=tmp_path)
    assert json.loads(done.stdout) == dict(folder="shards", train=36, val=12, shards=4)
    assert json.loads(run_eit("data", "check", "shards", "--json", cwd=tmp_path).stdout)["ok"]


# -- What a stream cannot read


@pytest.mark.parametrize(
    ("damage", "message"), [(sparse_tar, "is sparse"), (lying_tar, "at most"), (packed_tar, "cannot be read")]
)
def test_a_stream_unpacks_nothing(streamed, damage, message):
    shard = Path(streamed.root, "train-00001.tar")
    train_images, _ = open_data(streamed)
    damage(shard)
    loader = train_loader(train_images, VIEW, SampleOrder(40, 5, 1, 1, 1, 0), streamed, Augment(), CPU)
    tracemalloc.start()
    try:
        list(loader.epoch(0))
    except UserError as error:
        assert message in str(error)
    else:
        assert message in str(loader.bad.seen)
    assert tracemalloc.get_traced_memory()[1] < 200 << 20
    tracemalloc.stop()


def test_names_of_shards_are_checked_each_time_they_are_asked_for(streamed, tmp_path):
    """A server may give other names later."""
    train_images, _ = open_data(streamed)
    info = json.loads(Path(streamed.root, INFO).read_text())
    info["splits"]["train"]["filenames"][1] = "pipe:touch ran"
    Path(streamed.root, INFO).write_text(json.dumps(info))
    with pytest.raises(UserError, match="a shell would execute it"):
        train_images.open(True, 5, 0)


def test_postscript_in_a_shard_is_not_interpreted(streamed, monkeypatch):
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", "/must/not/be/started")
    shard = Path(streamed.root, "validation-00000.tar")
    with tarfile.open(shard) as tar:
        member = next(m for m in tar if m.name.endswith(".png"))
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n"
    content = bytearray(shard.read_bytes())
    content[member.offset_data : member.offset_data + member.size] = eps.ljust(member.size)[: member.size]
    shard.write_bytes(content)
    with pytest.raises(UserError, match="no image, or of a format that is not read"):
        list(evaluation_loader(open_evaluation(streamed), VIEW, 4, 0, CPU))
    again = open_evaluation(Data(root=streamed.root))
    with pytest.raises(UserError, match="no image, or of a format that is not read"):
        list(evaluation_loader(again, VIEW, 4, 0, CPU))


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
    loader = train_loader(train_images, VIEW, SampleOrder(40, 5, 1, 1, 1, 0), config, Augment(), CPU)
    for epoch in (0, 1):
        assert len(list(loader.epoch(epoch))) == 8
        assert len(loader.bad.seen) == 1
        loader.bad.check(1)
    err = capsys.readouterr().err
    assert err.count("unreadable image") == 2 and "wds/colours, before image" in err and "no image" in err
    with pytest.raises(UserError, match=r"1 of 40 training images are unreadable"):
        loader.bad.allowed = 0
        loader.bad.check(2)  # both of two ranks met it
    with pytest.raises(UserError, match=r"wds/colours, before image 1 of shard validation-00001\.tar: .*no image"):
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
    loader = train_loader(train_images, VIEW, SampleOrder(40, 5, 1, 1, 1, 0), config, Augment(), CPU)
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
    with pytest.raises(UserError, match=r"wds/colours.*16x16 is more than data\.max_pixels=100"):
        list(evaluation_loader(val_images, VIEW, 5, 0, CPU))

    def damaged(image):
        if image.getpixel((0, 0))[0] == 7:
            raise struct.error("unpack requires a buffer of 4 bytes")
        return image

    monkeypatch.setattr(streaming, "upright", damaged)
    loader = train_loader(train_images, VIEW, SampleOrder(40, 5, 1, 1, 1, 0), streamed, Augment(), CPU)
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
        over_http, on_disk = (evaluation_loader(open_evaluation(c), VIEW, 2, 2, CPU) for c in (config, streamed))
        assert [numbers(b.images) for b in over_http] == [numbers(b.images) for b in on_disk]
        Path(streamed.root, "train-00003.tar").unlink()
        with pytest.raises(UserError, match=r"shard http://127.0.0.1:.*/train-00003.tar cannot be read"):
            stream(config)
    finally:
        server.shutdown()


@pytest.mark.parametrize(
    "change",
    [
        lambda info: info.update(classes="abc"),
        lambda info: info.update(classes={"digit0": 0, "digit1": 1, "digit2": 2}),
        lambda info: info["splits"]["validation"].update(filenames=info["splits"]["train"]["filenames"][:2]),
        lambda info: info["splits"]["train"]["filenames"].__setitem__(1, info["splits"]["train"]["filenames"][0]),
    ],
)
def test_a_description_of_another_form_is_one_line(folder, change):
    root = shards_of(folder)
    info = json.loads((root / INFO).read_text())
    change(info)
    (root / INFO).write_text(json.dumps(info))
    with pytest.raises(UserError, match="does not describe train and validation shards with classes"):
        open_data(Data(root=str(root)))


@pytest.mark.parametrize("name", [INFO, SHARDING])
def test_shards_are_not_written_next_to_a_pipe(folder, name):
    out = folder.parent / "piped"
    out.mkdir()
    os.mkfifo(out / name)
    with pytest.raises(UserError, match=f"{name} cannot be read: give a new folder"):
        write_shards(*open_data(Data(root=str(folder))), out, 4, 2)


@pytest.mark.parametrize(
    "root, workers, count", [("http://h/x", 0, 1), ("http://h/x", 3, 3), ("/x", 0, 0), ("s3://b", 0, 1)]
)
def test_a_server_is_read_by_a_process_whose_answer_is_not_waited_for_without_end(root, workers, count):
    stream = ImageStream(["a", "b"], 1, Data(root=root), "train", 1)
    assert streaming._worker_count(stream, workers) == count


@pytest.mark.parametrize("text", ["\ufeffcat\ndog\n", "cat\r\ndog\r\n", "\ufeffcat\r\ndog"])
def test_a_list_of_classes_of_an_editor_is_read(tmp_path, text):
    (tmp_path / "c.txt").write_bytes(text.encode())
    config = Data(dataset="wds/x", classes=str(tmp_path / "c.txt"))
    assert timm_datasets._timm_classes(None, config) == ["cat", "dog"]


@pytest.mark.parametrize("text", ["cat\n\ndog", "", "\n", "cat\n \ndog"])
def test_a_list_of_classes_with_an_empty_line_is_refused(tmp_path, text):
    (tmp_path / "c.txt").write_text(text)
    with pytest.raises(UserError, match="has an empty line"):
        timm_datasets._timm_classes(None, Data(dataset="wds/x", classes=str(tmp_path / "c.txt")))


@pytest.mark.parametrize(
    "name", ["._a.png", ".DS_Store", "__MACOSX/a.png", "x/@eaDir/a.cls", "Thumbs.db", "./.hidden/a.png"]
)
def test_hidden_files_and_those_of_a_system_in_a_shard_are_left_out(tmp_path, name):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for member, content in (("./a.png", b"png"), (name, b"x"), ("./a.cls", b"1")):
            (info := tarfile.TarInfo(member)).size = len(content)
            tar.addfile(info, io.BytesIO(content))
    assert [(sample.key, sample.label) for sample in index_shard(tmp_path / "x.tar")] == [("./a", 1)]
