import shlex
from itertools import combinations

import pytest
import yaml

from eit.config import (
    Model,
    changes,
    differences,
    load_recipe,
    parse_recipe,
    parse_yaml,
    recipe_header,
    recipe_keys,
    recipe_names,
)
from eit.errors import UserError


def test_every_shipped_recipe_is_valid_and_says_command_cost_and_figure():
    assert recipe_names() == [
        *(
            "digits",
            "photos",
            "digits_in_the_wild",
            "fashion_mnist",
            "cifar10",
            "cifar100",
            "cifar100_authors",
            "tiny_imagenet",
        ),
        *(f"imagenet_{size}" for size in ("mini", "tiny", "base", "large")),
    ]
    for name in recipe_names():
        recipe = load_recipe(name)
        assert recipe.name == name
        header = recipe_header(name)
        assert f"eit train {name}" in header
        assert "Cost:" in header and "Expected:" in header


def test_the_model_section_has_every_argument_of_the_model():
    from eit.models.registry import model_arguments

    of_recipe = set(Model.model_fields) - {"name", "pretrained", "reset_head"}
    assert of_recipe == set(model_arguments()) - {"num_classes", "img_size", "device", "dtype"}


def test_the_imagenet_recipes_are_the_papers():
    for name in ("mini", "tiny", "base", "large"):
        recipe = load_recipe(f"imagenet_{name}")
        a, o, t = recipe.augment, recipe.optim, recipe.train
        assert recipe.model.name == f"eit_{name}"
        assert (a.rand_augment, a.hflip, a.erasing) == ("rand-m9-mstd0.5-inc1", 0.5, 0.25)
        assert (a.mixup, a.cutmix, a.smoothing, a.repeats, a.color_jitter) == (0.8, 1.0, 0.1, 3, 0)
        assert (a.crop_scale, recipe.data.crop_ratio, recipe.data.interpolation) == ((0.08, 1.0), 224 / 256, "bicubic")
        assert (o.name, o.lr, o.lr_batch, o.weight_decay, o.min_lr, o.warmup_lr) == (
            "adamw",
            1e-3,
            512,
            0.05,
            1e-5,
            1e-6,
        )
        assert (t.epochs, t.warmup_epochs, t.ema_decay) == (300, 5, 0.99996)
        assert t.precision == "auto"  # they are for GPUs
        assert not any(value for key, value in recipe.model.arguments().items() if "drop" in key)


def test_the_cifar10_recipe_is_the_published_class_defaults():
    recipe = load_recipe("cifar10")
    m = recipe.model
    assert (m.name, m.kernel_size, m.stride, m.pool_size) == ("eit_mini", 3, 1, 4)
    assert (m.pos_drop_rate, m.proj_drop_rate, m.attn_drop_rate, m.drop_path_rate) == (0.2, 0.2, 0.15, 0.2)
    assert (recipe.optim.lr, recipe.optim.lr_batch, recipe.optim.weight_decay) == (5.5e-4, None, 0.06)
    assert (recipe.train.epochs, recipe.train.warmup_epochs) == (300, 10)
    assert (recipe.augment.mixup, recipe.augment.cutmix, recipe.augment.smoothing) == (0.8, 1.0, 0.1)


