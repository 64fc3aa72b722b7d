"""The page of the gallery, written from the results that the runs left."""

import runpy
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from PIL import Image  # which matplotlib brings

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from shared.goals import missed

WIDTH = 1000  # pixels of a picture, at most


@dataclass
class Result:
    figures: dict
    cpu_seconds: float
    seconds: float
    torch: str
    processor: str


@dataclass
class Example:
    folder: Path  # its source
    out: Path  # what its runs left
    results: dict[int, Result]  # by seed

    @cached_property
    def table(self) -> dict:
        """What its goals.py defines: GOALS and PICTURE."""
        return runpy.run_path(str(self.folder / "goals.py"))

    @property
    def keys(self) -> list[str]:
        """Those of its results, and those with a goal that no result has."""
        of_results = [key for result in self.results.values() for key in result.figures]
        return list(dict.fromkeys([*of_results, *self.table["GOALS"]]))

    @property
    def cpu_seconds(self) -> float:
        return sum(result.cpu_seconds for result in self.results.values())

    def figures(self, key: str) -> list:
        return [result.figures.get(key) for result in self.results.values()]


def complaints(examples: list[Example], seeds: list[int]) -> list[str]:
    """A line for each goal missed and each control that is not as predicted, and where there is no
    result."""
    lines = []
    for example in examples:
        name, goals = example.folder.name, example.table["GOALS"]
        for seed, result in example.results.items():
            lines += [f"{name} seed {seed}: {line}" for line in missed(goals, result.figures)]
        absent = [str(seed) for seed in seeds if seed not in example.results]
        if absent:
            lines.append(f"{name} seed {', '.join(absent)}: no result")
    return lines


def text_of(figure: float | bool | None) -> str:
    if figure is None:
        return "none"
    if isinstance(figure, bool):
        return str(figure).lower()
    # 0.99995 is not 1.
    return f"{figure:.6g}" if abs(figure - 1) < 1e-3 else f"{figure:.4g}"


def row(example: Example, key: str, seeds: list[int]) -> str:
    goal = example.table["GOALS"].get(key)
    cells = [
        text_of(example.results[seed].figures.get(key)) if seed in example.results else ""
        for seed in seeds
    ]
    found = [figure for figure in example.figures(key) if figure is not None]
    spread = text_of(max(found) - min(found)) if len(found) > 1 else ""
    # One word where all seeds agree.
    verdicts = (
        dict.fromkeys(goal.verdict(figure) for figure in example.figures(key)) if goal else []
    )
    return f"| `{key}` | {goal or ''} | {' | '.join(cells)} | {spread} | {' / '.join(verdicts)} |"


def save_picture(source: Path, path: Path) -> None:
    """A copy that is small enough for a repository."""
    with Image.open(source) as image:
        small = image.convert("RGB")
    small.thumbnail((WIDTH, 10 * WIDTH), Image.Resampling.LANCZOS)
    write_whole(path, lambda temporary: small.quantize(128).save(temporary, "PNG", optimize=True))


def write_whole(path: Path, write) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    temporary.replace(path)


def section(example: Example, seeds: list[int], docs: Path) -> str:
    title, claim = (example.folder / "README.md").read_text().split("\n\n")[:2]
    name = example.folder.name
    lines = [f"#{title}", "", claim, ""]
    for seed in example.results:
        picture = example.out / f"seed-{seed}" / example.table["PICTURE"]
        if picture.exists():
            save_picture(picture, docs / "figures" / "gallery" / f"{name}.png")
            lines += [f"![{name}, seed {seed}](figures/gallery/{name}.png)", ""]
            break
    columns = " | ".join(f"seed {seed}" for seed in seeds)
    rule = " | ".join(["---"] * (len(seeds) + 4))
    lines += [f"| key | goal | {columns} | spread | |", f"| {rule} |"]
    lines += [row(example, key, seeds) for key in example.keys]
    seconds = ", ".join(f"{result.cpu_seconds:.0f}" for result in example.results.values())
    source = f"[What the keys mean, and how it works](../examples/{name}/README.md)"
    lines += ["", f"{source}. Processor seconds a run: {seconds or 'none'}."]
    return "\n".join(lines)


def write_page(examples: list[Example], seeds: list[int], docs: Path, quick: bool) -> Path:
    results = [result for example in examples for result in example.results.values()]
    machines = sorted({f"{result.processor}, torch {result.torch}" for result in results})
    minutes = sum(result.cpu_seconds for result in results) / 60
    wrong = complaints(examples, seeds)
    number = f"{len(seeds)} seeds" if len(seeds) > 1 else "1 seed"
    size = "small runs (`--quick`), in which goals may be missed" if quick else "default sizes"
    head = [
        "# Gallery",
        "",
        f"Every example over {number}, {size}: each goal beside its figures, and beside the claims "
        "the controls, which must fail. Written by `make gallery`; what is typed in here is lost.",
        "",
        f"Measured on {'; '.join(machines) or 'nothing yet'}; one thread a run, {minutes:.0f} "
        "minutes of processor time in all. The spread is the largest figure minus the smallest.",
        "",
    ]
    if wrong:
        head += ["Not as it should be:", "", *(f"- {line}" for line in wrong)]
    else:
        head += ["Every goal is met, and every control fails as predicted."]
    page = docs / "gallery.md"
    sections = [section(example, seeds, docs) for example in examples]
    text = "\n\n".join(["\n".join(head), *sections]) + "\n"
    write_whole(page, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return page
