"""Strings of brackets, what a stack says about them, and the brackets of real Python."""

import random
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

PYTHON_BRACKETS = "([{)]}"


@dataclass
class Matching:
    """What a stack finds: for each token its partner (-1: none) and the height of its pair."""

    partner: list[int]
    height: list[int]  # 1 for an innermost pair, else 1 + the greatest inside; 0 without partner

    @property
    def depth(self) -> int:
        return max(self.height, default=0)


def match(tokens: list[int], types: int) -> Matching:
    """Pairs by a stack. A closing bracket that doesn't fit stays, and hides what is below it."""
    partner, height = [-1] * len(tokens), [0] * len(tokens)
    stack: list[list[int]] = []  # [place, greatest height inside so far]
    for place, token in enumerate(tokens):
        if token == 0:
            continue
        if stack and token > types and tokens[stack[-1][0]] == token - types:
            opening, inside = stack.pop()
            partner[opening], partner[place] = place, opening
            height[opening] = height[place] = inside + 1
            if stack:
                stack[-1][1] = max(stack[-1][1], inside + 1)
        else:
            stack.append([place, 0])
    return Matching(partner, height)


def nested(rng: random.Random, types: int, depth: int, length: int) -> list[int]:
    """A well-formed string of that depth and even length >= 2 depth: a walk that never goes above
    `depth`, reaches it, and comes back to 0."""
    tokens: list[int] = []
    stack: list[int] = []
    reached = False
    for remaining in range(length, 0, -1):
        level = len(stack)
        may_open = level < depth and level + 2 <= remaining
        may_close = level > 0 and (reached or 2 * depth - level + 1 <= remaining - 1)
        if may_open and (not may_close or rng.random() < 0.5):
            stack.append(rng.randint(1, types))
            tokens.append(stack[-1])
            reached = reached or len(stack) == depth
        else:
            tokens.append(stack.pop() + types)
    return tokens


def corrupted(rng: random.Random, tokens: list[int], types: int) -> list[int]:
    """The string with one bracket exchanged for another."""
    place = rng.randrange(len(tokens))
    others = [token for token in range(1, 2 * types + 1) if token != tokens[place]]
    return [*tokens[:place], rng.choice(others), *tokens[place + 1 :]]


def mistyped(rng: random.Random, tokens: list[int], types: int) -> list[int]:
    """The string with one closing bracket exchanged for one of another type."""
    place = rng.choice([i for i, token in enumerate(tokens) if token > types])
    others = [token for token in range(types + 1, 2 * types + 1) if token != tokens[place]]
    return [*tokens[:place], rng.choice(others), *tokens[place + 1 :]]


def even_length(rng: random.Random, shortest: int, longest: int) -> int:
    """Log-uniform in [shortest, longest], both even: every order of magnitude has its share."""
    drawn = shortest * (longest / shortest) ** rng.random()
    return max(shortest, min(longest, 2 * round(drawn / 2)))


def padded(strings: list[list[int]]) -> Tensor:
    """int64 (len(strings), longest), filled up with 0."""
    length = max(2, *(len(string) for string in strings))
    return torch.tensor([string + [0] * (length - len(string)) for string in strings])


def batches(strings: list[list[int]], scores: int = 1 << 25) -> Iterator[tuple[list[int], Tensor]]:
    """The strings by length in batches of at most that many attention scores (or one string):
    their indices and tokens."""
    chosen: list[int] = []
    for index in sorted(range(len(strings)), key=lambda i: len(strings[i])):
        if chosen and (len(chosen) + 1) * len(strings[index]) ** 2 > scores:
            yield chosen, padded([strings[i] for i in chosen])
            chosen = []
        chosen.append(index)
    if chosen:
        yield chosen, padded([strings[i] for i in chosen])


def python_files(limit: int) -> list[Path]:
    """The standard library's sources (0: all of them), without what pip installed into it."""
    root = Path(sysconfig.get_path("stdlib"))
    installed = {"site-packages", "dist-packages"}
    files = [p for p in sorted(root.rglob("*.py")) if not installed & set(p.parts)]
    return files[:: max(1, len(files) // limit)][:limit] if limit else files


def python_bracket_ids(types: int) -> dict[str, int]:
    """( [ { are the first three types."""
    return {
        bracket: 1 + index % 3 + (types if index >= 3 else 0)
        for index, bracket in enumerate(PYTHON_BRACKETS)
    }


def statements(file: Path) -> Iterator[list[str]]:
    """The tokens of each statement (logical line) of a Python file, by the tokenizer."""
    skipped = {tokenize.NL, tokenize.COMMENT, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING}
    current: list[str] = []
    with file.open("rb") as source:
        for token in tokenize.tokenize(source.readline):
            if token.type in (tokenize.NEWLINE, tokenize.ENDMARKER):
                yield current
                current = []
            elif token.type not in skipped:
                # A string "(" is no bracket.
                current.append(token.string if token.type == tokenize.OP else "")


def python_statements(limit: int, types: int) -> tuple[list[list[int]], int, int]:
    """Statements of the standard library that have brackets, as tokens; how many statements there
    are in all, and how many files were left out because Python's tokenizer refuses them (tests of
    the tokenizer itself)."""
    ids = python_bracket_ids(types)
    result, count, refused = [], 0, 0
    for file in tqdm(python_files(limit), desc="tokenize", unit="file", mininterval=0.5):
        try:
            found = list(statements(file))
        except (SyntaxError, tokenize.TokenError):
            refused += 1
            continue
        count += len(found)
        tokens = [[ids.get(token, 0) for token in statement] for statement in found]
        result.extend(statement for statement in tokens if any(statement))
    return result, count, refused
