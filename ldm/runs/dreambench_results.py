"""DreamBench's runs and tables: what `dreambench.py` does."""

import shlex
import sys
from argparse import Namespace
from pathlib import Path

import torch

from ldm.contact_sheet import contact_sheet
from ldm.data.images import ImageFiles, fit_image, list_images
from ldm.errors import UserError
from ldm.evaluation.dreambench import BenchMetrics, read_dataset
from ldm.evaluation.features import CLIP, DINO, DINOV2
from ldm.evaluation.masc import SIGLIP2, MaskedConsistency
from ldm.reports.dreambench_page import NAMES, dreambench_csv, dreambench_page, measured, table_of
from ldm.runs.dreambench import MASC, DreamBench, left, not_the_protocol, work
from ldm.runs.grid import run_in_processes, write_text

NETWORKS = {"dino": DINO, "dinov2": DINOV2, "clip": CLIP}
SHOWN, CELL = 8, 128  # images of a subject on the page, pixels a side


def bench_of(options: Namespace) -> DreamBench:
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
    networks = {name: getattr(options, name) or NETWORKS[name] for name in NETWORKS}
    if options.masc is not None:
        networks[MASC] = options.masc or SIGLIP2
    how = {"name": name, "title": f"DreamBench: {name}", "base": files, "set": overrides}
    return DreamBench(
        **how,
        subjects=subjects,
        seeds=[options.seed],
        of=of,
        images=options.images,
        pictures=options.pictures,
        networks=networks,
    )


def publish(bench: DreamBench, command: str) -> list[Path]:
    """Prints the table; writes it with every subject, as a page and as CSV."""
    rows = [bench.row(name) for name in bench.of]
    names = [NAMES[metric] for metric in measured(rows)]
    for name, cells in [("", names), *table_of(rows)]:
        print((f"{name:36}" + "".join(f"{cell:26}" for cell in cells)).rstrip())
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


def run_dreambench(options: Namespace) -> None:
    """Runs what is left of the benchmark; prints and writes its tables if all is there."""
    bench = bench_of(options)
    bench.check_all()
    if options.processes > 1 and not options.worker:
        run_in_processes(sys.argv[0], sys.argv[1:], options.processes)
    else:
        names = {name: bench.networks[name] for name in NETWORKS}
        device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        masked = MaskedConsistency(bench.networks[MASC], device=device) if bench.masked else None
        work(bench, BenchMetrics(**names, device=device), masked)
    if options.worker:
        return
    if missing := left(bench):
        print(f"{len(missing)} of {len(bench.of)} subjects are still to be done: {', '.join(missing)}")
    else:
        print(*publish(bench, shlex.join(["dreambench.py", *sys.argv[1:]])), sep="\n")
