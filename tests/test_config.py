"""Configs: how files and overrides merge, what is refused and in which words, what is built."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from pytorch_lightning import Trainer

from ldm.config import check, instantiate, load_config, save_config, to_container
from ldm.errors import UserError
from ldm.targets import get_class, parameters_of
from ldm.training.latent_diffusion import LatentDiffusion

SCHEMA = {"model": dict, "optimizer": dict, "trainer": Trainer, "seed": int, "lr": float, "name": str | None}
ADAMW = {"target": "torch.optim.AdamW", "params": {"lr": 1e-4}}


@pytest.fixture
def write(tmp_path: Path):
    """write(text, name) -> path of a YAML file."""

    def write(text: str, name: str = "a.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


def refusal(*arguments, **keywords) -> str:
    with pytest.raises(UserError) as error:
        check(*arguments, **keywords)
    return str(error.value)


def test_files_merge_left_to_right_then_overrides(write):
    first = write("a: {b: 1, c: 2}\nlist: [1, 2, 3]\n")
    second = write("a: {c: 3, d: 4}\nlist: [9]\n", "b.yaml")
    config = load_config([first, second], ["a.d=5", "list.0=7", "new.key=x=y", "empty="])
    assert config == {"a": {"b": 1, "c": 3, "d": 5}, "list": [7], "new": {"key": "x=y"}, "empty": None}


@pytest.mark.parametrize("written", ["1e-6", "1.e-6", "1E-6", "0.000001"])
def test_scientific_notation_is_a_float_in_files_and_overrides(write, written):
    config = load_config([write(f"lr: {written}\nlist: [{written}]")], [f"a.lr={written}", f"b=[{written}]"])
    values = [config.lr, config.list[0], config.a.lr, config.b[0]]
    assert values == [1e-6] * 4 and all(type(value) is float for value in values)


def test_a_quoted_number_stays_text_through_override_and_save(write, tmp_path):
    config = load_config(
        [write("a: '1e-6'")], ["b='1e-6'", "c=1e-6", "d=${c}", "e=[yes, 'yes']", "f='x: é #'"]
    )
    assert (config.a, config.b, config.d) == ("1e-6", "1e-6", 1e-6)
    again = load_config([save_config(config, tmp_path / "saved.yaml")])
    assert again == config and again.e == [True, "yes"]
    assert OmegaConf.to_yaml(again) == OmegaConf.to_yaml(config)  # interpolations are kept
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.yaml", "saved.yaml"]


def test_a_file_is_merged_over_those_that_it_includes(write, tmp_path):
    (tmp_path / "parts").mkdir()
    write("a: {b: 1, c: 1, d: 1}\n", "parts/first.yaml")
    write("include: first.yaml\na: {c: 2, d: 2}\n", "parts/second.yaml")
    own = write("include: [parts/first.yaml, parts/second.yaml]\na: {d: 3}\n")
    other = write("include: [parts/second.yaml]\n", "other.yaml")
    assert load_config([own]) == {"a": {"b": 1, "c": 2, "d": 3}}
    assert load_config([own, other]) == {"a": {"b": 1, "c": 2, "d": 2}}
    assert load_config([other, own], ["a.b=4"]) == {"a": {"b": 4, "c": 2, "d": 3}}


def test_included_files_of_the_repository_are_found_from_anywhere(write):
    config = load_config([write("include: networks/sd1.yaml\n")])
    assert config.model.params.unet.target == "ldm.models.unet.UNetModel"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("include: absent.yaml\n", r"no such config file \(.*absent\.yaml"),
        ("include: [b.yaml]\n", r"includes itself \(.*[ab]\.yaml"),
        ("include: {a: 1}\n", r"`include` should be a list of files \(.*a\.yaml"),
        ("include: [1]\n", r"`include` should be a list of files \(.*a\.yaml"),
        ("include:\n", r"`include` should be a list of files \(.*a\.yaml"),
    ],
)
def test_an_include_that_cannot_be_followed(write, text, message):
    write("include: a.yaml\n", "b.yaml")
    with pytest.raises(UserError, match=message):
        load_config([write(text)])


def test_a_mistake_in_an_included_file_names_that_file(write):
    write("lr: slow\n", "b.yaml")
    path = write("include: b.yaml\nseed: 1\n")
    assert "b.yaml" in refusal(load_config([path]), SCHEMA, paths=[path])


def test_a_missing_file_names_the_nearest(write, tmp_path):
    write("", "dreambooth.yaml"), write("", "judge.yaml")
    with pytest.raises(UserError, match=r"dreamboth\.yaml.*Did you mean .*/dreambooth\.yaml`"):
        load_config([tmp_path / "dreamboth.yaml"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: [1,\nc: }\n", r"a\.yaml:3"),
        ("a:\n\t- b\n", r"a\.yaml:2"),
        ("a: 1\na: 2\n", r"duplicate key a \(.*a\.yaml:2"),
        ("- 1\n", r"mapping of sections"),
        ("a: !!python/object/apply:os.system [ls]\n", r"a\.yaml:1"),
    ],
)
def test_bad_yaml_names_file_and_line(write, text, message):
    with pytest.raises(UserError, match=message):
        load_config([write(text)])


@pytest.mark.parametrize("item", ["noequals", "=3", "a..b=2", "a=[", "a={", "list.7=1", "list.x=1"])
def test_bad_overrides_are_named(write, item):
    with pytest.raises(UserError) as error:
        load_config([write("list: [1]")], [item])
    assert item in str(error.value)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("a: ${b}\nb: ${a}", "a"),
        ("a: {b: '${nope.c}'}", "a.b"),
        ("a: {b: '???'}", "a.b"),
        ("a: ${nope:1}", "a"),
    ],
)
def test_values_that_cannot_be_resolved_are_named(write, text, key):
    with pytest.raises(UserError, match=f"`{key}` cannot be resolved"):
        load_config([write(text)])
    with pytest.raises(UserError, match=f"`{key}` cannot be resolved"):
        check(OmegaConf.load(write(text)), {"a": object, "b": object})


def test_unknown_names_tell_key_file_and_nearest(write):
    base = write("trainer: {max_steps: 1}\n")
    preset = write("trainer: {max_step: 3}\nseeds: 1\n", "preset.yaml")
    config = load_config([base, preset], ["trainer.acelerator=cpu"])
    lines = refusal(config, SCHEMA, paths=[base, preset], dotlist=["trainer.acelerator=cpu"]).splitlines()
    assert lines == [
        f"`max_step` is not a parameter of Trainer (trainer.max_step, {preset}). Did you mean `max_steps`?",
        "`acelerator` is not a parameter of Trainer (trainer.acelerator, trainer.acelerator=cpu). "
        "Did you mean `accelerator`?",
        f"`seeds` is not a section (seeds, {preset}). Did you mean `seed`?",
    ]


def test_missing_sections_and_parameters():
    assert "(model)" in refusal({}, SCHEMA, required=["model"])
    cosine = {"target": "torch.optim.lr_scheduler.CosineAnnealingLR", "params": {}}
    assert "CosineAnnealingLR needs `T_max` (optimizer.params.T_max)" in refusal(
        {"optimizer": cosine}, SCHEMA
    )
    check({"optimizer": cosine}, SCHEMA, from_code=["optimizer.params.T_max"])


def test_what_fits_passes():
    callback = {"target": "pytorch_lightning.callbacks.ModelCheckpoint", "params": {"every_n_train_steps": 5}}
    trainer = {
        "max_steps": 3,
        "devices": [0],
        "precision": "bf16-mixed",
        "gradient_clip_val": 1,
        "callbacks": None,
    }
    config = {"optimizer": ADAMW, "trainer": trainer, "model": {"any": [callback]}, "lr": 1, "name": None}
    check(config, SCHEMA, required=["model"])


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"seed": True}, "seed"),
        ({"seed": 1e6}, "seed"),
        ({"seed": None}, "seed"),
        ({"lr": "1e-6"}, "lr"),
        ({"lr": False}, "lr"),
        ({"name": 3}, "name"),
        ({"model": "unet"}, "model"),
        ({"trainer": [1]}, "trainer"),
        ({"trainer": {"precision": "bf17"}}, "trainer.precision"),
        ({"trainer": {"max_steps": "3"}}, "trainer.max_steps"),
        ({"optimizer": ADAMW | {"params": {"betas": [0.9]}}}, "optimizer.params.betas"),
        ({"optimizer": ADAMW | {"params": {"betas": [0.9, "x"]}}}, "optimizer.params.betas"),
        ({"optimizer": ADAMW | {"params": [1]}}, "optimizer.params"),
        ({"optimizer": ADAMW | {"lr": 1}}, "optimizer.lr"),
        ({"model": {"any": [ADAMW | {"params": {"wd": 0}}]}}, "model.any.0.params.wd"),
    ],
)
def test_wrong_types_name_the_key(config, key):
    assert f"({key})" in refusal(config, SCHEMA)


class Networks:
    """Takes every kind of annotation that a config can meet."""

    def __init__(
        self,
        *,
        unet: dict,
        mult: tuple[int, ...] = (1,),
        pair: "tuple[int, float]" = (1, 1.0),
        names: list[str] | None = None,
        table: dict[str, float] | None = None,
    ):
        self.unet, self.mult, self.names = unet, mult, names


@pytest.mark.parametrize(
    ("params", "bad"),
    [
        ({"mult": [1, 2, 4], "pair": [1, 2], "names": ["a"], "table": {"a": 1}}, None),
        ({"mult": [1, 2.5]}, "mult"),
        ({"mult": 3}, "mult"),
        ({"pair": [1, 2, 3]}, "pair"),
        ({"names": "abc"}, "names"),
        ({"names": [1]}, "names"),
        ({"table": {"a": "b"}}, "table"),
        ({"unet": [1]}, "unet"),
        ({"unet": {"target": "torch.optim.AdamW", "params": {"lrr": 1}}}, "unet.params.lrr"),
    ],
)
def test_annotations_of_a_constructor(params, bad):
    config, schema = {"net": {"unet": {}} | params}, {"net": Networks}
    if bad is None:
        check(config, schema)
    else:
        assert f"(net.{bad})" in refusal(config, schema)


def test_check_builds_nothing():
    refused = {"target": "torch.optim.AdamW", "params": {"lr": -1.0}}  # its constructor would raise
    check({"optimizer": refused}, SCHEMA)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("os.system", "not an allowed target"),
        ("ldmx.Thing", "not an allowed target"),
        ("ldm", "`ldm` is a package, not a class.*package.module.Class"),
        ("ldm.config.Path", "not a class of ldm.config"),  # imported there, defined elsewhere
        ("ldm.files.os.system", "cannot be imported: there is no"),
        ("torch.optim.Adamw", "Did you mean `AdamW`"),
        ("torch.optim.nope.AdamW", "no `torch.optim.nope`"),
        ("ldm.config.check", "not a class"),
        (None, "not an allowed target"),
    ],
)
def test_targets_outside_the_allow_list(target, message):
    with pytest.raises(UserError, match=message):
        get_class(target)
    with pytest.raises(UserError, match=message):
        instantiate({"target": target})


def test_instantiate_resolves_and_adds_arguments_from_code():
    config = OmegaConf.create(
        {"lr": 1e-3, "optimizer": {"target": "torch.optim.AdamW", "params": {"lr": "${lr}"}}}
    )
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = instantiate(config.optimizer, params=[weight], betas=(0.5, 0.9))
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["params"][0] is weight) == (1e-3, (0.5, 0.9), True)


def test_plain_dicts_are_plain_and_apart_from_the_config():
    config = OmegaConf.create({"a": {"b": [1, 2]}, "c": "${a.b}"})
    plain = to_container(config)
    assert type(plain["a"]) is dict and type(plain["c"]) is list
    given = {"a": [1]}
    to_container(given)["a"].append(2)
    assert given == {"a": [1]}


def test_import_is_light():
    script = "import sys, ldm.config; print([m for m in ('torch', 'diffusers') if m in sys.modules])"
    root = Path(__file__).parent.parent
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_another_class_brings_its_own_params(tmp_path: Path):
    """A derived class keeps those that are there; an unrelated one begins anew, by file or by override."""
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text("node: {target: torch.optim.AdamW, params: {lr: 1, eps: 2}}\n")
    for target, kept in (
        ("torch.optim.SGD", {}),
        ("ldm.optim.fused_adamw.FusedAdamW", {"lr": 1, "eps": 2}),
    ):
        two.write_text(f"node: {{target: {target}, params: {{foreach: true}}}}\n")
        wanted = {"target": target, "params": kept | {"foreach": True}}
        assert load_config([one, two]).node == wanted
        whole = f"node={{target: {target}, params: {{foreach: true}}}}"
        assert load_config([one], [whole]).node == wanted
        apart = [f"node.target={target}", "node.params.foreach=true"]
        assert load_config([one], apart).node == wanted
        node = {"target": target, "params": {"foreach": True}}
        literals = {"node.target": target, "node.params.foreach": True}
        for values in ({"node": node}, literals, dict(reversed(literals.items()))):
            assert load_config([one], literals=values).node == wanted


def test_a_subclass_has_the_parameters_that_it_passes_on():
    class Mine(LatentDiffusion):
        def __init__(self, *, mine: int = 1, **params: object):
            super().__init__(**params)

    assert {"mine", "unet", "seed"} <= parameters_of(Mine).keys() and "params" not in parameters_of(Mine)
