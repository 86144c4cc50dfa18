"""A run on the storybook with photos that are not its own: said at the start and on the page, no metrics."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from ldm.errors import UserError
from ldm.runs.job import run_job
from ldm.runs.options import parse
from ldm.storybook.subjects import new_subject, write_subject

REPOSITORY = Path(__file__).resolve().parents[2]
SHORT = [
    *(
        "--base",
        str(REPOSITORY / "configs/dreambooth.yaml"),
        "trainer.max_steps=1",
        "trainer.accelerator=cpu",
    ),
    *("data.params.num_priors=0", "data.params.prior_caption_dropout=0", "trainer.val_check_interval=1"),
    *("data.params.batch_size=1", "data.params.validation_batches=1", "samples.n=1", "samples.steps=1"),
    *("samples.every_steps=0", "online_eval.every_steps=1", "evaluation.params.steps=1", "ema_decay=null"),
    *("evaluation.params.seeds=1", "evaluation.params.class_samples=2"),
    "model.params.objective.prior_target=noise",
    *("online_eval.params={seeds: 1, class_samples: 2}", "trainer.enable_progress_bar=false"),
    "data.params.subject_root=photos",
]


def left_by(words: list[str]) -> tuple[dict, str]:
    """metrics.json and the text of the report."""
    run_job(parse([*SHORT, *words]))
    folder = max(Path("logs").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    page = (folder / "report.html").read_text(encoding="utf-8")
    return json.loads((folder / "metrics.json").read_text()), page


def test_a_vase_gets_warnings_and_no_figures(workdir: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")
    Path("photos").mkdir()
    Image.effect_noise((80, 80), 90).save("photos/0.png")
    words = ["data.params.class_word=vase", "samples.prompts=['a photo of sks vase in a spaceship']"]
    with pytest.raises(UserError, match=r"best weights cannot be told.*'vase'.*export\.weights=last"):
        run_job(parse([*SHORT, *words, "export.weights=best"]))
    metrics, page = left_by(words)
    assert "subject_fidelity" not in metrics and "measures" not in metrics and "sampling" not in metrics
    for sentence in ("does not know the class", "not drawn by the storybook", "has never seen", "spaceship"):
        assert sentence in caplog.text and re.search(sentence, page) and sentence in str(metrics["notes"])
    assert "Subject fidelity" not in page and "metrics before" not in page and "Metrics of" not in caplog.text
    assert metrics["seconds"].keys().isdisjoint({"figures_before", "figures_after"})
    assert "Photographs need a Stable Diffusion" in caplog.text and "docs/tutorial.md" in page


def test_a_drawn_cat_gets_figures_and_no_warning(workdir: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")
    write_subject(Path("photos"), new_subject("cat", seed=51), photos=2)
    metrics, page = left_by(["data.params.class_word=cat"])
    assert metrics["subject_fidelity"] >= 0 and metrics["measures"] and "notes" not in metrics
    assert metrics["sampling"]["guidance_scale"] == 2.0 and metrics["sampling"]["seeds"] == 1
    assert (
        not any("storybook" in r.getMessage() for r in caplog.records if r.levelname == "WARNING")
        and 'class="note"' not in page
    )
    assert ">metrics before<" in page and "Metrics of the untouched base" in caplog.text
