"""The short form of the soak: a job that is killed five times leaves what it leaves undisturbed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from ldm.errors import UserError
from ldm.files import write_section

ROOT = Path(__file__).resolve().parents[2]
SHORTER = ["trainer.max_steps=6", "data.params.num_priors=8", "samples.every_steps=0", "priors.steps=2"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_killed_five_times(tmp_path: Path):
    report = tmp_path / "reliability.md"
    report.write_text("before\n<!-- soak -->\nold\n<!-- /soak -->\nafter\n")
    command = [sys.executable, "scripts/soak.py", "--kills", "5", "--report", str(report), *SHORTER]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    text = report.read_text()
    rows = dict(re.findall(r"\| ([^|]+) \| (\d+) \|", text))
    assert (rows["kills"], rows["runs that differ"], rows["torn files"]) == ("5", "0", "0")
    assert sum(int(n) for name, n in rows.items() if name.startswith("killed: ")) == 5
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text


def test_a_report_without_its_section(tmp_path: Path):
    (tmp_path / "report.md").write_text("<!-- soak -->")
    with pytest.raises(UserError, match="no section"):
        write_section(tmp_path / "report.md", "soak", "x")
    assert (tmp_path / "report.md").read_text() == "<!-- soak -->"
