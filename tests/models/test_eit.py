import pytest
import torch
import torch.nn.functional as F
from torch import nn

from eit import EIT, complexity, load_weights
from eit.models.eit import CHOICES, attention_channels
from tests.helpers import reference

SMALL = dict(img_size=32, kernel_size=3, stride=1, pool_size=4, embed_dim=24, depth=3, num_heads=4, num_classes=5)


def small(**arguments):
    torch.manual_seed(0)
    model = EIT(**(SMALL | arguments)).eval()
    for p in model.parameters():  # initial values are too tame to tell paths apart
        nn.init.normal_(p, std=0.2)
    return model


@pytest.mark.parametrize("case", reference.CASES, ids=lambda case: case["name"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 2e-5)])
def test_agrees_with_the_published_architecture(case, dtype, tolerance):
    model = load_weights(EIT(**reference.our_arguments(case)), reference.published_state(case)).to(dtype).eval()
    assert sum(p.numel() for p in model.parameters()) == case["params"]
    assert model.grid_size[0] * model.grid_size[1] == case["tokens"]
    assert model.attn_channels == case["attn_channels"]
    assert [model.embed_dim - n for n in model.attn_channels] == case["conv_channels"]
    for block, conv in zip(model.blocks, case["conv_channels"], strict=True):
        assert (block.attn.conv.weight.shape[0] if conv else 0) == conv

    outputs = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, output: outputs.append(output))
    with torch.no_grad():
        logits = model(reference.images(case).to(dtype))
    torch.testing.assert_close(
        logits[:, :8].double(), torch.tensor(case["logits_first8"], dtype=torch.float64), atol=tolerance, rtol=0
    )
    norms = torch.tensor(case["logits_l2"], dtype=torch.float64)
    torch.testing.assert_close(logits.double().norm(dim=1), norms, atol=10 * tolerance, rtol=tolerance)
    for output, mean, std in zip(outputs, case["block_output_mean"], case["block_output_std"], strict=True):
        assert output.double().mean().item() == pytest.approx(mean, abs=10 * tolerance)
        assert output.double().std(unbiased=False).item() == pytest.approx(std, abs=1e-4)


@pytest.mark.parametrize(
    ("schedule", "channels"),
    [
        ("eit", [50, 100, 150, 200, 250]),
        ("increasing", [250, 200, 150, 100, 50]),
        ("lsra", [120] * 5),
        ("vit", [250] * 5),
        ((0, 10, 20, 30, 250), [0, 10, 20, 30, 250]),
    ],
)
def test_schedules(schedule, channels):
    assert attention_channels(schedule, embed_dim=250, depth=5, num_heads=10) == channels


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(schedule="nope"), "schedule='nope' is not one of eit, increasing, lsra, vit"),
        (dict(schedule=(4, 8)), "2 entries for depth=3"),
        (dict(schedule=(4, 6, 24)), "6 is not a multiple of num_heads=4"),
        (dict(schedule=(4, 8, 28)), "28 is not a multiple of num_heads=4 in 0..24"),
        (dict(embed_dim=25), "embed_dim=25 is not a multiple of num_heads=4"),
        (dict(depth=0), "depth=0"),
        (dict(cls_conv="none"), "cls_conv='none' is not one of identity, zero, mean"),
        (dict(conv_branch="lite"), "conv_branch='lite' is not one of depthwise, gated"),
        (dict(stem="conv"), "stem='conv' is not one of conv_pool, patch"),
        (dict(pos_embed="sin"), "pos_embed='sin' is not one of none, learned"),
        (dict(img_size=3), "img_size=3 is too small"),
    ],
)
def test_arguments_that_make_no_model_are_named(arguments, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(".", r"\.")):
        EIT(**(SMALL | arguments))


@pytest.mark.parametrize(
    ("size", "tokens"), [((224, 224), 361), ((384, 384), 1024), ((160, 320), 13 * 27), ((16, 9), 1)]
)
def test_takes_any_image_of_at_least_one_token(size, tokens):
    model = EIT(embed_dim=20, depth=2, num_heads=2, num_classes=3).eval()
    with torch.no_grad():
        features = model.forward_features(torch.randn(1, 3, *size))
    assert features.shape == (1, 1 + tokens, 20)
    h, w = model.patch_embed.grid_size(*size)
    assert h * w == tokens


