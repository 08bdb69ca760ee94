"""`prepare_imagenet` on archives of ILSVRC2012's structure: three classes, and one synset above them."""

import errno
import gzip
import io
import multiprocessing
import os
import platform
import shutil
import signal
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image
from scipy.io import savemat

from eit.config import Data
from eit.data.datasets import open_data
from eit.data.prepare_imagenet import DEVKIT, META, TRAIN, TRUTH, VAL, prepare_imagenet
from eit.errors import UserError

TENCH, SHARK, COCK = "n01440764", "n01484850", "n01514668"
FIELDS = ["ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height", "num_train_images"]


def jpeg(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (8 + seed, 12, 3), np.uint8)
    Image.fromarray(pixels).save(file := io.BytesIO(), "jpeg")
    return file.getvalue()


def good():
    """What the archives hold. A text in place of bytes is a symbolic link."""
    images = {COCK: 2, TENCH: 4, SHARK: 3}
    return {
        "train": {
            f"{wnid}.tar": {f"{wnid}_{i * 7}.JPEG": jpeg(10 * k + i) for i in range(n)}
            for k, (wnid, n) in enumerate(images.items())
        },
        "val": {f"ILSVRC2012_val_{i + 1:08d}.JPEG": jpeg(50 + i) for i in range(6)},
        "meta": [
            [2, SHARK, "great white shark, white shark", "a shark", 0, [], 0, 3],
            [1, TENCH, "tench, Tinca tinca", "a fish", 0, [], 0, 4],
            [3, COCK, "cock", "a bird", 0, [], 0, 2],
            [4, "n00015388", "animal, fauna", "a living thing", 3, [1, 2, 3], 5, 0],
        ],
        "truth": [1, 3, 2, 1, 3, 1],
    }


def tar_of(entries):
    with tarfile.open(fileobj=(file := io.BytesIO()), mode="w") as tar:
        for name, data in entries.items():
            member = tarfile.TarInfo(name)
            if isinstance(data, str):
                member.type, member.linkname, data = tarfile.SYMTYPE, data, b""
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return file.getvalue()


def write(content, folder):
    folder.mkdir(exist_ok=True)
    train = {name: tar_of(x) if isinstance(x, dict) else x for name, x in content["train"].items()}
    (folder / TRAIN).write_bytes(tar_of(train))
    (folder / VAL).write_bytes(tar_of(content["val"]))
    synsets = np.array([[tuple(row)] for row in content["meta"]], [(name, object) for name in FIELDS])
    savemat(meta := io.BytesIO(), {"synsets": synsets})
    truth = "".join(f"{label}\n" for label in content["truth"]).encode()
    (folder / DEVKIT).write_bytes(gzip.compress(tar_of({META: content.get("mat", meta.getvalue()), TRUTH: truth})))
    for name, share in content.get("cut", {}).items():
        os.truncate(folder / name, int(share * (folder / name).stat().st_size))
    for name in content.get("missing", ()):
        (folder / name).unlink()
    return folder


def tree(folder):
    return {str(p.relative_to(folder)): p.is_file() and p.read_bytes() for p in folder.rglob("*")}


def times(*folders):
    return {p.name: p.stat().st_mtime_ns for folder in folders for p in folder.rglob("*.JPEG")}


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    prepare_imagenet(write(good(), folder / "source"), folder / "target")
    return tree(folder / "target")


@pytest.fixture
def source(tmp_path):
    return write(good(), tmp_path / "source")


@pytest.fixture
def target(tmp_path):
    return tmp_path / "deep" / "target"


def test_the_archives_become_an_image_folder(source, target):
    assert prepare_imagenet(source, target) == {"folder": str(target), "train": 9, "val": 6, "classes": 3}
    content, (train, val) = good(), open_data(Data(root=str(target)))
    assert train.classes == [TENCH, SHARK, COCK]
    assert [train.labels.count(i) for i in range(3)] == [4, 3, 2]
    label_of = dict(zip(content["val"], content["truth"], strict=True))
    assert [label_of[os.path.basename(name)] - 1 for name in val.names] == val.labels
    given = content["val"] | {name: data for images in content["train"].values() for name, data in images.items()}
    for images in (train, val):
        for i, file in enumerate(images.sources):
            assert Path(file).read_bytes() == given[os.path.basename(file)]
            assert images.read(i, 3).width == 12
    assert (target / "words.txt").read_text().splitlines() == [
        f"{TENCH}\ttench, Tinca tinca",
        f"{SHARK}\tgreat white shark, white shark",
        f"{COCK}\tcock",
    ]
    assert sorted(set(os.listdir(target)) - {".lock"}) == ["train", "val", "words.txt"]


