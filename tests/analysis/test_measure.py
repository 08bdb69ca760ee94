"""`eit.analyze` on real models: what it finds, what it says it cannot find, and that it leaves no trace."""

import math
import re

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.models.vision_transformer import ResPostBlock
from torch import nn

import eit
from eit.analysis import image_maps
from eit.analysis.attention import head_distances
from eit.analysis.frequency import shares
from eit.analysis.hooks import CannotMeasure, watch
from eit.analysis.measure import analyze
from eit.analysis.robustness import BandAccuracy, band_accuracy, band_noise, rings
from eit.errors import UserError

SWIN = dict(embed_dim=24, depths=(2, 2), num_heads=(1, 2))  # small
SMALL = dict(img_size=32, kernel_size=3, stride=1, pool_size=4, embed_dim=24, depth=3, num_heads=4, num_classes=5)


def small(**arguments):
    torch.manual_seed(0)
    return eit.EIT(**(SMALL | arguments)).eval()


def images(count=3, size=(32, 32), channels=3, seed=0):
    return torch.randn(count, channels, *size, generator=torch.Generator().manual_seed(seed))


def timm_model(name, **arguments):
    torch.manual_seed(0)
    return timm.create_model(name, **arguments).eval()


# -- What it finds ----------------------------------------------------------------------------------------------------


def test_shares_and_distances_are_those_of_the_models_own_tensors():
    """Computed from forward_intermediates and from the weights of each layer, by hand."""
    model, x = small(), images()
    found = analyze(model, x)
    with torch.no_grad():
        maps = model.forward_intermediates(x, intermediates_only=True)
        for place, image in zip(found.layers_at("block"), maps, strict=True):
            share, with_dc = shares(image.permute(0, 2, 3, 1))
            means = share.mean().item(), with_dc.mean().item()
            assert (place.share, place.share_with_dc) == pytest.approx(means, rel=1e-5)
            assert place.share_se == pytest.approx(share.std().item() / math.sqrt(3), rel=1e-4)
        tokens, h, w = model.embed(x)
        for block, place in zip(model.blocks, found.attention, strict=True):
            mixer, y = block.attn, block.norm1(tokens)[..., block.attn.conv_channels :]
            q, k, _ = mixer.qkv(y).unflatten(2, (3, 4, -1)).permute(2, 0, 3, 1, 4)
            weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1)
            assert place.distance == pytest.approx(head_distances(weights, (h, w), 4).mean(dim=0).tolist(), rel=1e-4)
            tokens = block(tokens, h, w)
    assert [place.pitch for place in found.attention] == [4, 4, 4] and found.grid == (8, 8) and found.images == 3


def test_every_sub_block_and_both_kinds_of_channels_are_seen():
    model, x = small(schedule=(0, 12, 24)), images()
    seen = {}
    with torch.no_grad(), watch(model, lambda t: seen.setdefault((t.layer, t.where), t.grid)):
        model(x)
    with torch.no_grad():
        tokens, h, w = model.embed(x)
        assert torch.equal(seen[0, "stem"], tokens[:, 1:].unflatten(1, (h, w)))
        for number, block in enumerate(model.blocks, start=1):
            mixed = block.attn(block.norm1(tokens), h, w)[:, 1:].unflatten(1, (h, w))
            conv = block.attn.conv_channels
            parts = dict(conv=mixed[..., :conv], attention=mixed[..., conv:])
            for name, part in parts.items():
                assert ((number, name) in seen) == (part.shape[-1] > 0)
                if part.shape[-1]:
                    assert torch.equal(seen[number, name], part)
            assert seen[number, "mixer"] == pytest.approx(tokens[:, 1:].unflatten(1, (h, w)) + mixed, abs=1e-6)
            tokens = block(tokens, h, w)
            assert torch.equal(seen[number, "block"], tokens[:, 1:].unflatten(1, (h, w)))