def test_the_cifar100_recipe_of_the_authors_is_their_codes_defaults():
    """train.py --data-set CIFAR --input-size 32 of github.com/MrHaiPi/EIT, and the defaults of its class EIT."""
    recipe, own = load_recipe("cifar100_authors"), load_recipe("cifar100")
    a, o, t, d = recipe.augment, recipe.optim, recipe.train, recipe.data
    assert recipe.model == own.model
    assert (a.pad_crop, a.hflip, a.rand_augment, a.erasing) == (4, 0.5, "rand-m9-mstd0.5-inc1", 0.25)
    assert (a.mixup, a.cutmix, a.smoothing, a.repeats, a.color_jitter) == (0.8, 1.0, 0.1, 1, 0)
    assert (o.name, o.lr, o.lr_batch, o.weight_decay, o.min_lr, o.warmup_lr) == ("adamw", 1e-3, 512, 0.05, 1e-5, 1e-6)
    assert (t.epochs, t.warmup_epochs, t.ema_decay) == (300, 5, 0.99996)
    assert (d.image_size, d.batch_size, d.crop_ratio, d.dataset) == (32, 128, 1.0, "cifar100")
    assert (d.mean, d.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_overrides_and_files(tmp_path):
    recipe = load_recipe(
        "digits",
        ["optim.lr=1e-3", "model.schedule=[16,32,48,64]", "augment.crop_scale=[0.5,1]", "augment.pad_crop=0", "out=5"],
    )
    assert recipe.optim.lr == 1e-3
    assert recipe.model.schedule == (16, 32, 48, 64)
    assert recipe.augment.crop_scale == (0.5, 1.0)
    assert recipe.out == "5"
    file = tmp_path / "mine.yaml"
    file.write_text(recipe.to_yaml())
    assert load_recipe(str(file)) == recipe
    assert load_recipe(str(file), ["seed=3"]).seed == 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.famly=lsra", "unknown recipe key 'model.famly'; did you mean 'model.family'?"),
        ("lr=1", "unknown recipe key 'lr'; did you mean 'optim.lr'?"),
        ("model.num_classes=3", "unknown recipe key 'model.num_classes': the class count comes from the data"),
        ("model.img_size=3", "unknown recipe key 'model.img_size': set data.image_size"),
        ("data.backend=pillow", "unknown recipe key 'data.backend': Pillow decodes all images"),
        ("train.epochs=many", "train.epochs=many: should be a valid integer"),
        ("train.epochs=0", "train.epochs=0: should be greater than or equal to 1"),
        ("train.epochs=2.5", "train.epochs=2.5: should be a valid integer"),
        ("optim.lr=-1", "optim.lr=-1: should be greater than 0"),
        ("optim.lr=.nan", "optim.lr=.nan: should be a number"),
        ("model.family=swin", "model.family=swin: should be 'eit', 'eit_plus', 'lsra', 'lite' or 'vit'"),
        ("train.precision=int8", "train.precision=int8: should be 'auto', 'fp32', 'tf32', 'bf16' or 'fp16'"),
        (
            "train.compile=fast",
            "train.compile=fast: should be 'off', 'default', 'reduce-overhead' or 'max-autotune'",
        ),
        ("train.compile=1", "train.compile=1: should be 'off', 'default', 'reduce-overhead' or 'max-autotune'"),
        ("train.compile=null", "train.compile=null: should be 'off', 'default', 'reduce-overhead' or 'max-autotune'"),
        ("train.deterministic=maybe", "train.deterministic=maybe: should be true or false"),
        ("augment.hflip=2", "augment.hflip=2: should be less than or equal to 1"),
        ("train.warmup_epochs=60", "train.warmup_epochs=60 is not less than train.epochs=60"),
        ("data.mean=[0.5,0.5]", "data.mean has 2 values: give one for each of 3 channels"),
        ("name=../up", "name=../up: "),
        ("train.epochs=true", "train.epochs=true: should be a valid integer"),
        ("augment.crop_scale=[1.0,0.5]", "augment.crop_scale=[1.0, 0.5] is not a range from low to high"),
        ("augment.crop_scale=[0.5,30]", "augment.crop_scale=[0.5, 30.0] is not a range from low to high, at most 1"),
        ("augment.crop_scale=[0.5,1]", "augment.pad_crop=1 cannot be combined with augment.crop_scale"),
        ("augment.simple_crop=true", "augment.pad_crop=1 cannot be combined with augment.simple_crop"),
        ("loss.name=focal", "loss.name=focal: should be 'cross_entropy' or 'bce'"),
        ("loss.class_weights=even", "loss.class_weights=even: "),
        (
            "loss.class_weights={cat: -1}",
            "loss.class_weights=-1: should be greater than or equal to 0, such as balanced or",
        ),
        (
            "loss.class_weights=[1]",
            "loss.class_weights=[1]: should be 'balanced' or 'auto', such as balanced or {cat: 2",
        ),
        (
            "optim.freeze=patch_embed",
            "optim.freeze=patch_embed: should be a list, such as [patch_embed, blocks.0]",
        ),
        ("loss.teacher_size=32", "loss.teacher_size needs loss.teacher"),
        ("loss.tau=2", "loss.tau needs loss.teacher"),
        ("model.reset_head=true", "model.reset_head=true needs model.pretrained"),
        ("loss.alpha=2", "loss.alpha=2: should be less than or equal to 1"),
        ("optim.layer_decay=0", "optim.layer_decay=0: should be greater than 0"),
        ("optim.trainable=mlp", "optim.trainable=mlp: should be 'all', 'attention' or 'head'"),
        ("data.download=true", "data.download=true needs data.dataset, the data set to download"),
        ("data.crop_ratio=0.01", "data.crop_ratio=0.01: should be greater than or equal to 0.1"),
        ("optim.lr=1e38", "optim.lr=1e+38: should be less than or equal to 1000000"),
        ("model.depth=1000000000", "model.depth=1000000000: should be less than or equal to 1000"),
        ("train=3", "train=3: train is a section; set its keys, such as train.epochs"),
        ("name.x=1", "unknown recipe key 'name.x'"),
        ("nonsense", "'nonsense' is not key=value"),
        ("=3", "'=3' is not key=value"),
    ],
)
def test_a_wrong_key_or_value_is_one_line_that_names_it(override, message):
    with pytest.raises(UserError) as error:
        load_recipe("digits", [override])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "is not a recipe"),
        ("", "is not a recipe"),
        ("a: [", "is not plain YAML"),
        ("model: !!python/object/apply:os.system ['true']", "r.yaml: line 1: the tag"),
        ("modle: {}", "unknown recipe key 'modle'"),
        ("seed: 1\nseed: 2", "key 'seed' is given twice"),
        ("a: 1\n? [b]\n: 2", "r.yaml: line 2: a list or mapping cannot be a key"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path, text, message):
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        load_recipe(str(file))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_policies_exclude_each_other():
    policies = ["rand_augment=rand-m9", "auto_augment=v0", "augmix=augmix-m3", "three_augment=true"]
    for one, other in combinations(policies, 2):
        with pytest.raises(UserError, match="exclude each other"):
            load_recipe("digits", [f"augment.{one}", f"augment.{other}"])
        if "three" not in one:
            with pytest.raises(UserError, match="augment.color_jitter cannot be combined with augment."):
                load_recipe("digits", [f"augment.{one}", "augment.color_jitter=0.3"])
    assert load_recipe("digits", ["augment.three_augment=true", "augment.color_jitter=0.3"]).augment.policy


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_is_shown_with_a_line_on_each_key_and_is_a_recipe_then(tmp_path, name):
    recipe = load_recipe(
        name, ["model.schedule=[0]", "loss.class_weights={a b: 2}", "optim.freeze=[head]", 'out="a: b"']
    )
    text = recipe.explained()
    for line in text.splitlines():
        assert line.endswith(":") or line.partition("  # ")[2] not in ("", "None"), line
    assert sum(not line.endswith(":") for line in text.splitlines()) == len(list(recipe_keys()))
    (tmp_path / "r.yaml").write_text(text)
    assert load_recipe(str(tmp_path / "r.yaml")) == recipe


