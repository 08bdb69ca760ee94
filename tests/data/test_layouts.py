"""Published layouts, each in its real structure and small; what is missing is named in one line."""

import gzip
import hashlib
import pickle
import shutil
import tracemalloc
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets

from eit.config import Data
from eit.data.datasets import check, open_data, open_evaluation
from eit.data.images import MAX_PIXELS, Images
from eit.data.layouts import FASHION, class_names, read_idx
from eit.errors import UserError
from tests.helpers.shared import require

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
RNG = np.random.default_rng(0)


def fails(root, message, **config):
    with pytest.raises(UserError) as error:
        open_data(Data(root=str(root), **config))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


# -- CIFAR


@pytest.fixture(params=["CIFAR10", "CIFAR100"])
def cifar(request, tmp_path, monkeypatch):
    """A small set in the real files' structure; torchvision is told the checksums of these files."""
    kind = getattr(datasets, request.param)
    folder = tmp_path / kind.base_folder
    folder.mkdir()
    labels = "labels" if request.param == "CIFAR10" else "fine_labels"
    md5 = {}

    def write(name, content):
        raw = pickle.dumps(content, protocol=2)
        (folder / name).write_bytes(raw)
        md5[name] = hashlib.md5(raw).hexdigest()

    for name, _ in [*kind.train_list, *kind.test_list]:
        write(name, {"data": RNG.integers(0, 256, (4, 3072), dtype=np.uint8), labels: [0, 1, 1, 0]})
    write(kind.meta["filename"], {kind.meta["key"]: ["cat", "dog"]})
    for part in ("train_list", "test_list"):
        monkeypatch.setattr(kind, part, [[name, md5[name]] for name, _ in getattr(kind, part)])
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": md5[kind.meta["filename"]]})
    return kind, folder


def test_cifar(cifar):
    kind, folder = cifar
    for root in (folder, folder.parent):
        train, val = open_data(Data(root=str(root)))
        assert train.classes == ["cat", "dog"]
        assert (len(train), len(val)) == (4 * len(kind.train_list), 4)
        reference = kind(folder.parent, train=True)
        assert train.labels == reference.targets
        for i in (0, len(train) - 1):
            assert np.array_equal(np.asarray(train.read(i, 3)), np.asarray(reference[i][0]))
        assert open_evaluation(Data(root=str(root))).digest() == val.digest() != train.digest()
    assert check(str(folder), MAX_PIXELS)["ok"]


def test_cifar_half_unpacked_or_damaged(cifar, tmp_path):
    kind, folder = cifar
    name = kind.test_list[0][0]
    file = folder / name
    raw = bytearray(file.read_bytes())
    raw[-100] ^= 1
    file.write_bytes(raw)
    fails(folder.parent, f"{file} is damaged")
    file.unlink()
    fails(folder.parent, f"{file} is missing: unpack {kind.filename} again in {folder.parent}")
    assert name in check(str(folder), MAX_PIXELS)["problems"][0]


def test_a_cifar_file_that_could_run_code_is_never_unpickled(cifar, tmp_path):
    kind, folder = cifar

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    (folder / kind.train_list[0][0]).write_bytes(pickle.dumps(Evil(), protocol=2))
    fails(folder, "its checksum is not the published one")
    assert not (tmp_path / "ran").exists()


# -- idx


def write_idx(file, array, packed):
    content = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes() + array.tobytes()
    if packed:
        file.with_name(f"{file.name}.gz").write_bytes(gzip.compress(content))
    else:
        file.write_bytes(content)


@pytest.fixture(params=[True, False], ids=["gz", "plain"])
def idx(request, tmp_path):
    folder = tmp_path / "raw"
    folder.mkdir()
    for part, n in (("train", 12), ("t10k", 6)):
        write_idx(
            folder / f"{part}-images-idx3-ubyte", RNG.integers(0, 256, (n, 28, 20), dtype=np.uint8), request.param
        )
        write_idx(folder / f"{part}-labels-idx1-ubyte", np.arange(n, dtype=np.uint8) % 3, request.param)
    return folder


