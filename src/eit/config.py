"""Recipes: the settings of a run, from an included recipe or a YAML file, plus `key=value` overrides."""

import copy
import shlex
from collections.abc import Callable, Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_origin

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from eit.errors import UserError, nearest, shorten
from eit.files import expand_path, read_text
from eit.plain_yaml import INTEGER, alternatives, member, read_scalar, read_yaml

Rate = Annotated[float, Field(ge=0, lt=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
Whole = Annotated[int, Field(strict=True)]  # strict: `true` is not 1
Count = Annotated[Whole, Field(ge=1, le=2**31)]
Channels = Annotated[Whole, Field(ge=1, le=65536)]
NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, le=1e6)]
Pair = tuple[Positive, Positive]
FilePath = Annotated[str, AfterValidator(expand_path)]  # or a name that stands in its place, such as sklearn:digits
Share = Annotated[float, Field(gt=0, lt=1)]
AUTO: Any = "auto"
if TYPE_CHECKING:  # training/choices.py puts a number in place of `auto` before anything is computed with it
    CountOrAuto = int
    ShareOrAuto = float
    MeanOrAuto = tuple[float, ...]
    StdOrAuto = tuple[float, ...]
else:
    CountOrAuto = Count | Literal["auto"]
    ShareOrAuto = Share | Literal["auto"]
    MeanOrAuto = tuple[Probability, ...] | Literal["auto"]
    StdOrAuto = tuple[Annotated[float, Field(gt=0, le=1)], ...] | Literal["auto"]


def _compile_mode(value: Any) -> Any:
    """The mode that `true` or `false` stands for."""
    modes = dict(true="default", on="default", yes="default", false="off", no="off")
    return modes.get(str(value).lower(), value)


def _listed(value: Any) -> Any:
    """A list of one for a word; an empty list for null, false and off."""
    if value in (None, False, "off", "null", ""):
        return ()
    return (value,) if isinstance(value, str) else value


def split_name(name: str) -> tuple[str, str | None]:
    """A model's name -> the name of its size, and the family if the name has one: eit_mini, eit_plus."""
    size = name.removeprefix("eit_plus_")
    return (name, None) if size == name else (f"eit_{size}", "eit_plus")


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        coerce_numbers_to_str=True,
        use_attribute_docstrings=True,  # `eit recipes show` prints the line below a key
    )


