"""Files of textual inversions: what is read, what is written, and what is refused."""

import numpy as np
import pytest

import ldm_jax
from ldm_jax.diffusion.plan import Guidance
from ldm_jax.interop.embeddings import read_embeddings, write_embedding
from ldm_jax.interop.files import open_state, write_safetensors
from ldm_jax.interop.native import save_model
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.pipeline import Pipeline
from tests import tiny_models
from tests.interop.test_pickle_reader import Call, Global, tensor, write_zip

MODEL = tiny_models.config(
    tiny_models.STABLE["conditioning"], channel_mult=[1], attention_resolutions=[1], context_dim=16
)
PARAMS = tiny_models.random_params(MODEL, scale=0.3)
ROWS = np.random.default_rng(0).standard_normal((2, 16)).astype(np.float32)
WIDER = dict(tiny_models.clip(24, heads=2, padding="zero", zero_null=True, pooled=True))
XL = tiny_models.XL | {
    "conditioning": tiny_models.XL["conditioning"] | {"text_2": WIDER},
}


@pytest.fixture(scope="module")
def pipe():
    return Pipeline(LatentDiffusion.from_config(MODEL), PARAMS, MODEL)


def written(path, **tensors):
    write_safetensors(path, tensors)
    return path


def of(path, config=MODEL, token=""):
    return {name: vectors for name, vectors in read_embeddings(path, config, token)}


def same(found, expected):
    assert found.keys() == expected.keys()
    for token, vectors in expected.items():
        assert found[token].keys() == vectors.keys()
        for encoder, rows in vectors.items():
            assert found[token][encoder].dtype == np.float32
            np.testing.assert_array_equal(found[token][encoder], rows)


def test_diffusers_format(tmp_path):
    path = written(tmp_path / "learned_embeds.safetensors", **{"<cat>": ROWS, "<dog>": ROWS[0]})
    same(of(path), {"<cat>": {"text": ROWS}, "<dog>": {"text": ROWS[:1]}})
    same(of(tmp_path), of(path))  # a folder, as a workdir is
    half = written(tmp_path / "half.safetensors", **{"<cat>": ROWS.astype(np.float16)})
    same(of(half, token="<x>"), {"<x>": {"text": ROWS.astype(np.float16).astype(np.float32)}})


def test_a1111_format(tmp_path):
    path = written(tmp_path / "Easy.safetensors", emb_params=ROWS)
    same(of(path), {"Easy": {"text": ROWS}})
    same(of(path, token="<x>"), {"<x>": {"text": ROWS}})


@pytest.mark.parametrize("container", ["dict", "ParameterDict"])
def test_what_torch_wrote(container, tmp_path):
    """stable-diffusion-webui's own files, and those of the first implementation."""
    vectors = {"*": tensor("0", (2, 16), (16, 1), numel=32)}
    ids = {"*": 265}
    if container == "ParameterDict":
        kind = Global("torch.nn.modules.container", "ParameterDict")
        state = {"training": True, "_parameters": vectors, "_keys": {"*": None}}
        vectors = Call(kind, (), state)
        ids = {"*": tensor("1", (), (), numel=1, kind="LongStorage")}
    tree = {"string_to_token": ids, "string_to_param": vectors, "name": "other", "step": 100}
    storages = {"0": ROWS, "1": np.array([265], np.int64)}
    path = write_zip(tmp_path / "mine.pt", tree, storages)
    same(of(path), {"mine": {"text": ROWS}})


def test_sdxl_has_vectors_for_both_encoders(tmp_path):
    wide = np.ones((2, 24), np.float32)
    path = written(tmp_path / "style.safetensors", clip_l=ROWS, clip_g=wide)
    same(of(path, XL), {"style": {"text": ROWS, "text_2": wide}})
    second = written(tmp_path / "second.safetensors", **{"<cat>": wide})
    same(of(second, XL), {"<cat>": {"text_2": wide}})
    with pytest.raises(
        ValueError, match="of SDXL, for two text encoders, and here is one, 16 wide"
    ):
        of(path)