def test_idx_files(idx):
    for root in (idx, idx.parent):
        train, val = open_data(Data(root=str(root)))
        assert (train.classes, len(train), len(val)) == (["0", "1", "2"], 12, 6)
        assert train.read(0, 1).size == (20, 28) and train.read(0, 3).mode == "RGB"
        assert val.labels == [0, 1, 2, 0, 1, 2]


def test_idx_files_that_are_missing_or_damaged(idx):
    labels = next(idx.glob("t10k-labels*"))
    whole = labels.read_bytes()
    labels.unlink()
    fails(idx, f"{idx / 't10k-labels-idx1-ubyte'} is missing (or t10k-labels-idx1-ubyte.gz)")
    for content in (whole[:-1], b"nothing", b"", whole[:6]):
        labels.write_bytes(content)
        fails(idx, labels.name)
    write_idx(idx / "t10k-labels-idx1-ubyte", np.zeros(5, np.uint8), labels.suffix == ".gz")
    fails(idx, "t10k-images-idx3-ubyte has 6 images, t10k-labels-idx1-ubyte has 5 labels")
    shutil.copy(next(idx.glob("t10k-images*")), labels)
    fails(idx, "is not an idx file of 1-dimensional bytes")


@pytest.mark.parametrize(
    ("sizes", "unpacked", "message"),
    [
        ((10, 2, 2), 1 << 28, "has more than 40 bytes of values, its header says 40"),
        ((60000, 5000, 5000), 1 << 20, "says that it has 1,500,000,000,000 bytes of values; at most 1,073,741,824"),
        ((2**32 - 1,) * 3, 16, "bytes of values; at most"),
        ((0, 28, 28), 0, "its header says 0"),
    ],
)
def test_a_packed_idx_file_is_unpacked_no_further_than_its_header_says(tmp_path, sizes, unpacked, message):
    file = tmp_path / "train-images-idx3-ubyte.gz"
    with gzip.open(file, "wb", compresslevel=1) as stream:
        stream.write(bytes((0, 0, 8, 3)) + np.array(sizes, ">u4").tobytes())
        for _ in range(unpacked >> 20):
            stream.write(bytes(1 << 20))
    tracemalloc.start()
    with pytest.raises(UserError, match=message):
        read_idx(file, 3)
    assert tracemalloc.get_traced_memory()[1] < 20 << 20
    tracemalloc.stop()


def test_fashion_mnist_of_debian():
    require(FASHION_MNIST.is_dir(), "Debian's dataset-fashion-mnist is not installed")
    train, val = open_data(Data(root=str(FASHION_MNIST)))
    assert (len(train), len(val), train.classes) == (60_000, 10_000, FASHION)
    assert FASHION[train.labels[0]] == "Ankle boot" and train.labels.count(0) == 6000
    # torchvision's own reader sees the same
    raw = FASHION_MNIST / "t10k-images-idx3-ubyte.gz"
    assert read_idx(raw, 3).shape == (10_000, 28, 28)
    assert int(read_idx(raw, 3).sum()) == 573_469_082


@pytest.mark.parametrize("idx", [False], indirect=True)  # torchvision keeps them plain
def test_torchvisions_layout_of_fashion_mnist_gives_its_images(idx, tmp_path):
    target = tmp_path / "data" / "FashionMNIST" / "raw"
    target.parent.mkdir(parents=True)
    shutil.move(idx, target)
    train, _ = open_data(Data(root=str(tmp_path / "data")))
    reference = datasets.FashionMNIST(tmp_path / "data", train=True)
    assert train.labels == reference.targets.tolist()
    assert np.array_equal(np.asarray(train.read(5, 1)), np.asarray(reference[5][0]))


# -- Tiny-ImageNet-200


