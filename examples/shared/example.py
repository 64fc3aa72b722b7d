"""What every example does alike: its arguments, files that are whole or absent, its last line."""

import argparse
import contextlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from shared.goals import Goals
from torch import nn

ROOT = Path(__file__).resolve().parents[2]


def argument_parser(folder: Path, description: str | None) -> argparse.ArgumentParser:
    """A parser with the flags of every example: --seed, --quick, --out."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything drawn at random")
    parser.add_argument("--quick", action="store_true", help="a smaller run, for the tests")
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "build" / "examples" / folder.name,
        help="folder for the figures and the model",
    )
    return parser


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Gives a name to write to; the file gets its own once it is complete, else it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def save_model(model: nn.Module, path: Path) -> None:
    """Saves it as TorchScript, which a C++ app loads without Python."""
    with warnings.catch_warnings(), atomic(path) as temporary:
        # torch 2.15 announces TorchScript's end, and has it.
        warnings.filterwarnings(
            "ignore", message=r"`torch\.jit\.\w+` is (deprecated|not supported)"
        )
        torch.jit.script(model).save(temporary)


def run(main: Callable[[], dict], goals: Goals) -> None:
    """Runs an example and prints its figures beside their goals; the last line has all of them.
    Ctrl-C ends it in one line."""
    try:
        figures = main()
    except KeyboardInterrupt:
        print("\nInterrupted: no file was left half-written.", file=sys.stderr)
        sys.exit(130)
    rounded = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in figures.items()}
    for key, goal in goals.items():
        if key in rounded:
            print(f"{key:34} {rounded[key]!s:12} {goal!s:24} {goal.verdict(rounded[key])}")
    print("RESULT", json.dumps(rounded), flush=True)
