"""Real English whose sentence ends are known, from CPython's topics and GNU's manuals.

No end is guessed. Writers of these texts put two blanks after a sentence, or end a paragraph with
it; a period inside a word, before a lowercase word, after an initial or after one of the
abbreviations below ends nothing. A sentence in which anything else happens (a period at the end of
a line, or one blank before a capital) is left out. What remains is joined by single blanks, so the
convention that gave the labels is not in the text.
"""

import gzip
import re
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor

COMMA, STOP, PARAGRAPH = range(3)
NAMES = ("comma", "full stop", "paragraph")
INFO = Path("/usr/share/info")
CLOSING = r"[\"')\]]*"
ABBREVIATION = re.compile(
    r"(?:^|[\s(\"'])(?:[A-Z]|e\.g|i\.e|cf|vs|Dr|Mr|Mrs|Prof|St|No|Fig|Sec|Vol|Jr|pp?|U\.S)$"
)


@dataclass
class Document:
    name: str
    paragraphs: list[list[str]]  # sentences with known ends

    @property
    def sentences(self) -> int:
        return sum(len(paragraph) for paragraph in self.paragraphs)


def plain(text: str) -> str:
    """ASCII: typographic quotes as typewriter quotes, other characters as _."""
    quotes = {0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"', 0x1F: "\n"}
    text = text.translate(quotes)
    return "".join(character if character.isascii() else "_" for character in text)


def blocks(text: str) -> list[str]:
    """Paragraphs of prose: lines of one indentation, without columns, rules, leaders or grammar."""
    result = []
    for block in re.split(r"\n\s*\n", plain(text)):
        lines = block.strip("\n").split("\n")
        indents = {len(line) - len(line.lstrip()) for line in lines[1:]}
        prose = "\n".join(line.strip() for line in lines)
        if (
            len(indents) <= 1
            and re.match(r"[A-Z\"'(]", prose)
            and re.search(rf"[.?!]{CLOSING}$", prose)
            and not re.search(r"[^.?!\"')\]]  |   |::=|\||\n[-*=]{3}|\.{4}", prose)
        ):
            result.append(prose)
    return result


def ends_known(sentence: str) -> bool:
    """Whether nothing inside it might end a sentence."""
    if "  " in sentence:
        return False
    for mark in re.finditer(rf"[.?!]{CLOSING}(\s)(?=(.))", sentence, re.DOTALL):
        before = sentence[: mark.start()]
        if mark[1] == "\n" or (not mark[2].islower() and not ABBREVIATION.search(before)):
            return False
    return True


def known_sentences(block: str) -> list[str]:
    marked = re.sub(rf"([.?!]{CLOSING})  (?=\S)", r"\1\0", block)
    return [s.replace("\n", " ") for s in marked.split("\0") if ends_known(s)]


def documents() -> list[Document]:
    """A document for each topic and, where they are installed, each manual."""
    texts = {f"topics/{name}": text for name, text in topics.items()}
    for file in sorted(INFO.glob("*.info*.gz")) if INFO.is_dir() else []:
        name = f"info/{file.name.split('.info')[0]}"
        texts[name] = texts.get(name, "") + gzip.decompress(file.read_bytes()).decode(
            "utf-8", "replace"
        )
    result = []
    seen: set[str] = set()  # the manuals share licences: what is trained on must not be tested on
    for name, text in sorted(texts.items()):
        paragraphs = []
        for block in blocks(text):
            new = [s for s in dict.fromkeys(known_sentences(block)) if s not in seen]
            seen.update(new)
            if new:
                paragraphs.append(new)
        if paragraphs:
            result.append(Document(name, paragraphs))
    return result


@dataclass
class Text:
    """Characters uint8 (L) and which of them are which delimiter, bool (L, 3)."""

    characters: Tensor
    delimiters: Tensor


def labelled(chosen: list[Document]) -> Text:
    """The documents one after the other; a paragraph ends with a line feed."""
    characters: list[str] = []
    stops: list[int] = []
    length = 0
    for document in chosen:
        for paragraph in document.paragraphs:
            for number, sentence in enumerate(paragraph):
                last = re.search(rf"[.?!]{CLOSING}$", sentence)
                assert last is not None
                stops.append(length + last.start())
                characters.append(sentence + ("\n" if number + 1 == len(paragraph) else " "))
                length += len(sentence) + 1
    text = torch.frombuffer(bytearray("".join(characters).encode()), dtype=torch.uint8)
    delimiters = torch.zeros(len(text), 3, dtype=torch.bool)
    # A comma inside a number or a name is followed by something else.
    delimiters[:-1, COMMA] = (text[:-1] == ord(",")) & (text[1:] == ord(" "))
    delimiters[stops, STOP] = True
    delimiters[:, PARAGRAPH] = text == ord("\n")
    return Text(text, delimiters)


def split(found: list[Document], seed: int, share: float) -> tuple[list[Document], list[Document]]:
    """Training documents, and held-out documents with at least that share of the sentences."""
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed)).tolist()
    wanted = share * sum(document.sentences for document in found)
    held_out: list[Document] = []
    while sum(document.sentences for document in held_out) < wanted:
        held_out.append(found[order.pop()])
    return [found[i] for i in order], held_out


def windows(text: Text, length: int) -> tuple[Tensor, Tensor]:
    """The text cut into windows: characters (N, length) and delimiters (N, length, 3)."""
    count = max(1, len(text.characters) // length)
    size = min(length, len(text.characters))
    characters = text.characters[: count * size].view(count, size)
    return characters, text.delimiters[: count * size].view(count, size, 3)
