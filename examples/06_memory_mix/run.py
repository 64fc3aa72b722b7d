"""Think or look up: heads that mix self-attention with attention over a memory of law reporters.

Trains on real citations, draws what the heads read, saves the model as TorchScript, then builds the
C++ app of this folder, asks it, adds an entry to its memory and asks again. See README.md.
"""

import argparse
import shlex
import sys
import warnings
from pathlib import Path

import torch

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))

import app  # noqa: E402
import figures  # noqa: E402
from citations import (  # noqa: E402
    ABBREVIATION_WIDTH,
    NAME_WIDTH,
    WORD_WIDTH,
    Library,
    Texts,
    load_examples,
    load_sentences,
)
from conflict import conflict_accuracy  # noqa: E402
from goals import GOALS  # noqa: E402
from inventor import Inventor  # noqa: E402
from model import MemoryMix  # noqa: E402
from shared.example import argument_parser, run, save_model  # noqa: E402
from training import answers_right, area_under_curve, fill, train, with_gate  # noqa: E402

NEW_ENTRY = ("Reykj. Rep.", "Reykjavik District Reports")
CITATIONS = ["410 U.S. 113", "The court in 304 F.3d 1064 held otherwise.", "12 Reykj. Rep. 345"]
QUICK = {
    "steps": 160,
    "batch": 32,
    "memory": 48,
    "reporters": 120,
    "held_out": 16,
    "tests": 100,
    "conflict_steps": 60,
}


def arguments() -> argparse.Namespace:
    parser = argument_parser(FOLDER, __doc__.splitlines()[0])
    sizes = {
        "steps": (1800, "training steps"),
        "batch": (48, "texts a step"),
        "memory": (192, "entries in the memory of a training step"),
        "reporters": (0, "reporters to use; 0: all of reporters-db"),
        "held-out": (64, "reporters kept from training, for new_entry_found"),
        "tests": (1000, "texts of the test"),
        "length": (112, "characters of a text"),
        "words": (10, "words of a text among the candidate answers"),
        "width": (64, "channels of the model"),
        "heads": (2, "heads of each layer"),
        "conflict-steps": (200, "training steps of each reader in the conflict"),
        "conflict-entries": (1, "memory entries each question of the conflict may read"),
        "capacity": (2048, "slots of the memory"),
    }
    for name, (default, text) in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=text)
    parser.add_argument("--lr", type=float, default=3e-3, help="learning rate")
    parser.add_argument(
        "--app-build", type=Path, help="folder the C++ app is built in (default: OUT/app)"
    )
    if parser.parse_known_args()[0].quick:
        parser.set_defaults(**QUICK)
    return parser.parse_args()


