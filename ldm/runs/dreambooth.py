"""A DreamBooth run: prior images, samples and metrics of the base, training, samples and metrics after it."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from ldm.annotations import Node
from ldm.config import param_of
from ldm.data.concepts import filled_for
from ldm.data.dreambooth import DreamBoothDataModule
from ldm.data.images import ImageFiles
from ldm.data.priors import PriorSet
from ldm.engine import distributed
from ldm.engine.device import peak_memory_mib
from ldm.evaluation.memo import ImageMemo
from ldm.pipeline import Text2Image
from ldm.reports.curves import read_curves
from ldm.reports.run_page import Report, Row, write_report
from ldm.runs import run
from ldm.runs.before_after import BeforeAfterEvaluation, evaluation_nodes
from ldm.runs.callbacks import LogFirstStepTime, OffloadVAE, Previews, ThroughputLogger
from ldm.runs.console import Phases, TrainingBar
from ldm.runs.limits import limits_of
from ldm.runs.model_card import write_card
from ldm.runs.online_eval import OnlineEvalCallback, Watch, best_of
from ldm.runs.run_facts import TrainingFacts, run_facts
from ldm.runs.sampling import (
    base_denoiser,
    frozen,
    generate_priors,
    generate_samples,
    prior_generator,
    prior_sets,
    text2image,
)
from ldm.schema import RunConfig
from ldm.training.latent_diffusion import LatentDiffusion

SHOWN_PRIORS = 32  # in the report


def titles_of(config: RunConfig, data: DreamBoothDataModule, *, judged: bool) -> dict[str, str]:
    """The phases that a run says, by the timer's name. judged: whether there are metrics of its samples."""
    samples = len(filled_for(config.samples.prompts, data.concepts)) * config.samples.n
    classes = ", ".join(f"`{known.prompt}`" for known in data.generated_classes)
    titles = {
        "prior_images": f"Prior images: {data.num_priors} of {classes}",
        "samples_before": f"Samples of the untouched base: {samples}",
        "figures_before": "Metrics of the untouched base",
        "encoding": "Photos and prior images to latents",
        "training": f"Training: {config.trainer.max_steps} steps",
        "samples_after": f"Samples of the trained model: {samples}",
        "figures_after": "Metrics of the trained model",
    }
    absent = set() if data.generated_classes else {"prior_images"}
    absent |= set() if judged else {"figures_before", "figures_after"}
    absent |= set() if data.cache_latents else {"encoding"}
    return {name: title for name, title in titles.items() if name not in absent}


