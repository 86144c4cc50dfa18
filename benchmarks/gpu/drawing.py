"""Part `sample`: 50 steps with guidance, images out; prior images with their files, by the command itself."""

from collections.abc import Sequence

import torch

from benchmarks.cases import Case
from benchmarks.gpu.record import (
    CUDA,
    DEVICE,
    SAMPLING_STEPS,
    SIZE,
    attempt,
    chosen,
    forget_peak,
    memory,
    milliseconds,
    new_folder,
    profiled,
    say,
)
from benchmarks.gpu.runs import command, job_words
from benchmarks.ours import Sampling
from ldm.engine.device import set_matmul_precision

BATCHES = (1, 8, 16) if CUDA else (1, 2)
PROFILED = 5 if CUDA else 2  # steps
PRIORS, AT_A_TIME = (32, 16) if CUDA else (4, 2)


def sample(*words: str) -> None:
    set_matmul_precision("high")
    if CUDA and chosen("kernel by kernel", words):
        with attempt("sampling, batch 1, kernel by kernel"):
            case = Case(SIZE, "sample", 1, steps=SAMPLING_STEPS)
            ms = milliseconds(Sampling(case, device=DEVICE, cuda_graph=False).step, 1, 1)[0]
            say("sampling, batch 1, kernel by kernel", steps=SAMPLING_STEPS, ms=ms)
    for batch in BATCHES:
        if not chosen(f"batch {batch}", words):
            continue
        with attempt(f"sampling, batch {batch}"):
            _sampling(batch)
    if not chosen("prior images", words):
        return
    with attempt("prior images"):
        _priors()


def _sampling(batch: int) -> None:
    """So many images; the first batch's profile, the second's decoding."""
    sampling = Sampling(Case(SIZE, "sample", batch, steps=SAMPLING_STEPS), device=DEVICE)
    forget_peak()
    ms = milliseconds(sampling.step, 2 if batch == 1 else 1, 1)[0]
    figures = {"steps": SAMPLING_STEPS, "ms": ms, "images_per_s": 1000 * batch / ms, **memory()}
    say(f"sampling, batch {batch}", **figures)
    if batch == BATCHES[0]:
        sampling.case = Case(SIZE, "sample", batch, steps=PROFILED)
        sampling.step()
        with profiled(f"{PROFILED} steps of sampling, batch {batch}", 1):
            sampling.step()
    if batch == BATCHES[1]:
        _decoding(sampling, batch)


def _decoding(sampling: Sampling, batch: int) -> None:
    """The VAE alone, of as many images."""
    vae = sampling.pipeline.vae
    shape = (batch, *sampling.pipeline.latent_shape())
    latents = torch.randn(shape, device=DEVICE, dtype=next(vae.parameters()).dtype)
    with torch.inference_mode():
        say(f"decoding, batch {batch}", ms=milliseconds(lambda: vae.decode(latents), 2, 1)[0])


def _priors() -> None:
    """Seconds of a prior image on disk, from the times of the files of all batches but the first."""
    folder = new_folder()
    words = [f"data.params.num_priors={PRIORS}", f"priors.batch_size={AT_A_TIME}"]
    words += [f"priors.steps={SAMPLING_STEPS}"]
    process = command(folder, "scripts/generate_priors.py", *job_words(folder), *words)
    if process.wait() != 0:
        raise RuntimeError("generate_priors.py failed, see the log")
    times = sorted(path.stat().st_mtime for path in (folder / "priors").rglob("*.png"))
    say("prior images on disk", count=len(times), s_per_image=_pace(times), steps=SAMPLING_STEPS)


def _pace(times: Sequence[float]) -> float:
    """Seconds of a file, from the last of the first batch on."""
    return (times[-1] - times[AT_A_TIME - 1]) / (len(times) - AT_A_TIME)
