"""Run a study: every variant of a config on every subject with every seed, then its table, plots and page.

    python scripts/study.py --base configs/studies/prior_preservation.yaml --processes 2
    python scripts/study.py --base configs/studies/*.yaml --part 1/3      on the first of three machines

Every config is checked before the first run. Finished runs are kept and found again, in other studies too;
interrupted ones are resumed. When all are there, writes studies/NAME.csv, .md and .svg.
"""

import argparse
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed
from ldm.config import save_config
from ldm.contact_sheet import contact_sheet, save_image
from ldm.data.images import load_image
from ldm.errors import UserError
from ldm.evaluation.statistics import Row
from ldm.files import atomic_write
from ldm.reports import sweep_page
from ldm.training.job import run_job
from ldm.training.schema import RunConfig
from ldm.training.sweep import Job, Sweep, baselines_of, jobs_of, read_sweep, rows_of, same_run, shard_jobs

SHOWN = 8  # images of a row of a study's contact sheet


def metrics_of(job: Job) -> dict | None:
    """Metrics of a finished run. Raises UserError if they are of another config."""
    path = job.folder / "metrics.json"
    if not path.exists():
        return None
    if RunConfig.read(job.folder / "config.yaml").container != job.config.container:
        what = "The study has changed since this run"
        raise UserError(what, where=job.folder, remedy="Remove the run's folder, or name the study anew.")
    return json.loads(path.read_text(encoding="utf-8"))


def find_identical_run(job: Job) -> Path | None:
    """The folder of an identical run that another study has finished."""
    folders = (path.parent for path in sorted(Path("logs").glob("study-*/*/metrics.json")))
    return next((f for f in folders if same_run(RunConfig.read(f / "config.yaml"), job.config)), None)


def work(sweep: Sweep, jobs: Sequence[Job]) -> None:
    torch.set_num_threads(sweep.threads)
    for number, job in enumerate(jobs, start=1):
        if metrics_of(job) is not None:
            continue
        print(f"{sweep.name}, run {number} of {len(jobs)}: {job.folder.name}", flush=True)
        identical = find_identical_run(job)
        if identical is not None:
            print(f"as in {identical}", flush=True)
            shutil.copytree(identical, job.folder, dirs_exist_ok=True)
            save_config(job.config.source, job.folder / "config.yaml")
        else:
            run_job(job.config, "auto")
            shutil.rmtree(job.folder / "checkpoints", ignore_errors=True)


def run_in_processes(path: str, processes: int) -> None:
    """Runs the jobs of a study in several processes."""
    command = [sys.executable, __file__, "--base", path, "--part"]
    shares = [subprocess.Popen([*command, f"{k}/{processes}"]) for k in range(1, processes + 1)]
    if any([share.wait() for share in shares]):
        raise UserError("A part of the study failed", where=path, remedy="See its message above.")


def publish(sweep: Sweep, jobs: Sequence[Job], folder: Path) -> list[Path]:
    """Writes the CSV, the plots and the page of a study whose runs are all finished."""
    grouped: dict[str, list[tuple[dict, float]]] = {}
    for job, metrics in zip(jobs, map(metrics_of, jobs), strict=True):
        for name, own in rows_of(job.variant, metrics).items():
            row = {"variant": name, "subject": job.subject, "seed": job.seed}
            row |= {metric: own[metric] for metric in sweep.metrics}
            grouped.setdefault(name, []).append((row, metrics["seconds"]["training"]))
    rows = [row for group in grouped.values() for row, _ in group]
    seconds = {name: mean(spent for _, spent in group) for name, group in grouped.items()}
    folder.mkdir(parents=True, exist_ok=True)
    sheet = save_pictures(sweep, jobs, folder)
    texts = texts_of(sweep, rows, seconds, pictures=[path.name for path in sheet])
    for name, text in texts.items():
        with atomic_write(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return [*(folder / name for name in texts), *sheet]


def texts_of(
    sweep: Sweep, rows: Sequence[Row], seconds: Mapping[str, float], *, pictures: Sequence[str] = ()
) -> dict[str, str]:
    """The files of a study by name: its CSV, its page, its plots.

    rows: as in the CSV. seconds: variant -> mean of its trainings. pictures: files of contact sheets.
    """
    plots = {f"{sweep.name}.svg": sweep_page.panels(rows, sweep.metrics)}
    shown = {f"{sweep.name}.svg": sweep_page.panels_label(rows, sweep.metrics)}
    if sweep.frontier:
        plots[f"{sweep.name}-frontier.svg"] = sweep_page.frontier(rows, *sweep.frontier)
        shown[f"{sweep.name}-frontier.svg"] = sweep_page.frontier_label(*sweep.frontier)
    page = sweep_page.page(
        sweep.name,
        title=sweep.title,
        claim=sweep.claim,
        finding=sweep.finding,
        command=f"python scripts/study.py --base configs/studies/{sweep.name}.yaml",
        made_at=sweep.made_at,
        rows=rows,
        metrics=sweep.metrics,
        seconds=seconds,
        baselines=baselines_of(sweep, list(seconds)),
        pictures=shown | dict.fromkeys(pictures, f"Samples of {sweep.pictures}, a row for each variant"),
    )
    return {f"{sweep.name}.csv": sweep_page.to_csv(rows), f"{sweep.name}.md": page, **plots}


def save_pictures(sweep: Sweep, jobs: Sequence[Job], folder: Path) -> list[Path]:
    """A contact sheet of the samples of one prompt: for each subject the base's, then each variant's."""
    if not sweep.pictures:
        return []
    rows: dict[str, list[Path]] = {}
    for job in sorted(jobs, key=lambda job: list(sweep.subjects).index(job.subject)):
        if job.seed == sweep.seeds[0]:
            files = f"{list(job.config.samples.prompts).index(sweep.pictures):02d}-*.png"
            rows[f"{job.subject}: base"] = sorted((job.folder / "samples/before").glob(files))
            rows[f"{job.subject}: {job.variant}"] = sorted((job.folder / "samples").glob(files))
    shown = [(title, [load_image(path) for path in paths[:SHOWN]]) for title, paths in rows.items()]
    path = folder / f"{sweep.name}-samples.png"
    return [save_image(path, contact_sheet(shown, cell=64), {"prompt": sweep.pictures})]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--base", nargs="+", required=True, metavar="YAML", help="studies")
    add("--processes", type=int, default=1, help="processes that share the runs (1)")
    add("--part", default="1/1", metavar="K/N", help="run this share alone")
    add("--out", type=Path, default=Path("studies"), help="folder of the results (studies)")
    return parser.parse_args()


def main(options: argparse.Namespace) -> None:
    sweeps = {path: read_sweep(path) for path in options.base}
    jobs = {path: jobs_of(sweep) for path, sweep in sweeps.items()}
    for path, sweep in sweeps.items():
        if options.processes > 1:
            run_in_processes(path, options.processes)
        else:
            work(sweep, shard_jobs(jobs[path], options.part))
        missing = sum(metrics_of(job) is None for job in jobs[path])
        if missing:
            print(f"{sweep.name}: {missing} of {len(jobs[path])} runs are still to be done")
        else:
            print(*publish(sweep, jobs[path], options.out), sep="\n")


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        main(parse())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
