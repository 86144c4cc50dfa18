"""A search from its command line: its trials, then its page, table and best configs."""

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf
from PIL import Image

from ldm.contact_sheet import contact_sheet
from ldm.data.images import load_image
from ldm.reports import search_page
from ldm.runs.grid import run_in_processes, slug, write_text
from ldm.runs.search import Search, check_search, overrides_of
from ldm.runs.trials import Trials, Worker
from ldm.targets import allow

SHOWN = 8  # images of a run on the page


def publish(trials: Trials, command: str) -> list[Path]:
    """Writes the page, the table and the configs of the best settings."""
    search, results = trials.search, trials.results()
    best = {
        number: f"{'best' if len(search.metrics) == 1 else 'front'}-{number:04d}.yaml"
        for number in trials.best()
    }
    written = []
    for old in [*search.folder.glob("best-*.yaml"), *search.folder.glob("front-*.yaml")]:
        old.unlink(missing_ok=True)  # two processes may end at once
    for result in results:
        if result.number in best:
            path = search.folder / best[result.number]
            written.append(write_text(path, config_of(search, result)))
    pictures = {result.number: sheet for result in results if (sheet := sheet_of(search, result)) is not None}
    page = search_page.page(
        search.title,
        command=command,
        metrics=search.metrics,
        results=results,
        best=best,
        importances=trials.importances(),
        pictures=pictures,
    )
    table = search_page.to_csv(results, search.metrics)
    return [
        *written,
        write_text(search.folder / "trials.csv", table),
        write_text(search.folder / "search.html", page),
    ]


def config_of(search: Search, result: search_page.Result) -> str:
    """The whole config of a trial's first run, by another name."""
    words = overrides_of(result.settings)
    config = search.first_job(search_page.trial_name(result.number), words).config.source
    config["name"] = f"{search.name}-{result.number:04d}"
    lines = [f"# Trial {result.number} of the search {search.name}", *(f"# {word}" for word in words)]
    return "\n".join([*lines, OmegaConf.to_yaml(config)])


def sheet_of(search: Search, result: search_page.Result) -> Image.Image | None:
    """Samples of one prompt, a row for each run of a trial; of a run that ended early its last preview."""
    rows = []
    for subject, numbers in search.picture_rows.items():
        for seed in search.seeds:
            run = f"{slug(search_page.trial_name(result.number))}--{slug(subject)}--{seed}"
            folder, title = search.folder / run / "samples", f"{subject}, seed {seed}"
            found = {}
            for prompt, number in numbers.items():
                name = title if len(numbers) == 1 else f"{title}, {prompt}"
                found[name] = sorted(folder.glob(f"{number:02d}-*.png"))[:SHOWN]
            if not any(found.values()):
                found = {title: sorted(folder.glob("step-*.png"))[-1:]}
            rows += [(name, [load_image(path) for path in paths]) for name, paths in found.items() if paths]
    return contact_sheet(rows, cell=64) if rows else None


def run_search(options: Namespace, words: Sequence[str]) -> None:
    """Does what is left of a search, and writes its page. words: the command line, for other processes."""
    allow(*options.allow)
    search = Search.read(options.search, base=options.base)
    if not (options.worker or options.page):
        check_search(search)
    trials = Trials(search, options.storage or search.folder / "trials.journal")
    if options.processes > 1 and not (options.worker or options.page):
        run_in_processes(sys.argv[0], words, options.processes)
    elif not options.page:
        Worker(trials, processes=options.processes)()
    if not options.worker:
        print(*publish(trials, f"python scripts/search.py {' '.join(words)}"), sep="\n")
