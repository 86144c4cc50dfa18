"""Configs from anywhere: each is built from or refused by key, before anything is built."""

import copy
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ldm.config import load_config, to_container
from ldm.runs.options import parse
from tests.hostile.conftest import examples, outcome, refused_or

ROOT = Path(__file__).resolve().parents[2]
WHOLE = to_container(load_config([ROOT / "configs/dreambooth.yaml"]))

FILES = {
    "an empty file": b"",
    "a list": b"- 1\n- 2\n",
    "a tab for indentation": b"model:\n\ttarget: x\n",
    "bytes that are no UTF-8": b"name: \xff\xfe\n",
    "a cyclic anchor": b"model: &a\n  params: *a\n",
    "a Python object": b"name: !!python/object/apply:os.system ['true']\n",
    "a key twice": b"name: a\nname: b\n",
    "only a name": b"name: x\n",
    "a file that includes itself": b"include: [bad.yaml]\n",
    "a file that includes a device": b"include: [/dev/zero]\n",
    "a file that includes no names": b"include: [[{a: 1}]]\n",
    "a file that includes by a resolver": b'include: ["${oc.env:HOME}"]\n',
    **{f"{depth} levels": b"name: " + b"[" * depth + b"]" * depth for depth in (60, 150, 400, 5000)},
    "150 levels of sections": b"".join(b" " * level + b"a:\n" for level in range(150)),
    "an anchor bomb": b"a: &a [x,x,x,x,x,x,x,x,x]\n"
    + b"".join(b"%c: &%c [*%c,*%c]\n" % (k + 1, k + 1, k, k) for k in range(ord("a"), ord("h"))),
}
OVERRIDES = {
    "an unknown section": "modell.params.seed=1",
    "a misspelt parameter": "model.params.trainable.lerning_rate=1",
    "a word for a number": "trainer.max_steps=soon",
    "an unknown sampler": "priors.sampler=dpm2m",
    "an unknown spacing": "samples.spacing=even",
    "a number for a switch": "model.params.trainable.unet=3",
    "a target outside the allow-list": "model.target=os.system",
    "a target that is no class": "model.target=ldm.errors.Nothing",
    "a reference to itself": "seed=${seed}",
    "two references in a circle": "name=${base_checkpoint} base_checkpoint=${name}",
    "a reference to nothing": "seed=${sed}",
    "an environment variable that is not set": "name=${oc.env:NOT_SET_ANYWHERE}",
    "an unknown resolver": "name=${run:ls}",
    "a value that is missing": "name=???",
    "a list for a mapping": "data.params=[1,2]",
    "no value": "name",
    "an empty key": "=3",
    "open brackets": "trainer.max_steps=[1,",
    "5000 brackets": f"name={'[' * 5000}{']' * 5000}",
    "500 levels of sections": f"{'.'.join('a' * 500)}=1",
}


def load(*words: str) -> str:
    config = parse(["--base", *words])
    return f"a config named {config.name}"


@pytest.mark.parametrize("what", FILES)
def test_bad_files_are_refused(tmp_path: Path, what: str):
    (tmp_path / "bad.yaml").write_bytes(FILES[what])
    got = outcome("config file", what, lambda: load(str(tmp_path / "bad.yaml")), hide=tmp_path)
    assert got.startswith("refused: ")


@pytest.mark.parametrize("what", OVERRIDES)
def test_bad_overrides_are_refused(what: str):
    config = str(ROOT / "configs/dreambooth.yaml")
    words = OVERRIDES[what].split()
    got = outcome("config", f"{what}: `{' '.join(words)[:80]}`", lambda: load(config, *words), hide=ROOT)
    assert got.startswith("refused: ")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("${seed}"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def leaves(node: dict, key: tuple = ()) -> list[tuple]:
    inner = [
        leaves(value, (*key, name)) if isinstance(value, dict) else [(*key, name)]
        for name, value in node.items()
    ]
    return [leaf for found in inner for leaf in found]


@examples(60)
@given(key=st.sampled_from(leaves(WHOLE)), cut=st.integers(1, 4), value=VALUES)
def test_any_value_anywhere(tmp_path: Path, key: tuple, cut: int, value: object):
    config = copy.deepcopy(WHOLE)
    node = config
    for name in key[:cut][:-1]:
        node = node[name]
    node[key[:cut][-1]] = value
    (tmp_path / "changed.yaml").write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    refused_or(lambda: load(str(tmp_path / "changed.yaml")))


@examples(60)
@given(
    content=st.binary(max_size=60) | st.text("abc:[]{}&*!|>- \n\t${}'\"#%@`0.", max_size=40).map(str.encode)
)
def test_any_file(tmp_path: Path, content: bytes):
    (tmp_path / "any.yaml").write_bytes(content)
    assert refused_or(lambda: load(str(tmp_path / "any.yaml"))) is None  # a whole config: not by chance


@examples(60)
@given(words=st.lists(st.text("abc=.[]{}$:-0 \x00\n", max_size=12), min_size=1, max_size=3))
def test_any_words(words: list[str]):
    try:
        refused_or(lambda: load(str(ROOT / "configs/dreambooth.yaml"), *words))
    except SystemExit as error:
        assert error.code in (0, 2)  # argparse's own message