def test_a_second_run_says_done_and_writes_nothing(source, target, capsys):
    first = prepare_imagenet(source, target)
    before = {p: p.stat().st_mtime_ns for p in [target, *target.rglob("*")]}
    for archive in (TRAIN, VAL):  # what is complete needs no archive
        (source / archive).unlink()
    assert prepare_imagenet(source, target) == first
    assert "complete already" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in [target, *target.rglob("*")]} == before


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))])
@pytest.mark.parametrize("after", [0, 4, 6, 10, 14])  # images; 6 of val, then 2, 4 and 3 of the classes
def test_an_interrupted_run_goes_on(source, target, expected, monkeypatch, error, after):
    left, whole = [after], Path.write_bytes

    def failing(path, data):
        if not left[0]:
            whole(path, data[:-1])
            raise error
        left[0] -= 1
        return whole(path, data)

    monkeypatch.setattr(Path, "write_bytes", failing)
    with pytest.raises(UserError if isinstance(error, OSError) else KeyboardInterrupt) as raised:
        prepare_imagenet(source, target)
    if isinstance(error, OSError):
        assert str(raised.value).startswith(f"{target}/") and "No space left on device" in str(raised.value)
    monkeypatch.undo()
    done = times(target / "train", target / "val")
    assert len(done) == {0: 0, 4: 0, 6: 6, 10: 8, 14: 12}[after]
    if after == 4:  # of val, single images are kept
        done = dict(sorted(times(target / ".unpacking").items())[:4])
    if after == 10:  # of a class nothing is, whatever a killed run left
        for file in (target / ".unpacking" / "train").rglob("*.JPEG"):
            file.write_bytes(bytes(len(expected[f"train/{TENCH}/{file.name}"])))
    prepare_imagenet(source, target)
    assert tree(target) == expected
    assert done.items() <= times(target).items()