@pytest.mark.parametrize(
    "name, grid, pitch, heads, missing",
    [
        ("vit_tiny_patch16_224", (7, 7), 16, 3, []),
        ("deit_tiny_distilled_patch16_224", (7, 7), 16, 3, []),
        ("beit_base_patch16_224", (7, 7), 16, 12, []),
        ("eva02_tiny_patch14_224", (8, 8), 14, 3, []),
        ("vit_relpos_small_patch16_224", (7, 7), 16, 6, ["image-dependent share of the class token: "]),
        # two attentions of 6 heads side by side
        ("vit_small_patch16_18x2_224", (7, 7), 16, 12, ["gain of mixer and MLP in layers 1, 2: "]),
        ("pit_ti_224", (13, 13), 8, 2, []),
        ("torchvision", (7, 7), 16, 3, []),
    ],
)
def test_vits_of_timm_and_torchvision_are_measured_whole_and_their_outputs_stay(name, grid, pitch, heads, missing):
    if name == "torchvision":
        torch.manual_seed(0)
        model = torchvision.models.VisionTransformer(112, 16, 2, 3, 192, 384).eval()
    else:
        narrow = dict(embed_dim=192) if "beit" in name else {}
        model = timm_model(name, img_size=112, depth=(1, 1, 1) if name == "pit_ti_224" else 2, **narrow)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)  # torchvision's head has zeros alone
    x = images(2, (112, 112))
    with torch.no_grad():
        before = model(x)
        with watch(model, lambda tokens: None, lambda heads: None, None, lambda flow: None):
            during = model(x)
    found = analyze(model, x)
    assert torch.equal(before, during) and before.std() > 0.01
    assert all(line.startswith(start) for line, start in zip(found.missing, missing, strict=True))
    assert len(found.class_token_share) == (0 if "relpos" in name else found.depth)
    assert len(found.transfers("mixer")) == len(found.transfers("mlp")) == (0 if "18x2" in name else found.depth)
    assert len(found.attention) == found.depth == len(found.layers_at("block"))
    assert found.grid == grid and found.attention[0].pitch == pytest.approx(pitch)
    assert all(0 < d < 1.42 * 112 for layer in found.attention for d in layer.distance)
    assert len(found.attention[0].distance) == heads


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_nn_multiheadattention_keeps_its_fast_path(batch):
    """Under any other torch function mode it takes another, whose sums differ in the last bits."""
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(32, 8, 3, 4, 64, 128).eval()
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    x = images(batch)
    with torch.no_grad():
        before = model(x)
        with watch(model, None, lambda heads: None):
            during = model(x)
    assert torch.equal(before, during)


def test_a_norm_behind_the_mlp_is_not_taken_for_what_the_mixer_left():
    found = analyze(
        timm_model("vit_tiny_patch16_224", block_fn=ResPostBlock, depth=2, img_size=64), images(1, (64, 64))
    )
    assert found.layers_at("mixer") == [] and len(found.layers_at("block")) == 2


class Maps(nn.Module):
    """A block on maps of 8 x 8 places and 8 channels, which may lie in either order."""

    def __init__(self, output_fmt):
        super().__init__()
        self.output_fmt = output_fmt
        block = nn.Module()
        block.attn, block.mlp, block.forward = nn.Identity(), nn.Identity(), lambda x: x
        self.block = block
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        first = x[:, :1].expand(-1, 8, -1, -1)
        return self.block(first if self.output_fmt == "NCHW" else first.permute(0, 2, 3, 1))


def test_maps_with_as_many_channels_as_places_are_read_in_the_models_order():
    x = images(2, (8, 8))
    first, last = (analyze(Maps(order), x) for order in ("NCHW", "NHWC"))
    assert first.layers_at("block")[0].share == last.layers_at("block")[0].share > 0.5


def test_the_weights_of_torchvisions_attention_are_the_modules_own():
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(32, 8, 2, 4, 24, 48, num_classes=3).eval()
    x, calls = images(2), []
    with torch.no_grad(), watch(model, None, calls.append):
        model(x)
    with torch.no_grad():
        tokens = model._process_input(x)
        tokens = torch.cat((model.class_token.expand(2, -1, -1), tokens), dim=1) + model.encoder.pos_embedding
        block = model.encoder.layers[0]
        y = block.ln_1(tokens)
        _, weights = block.self_attention(y, y, y, need_weights=True, average_attn_weights=False)
    assert calls[0].inputs.weights() == pytest.approx(weights, abs=1e-5)


