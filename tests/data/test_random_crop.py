"""The training pipeline against timm's: same draws, same boxes, pixels within rounding."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from sklearn.datasets import load_sample_image
from timm.data import auto_augment, create_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation

from eit.config import Augment, Data
from eit.data import shear
from eit.data.augment import erase_at_once, erase_boxes, erase_one_by_one, erasing_box, image_transform, noise_fields
from eit.data.datasets import open_data
from eit.data.images import Images, Normaliser, Preprocessing, UnreadableImage, normalise
from eit.data.loaders import train_loader
from eit.data.order import SampleOrder
from eit.data.random_crop import ResizedCrop
from eit.randomness import Stream, seeded

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VIEW = Preprocessing(64, 64, "bicubic", MEAN, STD)
PHOTO = Image.fromarray(load_sample_image("china.jpg"))  # 640 x 427
RANGES = ((0.08, 1.0), (3 / 4, 4 / 3))
POLICY = "rand-m9-mstd0.5-inc1"
RECIPE = Augment(crop_scale=(0.08, 1), hflip=0.5, rand_augment=POLICY, erasing=0.25)


@pytest.fixture(scope="session")
def photo(tmp_path_factory):
    file = tmp_path_factory.mktemp("photo") / "china.jpg"
    PHOTO.save(file, quality=90)
    return file


def opened(file, view=VIEW, channels=3, ranges=RANGES, seed=0):
    crop = ResizedCrop(view, *ranges)
    images = Images(["a"], [0], ["china"], [str(file)])
    with seeded(Stream.SAMPLE, seed):
        return images.read(0, channels, lambda image, channels: crop(image, channels, {}))


def of_timm(file, view=VIEW, seed=0, mode="RGB"):
    crop = RandomResizedCropAndInterpolation(view.size, *RANGES, view.interpolation)
    with seeded(Stream.SAMPLE, seed), Image.open(file) as image:
        return crop(image.convert(mode))


def distance(a, b):
    return np.abs(np.asarray(a, dtype=float) - np.asarray(b, dtype=float))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [96, 250])  # 250: some crops are enlarged
def test_crops_are_those_of_timm_within_rounding_where_nothing_is_scaled(photo, monkeypatch, interpolation, size):
    monkeypatch.setattr(JpegImageFile, "draft", lambda *_: pytest.fail("scaled"))
    view = Preprocessing(size, size, interpolation, MEAN, STD)
    ranges = ((0.03, 0.1), (3 / 4, 4 / 3)) if size == 96 else RANGES
    crop = RandomResizedCropAndInterpolation(size, *ranges, interpolation)
    seen = 0
    for seed in range(12):
        with seeded(Stream.SAMPLE, seed), Image.open(photo) as image:
            _, _, h, w = crop.get_params(image, *ranges)
        if min(h, w) < 2 * size:
            with seeded(Stream.SAMPLE, seed), Image.open(photo) as image:
                expected = crop(image)
            apart = distance(opened(photo, view, ranges=ranges, seed=seed), expected)
            assert apart.max() <= 2 and apart.mean() < 0.01
            seen += 1
    assert seen >= 6


def test_a_scaled_jpeg_gives_the_same_crop_and_is_never_smaller_than_the_output(photo, monkeypatch):
    draft, factors = JpegImageFile.draft, []

    def watched(image, mode, size):
        before = image.size
        draft(image, mode, size)
        factors.append(before[0] / image.size[0])

    monkeypatch.setattr(JpegImageFile, "draft", watched)
    used, apart, shifted = set(), [], []
    for seed in range(20):
        factors.clear()
        mine = opened(photo, seed=seed)
        with seeded(Stream.SAMPLE, seed):
            top, left, h, w = RandomResizedCropAndInterpolation.get_params(PHOTO, *RANGES)
        factor = round(factors[0]) if factors else 1
        assert min(h, w) / factor >= 64 and (factor == 8 or min(h, w) / (2 * factor) < 64)  # the least that will do
        used.add(factor)
        expected = of_timm(photo, seed=seed)
        apart.append(distance(mine, expected).mean())
        half = w / 64 / 2  # a pixel of the output
        x = left + half if left + half + w <= PHOTO.width else left - half
        with Image.open(photo) as image:
            shifted.append(
                distance(image.resize((64, 64), Image.Resampling.BICUBIC, (x, top, x + w, top + h)), expected).mean()
            )
    assert used == {2, 4}
    assert np.mean(apart) < np.mean(shifted) / 2 and np.mean(apart) < 2.5


@pytest.mark.parametrize("orientation", range(2, 9))
def test_an_image_on_its_side_is_cropped_upright_and_as_timm_crops_it(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    PHOTO.save(tmp_path / "a.jpg", quality=95, exif=exif)
    upright = Image.open(tmp_path / "a.jpg")
    upright = ImageOps.exif_transpose(upright)
    upright.save(tmp_path / "a.png")
    for seed in range(3):
        expected = of_timm(tmp_path / "a.png", seed=seed)
        assert distance(opened(tmp_path / "a.jpg", seed=seed), expected).max() <= 2
        assert distance(opened(tmp_path / "a.png", seed=seed), expected).max() <= 2


@pytest.mark.parametrize("mode", ["L", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3])
def test_other_modes_of_a_jpeg_are_converted_as_ever(tmp_path, mode, channels):
    PHOTO.convert(mode).save(tmp_path / "a.jpg", quality=95)
    for size in (64, 300):  # scaled and not
        view = Preprocessing(size, size, "bicubic", MEAN[:channels], STD[:channels])
        mine = opened(tmp_path / "a.jpg", view, channels, seed=1)
        assert mine.mode == ("L" if channels == 1 else "RGB")
        assert distance(mine, of_timm(tmp_path / "a.jpg", view, 1, mine.mode)).mean() < 5


def test_a_cut_file_is_unreadable_however_little_of_it_the_crop_needs(tmp_path, photo):
    (tmp_path / "cut.jpg").write_bytes(photo.read_bytes()[:-3000])
    for seed in range(5):
        with pytest.raises(UnreadableImage, match=r"cut\.jpg: image file is truncated"):
            opened(tmp_path / "cut.jpg", seed=seed)


def test_the_policy_draws_as_timm_draws_and_gives_the_same_pixels():
    ours = image_transform(VIEW, RECIPE)
    keys = dict(color_jitter=None, auto_augment=POLICY, interpolation="bicubic", hflip=0.5, mean=MEAN)
    timms = create_transform(64, is_training=True, use_prefetcher=True, **keys).transforms[1:-1]
    image = PHOTO.resize((64, 64))
    apart = []
    for seed in range(150):
        with seeded(Stream.SAMPLE, seed):
            mine, box = ours(image)
        with seeded(Stream.SAMPLE, seed):
            expected = image
            for step in timms:
                expected = step(expected)
            assert box[:4] == box_of_timm(0.25)
        apart.append(distance(mine, expected))
    assert np.mean([(a > 0).mean() for a in apart]) < 0.01  # of the pixels, by a level, which a second op may amplify
    assert sum(a.max() > 1 for a in apart) < 6


def box_of_timm(probability, size=64):
    erased = torch.ones(1, size, size)
    RandomErasing(probability, mode="const", device="cpu")(erased)
    rows, columns = (erased[0] == 0).nonzero().unbind(1)
    if not len(rows):
        return [0] * 4
    top, left = int(rows.min()), int(columns.min())
    return [top, left, int(rows.max()) + 1 - top, int(columns.max()) + 1 - left]


@pytest.mark.parametrize("resample", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC])
@pytest.mark.parametrize("name", shear.FASTER)
def test_shears_and_translations_are_those_of_pillow(name, resample):
    image = PHOTO.resize((61, 45))
    for amount in (0.0, 0.27, -0.3, 0.4501, -1.2, 2.5):
        given = dict(fillcolor=(124, 116, 104), resample=resample)
        expected = auto_augment.NAME_TO_OP[name](image, amount, **given)
        apart = distance(shear.FASTER[name](image, amount, **given), expected)
        assert apart.max() <= 1 and (apart > 0).mean() < 0.05, (name, amount)


def test_erased_boxes_are_noise_of_their_own_and_nothing_else_changes():
    with seeded(Stream.SAMPLE, 0):
        boxes = torch.tensor([erasing_box(0.25, 64, 64) for _ in range(400)])
    assert 0.2 < (boxes[:, 2] > 0).float().mean() < 0.3
    area = (boxes[:, 2] * boxes[:, 3]).float()[boxes[:, 2] > 0] / 64**2
    assert 0.14 < area.mean() < 0.21 and area.max() < 0.35
    fields = noise_fields((64, 64, 3), 0, 0, torch.device("cpu"))
    x = erase_boxes(torch.full((400, 3, 64, 64), 7.0), boxes, fields)
    noise = []
    for image, (top, left, h, w, seed) in zip(x, boxes.tolist(), strict=True):
        inside = image[:, top : top + h, left : left + w]
        assert torch.equal(inside, fields[seed % 64, top : top + h, left : left + w].permute(2, 0, 1))
        noise.append(inside.flatten().clone())
        image[:, top : top + h, left : left + w] = 7
    assert (x == 7).all()
    noise = torch.cat(noise)
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    assert len({seed % 64 for seed in boxes[boxes[:, 2] > 0, 4].tolist()}) > 40
    again = erase_boxes(torch.zeros(3, 3, 64, 64), boxes[10:13], fields)  # the batch around an image does not matter
    both = erase_boxes(torch.zeros(400, 3, 64, 64), boxes, fields)
    assert torch.equal(both[10:13], again)


def test_boxes_are_erased_alike_one_by_one_and_at_once():
    with seeded(Stream.SAMPLE, 1):
        boxes = torch.tensor([erasing_box(0.5, 24, 40) for _ in range(30)])
    fields = noise_fields((24, 40, 3), 0, 0, torch.device("cpu"))
    x = torch.randn(30, 24, 40, 3).permute(0, 3, 1, 2)
    at_once = erase_at_once(x, boxes, fields)
    assert at_once.is_contiguous(memory_format=torch.channels_last) and not torch.equal(at_once, x)
    assert torch.equal(at_once, erase_one_by_one(x.clone(), boxes, fields))


def test_normalising_a_batch_as_it_lies_in_memory_is_normalising():
    pixels = torch.randint(0, 256, (3, 64, 64, 3), dtype=torch.uint8)
    expected = normalise(pixels.permute(0, 3, 1, 2), MEAN, STD)
    torch.testing.assert_close(Normaliser(VIEW, torch.device("cpu"))(pixels), expected, atol=1e-6, rtol=1e-5)


def batches(folder, first_step=0, batch_size=6, workers=0, repeats=3, **changes):
    images, _ = open_data(Data(root=str(folder)))
    order = SampleOrder(36, batch_size, 1, 1, repeats, 0)
    loader = train_loader(
        images, VIEW, order, Data(workers=workers, cache=False, **changes), RECIPE, torch.device("cpu")
    )
    return [b.images.clone() for b in loader.epoch(1, first_step)]


def test_samples_do_not_depend_on_batch_size_workers_or_where_the_epoch_begins(folder):
    files = sorted((folder / "train").rglob("*.png"))
    for i, file in enumerate(files):
        file.unlink()
        PHOTO.crop((i, i, 400, 300)).save(file.with_suffix(".jpg"), quality=90)
    whole = torch.cat(batches(folder))
    assert torch.equal(whole, torch.cat(batches(folder, batch_size=4)))  # other copies decoded together
    assert torch.equal(whole[12:], torch.cat(batches(folder, first_step=2, workers=2)))
