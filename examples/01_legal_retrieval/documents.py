"""Documents of real English with real citations among it.

Case citations: the reporters of the PyPI package reporters-db (BSD-2, Free Law Project), with
volume and page drawn at random. Statutes: the examples that reporters-db gives for each law, their
digits drawn anew. The English is CPython's pydoc_data.topics (PSF).
"""

import re
from dataclasses import dataclass
from pydoc_data.topics import topics

import torch
from reporters_db import LAWS, REPORTERS
from torch import Tensor

WIDTH = 40  # characters of a token
PRECEDENT, STATUTE = range(2)
STATUTES = ("leg_statute", "leg_session", "leg_act", "admin_compilation")


def reporters() -> list[str]:
    """Abbreviations of every series of court decisions."""
    names = {
        edition
        for group in REPORTERS.values()
        for reporter in group
        for edition in reporter["editions"]
    }
    return sorted(name for name in names if len(name) <= WIDTH - 12)


def laws() -> list[str]:
    """An example citation of every code and every series of statutes."""
    found = {
        law["examples"][0]
        for group in LAWS.values()
        for law in group
        if law["cite_type"] in STATUTES and law["examples"]
    }
    return sorted(example for example in found if len(example) <= WIDTH)


def paragraphs() -> list[list[str]]:
    """The words of each paragraph of the topics, code and tables left out."""
    found = []
    for name in sorted(topics):
        text = topics[name].translate({0x2018: "'", 0x2019: "'"})
        for block in re.split(r"\n\s*\n", text):
            words = re.sub(r"[*`\"]", "", block).split()
            prose = [word for word in words if re.fullmatch(r"\(?[A-Za-z'-]+[.,;:)]*", word)]
            if len(words) >= 12 and len(prose) >= 0.8 * len(words):
                found.append(words)
    return found


def to_bytes(strings: list[str]) -> Tensor:
    """uint8 (len(strings), WIDTH), Latin-1, which has the section sign; padded with 0."""
    rows = [s.encode("latin-1", "replace")[:WIDTH].ljust(WIDTH, b"\0") for s in strings]
    return torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.uint8).view(len(rows), WIDTH)


@dataclass
class Half:
    """What training may draw from, or what is held out: nothing is in both."""

    reporters: list[str]
    laws: list[str]
    matters: list[str]
    filler: list[list[str]]


def split(seed: int, share: float) -> tuple[Half, Half]:
    """Training's half and the held-out half, which has `share` of each."""
    generator = torch.Generator().manual_seed(seed)
    text = paragraphs()
    words = {word for paragraph in text for word in paragraph}
    matters = sorted(word for word in words if re.fullmatch(r"[a-z]{5,14}", word))
    halves: tuple[list, list] = ([], [])
    for things in (reporters(), laws(), matters, text):
        order = torch.randperm(len(things), generator=generator).tolist()
        cut = round(share * len(things))
        halves[0].append([things[i] for i in order[cut:]])
        halves[1].append([things[i] for i in order[:cut]])
    return Half(*halves[0]), Half(*halves[1])


@dataclass
class Batch:
    """Documents as rows of a table of strings, and what is asked about each.

    In a document every citation stands after the word for its matter. The question is one matter;
    wanted are the case and the statute cited for it."""

    strings: Tensor  # uint8 (U, WIDTH)
    tokens: Tensor  # int64 (B, T): rows of `strings`
    question: Tensor  # int64 (B,): row of the matter asked for
    places: Tensor  # int64 (B, 2, C): where the cases, the statutes stand; the wanted one first

    @property
    def citations(self) -> Tensor:
        """Rows of `strings` (B, 2C) of the cases, then the statutes."""
        return self.tokens.gather(1, self.places.flatten(1))


class Documents:
    """Draws documents of `length` tokens with `distractors` + 1 citations of each type."""

    def __init__(self, cited: Half, filler: list[list[str]], distractors: int, seed: int):
        self.cited = cited
        self.filler = [word for paragraph in filler for word in paragraph]
        self.count = distractors + 1
        self.generator = torch.Generator().manual_seed(seed)

    def integer(self, high: int) -> int:
        return int(torch.randint(high, (), generator=self.generator))

    def case(self) -> str:
        volume, page = 1 + self.integer(999), 1 + self.integer(9999)
        return f"{volume} {self.cited.reporters[self.integer(len(self.cited.reporters))]} {page}"

    def statute(self) -> str:
        law = self.cited.laws[self.integer(len(self.cited.laws))]
        return re.sub(r"\d+", self.same_digits, law)

    def same_digits(self, number: re.Match) -> str:
        """Another number of as many digits; a year stays one."""
        low = 10 ** (len(number[0]) - 1)
        if re.fullmatch(r"(19|20)\d\d", number[0]):
            return str(1900 + self.integer(125))
        return str(low + self.integer(9 * low))

    def document(self, length: int, start: int) -> tuple[list[str], list[int], str]:
        """Its tokens, with filler from word `start` on, the places of its citations (cases first,
        the wanted ones first), and the matter asked for."""
        count = self.count
        order = torch.randperm(len(self.cited.matters), generator=self.generator)
        chosen = [self.cited.matters[i] for i in order[: 2 * count - 1].tolist()]
        # The case and the statute of the first matter are wanted; every other has one citation.
        matters = [*chosen[:count], chosen[0], *chosen[count:]]
        excluded = set(chosen)
        tokens: list[str] = []
        while len(tokens) < length - 4 * count:
            word = self.filler[start % len(self.filler)]
            start += 1
            if word not in excluded:
                tokens.append(word)
        # Pairs (matter, citation) go between filler words, at places drawn without replacement.
        gaps = torch.randperm(len(tokens), generator=self.generator)[: 2 * count].tolist()
        inserted = {
            gap: (matters[i], self.case() if i < count else self.statute(), i)
            for i, gap in enumerate(gaps)
        }
        result: list[str] = []
        places = [0] * (2 * count)
        for gap, word in enumerate(tokens):
            if gap in inserted:
                matter, citation, number = inserted[gap]
                result += [matter, citation]
                places[number] = len(result) - 1
            result.append(word)
        return result, places, chosen[0]

    def batch(self, count: int, length: int) -> Batch:
        rows: dict[str, int] = {}
        # Filler from one neighbourhood: its words recur, and each is encoded once.
        start = self.integer(len(self.filler))
        drawn = [self.document(length, start + self.integer(length)) for _ in range(count)]
        tokens = [[rows.setdefault(word, len(rows)) for word in words] for words, _, _ in drawn]
        return Batch(
            to_bytes(list(rows)),
            torch.tensor(tokens),
            torch.tensor([rows[matter] for _, _, matter in drawn]),
            torch.tensor([places for _, places, _ in drawn]).view(count, 2, self.count),
        )