class Model(Section):
    """A registered model, a family, and any argument of `eit.EIT`; null: the default of the model or the family.

    The name eit_plus_mini is short for eit_mini with family=eit_plus, and is stored like that.
    """

    name: str = "eit_mini"
    """a model of `eit models`, or timm/NAME"""
    family: Literal["eit", "eit_plus", "lsra", "lite", "vit"] = "eit"
    """preset of schedule, convolution branch, class-token path, stem and position embedding"""
    pretrained: bool | FilePath | None = None
    """weights to start from: a file, a run folder or an included name; true: timm's download for timm/NAME"""
    reset_head: bool = False
    """use a new head, for weights that were trained on other classes"""
    kernel_size: Channels | None = None
    """kernel size of the stem's convolution"""
    stride: Channels | None = None
    """stride of the stem's convolution"""
    pool_size: Channels | None = None
    """kernel size and stride of the stem's max-pool"""
    in_chans: Channels | None = None
    """input channels; 1: images are read as grey; null: 3"""
    embed_dim: Channels | None = None
    """embedding width"""
    depth: Annotated[Whole, Field(ge=1, le=1000)] | None = None
    """number of layers"""
    num_heads: Channels | None = None
    """attention heads of each layer"""
    schedule: str | tuple[Whole, ...] | None = None
    """attention channels of each layer: eit, increasing (more convolution with depth), lsra, vit, or a list of ints"""
    cls_conv: Literal["identity", "zero", "mean"] | None = None
    """what the class token gets in place of a convolution: its own channels (the paper), zero, or the grid's mean"""
    conv_branch: Literal["depthwise", "gated"] | None = None
    """a 3x3 convolution alone (the paper), or one between linear layers with a GLU (Lite Transformer)"""
    stem: Literal["conv_pool", "patch"] | None = None
    """overlapping patches of EIT, or patches of ViT"""
    patch_size: Channels | None = None
    """patch size of the stem `patch`"""
    pos_embed: Literal["none", "learned"] | None = None
    """position embedding"""
    representation_size: Channels | None = None
    """width of a Linear + tanh before the head; null: none"""
    mlp_ratio: Positive | None = None
    """hidden width of the MLP, relative to embed_dim"""
    qkv_bias: bool | None = None
    """whether queries, keys and values have a bias"""
    init_std: Positive | None = None
    """standard deviation of the linear layers' initial values; null: 0.01, as published"""
    global_pool: Literal["token", "avg", "max", "avgmax"] | None = None
    """input of the head: the class token, or the grid's mean, maximum, or the mean of both"""
    drop_rate: Rate | None = None
    """dropout before the head"""
    pos_drop_rate: Rate | None = None
    """dropout after the stem"""
    proj_drop_rate: Rate | None = None
    """dropout after the attention projection, after the gated branch, and in the MLP"""
    attn_drop_rate: Rate | None = None
    """dropout of attention weights and of the convolution's output"""
    drop_path_rate: Rate | None = None
    """stochastic depth in the last layer, linear from 0 in the first"""

    @model_validator(mode="before")
    @classmethod
    def _size_and_family(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(values.get("name"), str):
            return values
        size, family = split_name(values["name"])
        return values | dict(name=size, family=family) if family and values.get("family", family) == family else values

    @field_validator("family")
    @classmethod
    def _of_the_name(cls, family: str, info: ValidationInfo) -> str:
        name = info.data.get("name", "")
        if own := split_name(name)[1]:
            raise ValueError(f"model.name={name} is of the family {own}: leave out one of the two")
        return family

    def arguments(self) -> dict[str, Any]:
        """The arguments of `eit.EIT` that the recipe sets."""
        return self.model_dump(exclude={"name", "family", "pretrained", "reset_head"}, exclude_none=True)


class Data(Section):
    root: FilePath = ""
    """a data set folder (its layout is recognised), or sklearn:digits"""
    dataset: str | None = None
    """a name of timm.data.create_dataset (wds/, hfds/, tfds/, torch/ ...), or what data.download fetches"""
    download: bool = False
    """download data.dataset into data.root if it is not there"""
    train_split: str = "train"
    """training split of a data set of timm"""
    val_split: str = "validation"
    """validation split of a data set of timm"""
    input_key: str | None = None
    """column of the images in a data set of timm; null: image (jpg, png or webp in shards)"""
    target_key: str | None = None
    """column of the labels in a data set of timm; null: label (cls in shards)"""
    classes: Count | FilePath | None = None
    """number of classes, or a file with one class name per line, for a data set of timm that has none"""
    image_size: CountOrAuto = 224
    """pixels of the model's square input; auto: that of model.pretrained, otherwise by the size of the images"""
    batch_size: CountOrAuto = 64
    """images per process and micro-batch; auto: by the number of training images, on a GPU what fits into memory"""
    workers: Annotated[Whole, Field(ge=0)] | None = None
    """loader processes; null: one per core that the process may use, at most 16"""
    val_fraction: ShareOrAuto | None = None
    """share of the training images held out if there is no val/; auto: 0.2 if there is no test/ either"""
    cache: bool | None = None
    """hold images as uint8 in memory and augment in batches; null: up to 64x64, if they fit"""
    crop_ratio: Annotated[float, Field(ge=0.1, le=1)] = 1.0
    """evaluation: size of the centre crop relative to the resized image"""
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    """interpolation of resizing"""
    mean: MeanOrAuto | None = None
    """mean of pixels in 0..1, per channel or one; auto: of model.pretrained; null: ImageNet's, or 0.5 for grey"""
    std: StdOrAuto | None = None
    """standard deviation of pixels in 0..1, like data.mean"""
    bad_image_budget: Probability = 0.001
    """share of training images that may be unreadable"""
    max_pixels: Count = 89_478_485
    """images with more pixels are refused before they are decoded"""
    pixel_range: tuple[float, float] | None = None
    """[black, white] of grey images of more than 8 bits; null: 0 and 65535, and float images are refused"""

    @field_validator("pixel_range")
    @classmethod
    def _from_low_to_high(cls, pair: tuple[float, float] | None) -> tuple[float, float] | None:
        if pair is not None and not pair[0] < pair[1]:
            raise ValueError("give the value that is black and then a higher one, that is white")
        return pair

    @model_validator(mode="before")
    @classmethod
    def _without_backend(cls, values: Any) -> Any:
        """Drop a key of older recipes: the decoder of JPEGs, which gave the same pixels."""
        if isinstance(values, dict) and values.get("backend") in ("pillow", "simplejpeg"):
            return {key: value for key, value in values.items() if key != "backend"}
        return values


class Augment(Section):
    crop_scale: Pair | None = None
    """random resized crop: range of areas; null: off"""
    crop_aspect: Pair = (3 / 4, 4 / 3)
    """random resized crop: range of aspect ratios"""
    simple_crop: bool = False
    """simple random crop (DeiT III): shorter side resized, 4 pixels of reflected padding, random square"""
    pad_crop: Annotated[Whole, Field(ge=0)] = 0
    """pixels of zero padding before a random crop"""
    hflip: Probability = 0.0
    """probability of a horizontal flip"""
    rand_augment: str | None = None
    """RandAugment, a policy of timm such as rand-m9-mstd0.5-inc1"""
    auto_augment: str | None = None
    """AutoAugment, a policy of timm: original, originalr, v0, v0r"""
    augmix: str | None = None
    """AugMix, a policy of timm such as augmix-m5-w4-d2"""
    three_augment: bool = False
    """3-Augment (DeiT III): grey, solarised or blurred; DeiT III adds color_jitter=0.3 and hflip=0.5"""
    color_jitter: NotNegative = 0.0
    """range of brightness, contrast and saturation"""
    erasing: Probability = 0.0
    """probability of random erasing"""
    mixup: NotNegative = 0.0
    """alpha of mixup; 0: off"""
    cutmix: NotNegative = 0.0
    """alpha of cutmix; 0: off"""
    mixup_prob: Probability = 1.0
    """share of batches that are mixed"""
    mixup_switch_prob: Probability = 0.5
    """share of cutmix if both are on"""
    smoothing: Rate = 0.0
    """label smoothing"""
    repeats: Count = 1
    """repeated augmentation: copies of each image in a global batch"""

    @property
    def policy(self) -> tuple[str, str] | None:
        """(key, policy of timm) of the policy that is on."""
        chosen = [(k, getattr(self, k)) for k in ("rand_augment", "auto_augment", "augmix") if getattr(self, k)]
        chosen += [("three_augment", "3a")] if self.three_augment else []
        if len(chosen) > 1:
            raise ValueError(f"augment.{chosen[0][0]} and augment.{chosen[1][0]} exclude each other: set one to null")
        return chosen[0] if chosen else None

    @property
    def by_image(self) -> bool:
        """Whether a setting needs single images, so that whole batches cannot be augmented at once."""
        return bool(self.crop_scale or self.simple_crop or self.policy or self.color_jitter)


class Optim(Section):
    name: Literal["adamw", "lamb"] = "adamw"
    """optimizer"""
    lr: Positive = 1e-3
    """peak learning rate, for a global batch of lr_batch"""
    lr_batch: Count | None = 512
    """the rate is lr * global batch / lr_batch; null: lr itself"""
    min_lr: NotNegative = 1e-5
    """rate at the end of the cosine"""
    warmup_lr: NotNegative = 1e-6
    """rate at the start of the warm-up"""
    weight_decay: NotNegative = 0.05
    """weight decay, of all parameters but norms, biases, class token and position embedding"""
    betas: tuple[Rate, Rate] = (0.9, 0.999)
    """decay rates of Adam's moving averages"""
    eps: Positive = 1e-8
    """constant in Adam's denominator"""
    clip_grad: Positive | None = None
    """largest norm of the gradient"""
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    """fine-tuning: each layer's rate is that of the next layer times this; null: one rate"""
    trainable: Literal["all", "attention", "head"] = "all"
    """parameters to train: all, attention (with head and position embedding), or only the head"""
    freeze: tuple[str, ...] = ()
    """parameters not to train, by the start of their names: [patch_embed, blocks.0]"""


class Loss(Section):
    name: Literal["cross_entropy", "bce"] = "cross_entropy"
    """bce: a binary cross-entropy per class, with target 1 for the image's classes and 0 for the others"""
    class_weights: Literal["balanced", "auto"] | dict[str, NotNegative] | None = None
    """weight of each class by its name; balanced: images / (classes * images of the class); auto: balanced if needed"""
    teacher: FilePath | None = None
    """distillation: weights of this package (a file, a run folder or an included name), or timm/NAME"""
    teacher_weights: FilePath | None = None
    """weights file of a teacher timm/NAME; null: timm's download"""
    teacher_size: Count | None = None
    """pixels of the teacher's input; null: the teacher's default"""
    distillation: Literal["soft", "hard"] = "soft"
    """the student's target: the teacher's probabilities, or its most likely class"""
    alpha: Probability = 0.5
    """weight of the teacher in the loss"""
    tau: Positive = 1.0
    """temperature of soft distillation"""


class Train(Section):
    epochs: Count = 300
    """passes over the training images"""
    warmup_epochs: Annotated[float, Field(ge=0)] = 5
    """epochs in which the learning rate rises linearly"""
    device: str = "auto"
    """auto, cpu, mps, cuda or cuda:N"""
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "fp32"
    """precision of the forward pass; weights stay fp32; auto: bf16 on a GPU that has it, otherwise fp32"""
    accumulate: Count = 1
    """micro-batches per step"""
    ema_decay: Rate | None = None
    """decay of the moving average of the weights, which is evaluated too; null: off"""
    save_every: Annotated[Whole, Field(ge=0)] = 0
    """steps between checkpoints within an epoch; 0: only after each epoch"""
    save_minutes: Positive | None = None
    """minutes between checkpoints within an epoch; null: no checkpoints by time"""
    compile: Annotated[Literal["off", "default", "reduce-overhead", "max-autotune"], BeforeValidator(_compile_mode)] = (
        "off"
    )
    """mode of torch.compile; true: default"""
    deterministic: bool = False
    """bit-identical results on CUDA, at some cost in speed; on the CPU results always are"""
    max_steps: Count | None = None
    """stop after this many steps; null: after the last epoch"""
    patience: Count | None = None
    """stop after this many epochs without a better one (by top-1; if equal, by validation loss); null: never early"""
    log: Annotated[tuple[Literal["tensorboard", "wandb"], ...], BeforeValidator(_listed)] = ("tensorboard",)
    """where curves go besides log.jsonl: tensorboard, wandb (pip install 'eit[wandb]'), both in a list, or off"""
    report: bool = True
    """write report.html after training"""


class Recipe(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")] = "custom"
    """name of the run folder"""
    seed: Annotated[Whole, Field(ge=0, lt=2**31)] = 0
    """seed of all random numbers"""
    out: FilePath | None = None
    """run folder; null: runs/NAME"""
    model: Model = Model()
    data: Data = Data()
    augment: Augment = Augment()
    loss: Loss = Loss()
    optim: Optim = Optim()
    train: Train = Train()

    @model_validator(mode="after")
    def _together(self) -> "Recipe":
        if self.train.warmup_epochs >= self.train.epochs:
            raise ValueError(
                f"train.warmup_epochs={self.train.warmup_epochs:g} is not less than train.epochs={self.train.epochs}; "
                "set a smaller train.warmup_epochs"
            )
        for key in ("mean", "std"):
            given = getattr(self.data, key)
            if given not in (None, AUTO) and len(given) not in (1, 3):
                raise ValueError(f"data.{key} has {len(given)} values: give one for each of 3 channels, or one for all")
        a = self.augment
        for key, most in (("crop_scale", 1.0), ("crop_aspect", 1e6)):
            pair = getattr(a, key)
            if pair is not None and not pair[0] <= pair[1] <= most:
                raise ValueError(f"augment.{key}={list(pair)} is not a range from low to high, at most {most:g}")
        crops = [key for key in ("crop_scale", "simple_crop", "pad_crop") if getattr(a, key)]
        if len(crops) > 1:
            last = f"augment.{crops[1]}={getattr(a, crops[1])}"
            raise ValueError(f"{last} cannot be combined with augment.{crops[0]}: set one of them to 0 or null")
        if a.policy and a.color_jitter and not a.three_augment:
            raise ValueError(
                f"augment.color_jitter cannot be combined with augment.{a.policy[0]}: set one of them to 0 or null"
            )
        for key, field in Loss.model_fields.items():
            of_teacher = key not in ("name", "class_weights", "teacher")
            if of_teacher and self.loss.teacher is None and getattr(self.loss, key) != field.default:
                raise ValueError(f"loss.{key} needs loss.teacher")
        if self.model.reset_head and not self.model.pretrained:
            raise ValueError("model.reset_head=true needs model.pretrained: without it the head is new anyway")
        if self.data.download and self.data.dataset is None:
            raise ValueError("data.download=true needs data.dataset, the data set to download, such as cifar10")
        return self

    def run_folder(self) -> Path:
        return Path(self.out or f"runs/{self.name}")

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, default_flow_style=False)

    def explained(self) -> str:
        """The resolved recipe as YAML, with a comment on each key."""
        return "\n".join(_explained(self))


def _explained(section: Section, indent: str = "") -> Iterable[str]:
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            yield f"{indent}{name}:"
            yield from _explained(value, indent + "  ")
        else:
            yield f"{indent}{name}: {_flow(value)}".ljust(42) + f"  # {field.description}"


# A run may be resumed with other values of these keys: they change no result, with one exception. Dividing the global
# batch differently into processes and micro-batches changes rounding, mixup's pairs and dropout, but neither the batch
# nor the order of the images.
FREE_KEYS = {
    *("out", "data.root", "data.download", "data.workers", "data.bad_image_budget"),
    *("data.batch_size", "train.accumulate", "train.save_every", "train.save_minutes", "train.log", "train.report"),
}

_SUCH = {
    "data.batch_size": "32 or auto",
    "data.image_size": "64 or auto",
    "data.val_fraction": "0.2 or auto",
    "train.log": "[tensorboard, wandb]",
    "loss.class_weights": "balanced or {cat: 2, dog: 1}",
    "optim.freeze": "[patch_embed, blocks.0]",
    "optim.betas": "[0.9, 0.999]",
    "data.pixel_range": "[0, 4095]",
    "data.mean": "[0.485, 0.456, 0.406], of pixels in 0..1",
    "data.std": "[0.229, 0.224, 0.225], of pixels in 0..1",
    "augment.crop_scale": "[0.08, 1]",
    "augment.crop_aspect": "[0.75, 1.33]",
    "name": "my-run_2",
}
_WRONG_TYPE = {  # of pydantic -> our words
    "bool_parsing": "should be true or false",
    "bool_type": "should be true or false",
    "dict_type": "should be a mapping",
    "float_parsing": "should be a number",
    "float_type": "should be a number",
    "missing": "should have two values",
    "string_pattern_mismatch": "should be letters, digits and _ . -, a letter or digit first",
    "string_type": "should be text",
    "too_long": "should have two values",
    "tuple_type": "should be a list",
}
_HINTS = {
    "model.num_classes": "the class count comes from the data",
    "model.img_size": "set data.image_size",
    "data.num_classes": "the class count comes from the data",
    "data.backend": "Pillow decodes all images",
}


def recipe_names() -> list[str]:
    """Included recipes, smallest first."""
    order = [
        "digits",
        "photos",
        "digits_in_the_wild",
        "fashion_mnist",
        "cifar10",
        "cifar100",
        "cifar100_authors",
        "tiny_imagenet",
    ]
    order += [f"imagenet_{size}" for size in ("mini", "tiny", "base", "large")]
    names = {p.name.removesuffix(".yaml") for p in resources.files("eit.recipes").iterdir() if p.name.endswith(".yaml")}
    return sorted(names, key=lambda name: (order.index(name) if name in order else len(order), name))


def recipe_header(name: str) -> str:
    """The comment at the top of an included recipe: command, cost, expected accuracy."""
    lines = []
    for line in _shipped(name).splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# "))
    return "\n".join(lines)


def _shipped(name: str) -> str:
    return resources.files("eit.recipes").joinpath(f"{name}.yaml").read_text(encoding="utf-8")


def load_recipe(
    name_or_path: str, overrides: Sequence[str] = (), say: Callable[[str], object] = lambda text: None
) -> Recipe:
    """An included recipe or a YAML file, with `key=value` overrides.

    If an override makes another value of the recipe impossible, that value is changed, and `say` is called with a line
    about it.

    Raises:
        UserError: no such recipe, unknown key, wrong type or impossible value, in one line.

    Examples:
        >>> load_recipe("digits", ["train.epochs=30", "optim.lr=1e-3"]).train.epochs
        30
    """
    if name_or_path in recipe_names():
        text = _shipped(name_or_path)
    elif name_or_path.endswith((".yaml", ".yml")):
        text = read_text(expand_path(name_or_path), "recipe")
    else:
        if Path(expand_path(name_or_path)).is_file():
            raise UserError(f"{name_or_path} is not a recipe: the name of a recipe file ends in .yaml")
        if Path(expand_path(name_or_path)).is_dir():
            folder = shlex.quote(name_or_path)
            raise UserError(
                f"{name_or_path} is a folder, not a recipe: eit finetune {folder} trains on the images in it, and "
                f"eit train RECIPE data.root={folder} with a recipe of your choice"
            )
        known = ", ".join(recipe_names())
        raise UserError(
            f"unknown recipe {name_or_path!r}{nearest(name_or_path, recipe_names())} (known: {known}, or a PATH.yaml)"
        )
    values = parse_yaml(text, name_or_path)
    changed = parse_overrides(overrides, copy.deepcopy(values))
    _follow(values, changed, {word.partition("=")[0] for word in overrides}, say)
    return parse_recipe(changed)


def _follow(before: dict[str, Any], values: dict[str, Any], given: set[str], say: Callable[[str], object]) -> None:
    """Change values of the recipe that do not go with those that were `given` on the command line."""
    train, old = values.get("train"), before.get("train", {})
    if isinstance(train, dict) and "train.epochs" in given and "train.warmup_epochs" not in given:
        planned: Any = old.get("epochs", Train().epochs)
        epochs: Any = train["epochs"]
        warmup: Any = train.get("warmup_epochs", Train().warmup_epochs)
        is_known = all(type(n) in (int, float) and n > 0 for n in (planned, epochs, warmup))
        if is_known and epochs < planned and warmup > epochs / 2:
            train["warmup_epochs"] = float(f"{warmup * epochs / planned:.3g}")
            say(
                f"warm-up {train['warmup_epochs']:g} epochs, in proportion to train.epochs={epochs} "
                "(train.warmup_epochs)"
            )
    model, old = values.get("model"), before.get("model", {})
    if not isinstance(model, dict) or not isinstance(old.get("pretrained"), str):
        return
    if {"model.name", "model.family"} & given and "model.pretrained" not in given:
        is_timm = str(model.get("name")).startswith("timm/")
        model["pretrained"] = True if is_timm else None
        text = "its own pretrained weights" if is_timm else "initial values from the seed"
        say(
            f"{model.get('name')} starts from {text}: the recipe's weights, {old['pretrained']}, are of another model "
            "(model.pretrained)"
        )
    if not model.get("pretrained") and "model.reset_head" not in given:
        model.pop("reset_head", None)


def parse_yaml(
    text: str,
    source: str,
    schema: type[BaseModel] = Recipe,
    kind: str = "a recipe: sections such as model: and data:",
) -> dict[str, Any]:
    """The mapping in a YAML file, not yet checked: text stays as it is written where `schema` wants text.

    `kind` completes the error message: what the file is, and what it should contain.
    """
    try:
        values = read_yaml(text, schema)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{source} is not {kind} are expected")
    sections = {key.partition(".")[0] for key in recipe_keys() if "." in key}
    return {key: {} if value is None and key in sections else value for key, value in values.items()}


def parse_recipe(values: dict[str, Any]) -> Recipe:
    """A recipe from unchecked values; a UserError names the key, the value and what is allowed."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError(_explain(error)) from None


def parse_overrides(
    words: Sequence[str], values: dict[str, Any] | None = None, schema: type[BaseModel] = Recipe
) -> dict[str, Any]:
    """Parse `key=value` words, into `values` if given. Text is taken as it is; numbers, lists and so on are YAML."""
    values = {} if values is None else values
    for word in words:
        _apply(values, word, schema)
    return values


def model_arguments(values: dict[str, Any]) -> dict[str, Any]:
    """Unchecked arguments of `eit.create_model` -> checked ones."""
    try:
        section = Model.model_validate(values)
    except ValidationError as error:
        raise UserError(_explain(error, Model)) from None
    family = {"family": section.family} if "family" in section.model_fields_set else {}
    return section.arguments() | family


def data_config(**values: Any) -> Data:
    """A checked `data.` section."""
    try:
        return Data.model_validate(values)
    except ValidationError as error:
        raise UserError(_explain(error, Data)) from None


def is_extended(old: Recipe, new: Recipe) -> bool:
    """Whether `new` is `old` with more epochs."""
    longer = old.model_copy(update=dict(train=old.train.model_copy(update=dict(epochs=new.train.epochs))))
    return old.train.epochs < new.train.epochs and not differences(longer, new)


def differences(old: Recipe, new: Recipe) -> list[str]:
    """`key: old -> new` for every key that differs and changes the result."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    changed = [k for k in before if before[k] != after[k] and k not in FREE_KEYS]
    return [f"{k}: {_shown(before[k])} -> {_shown(after[k])}" for k in changed]


def changes(old: Recipe, new: Recipe) -> list[str]:
    """The `key=value` words, quoted for a shell, that turn `old` into `new`."""
    before = dict(_leaves(old))
    changed = [(k, v) for k, v in _leaves(new) if before[k] != v]
    return [shlex.quote(f"{k}={v if isinstance(v, str) else _flow(v)}") for k, v in changed]


def _flow(value: Any) -> str:
    """A value as YAML in one line."""
    plain = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump([plain], default_flow_style=True, width=10**6).strip()[1:-1]


def _apply(values: dict[str, Any], override: str, schema: Any) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"{override!r} is not key=value, such as train.epochs=10")
    if key == "data.backend":  # allowed only in older recipe files
        raise UserError(f"unknown recipe key {key!r}: {_HINTS[key]}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{key}={text}: the name is not UTF-8, as recipes are; rename the file or folder") from None
    *sections, last = key.split(".")
    for section in sections:
        values, schema = values.setdefault(section, {}), member(schema, section)
        if not isinstance(values, dict):
            raise UserError(f"unknown recipe key {key!r}: {section} has no keys of its own")
    kind = member(schema, last)
    is_section = isinstance(kind, type) and issubclass(kind, BaseModel)  # a mapping would drop the recipe's other keys
    values[last] = text if is_section else _parse_value(text, kind)