class DreamBoothRun:
    """A run on networks with the base's weights, by a validated config; call it once, for all phases.

    base_hash: sha256 of the base. watch: sees each row of online evaluation.
    """

    def __init__(
        self,
        module: LatentDiffusion,
        data: DreamBoothDataModule,
        config: RunConfig,
        folder: Path,
        *,
        base_hash: str,
        watch: Watch | None = None,
    ):
        self.module = module
        self.data = data
        self.config = config
        self.folder = folder
        self.base_hash = base_hash
        self.pipeline = text2image(module, size=data.size)
        self._guided: Text2Image | None = None
        nodes = evaluation_nodes(config)
        self.before_after = self._before_after(config.evaluation)
        self.judged = self.before_after.evaluation is not None
        self.timer = Phases(titles_of(config, data, judged=self.judged))
        also = config.evaluate_also or {} if self.judged else {}
        self.also = {name: self._before_after(nodes[f"evaluate_also.{name}"]) for name in also}
        self.online_eval: OnlineEvalCallback | None = None
        if config.online_eval.every_steps and self.judged:
            evaluation = self._before_after(nodes["online_eval"])
            self.online_eval = OnlineEvalCallback(evaluation, config.online_eval, watch)
        self.samples = config.samples
        self.sample_pipeline = self._pipeline(self.samples.guidance_base)  # of samples and previews
        self.prompts = filled_for(self.samples.prompts, data.concepts)
        self.shapes = data.sample_shapes
        self.notes = limits_of(config, module.cond_stage_model, data)

    def __call__(self) -> list[Path]:
        """-> the paths that rank 0 writes: contact sheet, model file, report."""
        with self.timer("prior_images"):
            priors = self._priors()
        generate = None
        if self.data.online_priors:
            base = frozen(self.pipeline)
            generate = partial(prior_generator, pipeline=base, batch_size=self.data.prior_batch_size)
        self.data.attach(
            encode=self.module.encode_images,
            vae_hash=self.base_hash,
            latent_factor=self.module.networks["vae"].factor,
            priors=priors,
            generate=generate,
        )
        before = self._evaluate_base() if distributed.rank() == 0 else []
        with self.timer("encoding"):
            self.data.setup()
        with self.timer("training"):
            run.fit(
                self.module,
                self.data,
                self.config,
                folder=self.folder,
                callbacks=self._callbacks(),
                online_eval=self.online_eval,
            )
        return self._finalize(before) if distributed.rank() == 0 else []

    def _before_after(self, evaluation: Node | None) -> BeforeAfterEvaluation:
        params = self.config.model.get("params") or {}
        read_as = [params.get(name) for name in ("process", "unet", "vae", "text_encoder")]
        read_as.append((params.get("trainable") or {}).get("learned_token"))
        read_as += [str(next(network.parameters()).dtype) for network in self.module.networks.values()]
        base = f"{self.base_hash} {read_as!r}" if self.base_hash else ""
        return BeforeAfterEvaluation(evaluation, self._pipeline, self.data, base=base)

    def _pipeline(self, guidance_base: bool) -> Text2Image:
        """The sampling pipeline, optionally with the base for the unconditional prediction."""
        if not guidance_base:
            return self.pipeline
        if self._guided is None:
            base = base_denoiser(self.module)
            self._guided = text2image(self.module, size=self.data.size, guidance_base=base)
        return self._guided

    def _priors(self) -> list[PriorSet]:
        """The prior images of each class; missing ones are generated."""
        config = self.config.priors
        sets = prior_sets(self.module, self.data, config, base_sha256=self.base_hash)
        for priors in sets:
            count = self.data.prior_counts[priors.spec.shape]
            generate_priors(self.pipeline, priors, count, batch_size=config.batch_size)
        return sets

    def _evaluate_base(self) -> run.SampleGrid:
        """Samples and metrics of the untouched base; a resumed run has the samples already."""
        kept, settings = self.folder / "samples" / "before", self._sampling()
        with self.timer("samples_before"):
            rows = run.load_image_grid(kept, self.prompts, self.samples.n, settings)
            if rows is None:
                rows = self._generate_samples()
                run.save_image_grid(kept, rows, settings)
        if not self.judged:
            return rows
        with self.timer("figures_before"):
            for evaluation in (self.before_after, *self.also.values()):
                evaluation.before()
            if self.online_eval is not None:
                self.online_eval.before_after.before()
        return rows

    def _callbacks(self) -> list[pl.Callback]:
        compiled = param_of(self.config.model, "compile") is not None
        callbacks = [ThroughputLogger(), LogFirstStepTime(compiled=compiled)]
        if self.config.trainer.enable_progress_bar:
            callbacks.append(TrainingBar())
        if self.data.cache_latents and not self.data.online_priors:
            callbacks.append(OffloadVAE())
        if self.samples.every_steps:
            about = (self.sample_pipeline, self.samples, self.prompts, self.folder / "samples")
            callbacks.append(Previews(*about, shapes=self.shapes))
        return callbacks

    def _sampling(self) -> dict[str, Any]:
        """How the samples are drawn, as their files say it."""
        settings = asdict(self.samples)
        for other in ("prompts", "n", "every_steps", "preview_n", "batch_size"):
            del settings[other]
        sides = {side: settings.pop(side) for side in ("height", "width")}
        if self.shapes and not any(sides.values()):
            return settings | {"shapes": list(map(str, self.shapes))}
        return settings | {side: given or self.data.size for side, given in sides.items()}

    def _generate_samples(self) -> run.SampleGrid:
        about = (self.sample_pipeline, self.samples, self.prompts)
        return generate_samples(*about, shapes=self.shapes, progress=True)

    def _finalize(self, before: run.SampleGrid) -> list[Path]:
        """Model file, samples, metrics and report of the trained networks."""
        history = run.load_eval_history(self.folder)
        best = history[best_of(history)]["step"] if history else None
        if best is not None and self.config.export.weights == "best":
            run.load_best_weights(self.module, self.folder, best)
        training = TrainingFacts.of(self.config, self.data, self.folder, best_step=best)
        trigger = ", ".join(concept.trigger for concept in self.data.concepts)
        about = {"size": self.data.size, "trigger_phrase": trigger, "base_hash": self.base_hash}
        model = run.export(self.module, self.config, self.folder, **about)
        with self.timer("samples_after"):
            after = self._generate_samples()
        with self.timer("figures_after") if self.judged else nullcontext():
            memo = ImageMemo()
            final = self.before_after.after(memo)
            also = {name: evaluation.after(memo) for name, evaluation in self.also.items()}
        grid = run.save_samples(self.folder / "samples", before, after, self._sampling())
        online = {"measures": history, "best_step": best} if history else {}
        if self.online_eval is not None:
            online["measures_seconds"] = round(self.online_eval.seconds, 2)  # of "training"
            online["measures_noise_floor"] = self.online_eval.before_after.noise_floor()
        metrics = {
            **final,
            **({"evaluate_also": also} if also else {}),
            **online,
            "seconds": self.timer.seconds,
            "peak_memory_mib": max(self.timer.peak_mib.values(), default=round(peak_memory_mib(), 1)),
            "phase_peak_memory_mib": self.timer.peak_mib,
            "prior_images": training.generated,
            **({"notes": self.notes} if self.notes else {}),
        }
        run.write_json(self.folder / "metrics.json", metrics)
        write_card(self.folder, self.config, metrics, training)
        facts = run_facts(training, self.config, self.data, base_hash=self.base_hash)
        return [grid, model, self._report(before, after, metrics, facts)]

    def _report(
        self,
        before: run.SampleGrid,
        after: run.SampleGrid,
        metrics: Mapping[str, Any],
        facts: Mapping[str, str],
    ) -> Path:
        """Writes the report -> report.html."""
        pairs = zip(before, after, strict=True)
        classes = self.data.classes if self.data.prior_batch_size else ()
        priors = [
            image
            for known in classes
            for image in self.data.images.of_class(known)[: -(-SHOWN_PRIORS // len(classes))]
        ]
        previews = sorted(self.folder.glob("samples/step-*.png"))
        report = Report(
            title=f"{self.folder.name}: {', '.join(c.subject_prompt for c in self.data.concepts)}",
            facts=facts,
            photos={
                name: ImageFiles(photo.path for photo in photos)
                for name, photos in self.data.images.photos.items()
            },
            priors=ImageFiles(photo.path for photo in priors),
            rows=[Row(prompt, old, new) for (prompt, old), (_, new) in pairs],
            metrics=metrics,
            curves=read_curves(self.folder / "tensorboard"),
            config=(self.folder / "config.yaml").read_text(encoding="utf-8"),
            previews=ImageFiles(previews),
            preview_steps=[int(path.stem.split("-")[1]) for path in previews],
        )
        return write_report(self.folder / "report.html", report)
