"""The syntax of prompts with weights: what is read, and what is refused."""

import pytest

from ldm_jax.conditions.prompts import composed, composition, parse

# The documented cases of stable-diffusion-webui, and others worked out from its description.
PARSED = {
    "normal text": [("normal text", 1.0)],
    "an (important) word": [("an ", 1.0), ("important", 1.1), (" word", 1.0)],
    "(unbalanced": [("unbalanced", 1.1)],
    r"\(literal\]": [("(literal]", 1.0)],
    "(unnecessary)(parens)": [("unnecessaryparens", 1.1)],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        ("a ", 1.0),
        ("house", 1.5730000000000004),
        (" ", 1.1),
        ("on", 1.0),
        (" a ", 1.1),
        ("hill", 0.55),
        (", sun, ", 1.1),
        ("sky", 1.4641000000000006),
        (".", 1.1),
    ],
    "": [("", 1.0)],
    "[word]": [("word", 1 / 1.1)],
    "a) b] c:1.2)": [("a) b] c:1.2)", 1.0)],
    "(a : 1.5 )": [("a ", 1.5)],
    "(a:-2)": [("a", -2.0)],
    "(10:30 train)": [("10:30 train", 1.1)],
    r"a\\b \c": [("a\\b c", 1.0)],
    "(a [b:1.2) c]": [("a ", 1.2), ("b", 1.2 / 1.1), (" c", 1 / 1.1)],
}


@pytest.mark.parametrize("prompt", PARSED)
def test_weights(prompt):
    found, expected = parse(prompt), PARSED[prompt]
    assert [piece.text for piece in found] == [text for text, _ in expected]
    assert [piece.weight for piece in found] == pytest.approx([w for _, w in expected], rel=1e-15)
    assert not any(piece.after_break for piece in found)


def test_break_begins_a_chunk_within_brackets_too():
    assert parse("a  BREAK (b BREAK\nc:1.2) BREAKS") == [
        ("a", 1.0, False),
        ("", 1.0, True),
        ("b", 1.2, False),
        ("c", 1.2, True),
        (" BREAKS", 1.0, False),
    ]


def test_and_divides_a_prompt_into_several_with_shares():
    assert composition("a cat") == [("a cat", 1.0)]
    assert composition("a cat AND a dog :0.5") == [("a cat ", 1.0), (" a dog", 0.5)]
    assert composition("a: 1.2 AND b :-.5 AND BRAND c:2.") == [
        ("a", 1.2),
        (" b", -0.5),
        (" BRAND c", 2.0),
    ]
    assert composition("(a cat:1.2)") == [("(a cat:1.2)", 1.0)]
    assert composition("a:1:2") == [("a:1", 2.0)]


def test_pictures_of_fewer_prompts_have_one_without_a_share():
    batches, shares = composed([{"caption": ["a AND b :2 AND c", "d"], "label": [1, 2]}], False)
    assert [batch["caption"] for batch in batches] == [["a ", "d"], [" b", "d"], [" c", "d"]]
    assert [batch["label"] for batch in batches] == [[1, 2]] * 3
    assert shares.tolist() == [[1, 2, 1], [1, 0, 0]]
    assert composed([{"caption": ["a", "b"]}], False) == ([{"caption": ["a", "b"]}], None)
    assert composed([{"caption": ["a :0.5"]}], False)[1].tolist() == [[0.5, 0.0]]


@pytest.mark.parametrize(
    "prompt, message",
    [
        ("(a:1..2)", r"prompt '\(a:1..2\)': the weight '1..2' is no number"),
        ("a [cat:dog:0.5]", r"\[from:to:when\] and \[a\|b\], .* are not supported"),
        ("a [(cat) in [the] rain:10]", "are not supported"),
        ("a [cat|dog]", "are not supported"),
        ("a cat <lora:style:0.8>", "<lora:style:0.8> is no text, use --lora=PATH:SCALE"),
    ],
)
def test_what_is_not_read_is_refused_in_a_sentence(prompt, message):
    with pytest.raises(ValueError, match=message):
        parse(prompt)


def test_brackets_that_only_look_like_editing_are_text():
    assert parse(r"\[cat|dog\]") == [("[cat|dog]", 1.0, False)]
    assert [piece.text for piece in parse("[cat: a dog] (a|b)")] == ["cat: a dog", " ", "a|b"]


def test_and_beside_compose_is_refused():
    batches = [{"caption": ["a AND b"]}, {"caption": ["c"]}]
    with pytest.raises(ValueError, match="those of several: use one of the two"):
        composed(batches, True)
    assert composed([{"caption": ["a"]}, {"caption": ["c"]}], True)[1] is None