def test_too_small_an_image_has_no_tokens():
    assert EIT(embed_dim=20, depth=1, num_heads=2).patch_embed.grid_size(7, 224)[0] == 0


def test_the_position_table_has_the_actual_number_of_tokens_and_is_interpolated():
    model = EIT(embed_dim=20, depth=1, num_heads=2, pos_embed="learned").eval()
    assert model.pos_embed.shape == (1, 1 + 19 * 19, 20)
    with torch.no_grad():
        assert model.forward_features(torch.randn(1, 3, 160, 320)).shape == (1, 1 + 13 * 27, 20)
        nn.init.constant_(model.pos_embed, 0.5)
        x, h, w = model.embed(torch.zeros(1, 3, 160, 320))
        torch.testing.assert_close(
            x[:, 1:], torch.full((1, h * w, 20), 0.5)
        )  # the biases are 0: only the table is seen


def test_the_first_channels_are_convolved_and_the_class_token_is_not():
    mixer = small(schedule=(8, 8, 24)).blocks[0].attn
    x = torch.randn(2, 1 + 3 * 5, 24)
    y = mixer(x, 3, 5)
    image = x[:, 1:, :16].transpose(1, 2).reshape(2, 16, 3, 5)
    expected = F.conv2d(image, mixer.conv.weight, padding=1, groups=16).flatten(2).transpose(1, 2)
    torch.testing.assert_close(y[:, 1:, :16], expected)
    assert torch.equal(y[:, 0, :16], x[:, 0, :16])

    q, k, v = mixer.qkv(x[:, :, 16:]).view(2, 16, 3, 4, 2).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-2, -1) / 2**0.5).softmax(dim=-1)
    torch.testing.assert_close(y[:, :, 16:], mixer.proj((weights @ v).transpose(1, 2).reshape(2, 16, 8)))


@pytest.mark.parametrize("cls_conv", CHOICES["cls_conv"])
def test_what_the_class_token_has_in_place_of_the_convolution(cls_conv):
    mixer, published = (small(schedule=(8, 8, 24), cls_conv=name).blocks[0].attn for name in (cls_conv, "identity"))
    x = torch.randn(2, 1 + 3 * 5, 24)
    y, z = mixer(x, 3, 5), published(x, 3, 5)
    assert torch.equal(y[:, 1:], z[:, 1:]) and torch.equal(y[..., 16:], z[..., 16:])  # nothing else changes
    for image, out in zip(x, y, strict=True):
        for channel in range(16):
            grid = [out[1 + i, channel] for i in range(15)]
            expected = dict(identity=image[0, channel], zero=torch.tensor(0.0), mean=sum(grid) / 15)[cls_conv]
            torch.testing.assert_close(out[0, channel], expected, rtol=1e-5, atol=1e-6 * (cls_conv == "mean"))


def test_zero_is_no_update_of_the_class_token_s_convolved_channels():
    model = small(schedule=(8, 8, 24), cls_conv="zero")
    block, x = model.blocks[0], torch.randn(2, 1 + 4, 24)
    nn.init.zeros_(block.mlp.fc2.weight)
    nn.init.zeros_(block.mlp.fc2.bias)
    assert torch.equal(block(x, 2, 2)[:, 0, :16], x[:, 0, :16])
    assert not torch.equal(block(x, 2, 2)[:, 0, 16:], x[:, 0, 16:])


@pytest.mark.parametrize("schedule", ["eit", "lsra", (0, 12, 24)])
def test_the_class_token_s_part_costs_nothing(schedule):
    models = [EIT(**(SMALL | dict(schedule=schedule, cls_conv=cls_conv))) for cls_conv in CHOICES["cls_conv"]]
    assert len({complexity(model, (3, 32, 32)) for model in models}) == 1
    assert len({tuple((k, v.shape) for k, v in model.state_dict().items()) for model in models}) == 1