@pytest.mark.parametrize("layout", ["diffusers", "a1111"])
def test_what_is_written_is_read(layout, tmp_path):
    path = tmp_path / "x.safetensors"
    write_embedding(path, "<x>", {"text": ROWS}, layout)
    same(of(path), {{"diffusers": "<x>", "a1111": "x"}[layout]: {"text": ROWS}})
    write_embedding(path, "<x>", {"text": ROWS, "text_2": np.ones((2, 24))}, layout)
    assert set(open_state(path)) == {"clip_l", "clip_g"}
    same(of(path, XL), {"<x>": {"text": ROWS, "text_2": np.ones((2, 24), np.float32)}})
    with pytest.raises(ValueError, match="layout='pt': choose one of diffusers, a1111"):
        write_embedding(path, "<x>", {"text": ROWS}, "pt")


def test_a_pipeline_with_embeddings(pipe, tmp_path):
    """A token with the vectors of two words draws what the words draw; several files at once."""
    table = PARAMS["text"]["token_embedding"]["embedding"]
    (ids,) = pipe.model.embedders[0].tokenizer.pieces(["red apple"])
    first = written(tmp_path / "first.safetensors", **{"<x>": table[ids]})
    second = written(tmp_path / "second.safetensors", emb_params=table[ids[:1]])
    both = pipe.with_embedding(first).with_embedding(second, "<red>")
    words = pipe.embed(["a red apple", "red red apple"]).context
    named = both.embed(["a <x>", "<red> <X>"]).context
    np.testing.assert_array_equal(named, words)
    np.testing.assert_array_equal(both.embed("a cat").context, pipe.embed("a cat").context)
    weighted = both.with_prompt_syntax("a1111")
    assert weighted.with_embedding(first, "<y>").prompt_syntax == "a1111"

    both.save(tmp_path / "model.safetensors")
    again = ldm_jax.load(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(again.embed(["a <x>", "<red> <x>"]).context, named)
    for layout in ("diffusers", "compvis"):
        with pytest.raises(ValueError, match="no place for the embedding of '<x>': use 'single_f"):
            both.save(tmp_path / "other", layout=layout)
    assert not (tmp_path / "other").exists()
    with pytest.raises(ValueError, match="weak: a model of other latents"):
        both("a <x>", guidance=Guidance(2.0, weak=pipe))


BAD = {
    "width": (
        dict(learned=np.ones((1, 768))), "",
        "768 wide, as those of Stable Diffusion 1, and here they are 16 wide"),
    "other width": (dict(learned=np.ones((1, 20))), "", "holds vectors 20 wide, and here they are"),
    "exists": (dict(dog=ROWS), "", "already has the token 'dog'; another name: PATH:NAME"),
    "twice": (dict(mine=ROWS), "<MINE>", "the model already has the token '<MINE>'"),
    "no word": ({"<x>": ROWS}, "a b", "a token is a word without spaces, not 'a b'"),
    "long": ({"<x>": np.ones((76, 16))}, "", "76 vectors of '<x>', and a prompt has room"),
    "nothing": (dict(weight=np.ones((2, 3, 4))), "", "holds no embedding: its 1 keys are weight"),
    "several": (dict(a=ROWS, b=ROWS), "<x>", "holds 2 tokens, so they cannot be called <x>"),
    "nan": (dict(learned=np.full((1, 16), np.nan)), "", "the vectors of 'learned' are not finite"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_what_does_not_fit_is_refused_in_a_sentence(what, pipe, tmp_path):
    tensors, token, message = BAD[what]
    tensors = {name: np.float32(array) for name, array in tensors.items()}
    path = written(tmp_path / "file.safetensors", **tensors)
    if what == "twice":
        pipe = pipe.with_embedding(path, "<mine>")
    with pytest.raises(ValueError, match=message):
        pipe.with_embedding(path, token)


def test_a_model_without_prompts_and_a_file_of_another_kind(pipe, tmp_path):
    path = written(tmp_path / "file.safetensors", learned=ROWS)
    with pytest.raises(ValueError, match="an embedding is for models that take prompts"):
        read_embeddings(path, tiny_models.LABELS)
    save_model(tmp_path / "model.safetensors", MODEL, PARAMS)
    with pytest.raises(ValueError, match="holds no embedding: its .* keys are"):
        pipe.with_embedding(tmp_path / "model.safetensors")
    with pytest.raises(FileNotFoundError, match="where a file of weights was expected"):
        pipe.with_embedding(tmp_path / "none.safetensors")