def test_rectangles_batches_and_grey_images():
    model = small(in_chans=1)
    x = images(5, (32, 56), channels=1)
    at_once, in_turn = analyze(model, x), analyze(model, iter(x.split(2)))
    assert at_once.grid == (8, 14)
    assert [f.share for f in in_turn.frequency] == pytest.approx([f.share for f in at_once.frequency], rel=1e-4)
    assert [h for a in in_turn.attention for h in a.distance] == pytest.approx(
        [h for a in at_once.attention for h in a.distance], rel=1e-4
    )


# -- No trace ---------------------------------------------------------------------------------------------------------


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


def test_the_model_is_left_as_it_was_and_its_outputs_are_the_same_to_the_bit():
    model, x = small(drop_rate=0.5, proj_drop_rate=0.5), images()
    reference, of_all_tokens = model(x), model.forward_head(model.forward_features(x))
    seen = []
    with watch(model, seen.append, seen.append):
        assert torch.equal(model(x), of_all_tokens)
    assert len(seen) == 15
    model.train()
    model.blocks[1].eval()
    modes = [module.training for module in model.modules()]
    found = analyze(model, x)
    assert [module.training for module in model.modules()] == modes and hooks(model) == 0
    assert torch.equal(model.eval()(x), reference)
    assert [f.share for f in found.frequency] == [f.share for f in analyze(model, x).frequency]  # no dropout


def test_no_hook_is_left_after_an_exception():
    model = small().train()
    with pytest.raises(UserError):
        analyze(model, [images(), images(2, (48, 48))])

    def burst(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), watch(model, burst):
        model(images())
    assert hooks(model) == 0 and model.training
    called = F.scaled_dot_product_attention  # no mode is left either
    with pytest.raises(KeyboardInterrupt), watch(model, None, burst):
        model(images())
    model(images())
    assert F.scaled_dot_product_attention is called and hooks(model) == 0


def test_at_most_one_layers_maps_are_alive(monkeypatch):
    """Maps of a layer are gone before those of the next are made; no tensor of the last batch is kept."""
    import gc

    gc.collect()
    model, x = small(num_heads=8), images(4, (64, 64))
    alive, largest = set(), []
    softmax = torch.Tensor.softmax

    def counted(self, *args, **kwargs):
        import weakref

        out = softmax(self, *args, **kwargs)
        alive.add(id(out))
        weakref.finalize(out, alive.discard, id(out))
        largest.append(len(alive))
        return out

    monkeypatch.setattr(torch.Tensor, "softmax", counted)
    analyze(model, x)
    assert len(largest) >= 3 and max(largest) <= 2 and not alive


