"""Measure a model on the storybook: subject, prompt, class drift and diversity, read by the judge.

    python scripts/evaluate.py                                  the newest run under logs/
    python scripts/evaluate.py --model FILE --data_root PHOTOS --class_word dog
    python scripts/evaluate.py --model FILE --captions 512      a base: does it draw what captions say?

The untouched base is measured beside it. Writes metrics.json and prints a table.
"""

import argparse
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed
from ldm.config import load_config, to_plain
from ldm.data.dreambooth import DreamBoothDataModule
from ldm.data.images import load_image
from ldm.errors import UserError
from ldm.evaluation.storybook import StorybookEvaluation
from ldm.pipeline import Text2Image, find_model
from ldm.training.run import find_file, write_json

BASE = "ldm/storybook/assets/base.safetensors"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--model", type=Path, help="model file or run folder (the newest run under logs/)")
    add("--base", help="the untouched base (the run's own, else the storybook's)")
    add("--data_root", help="photos of the subject (the run's own)")
    add("--class_word", help="what the subject is (the run's own)")
    add("--identifier", help="the rare word that names it (the run's own, else sks)")
    add("--captions", type=int, metavar="N", help="examine a base on N captions of unseen scenes instead")
    add("--seeds", type=int, default=16, help="pictures of the subject in each of the 8 contexts (16)")
    add("--class_samples", type=int, default=128, help="pictures of the class (128)")
    add("--steps", type=int, default=25, help="sampling steps (25)")
    add("--guidance_scale", type=float, default=4.0, help="weight of the prompt (4)")
    add("--out", type=Path, help="folder of metrics.json (`evaluation` in the run's folder)")
    return parser.parse_args()


def photos_of(options: argparse.Namespace, run: Path) -> tuple[DreamBoothDataModule, str]:
    """The run's photos and prompts, or those the options name -> and the base they were taught to."""
    config = to_plain(load_config([run / "config.yaml"])) if (run / "config.yaml").exists() else {}
    params = config.get("data", {}).get("params", {})
    given = {"subject_root": options.data_root, "class_word": options.class_word}
    given["identifier"] = options.identifier
    params |= {name: value for name, value in given.items() if value is not None}
    lacking = [flag for flag in ("subject_root", "class_word") if flag not in params]
    if lacking:
        remedy = "Give --data_root and --class_word, or a folder of a run."
        raise UserError(f"Nothing says the {lacking[0]}", where=run, remedy=remedy)
    data = DreamBoothDataModule(**{"size": 64} | params)
    data.check()
    return data, options.base or config.get("base_checkpoint") or BASE


def compare(options: argparse.Namespace, evaluation: StorybookEvaluation, model: Path) -> Mapping[str, Any]:
    data, base = photos_of(options, model.parent)
    subject = evaluation.subject([load_image(photo.path) for photo in data.subject_photos])
    prompts = {"subject_prompt": data.subject_prompt, "class_prompt": data.prior_prompt}
    before, after = (
        evaluation.measure(Text2Image.from_file(path), subject=subject, **prompts)
        for path in (find_file(base), model)
    )
    return evaluation.summary(after, before, subject)


def table(figures: Mapping[str, Any]) -> str:
    """Figures in rows, with their interval, the base's and the ceiling where there are any."""
    rows = [("", "model", "95 %", "base", "photos")]
    for name, value in figures.items():
        if isinstance(value, float):
            low_high = figures.get("intervals", {}).get(name)
            beside = [figures.get(key, {}).get(name, "") for key in ("base", "ceiling")]
            interval = "{:.3f} to {:.3f}".format(*low_high) if low_high else ""
            rows.append((name, f"{value:.3f}", interval, *map(str, beside)))
    return "\n".join("{:18}{:>8}{:>18}{:>9}{:>9}".format(*row).rstrip() for row in rows)


def main(options: argparse.Namespace) -> None:
    given = find_file(BASE) if options.captions and options.model is None else options.model
    model = find_model(given)
    evaluation = StorybookEvaluation(
        seeds=options.seeds,
        class_samples=options.class_samples,
        steps=options.steps,
        guidance_scale=options.guidance_scale,
    )
    print(f"model: {model}")
    if options.captions:
        figures = evaluation.examine(Text2Image.from_file(model), samples=options.captions)
    else:
        figures = compare(options, evaluation, model)
    print(table(figures))
    is_run = model.with_name("config.yaml").exists()
    folder = options.out or (
        model.parent / "evaluation" if is_run else Path("logs") / f"evaluation-{model.stem}"
    )
    folder.mkdir(parents=True, exist_ok=True)
    print(write_json(folder / "metrics.json", figures))


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        main(parse())
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
