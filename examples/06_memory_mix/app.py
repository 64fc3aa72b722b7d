"""Builds the C++ app of this folder, and compares what it computes with Python."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import mixhead
import torch
from torch import Tensor

SOURCE = Path(__file__).resolve().parent


def tool(name: str) -> str:
    """A build tool of this Python's environment, else of PATH."""
    folders = os.pathsep.join([str(Path(sys.prefix) / "bin"), os.environ.get("PATH", "")])
    found = shutil.which(name, path=folders)
    if found is None:
        sys.exit(f"06_memory_mix: {name} was not found; install it with: pip install {name}")
    return found


def run(command: list[str]) -> str:
    """The command's standard output; where it fails, this program ends with all its output."""
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        sys.exit(f"06_memory_mix: {' '.join(command)} failed:\n{result.stdout}{result.stderr}")
    return result.stdout


def build(folder: Path) -> Path:
    """Configures and builds the app there (a second time only what changed); returns its path."""
    run(
        [
            tool("cmake"),
            "-S",
            str(SOURCE),
            "-B",
            str(folder),
            "-G",
            "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            f"-DCMAKE_PREFIX_PATH={mixhead.cmake_prefix_path}",
            f"-DPython_EXECUTABLE={sys.executable}",
        ]
    )
    run([tool("ninja"), "-C", str(folder)])
    return folder / "memory_mix"


def as_bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def compare(app: Path, model: Path, citations: list[str], entry: tuple[str, str]) -> float:
    """The largest difference between C++ and Python in any gate or output, over all citations,
    asked before and after an entry is added to the memory of each."""
    output = run([str(app), str(model), "--vectors", *citations, "--add", *entry, *citations])
    lines = [line.split()[1:] for line in output.splitlines() if line.startswith("vector ")]
    from_app = torch.tensor([[float(number) for number in line] for line in lines])

    scripted = torch.jit.load(model)
    rows = []
    with torch.no_grad():
        for repeat in range(2):
            if repeat == 1:
                scripted.add(*(as_bytes(text).unsqueeze(0) for text in entry))
            for citation in citations:
                _, gates, _, outputs = scripted.ask(as_bytes(citation))
                rows.append(torch.cat([gates.unsqueeze(1), outputs], dim=1))
    return float((torch.cat(rows) - from_app).abs().max())