def evaluate(model: MemoryMix, library: Library, texts: Texts, args) -> tuple[dict, torch.Tensor]:
    """The trained model's figures and their controls, and the gates (N, 3) of the test texts."""
    generator = torch.Generator().manual_seed(args.seed)
    true_names = library.name_of_entry
    asked = torch.randint(len(library.known), (args.tests,), generator=generator)
    batch = texts.batch(library.citable(library.known[asked]))

    fill(model, library, library.known, true_names)
    right, gate = answers_right(model, library, batch, true_names)
    text_only, _ = answers_right(with_gate(model, False), library, batch, true_names)
    memory_only, _ = answers_right(with_gate(model, True), library, batch, true_names)
    needs_memory = torch.zeros_like(right)
    needs_memory[:, 0] = True

    swapped_names = true_names.clone()
    swapped_names[library.known] = true_names[library.known.roll(len(library.known) // 2)]
    fill(model, library, library.known, swapped_names)
    swapped, _ = answers_right(model, library, batch, swapped_names)

    model.reset()
    empty, _ = answers_right(model, library, batch, true_names)

    fill(model, library, library.known, true_names)
    new_entries = library.held_out
    model.add(library.abbreviations[new_entries], library.names[true_names[new_entries]])
    new_batch = texts.batch(library.citable(new_entries.repeat(4)))
    new, _ = answers_right(model, library, new_batch, true_names)

    examples = load_examples(library.reporters)
    if examples:
        cited = torch.tensor([entry for _, entry, _ in examples])
        numbers = [(volume, page) for volume, _, page in examples]
        given, _ = answers_right(
            model, library, texts.batch(library.citable(cited), numbers), true_names
        )
        print(
            f"{len(examples)} example citations of reporters-db, reporter, volume, page right:",
            [round(value, 3) for value in given.float().mean(0).tolist()],
        )

    def share(of: torch.Tensor) -> float:
        return float(of.float().mean())

    result = {
        "fact_accuracy": share(right[:, 0]),
        "gate_zero_facts": share(text_only[:, 0]),
        "empty_memory_facts": share(empty[:, 0]),
        "local_accuracy": share(right[:, 1:]),
        "gate_one_local": share(memory_only[:, 1:]),
        "gate_auc": area_under_curve(gate.flatten(), needs_memory.flatten()),
        "swap_follows_new_memory": share(swapped[:, 0]),
        "new_entry_found": share(new[:, 0]),
    }
    return result, gate


def draw(model: MemoryMix, course: list, gate: torch.Tensor, length: int, out: Path) -> None:
    figures.draw_gates(course, gate, out / "gates.png")
    entries = [bytes(row.tolist()).rstrip(b"\0").decode() for row in model.abbreviations]
    abbreviation = "U.S." if "U.S." in entries else entries[0]
    text = f"The rule was first stated in 410 {abbreviation} 113 and was followed for 50 years."
    with torch.no_grad():
        _, _, finder, mixer = model(app.as_bytes(text.ljust(length, "\0")).unsqueeze(0))
    figures.draw_reads(text, finder[0], mixer[0], entries, out / "reads.png")


def main() -> dict:
    # TorchScript is what a C++ app loads without Python; torch 2.15 announces its end, and has it.
    warnings.filterwarnings("ignore", message=r"`torch\.jit\.\w+` is (deprecated|not supported)")
    args = arguments()
    torch.manual_seed(args.seed)
    library = Library(args.held_out, args.seed, args.reporters)
    print(f"{len(library.reporters)} reporters of reporters-db, {len(library.held_out)} held out")
    train_sentences, test_sentences = load_sentences()
    trained = [library.reporters[entry].abbreviation for entry in library.trained.tolist()]
    inventor = Inventor(trained, train_sentences, ABBREVIATION_WIDTH, args.seed)
    train_texts = Texts(train_sentences, args.length, args.words, args.seed, inventor)
    test_texts = Texts(test_sentences, args.length, args.words, args.seed + 1)
    model = MemoryMix(
        args.width, args.heads, args.capacity, NAME_WIDTH, ABBREVIATION_WIDTH, WORD_WIDTH
    )
    course = train(model, library, inventor, train_texts, args)
    model.eval()
    result, gate = evaluate(model, library, test_texts, args)
    for name in ("token", "head"):
        key = "conflict_token_gate" if name == "token" else "conflict_scalar_gate"
        result[key] = conflict_accuracy(
            model,
            library,
            name,
            steps=args.conflict_steps,
            entries=args.conflict_entries,
            seed=args.seed,
        )
    result["gate_moved"] = float(gate[:, 0].mean())
    print(
        "gates of reporter, volume, page: started at",
        [round(value, 3) for value in course[0][1:]],
        "ended at",
        [round(value, 3) for value in gate.mean(0).tolist()],
    )

    path = args.out / "memory_mix.pt"
    model.digest = model.current_digest()
    save_model(model, path)
    draw(model, course, gate, args.length, args.out)
    print("building the C++ app ...", flush=True)
    binary = app.build(args.app_build or args.out / "app")
    result["cpp_max_error"] = app.compare(binary, path, CITATIONS, NEW_ENTRY)
    print("what it answers, before and after an entry is added to its memory:\n")
    print(app.run([str(binary), str(path), *CITATIONS, "--add", *NEW_ENTRY, CITATIONS[-1]]), end="")
    say_what_next(binary, path, args.out)
    return result


def say_what_next(binary: Path, path: Path, out: Path) -> None:
    ask = shlex.join([str(binary), str(path)])
    print(f"""\
Look at what the heads read:  {out / "gates.png"}  {out / "reads.png"}
Ask a citation:               {ask} "347 U.S. 483"
Add an entry and ask it:      {ask} --add "Demo Rep." "Demonstration Reports" "1 Demo Rep. 2"
Ask line by line:             {ask}
Read on:                      {FOLDER / "README.md"}""")


if __name__ == "__main__":
    run(main, GOALS)
