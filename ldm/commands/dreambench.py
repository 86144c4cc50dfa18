"""DreamBench in one command: subjects x 25 prompts x 4 images, measured as in Ruiz et al. 2023, Table 1.

    dreambench.py --root dataset --base configs/dreambooth-sd1.yaml base_checkpoint=MODEL
    dreambench.py --root dataset --pictures SAMPLES     of any tool: SAMPLES/dog/07-2.png

--root is the folder `dataset` of github.com/google/dreambooth. Any number of processes may run the same
command and share the subjects, also on several machines with a folder in common; what is killed goes on when
it is run again. Writes dreambench.html and dreambench.csv in logs/dreambench-NAME.
"""

from argparse import SUPPRESS, Namespace
from collections.abc import Sequence
from pathlib import Path

from ldm.commands.entry import parser_of, run


def parse(words: Sequence[str] | None = None) -> Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--root", type=Path, required=True, metavar="DATASET", help="folder with prompts_and_classes.txt")
    add("-b", "--base", nargs="+", default=[], metavar="YAML", help="configs of the runs, and key=value")
    add("--pictures", type=Path, help="a folder of images of another tool instead, SUBJECT/...")
    add("--name", help="of the folder in logs/ (that of the last config, or of the pictures)")
    add("--subjects", nargs="+", metavar="NAME", help="some of the subjects (all that are there)")
    add("--images", type=int, default=4, help="of each prompt (4)")
    add("--seed", type=int, default=23, help="of the runs (23)")
    add("--dino", help="folder of DINO's ViT-S/16 (facebook/dino-vits16 of the hub)")
    add("--dinov2", help="folder of DINOv2's ViT-B/14 (facebook/dinov2-base of the hub)")
    add("--clip", help="folder of CLIP's ViT-B/32 (openai/clip-vit-base-patch32 of the hub)")
    add(
        "--masc",
        nargs="?",
        const="",
        metavar="FOLDER",
        help="measure MaSC-CP too, by the photos' masks; folder of its SigLIP2 (that of the hub)",
    )
    add("--device", help="of these networks (cuda where it is, else cpu)")
    add("--processes", type=int, default=1, help="processes that share the subjects (1)")
    add("--worker", action="store_true", help=SUPPRESS)  # one of `processes`
    return parser.parse_args(words)


def main(options: Namespace) -> None:
    """Runs what is left, and writes the tables of what is finished."""
    from ldm.engine import signals
    from ldm.runs import console
    from ldm.runs.dreambench_results import run_dreambench

    signals.stop_at_once()
    console.speak()
    run_dreambench(options)


def command() -> int:
    return run(lambda: main(parse()))
