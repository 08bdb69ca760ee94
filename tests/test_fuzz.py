"""Whatever bytes come: the recipe reader and the checkpoint readers answer with one line, or with what they read.

10,000 inputs each in make test-slow, without growth of memory; a short form in make test.
"""

import gc
import hashlib
import json
import os
import pickle
import resource
import struct
import zipfile
from io import BytesIO

import pytest
import safetensors.torch
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

import eit
from eit.config import Recipe, load_recipe, parse_overrides, parse_recipe, parse_yaml, recipe_keys
from eit.errors import UserError
from eit.training.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from eit.weights.formats import read_weights
from eit.weights.load import load

both = pytest.mark.parametrize(
    "inputs", [150, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
)


def fuzz(inputs, strategy, check):
    """`check` on so many values, each in less than 10 seconds; memory must not grow."""
    seen, part = [], 1000
    for number in range(max(inputs // part, 1)):  # in parts, for hypothesis remembers what it tried
        done = 0

        @seed(number)
        @settings(
            max_examples=min(part, inputs),
            deadline=10_000,
            suppress_health_check=list(HealthCheck),
            database=None,
            phases=[Phase.generate],
        )
        @given(strategy)
        def run(value):
            nonlocal done
            check(value)
            done += 1

        run()
        assert done >= min(part, inputs)
        gc.collect()
        seen.append(memory())
    if len(seen) > 1:
        print(f"{inputs} inputs, resident memory after each {part}: {[size >> 20 for size in seen]} MiB")
        assert seen[-1] < 1.05 * seen[1]


def memory():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * resource.getpagesize()


def answers(call):
    try:
        return call()
    except UserError as error:
        assert str(error).strip() and "\n" not in str(error)
        return None


KEYS = sorted(recipe_keys())
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["eit", "auto", "1e400"]),
)
values = st.recursive(
    scalars, lambda v: st.lists(v, max_size=4) | st.dictionaries(scalars.map(str), v, max_size=4), max_leaves=8
)
shipped = load_recipe("digits").to_yaml()


@st.composite
def damaged(draw, content):
    """Bytes of `content` with some flipped, cut out or put in."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 6))):
        if not data:
            break
        at = draw(st.integers(0, len(data) - 1))
        kind = draw(st.integers(0, 3))
        if kind == 0:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == 1:
            del data[at : at + draw(st.integers(1, 64))]
        elif kind == 2:
            data[at:at] = draw(st.binary(max_size=16))
        else:
            data = data[:at]
    return bytes(data)


@both
def test_any_text_as_a_recipe(inputs):
    text = st.one_of(
        st.text(max_size=200),
        values.map(lambda v: yaml.safe_dump(v, allow_unicode=True)),
        damaged(shipped.encode()).map(lambda b: b.decode("utf-8", "replace")),
    )

    def check(text):
        recipe = answers(lambda: parse_recipe(parse_yaml(text, "r.yaml")))
        assert recipe is None or parse_recipe(yaml.safe_load(recipe.to_yaml())) == recipe

    fuzz(inputs, text, check)


@both
def test_any_override(inputs):
    word = st.one_of(
        st.text(max_size=40),
        st.tuples(st.sampled_from(KEYS), st.text(max_size=20)).map("=".join),
        st.tuples(st.sampled_from(KEYS), values).map(lambda kv: f"{kv[0]}={json.dumps(kv[1], default=str)}"),
    )

    def check(words):
        recipe = answers(lambda: parse_recipe(parse_overrides(words, yaml.safe_load(shipped))))
        assert recipe is None or (isinstance(recipe, Recipe) and recipe.explained())

    fuzz(inputs, st.lists(word, max_size=4), check)


@pytest.fixture(scope="module")
def good():
    """Small whole files of each kind: (suffix, bytes)."""
    model = eit.create_model("eit_mini", embed_dim=8, depth=1, num_heads=2, num_classes=3, img_size=32)
    state = model.state_dict()
    ours = eit.weights.load.find_weights("digits").read_bytes()[:60_000]
    plain = safetensors.torch.save(
        {k: v.contiguous() for k, v in state.items()}, metadata={"eit": '{"model": "eit_mini"}'}
    )
    zipped, legacy = BytesIO(), BytesIO()
    torch.save({"model": state}, zipped)
    torch.save({"model": state}, legacy, _use_new_zipfile_serialization=False)
    return [("safetensors", plain), ("safetensors", ours), ("pth", zipped.getvalue()), ("pth", legacy.getvalue())]


class Evil:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@both
def test_any_bytes_as_weights(inputs, good, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    header = st.dictionaries(
        st.text(max_size=8),
        st.one_of(
            values,
            st.fixed_dictionaries(
                {
                    "dtype": st.sampled_from(["F32", "F64", "I8", "BF16", "X"]),
                    "shape": st.lists(st.integers(-1, 2**62), max_size=3),
                    "data_offsets": st.lists(st.integers(-1, 2**62), min_size=2, max_size=2),
                }
            ),
        ),
        max_size=3,
    )

    def lying(parts):
        text = json.dumps(parts[0]).encode()
        return "safetensors", struct.pack("<Q", parts[1] if parts[1] >= 0 else len(text)) + text + parts[2]

    evil = BytesIO()
    with zipfile.ZipFile(evil, "w") as z:
        z.writestr("archive/data.pkl", pickle.dumps(Evil(), protocol=2))
        z.writestr("archive/version", "3")
    kinds = [damaged(content).map(lambda b, s=suffix: (s, b)) for suffix, content in good]
    kinds += [damaged(c).map(lambda b: ("pth", b)) for c in (evil.getvalue(), pickle.dumps(Evil()))]
    kinds.append(st.tuples(header, st.integers(-1, 2**63), st.binary(max_size=64)).map(lying))
    kinds.append(st.tuples(st.sampled_from(["safetensors", "pth"]), st.binary(max_size=300)))

    def check(file):
        path = tmp_path / f"w.{file[0]}"
        path.write_bytes(file[1])
        answers(lambda: read_weights(path))
        answers(lambda: load(path))

    fuzz(inputs, st.one_of(kinds), check)
    assert not os.path.exists("ran")


@both
def test_any_bytes_as_a_state_of_training(inputs, tmp_path, monkeypatch):
    """Also where the manifest agrees with them."""
    monkeypatch.chdir(tmp_path)
    model = eit.create_model("eit_mini", embed_dim=8, depth=1, num_heads=2, num_classes=3, img_size=32)
    card = eit.load("digits").card.model_copy(update=dict(arguments=dict(embed_dim=8, depth=1, num_heads=2)))
    whole = dict(optimizer=dict(state={0: dict(step=torch.ones(1))}), scaler={}, progress=dict(step=3))
    folder = save_checkpoint(tmp_path, 3, card, model.state_dict(), None, whole)
    files = {name: (folder / name).read_bytes() for name in ("state.pt", "manifest.json", "model.safetensors")}
    evil = BytesIO()
    torch.save(Evil(), evil)
    damages = [st.tuples(st.just(name), damaged(content)) for name, content in files.items()]
    damages.append(st.tuples(st.just("state.pt"), damaged(evil.getvalue())))

    def check(choice):
        (name, content), true_checksum = choice
        for other, whole in files.items():
            (folder / other).write_bytes(whole)
        (folder / name).write_bytes(content)
        if true_checksum and name != "manifest.json":
            manifest = json.loads(files["manifest.json"])
            manifest["sha256"][name] = hashlib.sha256(content).hexdigest()
            (folder / "manifest.json").write_text(json.dumps(manifest))
        found = answers(lambda: newest_checkpoint(tmp_path))
        if found:
            answers(lambda: load_checkpoint(found[0]))

    fuzz(inputs, st.tuples(st.one_of(damages), st.booleans()), check)
    assert not os.path.exists("ran")
