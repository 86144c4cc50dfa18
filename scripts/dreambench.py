"""DreamBench in one command: subjects x 25 prompts x 4 images, measured as in Ruiz et al. 2023, Table 1.

    python scripts/dreambench.py --root dataset --base configs/dreambooth-sd1.yaml --processes 2
    python scripts/dreambench.py --root dataset --pictures SAMPLES     of any tool: SAMPLES/dog/07-2.png

--root is the folder `dataset` of github.com/google/dreambooth. Any number of processes may run the same
command and share the subjects, also on several machines with a folder in common; what is killed goes on when
it is run again. Writes dreambench.html and dreambench.csv in logs/dreambench-NAME.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed
from ldm.contact_sheet import contact_sheet
from ldm.data.images import ImageFiles, fit_image, list_images
from ldm.engine import signals
from ldm.errors import UserError
from ldm.evaluation.dreambench import IMAGES, BenchMetrics, read_dataset
from ldm.evaluation.features import CLIP, DINO, DINOV2
from ldm.reports.dreambench_page import NAMES, dreambench_csv, dreambench_page, table_of
from ldm.runs.dreambench import DreamBench, left, not_the_protocol, work
from ldm.runs.grid import run_in_processes, write_text

SHOWN, CELL = 8, 128  # images of a subject on the page, pixels a side


def parse(words: Sequence[str]) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    add = parser.add_argument
    add("--root", type=Path, required=True, metavar="DATASET", help="folder with prompts_and_classes.txt")
    add("-b", "--base", nargs="+", default=[], metavar="YAML", help="configs of the runs, and key=value")
    add("--pictures", type=Path, help="a folder of images of another tool instead, SUBJECT/...")
    add("--name", help="of the folder in logs/ (that of the last config, or of the pictures)")
    add("--subjects", nargs="+", metavar="NAME", help="some of the subjects (all that are there)")
    add("--images", type=int, default=IMAGES, help="of each prompt (4)")
    add("--seed", type=int, default=23, help="of the runs (23)")
    add("--dino", default=DINO, help=f"folder of DINO's ViT-S/16 ({DINO} of the hub)")
    add("--dinov2", default=DINOV2, help=f"folder of DINOv2's ViT-B/14 ({DINOV2} of the hub)")
    add("--clip", default=CLIP, help=f"folder of CLIP's ViT-B/32 ({CLIP} of the hub)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of these networks")
    add("--processes", type=int, default=1, help="processes that share the subjects (1)")
    add("--worker", action="store_true", help=argparse.SUPPRESS)  # one of `processes`
    return parser.parse_args(words)


def bench_of(options: argparse.Namespace) -> DreamBench:
    """The benchmark that the options describe. Raises UserError for what cannot be run."""
    if bool(options.base) == bool(options.pictures) or options.images < 1:
        raise UserError(
            "There is nothing to measure", remedy="Give --base or --pictures, and --images from 1."
        )
    found = {subject.name: subject for subject in read_dataset(options.root)}
    for name in options.subjects or ():
        if name not in found:
            raise UserError(
                f"There is no subject {name}", where=options.root, remedy=f"It has {', '.join(found)}."
            )
    of = {name: found[name] for name in options.subjects or found}
    files, overrides = ([word for word in options.base if ("=" in word) == given] for given in (False, True))
    name = options.name or (Path(files[-1]).stem if files else options.pictures.resolve().name)
    subjects = {n: {"class_word": s.class_word, "photos": str(s.photos)} for n, s in of.items()}
    how = {"name": name, "title": f"DreamBench: {name}", "base": files, "set": overrides}
    return DreamBench(
        **how,
        subjects=subjects,
        seeds=[options.seed],
        of=of,
        images=options.images,
        pictures=options.pictures,
    )


def publish(bench: DreamBench, command: str) -> list[Path]:
    """Prints the table; writes it with every subject, as a page and as CSV."""
    rows, names = [bench.row(name) for name in bench.of], ["", *NAMES.values()]
    for line in [names, *([name, *cells] for name, cells in table_of(rows))]:
        print("{:36}{:26}{:26}{:26}{}".format(*line).rstrip())
    sheets = {}
    for name, subject in bench.of.items():
        photos = list(ImageFiles(list_images(subject.photos)[:SHOWN]))
        shown = [group[0] for group in list(bench.given(name).values())[:SHOWN]]
        small = [[fit_image(image, CELL) for image in group] for group in (photos, shown)]
        sheets[name] = contact_sheet(list(zip(("photos", "images"), small, strict=True)))
    page = dreambench_page(
        bench.title, command=command, rows=rows, notes=not_the_protocol(rows), sheets=sheets
    )
    csv = write_text(bench.folder / "dreambench.csv", dreambench_csv(rows))
    return [csv, write_text(bench.folder / "dreambench.html", page)]


def main(words: Sequence[str]) -> None:
    options = parse(words)
    bench = bench_of(options)
    bench.check_all()
    if options.processes > 1 and not options.worker:
        run_in_processes(__file__, words, options.processes)
    else:
        names = {name: getattr(options, name) for name in ("dino", "dinov2", "clip")}
        work(bench, BenchMetrics(**names, device=options.device))
    if options.worker:
        return
    if missing := left(bench):
        print(f"{len(missing)} of {len(bench.of)} subjects are still to be done: {', '.join(missing)}")
    else:
        print(*publish(bench, f"python scripts/dreambench.py {' '.join(words)}"), sep="\n")


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    signals.stop_at_once()
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