@pytest.mark.parametrize("cls_conv", CHOICES["cls_conv"])
def test_the_gated_branch_is_linear_glu_convolution_linear(cls_conv):
    mixer = small(schedule=(8, 8, 24), conv_branch="gated", cls_conv=cls_conv).blocks[0].attn
    x = torch.randn(2, 1 + 3 * 5, 24)
    y = mixer(x, 3, 5)
    both = x[..., :16] @ mixer.conv_in.weight.T + mixer.conv_in.bias
    values, gates = both[..., :16], both[..., 16:]
    gated = values / (1 + (-gates).exp())
    image = gated[:, 1:].transpose(1, 2).reshape(2, 16, 3, 5)
    image = F.conv2d(image, mixer.conv.weight, padding=1, groups=16).flatten(2).transpose(1, 2)
    token = dict(identity=gated[:, :1], zero=torch.zeros(2, 1, 16), mean=image.mean(1, keepdim=True))[cls_conv]
    expected = torch.cat((token, image), dim=1) @ mixer.conv_out.weight.T + mixer.conv_out.bias
    torch.testing.assert_close(y[..., :16], expected, atol=1e-5, rtol=1e-4)
    plain = small(schedule=(8, 8, 24)).blocks[0].attn
    plain.load_state_dict({k: v for k, v in mixer.state_dict().items() if k in plain.state_dict()})
    assert torch.equal(y[..., 16:], plain(x, 3, 5)[..., 16:])  # attention does not see it


def test_the_gated_branch_costs_three_square_matrices_a_layer():
    plain, gated = (EIT(**(SMALL | dict(schedule="lsra", conv_branch=name))) for name in ("depthwise", "gated"))
    assert plain.attn_channels == gated.attn_channels == [12] * 3  # the last layer included
    a, b = complexity(plain, (3, 32, 32)), complexity(gated, (3, 32, 32))
    assert b.params - a.params == 3 * (3 * 12**2 + 3 * 12)  # 2 C^2 + 2 C and C^2 + C, of 12 channels, in 3 layers
    assert b.macs - a.macs == b.published_macs - a.published_macs == 3 * 65 * 3 * 12**2


@pytest.mark.parametrize("schedule", [(0, 0, 0), (0, 12, 24), "vit"])
def test_layers_of_one_kind_only(schedule):
    model = small(schedule=schedule)
    for n, block in zip(model.attn_channels, model.blocks, strict=True):
        assert hasattr(block.attn, "qkv") == (n > 0)
        assert hasattr(block.attn, "conv") == (n < 24)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 5)


def test_memory_format_changes_nothing():
    model, x = small(), torch.randn(2, 3, 32, 32)
    expected = model(x)
    actual = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


KINDS = dict(
    eit={},
    zero=dict(cls_conv="zero"),
    mean=dict(cls_conv="mean", schedule=(0, 12, 24)),
    lite=dict(schedule="lsra", conv_branch="gated", pos_embed="learned"),
    vit=dict(stem="patch", schedule="vit", patch_size=4, pos_embed="learned"),
)


@pytest.mark.parametrize("arguments", KINDS.values(), ids=KINDS)
def test_compiles_into_one_graph(arguments):
    model, x = small(**arguments), torch.randn(2, 3, 32, 48)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


@pytest.mark.slow
def test_compiled_code_gives_the_same_logits_and_gradients():
    model, x = small(), torch.randn(2, 3, 32, 32)
    model(x).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), atol=1e-4, rtol=1e-4)
    compiled(x).sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("arguments", KINDS.values(), ids=KINDS)
def test_exports_with_dynamic_batch(arguments):
    model, x = small(**arguments), torch.randn(2, 3, 32, 32)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    y = torch.randn(5, 3, 32, 32)
    torch.testing.assert_close(program.module()(y), model(y))


def test_checkpointed_gradients_are_the_same():
    model, x = small(), torch.randn(2, 3, 32, 32)
    model(x).sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.set_grad_checkpointing()
    model.train()(x).sum().backward()
    for p, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient)