def write_tiny_imagenet(root):
    wnids = ["n02", "n01", "n03"]
    (root / "val" / "images").mkdir(parents=True)
    lines = []
    for i, wnid in enumerate(wnids):
        images = root / "train" / wnid / "images"
        images.mkdir(parents=True)
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("")
        for k in range(4):
            Image.new("RGB", (64, 64), (40 * i, k, 0)).save(images / f"{wnid}_{k}.JPEG")
        Image.new("RGB", (64, 64), (40 * i, 0, 0)).save(root / "val" / "images" / f"val_{9 - i}.JPEG")
        lines.append(f"val_{9 - i}.JPEG\t{wnid}\t0\t0\t9\t9")
    (root / "wnids.txt").write_text("\n".join(wnids))
    (root / "words.txt").write_text("n01\tcrane, bird\nn02\tcrane\nn03\tgoldfish, Carassius auratus\nn99\tother\n")
    (root / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture
def tiny(tmp_path):
    return write_tiny_imagenet(tmp_path / "tiny-imagenet-200")


def test_tiny_imagenet_as_it_unpacks(tiny):
    for root in (tiny, tiny.parent):
        train, val = open_data(Data(root=str(root)))
        assert train.classes == val.classes == ["crane, bird (n01)", "crane (n02)", "goldfish"]
        assert (len(train), len(val)) == (12, 3)
        assert {name: val.classes[y] for name, y in zip(val.names, val.labels, strict=True)} == {
            "images/val_9.JPEG": "crane (n02)",
            "images/val_8.JPEG": "crane, bird (n01)",
            "images/val_7.JPEG": "goldfish",
        }
        assert val.read(0, 3).getpixel((5, 5))[0] > 60  # val_7 is the third class


def test_tiny_imagenet_sorted_into_class_folders(tiny):
    for wnid, number in (("n02", 9), ("n01", 8), ("n03", 7)):
        (tiny / "val" / wnid).mkdir()
        (tiny / "val" / "images" / f"val_{number}.JPEG").rename(tiny / "val" / wnid / f"val_{number}.JPEG")
    (tiny / "val" / "images").rmdir()
    _, val = open_data(Data(root=str(tiny)))
    assert val.classes[2] == "goldfish" and len(val) == 3
    shutil.rmtree(tiny / "val" / "n03")
    fails(tiny, "val has neither images/ with val_annotations.txt, nor the classes of train/")


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("val/val_annotations.txt", "val/val_annotations.txt is missing"),
        ("wnids.txt", "wnids.txt is missing"),
        ("words.txt", "words.txt is missing"),
        ("val/images/val_8.JPEG", "val/images/val_8.JPEG is missing: val_annotations.txt names it"),
        ("train/n01", "lacks 1 of 3 classes of wnids.txt: n01"),
        ("train", "train is missing: unpack tiny-imagenet-200.zip again"),
        ("val", "val is missing: unpack tiny-imagenet-200.zip again"),
    ],
)
def test_tiny_imagenet_half_unpacked(tiny, gone, message):
    shutil.rmtree(tiny / gone) if (tiny / gone).is_dir() else (tiny / gone).unlink()
    fails(tiny, message)


@pytest.mark.parametrize("line", ["x", "val_9.JPEG\tn77\t0", "../val_9.JPEG\tn01\t0", ""])
def test_tiny_imagenet_with_wrong_annotations(tiny, line):
    (tiny / "val" / "val_annotations.txt").write_text(line)
    fails(tiny, "val_annotations.txt")


def test_tiny_imagenet_with_fewer_images_than_it_says(tiny):
    (tiny / "train" / "n03" / "n03_boxes.txt").write_text("".join(f"n03_{k}.JPEG\t0\t0\t9\t9\n" for k in range(5)))
    fails(tiny, "n03 has 4 images, n03_boxes.txt lists 5: unpack tiny-imagenet-200.zip again")


def test_a_class_without_words_keeps_its_id(tmp_path):
    (tmp_path / "words.txt").write_text("n01\ttench, Tinca tinca\n")
    assert class_names(tmp_path / "words.txt", ["n01", "n02"]) == ["tench", "n02"]


