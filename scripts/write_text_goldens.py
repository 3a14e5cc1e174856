"""Writes the goldens of CLIP's text encoders and of its tokenizer.

    pip install torch==2.13.0 torchvision==0.28.0 transformers==5.23.0 open-clip-torch==3.3.0
    PYTHONPATH=. python -m scripts.write_text_goldens

tests/models/golden/clip_*.npz are small networks with random parameters, written as
`scripts/write_goldens.py` does. tests/conditions/golden/clip_tokens.json holds the ids that
transformers' CLIPTokenizer gives to PROMPTS, cut to 77, without padding; and the ids of OpenCLIP's
where they differ.
"""

import argparse
import contextlib
import json
from importlib.metadata import version
from pathlib import Path

import numpy as np

from scripts.write_goldens import record

TOKENS = Path(__file__).parents[1] / "tests" / "conditions" / "golden" / "clip_tokens.json"
PROMPTS = (
    "",
    " ",
    "a diagram of a dog",
    "A Photograph of an ASTRONAUT riding a horse",
    "  leading, trailing and   inner\twhite\n\nspace\r\n ",
    "no-break\u00a0space, thin\u2009space, ideographic\u3000space, zero\u200bwidth, line\u2028end",
    "soft\u00adhyphen, byte order mark \ufeff, joiner \u200d, right-to-left mark \u200f",
    "it's, we're, they've, I'm, he'll, she'd, don't, can't, rock'n'roll, 'tis, y'all'd've",
    "IT'S WE'RE THEY'VE I'M HE'LL SHE'D DON'T",
    "it\u2019s typographic \u201cquotes\u201d \u2013 and \u2014 dashes\u2026",
    "1 12 123 2024 3.14159 1,000,000 4k 8K 1/2 50% 1e-5 0x1F",
    "\u00bd \u00b2 \u2163 \u0661\u0662\u0663 \u0967\u0968 \U0001d7d8",
    "café, naïve, Ångström, Üben, façade, São Paulo, Ørsted, Łódź, İstanbul, STRASSE straße",
    "cafe\u0301, nai\u0308ve, A\u030angstro\u0308m: decomposed",
    "z\u0351\u036b\u0343a\u0334\u0321\u0321l\u0334go",
    "🙂",
    "a cat 😀😀😀 and 👩‍👩‍👧‍👦 👍🏽 🇩🇪 ❤️ 1️⃣",
    "emoji😀glued🚀to🎉words",
    "日本語のテキスト、東京タワー",
    "中文，没有空格的句子。",
    "한국어 문장, 한글",
    "\u1112\u1161\u11ab\u1100\u1173\u11af in jamo",
    "Привет, мир! ЁЖ",
    "Καλημέρα κόσμε ΟΔΟΣ",
    "שלום עולם مرحبا بالعالم",
    "नमस्ते दुनिया สวัสดีชาวโลก",
    "ﬁne ﬂower Ⅷ ㎏ ＦＵＬＬ ｗｉｄｔｈ ℌ 𝕬𝖇𝖈",
    "hello!",
    "! !! !!! !a a! ?! !?",
    "(masterpiece:1.2), [best|quality], {a|b}, <lora:x:0.8>, BREAK",
    "snake_case, kebab-case, camelCase, path/to/file.png, user@example.com, https://a.b/c?d=e#f",
    "$100 €50 £20 ¥1000 ©®™ §¶ ±×÷≠≤ ∑∞√ →←↑↓ ★☆",
    "\x00\x01\x1f control\x7f characters\x80\x9f",
    'backslash \\ quote " tick ` tilde ~ caret ^ pipe | underscore _ hash # at @ amp &',
    "tom &amp; jerry &lt;b&gt; &quot;x&quot; &amp;amp; &#39;",
    "broken encoding: schÃ¶n, itâ€™s",
    "<|startoftext|>a<|endoftext|> b",
    "<|STARTOFTEXT|> <|EndOfText|> <|other|> <start_of_text> <end_of_text>",
    "supercalifragilisticexpialidocious pneumonoultramicroscopicsilicovolcanoconiosis",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "in the style of greg rutkowski, artstation, 8 k, octane render, unreal engine 5, " * 6,
    "cat " * 74 + "dog",
    "cat " * 75 + "dog",
    "cat " * 76 + "dog",
    "cat " * 73 + "🙂🦭🙃",
    "\U0010ffff \ue000 \ufffd",
)