def _parse_value(text: str, schema: Any) -> Any:
    """The value of an override. Text that is not of the wanted type stays text, which `_explain` then shows."""
    kinds = alternatives(schema)
    if str in kinds and not (text.startswith("[") and any(get_origin(kind) is tuple for kind in kinds)):
        # `~` alone is the home folder; `null` is the one word that stands for no value
        return text if text == "~" else read_scalar(text, kinds)
    try:
        return read_yaml(text, schema, last_wins=True)  # as the last of equal words does
    except UserError:
        return text


def recipe_keys(section: type[BaseModel] = Recipe, prefix: str = "") -> Iterable[str]:
    """All keys that a recipe can have: name, model.depth and so on."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from recipe_keys(field.annotation, f"{name}.")
        else:
            yield prefix + name


def _explain(error: ValidationError, section: type[BaseModel] = Recipe) -> str:
    errors = error.errors()
    # Of a union's members, report the deepest error: {cat: -1} is meant as a dictionary, not as "balanced"
    first = max((e for e in errors if e["loc"][:2] == errors[0]["loc"][:2]), key=lambda e: len(e["loc"]))
    known = list(recipe_keys(section))
    # A union reports its members one by one: (..., "int"), (..., "tuple[int, ...]"); the key is the longest known part.
    parts = [str(part) for part in first["loc"]]
    key = next((k for n in range(len(parts), 0, -1) if (k := ".".join(parts[:n])) in known), ".".join(parts))
    if first["type"] == "extra_forbidden":
        what = "model argument" if section is Model else "recipe key"
        if key in known:  # a file that writes data.root: as one key
            section_name, _, inner = key.partition(".")
            return f"{key} is not one key in a file: write the key {inner} inside the section {section_name}"
        return f"unknown {what} {key!r}" + (f": {_HINTS[key]}" if key in _HINTS else _nearest(key, known))
    if first["type"] == "model_type":
        such = next(k for k in known if k.startswith(f"{key}."))
        return f"{key}={shorten(_shown(first['input']), 60)}: {key} is a section; set its keys, such as {such}"
    message = _WRONG_TYPE.get(
        first["type"], first["msg"].removeprefix("Value error, ").replace("Input should", "should")
    )
    message += f", such as {_SUCH[key]}" if key in _SUCH else ""
    given = _shown(first["input"])
    if first["type"] == "int_type" and INTEGER.fullmatch(given):
        given = f"'{given}'"  # it was in quotes, and so is text
    return f"{key}={shorten(given, 60)}: {message}" if key else message


def _shown(value: Any) -> str:
    """A value as one would type it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_shown(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_shown, value))}]"
    return (
        {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else str(value)
    )


def _nearest(key: str, known: list[str]) -> str:
    """A hint at the known key with the same last part, or with a similar name."""
    by_last = {k.rpartition(".")[2]: k for k in known}
    last = key.rpartition(".")[2]
    return f"; did you mean {by_last[last]!r}?" if last in by_last else nearest(key, known)


def _leaves(section: BaseModel, prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from _leaves(value, f"{name}.")
        else:
            yield prefix + name, value
