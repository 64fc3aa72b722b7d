"""Real citations in real English, and the questions asked about them.

Reporters (abbreviation, full name) and example citations come from the PyPI package reporters-db
(BSD-2, Free Law Project); the English around a citation is CPython's own pydoc_data.topics (PSF).
"""

import random
import re
from dataclasses import dataclass
from pydoc_data.topics import topics

import torch
from inventor import Inventor
from reporters_db import REPORTERS
from torch import Tensor

ABBREVIATION_WIDTH = 32
NAME_WIDTH = 64
WORD_WIDTH = 12

QUESTIONS = ("reporter", "volume", "page")
REPORTER, VOLUME, PAGE = range(3)


@dataclass
class Reporter:
    abbreviation: str
    name: str


def load_reporters() -> list[Reporter]:
    """Every edition whose abbreviation stands for one name and fits the widths above."""
    names: dict[str, set[str]] = {}
    for group in REPORTERS.values():
        for reporter in group:
            for edition in reporter["editions"]:
                names.setdefault(edition, set()).add(reporter["name"])
    return [
        Reporter(abbreviation, *name)
        for abbreviation, name in sorted(names.items())
        if len(name) == 1
        and len(abbreviation) <= ABBREVIATION_WIDTH
        and len(next(iter(name))) <= NAME_WIDTH
    ]


def load_examples(reporters: list[Reporter]) -> list[tuple[str, int, str]]:
    """The citations "volume reporter page" that reporters-db itself gives as examples."""
    index = {reporter.abbreviation: i for i, reporter in enumerate(reporters)}
    examples = []
    for group in REPORTERS.values():
        for reporter in group:
            for example in reporter.get("examples", []):
                match = re.fullmatch(r"(\d+) (.+) (\d+)", example)
                if match and match[2] in index:
                    examples.append((match[1], index[match[2]], match[3]))
    return examples


def load_sentences() -> tuple[list[str], list[str]]:
    """English sentences of the topics, three topics in four for training and the others for the
    test. What is written in other characters is code and left out."""
    split: tuple[list[str], list[str]] = ([], [])
    for number, topic in enumerate(sorted(topics)):
        text = " ".join(topics[topic].replace("*", "").replace('"', "").split())
        sentences = re.split(r"(?<=[.:]) ", text)
        split[number % 4 == 3].extend(
            s for s in sentences if re.fullmatch(r"[A-Z][A-Za-z0-9 ,.;:()'-]{20,}", s)
        )
    return split


def to_bytes(strings: list[str], width: int) -> Tensor:
    """uint8 (len(strings), width), one row a string in ASCII, cut at width and padded with 0."""
    rows = [s.encode("ascii", "replace")[:width].ljust(width, b"\0") for s in strings]
    return torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.uint8).view(len(rows), width)


class Library:
    """The reporters as tensors, and which of them training may see."""

    def __init__(self, held_out: int, seed: int, limit: int = 0):
        self.reporters = load_reporters()
        if limit:
            generator = torch.Generator().manual_seed(seed)
            chosen = torch.randperm(len(self.reporters), generator=generator)[:limit]
            self.reporters = [self.reporters[i] for i in sorted(chosen.tolist())]
        names = sorted({reporter.name for reporter in self.reporters})
        index = {name: i for i, name in enumerate(names)}
        self.abbreviations = to_bytes([r.abbreviation for r in self.reporters], ABBREVIATION_WIDTH)
        self.names = to_bytes(names, NAME_WIDTH)
        self.name_of_entry = torch.tensor([index[r.name] for r in self.reporters])

        order = torch.randperm(len(self.reporters), generator=torch.Generator().manual_seed(seed))
        self.held_out = order[:held_out].sort().values
        self.known = order[held_out:].sort().values
        self.unseen = {self.reporters[entry].abbreviation for entry in self.held_out.tolist()}
        # Neither an abbreviation nor a name of a held-out entry occurs in training.
        shared = torch.isin(self.name_of_entry[self.known], self.name_of_entry[self.held_out])
        self.trained = self.known[~shared]
        # The same read from their ends: "Mich." is a neighbour of "Rich." there.
        backwards = sorted(
            self.trained.tolist(), key=lambda i: self.reporters[i].abbreviation[::-1]
        )
        self.trained_backwards = torch.tensor(backwards)
        self.trained_names = self.name_of_entry[self.trained].unique()

    def citable(self, entries: Tensor) -> list[tuple[int, str]]:
        """(entry, abbreviation) of entries, as `Texts.batch` takes them."""
        return [(i, self.reporters[i].abbreviation) for i in entries.tolist()]


