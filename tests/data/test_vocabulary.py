"""The WordPiece vocabularies split the embedded texts alike."""

import string
from pathlib import Path

import pytest

import ldm_jax.data.sources
from ldm_jax.data.scenes import SceneSource
from ldm_jax.data.sources import EmojiSource
from scripts.build_vocabulary import emoji_texts, needed_pieces, scene_texts

tokenizers = pytest.importorskip("tokenizers")
FOLDER = Path(ldm_jax.data.sources.__file__).parent / "vocabulary"


def read(name):
    return (FOLDER / f"{name}.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n")


def tokenizer(name):
    ids = {piece: index for index, piece in enumerate(read(name))}
    return tokenizers.BertWordPieceTokenizer(vocab=ids, lowercase=True)


def test_pieces():
    bert, emoji = read("bert"), read("emoji")
    assert (len(bert), len(emoji)) == (30522, 4175)
    assert emoji[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] and bert[0] == "[PAD]"
    assert len(set(emoji)) == len(emoji)
    kept = set(emoji)
    assert emoji == [piece for piece in bert if piece in kept]
    characters = string.ascii_lowercase + string.digits + string.punctuation
    assert {*characters, *("##" + c for c in characters)} <= kept


def test_embedded_texts_split_alike():
    examples = list(EmojiSource("all"))
    texts = [text for e in examples for text in (e["caption"], *e["tags"])]
    bert, emoji = (tokenizer(name).encode_batch(texts) for name in ("bert", "emoji"))
    assert [e.tokens for e in bert] == [e.tokens for e in emoji]
    unknown = {text for text, e in zip(texts, emoji, strict=True) if "[UNK]" in e.tokens}
    assert unknown == {"✓", "♪", "〒"}  # tags that BERT itself lacks; no caption


def test_captions_of_scenes_split_alike():
    """In the vocabulary of scenes and in BERT's; which the script would make the same again."""
    captions = [SceneSource().describe(i)["caption"] for i in range(5000)]
    bert, scenes = (tokenizer(name).encode_batch(captions) for name in ("bert", "scenes"))
    assert [e.tokens for e in bert] == [e.tokens for e in scenes]
    assert read("scenes") == needed_pieces(read("bert"), scene_texts())
    assert read("emoji") == needed_pieces(read("bert"), emoji_texts())
    assert len(read("scenes")) < 600


def test_known_ids():
    encoding = tokenizer("bert").encode("a Red apple")
    assert encoding.ids == [101, 1037, 2417, 6207, 102]
    assert "[UNK]" not in tokenizer("emoji").encode("Zebra-striped xylophones, 42!").tokens