# -- Bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, line",
    [
        ([], "nothing was measured"),
        (torch.empty(0, 3, 32, 32), "nothing was measured"),
        (torch.zeros(3, 32, 32), "normalised floats (B, channels, height, width), not (3, 32, 32)"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "normalised floats"),
        (["cat.jpg"], "not str"),
        (
            [torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 64, 64)],
            "the same size, not 32x32 and 64x64",
        ),
        (torch.zeros(1, 3, 6, 6), "no layer of EIT has a grid of more than one token for images of 6x6"),
        (torch.full((1, 3, 32, 32), torch.nan), "layer 0 (stem) has values that are not finite"),
    ],
)
def test_bad_images_get_one_line(given, line):
    with pytest.raises(UserError, match=re.escape(line)) as error:
        analyze(small(), given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("rho", [0, -1, 1.5, math.nan])
def test_a_rho_beyond_the_corner_is_refused(rho):
    with pytest.raises(UserError, match="between 0 and sqrt"):
        analyze(small(), images(), rho=rho)


@pytest.mark.parametrize(
    "name, arguments, missing",
    [
        (
            "resnet18",
            {},
            "attention distances of layers 1 to 5: ResNet does not call scaled_dot_product_attention there",
        ),
        ("swin_tiny_patch4_window7_224", SWIN, "layers 1 to 4: SwinTransformer attends within windows there"),
        ("convit_tiny", dict(depth=12), "layers 1 to 12: ConVit does not call scaled_dot_product_attention there"),
        ("cait_xxs24_224", dict(depth=2), "layers 3, 4: Cait attends from 1 to 50 tokens there"),
    ],
)
def test_of_other_models_frequencies_are_measured_and_it_is_said_what_is_missing(name, arguments, missing):
    size = {} if name == "resnet18" else dict(img_size=112)
    found = analyze(timm_model(name, **arguments, **size), images(1, (112, 112)))
    assert any(missing in line for line in found.missing) and all("\n" not in line for line in found.missing)
    assert found.attention == [] and found.layers_at("block")


def test_a_grid_on_which_rho_separates_nothing_is_named():
    (line,) = analyze(small(), images(2, (8, 8))).missing
    assert "shares on 2x2 tokens" in line and "side of rho" in line


def test_maps_with_channels_last_are_read_so():
    torch.manual_seed(0)
    model = torchvision.models.SwinTransformer([4, 4], 24, [1, 1], [1, 2], [7, 7]).eval()  # (B, h, w, C)
    assert analyze(model, images(1, (112, 112))).grid == (28, 28)


@pytest.mark.parametrize(
    "model, line",
    [
        (
            lambda: torchvision.models.resnet18(),
            "ResNet has neither transformer blocks (attn and mlp) nor timm's feature_info",
        ),
        (lambda: nn.Sequential(nn.Conv2d(3, 3, 1)), "Sequential has neither"),
        (lambda: timm_model("hiera_tiny_224"), "Hiera has its tokens in another order"),
    ],
)
def test_models_that_cannot_be_measured_are_refused(model, line):
    with pytest.raises(UserError, match=re.escape(line)):
        analyze(model().eval(), images(1, (224, 224)))


def test_global_attention_on_maps_is_measured():
    """CoAtNet's last stages attend from all of a map to all of it, after a convolution."""
    found = analyze(timm_model("coatnet_pico_rw_224"), images(1, (224, 224)))
    assert found.attention and {layer.grid for layer in found.attention} <= {(14, 14), (7, 7)}
    assert {layer.pitch for layer in found.attention} <= {16, 32}


@pytest.mark.parametrize("name", ["tnt_s_legacy_patch16_224", "mobilevit_xxs"])
def test_tokens_that_are_not_one_grid_an_image_are_not_measured(name):
    with pytest.raises(CannotMeasure, match="no layer of .* has a grid"):
        analyze(timm_model(name, **({} if name == "mobilevit_xxs" else dict(depth=2))), images(2, (224, 224)))


class Twice(nn.Module):
    """A block that runs twice."""

    def __init__(self):
        super().__init__()
        self.inner = small()
        self.inner.blocks[1] = self.inner.blocks[0]

    def forward(self, x):
        return self.inner(x)


def test_a_block_that_runs_twice_is_not_measured():
    with pytest.raises(CannotMeasure, match="layer 1 of Twice runs several times"):
        analyze(Twice().eval(), images())


def test_dropped_tokens_are_not_taken_for_a_smaller_grid():
    class Drop(nn.Module):
        def forward(self, x):
            return x[:, :170]

    model = timm_model("vit_tiny_patch16_224", depth=2)
    model.norm_pre = Drop()  # 169 of 196 tokens would be 13 x 13
    with pytest.raises(CannotMeasure, match="no layer of .* has a grid"):
        analyze(model, images(1, (224, 224)))


@pytest.mark.parametrize("option", ["mask", "padding", "other keys"])
def test_multihead_attention_with_masks_or_other_keys_is_not_followed(option):
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(32, 8, 2, 4, 24, 48, num_classes=3).eval()
    plain = nn.MultiheadAttention.forward

    class Masked(nn.MultiheadAttention):
        pass

    for block in model.encoder.layers:
        attention = block.self_attention

        def forward(query, key, value, attention=attention, **options):
            if option == "mask":
                options["attn_mask"] = torch.zeros(17, 17)
            elif option == "padding":
                options["key_padding_mask"] = torch.zeros(len(query), 17, dtype=torch.bool)
            else:
                key = value = key.clone()
            return attention(query, key, value, **options)

        class Outer(nn.Module):
            def __init__(self, forward, inner):
                super().__init__()
                self.call, self.inner = forward, inner

            def forward(self, *args, **kwargs):
                return self.call(*args, **kwargs)

        block.self_attention = Outer(forward, attention)
    found = analyze(model, images(2))
    assert found.attention == [] and "calls nn.MultiheadAttention with masks or" in found.missing[0]
    assert plain is nn.MultiheadAttention.forward and not torch.overrides._get_current_function_mode()


def test_the_instrument_measures_in_single_precision_whatever_the_model_runs_in():
    model, x = small(), images()
    with torch.autocast("cpu", torch.bfloat16):
        inside = analyze(model, x)
        seen = []
        with torch.no_grad(), watch(model, seen.append):
            model(x)
    for place, tokens in zip(inside.frequency, sorted(seen, key=lambda t: t.layer), strict=True):
        expected = shares(tokens.grid)[0].mean().item()
        assert (place.layer, place.where) == (tokens.layer, tokens.where)
        assert place.share == pytest.approx(expected, abs=1e-6)


def test_a_model_inside_another_is_the_model_that_runs():
    class Halved(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.module = model

        def forward(self, x):
            return self.module(x / 2)

    model, x = small(), images()
    wrapped, halved = analyze(Halved(model), x), analyze(model, x / 2)
    assert [f.share for f in wrapped.frequency] == [f.share for f in halved.frequency]
    assert wrapped.attention[0].pitch == 4  # the stem's own, not image by grid
    assert analyze(nn.DataParallel(model), x).depth == 3


def test_windows_as_large_as_a_batch_of_grids_are_not_taken_for_the_grid():
    """MaxViT's windows have 8 x 8 tokens, on a grid of 64 x 64."""
    found = analyze(timm_model("maxvit_pico_rw_256"), images(1, (256, 256)))
    assert found.grid == (64, 64) and all(layer.grid == (8, 8) for layer in found.attention)
    assert any("attends within windows of 64 tokens there" in line for line in found.missing)
    assert any("frequencies (attention)" in line for line in found.missing)  # in windows as well
    assert {place.grid for place in found.frequency} == {(64, 64), (32, 32), (16, 16), (8, 8)}


# -- Noise by band ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("low, high", [(0.0, 0.2), (0.4, 0.6), (1.0, 1.2)])
def test_noise_lies_in_its_ring(low, high):
    noise = band_noise((4, 3, 64, 48), low, high, torch.Generator().manual_seed(0))
    assert set(noise.unique().tolist()) == {-1, 1}
    energy = torch.fft.fft2(noise).abs().square().mean(dim=(0, 1))
    f = 2 * (torch.fft.fftfreq(64)[:, None] ** 2 + torch.fft.fftfreq(48) ** 2).sqrt()
    inside = energy[(f > low) & (f <= high)].sum() / energy.sum()
    assert inside > 0.6  # the sign leaks the rest
    again = band_noise((4, 3, 64, 48), low, high, torch.Generator().manual_seed(0))
    assert torch.equal(noise, again)


def test_rings_tile_the_spectrum_where_it_has_bins():
    corner = math.sqrt(2)
    assert rings(32, 32) == [*((round(0.2 * i, 9), round(0.2 * (i + 1), 9)) for i in range(6)), (1.2, corner)]
    assert rings(4, 4) == [(0.4, 0.6), (0.6, 0.8), (0.8, 1.0), (1.0, 1.2), (1.2, corner)]


def test_accuracy_falls_where_the_model_looks_for_its_answer():
    """A model that reads the checkerboard alone fails under the highest ring, and not under the lowest."""
    import numpy as np

    from eit.data.images import Images, Preprocessing
    from eit.data.loaders import EvaluationLoader

    board = 1 - 2 * (np.add.outer(np.arange(16), np.arange(16)) % 2)
    sources = [(128 + 10 * sign * board).astype(np.uint8) for sign in (1, -1)] * 10
    data = Images(["even", "odd"], [0, 1] * 10, [str(i) for i in range(20)], sources)

    class Reader(nn.Module):
        def forward(self, x):
            answer = (x[:, 0] * torch.tensor(board)).mean(dim=(1, 2))
            return torch.stack((answer, -answer), dim=1)

    view = Preprocessing(16, 16, "bicubic", (0.5,), (0.5,))
    loader, reader = EvaluationLoader(data, view, 8, 0, torch.device("cpu")), nn.Sequential(nn.Dropout(0.9), Reader())
    clean, *noisy = band_accuracy(reader.train(), loader, view, eps=1.0)
    assert all(module.training for module in reader.modules())
    assert clean == BandAccuracy(None, None, 20, 20) and clean.top1 == 100
    assert noisy[0].top1 == 100 and noisy[-1].high == math.sqrt(2) and noisy[-1].top1 < 80


# -- Single images ----------------------------------------------------------------------------------------------------


def test_pictures_of_an_image():
    model, x = small(), images(2)
    model.head.weight.grad = mine = torch.ones_like(model.head.weight)
    taken, missing = image_maps.compute_maps(model, x, with_rollout=True, with_grad_cam=True)
    assert len(taken) == 2 and missing == []
    assert model.head.weight.grad is mine and model.blocks[0].norm1.weight.grad is None
    for one in taken:
        assert [e.shape for e in one.energy] == [(8, 8)] * 3
        for values in (*one.energy, one.class_attention, one.rollout, one.grad_cam):
            assert values.shape == (8, 8) and values.min() >= 0 and values.max() <= 1
    assert hooks(model) == 0
    with torch.no_grad():
        tokens, h, w = model.embed(x)
        for block in model.blocks[:2]:
            tokens = block(tokens, h, w)
        q, k, _ = (
            model.blocks[2].attn.qkv(model.blocks[2].norm1(tokens)).unflatten(2, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        )
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1)
        seen = weights[0, :, 0, 1:].mean(dim=0).unflatten(0, (8, 8))
    expected = (seen - seen.min()) / (seen.max() - seen.min())
    assert taken[0].class_attention == pytest.approx(expected, abs=1e-3)


def test_what_cannot_be_shown_is_said():
    swin = timm_model("swin_tiny_patch4_window7_224", img_size=112, **SWIN)
    (one,), missing = image_maps.compute_maps(swin, images(1, (112, 112)), with_rollout=True, with_grad_cam=True)
    assert one.rollout is None and one.class_attention is None and len(one.energy) == 4
    assert len(missing) == 1 and missing[0].startswith("Grad-CAM of SwinTransformer: ") and "norm1" in missing[0]
    pit = timm_model("pit_ti_224", img_size=112, depth=(1, 1, 1))
    (one,), missing = image_maps.compute_maps(pit, images(1, (112, 112)), with_rollout=True)
    assert one.rollout is None and missing == ["attention rollout: its layers have different numbers of tokens"]
    registers = timm_model("vit_little_patch16_reg4_gap_256", depth=2)
    (one,), _ = image_maps.compute_maps(registers, images(1, (256, 256)))
    assert one.class_attention is None  # it has no class token


def test_the_spectrum_of_a_wave_is_two_points():
    x = torch.arange(16)
    wave = torch.cos(2 * math.pi * 3 * x / 16).expand(1, 16, 16)
    found = image_maps.spectrum(wave)
    assert sorted(map(tuple, (found > found.max() - 0.1).nonzero().tolist())) == [(8, 5), (8, 11)]