def write_text_models() -> None:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    # The second has ids above the end token's, ends twice, and a row that never ends.
    end_is_highest = np.array([[58, 7, 1, 59, 59, 59, 59, 59], [58, 3, 9, 12, 40, 21, 33, 59]])
    end_is_50 = np.array(
        [[49, 57, 50, 3, 50, 50], [49, 9, 12, 50, 0, 0], [49, 5, 6, 7, 8, 59], [50, 1, 2, 3, 4, 5]]
    )
    for name, model, tokens, options in (
        (
            "clip_text",
            CLIPTextModel,
            end_is_highest,
            dict(hidden_size=48, num_hidden_layers=3, hidden_act="quick_gelu", eos_token_id=2),
        ),
        (
            "clip_text_projection",
            CLIPTextModelWithProjection,
            end_is_50,
            dict(hidden_size=32, num_hidden_layers=2, hidden_act="gelu", eos_token_id=50)
            | dict(projection_dim=24),
        ),
    ):
        config = CLIPTextConfig(
            vocab_size=60,
            intermediate_size=4 * options["hidden_size"],
            num_attention_heads=4,
            max_position_embeddings=10,
            bos_token_id=58,
            attn_implementation="eager",
            **options,
        )
        network = model(config).eval()

        def forward(tokens, network=network):
            result = network(tokens, output_hidden_states=True)
            outputs = {f"hidden_{i}": h for i, h in enumerate(result.hidden_states)}
            # Hidden states of the last two blocks are used with the final norm and without.
            depth = network.config.num_hidden_layers
            norm = getattr(network, "text_model", network).final_layer_norm
            outputs[f"normed_{depth - 1}"] = norm(result.hidden_states[-2])
            outputs[f"normed_{depth}"] = result.last_hidden_state
            projected = hasattr(network, "text_projection")
            return outputs | {"pooled": result.text_embeds if projected else result.pooler_output}

        prefix = "text_model." if model is CLIPTextModelWithProjection else ""
        parameters = [
            f"{prefix}embeddings.token_embedding.weight",
            f"{prefix}embeddings.position_embedding.weight",
            f"{prefix}encoder.layers.0.self_attn.q_proj.weight",
            f"{prefix}encoder.layers.0.self_attn.v_proj.bias",
            f"{prefix}encoder.layers.1.self_attn.out_proj.weight",
            f"{prefix}encoder.layers.1.mlp.fc1.weight",
            f"{prefix}encoder.layers.0.layer_norm2.weight",
            f"{prefix}final_layer_norm.bias",
        ]
        if prefix:
            parameters.append("text_projection.weight")
        packages = ("torch", "numpy", "transformers")
        record(name, network, forward, {"tokens": tokens}, parameters, packages=packages)


def write_open_clip() -> None:
    from open_clip.transformer import TextTransformer

    network = TextTransformer(
        context_length=10, vocab_size=60, width=32, heads=4, layers=3, output_dim=24
    )

    def forward(tokens):
        def states(normalize):
            return network.forward_intermediates(
                tokens,
                indices=[0, 1, 2],
                normalize_intermediates=normalize,
                intermediates_only=True,
                output_fmt="NLC",
            )["text_intermediates"]

        outputs = {f"hidden_{i}": h for i, h in enumerate(states(False), start=1)}
        outputs |= {f"normed_{i}": h for i, h in enumerate(states(True), start=1) if i > 1}
        return outputs | {"pooled": network(tokens)}

    tokens = np.array([[58, 7, 1, 59, 0, 0, 0, 0, 0, 0], [58, 3, 9, 12, 40, 21, 33, 5, 2, 59]])
    parameters = (
        "token_embedding.weight",
        "positional_embedding",
        "transformer.resblocks.0.attn.in_proj_weight",
        "transformer.resblocks.1.attn.in_proj_bias",
        "transformer.resblocks.1.attn.out_proj.weight",
        "transformer.resblocks.1.mlp.c_fc.weight",
        "transformer.resblocks.2.mlp.c_proj.bias",
        "transformer.resblocks.0.ln_1.weight",
        "ln_final.weight",
        "text_projection",
    )
    packages = ("torch", "numpy", "open-clip-torch")
    record("clip_open_clip", network, forward, {"tokens": tokens}, parameters, packages=packages)


def write_tokens() -> None:
    from open_clip import tokenizer as open_clip
    from transformers import CLIPTokenizer

    original = open_clip.SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    ids = {names.get(piece, piece): index for piece, index in original.encoder.items()}
    tokenizer = CLIPTokenizer(vocab=ids, merges=list(original.bpe_ranks))

    rows = []
    for prompt in PROMPTS:
        tokens = tokenizer(prompt, truncation=True, max_length=77).input_ids
        padded = tokenizer(prompt, truncation=True, max_length=77, padding="max_length").input_ids
        assert padded == tokens + [49407] * (77 - len(tokens))
        row = {"prompt": prompt, "ids": tokens}
        theirs = np.trim_zeros(original([prompt])[0].numpy(), "b").tolist()  # less its padding
        if theirs != tokens:
            row["open_clip"] = theirs
        rows.append(json.dumps(row))
    packages = ("transformers", "tokenizers", "open-clip-torch", "ftfy")
    versions = {package: version(package) for package in packages}
    TOKENS.parent.mkdir(exist_ok=True)
    joined = ",\n".join(rows)
    text = f'{{"versions": {json.dumps(versions)},\n"prompts": [\n{joined}\n]}}\n'
    TOKENS.write_text(text, encoding="utf-8")
    print(f"{TOKENS}: {len(rows)} prompts, {text.count('open_clip')} differ in OpenCLIP")


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    import torch

    # Beside a CPU build of torch, torchvision (imported by open_clip) misses compiled operators.
    library = torch.library.Library("torchvision", "DEF")
    with contextlib.suppress(RuntimeError):
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    torch.manual_seed(0)
    write_text_models()
    write_open_clip()
    write_tokens()


if __name__ == "__main__":
    main()
