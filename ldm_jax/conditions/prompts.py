"""Prompts with weights, in the syntax of AUTOMATIC1111's stable-diffusion-webui.

- `(word)` weighs a text 1.1 times as much, `[word]` 1/1.1 times, `(word:1.2)` 1.2 times. They
  nest, and a bracket that is not closed reaches to the end. `\\(`, `\\)`, `\\[`, `\\]` and `\\\\`
  stand for the character itself.
- `BREAK` begins the next chunk of the model's text length: see `weighted`.
- `a cat AND a dog :0.5` composes a picture of two prompts, the second with half the weight.

What that program does beside it is refused: `[from:to:when]`, `[a|b]`, and `<lora:name:0.8>`.
"""

import re
from typing import Any, NamedTuple

import numpy as np

ROUND, SQUARE = 1.1, 1 / 1.1
TOKEN = re.compile(
    r"\\[()\[\]\\]"  # an escaped character
    r"|\\"  # a backslash alone is left out
    r"|[()\[\]]"
    r"|:\s*(?P<weight>[+-]?[.\d]+)\s*\)"
    r"|[^\\()\[\]:]+|:"
)
BREAK = re.compile(r"\s*\bBREAK\b\s*")
AND = re.compile(r"\bAND\b")
SHARE = re.compile(r"\s*:\s*([-+]?(?:\d+\.?\d*|\.\d+))\s*$")
WHEN = re.compile(r":\s*[-+]?[.\d]+\s*$")
NETWORK = re.compile(r"<(lora|lyco|hypernet):[^<>]*>")


class Text(NamedTuple):
    """A piece of a prompt, and its weight; "" after a BREAK begins another chunk."""

    text: str
    weight: float
    after_break: bool = False


def parse(prompt: str) -> list[Text]:
    """The pieces of a prompt, in order; neighbours of one weight are one piece.

    Unlike in the original, a BREAK within brackets is one as well.

    Raises ValueError for a weight that is no number, and for syntax that is not supported.
    """
    _refuse(prompt)
    found: list[list[Any]] = []  # text, weight, after_break
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def weigh(start: int, factor: float) -> None:
        for piece in found[start:]:
            piece[1] *= factor

    for match in TOKEN.finditer(prompt):
        token, weight = match[0], match["weight"]
        if token in opened:
            opened[token].append(len(found))
        elif weight is not None and opened["("]:
            weigh(opened["("].pop(), _number(prompt, weight))
        elif token == ")" and opened["("]:
            weigh(opened["("].pop(), ROUND)
        elif token == "]" and opened["["]:
            weigh(opened["["].pop(), SQUARE)
        elif token.startswith("\\"):
            found.append([token[1:], 1.0, False])
        else:
            for i, text in enumerate(BREAK.split(token)):
                found.append([text, 1.0, i > 0])
    for start in opened["("]:
        weigh(start, ROUND)
    for start in opened["["]:
        weigh(start, SQUARE)

    joined: list[Text] = []
    for text, weight, after_break in found:
        if joined and not after_break and joined[-1].weight == weight:
            joined[-1] = joined[-1]._replace(text=joined[-1].text + text)
        elif text or after_break:
            joined.append(Text(text, weight, after_break))
    return joined or [Text("", 1.0)]


def composition(prompt: str) -> list[tuple[str, float]]:
    """The prompts between AND, each with its share of guidance, the number after its last colon."""
    parts = []
    for text in AND.split(prompt):
        share = SHARE.search(text)
        parts.append((text[: share.start()], float(share[1])) if share else (text, 1.0))
    return parts


def composed(
    batches: list[dict[str, list]], several: bool
) -> tuple[list[dict[str, list]], np.ndarray | None]:
    """The batches of K captions for each picture, and their shares (B, K), from one batch.

    A picture of fewer has its first caption again, with a share of 0. If all have one caption and
    the share 1, the shares are None.

    Raises ValueError for AND and shares where `several` prompts, a batch for each, are composed by
    weights of guidance.
    """
    if several:
        if any(composition(text) != [(text, 1.0)] for each in batches for text in each["caption"]):
            raise ValueError(
                "AND and shares compose the prompts of one text, and compose those of several: "
                "use one of the two"
            )
        return batches, None
    (entries,) = batches
    parts = [composition(caption) for caption in entries["caption"]]
    count = max(map(len, parts))
    if all(part[0][1] == 1.0 for part in parts) and count == 1:
        return [entries | {"caption": [part[0][0] for part in parts]}], None
    count = max(count, 2)  # with one condition, guidance of 1 has no weights
    parts = [part + [(part[0][0], 0.0)] * (count - len(part)) for part in parts]
    batches = [entries | {"caption": [part[k][0] for part in parts]} for k in range(count)]
    return batches, np.float32([[share for _, share in part] for part in parts])


def _number(prompt: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"prompt {prompt!r}: the weight {text!r} is no number") from None


def _refuse(prompt: str) -> None:
    """Raises ValueError for syntax of the original that is not supported."""
    if network := NETWORK.search(prompt):
        raise ValueError(f"prompt {prompt!r}: {network[0]} is no text, use --lora=PATH:SCALE")
    starts: list[int] = []
    plain = re.sub(r"\\.", "  ", prompt)
    for place, character in enumerate(plain):
        if character == "[":
            starts.append(place)
        elif character == "]" and starts:
            inner = plain[starts.pop() + 1 : place]
            if "|" in inner or WHEN.search(inner):
                raise ValueError(
                    f"prompt {prompt!r}: [from:to:when] and [a|b], which change the prompt between "
                    "steps, are not supported; write \\[ for a bracket"
                )
