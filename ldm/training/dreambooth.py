"""DreamBooth's run: prior images, pictures and figures of the base, training, and the same of the result."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from ldm.data.dreambooth import DreamBoothDataModule
from ldm.data.images import load_image
from ldm.data.priors import PriorSet
from ldm.data.prompts import fill
from ldm.errors import UserError
from ldm.evaluation.curves import read_curves
from ldm.evaluation.memo import ImageMemo
from ldm.evaluation.report import Measured, Report, Row, write_report
from ldm.pipeline import Text2Image
from ldm.training import ranks, run
from ldm.training.callbacks import AutoencoderAside, FirstStep, Previews, Speed
from ldm.training.device import peak_memory_mib
from ldm.training.latent_diffusion import LatentDiffusion
from ldm.training.measures import Measures, Measuring, best_of
from ldm.training.sampling import (
    PriorDrawing,
    SampleDrawing,
    base_denoiser,
    draw_priors,
    draw_samples,
    drawing_of,
    frozen,
    prior_set,
    text2image,
)
from ldm.training.score import Score, with_params

SHOWN_PRIORS = 32  # on the report's page


def check_prior_target(module: LatentDiffusion, data: DreamBoothDataModule) -> None:
    """Refuses to teach the empty prompt the subject: only the base says what it means on the photos."""
    if data.priors_show_subject and module.prior_target != "teacher":
        what = "Without prior images only the teacher knows what the empty prompt is to keep"
        remedy = "Set model.params.prior_target=teacher, or raise data.params.num_priors."
        raise UserError(what, where="prior_caption_dropout", remedy=remedy)


class DreamBoothRun:
    """Teaches networks that hold the base's weights one subject; called once, it does all of the run.

    Making it finds what does not fit together. plain: the whole config. base_hash: names the base.
    """

    def __init__(
        self,
        module: LatentDiffusion,
        data: DreamBoothDataModule,
        plain: Mapping[str, Any],
        folder: Path,
        *,
        base_hash: str,
    ):
        self.module, self.data, self.plain, self.folder = module, data, plain, folder
        self.base_hash, self.watch = base_hash, run.Stopwatch()
        self.draw = text2image(module, size=data.size)
        self.draw.latent_shape()  # the size suits the networks
        self._guided: Text2Image | None = None
        evaluation, measuring = plain.get("evaluation"), Measuring(**plain.get("measures", {}))
        self.score, self.measures = self._score(evaluation), None
        also = plain.get("evaluate_also") or {}
        self.also = {name: self._score(evaluation, params) for name, params in also.items()}
        if measuring.every_steps:
            self.measures = Measures(self._score(evaluation, measuring.params), measuring)
        self.samples = SampleDrawing(**plain.get("samples", {}))
        self.pipeline = self._pipeline(self.samples.guidance_base)  # of samples and previews
        self.prompts = [fill(prompt, **data.words) for prompt in self.samples.prompts]

    def __call__(self) -> list[Path]:
        """-> the paths that rank 0 leaves: contact sheet, model file, report."""
        with self.watch("prior_images"):
            priors = self._priors() if self.data.draws_priors else None
        draw = None
        if self.data.online_priors:
            draw = drawing_of(priors.spec, frozen(self.draw), batch_size=self.data.prior_batch_size)
        self.data.attach(encode=self.module.encode_images, vae_hash=self.base_hash, priors=priors, draw=draw)
        before = self._look_at_base() if ranks.rank() == 0 else []
        with self.watch("encoding"):
            self.data.setup()
        with self.watch("training"):
            run.fit(
                self.module,
                self.data,
                folder=self.folder,
                callbacks=self._callbacks(),
                measures=self.measures,
                **run.training_options(self.plain),
            )
        return self._leave(before) if ranks.rank() == 0 else []

    def _score(self, evaluation: dict | None, params: Mapping[str, Any] | None = None) -> Score:
        """The evaluation, with params of its own where some are given."""
        node = with_params(evaluation, params or {}) if evaluation else None
        return Score(node, self._pipeline, self.data, base_hash=self.base_hash)

    def _pipeline(self, guidance_base: bool) -> Text2Image:
        """How the run draws; on demand with the base as it is now for the unconditional prediction."""
        if not guidance_base:
            return self.draw
        if self._guided is None:
            base = base_denoiser(self.module)
            self._guided = text2image(self.module, size=self.data.size, guidance_base=base)
        return self._guided

    def _priors(self) -> PriorSet:
        """The prior images, drawn as far as they are missing."""
        drawing = PriorDrawing(**self.plain.get("priors", {}))
        priors = prior_set(self.data, drawing, base_sha256=self.base_hash, device=self.module.device)
        draw_priors(self.draw, priors, self.data.num_priors, batch_size=drawing.batch_size)
        return priors

    def _look_at_base(self) -> run.Rows:
        """Pictures and figures of the untouched base; a run that is taken up has the pictures already."""
        kept, settings = self.folder / "samples" / "before", asdict(self.samples)
        for other in ("prompts", "n", "every_steps", "preview_n", "batch_size"):
            del settings[other]
        with self.watch("samples_before"):
            rows = run.load_rows(kept, self.prompts, self.samples.n, settings)
            if rows is None:
                rows = draw_samples(self.pipeline, self.samples, self.prompts, progress=True)
                run.save_rows(kept, rows, settings)
        with self.watch("figures_before"):
            for score in (self.score, *self.also.values()):
                score.before()
            if self.measures is not None:
                self.measures.score.before()
        return rows

    def _callbacks(self) -> list[pl.Callback]:
        callbacks = [Speed(), FirstStep()]
        if self.data.cache_latents and not self.data.online_priors:
            callbacks.append(AutoencoderAside())
        if self.samples.every_steps:
            callbacks.append(Previews(self.pipeline, self.samples, self.prompts, self.folder / "samples"))
        return callbacks

    def _leave(self, before: run.Rows) -> list[Path]:
        """Model file, pictures, figures and report of the trained networks."""
        measured = run.measured(self.folder)
        best = measured[best_of(measured)]["step"] if measured else None
        if best is not None and run.Export(**self.plain.get("export", {})).weights == "best":
            run.take_best(self.module, self.folder, best)
        model = run.export_of(
            self.module, self.plain, self.folder, words=self.data.words, base_hash=self.base_hash
        )
        with self.watch("samples_after"):
            after = draw_samples(self.pipeline, self.samples, self.prompts, progress=True)
        with self.watch("figures_after"):
            memo = ImageMemo()
            figures = self.score.after(memo)
            also = {name: score.after(memo) for name, score in self.also.items()}
        sheet = run.leave_pictures(self.folder / "samples", before, after)
        on_the_way = {"measures": measured, "best_step": best} if measured else {}
        if self.measures is not None:
            on_the_way["measures_seconds"] = round(self.measures.seconds, 2)  # of "training"
        metrics = {
            **figures,
            **({"evaluate_also": also} if also else {}),
            **on_the_way,
            "seconds": self.watch.seconds,
            "peak_memory_mib": max(self.watch.peak_mib.values(), default=round(peak_memory_mib(), 1)),
            "phase_peak_memory_mib": self.watch.peak_mib,
            "prior_images": self.data.num_priors if self.data.draws_priors else 0,
        }
        run.write_json(self.folder / "metrics.json", metrics)
        return [sheet, model, self._report(before, after, metrics)]

    def _report(self, before: run.Rows, after: run.Rows, metrics: Mapping[str, Any]) -> Path:
        """The run on one page -> report.html."""
        pairs = zip(before, after, strict=True)
        of_class = self.data.prior_batch_size and not self.data.priors_show_subject
        priors = self.data.prior_photos[:SHOWN_PRIORS] if of_class else ()
        previews = sorted(self.folder.glob("samples/step-*.png"))
        report = Report(
            title=f"{self.folder.name}: {self.data.subject_prompt}",
            subject=[load_image(photo.path) for photo in self.data.subject_photos],
            priors=[load_image(photo.path) for photo in priors],
            rows=[Row(prompt, old, new) for (prompt, old), (_, new) in pairs],
            figures=metrics,
            seconds=metrics["seconds"],
            curves=read_curves(self.folder / "tensorboard"),
            config=(self.folder / "config.yaml").read_text(encoding="utf-8"),
            previews=[(int(path.stem.split("-")[1]), load_image(path)) for path in previews],
            measured=Measured(metrics.get("measures", []), metrics.get("best_step")),
            also=metrics.get("evaluate_also", {}),
        )
        return write_report(self.folder / "report.html", report)
