"""Evaluate a model against its untouched base, or folders of images of any tool.

    evaluate.py                                  the newest run under logs/
    evaluate.py --model FILE --data_root PHOTOS --class_word dog
    evaluate.py --pictures SAMPLES --class_pictures DOGS --data_root PHOTOS --class_word dog
    evaluate.py --model FILE --captions 512      a base, on full captions

On the storybook its judge reads the images; --metrics photos measures photographs by DINO, CLIP and LPIPS, as
the DreamBooth paper does; --metrics vlm asks a vision-language model of each image whether it is the subject
and whether it is the prompt, 0 to 4. Writes metrics.json and figures.svg, and prints a table.
"""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from ldm.commands.entry import one_of, parser_of, run


def parse(words: Sequence[str] | None = None) -> Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--model", type=Path, help="model file, run folder or hub id (the newest run under logs/)")
    add("--pictures", type=Path, help="a folder of images of the subject instead, of one size")
    add(
        "--class_pictures", type=Path, help="and one of images of the class, generated without the identifier"
    )
    add("--base", help="the untouched base (the run's own, else the storybook's)")
    add("--data_root", help="photos of the subject (the run's own)")
    add("--class_word", help="what the subject is (the run's own)")
    add("--identifier", help="the rare word that names it (the run's own, else sks)")
    metrics = one_of("ldm.runs.evaluate_model:METRICS")
    add(
        "--metrics",
        type=metrics,
        help="storybook: its judge; photos: published networks; vlm: a vision-language model (the run's own)",
    )
    add("--dino", help="folder of DINO's ViT-S/16 (facebook/dino-vits16 of the hub)")
    add("--clip", help="folder of CLIP's ViT-B/32 (openai/clip-vit-base-patch32 of the hub)")
    add("--vlm", help="folder or hub name of the judge of --metrics vlm (Gemma 3 12B or SmolVLM-500M)")
    add("--no_diversity", action="store_true", help="leave LPIPS out")
    add("--prompts", help="list of prompts for photos (dreambooth-object)")
    add("--captions", type=int, metavar="N", help="evaluate a base on N captions of unseen scenes instead")
    add("--seeds", type=int, help="samples of each prompt (storybook 16 in each of 8 places, photos 4)")
    add("--class_samples", type=int, help="samples of the class (storybook 128, photos 100)")
    add("--steps", type=int, help="sampling steps (the run's own)")
    add("--guidance_scale", type=float, help="guidance scale (the run's own)")
    add("--guidance_base", action="store_true", help="the base predicts for the empty prompt (the run's own)")
    add(
        "--allow",
        action="append",
        default=[],
        metavar="PACKAGE",
        help="let a config name your own code",
    )
    add("--device", help="where to compute (cuda, mps or cpu, the first that there is)")
    add("--out", type=Path, help="folder of metrics.json (the run's `evaluation`, else a new one in logs)")
    return parser.parse_args(words)


def main(options: Namespace) -> None:
    """Measures, prints a table, writes metrics.json and figures.svg."""
    from ldm.runs.evaluate_model import evaluate_model

    evaluate_model(options)


def command() -> int:
    return run(lambda: main(parse()))
