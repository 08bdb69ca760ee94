"""Parameters and inputs of the reference cases: drawn, not stored (see the recipe in `draw`)."""

import json
import zlib
from pathlib import Path

import numpy as np
import torch

CASES = json.loads((Path(__file__).parent / "eit_reference.json").read_text())


def case(name):
    return next(c for c in CASES if c["name"] == name)


def draw(name, shape, salt=""):
    """The value of a parameter, a function of its published name and shape."""
    r = np.random.RandomState(zlib.crc32((salt + name).encode())).standard_normal(shape)
    if name in ("cls_token", "pos_embed"):
        r = 0.5 * r
    elif name.endswith("bias"):
        r = 0.1 * r
    elif len(shape) == 1:
        r = 1 + 0.1 * r
    else:
        r = r / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(r.astype(np.float32))


def published_state(case):
    """State dict under the published parameter names."""
    return {name: draw(name, shape, case["salt"]) for name, shape in case["state_dict"].items()}


def images(case):
    shape = (case["batch"], 3, case["img_size"], case["img_size"])
    return torch.from_numpy(np.random.RandomState(case["input_seed"]).standard_normal(shape).astype(np.float32))


def our_arguments(case):
    """Arguments of `eit.EIT` for the published constructor's."""
    arch = case["arch"]
    return dict(
        img_size=case["img_size"],
        kernel_size=arch["kernel_size"],
        stride=arch["stride_size"],
        pool_size=arch["pool_size"],
        patch_size=arch["pool_size"],
        embed_dim=arch["embed_dim"],
        depth=arch["depth"],
        num_heads=arch["num_heads"],
        num_classes=arch["num_classes"],
        schedule="eit" if arch.get("use_eit_t", True) else "vit",
        stem="conv_pool" if arch.get("use_eit_p", True) else "patch",
        pos_embed="learned" if arch.get("use_pos_em", False) else "none",
    )
