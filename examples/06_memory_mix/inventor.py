"""Abbreviations nobody has seen: what training reads, beside the real ones, so that it learns where
an abbreviation stands and every character of it instead of a list of reporters."""

import random
import string


class Inventor:
    def __init__(self, real: list[str], sentences: list[str], longest: int, seed: int):
        self.english = [word for sentence in sentences for word in sentence.split()]
        words = [abbreviation.split() for abbreviation in real]
        self.first_words = [first for first, *_ in words]
        self.other_words = [word for _, *others in words for word in others]
        self.longest = longest
        self.draw = random.Random(seed)

    def word(self) -> str:
        """A word of a real abbreviation."""
        return self.draw.choice(self.first_words + self.other_words)

    def first_word(self) -> str:
        """Of a real abbreviation or an English word, whole or shortened."""
        word = self.draw.choice(self.first_words)
        if self.draw.random() < 0.3:
            letters = "".join(filter(str.isalpha, self.draw.choice(self.english)))
            word = (letters or word).capitalize() + self.draw.choice(["", "."])
        return word if self.draw.random() < 0.7 else word[: self.draw.randint(1, 4)]

    def abbreviation(self) -> str:
        """Such a word and others of real abbreviations, at times with a number between ("La.App. 2
        Cir."), and up to three characters changed."""
        others = self.draw.choices(self.other_words, k=self.draw.choice([0, 0, 1, 2, 3, 4, 6]))
        if others and self.draw.random() < 0.2:
            others.insert(self.draw.randrange(len(others)), str(self.draw.randint(1, 9)))
        result = " ".join([self.first_word(), *others])
        for _ in range(self.draw.randrange(4)):
            result = self.look_alike(result)
        return result if len(result) <= self.longest else self.abbreviation()

    def look_alike(self, abbreviation: str) -> str:
        """The abbreviation with a character lost, doubled or exchanged for another of its kind."""
        place = self.draw.randrange(len(abbreviation))
        character = abbreviation[place]
        kinds = (string.ascii_uppercase, string.ascii_lowercase, string.digits, ".&")
        kind = next((kind for kind in kinds if character in kind), character)
        instead = self.draw.choice(["", 2 * character, *self.draw.choices(kind, k=2)])
        result = " ".join((abbreviation[:place] + instead + abbreviation[place + 1 :]).split())
        return result if result[:1].isupper() and len(result) <= self.longest else abbreviation