def killed_at(moment, source, target):
    """Run it in a process that kills itself at the n-th change of the disk, or in the middle of a file."""

    def tick(event="", args=()):
        nonlocal moment
        if event in ("", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"):
            moment -= 1
            if not moment:
                os.kill(os.getpid(), signal.SIGKILL)

    def in_halves(path, data):
        with path.open("wb") as file:
            file.write(data[:20])
            file.flush()
            tick()
            file.write(data[20:])

    Path.write_bytes = in_halves
    sys.addaudithook(tick)
    prepare_imagenet(source, target)


@pytest.mark.parametrize("again", [True, False])
def test_killed_at_any_moment_it_goes_on(source, target, expected, again):
    """At each moment in turn, then on to the end; and one run killed again and again, a little later each time."""
    fork, kills, done = multiprocessing.get_context("fork"), 0, {}
    for moment in range(3, 300, 3) if again else range(1, 300):
        process = fork.Process(target=killed_at, args=(moment, source, target))
        process.start()
        process.join(60)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kills += 1
        before, done = done, times(target / "train", target / "val")
        assert before.items() <= done.items()
        if not again:
            prepare_imagenet(source, target)
            assert tree(target) == expected
            assert done.items() <= times(target).items()
            shutil.rmtree(target)
            done = {}
    assert kills > (4 if again else 40)
    assert tree(target) == expected


SECOND, IMAGE = f"{TENCH}.tar", f"{TENCH}_7.JPEG"
DAMAGE = [  # where, what it is set to, and the line
    (("missing",), [TRAIN], f"source has no {TRAIN} (a folder with {TRAIN}, {VAL} and {DEVKIT} is expected)"),
    (("missing",), [VAL], f"source has no {VAL} (a"),
    (("missing",), [DEVKIT], f"source has no {DEVKIT} (a"),
    (("cut",), {TRAIN: 0.5}, f"{TRAIN} is truncated or damaged: unexpected end of data"),
    (("cut",), {TRAIN: 0.0}, f"{TRAIN} is truncated or damaged: empty file"),
    (("cut",), {VAL: 0.45}, f"{VAL} is truncated or damaged: unexpected end of data"),
    (("cut",), {DEVKIT: 0.5}, f"{DEVKIT} is truncated or damaged: "),
    (("train", SECOND), None, f"are missing, such as {SECOND}"),
    (("train", "n02000000.tar"), {"n02000000_1.JPEG": b"x"}, "n02000000.tar, which is not a class of"),
    (("train", "readme.txt"), b"x", f"{TRAIN} holds 'readme.txt', but plain files named n[0-9]"),
    (("train", f"../{SECOND}"), {IMAGE: b"x"}, f"{TRAIN} holds '../{SECOND}'"),
    (("train", SECOND), "/etc/passwd", f"{TRAIN} holds '{SECOND}', but plain files"),
    (("train", SECOND), b"no archive", f"{TRAIN}: {SECOND} is truncated or damaged: truncated header"),
    (("train", SECOND, "readme.txt"), b"x", f"{TRAIN}: {SECOND} holds 'readme.txt'"),
    (("train", SECOND, f"../{IMAGE}"), b"x", f"{TRAIN}: {SECOND} holds '../{IMAGE}'"),
    (("train", SECOND, f"/tmp/{IMAGE}"), b"x", f"{TRAIN}: {SECOND} holds '/tmp/{IMAGE}'"),
    (("train", SECOND, f"{SHARK}_1.JPEG"), b"x", f"{SECOND} holds '{SHARK}_1.JPEG'"),
    (("train", SECOND, IMAGE), "/etc/passwd", f"{SECOND} holds '{IMAGE}'"),
    (("train", SECOND, IMAGE), b"", f"{SECOND} is damaged: {IMAGE} is empty"),
    (("train", SECOND, IMAGE), None, f"{TRAIN}: {SECOND} is truncated or damaged: 3 images of {TENCH}, not 4"),
    (("val", "ILSVRC2012_val_00000003.JPEG"), None, f"{VAL} is truncated or damaged: 0 images of {SHARK}, not 1"),
    (("val", "ILSVRC2012_val_00000009.JPEG"), b"x", f"val_00000009.JPEG, but {DEVKIT} has 6 validation images"),
    (("val", "../ILSVRC2012_val_00000003.JPEG"), b"x", f"{VAL} holds '../ILSVRC2012_val_00000003.JPEG'"),
    (("val", "ILSVRC2012_val_00000003.JPEG"), "../../x", f"{VAL} holds 'ILSVRC2012_val_00000003.JPEG', but plain"),
    (("mat",), b"MATLAB 5.0 MAT-file" * 20, f"{META} or ILSVRC2012_validation_ground_truth.txt cannot be read ("),
    (("meta", 1, 1), "../../x", "has a class '../../x' of 4 images; valid is a class such as n01440764 of 1300"),
    (("meta", 1, 1), SHARK, f"{DEVKIT}: {META} is damaged: 3 classes, 3 IDs, 2 WNIDs"),
    (("truth", 2), 7, "cannot be read (KeyError: 7)"),
    (("truth", 2), 1, f"{META} is damaged: 3 classes, 3 IDs, 3 WNIDs, 2 in {TRUTH}"),
]


@pytest.mark.parametrize(("where", "value", "message"), DAMAGE)
def test_a_wrong_archive_is_one_line_and_the_right_one_goes_on(tmp_path, target, expected, where, value, message):
    at = content = good()
    for key in where[:-1]:
        at = at[key]
    at[where[-1]] = value
    if value is None:
        del at[where[-1]]
    source = write(content, tmp_path / "source")
    with pytest.raises(UserError) as error:
        prepare_imagenet(source, target)
    assert message in str(error.value) and str(error.value).startswith(str(source))
    assert "\n" not in str(error.value)
    kept = times(target / "train", target / "val")
    # val and the class before the damaged one; the class of val before; nothing
    assert len(kept) == (8 if f"{SECOND} " in message else 3 if f"of {SHARK}" in message else 0)
    assert {p.name for p in tmp_path.rglob("*.JPEG")} <= times(target).keys()  # and not outside
    prepare_imagenet(write(good(), source), target)
    assert tree(target) == expected
    assert kept.items() <= times(target).items()


@pytest.mark.parametrize("state", ["new", "begun", "without words.txt"])
def test_a_second_process_is_kept_out(source, target, expected, state, monkeypatch):
    if state != "new":
        prepare_imagenet(source, target)
        (target / "words.txt").unlink()
        shutil.rmtree(target / "val" / SHARK) if state == "begun" else None
    target.mkdir(parents=True, exist_ok=True)
    with FileLock(target / ".lock"):
        before = times(target)
        with pytest.raises(UserError, match="is in use by another eit data prepare: wait for it, or stop it"):
            prepare_imagenet(source, target)
        assert times(target) == before and not (target / ".unpacking").exists()
    synced = []
    for system in ("Linux", "Darwin"):
        with monkeypatch.context() as patch:
            patch.setattr(platform, "system", lambda system=system: system)
            patch.setattr(os, "sync", lambda: synced.append("all"))
            patch.setattr(os, "fsync", lambda file: synced.append(os.readlink(f"/proc/self/fd/{file}")))
            prepare_imagenet(source, target)
        assert tree(target) == expected
        if state == "new":
            shutil.rmtree(target)
    images = [name for name in synced if name.endswith(".JPEG")]
    assert len(images) == {"new": 15, "begun": 0, "without words.txt": 0}[state]
    assert synced.count("all") == {"new": 6, "begun": 1, "without words.txt": 0}[state]  # per class and part


def test_a_target_of_something_else_is_one_line(source, target, monkeypatch):
    written, whole = [], Path.write_bytes
    prepare_imagenet(source, target)
    (target / "train" / TENCH / f"{TENCH}_7.JPEG").unlink()
    with pytest.raises(UserError, match=f"train/{TENCH} has 3 images, not 4: remove it and run this again"):
        prepare_imagenet(source, target)
    for removed in ("train", "val"):
        shutil.rmtree(target / removed / TENCH)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_bytes", lambda path, data: written.append(path.name) or whole(path, data))
            prepare_imagenet(source, target)
    assert sorted(written) == sorted(times(target / "train" / TENCH, target / "val" / TENCH))  # no other was
    (target / "val" / "cats").mkdir()
    with pytest.raises(
        UserError, match="val/cats is not a class of ILSVRC2012_devkit_t12.tar.gz: remove it, or choose"
    ):
        prepare_imagenet(source, target)
    with pytest.raises(UserError, match=f"{TRAIN} cannot be written: File exists"):
        prepare_imagenet(source, source / TRAIN)
