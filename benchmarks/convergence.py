"""Which sampler is nearest to the picture of many steps, by the predictions that it takes.

    python -m benchmarks.convergence [--images 32] [--guidance 1.5 4]

Full captions of unseen scenes are drawn by the storybook's base from the same noise by every sampler. The
converged picture is Heun's at 50 steps. Distance: root mean square over pixels, where that to a converged
picture from other noise is 1; samplers that add noise of their own go elsewhere, so theirs says little.
Right: share of the attributes asked for that the judge reads. The tables are in docs/samplers.md.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from torch import Tensor

from ldm.diffusion.samplers import SAMPLERS
from ldm.engine.device import keep_freed_memory
from ldm.evaluation.storybook import accuracy
from ldm.evaluation.storybook_limits import pixels_of
from ldm.pipeline import Text2Image
from ldm.storybook.judge import SHIPPED, Judge
from ldm.storybook.world import Scene, full_caption, sample_scene

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "ldm/storybook/assets/base.safetensors"
CONVERGED = {"sampler": "heun", "steps": 50}
PREDICTIONS = (6, 8, 12, 20)
USUAL = {"ddim": (50,)}  # what many take, beside these
FIRST_SCENE, OTHER_NOISE = 9_000_000, 10_000  # scenes and seeds that nothing else has


def steps_of(sampler: str, predictions: int) -> int:
    """The steps of a sampler that take about as many predictions: Heun's take two each, but the last."""
    return (predictions + 1) // 2 if sampler == "heun" else predictions


def settings() -> dict[str, list[dict[str, Any]]]:
    """Sampler as it is named in the table -> what is asked for, with each number of predictions."""
    named = {sampler: {"sampler": sampler} for sampler in SAMPLERS}
    named |= {f"{s}, Karras": {"sampler": s, "spacing": "karras"} for s in ("dpm++2m", "unipc")}
    return {
        name: [
            how | {"steps": steps_of(how["sampler"], count)} for count in (*PREDICTIONS, *USUAL.get(name, ()))
        ]
        for name, how in named.items()
    }


def right(reading: Mapping[str, Tensor], scenes: Sequence[Scene]) -> float:
    """Share of the attributes of the scenes that are read. reading: attribute -> [N]."""
    return mean(accuracy(reading, scenes).values())


def rms(one: Tensor, other: Tensor) -> Tensor:
    """[N, 3, H, W] twice -> [N], of each image."""
    return (one - other).square().mean((1, 2, 3)).sqrt()


def measure(guidance_scale: float, *, images: int) -> dict[str, list[dict[str, float]]]:
    """Sampler -> for each number of predictions its distance, its standard error over images, and `right`."""
    pipeline, judge = Text2Image.from_file(BASE), Judge.from_file(SHIPPED)
    scenes = [sample_scene(FIRST_SCENE + k) for k in range(images)]
    captions = [full_caption(scene) for scene in scenes]

    def drawn(first_seed: int = 0, **how: Any) -> Tensor:
        seeds = range(first_seed, first_seed + images)
        how |= {"guidance_scale": guidance_scale, "batch_size": 16}
        return pixels_of([sample.image for sample in pipeline(captions, seeds=seeds, **how)])

    converged = drawn(**CONVERGED)
    unrelated = rms(drawn(OTHER_NOISE, **CONVERGED), converged).mean()
    found: dict[str, list[dict[str, float]]] = {}
    for name, asked in settings().items():
        for how in asked:
            pixels = drawn(**how)
            distance = rms(pixels, converged) / unrelated
            row = {
                "distance": round(float(distance.mean()), 4),
                "standard_error": round(float(distance.std() / images**0.5), 4),
                "right": round(right(judge.read(pixels), scenes), 4),
            }
            found.setdefault(name, []).append(row)
            print(f"guidance {guidance_scale}: {name}, {how['steps']} steps: {row}", flush=True)
    return found


def table(found: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Markdown: a line for each sampler, a column for each number of predictions."""
    head = f"| predictions: | {' | '.join(map(str, PREDICTIONS))} | 50 |\n|{'---|' * (len(PREDICTIONS) + 2)}"
    body = []
    for name, rows in found.items():
        cells = [f"{row['distance']:.3f}, {row['right']:.1%}" for row in rows]
        cells += [""] * (len(PREDICTIONS) + 1 - len(cells))
        body.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([head, *body])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.5, 4.0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/samplers.json")
    options = parser.parse_args()
    keep_freed_memory()
    found = {f"{scale:g}": measure(scale, images=options.images) for scale in options.guidance}
    options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for scale, rows in found.items():
        print(f"\nGuidance {scale}: distance, right\n\n{table(rows)}")


if __name__ == "__main__":
    main()
