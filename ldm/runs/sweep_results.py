"""A study from its command line: its runs, then its table, plots, page and pictures."""

import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

from ldm.contact_sheet import contact_sheet, save_image
from ldm.data.images import load_image
from ldm.evaluation.statistics import Row
from ldm.reports import sweep_page, sweep_plots
from ldm.runs.extracted import extract_all, metrics_of_loras, missing_ranks
from ldm.runs.grid import Job, metrics_of, run_in_processes, time_left, work, write_text
from ldm.runs.prompts import sample_rows
from ldm.runs.sweep import Sweep, baselines_of, jobs_of, read_sweep
from ldm.runs.sweep_rows import rows_of
from ldm.targets import allow

SHOWN = 8  # images of a row of a study's contact sheet


def publish(sweep: Sweep, jobs: Sequence[Job], folder: Path) -> list[Path]:
    """Writes the CSV, the plots and the page of a study whose runs are all finished."""
    grouped: dict[str, list[tuple[Row, float]]] = {}
    for job, metrics in zip(jobs, map(metrics_of, jobs), strict=True):
        for row in rows_of(sweep, job, {**metrics, "extracted": metrics_of_loras(sweep, job)}):
            grouped.setdefault(row["variant"], []).append((row, metrics["seconds"]["training"]))
    rows = [row for group in grouped.values() for row, _ in group]
    seconds = {name: mean(spent for _, spent in group) for name, group in grouped.items()}
    folder.mkdir(parents=True, exist_ok=True)
    sheet = save_pictures(sweep, jobs, folder)
    texts = texts_of(sweep, rows, seconds, pictures=[path.name for path in sheet])
    return [*(write_text(folder / name, text) for name, text in texts.items()), *sheet]


def texts_of(
    sweep: Sweep, rows: Sequence[Row], seconds: Mapping[str, float], *, pictures: Sequence[str] = ()
) -> dict[str, str]:
    """The files of a study by name: its CSV, its page, its plots.

    rows: as in the CSV. seconds: variant -> mean of its trainings. pictures: files of contact sheets.
    """
    plots = {f"{sweep.name}.svg": sweep_plots.panels(rows, sweep.metrics)}
    shown = {f"{sweep.name}.svg": sweep_plots.panels_label(rows, sweep.metrics)}
    if sweep.frontier:
        plots[f"{sweep.name}-frontier.svg"] = sweep_plots.frontier(rows, *sweep.frontier)
        shown[f"{sweep.name}-frontier.svg"] = sweep_plots.frontier_label(*sweep.frontier)
    page = sweep_page.page(
        sweep.name,
        title=sweep.title,
        claim=sweep.claim,
        finding=sweep.finding,
        command=f"python scripts/study.py --base configs/studies/{sweep.name}.yaml",
        made_at=sweep.made_at,
        read_at=sweep.at,
        rows=rows,
        metrics=sweep.metrics,
        seconds=seconds,
        baselines=baselines_of(sweep, list(seconds)),
        pictures=shown | dict.fromkeys(pictures, f"Samples of {sweep.pictures}, a row for each variant"),
    )
    return {f"{sweep.name}.csv": sweep_page.to_csv(rows), f"{sweep.name}.md": page, **plots}


def save_pictures(sweep: Sweep, jobs: Sequence[Job], folder: Path) -> list[Path]:
    """A contact sheet of the samples of one prompt: for each subject the base's, then each variant's.

    Of several subjects in one run, each one's prompt has rows of its own.
    """
    if not sweep.pictures:
        return []
    rows: dict[str, list[Path]] = {}
    for job in sorted(jobs, key=lambda job: list(sweep.subjects).index(job.subject)):
        if job.seed == sweep.seeds[0]:
            numbers = sample_rows(job.config, sweep.pictures)
            for prompt, number in numbers.items():
                name = job.subject if len(numbers) == 1 else f"{job.subject}, {prompt}"
                for made, place in (("base", "samples/before"), (job.variant, "samples")):
                    rows[f"{name}: {made}"] = sorted((job.folder / place).glob(f"{number:02d}-*.png"))
    shown = [(title, [load_image(path) for path in paths[:SHOWN]]) for title, paths in rows.items()]
    path = folder / f"{sweep.name}-samples.png"
    return [save_image(path, contact_sheet(shown, cell=64), {"prompt": sweep.pictures})]


def run_study(options: Namespace) -> None:
    """Does what is left of the studies that the options name, and publishes the finished ones."""
    allow(*options.allow)
    sweeps = [read_sweep(path) for path in options.base]
    jobs = {sweep.name: jobs_of(sweep) for sweep in sweeps}
    every = [job for of_sweep in jobs.values() for job in of_sweep]
    if options.processes > 1 and not options.worker:
        run_in_processes(sys.argv[0], sys.argv[1:], options.processes)
    else:
        for sweep in sweeps:
            work(sweep, jobs[sweep.name], left=lambda: time_left(every, processes=options.processes))
            extract_all(sweep, jobs[sweep.name])
    for sweep in () if options.worker else sweeps:
        missing = sum(metrics_of(job) is None or bool(missing_ranks(sweep, job)) for job in jobs[sweep.name])
        if missing:
            print(f"{sweep.name}: {missing} of {len(jobs[sweep.name])} runs are still to be done")
        else:
            print(*publish(sweep, jobs[sweep.name], options.out), sep="\n")
