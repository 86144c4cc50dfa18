"""The short form of the soak: a job that is killed five times leaves what it leaves undisturbed."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from benchmarks import soak
from ldm.errors import UserError
from ldm.files import write_section

ROOT = Path(__file__).resolve().parents[2]
SHORTER = ["trainer.max_steps=6", "data.params.num_priors=8", "samples.every_steps=0", "priors.steps=2"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_killed_five_times(tmp_path: Path):
    report, earlier = tmp_path / "reliability.md", soak.table(Counter(kills=3, runs=2), Counter(training=3))
    report.write_text(f"before\n<!-- soak -->\n{earlier}\nold\n<!-- /soak -->\nafter\n")
    command = [sys.executable, "scripts/soak.py", "--kills", "5", "--report", str(report), "--add", *SHORTER]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    counts, phases = soak.read_table(report.read_text())
    assert (counts["kills"], counts["runs that differ"], counts["torn files"]) == (8, 0, 0)
    assert counts["runs"] > 2 and phases.total() == 8 and phases["training"] >= 3
    text = report.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text


def test_a_report_without_its_section(tmp_path: Path):
    (tmp_path / "report.md").write_text("<!-- soak -->")
    with pytest.raises(UserError, match="no section"):
        write_section(tmp_path / "report.md", "soak", "x")
    assert (tmp_path / "report.md").read_text() == "<!-- soak -->"
