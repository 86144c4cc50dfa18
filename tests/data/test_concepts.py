"""Several concepts in one run: whose items are whose, what each shows and says, and what is refused."""

import logging
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from ldm.annotations import Node
from ldm.config import check, instantiate
from ldm.data.concepts import Concept, ConceptConfig, filled_for, rows_of_template
from ldm.data.dreambooth import DreamBoothDataModule
from ldm.data.items import VALIDATION_START
from ldm.data.priors import PriorSet, PriorSpec
from ldm.data.streams import Turns, cycle
from ldm.errors import UserError
from tests.data.test_dreambooth import SIZE, assert_same, by_number, encode, equal, items, noise, photos


def dog(root: object = "dogs", **more) -> ConceptConfig:
    return ConceptConfig(root=str(root), **{"identifier": "sks", "class_word": "dog", **more})


def cat(root: object = "cats", **more) -> ConceptConfig:
    return ConceptConfig(root=str(root), **{"identifier": "zwx", "class_word": "cat", **more})


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Photos of a dog (5), a cat (3), another dog (4) and of a style (2)."""
    monkeypatch.chdir(tmp_path)
    for k, (name, count) in enumerate({"dogs": 5, "cats": 3, "rex": 4, "style": 2, "class": 6}.items()):
        photos(tmp_path / name, count, seed=k)
    return tmp_path


def priors_of(*prompts: str, count: int = 4) -> list[PriorSet]:
    """Sets whose latents are the number of the prompt, and after the point that of the image."""

    def generate(first: int):
        def images(seeds):
            return [
                (
                    noise(9000 * first + seed, SIZE, SIZE),
                    torch.full((3, SIZE // 2, SIZE // 2), first + seed / 1000),
                )
                for seed in seeds
            ]

        return images

    sets = [PriorSet("priors", PriorSpec(p, "ab", "ddim", 5, 7.5, "", SIZE, 0)) for p in prompts]
    for k, found in enumerate(sets):
        found.generate_missing(count, generate(k), batch_size=count)
    return sets


def ready(concepts: list[ConceptConfig], priors: list[PriorSet] = (), **params) -> DreamBoothDataModule:
    data = DreamBoothDataModule(
        concepts=concepts, **{"size": SIZE, "crop": "random", "batch_size": 4, "num_priors": 0, **params}
    )
    data.check()
    data.attach(encode=encode, vae_hash="v", priors=priors)
    data.setup()
    return data


# --- whose turn it is ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "weights, counts",
    [
        ([1], [1]),
        ([1, 1], [1, 1]),
        ([0.5, 1], [1, 2]),
        ([0.3, 0.7], [3, 7]),
        ([2, 2, 4], [1, 1, 2]),
        ([1.5, 0.25], [6, 1]),
    ],
)
def test_a_cycle_has_the_ratio_of_the_weights(weights: list[float], counts: list[int]):
    weights = [Fraction(str(weight)) for weight in weights]
    assert cycle(weights) == counts
    turns, length = Turns(counts, seed=3, purpose="subject/concept"), sum(counts)
    for start in (0, VALIDATION_START):
        seen = [turns(start + k) for k in range(6 * length)]
        for first in range(0, len(seen), length):
            assert Counter(stream for stream, _ in seen[first : first + length]) == Counter(
                {k: count for k, count in enumerate(counts)}
            )
        for stream in range(len(counts)):  # each stream counts its own items from the start, without a gap
            own = [number for which, number in seen if which == stream]
            assert own == list(range(start, start + len(own)))


def test_turns_follow_from_seed_and_number_alone():
    counts = [1, 1, 2]

    def turns(seed: int) -> Turns:
        return Turns(counts, seed=seed, purpose="subject/concept")

    forwards = [turns(5)(k) for k in range(80)]
    assert [turns(5)(k) for k in reversed(range(80))] == forwards[::-1]
    assert [turns(6)(k) for k in range(80)] != forwards
    orders = {tuple(stream for stream, _ in forwards[k : k + 4]) for k in range(0, 80, 4)}
    assert len(orders) > 5


def test_weights_without_a_short_cycle_are_refused(folders: Path):
    with pytest.raises(UserError, match=r"The weights 1.0, 1.00123 come out even only after 200123 items"):
        ready([dog(), cat(weight=1.00123)])


# --- items ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hold_out", [False, True])
def test_one_concept_is_the_short_form_to_the_bit(folders: Path, hold_out: bool):
    how = {"num_priors": 4, "prior_caption_dropout": 0.25, "caption_dropout": 0.2, "hold_out": hold_out}
    priors = priors_of("a photo of a dog")
    listed = ready([dog()], priors, **how)
    short = DreamBoothDataModule(
        subject_root="dogs", class_word="dog", size=SIZE, crop="random", batch_size=4, **how
    )
    short.attach(encode=encode, vae_hash="v", priors=priors)
    short.setup()
    for one, other in zip(items(listed, 12), items(short, 12), strict=True):
        assert equal(one, other)
    for one, other in zip(listed.val_dataloader(), short.val_dataloader(), strict=True):
        assert equal(one, other)


def test_each_concept_has_its_photos_words_and_share(folders: Path):
    data = ready([dog(), cat(weight=0.5), ConceptConfig(root="style", identifier="qpv", class_word=None)])
    assert [concept.name for concept in data.concepts] == ["sks dog", "zwx cat", "qpv"]
    stream = data.dataset.streams["subject"]
    seen = Counter(
        (stream.view(k).source.path.parent.name, stream.captions(k)["caption"]) for k in range(500)
    )
    assert seen == {
        ("dogs", "a photo of sks dog"): 200,
        ("cats", "a photo of zwx cat"): 100,
        ("style", "a picture in the style of qpv"): 200,
    }
    names = [stream.view(k).source.path for k in range(500)]
    for folder, count in (("dogs", 5), ("cats", 3), ("style", 2)):  # every photo once in a pass of its own
        own = [path for path in names if path.parent.name == folder]
        passes = [own[k : k + count] for k in range(0, len(own) - count, count)]
        assert all(len(set(shown)) == count for shown in passes)


def test_concepts_draw_apart(folders: Path):
    stream = ready(
        [dog(), cat(root="rex"), dog("class", identifier="qpv")], caption_dropout=0.5
    ).dataset.streams["subject"]
    flips = [[s.view(k).flip for k in range(60)] for s in stream.streams]
    empty = [[s.caption(k) == "" for k in range(60)] for s in stream.streams]
    assert len({tuple(rows) for rows in flips}) == len({tuple(rows) for rows in empty}) == 3


def test_classes_share_a_set_and_have_the_weight_of_their_concepts(folders: Path):
    concepts = [dog(), dog("rex", identifier="qpv"), cat()]
    data = ready(concepts, priors_of("a photo of a dog", "a photo of a cat"), num_priors=4)
    assert [known.prompt for known in data.generated_classes] == ["a photo of a dog", "a photo of a cat"]
    rows = [row for row in items(data, 30) if row["stream"] == "prior"]
    assert Counter(row["caption"] for row in rows) == {"a photo of a dog": 80, "a photo of a cat": 40}
    for row in rows:
        value = row["latent_stats"][0, 0, 0].item()
        assert int(value + 0.5) == ("cat" in row["caption"]) and not row["latent_stats"][3:].any()


def test_a_style_has_no_prior_images_and_the_others_do(folders: Path):
    style = ConceptConfig(root="style", identifier="qpv", class_word=None)
    data = ready([style, cat()], priors_of("a photo of a cat"), num_priors=4)
    assert {row["caption"] for row in items(data, 9) if row["stream"] == "prior"} == {"a photo of a cat"}
    alone = ready([style], num_priors=4)
    assert alone.prior_batch_size == 0 and not alone.generated_classes
    held = ready([style], num_priors=4, prior_caption_dropout=0.25)
    assert {row["caption"] for row in items(held, 9) if row["stream"] == "prior"} == {""}
    painted = ConceptConfig(root="style", identifier="qpv", class_word=None, prior_prompt="a painting")
    data = ready([painted], priors_of("a painting"), num_priors=4)
    assert {row["caption"] for row in items(data, 9) if row["stream"] == "prior"} == {"a painting"}


def test_a_given_folder_serves_all_concepts_of_the_class(folders: Path):
    concepts = [dog(), dog("rex", identifier="qpv", prior_root="class"), cat()]
    data = ready(concepts, priors_of("a photo of a cat"), num_priors=4)
    stream = data.dataset.streams["prior"]
    places = Counter((stream.view(k).source.path.parent.name, stream.view(k).flip) for k in range(300))
    assert sum(n for (name, _), n in places.items() if name == "class") == 200
    assert len(places) == 3  # a generated image is never mirrored


def test_a_caption_of_the_class_has_no_concepts_identifier(folders: Path):
    next(Path("class").glob("*.png")).with_suffix(".txt").write_text("a qpv dog")
    concepts = [dog(prior_root="class"), dog("rex", identifier="qpv")]
    with pytest.raises(UserError, match='"qpv" is in a caption of the class, "a qpv dog".*Remove it'):
        ready(concepts, num_priors=4, captions=True)


def test_the_empty_prompt_is_held_by_the_same_share_of_every_step(folders: Path):
    data = ready(
        [dog(), cat()],
        priors_of("a photo of a dog", "a photo of a cat"),
        num_priors=4,
        prior_caption_dropout=0.25,
    )
    rows = [row for row in items(data, 40) if row["stream"] == "prior"]
    assert all(sum(row["caption"] == "" for row in rows[k : k + 4]) == 1 for k in range(0, 160, 4))
    shown = [data.dataset.streams["prior"].turns(int(row["item"]))[0] for row in rows if not row["caption"]]
    assert 8 < sum(shown) < 32  # images of both classes


def test_without_prior_images_each_photo_is_held_under_its_class(folders: Path):
    data = ready([dog(), cat()], prior_caption_dropout=0.25)
    rows = [row for row in items(data, 20) if row["stream"] == "prior"]
    assert {row["caption"] for row in rows} == {"", "a photo of a dog", "a photo of a cat"}
    stream = data.dataset.streams["prior"]
    for row in (row for row in rows if row["caption"]):
        folder = stream.view(int(row["item"])).source.path.parent.name
        assert row["caption"] == f"a photo of a {folder.removesuffix('s')}"


TWO = {"num_priors": 4, "prior_caption_dropout": 0.25, "caption_dropout": 0.2}


def two(**params) -> DreamBoothDataModule:
    priors = priors_of("a photo of a dog", "a photo of a cat")
    return ready([dog(), cat(weight=3)], priors, **TWO | params)


def test_cached_equals_uncached(folders: Path):
    for one, other in zip(items(two(), 20), items(two(cache_latents=False), 20), strict=True):
        if one["stream"] == "subject":
            assert torch.equal(one["latent_stats"], encode(other["image"][None])[0])
        assert {k: one[k] for k in ("caption", "item")} == {k: other[k] for k in ("caption", "item")}


@pytest.mark.parametrize("batch_size, accumulate, world_size", [(1, 4, 1), (2, 1, 2), (1, 2, 2), (1, 1, 4)])
def test_micro_batches_and_ranks_share_the_items_of_one_batch(
    folders: Path, batch_size: int, accumulate: int, world_size: int
):
    one, many = two(), two(batch_size=batch_size, accumulate=accumulate)
    for step in range(3):
        shares = [
            items(many, accumulate, rank=rank, world_size=world_size, start_step=step)
            for rank in range(world_size)
        ]
        assert_same(by_number(items(one, 1, start_step=step)), by_number(sum(shares, [])))


def test_resuming_at_a_step_is_the_tail_of_the_stream(folders: Path):
    data = two()
    whole, tail = items(data, 8), items(data, 3, start_step=5)
    assert all(equal(one, other) for one, other in zip(whole[5 * 8 :], tail, strict=True))


def test_each_concept_of_five_photos_holds_one_out(folders: Path):
    data = ready([dog(), cat(), dog("class", identifier="qpv")], hold_out=True, validation_batches=10)
    held = {(photo.path.parent.name, photo.path.name) for name in data.images.photos
            for photo in data.images.held_out(name)}  # fmt: skip
    assert held == {("dogs", "4.png"), ("class", "5.png")}
    stream = data.dataset.streams["subject"]
    trained = {(p.parent.name, p.name) for p in (stream.view(k).source.path for k in range(400))}
    assert not held & trained and len(trained) == 5 - 1 + 3 + 6 - 1
    validated = [int(item) for batch in data.val_dataloader() for item in batch["item"]]
    shown = {(p.parent.name, p.name) for p in (stream.view(item).source.path for item in validated)}
    assert shown == held | {("cats", f"{k}.png") for k in range(3)}


def test_online_priors_are_new_images_of_each_class(folders: Path):
    asked = []

    def generators(spec: PriorSpec):
        def generate(seeds):
            asked.append((spec.prompt, list(seeds)))
            return [(noise(s, SIZE, SIZE), torch.full((3, SIZE // 2, SIZE // 2), float(s))) for s in seeds]

        return generate

    data = two(online_priors=True, prior_caption_dropout=0.0, caption_dropout=0.0)
    data.generate = generators
    rows = [row for row in items(data, 4) if row["stream"] == "prior"]
    for word, count in (("dog", 4), ("cat", 12)):
        numbers = [row["latent_stats"][0, 0, 0].item() for row in rows if word in row["caption"]]
        assert numbers == [4.0 + k for k in range(count)]
    assert asked[:2] == [("a photo of a dog", [4]), ("a photo of a cat", [4, 5, 6])]
    again = two(online_priors=True, prior_caption_dropout=0.0, caption_dropout=0.0)
    again.generate = lambda spec: lambda seeds: pytest.fail("generated again")
    assert all(
        equal(a, b) for a, b in zip(rows, (r for r in items(again, 4) if r["stream"] == "prior"), strict=True)
    )
    with pytest.raises(UserError, match="cannot be generated online"):
        ready([dog(), cat(prior_root="class")], num_priors=4, online_priors=True)


# --- words ---------------------------------------------------------------------------------------------


@pytest.fixture
def two_dogs_and_a_style(folders: Path) -> tuple[Concept, ...]:
    style = ConceptConfig(root="style", identifier="vtx", class_word=None)
    return DreamBoothDataModule(concepts=[dog(), dog("rex", identifier="qpv"), style], size=SIZE).concepts


def test_prompts_are_filled_for_each_concept(two_dogs_and_a_style: tuple[Concept, ...]):
    concepts = two_dogs_and_a_style
    prompts = ["a {identifier} {class_word}", "a {class_word}", "{identifier} at night", "a tree"]
    assert filled_for(prompts, concepts) == [
        "a sks dog",
        "a qpv dog",
        "a dog",
        "sks at night",
        "qpv at night",
        "vtx at night",
        "a tree",
    ]
    assert filled_for(prompts[:2], concepts)[-1] == "a picture in the style of vtx"
    assert filled_for(["a {class_word}"] * 2, concepts[:1]) == ["a dog", "a dog"]  # as it is written
    with pytest.raises(UserError, match="Unknown placeholder"):
        filled_for(["a {thing}"], concepts)


def test_the_rows_of_a_template_are_those_of_its_prompts(two_dogs_and_a_style: tuple[Concept, ...]):
    concepts = two_dogs_and_a_style
    prompts = ["a {identifier} {class_word}", "a {class_word}", "{identifier} at night", "a tree", "a dog"]
    for some in (concepts, concepts[:2], concepts[:1], concepts[2:], concepts[::-1]):
        rows = filled_for(prompts, some)
        for template in prompts:
            filled = {
                template.format(**c.words): c
                for c in some
                if c.words["class_word"] or "class" not in template
            }
            found = rows_of_template(template, prompts, some)
            assert found.keys() == filled.keys() and all(rows[row] == text for text, row in found.items())
    assert rows_of_template(prompts[2], prompts, concepts) == {
        "sks at night": 3,
        "qpv at night": 4,
        "vtx at night": 5,
    }
    assert rows_of_template("a {class_word}", prompts, concepts[2:]) == {}
    assert rows_of_template("a dog", ["a {class_word}", "a dog"], concepts[:2]) == {"a dog": 0}
    assert rows_of_template("no template", prompts, concepts) == {}


def test_captions_of_each_concept_have_its_words(folders: Path, caplog):
    for name in ("dogs", "cats"):
        (folders / name / "1.txt").write_text("{identifier} {class_word} asleep")
    with caplog.at_level(logging.INFO):
        data = ready([dog(), cat()], captions=True)
    captions = {row["caption"] for row in items(data, 20)}
    assert {"sks dog asleep", "zwx cat asleep"} <= captions
    assert "dogs: captions for 1 of 5 photos" in caplog.text
    assert "cats: captions for 1 of 3 photos" in caplog.text


WRONG = {
    "both forms": (
        {"concepts": [dog()], "subject_root": "dogs", "identifier": "sks"},
        "`subject_root` is of a single subject.*Set subject_root: null, identifier: null",
    ),
    "neither form": ({}, "`subject_root` is missing.*or a list of `concepts`"),
    "no class": ({"subject_root": "dogs"}, "`class_word` is missing"),
    "an empty list": ({"concepts": []}, "The list is empty.*concepts"),
    "one identifier twice": (
        {"concepts": [dog(), cat(), cat(identifier="SKS")]},
        r'"sks" is the identifier of 2 concepts \(concepts.2.identifier\)',
    ),
    "one name twice": ({"concepts": [dog(name="A"), cat(name="A")]}, '"A" is the name of 2 concepts'),
    "a name that is another's words": ({"concepts": [dog(), cat(name="sks dog")]}, '"sks dog" is the name'),
    "no folder": ({"concepts": [dog(), cat("absent")]}, "no such folder.*absent"),
    "an empty class": ({"concepts": [dog(), cat(class_word="")]}, r"empty.*concepts.1.class_word"),
    "an empty identifier": ({"concepts": [dog(), cat(identifier=" ")]}, r"empty.*concepts.1.identifier"),
    "weight 0": ({"concepts": [dog(), cat(weight=0)]}, r"The weight is 0.*concepts.1.weight"),
    "a negative weight": ({"concepts": [dog(), cat(weight=-1)]}, r"The weight is -1"),
    "an identifier in another prompt": (
        {"concepts": [dog(), cat(subject_prompt="sks zwx cat")]},
        r'"sks" of sks dog is in "sks zwx cat" of zwx cat \(concepts.1.subject_prompt\)',
    ),
    "an identifier that is another's class": (
        {"concepts": [dog(), cat(identifier="dog")]},
        r'"dog" of dog cat is in "a photo of sks dog"',
    ),
    "no identifier in its prompt": (
        {"concepts": [dog(), cat(subject_prompt="a {class_word}")]},
        r'"zwx" is missing.*concepts.1.subject_prompt',
    ),
    "the class of a style": (
        {
            "concepts": [
                ConceptConfig(root="style", identifier="qpv", class_word=None, subject_prompt="{class_word}")
            ]
        },
        "no value for {class_word}",
    ),
    "prior items of styles alone": (
        {
            "concepts": [ConceptConfig(root="style", identifier="qpv", class_word=None)],
            "prior_batch_size": 2,
        },
        "There are no images for prior items",
    ),
    "two folders of one class": (
        {"concepts": [dog(prior_root="class"), dog("rex", identifier="qpv", prior_root="cats")]},
        "two folders of prior images, class and cats",
    ),
    "prior images of a style without their prompt": (
        {
            "concepts": [
                dog(),
                ConceptConfig(root="style", identifier="qpv", class_word=None, prior_root="class"),
            ]
        },
        r"no use for prior images \(concepts\.1\.prior_root\)",
    ),
    "photos that are prior images": ({"concepts": [dog(prior_root="dogs")]}, "same folder"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_end_well_is_refused_at_once(folders: Path, what: str):
    params, message = WRONG[what]
    with pytest.raises(UserError, match=message):
        DreamBoothDataModule(**{"size": SIZE, "num_priors": 4, **params}).check()


def node(concepts: object) -> Node:
    return {
        "target": "ldm.data.dreambooth.DreamBoothDataModule",
        "params": {"size": SIZE, "num_priors": 0, "concepts": concepts},
    }


def test_a_config_lists_them(folders: Path):
    params = {"root": "dogs", "identifier": "sks", "class_word": "dog"}
    style = {"root": "style", "identifier": "qpv", "class_word": None, "weight": 2}
    check({"data": node([params, style])}, {"data": Node})
    concepts = instantiate(node([params, style])).concepts
    assert [(c.name, c.weight, c.prior_prompt) for c in concepts] == [
        ("sks dog", 1, "a photo of a dog"),
        ("qpv", 2, None),
    ]
    for wrong, message in (
        (
            [params, {"root": "x", "identifier": "q"}],
            r"needs `class_word` \(data.params.concepts.1.class_word\)",
        ),
        ([{**params, "wieght": 2}], r"Did you mean `weight`"),
        ([{**params, "weight": 0}], r"more than 0"),
        ([{**params, "weight": "2"}], r"'2' \(str\) should be float"),
        (["dogs"], r"'dogs' is not a mapping of the parameters of ConceptConfig"),
        (params, r"should be Sequence of a mapping of the keys of ConceptConfig"),
    ):
        with pytest.raises(UserError, match=message):
            check({"data": node(wrong)}, {"data": Node})
