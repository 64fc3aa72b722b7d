"""Runs every example over several seeds, as many at a time as there are processors, and writes
docs/gallery.md: what they are to show, beside what they showed.

A run leaves its result, its files and its log in build/gallery. `--only 05_occlusion` runs one
example again, `--resume` whatever has no result yet; the page is written from all results there
are. The exit code is 1 where a run failed, a goal is missed or a control is not as predicted.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from gallery_page import Example, Result, complaints, write_page
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="examples to run, by folder name")
    parser.add_argument("--resume", action="store_true", help="run only what has no result yet")
    parser.add_argument("--quick", action="store_true", help="small runs, for a test of this tool")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--limit", type=float, default=1800, help="seconds a run may take")
    parser.add_argument("--examples", type=Path, default=ROOT / "examples", help="where they are")
    parser.add_argument("--results", type=Path, help="default: build/gallery")
    parser.add_argument(
        "--docs", type=Path, help="folder of the page; default: docs, of quick runs their results'"
    )
    args = parser.parse_args()
    # A quick run tells nothing about the goals: its page stays out of the documentation.
    name = "gallery-quick" if args.quick else "gallery"
    args.results = args.results or ROOT / "build" / name
    args.docs = args.docs or (args.results if args.quick else ROOT / "docs")
    return args


def processor() -> str:
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.M)
        if found:
            return found[1]
    return platform.processor() or platform.machine()


@dataclass
class Run:
    """One example with one seed, single-threaded, in a process of its own."""

    folder: Path
    seed: int
    out: Path  # what it draws and saves, and beside it seed-N.json, seed-N.log
    quick: bool
    process: subprocess.Popen | None = None
    started: float = field(default=0.0)

    def __str__(self) -> str:
        return f"{self.folder.name} seed {self.seed}"

    @property
    def result(self) -> Path:
        return self.out.with_suffix(".json")

    @property
    def log(self) -> Path:
        return self.out.with_suffix(".log")

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def start(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        self.result.unlink(missing_ok=True)
        command = [sys.executable, self.folder / "run.py", "--seed", self.seed, "--out", self.out]
        # Threads that wait for work must not take a processor from the run beside them.
        alone = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONUNBUFFERED": "1"}
        self.started = time.monotonic()
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [str(word) for word in [*command, *["--quick"] * self.quick]],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                env={**os.environ, **alone}, preexec_fn=os.setpgrp,  # killed with what it starts
            )  # fmt: skip

    def poll(self) -> str | None:
        """None while it runs; then what went wrong, "" where nothing did and the result is kept."""
        pid, status, usage = os.wait4(self.process.pid, os.WNOHANG)
        if pid == 0:
            return None
        code = self.process.returncode = os.waitstatus_to_exitcode(status)
        if code < 0:
            return f"was ended by {signal.Signals(-code).name} after {self.seconds:.0f} s"
        if code > 0:
            return f"ended with exit code {code}"
        lines = self.log.read_text(errors="replace").replace("\r", "\n").splitlines()
        last = [line for line in lines if line.startswith("RESULT ")]
        if not last:
            return "printed no RESULT"
        result = {
            "figures": json.loads(last[-1].removeprefix("RESULT ")),
            "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
            "seconds": round(self.seconds, 1),
            "torch": importlib.metadata.version("torch"),
            "processor": processor(),
        }
        temporary = self.result.with_suffix(".tmp")
        temporary.write_text(json.dumps(result, indent=1) + "\n")
        temporary.replace(self.result)
        return ""

    def kill(self) -> None:
        """Ends it and what it started (a compiler, say)."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


def expected_seconds(run: Run) -> float:
    """What another seed took; without one, unknown, and so first."""
    known = [
        json.loads(path.read_text())["cpu_seconds"] for path in run.out.parent.glob("seed-*.json")
    ]
    return max(known, default=float("inf"))


def run_all(runs: list[Run], jobs: int, limit: float) -> list[str]:
    """Runs them, the longest first, so that all processors are busy to the end; a line for each
    that failed."""
    waiting, running, failures = list(runs), [], []
    with tqdm(total=len(runs), unit="run", mininterval=1, miniters=0, disable=not runs) as progress:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    run = max(waiting, key=expected_seconds)
                    waiting.remove(run)
                    run.start()
                    running.append(run)
                for run in list(running):
                    if run.seconds > limit:
                        run.kill()
                    trouble = run.poll()
                    if trouble is None:
                        continue
                    running.remove(run)
                    progress.update()
                    if trouble:
                        failures.append(f"{run} {trouble}; see {run.log}")
                        progress.write(failures[-1])
                    else:
                        progress.write(f"{run}: {run.seconds:.0f} s")
                now = ", ".join(f"{run} {run.seconds:.0f} s" for run in running)
                progress.set_postfix_str(now, refresh=False)
                progress.update(0)
                time.sleep(0.2)
        finally:
            for run in running:
                run.kill()
    return failures


def load(folder: Path, results: Path, seeds: list[int]) -> Example:
    found = {}
    for seed in seeds:
        with contextlib.suppress(FileNotFoundError):
            text = (results / folder.name / f"seed-{seed}.json").read_text()
            found[seed] = Result(**json.loads(text))
    return Example(folder, results / folder.name, found)


def main() -> int:
    args = arguments()
    folders = sorted(path.parent for path in args.examples.glob("[0-9]*/run.py"))
    unknown = set(args.only or []) - {folder.name for folder in folders}
    if unknown:
        sys.exit(f"gallery: no example {sorted(unknown)}; {[folder.name for folder in folders]}")
    runs = [
        Run(folder, seed, args.results / folder.name / f"seed-{seed}", args.quick)
        for seed in args.seeds
        for folder in folders
        if not args.only or folder.name in args.only
    ]
    if args.resume:
        runs = [run for run in runs if not run.result.exists()]
    started = time.monotonic()
    failures = run_all(runs, args.jobs, args.limit)
    if runs:
        print(f"{len(runs)} runs in {(time.monotonic() - started) / 60:.1f} minutes")

    examples = [load(folder, args.results, args.seeds) for folder in folders]
    page = write_page(examples, args.seeds, args.docs, quick=args.quick)
    print(f"The page: {page}")
    wrong = failures + complaints(examples, args.seeds)
    print("\n".join(wrong) or "Every goal is met, every control fails as predicted.")
    return 1 if wrong else 0


if __name__ == "__main__":
    # Ended from outside, it ends its runs too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\nInterrupted: results so far are kept; go on with --resume.", file=sys.stderr)
        sys.exit(130)
