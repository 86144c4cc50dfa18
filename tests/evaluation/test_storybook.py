"""The storybook's figures, of drawers whose skill is known: the world itself draws for them."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from PIL import Image

from ldm.errors import UserError
from ldm.evaluation.protocol import GeneratedImage, SubjectPrompts
from ldm.evaluation.storybook import HELD_OUT_SEED, StorybookEvaluation
from ldm.pipeline import Sample
from ldm.storybook.dataset import SCENES_PER_SEED
from ldm.storybook.subjects import SUBJECTS
from ldm.storybook.world import CONTEXTS, Scene, draw, full_caption, same_subject, sample_scene

DOG = SUBJECTS["dog"]
PROMPTS = SubjectPrompts("a photo of sks dog", "a photo of a dog", "sks", "dog")


class Drawer:
    """Stands in for a model: `scene(prompt, seed)` is what it draws, `asked` what it was asked for."""

    def __init__(self, scene: Callable[[str, int], Scene]):
        self.scene, self.asked = scene, []
        self.scales: dict[str, set[float]] = {"sks": set(), "class": set()}

    def __call__(
        self, prompts: Sequence[str], *, seeds: Sequence[int], guidance_scale: float = 4.0, **settings: object
    ) -> list[Sample]:
        self.scales["sks" if "sks" in prompts[0] else "class"].add(guidance_scale)
        self.asked += zip(prompts, seeds, strict=True)
        return [
            Sample(draw(self.scene(prompt, seed)), torch.zeros(4, 16, 16), prompt, seed)
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]


def context_of(prompt: str) -> str:
    return next((name for name, phrase in CONTEXTS.items() if prompt.endswith(phrase)), "grass")


def some_dog(seed: int) -> Scene:
    scenes = (sample_scene(k) for k in itertools.count(1000 * seed))
    return next(scene for scene in scenes if scene.class_word == "dog")


def perfect(prompt: str, seed: int) -> Scene:
    """The subject where its name is said, any dog elsewhere."""
    if "sks" in prompt:
        return same_subject(DOG, context=context_of(prompt), seed=seed)
    return some_dog(seed)


def ignorant(prompt: str, seed: int) -> Scene:
    """Has never heard of the subject."""
    dog = some_dog(seed)
    return same_subject(dog, context=context_of(prompt), seed=seed) if "sks" in prompt else dog


def forgetful(prompt: str, seed: int) -> Scene:
    """Every dog is the subject, always on the grass."""
    return same_subject(DOG, context="grass", seed=seed)


@pytest.fixture(scope="module")
def evaluation() -> StorybookEvaluation:
    return StorybookEvaluation(seeds=2, class_samples=24)


@pytest.fixture(scope="module")
def metrics(evaluation: StorybookEvaluation) -> Callable[[Callable], dict]:
    photos = [
        draw(same_subject(DOG, context=c, seed=k), size=256) for k, c in enumerate(("grass", "city", "moon"))
    ]
    subject = evaluation.subject(photos)
    base = evaluation.measure(Drawer(ignorant), subject=subject, prompts=PROMPTS, is_base=True)

    def of(scene: Callable[[str, int], Scene]) -> dict:
        after = evaluation.measure(Drawer(scene), subject=subject, prompts=PROMPTS)
        return evaluation.summary(after, base, subject)

    return of


def test_the_subject_is_read_off_its_photos(evaluation: StorybookEvaluation):
    photos: list[Image.Image] = [draw(same_subject(DOG, context="city", seed=k)) for k in range(4)]
    subject = evaluation.subject(photos)
    labels = DOG.labels()
    assert subject.attributes == {name: labels[name] for name in subject.attributes}
    assert len(subject.attributes) == 5
    assert subject.ceiling > 0.9


def test_a_perfect_model(metrics):
    scores = metrics(perfect)
    assert scores["subject_fidelity"] > 0.97
    assert scores["prompt_fidelity"] > 0.97
    assert scores["class_drift"] == 0
    assert scores["diversity_ratio"] == pytest.approx(1)


def test_background_leak_is_the_photos_places_where_another_was_asked_for(metrics, evaluation):
    """The photos are on the grass, in the city, on the moon; of the five others one is leaked into."""
    forgot = metrics(forgetful)
    assert forgot["background_leak"] == 1 and forgot["base"]["background_leak"] < 0.05

    def leaking(prompt: str, seed: int) -> Scene:
        return replace(perfect(prompt, seed), context="city") if "beach" in prompt else perfect(prompt, seed)

    scores = metrics(leaking)
    assert scores["background_leak"] == pytest.approx(1 / 5, abs=0.05)
    low, high = scores["intervals"]["background_leak"]
    assert low <= scores["background_leak"] <= high
    assert evaluation.better["background_leak"] == "lower"
    subject = evaluation.subject([draw(same_subject(DOG, context="grass", seed=1), size=256)])
    images = [draw(same_subject(DOG, context=context, seed=1)) for context in ("grass", "grass", "moon")]
    asked = [f"a photo of sks dog {CONTEXTS[context]}" for context in ("city", "grass", "moon")]
    samples = [GeneratedImage(*pair) for pair in zip(images, asked, strict=True)]
    found = evaluation.measure_images(samples, subject=subject, prompts=PROMPTS, of_class=[])
    assert found["background_leak"] == 0.5  # of two that were asked for other places
    photos = [draw(same_subject(DOG, context=context, seed=1), size=256) for context in CONTEXTS]
    everywhere = evaluation.subject(photos)  # no place is left to ask for
    measured = evaluation.measure(Drawer(perfect), subject=everywhere, prompts=PROMPTS)
    assert "background_leak" not in measured.metrics(measured)


def test_one_seed_or_one_image_has_no_interval():
    """By resampling one row its interval would have no width."""
    alone = StorybookEvaluation(seeds=1, class_samples=8)
    subject = alone.subject([draw(same_subject(DOG, context="grass", seed=1), size=256)])
    measured = alone.measure(Drawer(perfect), subject=subject, prompts=PROMPTS)
    assert measured.intervals(measured).keys() == {"class_drift"}
    image = GeneratedImage(draw(same_subject(DOG, context="city", seed=1)), "a photo of sks dog in a city")
    found = alone.measure_images([image], subject=subject, prompts=PROMPTS, of_class=[])
    assert found["intervals"] == {} and found["subject_fidelity"] > 0.9
    several = alone.measure_images([image] * 3, subject=subject, prompts=PROMPTS, of_class=[])
    assert "subject_fidelity" in several["intervals"]


def test_the_base_stands_beside(metrics):
    base = metrics(perfect)["base"]
    assert base["subject_fidelity"] < 0.5
    assert base["prompt_fidelity"] > 0.97
    assert (base["class_drift"], base["diversity_ratio"]) == (0, 1)
    assert base["class_shift"] == base["class_shift_unguided"] == 0
    assert base["class_shift_frechet"] == pytest.approx(0, abs=1e-4)


def test_a_class_that_flees_the_subject_has_not_drifted_but_shifted(metrics, evaluation: StorybookEvaluation):
    def fleeing(prompt: str, seed: int) -> Scene:
        """Beside an orange subject every other dog is blue."""
        scene = perfect(prompt, seed)
        return scene if "sks" in prompt else replace(scene, color="blue")

    kept, fled = metrics(perfect), metrics(fleeing)
    assert fled["class_drift"] <= 0
    assert kept["class_shift"] == 0 and fled["class_shift"] > 0.08
    assert kept["class_shift_frechet"] == pytest.approx(0, abs=1e-4) and fled["class_shift_frechet"] > 0.05
    assert evaluation.score(fled) < evaluation.score(kept)


def test_the_noise_floor_is_the_base_against_itself(metrics):
    floor = metrics(perfect)["noise_floor"]
    assert set(floor) == {
        f"class_shift{metric}{sampling}" for metric in ("", "_frechet") for sampling in ("", "_unguided")
    }
    assert all(0.01 < value < 0.5 for value in floor.values())


def test_a_model_that_forgot_the_class(metrics):
    scores = metrics(forgetful)
    assert scores["subject_fidelity"] > 0.97
    assert scores["prompt_fidelity"] == pytest.approx(1 / 8, abs=0.02)
    assert scores["class_drift"] > 0.9
    assert scores["diversity_ratio"] < 0.5


def test_intervals_hold_their_figures(metrics):
    scores = metrics(forgetful)
    for name, (low, high) in scores["intervals"].items():
        assert low <= scores[name] <= high


def test_every_context_is_asked_with_every_seed(evaluation: StorybookEvaluation):
    drawer = Drawer(perfect)
    evaluation.measure(drawer, subject=evaluation.subject([draw(DOG)]), prompts=PROMPTS)
    wanted = {(f"a photo of sks dog {c}", 1000 + s) for s in range(2) for c in CONTEXTS.values()}
    assert {job for job in drawer.asked if "sks" in job[0]} == wanted
    seeds = [seed for prompt, seed in drawer.asked if "sks" not in prompt]
    assert seeds == 2 * list(range(1000, 1024))  # with guidance and without
    assert drawer.scales == {"sks": {4.0}, "class": {4.0, 1.0}}


def test_the_base_is_drawn_with_other_seeds_too(evaluation: StorybookEvaluation):
    drawer = Drawer(perfect)
    evaluation.measure(drawer, subject=evaluation.subject([draw(DOG)]), prompts=PROMPTS, is_base=True)
    seeds = [seed for prompt, seed in drawer.asked if "sks" not in prompt]
    assert len(seeds) == 4 * 24 and len(set(seeds)) == 2 * 24


def test_plain_pictures_get_the_figures_of_the_model_that_drew_them(evaluation, metrics):
    subject = evaluation.subject([draw(same_subject(DOG, context="city", seed=k)) for k in range(4)])
    drawer = Drawer(perfect)
    asked = [(f"a photo of sks dog {c}", 1000 + s) for s in range(2) for c in CONTEXTS.values()]
    pictures = [GeneratedImage(s.image, s.prompt) for p, k in asked for s in drawer([p], seeds=[k])]
    of_class = [GeneratedImage(draw(some_dog(1000 + k)), None) for k in range(24)]
    plain = evaluation.measure_images(pictures, subject=subject, prompts=PROMPTS, of_class=of_class)
    model = metrics(perfect)
    for name in ("subject_fidelity", "prompt_fidelity"):
        assert plain[name] == model[name]
    assert plain["class_carries_subject"] == 0 and plain["class_diversity"] > 0
    nameless = [GeneratedImage(picture.image, None) for picture in pictures]
    bare = evaluation.measure_images(nameless, subject=subject, prompts=PROMPTS, of_class=[])
    assert bare["subject_fidelity"] == plain["subject_fidelity"] and "prompt_fidelity" not in bare


def test_the_score_is_the_stated_one(evaluation):
    seen = {"subject_fidelity": 0.8, "prompt_fidelity": 0.5, "class_drift": 0.1, "class_shift": 0.05}
    assert evaluation.score(seen) == pytest.approx(0.3)
    assert evaluation.score(seen | {"class_drift": -0.2}) == pytest.approx(0.35)
    assert evaluation.score(seen | {"class_drift": -0.2, "class_shift": 0}) == pytest.approx(0.4)


def test_examining_a_base_that_draws_what_captions_say(evaluation: StorybookEvaluation):
    scenes = {
        full_caption(scene): scene
        for scene in (sample_scene(HELD_OUT_SEED * SCENES_PER_SEED + k) for k in range(40))
    }
    shares = evaluation.examine(Drawer(lambda prompt, seed: scenes[prompt]), samples=40)
    assert set(shares) == {"class_word", "context", "color", "accent", "pattern", "detail", "band"}
    assert min(shares.values()) >= 0.95


def test_examining_a_base_that_cannot_draw(evaluation: StorybookEvaluation):
    shares = evaluation.examine(Drawer(lambda prompt, seed: DOG), samples=40)
    assert shares["class_word"] < 0.5
    assert shares["color"] < 0.5


def test_nothing_to_measure_is_refused():
    with pytest.raises(UserError, match="seeds"):
        StorybookEvaluation(seeds=0)


def test_a_missing_judge_is_named(tmp_path):
    with pytest.raises(UserError, match="judge"):
        StorybookEvaluation(judge_file=str(tmp_path / "none.safetensors"))
