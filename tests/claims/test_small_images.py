"""At 32x32, EIT has fewer parameters and multiply-accumulates than ViT of equal width (abstracts of v1 and v2)."""

from eit import complexity, create_model

SMALL = dict(img_size=32, kernel_size=3, stride=1, pool_size=4, patch_size=4, num_classes=10)


def cost(family):
    return complexity(create_model("eit_mini", family=family, **SMALL), (3, 32, 32))


def test_eit_is_smaller_and_cheaper_than_vit_of_equal_width():
    eit, vit = cost("eit"), cost("vit")
    assert eit.params == 3_079_010 < vit.params == 3_798_010
    assert eit.macs < vit.macs
    assert round(eit.macs / 1e9, 3) == 0.212
    assert round(vit.macs / 1e9, 3) == 0.255


def test_lsra_is_smaller_and_cheaper_than_vit_of_equal_width():
    lsra, vit = cost("lsra"), cost("vit")
    assert lsra.params < vit.params and lsra.macs < vit.macs