def test_unknown_recipes_are_named():
    with pytest.raises(UserError, match="unknown recipe 'digit'; did you mean 'digits'"):
        load_recipe("digit")
    with pytest.raises(UserError, match=r"cannot read recipe gone\.yaml"):
        load_recipe("gone.yaml")


def test_only_keys_that_change_the_result_count_as_differences():
    old = load_recipe("digits")
    free = ["out=elsewhere", "data.workers=7", "train.save_every=9"]
    assert differences(old, load_recipe("digits", free)) == []
    assert differences(old, load_recipe("digits", [*free, "optim.lr=1e-4", "seed=1"])) == [
        "seed: 0 -> 1",
        "optim.lr: 0.003 -> 0.0001",
    ]


def test_a_changed_dictionary_is_a_difference():
    none, one, two = (load_recipe("digits", [f"loss.class_weights={w}"]) for w in ("null", "{a: 2}", "{a: 2, b: 50}"))
    for old, new in ((none, one), (one, none), (one, two), (two, one)):
        assert len(differences(old, new)) == 1 and "loss.class_weights" in differences(old, new)[0]


def test_a_recipe_survives_yaml():
    recipe = load_recipe("cifar10", ["model.schedule=lsra"])
    assert parse_recipe(yaml.safe_load(recipe.to_yaml())) == recipe


# -- Values that change form


@pytest.mark.parametrize(
    ("word", "mode"),
    [
        *[(word, "off") for word in ("off", "false", "no", "'off'")],
        *[(word, "default") for word in ("true", "on", "default")],
        *[(word, word) for word in ("reduce-overhead", "max-autotune")],
    ],
)
def test_compile_takes_the_modes_of_torch(word, mode):
    """YAML reads off as false."""
    recipe = load_recipe("digits", [f"train.compile={word}"])
    assert recipe.train.compile == mode
    assert parse_recipe(yaml.safe_load(recipe.to_yaml())) == recipe
    assert parse_recipe(parse_yaml(recipe.explained(), "shown")) == recipe


