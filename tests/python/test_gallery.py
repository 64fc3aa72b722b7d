"""tools/gallery.py: its page from runs that end well and runs that do not; and that every README
states the goals that its example is held to."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from example_runs import ROOT, goals_of

EXAMPLES = sorted(path.parent for path in (ROOT / "examples").glob("[0-9]*/run.py"))
GOALS = """
from shared.goals import at_least, at_most, control
PICTURE = "picture.png"
GOALS = {"accuracy": at_least(0.9), "chance": control(at_most(0.5))}
"""
# Its accuracy depends on the seed; the picture is any of the right type.
RUN = f"""
import argparse, json, os, shutil, signal, sys
parser = argparse.ArgumentParser()
parser.add_argument("--seed", type=int)
parser.add_argument("--out")
parser.add_argument("--quick", action="store_true")
args = parser.parse_args()
assert os.environ["OMP_NUM_THREADS"] == "1"
shutil.copy({str(ROOT / "docs" / "figures" / "regression.png")!r}, args.out + "/picture.png")
print("training\\rtraining", file=sys.stderr)
OTHERWISE
print("RESULT", json.dumps({{"accuracy": (95 - args.seed) / 100, "chance": 0.1, "beside": 7}}))
"""


@pytest.fixture
def gallery(tmp_path):
    """Runs the tool on made-up examples."""
    for number, name in enumerate(("good", "bad"), 1):
        folder = tmp_path / "examples" / f"0{number}_{name}"
        folder.mkdir(parents=True)
        (folder / "README.md").write_text(f'# 0{number} {name}: a title\n\n*"A claim."*\n\nMore.\n')
        (folder / "goals.py").write_text(GOALS)

    def run(*arguments: object, bad: str = "", code: int) -> tuple[str, str]:
        for path in (tmp_path / "examples").iterdir():
            (path / "run.py").write_text(
                RUN.replace("OTHERWISE", bad if path.name == "02_bad" else "")
            )
        folders = {name: tmp_path / name for name in ("examples", "results", "docs")}
        command = [sys.executable, ROOT / "tools" / "gallery.py", *arguments]
        for name, folder in folders.items():
            command += [f"--{name}", folder]
        ended = subprocess.run(
            [str(word) for word in command], capture_output=True, text=True, timeout=120
        )
        assert ended.returncode == code, ended.stdout + ended.stderr
        return ended.stdout, (folders["docs"] / "gallery.md").read_text()

    return run


def test_page(gallery, tmp_path):
    printed, page = gallery("--seeds", 0, 4, code=0)
    assert "Every goal is met" in printed
    assert "Every goal is met" in page
    assert '## 02 bad: a title\n\n*"A claim."*' in page
    assert page.count("| `accuracy` | >= 0.9 | 0.95 | 0.91 | 0.04 | met |") == 2
    assert page.count("| `chance` | control: <= 0.5 | 0.1 | 0.1 | 0 | as predicted |") == 2
    assert page.count("| `beside` |  | 7 | 7 | 0 |  |") == 2
    for picture in re.findall(r"\]\((figures/.*?)\)", page):
        assert (tmp_path / "docs" / picture).read_bytes().startswith(b"\x89PNG")


def test_missed_goal(gallery):
    printed, page = gallery("--seeds", 3, 6, code=1)
    line = "02_bad seed 6: accuracy is 0.89, goal >= 0.9"
    assert line in printed.splitlines()
    assert f"- {line}" in page.splitlines()
    assert "| `accuracy` | >= 0.9 | 0.92 | 0.89 | 0.03 | met / MISSED |" in page


def test_control_that_does_not_fail(gallery):
    bad = 'print(\'RESULT {"accuracy": 1.0, "chance": 0.99996}\'); sys.exit()'
    printed, page = gallery("--seeds", 0, bad=bad, code=1)
    assert "02_bad seed 0: chance is 0.99996, control: <= 0.5" in printed.splitlines()
    assert "| `chance` | control: <= 0.5 | 0.99996 |  | NOT AS PREDICTED |" in page


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("raise ValueError", "ended with exit code 1"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "was ended by SIGKILL"),
        ("sys.exit()", "printed no RESULT"),
        ("signal.pause()", "was ended by SIGKILL"),
    ],
)
def test_failed_run_loses_nothing_else(gallery, tmp_path, bad, said):
    printed, page = gallery("--seeds", 0, "--limit", 3, bad=bad, code=1)
    assert f"02_bad seed 0 {said}" in printed
    log = tmp_path / "results" / "02_bad" / "seed-0.log"
    assert f"see {log}" in printed
    assert "training" in log.read_text()
    assert "- 02_bad seed 0: no result" in page
    assert "| `accuracy` | >= 0.9 | 0.95 |  | met |" in page
    assert "| `accuracy` | >= 0.9 |  |  |  |" in page


def test_resume_runs_what_has_no_result(gallery, tmp_path):
    gallery("--seeds", 0, bad="sys.exit(3)", code=1)
    good = tmp_path / "results" / "01_good" / "seed-0.json"
    result = json.loads(good.read_text())
    assert result["cpu_seconds"] > 0
    result["figures"]["beside"] = 123
    good.write_text(json.dumps(result))
    _, page = gallery("--seeds", 0, "--resume", code=0)
    assert "| `beside` |  | 123 |" in page
    assert "| `beside` |  | 7 |" in page
    _, page = gallery("--seeds", 0, "--only", "01_good", code=0)
    assert "123" not in page


def test_real_example(tmp_path):
    command = [sys.executable, ROOT / "tools" / "gallery.py", "--quick", "--seeds", 0, "--only",
               "07_matching", "--results", tmp_path]  # fmt: skip
    ended = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    # The others have no result.
    assert ended.returncode == 1, ended.stderr
    page = (tmp_path / "gallery.md").read_text()
    assert re.search(r"\| `marginal_residual` \| <= 1e-6 \| \S+ \|  \| met \|", page)
    assert (tmp_path / "figures" / "gallery" / "07_matching.png").stat().st_size < 200_000


@pytest.mark.parametrize("folder", EXAMPLES, ids=lambda folder: folder.name)
def test_readme_states_the_goals(folder: Path):
    stated = {}
    for line in (folder / "README.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        for key in re.findall(r"`(\w+)`", cells[1]) if len(cells) > 3 else []:
            stated.setdefault(key, cells[2])
    goals = goals_of(folder)
    assert {key: stated.get(key) for key in goals} == {key: str(g) for key, g in goals.items()}
