import pickle
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from eit import distributed
from eit.config import Augment, Data
from eit.data.augment import erase, shift_and_flip, simple_crop
from eit.data.datasets import open_data
from eit.data.images import Preprocessing, normalise
from eit.data.loaders import CachedLoader, EvaluationLoader, WorkerLoader, train_loader
from eit.data.order import SampleOrder
from eit.errors import UserError
from eit.randomness import Stream, seed_of, seeded, set_seed

CPU = torch.device("cpu")
VIEW = Preprocessing(16, 16, "bicubic", (0.5,) * 3, (0.5,) * 3)


def sample_order(images=36, batch_size=4, accumulate=1, world=1, repeats=1, seed=0):
    return SampleOrder(images, batch_size, accumulate, world, repeats, seed)


# -- Order


def test_the_order_is_a_function_of_seed_and_epoch():
    assert torch.equal(sample_order().samples(3), sample_order().samples(3))
    assert not torch.equal(sample_order().samples(3), sample_order().samples(4))
    assert not torch.equal(sample_order().samples(3), sample_order(seed=1).samples(3))
    index, repeat = sample_order().samples(0).view(-1, 2).unbind(1)
    assert sorted(index.tolist()) == list(range(36)) and not repeat.any()


def test_a_last_incomplete_step_is_left_out():
    order = sample_order(images=38, batch_size=4, accumulate=3)
    assert (order.global_batch, order.steps) == (12, 3)
    assert order.samples(0).shape == (3, 12, 2)


@pytest.mark.parametrize(
    ("world", "accumulate", "batch_size"), [(1, 1, 12), (2, 1, 6), (3, 1, 4), (2, 3, 2), (1, 6, 2)]
)
def test_a_global_batch_holds_the_same_samples_on_any_number_of_ranks(world, accumulate, batch_size):
    order = sample_order(images=48, batch_size=batch_size, accumulate=accumulate, world=world, repeats=3)
    reference = sample_order(images=48, batch_size=12, repeats=3).samples(1)
    seen = [list(order.batches(1, 0, rank)) for rank in range(world)]
    for step in range(order.steps):
        parts = [b for batches in seen for b in batches[step * accumulate : (step + 1) * accumulate]]
        assert all(len(part) == batch_size for part in parts)
        assert sorted(map(tuple, torch.cat(parts).tolist())) == sorted(map(tuple, reference[step].tolist()))


def test_an_epoch_can_start_at_any_step():
    order = sample_order(accumulate=2)
    whole = list(order.batches(0, 0, 0))
    assert all(torch.equal(a, b) for a, b in zip(whole[2 * 2 :], order.batches(0, 2, 0), strict=True))


def test_repeated_augmentation_shows_each_image_three_times_in_a_batch_and_a_third_of_them_an_epoch():
    order = sample_order(images=36, batch_size=12, repeats=3)
    for step in order.samples(0):
        index, repeat = step.unbind(1)
        assert sorted(index.bincount()[index.bincount() > 0].tolist()) == [3] * 4
        assert repeat.tolist() == [0, 1, 2] * 4
    assert len(order.samples(0)[:, :, 0].unique()) == 12
    ranks = [
        set(torch.cat(list(sample_order(36, 4, world=3, repeats=3).batches(0, 0, rank)))[:, 1].tolist())
        for rank in range(3)
    ]
    assert ranks == [{0}, {1}, {2}]  # each rank sees another copy of an image


# -- Augmentation


def test_seeding_a_sample_leaves_the_generators_as_they_were():
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    with seeded(Stream.SAMPLE, 2):
        first = random.random(), np.random.rand(), torch.rand(1)
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert torch.equal(torch.get_rng_state(), states[2])
    set_seed(Stream.SAMPLE, 2)
    assert (random.random(), np.random.rand(), torch.rand(1)) == first


def test_shift_and_flip_agree_with_a_loop():
    torch.manual_seed(0)
    x = torch.randint(0, 255, (60, 3, 7, 5), dtype=torch.uint8)
    dy, dx, flip = torch.rand(3, 60)
    actual = shift_and_flip(x, 2, 0.5, dy, dx, flip)
    for i in range(60):
        top, left = int(dy[i] * 5), int(dx[i] * 5)
        one = F.pad(x[i], (2,) * 4)[:, top : top + 7, left : left + 5]
        assert torch.equal(actual[i], one.flip(2) if flip[i] < 0.5 else one)
    assert {int(d * 5) for d in dy} == set(range(5))


