"""Ready subjects of the storybook: folders of photos of one individual, as a user would bring them.

Made by `python -m ldm.storybook.subjects FOLDER`; all photos of one are shown in places of their own.
"""

import sys
from pathlib import Path

from ldm.storybook.world import CONTEXTS, Scene, draw, same_subject

SUBJECTS = {
    "dog": Scene("dog", "orange", "white", "spotted", "soft", "green", "grass", seed=900_001),
    "car": Scene("car", "blue", "yellow", "striped", "round", "red", "city", seed=900_101),
    "backpack": Scene("backpack", "purple", "green", "spotted", "pointed", "yellow", "forest", seed=900_201),
}
PHOTOS, PIXELS = 5, 256


def write_subject(folder: Path, subject: Scene, *, photos: int = PHOTOS) -> list[Path]:
    """Draws the individual in `photos` places, one PNG each -> their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    places = tuple(CONTEXTS)
    first = places.index(subject.context)
    paths = []
    for i in range(photos):
        scene = same_subject(subject, context=places[(first + 3 * i) % len(places)], seed=subject.seed + i)
        paths.append(folder / f"{i:02d}.png")
        draw(scene, size=PIXELS).save(paths[-1])
    return paths


if __name__ == "__main__":
    for name, subject in SUBJECTS.items():
        write_subject(Path(sys.argv[1]) / name, subject)