def test_intermediates_are_the_blocks_outputs():
    model, x = small(), torch.randn(2, 3, 32, 32)
    outputs = []
    hooks = [b.register_forward_hook(lambda module, args, y: outputs.append(y)) for b in model.blocks]
    final = model.forward_features(x)
    for hook in hooks:
        hook.remove()
    last, maps = model.forward_intermediates(x)
    assert torch.equal(last, final) and len(maps) == 3
    for image, tokens in zip(maps, outputs, strict=True):
        assert torch.equal(image.flatten(2).transpose(1, 2), tokens[:, 1:])
    ((image, prefix),) = model.forward_intermediates(
        x, [-2], return_prefix_tokens=True, norm=True, stop_early=True, output_fmt="NLC", intermediates_only=True
    )
    normed = model.norm(outputs[1])
    assert torch.equal(image, normed[:, 1:]) and torch.equal(prefix, normed[:, :1])
    assert [m.shape[1] for m in model.forward_intermediates(x, 2, intermediates_only=True)] == [24, 24]
    with pytest.raises(ValueError, match="only 3 blocks"):
        model.forward_intermediates(x, [3])


def test_initial_values_are_the_published_ones():
    torch.manual_seed(0)
    model = EIT(pos_embed="learned")
    block = model.blocks[0]
    assert block.mlp.fc1.weight.std().item() == pytest.approx(0.01, rel=0.02)
    fan_out = 250 * 16 * 16
    assert model.patch_embed.proj.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.02)
    assert block.attn.conv.weight.std().item() == pytest.approx((2 / (200 * 9)) ** 0.5, rel=0.1)
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.cls_token.std().item() == pytest.approx(0.02, rel=0.2)
    gated = EIT(schedule="lsra", conv_branch="gated").blocks[0].attn
    for linear in (gated.conv_in, gated.conv_out):
        assert linear.weight.std().item() == pytest.approx(0.01, rel=0.02) and not linear.bias.any()
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif "norm" in name:
            assert (p == 1).all(), name


def test_each_drop_rate_reaches_its_place():
    model = EIT(**SMALL, drop_rate=0.1, pos_drop_rate=0.2, proj_drop_rate=0.3, attn_drop_rate=0.4, drop_path_rate=0.5)
    block = model.blocks[1]
    assert model.head_drop.p == 0.1
    assert model.pos_drop.p == 0.2
    assert block.attn.proj_drop.p == block.mlp.drop1.p == block.mlp.drop2.p == 0.3
    assert block.attn.attn_drop_rate == block.attn.conv_drop.p == 0.4
    assert [getattr(b.drop_path1, "drop_prob", 0.0) for b in model.blocks] == [0.0, 0.25, 0.5]
    assert torch.equal(model.eval()(torch.ones(1, 3, 32, 32)), model(torch.ones(1, 3, 32, 32)))


def test_the_gated_branch_has_dropout_after_its_convolution_and_at_its_end():
    mixer = EIT(**SMALL, schedule=(0, 12, 24), conv_branch="gated", proj_drop_rate=0.5).blocks[0].attn.train()
    with torch.no_grad():
        mixer.conv_out.weight.zero_()
        mixer.conv_out.bias.fill_(1)
        assert set(mixer(torch.randn(2, 65, 24), 8, 8).unique().tolist()) == {0.0, 2.0}
        mixer = EIT(**SMALL, schedule=(0, 12, 24), conv_branch="gated", attn_drop_rate=0.5).blocks[0].attn.train()
        mixer.conv_out.weight.copy_(torch.eye(24))
        y = mixer(torch.randn(2, 65, 24), 8, 8)
        assert 0.4 < (y[:, 1:] == 0).float().mean() < 0.6 and y[:, 0].all()


def test_representation_layer_and_new_head():
    model = small(representation_size=7)
    features = model.forward_head(model.forward_features(torch.randn(2, 3, 32, 32)), pre_logits=True)
    assert features.shape == (2, 7) and features.abs().max() < 1
    model.reset_classifier(11)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 11)
    model.reset_classifier(0)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)


def test_initial_values_have_the_spread_that_is_asked_for():
    small = dict(img_size=32, kernel_size=3, stride=1, pool_size=4, embed_dim=64, depth=2, num_heads=4)
    for std in (0.01, 0.02):
        model = EIT(**small, init_std=std)
        model.reset_classifier(1000)
        linear = [m.weight.detach() for m in model.modules() if isinstance(m, torch.nn.Linear)]
        assert all(float(weight.std()) == pytest.approx(std, rel=0.1) for weight in linear) and len(linear) > 8
        assert float(model.cls_token.detach().std()) == pytest.approx(0.02, rel=0.3)
    with pytest.raises(ValueError, match="init_std=0 is not positive"):
        EIT(**small, init_std=0)