@pytest.mark.parametrize(("before", "mode"), [("false", "off"), ("true", "default")])
def test_a_run_of_the_time_when_compile_was_a_switch_is_no_other(tmp_path, before, mode):
    recipe = load_recipe("digits", [f"train.compile={mode}"])
    old = [line for line in recipe.to_yaml().splitlines() if not line.strip().startswith("deterministic")]
    old = [f"  compile: {before}" if line.strip().startswith("compile") else line for line in old]
    assert f"  compile: {before}" in old
    (tmp_path / "recipe.yaml").write_text("\n".join(old))
    read = load_recipe(str(tmp_path / "recipe.yaml"))
    assert read == recipe and differences(read, recipe) == []
    assert differences(read, load_recipe("digits", ["train.compile=max-autotune"])) == [
        f"train.compile: {mode} -> max-autotune"
    ]


def test_precision_and_determinism_change_the_result():
    plain, other = load_recipe("digits"), load_recipe("digits", ["train.precision=tf32", "train.deterministic=true"])
    assert (plain.train.precision, plain.train.deterministic) == ("fp32", False)
    assert differences(plain, other) == ["train.precision: fp32 -> tf32", "train.deterministic: false -> true"]


@pytest.mark.parametrize("backend", ["pillow", "simplejpeg"])
def test_an_older_recipe_that_names_a_decoder_is_read(tmp_path, backend):
    values = yaml.safe_load(load_recipe("digits").to_yaml())
    values["data"]["backend"] = backend
    assert parse_recipe(values) == load_recipe("digits")  # as weights record it
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    assert load_recipe(str(tmp_path / "recipe.yaml")) == load_recipe("digits")
    values["data"]["backend"] = "cv2"
    with pytest.raises(UserError, match=r"unknown recipe key 'data\.backend': Pillow"):
        parse_recipe(values)


# -- Text is taken as it is given

TEXTS = [
    "0123",
    "pets #2",
    "2024-05-01",
    "1e3",
    "no",
    "Off",
    "12:30",
    "0x1f",
    "1_000",
    "a: b",
    "{x}",
    "'q'",
    " x",
    "!a",
    "&a",
    "*a",
]


@pytest.mark.parametrize("text", [*TEXTS, "null", "[a", "true", "1.10", "犬 猫"])
def test_text_of_an_override_is_what_was_typed(text):
    assert load_recipe("digits", [f"data.root={text}"]).data.root == text


@pytest.mark.parametrize("key", ["out", "model.pretrained", "loss.teacher", "data.dataset", "data.classes"])
@pytest.mark.parametrize("text", TEXTS)
def test_text_that_may_be_left_out_is_what_was_typed_too(key, text):
    section, _, last = key.rpartition(".")
    values = load_recipe("digits", [f"{key}={text}"]).model_dump()
    expected = 1000 if (key, text) == ("data.classes", "1_000") else text
    assert (values[section] if section else values)[last] == expected


@pytest.mark.parametrize("text", ["1.10", "2024-05-01", "007", "no", "1e3", "on"])
def test_names_are_what_was_typed_in_commands_and_in_files(tmp_path, text):
    recipe = load_recipe("digits", [f"name={text}"])
    assert recipe.name == text and recipe.run_folder().name == text
    (tmp_path / "r.yaml").write_text(f"name: {text}\n")
    assert load_recipe(str(tmp_path / "r.yaml")).name == text
    (tmp_path / "r.yaml").write_text(recipe.to_yaml())
    assert load_recipe(str(tmp_path / "r.yaml")) == recipe


