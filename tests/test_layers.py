"""Layers give what PyTorch's own do, whatever they are computed by, and run no more operators than they must."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

from eit import layers
from eit.layers import Linear, MaxPool2d, PatchConv2d, attention
from eit.model import EIT, Block


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """The faster ways of a CPU with AVX-512 run on any."""
    monkeypatch.setattr(layers, "AVX512", True)


@pytest.fixture(params=[True, False], ids=["avx512", "elsewhere"])
def avx512(request, monkeypatch):
    monkeypatch.setattr(layers, "AVX512", request.param)
    return request.param


def with_gradients(function, *tensors):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    output = function(*leaves)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    return [output, *torch.autograd.grad((output * weight).sum(), leaves)]


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 7, 5), (0, 7, 5)])
@pytest.mark.parametrize("strided", [False, True])
def test_a_linear_layer(shape, strided):
    layer = Linear(5, 4)
    x = torch.randn(*shape[:-1], 9)[..., 4:] if strided else torch.randn(shape)
    actual, expected = (with_gradients(f, x, layer.weight, layer.bias) for f in (layers.linear, F.linear))
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("kernel, stride", [(16, 4), (4, 4), (3, 1), (7, 2), (6, 3)])
@pytest.mark.parametrize("height, width", [(33, 40), (17, 18)])
def test_a_convolution_of_patches(kernel, stride, height, width):
    layer = PatchConv2d(3, 6, kernel, stride, padding=kernel // 2)
    x = torch.randn(2, 3, height, width)
    plain = torch.nn.Conv2d(3, 6, kernel, stride, padding=kernel // 2)
    plain.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x), plain(x), atol=1e-5, rtol=1e-4)
    for one in (layer, plain):
        one(x).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(layer.bias.grad, plain.bias.grad, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("height, width", [(9, 12), (11, 7)])
def test_a_max_pool(height, width, dtype):
    x = torch.randint(9, (2, 5, height, width)).to(dtype).to(memory_format=torch.channels_last)  # with ties
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda x: x):
        actual = with_gradients(lambda x: MaxPool2d(3)(x), x)
    for one, other in zip(actual, with_gradients(lambda x: F.max_pool2d(x, 3), x), strict=True):
        assert torch.equal(one, other)
    assert kept and x.numel() not in kept


@pytest.mark.parametrize("width", [5, 16, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention(width, dtype, monkeypatch):
    monkeypatch.setattr(layers, "CACHE", 2 * 4 * 70 * 70 * dtype.itemsize)  # three images are two pieces
    q, k, v = torch.randn(3, 3, 4, 70, width).to(dtype)
    actual = with_gradients(lambda *parts: attention(*parts, dropout=0.0), q, k, v)
    expected = with_gradients(F.scaled_dot_product_attention, *(part.float() for part in (q, k, v)))
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == dtype
        assert (one.float() - other).norm() < (1e-5 if dtype == torch.float32 else 2e-2) * other.norm()


def test_attention_drops_its_weights_in_training():
    """v is the identity, so the output is the weights: a quarter is 0, and the rest larger by a third."""
    tokens = 64
    q, k = torch.randn(2, 2, 3, tokens, 8, requires_grad=True)
    v = torch.eye(tokens).expand(2, 3, tokens, tokens)
    weights = F.scaled_dot_product_attention(q, k, v)
    dropped = attention(q, k, v, dropout=0.25)
    kept = dropped != 0
    assert abs(kept.float().mean() - 0.75) < 0.02
    torch.testing.assert_close(dropped[kept], weights[kept] / 0.75)


@pytest.mark.filterwarnings("ignore:Input #. requires gradient and is not a double")  # float64 is plain
def test_what_a_model_can_be_asked_for_beside_logits():
    """No images, gradients of gradients, gradients by image, a traced program: as of the plain operators."""
    model, x = small(), torch.randn(2, 3, 32, 32)
    assert model(x[:0]).shape == (0, 5)
    torch.testing.assert_close(torch.jit.trace(model, x)(x), model(x))
    weights = dict(model.named_parameters())

    def loss(weights, image):
        return torch.func.functional_call(model, weights, image[None]).square().sum()

    by_image = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, x)["patch_embed.proj.weight"]
    for image, gradient in zip(x, by_image, strict=True):
        expected = torch.autograd.grad(loss(weights, image), weights["patch_embed.proj.weight"])[0]
        torch.testing.assert_close(gradient, expected)
    pooled = MaxPool2d(2)
    assert torch.autograd.gradgradcheck(
        lambda x: pooled(x).square(), torch.randn(1, 2, 4, 4, requires_grad=True), eps=1e-2, atol=1e-2
    )


def test_exported_programs_have_the_plain_operators():
    program = torch.export.export(small().eval(), (torch.randn(2, 3, 32, 32),))
    names = Counter(node.target.__name__.split(".")[0] for node in program.graph.nodes if node.op == "call_function")
    assert names["linear"] == 3 * 4 + 1
    assert names["scaled_dot_product_attention"] == 3
    assert not names["pad"]


# -- A regression is seen without a clock -----------------------------------------------------------------------------


def small() -> EIT:
    return EIT(img_size=32, kernel_size=4, stride=2, pool_size=2, embed_dim=24, depth=3, num_heads=4, num_classes=5)


class Operators(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


MOVES = ("clone", "copy_", "_to_copy", "cat", "constant_pad_nd", "zeros", "fill_", "zero_", "slice_backward", "stack")
PRODUCTS = ("convolution", "convolution_backward", "addmm", "mm", "bmm")


def of(names, counts):
    return {name: counts[name] for name in names if counts[name]}


def test_the_forward_pass_of_a_model_copies_only_what_it_must(avx512):
    model = small().eval().to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last)
    with Operators() as seen, torch.no_grad():
        model(x)
    # cat: the class token joins the grid once, and in each of 2 layers with a convolution, whose parts are joined too.
    if avx512:
        assert of(PRODUCTS, seen.counts) == dict(convolution=1 + 3 * 4 + 2, addmm=1)
        # clone: squares of the image and of the kernel; in each layer the output of heads that were padded.
        assert of(MOVES, seen.counts) == dict(clone=2 + 3, cat=1 + 2 * 2, constant_pad_nd=1 + 3 * 3)
    else:
        assert of(PRODUCTS, seen.counts) == dict(convolution=1 + 2, addmm=11, mm=2)  # mm: of strided channels
        assert of(MOVES, seen.counts) == dict(cat=1 + 2 * 2)
    assert seen.counts["_scaled_dot_product_flash_attention_for_cpu"] == 3 and not seen.counts["_softmax"]


def block_step(block):
    x = torch.randn(2, 17, 32, requires_grad=True)
    block(x, 4, 4).square().sum().backward()


def test_a_training_step_of_a_block_copies_only_what_it_must(avx512):
    block = Block(32, 16, 1)
    with Operators() as seen:
        block_step(block)
    forward = dict(convolution=5) if avx512 else dict(convolution=1, addmm=3)
    backward = dict(convolution_backward=5) if avx512 else dict(convolution_backward=1, mm=1 + 8)
    assert of(PRODUCTS, seen.counts) == forward | backward
    # cat: class token and convolved grid, and convolution and attention, are parted and joined, each way.
    # clone, stack: the gradients of q, k and v become one.
    assert of(MOVES, seen.counts) == dict(clone=1, cat=2 + 2, stack=1)


@pytest.mark.slow
def test_a_compiled_model_takes_batches_and_sizes_of_every_kind():
    """After the second one Inductor generates code for symbols in place of numbers."""
    torch._dynamo.reset()
    model = small().to(memory_format=torch.channels_last)
    compiled = torch.compile(model)
    for batch, height, width in ((8, 16, 16), (4, 32, 32), (6, 24, 24), (5, 16, 32)):
        x = torch.randn(batch, 3, height, width).to(memory_format=torch.channels_last)
        logits = compiled(x)
        torch.testing.assert_close(logits, model(x), atol=1e-4, rtol=1e-4)
        logits.sum().backward()


def test_a_compiled_block_is_one_graph_each_way_with_no_operators_more(avx512):
    graphs = []

    def keep(graph, _):
        called = (str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        graphs.append(Counter(name.split(".")[1] for name in called if name.startswith("aten.")))
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    block_step(torch.compile(Block(32, 16, 1), fullgraph=True, backend=aot_autograd(fw_compiler=keep)))
    assert len(graphs) == 2
    forward, backward = graphs
    assert of(PRODUCTS, forward) == dict(convolution=1, addmm=3, mm=1)
    assert of(PRODUCTS, backward) == dict(convolution_backward=1, mm=8)
    assert of(MOVES, forward) == dict(cat=2)
    assert of(MOVES, backward) == dict(clone=1, cat=2, stack=1)
