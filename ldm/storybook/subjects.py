"""Storybook subjects: folders of photos of one individual, each in another place.

The shipped ones are made by `python -m ldm.storybook.subjects FOLDER --masks`, a new one by
`python -m ldm.storybook.subjects FOLDER --class_word cat --seed 51`.
"""

import argparse
import io
from dataclasses import replace
from pathlib import Path

from PIL import Image

from ldm.files import atomic_write
from ldm.storybook.world import CLASSES, CONTEXTS, Scene, draw, draw_mask, same_subject, sample_scene

SUBJECTS = {
    "dog": Scene("dog", "orange", "white", "spotted", "soft", "green", "grass", seed=900_001),
    "car": Scene("car", "blue", "yellow", "striped", "round", "red", "city", seed=900_101),
    "backpack": Scene("backpack", "purple", "green", "spotted", "pointed", "yellow", "forest", seed=900_201),
}
PHOTOS, PIXELS = 5, 256
NEW_SUBJECTS = 910_000  # first scene number of new subjects, which no training uses


def write_subject(folder: Path, subject: Scene, *, photos: int = PHOTOS, masks: bool = False) -> list[Path]:
    """Writes `photos` PNG files of one individual in different places -> their paths.

    masks: each with its exact mask beside it, as `00.mask.png`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    places = tuple(CONTEXTS)
    first = places.index(subject.context)
    paths = []
    for i in range(photos):
        scene = same_subject(subject, context=places[(first + 3 * i) % len(places)], seed=subject.seed + i)
        paths.append(folder / f"{i:02d}.png")
        _write_png(paths[-1], draw(scene, size=PIXELS))
        if masks:
            _write_png(folder / f"{i:02d}.mask.png", draw_mask(scene, size=PIXELS))
    return paths


def _write_png(path: Path, image: Image.Image) -> None:
    """Writes a file, unless it is there already: another process may be reading the same photo."""
    png = io.BytesIO()
    image.save(png, format="PNG")
    if not path.exists() or path.read_bytes() != png.getvalue():
        with atomic_write(path) as temporary:
            temporary.write_bytes(png.getvalue())


def new_subject(class_word: str, *, seed: int) -> Scene:
    """A new individual of a class, determined by `seed`."""
    return replace(sample_scene(NEW_SUBJECTS + seed), class_word=class_word)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="gets the photos, or a folder for each shipped subject")
    parser.add_argument("--class_word", choices=CLASSES, help="draw a new subject of this class")
    parser.add_argument("--seed", type=int, default=1, help="which one (1)")
    parser.add_argument("--masks", action="store_true", help="write the photos' exact masks beside them")
    options = parser.parse_args(argv)
    if options.class_word:
        write_subject(options.folder, new_subject(options.class_word, seed=options.seed), masks=options.masks)
        return
    for name, subject in SUBJECTS.items():
        write_subject(options.folder / name, subject, masks=options.masks)


if __name__ == "__main__":
    main()