def test_null_stands_for_no_value_where_there_may_be_none():
    words = [
        "out=null",
        "augment.rand_augment=null",
        "optim.lr_batch=null",
        "loss.class_weights=null",
        "data.mean=null",
    ]
    recipe = load_recipe("imagenet_mini", words)
    assert (recipe.out, recipe.augment.rand_augment, recipe.optim.lr_batch) == (None, None, None)
    assert (recipe.loss.class_weights, recipe.data.mean) == (None, None)
    assert load_recipe("digits", ["data.root=null"]).data.root == "null"


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("{no: 2}", {"no": 2}),
        ("{yes: 1, no: 2.5}", {"yes": 1, "no": 2.5}),
        ("{1.10: 1, 007: 3}", {"1.10": 1, "007": 3}),
        ("{null: 1, 2024-05-01: 2, ~: 3}", {"null": 1, "2024-05-01": 2, "~": 3}),
        ("{'a: b': 1e-1}", {"a: b": 0.1}),
    ],
)
def test_classes_are_what_was_typed(tmp_path, text, weights):
    recipe = load_recipe("digits", [f"loss.class_weights={text}"])
    assert recipe.loss.class_weights == weights
    (tmp_path / "r.yaml").write_text(f"loss:\n  class_weights: {text}\n")
    assert load_recipe(str(tmp_path / "r.yaml")).loss.class_weights == weights
    assert load_recipe("digits", ["loss.class_weights.no=2"]).loss.class_weights == {"no": 2}


@pytest.mark.parametrize(
    ("word", "value"),
    [
        *[(f"model.pretrained={text}", value) for text, value in (("true", True), ("no", "no"), ("1", "1"))],
        *[(f"data.classes={text}", value) for text, value in (("10", 10), ("names.txt", "names.txt"), ("007", "007"))],
        *[(f"model.schedule={text}", value) for text, value in (("lsra", "lsra"), ("[0, 8]", (0, 8)))],
        *[(f"data.cache={text}", value) for text, value in (("yes", True), ("off", False), ("null", None))],
        ("optim.freeze=[no, 1.10]", ("no", "1.10")),
        ("optim.lr=1e-3", 1e-3),
        ("train.save_every=1_000", 1000),
    ],
)
def test_a_value_is_of_the_type_that_its_key_wants(word, value):
    key = word.partition("=")[0]
    section, _, last = key.partition(".")
    assert load_recipe("digits", [word]).model_dump()[section][last] == value


@pytest.mark.parametrize("word", ["010", "0x40", "1:30", "1e3", "2024-05-01", "~", "!!int 3", "9" * 5000])
def test_a_number_in_another_notation_is_refused(word):
    with pytest.raises(UserError, match=r"^data\.batch_size=.*: should be"):
        load_recipe("digits", [f"data.batch_size={word}"])


@pytest.mark.parametrize(
    "key", ["data.root", "out", "model.pretrained", "loss.teacher", "loss.teacher_weights", "data.classes"]
)
@pytest.mark.parametrize("home", ["~", "$HOME", "${HOME}"])
def test_paths_know_the_home_folder(monkeypatch, key, home):
    monkeypatch.setenv("HOME", "/home/me")
    words = [f"{key}={home}/my pets"] + (["loss.teacher=timm/resnet18"] if key == "loss.teacher_weights" else [])
    section, _, last = key.rpartition(".")
    values = load_recipe("digits", words).model_dump()
    assert (values[section] if section else values)[last] == "/home/me/my pets"


def test_a_recipe_file_may_be_in_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my recipe.yaml").write_text("\ufeffname: mine\nout: ~\ndata: {root: ~/pets}\n", encoding="utf-8")
    recipe = load_recipe("~/my recipe.yaml")
    assert (recipe.name, recipe.out, recipe.data.root) == ("mine", None, f"{tmp_path}/pets")


def test_a_name_that_is_not_utf8_is_refused():
    for word in ("out=\udcff", "data.root=a\udce9", "name=\udc80"):
        with pytest.raises(UserError, match="is not UTF-8"):
            load_recipe("digits", [word])


def test_changes_are_words_that_make_the_recipe():
    words = ["name=1.10", "data.root=a b", "train.compile=off", "loss.class_weights={no: 2}", "optim.lr_batch=null"]
    old, new = load_recipe("digits"), load_recipe("digits", [*words, "optim.freeze=[no]", "out=~"])
    assert load_recipe("digits", [shlex.split(word)[0] for word in changes(old, new)]) == new


@pytest.mark.parametrize(
    "words",
    [
        ["loss.class_weights={a: 1, a: 2}"],
        ["loss.class_weights={a: 1}", "loss.class_weights={a: 2}"],
        ["loss.class_weights={a: 7, 'a': 1, a: 2}"],
    ],
)
def test_of_a_key_that_is_given_twice_on_the_command_line_the_last_counts(words):
    assert load_recipe("digits", words).loss.class_weights == {"a": 2}