@dataclass
class Batch:
    """Texts, each asked every question, and the strings an answer may be chosen from."""

    text: Tensor  # uint8 (B, L)
    entry: Tensor  # int64 (B,): the reporter cited
    words: Tensor  # uint8 (B, W, WORD_WIDTH): words of the text; 0 is the volume, 1 the page


class Texts:
    """Draws texts: a citation among filler, with the distracting numbers the filler has. Where an
    inventor is given, for training, numbers and words of abbreviations are strewn in."""

    def __init__(
        self,
        sentences: list[str],
        length: int,
        words: int,
        seed: int,
        inventor: Inventor | None = None,
    ):
        self.sentences = sentences
        self.length = length
        self.words = words
        self.inventor = inventor
        self.draw = random.Random(seed)

    def number(self, digits: int) -> str:
        return str(1 + self.draw.randrange(10 ** self.draw.randint(1, digits) - 1))

    def written_number(self) -> str:
        form = self.draw.choice(["{0}", "{0}", "{0},", "{0}.", "({0})", "{1}.{0}", "{0}-{1}"])
        return form.format(self.number(5), self.number(2))

    def strew(self, words: list[str], inventor: Inventor) -> None:
        """Inserts what is easily taken for a part of a citation."""
        for _ in range(self.draw.randint(1, 3)):
            place = self.draw.randint(1, len(words))
            if self.draw.random() < 0.3:
                words.insert(place, inventor.word())
            else:
                # "7 items 12" is no citation: a reporter has a capital.
                if self.draw.random() < 0.5 and "".join(words[place : place + 1]).islower():
                    words.insert(place + 1, self.written_number())
                words.insert(place, self.written_number())

    def filler(self, length: int) -> str:
        """At most that many characters of a sentence, cut at a blank."""
        words = self.draw.choice(self.sentences).split()
        if self.inventor and self.draw.random() < 0.6:
            self.strew(words, self.inventor)
        sentence = " ".join(words)
        if len(sentence) > length:
            sentence = sentence[:length].rpartition(" ")[0]
        return sentence

    def text(self, citation: str) -> tuple[str, str]:
        """The citation with filler before and after it (one text in eight has none),
        and that filler."""
        if self.draw.randrange(8) == 0:
            return citation, ""
        room = self.length - len(citation) - 2
        before = self.filler(self.draw.randint(0, room))
        after = self.filler(room - len(before))
        return f"{before} {citation} {after}".strip(), f"{before} {after}"

    def batch(
        self,
        cited: list[tuple[int, str]],
        numbers: list[tuple[str, str]] | None = None,
    ) -> Batch:
        """A text for each (entry, abbreviation), with drawn or given (volume, page)."""
        texts: list[str] = []
        words: list[str] = []
        for row, (_, abbreviation) in enumerate(cited):
            volume, page = numbers[row] if numbers else self.volume_and_page()
            text, filler = self.text(f"{volume} {abbreviation} {page}")
            # The alternatives: two numbers that are almost right, then the text's, then its words.
            almost = [volume[:-1] + str((int(volume[-1]) + 1) % 10), page + "0"]
            others = sorted(set(filler.split()), key=lambda word: not word.strip(".,:()").isdigit())
            others = [word for word in almost + others if word not in (volume, page)]
            others = [*others, *[""] * self.words][: self.words - 2]
            texts.append(text)
            words.extend([volume, page, *others])
        return Batch(
            to_bytes(texts, self.length),
            torch.tensor([entry for entry, _ in cited]),
            to_bytes(words, WORD_WIDTH).view(len(cited), self.words, WORD_WIDTH),
        )

    def volume_and_page(self) -> tuple[str, str]:
        volume, page = self.number(4), self.number(5)
        return (volume, page) if volume != page else self.volume_and_page()