def test_erasing_replaces_one_box_by_noise():
    torch.manual_seed(0)
    x = torch.zeros(500, 1, 12, 12)
    noise = torch.randn(8, 1, 12, 12)
    out = erase(x, 0.25, noise, *torch.rand(5, 500))
    erased = [image[0] for image in out if image.any()]
    assert 80 < len(erased) < 170
    sizes, used = [], set()
    for image in erased:
        rows, columns = image.any(dim=1).nonzero(), image.any(dim=0).nonzero()
        box = image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert (box != 0).all() and (image != 0).sum() == box.numel()
        sizes.append(box.numel() / 144)
        used |= {k for k in range(8) if torch.equal(image[image != 0], noise[k, 0][image != 0])}
    assert used == set(range(8))
    assert 0.1 < np.mean(sizes) < 0.25 and max(sizes) < 0.45


def everything(loader, epoch=0, first_step=0):
    loader.prepare()
    return [(b.images.clone(), b.labels.clone()) for b in loader.epoch(epoch, first_step)]


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(a, b, strict=True)
    )


CACHED = Augment(pad_crop=2, hflip=0.5, erasing=0.5)
STREAMED = Augment(crop_scale=(0.3, 1), hflip=0.5, erasing=0.5, rand_augment="rand-m9-mstd0.5-inc1")


@pytest.mark.parametrize(("augment", "kind"), [(CACHED, CachedLoader), (STREAMED, WorkerLoader)])
def test_augmentation_is_a_function_of_counters(folder, augment, kind):
    images, _ = open_data(Data(root=str(folder)))

    def make(workers=0, **changes):
        return train_loader(images, VIEW, sample_order(**changes), Data(workers=workers), augment, CPU)

    loader = make(repeats=3)
    assert isinstance(loader, kind)
    first = everything(loader)
    assert same(first, everything(loader))
    torch.manual_seed(123), random.seed(5), np.random.seed(5)
    assert same(first, everything(make(repeats=3, workers=2)))
    assert same(first[4:], everything(loader, first_step=4))
    assert not same(first, everything(loader, epoch=1))
    assert not same(first, everything(make(repeats=3, seed=1)))
    images_of_first = first[0][0]
    assert not torch.equal(images_of_first[0], images_of_first[1])  # two copies of one image


POLICIES = [
    dict(rand_augment="rand-m9-mstd0.5-inc1"),
    dict(auto_augment="original"),
    dict(auto_augment="v0r-mstd0.5"),
    dict(augmix="augmix-m5-w4-d2"),
    dict(three_augment=True, color_jitter=0.3),
    dict(simple_crop=True),
    dict(color_jitter=0.4),
    dict(crop_scale=(0.08, 1.0)),
]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: " ".join(policy))
def test_every_policy_changes_images_and_draws_from_counters_alone(folder, policy):
    images, _ = open_data(Data(root=str(folder)))
    for i in range(len(images)):  # colours, else most policies do nothing
        pixels = np.random.default_rng(i).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images.sources[i])

    def batches(workers=0, **augment):
        loader = train_loader(images, VIEW, sample_order(), Data(workers=workers, cache=False), Augment(**augment), CPU)
        assert isinstance(loader, WorkerLoader)
        return everything(loader)

    first = batches(**policy)
    torch.manual_seed(1), random.seed(2), np.random.seed(3)
    assert same(first, batches(workers=2, **policy))
    plain = batches()
    changed = [
        not torch.equal(a, b) for (x, _), (u, _) in zip(first, plain, strict=True) for a, b in zip(x, u, strict=True)
    ]
    assert sum(changed) > len(changed) / 2
    assert all(torch.equal(y, v) for (_, y), (_, v) in zip(first, plain, strict=True))


@pytest.mark.parametrize(
    ("key", "policy"),
    [("augmix", "rand-m9"), ("auto_augment", "rand-m9"), ("rand_augment", "v0"), ("augmix", "augmix-x1")],
)
def test_a_policy_of_another_kind_is_one_line(folder, key, policy):
    images, _ = open_data(Data(root=str(folder)))
    with pytest.raises(UserError, match=f"augment.{key}={policy} is not a policy that timm knows"):
        train_loader(images, VIEW, sample_order(), Data(), Augment(**{key: policy}), CPU)


def test_the_simple_crop_keeps_the_shorter_side_and_moves_by_4_pixels():
    image = Image.fromarray(np.arange(64 * 32 * 3, dtype=np.uint32).astype(np.uint8).reshape(32, 64, 3))
    crop = simple_crop(Preprocessing(32, 32, "bicubic", (0.5,) * 3, (0.5,) * 3))
    torch.manual_seed(0)
    views = [np.asarray(crop(image)) for _ in range(20)]
    assert {v.shape for v in views} == {(32, 32, 3)} and len({v.tobytes() for v in views}) > 10
    padded = np.pad(np.asarray(image), ((4, 4), (4, 4), (0, 0)), mode="reflect")
    windows = {padded[y : y + 32, x : x + 32].tobytes() for y in range(9) for x in range(41)}
    assert all(v.tobytes() in windows for v in views)