# -- Values that follow an override


@pytest.mark.parametrize(
    ("words", "warmup"),
    [
        (["train.epochs=3"], 0.2),
        (["train.epochs=7"], 0.467),
        (["train.epochs=1"], 0.0667),
        (["train.epochs=8"], 4),  # half of it
        (["train.epochs=90"], 4),
        (["train.epochs=3", "train.warmup_epochs=1"], 1),
    ],
)
def test_the_warm_up_scales_down_with_the_epochs(words, warmup):
    said = []
    assert load_recipe("digits", words, said.append).train.warmup_epochs == warmup
    assert len(said) == (warmup < 1) and all("(train.warmup_epochs)" in line for line in said)


@pytest.mark.parametrize("epochs", [3, 4])
def test_a_warm_up_that_is_given_too_long_is_refused(epochs):
    with pytest.raises(UserError, match="train.warmup_epochs=4 is not less than"):
        load_recipe("digits", [f"train.epochs={epochs}", "train.warmup_epochs=4"])


@pytest.mark.parametrize(
    ("words", "pretrained", "reset", "said"),
    [
        ([], "cifar10", True, 0),
        (["model.name=timm/resnet18"], True, True, 1),
        (["model.name=eit_tiny"], None, False, 1),
        (["model.family=vit"], None, False, 1),
        (["model.pretrained=null"], None, False, 0),
        (["model.name=timm/resnet18", "model.pretrained=runs/x"], "runs/x", True, 0),
    ],
)
def test_the_weights_follow_the_model(words, pretrained, reset, said):
    lines = []
    model = load_recipe("photos", words, lines.append).model
    assert (model.pretrained, model.reset_head, len(lines)) == (pretrained, reset, said)


@pytest.mark.parametrize(
    ("word", "log"),
    [("wandb", ("wandb",)), ("[wandb, tensorboard]", ("wandb", "tensorboard")), ("off", ()), ("null", ()), ("[]", ())],
)
def test_where_curves_go(word, log):
    assert load_recipe("digits", [f"train.log={word}"]).train.log == log
    with pytest.raises(UserError, match="train.log=mlflow"):
        load_recipe("digits", ["train.log=mlflow"])


@pytest.mark.parametrize(
    "word, message",
    [
        ("optim.lr=1_", "optim.lr=1_: should be a number"),
        ("train.epochs=1__0", "train.epochs=1__0: should be a valid integer"),
        ("optim.lr=1__0.5", "optim.lr=1__0.5: should be a number"),
        ("train.epochs='5'", "train.epochs='5': should be a valid integer"),
        (
            "data.mean=[123.675,116.28,103.53]",
            "data.mean=123.675: should be less than or equal to 1, .* of pixels in 0",
        ),
        ("data.mean=[-0.5]", "data.mean=-0.5: should be greater than or equal to 0"),
        ("data.std=[58.395,57.12,57.375]", "data.std=58.395: should be less than or equal to 1"),
        ("data.pixel_range=[0]", r"data.pixel_range=\[0\]: should have two values, such as"),
        ("data.pixel_range=[0,1,2]", "should have two values, such as"),
        ("optim.betas=[0.9]", "should have two values, such as"),
        ("model={name: eit_tiny}", "model is a section; set its keys, such as model.name"),
        ("data={}", "data is a section"),
        ("train.deterministic=[true]", "should be true or false"),
    ],
)
def test_values_of_another_form_are_one_line(word, message):
    with pytest.raises(UserError, match=message):
        load_recipe("digits", [word])


def test_single_underscores_stand_in_numbers():
    recipe = load_recipe("digits", ["train.epochs=1_0", "optim.lr=0.000_1", "data.max_pixels=1_000_000"])
    assert (recipe.train.epochs, recipe.optim.lr, recipe.data.max_pixels) == (10, 0.0001, 1_000_000)


@pytest.mark.parametrize("key, section", [("data.root", "data"), ("train.epochs", "train"), ("model.name", "model")])
def test_a_key_with_a_dot_in_a_file_is_told_where_to_go(tmp_path, key, section):
    (tmp_path / "r.yaml").write_text(f"{key}: 3\n")
    with pytest.raises(
        UserError,
        match=f"{key} is not one key in a file: write the key {key.partition('.')[2]} inside the section {section}",
    ):
        load_recipe(str(tmp_path / "r.yaml"))
