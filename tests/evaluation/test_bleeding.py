"""Several subjects under one evaluation: means, and whose looks are drawn when another is asked for."""

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from ldm.data.concepts import Concept
from ldm.evaluation.bleeding import NEITHER, bleeding_of, matrix_of, mean_metrics
from ldm.evaluation.storybook import StorybookEvaluation
from ldm.evaluation.subjects import JudgedSubjects
from ldm.storybook.subjects import SUBJECTS
from ldm.storybook.world import CONTEXTS, Scene, draw, same_subject, sample_scene
from tests.evaluation.test_storybook import Drawer, context_of

DOG = SUBJECTS["dog"]  # orange and white, spotted, soft ears, green collar
CAT = Scene("cat", "blue", "black", "striped", "pointed", "red", "grass", seed=1)  # differs in all five


def readings(*pairs: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Pictures, each of two attributes."""
    return {name: torch.tensor([pair[k] for pair in pairs]) for k, name in enumerate(("color", "band"))}


WANTED = {"A": {"color": 1, "band": 2}, "B": {"color": 3, "band": 4}, "C": {"color": 1, "band": 5}}


def test_the_matrix_by_hand():
    asked = {
        "A": readings((1, 2), (1, 4), (3, 4), (0, 2)),
        "B": readings((3, 4), (3, 4), (3, 0), (1, 4)),
        "C": readings((1, 5), (1, 5), (1, 2), (1, 2)),
    }
    matrix = matrix_of(asked, {"dog": readings((1, 0), (3, 4), (0, 0), (0, 0))}, WANTED)
    # Own values 4 of 8, B's 3 of 8, C's band (its color is A's) 0 of 4, nobody's 1 of 8
    assert matrix["A"] == {"A": 0.5, "B": 0.375, "C": 0.0, NEITHER: 0.125}
    assert matrix["B"] == {"A": 0.125, "B": 0.75, "C": 0.125, NEITHER: 0.125}
    assert matrix["C"] == {"A": 0.5, "B": 0.0, "C": 0.75, NEITHER: 0.0}
    assert matrix["any dog"] == {"A": 0.125, "B": 0.25, "C": 0.125, NEITHER: 0.625}


def test_a_subject_may_be_called_as_its_class_is():
    asked = {"dog": readings((1, 2), (1, 2)), "B": readings((3, 4), (3, 4))}
    any_dog = readings((3, 0), (0, 0))
    matrix = matrix_of(asked, {"dog": any_dog}, {"dog": WANTED["A"], "B": WANTED["B"]})
    assert matrix["dog"] == {"dog": 1.0, "B": 0.0, NEITHER: 0.0}
    assert matrix["any dog"] == {"dog": 0.0, "B": 0.25, NEITHER: 0.75}


def test_two_that_differ_in_all_share_out_the_pictures():
    generator = torch.Generator().manual_seed(0)
    seen = {name: torch.randint(6, (50,), generator=generator) for name in ("color", "band")}
    two = {name: WANTED[name] for name in ("A", "B")}
    matrix = matrix_of({"A": seen, "B": seen}, {}, two)
    for row in matrix.values():
        assert sum(row.values()) == pytest.approx(1, abs=2e-4)


def test_bleeding_is_the_rise_over_the_base():
    trained = {"A": {"A": 0.9, "B": 0.3, "C": 0.1}, "B": {"A": 0.2, "B": 0.8}, "C": {"A": 0.0, "C": 1.0}}
    base = {"A": {"A": 0.1, "B": 0.1, "C": 0.2}, "B": {"A": 0.2, "B": 0.1}, "C": {"A": 0.1, "C": 0.1}}
    assert bleeding_of(trained, base, ["A", "B", "C"]) == {"A": 0.05, "B": 0.0, "C": -0.1}
    alike = matrix_of(
        {"A": readings((1, 2)), "B": readings((1, 2))}, {}, {"A": WANTED["A"], "B": WANTED["A"]}
    )
    assert bleeding_of(alike, alike, ["A", "B"]) == {}


def test_means_of_everything_that_is_a_number():
    one = {
        "x": 0.1,
        "base": {"x": 0.3},
        "intervals": {"x": (0.0, 0.2)},
        "sampling": {"steps": 4, "name": "a"},
    }
    other = {
        "x": 0.2,
        "base": {"x": 0.5},
        "intervals": {"x": (0.1, 0.4)},
        "sampling": {"steps": 4, "name": "a"},
    }
    assert mean_metrics([one, other | {"only": 1.0}]) == {
        "x": 0.15,
        "base": {"x": 0.4},
        "intervals": {"x": [0.05, 0.3]},
        "sampling": {"steps": 4, "name": "a"},
    }


def concept(identifier: str, class_word: str | None) -> Concept:
    words = {"identifier": identifier, "class_word": class_word}
    name = f"{identifier} {class_word}"
    prior = f"a photo of a {class_word}" if class_word else None
    return Concept(name, "", words, f"a photo of {name}", prior, None, Fraction(1))


def any_of(class_word: str, seed: int) -> Scene:
    return replace(sample_scene(seed), class_word=class_word)


def taught(prompt: str, seed: int, *, cat: Scene = CAT) -> Scene:
    """Both subjects by their names, anything of the class elsewhere."""
    for identifier, subject in (("sks", DOG), ("zwx", cat)):
        if identifier in prompt:
            return same_subject(subject, context=context_of(prompt), seed=seed)
    return any_of("dog" if "dog" in prompt else "cat", seed)


def untaught(prompt: str, seed: int) -> Scene:
    scene = any_of("dog" if "dog" in prompt else "cat", 77 * seed)
    return same_subject(scene, context=context_of(prompt), seed=seed)


def bled(prompt: str, seed: int) -> Scene:
    """The cat has got the dog's looks."""
    return taught(prompt, seed, cat=replace(DOG, class_word="cat"))


@pytest.fixture(scope="module")
def metrics() -> Callable[[Callable[[str, int], Scene]], dict]:
    evaluation = StorybookEvaluation(seeds=1, class_samples=8)
    photos = {
        f"{word} {scene.class_word}": [
            draw(same_subject(scene, context=c, seed=k), size=256)
            for k, c in enumerate(("grass", "city", "moon"))
        ]
        for word, scene in (("sks", DOG), ("zwx", CAT))
    }
    concepts = [concept("sks", "dog"), concept("zwx", "cat"), concept("qpv", None)]
    judged = JudgedSubjects(evaluation, concepts, photos)
    assert judged.subjects.keys() == photos.keys() and not judged.unfit  # a style is none of them
    base = judged.measure(Drawer(untaught), is_base=True)
    return lambda scene: judged.summary(judged.measure(Drawer(scene)), base)


def test_both_are_learnt_apart(metrics):
    found = metrics(taught)
    assert found["subject_fidelity"] > 0.95 and found["bleeding"] <= 0
    each = found["concepts"]
    assert each.keys() == {"sks dog", "zwx cat"}
    for key in ("subject_fidelity", "prompt_fidelity", "class_drift", "bleeding", "class_shift"):
        assert found[key] == pytest.approx(sum(own[key] for own in each.values()) / 2, abs=1e-4)
    matrix = found["bleeding_matrix"]["trained"]
    assert matrix.keys() == {"sks dog", "zwx cat", "any dog", "any cat"}
    assert matrix["sks dog"]["sks dog"] == each["sks dog"]["subject_fidelity"] > 0.95
    assert matrix["sks dog"]["zwx cat"] < 0.05
    assert matrix["any dog"][NEITHER] > 0.4


def test_a_subject_with_the_other_s_looks_has_bled(metrics):
    found = metrics(bled)["concepts"]
    assert found["zwx cat"]["bleeding"] > 0.5 and found["sks dog"]["bleeding"] <= 0
    assert found["zwx cat"]["subject_fidelity"] < 0.1


def test_one_subject_has_the_metrics_of_old(metrics):
    evaluation = StorybookEvaluation(seeds=1, class_samples=4)
    photos = {"sks dog": [draw(same_subject(DOG, context=c, seed=1)) for c in list(CONTEXTS)[:3]]}
    judged = JudgedSubjects(evaluation, [concept("sks", "dog")], photos)
    measured = judged.measure(Drawer(taught), is_base=True)
    one, subject = measured["sks dog"], judged.subjects["sks dog"]
    assert judged.summary(measured, measured) == evaluation.summary(one, one, subject)


def test_who_cannot_be_judged_is_left_out():
    evaluation = StorybookEvaluation(seeds=1, class_samples=2)
    photos = {name: [draw(DOG)] * 3 for name in ("sks dog", "zwx lamp")}
    judged = JudgedSubjects(evaluation, [concept("sks", "dog"), concept("zwx", "lamp")], photos)
    assert judged.subjects.keys() == {"sks dog"} and "lamp" in judged.unfit["zwx lamp"][0]
    measured = judged.measure(Drawer(taught), is_base=True)
    found = judged.summary(measured, measured)
    assert found["concepts"].keys() == {"sks dog"} and "bleeding" not in found