def test_workers_live_on_and_give_the_same_batches_each_epoch(folder):
    images, _ = open_data(Data(root=str(folder)))
    none, two = (train_loader(images, VIEW, sample_order(), Data(workers=n), STREAMED, CPU) for n in (0, 2))
    for epoch in range(3):
        assert same(everything(none, epoch), everything(two, epoch))


def test_cached_and_streamed_images_are_the_same_without_augmentation(folder):
    images, _ = open_data(Data(root=str(folder)))
    loaders = [
        train_loader(images, VIEW, sample_order(), Data(workers=0, cache=c), Augment(), CPU) for c in (True, False)
    ]
    assert isinstance(loaders[0], CachedLoader) and isinstance(loaders[1], WorkerLoader)
    for (x, y), (u, v) in zip(*map(everything, loaders), strict=True):
        torch.testing.assert_close(x, u)
        assert torch.equal(y, v)


def test_a_cache_cannot_have_policies_that_work_image_by_image(folder):
    images, _ = open_data(Data(root=str(folder)))
    with pytest.raises(UserError, match="data.cache=true"):
        train_loader(images, VIEW, sample_order(), Data(cache=True), STREAMED, CPU)


@pytest.mark.parametrize("cache", [True, False])
def test_unreadable_training_images_are_named_and_budgeted(folder, capsys, cache):
    (folder / "train" / "digit1" / "003.png").write_bytes(b"nothing")
    images, _ = open_data(Data(root=str(folder)))

    def run(budget):
        config = Data(workers=0, cache=cache, bad_image_budget=budget)
        loader = train_loader(images, VIEW, sample_order(), config, Augment(), CPU)
        batches = everything(loader)
        loader.bad.check(len(loader.bad.seen))  # as the training loop does each step
        return batches

    batches = run(0.05)
    assert len(batches) == 9
    assert capsys.readouterr().err.count("003.png") == 1
    with pytest.raises(UserError, match=r"1 of 36 training images are unreadable.*bad_image_budget.*003\.png"):
        run(0.0)


@pytest.mark.parametrize("augment", [STREAMED, Augment(pad_crop=1, hflip=0.5)])
def test_samples_can_be_sent_to_workers_that_are_spawned(folder, augment):
    images, _ = open_data(Data(root=str(folder)))
    loader = train_loader(images, VIEW, sample_order(), Data(workers=0, cache=False), augment, CPU)
    key = (0, 3, 0)
    assert torch.equal(pickle.loads(pickle.dumps(loader.loader.dataset))[key][0], loader.loader.dataset[key][0])


def test_streams_of_random_numbers_do_not_meet():
    seeds = {seed_of(stream, *counters) for stream in Stream for counters in ((0,), (0, 0), (0, 5), (5, 0), (0, 5, 1))}
    assert len(seeds) >= len(Stream) * 4


# -- Evaluation


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_each_image_is_evaluated_once_in_the_same_batches_on_any_number_of_ranks(folder, monkeypatch, world):
    _, val = open_data(Data(root=str(folder)))
    alone = list(EvaluationLoader(val, VIEW, 5, 0, CPU))
    monkeypatch.setattr(distributed, "world_size", lambda: world)
    found = {}
    for rank in range(world):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        loader = EvaluationLoader(val, VIEW, 5, 0, CPU)
        for _ in range(2):  # the second time from memory
            found |= dict(zip(loader.own_blocks, loader, strict=True))
    assert sorted(found) == [0, 1, 2]
    assert sum(batch.valid for batch in found.values()) == len(val) == 12
    for block, batch in enumerate(alone):
        assert torch.equal(batch.images, found[block].images) and len(batch.images) == 5
    labels = torch.cat([b.labels[: b.valid] for _, b in sorted(found.items())])
    assert labels.tolist() == val.labels
    first = normalise(VIEW.pixels(val.read(0, 3))[None], VIEW.mean, VIEW.std)
    assert torch.equal(alone[0].images[:1], first)


def test_an_unreadable_validation_image_stops_and_is_named(folder):
    (folder / "val" / "digit1" / "013.png").write_bytes(b"nothing")
    _, val = open_data(Data(root=str(folder)))
    with pytest.raises(UserError, match=r"unreadable validation image: .*013\.png"):
        list(EvaluationLoader(val, VIEW, 5, 0, CPU))
