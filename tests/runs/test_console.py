"""What a run says: phases, its end; what of the libraries it does not say."""

import json
import logging
import signal
import warnings
from pathlib import Path

import pytest

from ldm.commands import dreambench, dreambooth, search, study
from ldm.engine import signals
from ldm.errors import UserError
from ldm.runs import console
from ldm.runs.console import QUIET_LINES, Phases, closing, metric_lines
from tests.factories import run_config

TITLES = {
    "prior_images": "Prior images: 4",
    "samples_before": "Samples",
    "figures_before": "Metrics",
    "training": "Training: 3 steps",
    "samples_after": "Samples",
    "figures_after": "Metrics",
}


def test_phases_are_numbered_and_say_what_is_left_where_it_is_known(caplog: pytest.LogCaptureFixture):
    phases = Phases(TITLES)
    phases.seconds = {"prior_images": 70.0, "samples_before": 30.0, "figures_before": 100.0}
    assert [phases.headline(name) for name in TITLES] == [
        "[1/6] Prior images: 4; after it about 2 min",
        "[2/6] Samples",
        "[3/6] Metrics",
        "[4/6] Training: 3 steps; after it about 2 min",
        "[5/6] Samples; after it about 2 min",
        "[6/6] Metrics",
    ]
    fresh = Phases(TITLES)
    with caplog.at_level(logging.INFO):
        with fresh("training"), fresh("not said"):
            pass
    assert caplog.messages == ["[4/6] Training: 3 steps"] and fresh.seconds.keys() == {"training", "not said"}


def test_metrics_have_a_line_each_with_what_they_are_compared_with():
    metrics = {
        "subject_fidelity": 0.98,
        "class_shift": 0.0662,
        "intervals": {"subject_fidelity": [0.9, 1.0]},
        "base": {"subject_fidelity": 0.1},
        "ceiling": {"subject_fidelity": 1.0},
        "noise_floor": {"class_shift": 0.09},
        "peak_memory_mib": 700.0,
    }
    assert metric_lines(metrics) == [
        "subject fidelity         0.980  (base 0.100, photos 1.000)",
        "class shift              0.066  (noise floor 0.090)",
    ]
    assert metric_lines({"seconds": {"training": 3.0}, "peak_memory_mib": 700.0}) == []


@pytest.mark.parametrize(
    "called, command", [("main.py", "python scripts/sample.py"), ("/bin/dreambooth", "dreambooth-sample")]
)
def test_the_end_names_the_files_and_the_next_command(
    tiny_config: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, called: str, command: str
):
    from ldm.schema import RunConfig

    monkeypatch.setattr("sys.argv", [called, "--base", "x.yaml"])
    config = RunConfig.parse(
        run_config(
            tiny_config, base=tmp_path / "b", subject=tmp_path, name="my dog", trainer={"max_steps": 3}
        )
    )
    folder = tmp_path / "my dog"
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps({"dino": 0.5, "base": {"dino": 0.25}}))
    paths = [folder / "samples/contact_sheet.png", folder / "model.safetensors", folder / "report.html"]
    word = config.data["params"]["class_word"]
    assert closing(paths, config).splitlines() == [
        "dino                     0.500  (base 0.250)",
        f"samples  {paths[0]}",
        f"model    {paths[1]}",
        f"report   {paths[2]}",
        f"next     {command} --model '{folder}' --prompt 'a photo of sks {word} on the moon'",
    ]


def test_only_lines_named_are_left_out(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    handler = logging.StreamHandler()
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    with warnings.catch_warnings():
        console.speak()
        said = ["ours", "GPU", *QUIET_LINES]
        for line in said:
            logging.getLogger("any").warning(line)
            logging.getLogger("any").error("\n" + line)
        warnings.warn("`isinstance(treespec, LeafSpec)` is deprecated, use another", stacklevel=1)
        with pytest.warns(UserWarning, match="a new one"):
            warnings.warn("a new one", stacklevel=1)
    assert capsys.readouterr().err == "warning: ours\nerror: \nours\nwarning: GPU\nerror: \nGPU\n"


@pytest.mark.parametrize(
    "command, work, words",
    [
        (study, "ldm.runs.sweep_results.run_study", ["study.py", "--base", "a.yaml"]),
        (search, "ldm.runs.search_results.run_search", ["search.py", "--base", "a.yaml", "b.yaml"]),
        (dreambench, "ldm.runs.dreambench_results.run_dreambench", ["dreambench.py", "--root", "dataset"]),
        (dreambooth, "ldm.runs.options.config_of", ["main.py", "--base", "a.yaml"]),
    ],
)
def test_every_command_that_trains_leaves_them_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, command, work: str, words: list[str]
):
    def says(*_: object) -> None:
        logging.getLogger("lightning.pytorch").warning(QUIET_LINES[0])
        raise UserError("The work has begun")

    monkeypatch.setattr(work, says)
    monkeypatch.setattr("sys.argv", words)
    root = logging.getLogger()
    level = root.level
    monkeypatch.setattr(root, "handlers", [])  # which pytest's are
    before = {number: signal.getsignal(number) for number in signals.SIGNALS}
    with warnings.catch_warnings():
        assert command.command() == 2
    for number, handler in before.items():
        signal.signal(number, handler)
    root.setLevel(level)
    err = capsys.readouterr().err
    assert "error: The work has begun" in err and QUIET_LINES[0] not in err


def test_what_is_left_out_is_still_in_the_library():
    """A line that Lightning words anew shows up again: then this list is to be looked at."""
    import pytorch_lightning

    folders = [Path(pytorch_lightning.__file__).parent]
    text = "\n".join(file.read_text(encoding="utf-8") for file in folders[0].rglob("*.py"))
    pieces = [
        "Tip: For seamless cloud",
        "GPU available: ",
        "TPU available: ",
        "LOCAL_RANK: ",
        "GLOBAL_RANK: ",
    ]
    pieces += ["stopped: `max_steps=", "is deprecated", "does not have many workers", "You have overridden `"]
    assert [piece for piece in pieces if piece not in text] == []