def test_of_several_sets_in_one_folder_the_one_that_is_meant_is_read(tmp_path, monkeypatch):
    """As two downloads leave them."""
    for kind in ("MNIST", "FashionMNIST"):
        folder = tmp_path / kind / "raw"
        folder.mkdir(parents=True)
        for part, n in (("train", 12), ("t10k", 6)):
            write_idx(folder / f"{part}-images-idx3-ubyte", np.full((n, 8, 8), len(kind), np.uint8), False)
            write_idx(folder / f"{part}-labels-idx1-ubyte", np.arange(n, dtype=np.uint8) % 3, False)
    fails(tmp_path, "holds several data sets: say which with data.dataset=fashion_mnist or mnist")
    fails(tmp_path, "holds several data sets", dataset="cifar10")
    for name, pixel in (("mnist", 5), ("fashion_mnist", 12)):
        assert open_data(Data(root=str(tmp_path), dataset=name))[0].read(0, 1).getpixel((0, 0)) == pixel
    fails(tmp_path, "data.dataset=cifra10 is not a known data set; did you mean 'cifar10'?", dataset="cifra10")


# -- What is not unpacked, and downloads


@pytest.mark.parametrize("name", ["cifar-10-python.tar.gz", "tiny-imagenet-200.zip", "ILSVRC2012_img_train.tar"])
def test_an_archive_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    fails(tmp_path, f"{tmp_path} holds {name}, not unpacked: ")


def test_downloads_go_to_torchvision(tmp_path, monkeypatch):
    asked = []

    def fetch(root, download):
        asked.append((root, download))
        (Path(root) / "train" / "a").mkdir(parents=True)

    monkeypatch.setattr(datasets, "CIFAR100", fetch)
    fails(tmp_path / "new", "no images in class a", dataset="cifar100", download=True)
    assert asked == [(tmp_path / "new", True)]

    def broken(root, download):
        raise OSError("no route to host")

    monkeypatch.setattr(datasets, "CIFAR100", broken)
    fails(tmp_path, "downloading cifar100 into", dataset="cifar100", download=True)
    fails(tmp_path, "data.dataset=cifar1 cannot be downloaded; did you mean", dataset="cifar1", download=True)


def test_what_is_there_is_not_downloaded_again(idx, tmp_path, monkeypatch):
    target = tmp_path / "data" / "MNIST" / "raw"
    target.parent.mkdir(parents=True)
    shutil.move(idx, target)
    asked = []
    monkeypatch.setattr(datasets, "MNIST", lambda *a, **k: asked.append(a))
    data = Data(root=str(tmp_path / "data"), dataset="mnist", download=True)
    assert len(open_data(data)[0]) == 12 and not asked
    next(target.glob("t10k-labels*")).unlink()
    with pytest.raises(UserError, match="t10k-labels-idx1-ubyte is missing"):
        open_data(data)
    assert asked


# -- Data sets of timm


def test_a_torchvision_set_through_timm(cifar):
    kind, folder = cifar
    data = Data(root=str(folder.parent), dataset=f"torch/{kind.__name__.lower()}")
    train, val = open_data(data)
    direct = open_data(Data(root=str(folder)))
    assert isinstance(train, Images) and train.classes == ["cat", "dog"]
    for ours, theirs in zip(direct, (train, val), strict=True):
        assert ours.labels == theirs.labels
        assert np.array_equal(np.asarray(ours.read(3, 3)), np.asarray(theirs.read(3, 3)))


def test_a_hugging_face_set_through_timm(folder, tmp_path):
    require(find_spec("datasets") is not None, "the package datasets is not installed")
    (folder / "val").rename(folder / "validation")
    train, val = open_data(Data(root=str(tmp_path / "cache"), dataset=f"hfds/{folder}"))
    (folder / "validation").rename(folder / "val")
    ours, own_val = open_data(Data(root=str(folder)))
    assert train.classes == ours.classes and sorted(train.labels) == sorted(ours.labels)
    assert len(val) == len(own_val)

    def pixels(images):
        return sorted((y, np.asarray(images.read(i, 3)).tobytes()) for i, y in enumerate(images.labels))

    assert pixels(train) == pixels(ours)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (
            "wdss/x",
            "data.dataset=wdss/x is not a known data set; did you mean 'wds'? (names of timm's begin with hfds/",
        ),
        ("torch/cifar11", "data.dataset=torch/cifar11, split train"),
        ("wds/x", "split train not found in info"),
        ("tfds/mnist", "pip install tensorflow-datasets"),
    ],
)
def test_a_set_that_timm_cannot_open_is_one_line(tmp_path, dataset, message):
    fails(tmp_path, message, dataset=dataset)
