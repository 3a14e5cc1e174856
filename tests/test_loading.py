"""`load`, `save` and LoRAs on small models of published kinds."""

import jax
import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

import ldm_jax
from ldm_jax.interop.files import open_state, write_safetensors
from ldm_jax.interop.opening import export
from ldm_jax.programs import generate
from tests.interop.systems import kl, random_params, system
from tests.interop.test_yaml_config import BUFFERS, CELEBA, changed

LAYER = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_v"


def small(name):
    return system(name) | {"image_size": 16}


@pytest.fixture(scope="module")
def stable(tmp_path_factory):
    path = tmp_path_factory.mktemp("stable") / "model.safetensors"
    config = small("stable-diffusion-1")
    export(path, config, random_params(config))
    return ldm_jax.load(path)


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("lora") / "style.safetensors"
    factors = {
        f"{LAYER}.lora_down.weight": rng.standard_normal((2, 64), np.float32),
        f"{LAYER}.lora_up.weight": rng.standard_normal((64, 2), np.float32),
        f"{LAYER}.alpha": np.float32(1.0),
    }
    save_file({k: np.asarray(v) for k, v in factors.items()}, path)
    return path


def test_a_lora_beside_the_model_is_the_one_merged_into_it(stable, lora):
    plain = stable("a cat", steps=2)
    with_lora = stable.with_lora(lora, scale=0.5)
    before = generate.jitted._cache_size()
    half = with_lora("a cat", steps=2)
    assert np.abs(half - plain).max() > 1e-3
    whole = with_lora.with_scales(1.0)("a cat", steps=2)
    assert np.abs(whole - half).max() > 1e-3
    np.testing.assert_allclose(with_lora.with_scales(0.0)("a cat", steps=2), plain, atol=1e-5)
    assert generate.jitted._cache_size() == before + 1, "another scale is another input, no more"
    np.testing.assert_allclose(with_lora.merged()("a cat", steps=2), half, atol=1e-5)
    kernel = "input_blocks_1_1", "transformer_blocks_0", "attn2", "to_v", "kernel"
    theirs, ours = with_lora.merged().params["unet"], stable.params["unet"]
    for key in kernel:
        theirs, ours = theirs[key], ours[key]
    assert np.abs(theirs - ours).max() > 0.01
    with pytest.raises(ValueError, match="2 scales for 1 LoRAs"):
        with_lora.with_scales(1.0, 2.0)


def test_saving_folds_the_lora_in(stable, lora, tmp_path):
    with_lora = stable.with_lora(lora, scale=0.5)
    with_lora.save(tmp_path / "model.safetensors")
    again = ldm_jax.load(tmp_path / "model.safetensors")
    assert again.loras == ()
    jax.tree.map(np.testing.assert_array_equal, again.params, with_lora.merged().params)


@pytest.mark.parametrize("layout", ["diffusers", "compvis", "single_file"])
def test_every_layout_comes_back_bit_for_bit(stable, tmp_path, layout):
    path = tmp_path / ("folder" if layout == "diffusers" else "file.safetensors")
    stable.save(path, layout=layout)
    again = ldm_jax.load(path)
    jax.tree.map(np.testing.assert_array_equal, again.params, stable.params)
    assert again.config["unet"]["num_heads"] == 8


def test_an_autoencoder_alone_encodes_decodes_and_replaces_another(stable, tmp_path):
    config = small("sd-vae") | {"autoencoder": kl(0.5)}
    export(tmp_path / "vae.safetensors", config, random_params(config, seed=3))
    vae = ldm_jax.load(tmp_path / "vae.safetensors")
    pictures = np.random.default_rng(0).uniform(size=(2, 16, 16, 3)).astype(np.float32)
    latents = vae.encode(pictures)
    assert latents.shape == (2, 8, 8, 4) and vae.decode(latents).shape == pictures.shape
    stable.save(tmp_path / "model.safetensors")
    other = ldm_jax.load(tmp_path / "model.safetensors", autoencoder=tmp_path / "vae.safetensors")
    # The latents' scale is what the denoiser was trained on, and stays.
    assert other.autoencoder.scale_factor == 0.18215
    np.testing.assert_allclose(other.encode(pictures), latents * 0.18215 / 0.5, rtol=1e-4)
    wide = system("sd-vae") | {"autoencoder": kl(0.5, z=8)}
    export(tmp_path / "wide.safetensors", wide, random_params(wide))
    with pytest.raises(ValueError, match="wide.safetensors .* has latents of 8 channels"):
        ldm_jax.load(tmp_path / "model.safetensors", autoencoder=tmp_path / "wide.safetensors")


def test_parts_from_elsewhere_draw_what_the_whole_model_does(stable, tmp_path):
    whole, unet = tmp_path / "whole.safetensors", tmp_path / "unet.safetensors"
    stable.save(whole, layout="compvis")
    tensors = open_state(whole)
    kept = {name: t for name, t in tensors.items() if name.startswith("model.diffusion_model.")}
    write_safetensors(unet, kept)
    pipe = ldm_jax.load(unet, autoencoder=whole, text=whole)
    size = dict(height=16, width=16)
    np.testing.assert_array_equal(pipe("a cat", steps=2, **size), stable("a cat", steps=2, **size))


def test_a_model_of_ones_own_draws_as_its_yaml_says(tmp_path):
    """With half the heads and other noise than the published model's of that shape."""
    config = small("ldm-celebahq-256")
    params = random_params(config)
    export(tmp_path / "model.ckpt", config, params, layout="compvis")
    kept = {n: t for n, t in open_state(tmp_path / "model.ckpt").items() if n not in BUFFERS}
    write_safetensors(tmp_path / "model.ckpt", kept)
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(changed(CELEBA, "parameterization", "eps")))
    pipe = ldm_jax.load(tmp_path / "model.ckpt", config=tmp_path / "model.yaml")
    del config["unet"]["num_head_channels"]
    config["unet"]["num_heads"] = 2
    config["diffusion"]["schedule"] |= dict(start=0.001, end=0.03, timesteps=500)
    export(tmp_path / "ours", config, params)
    ours = ldm_jax.load(tmp_path / "ours")(steps=2)
    np.testing.assert_array_equal(pipe(steps=2), ours)
    plain = ldm_jax.load(tmp_path / "model.ckpt")(steps=2, height=16, width=16)
    assert np.abs(plain - ours).max() > 1e-3


def test_bfloat16_halves_the_parameters(stable, tmp_path):
    stable.save(tmp_path / "model.safetensors", dtype="bfloat16")
    pipe = ldm_jax.load(tmp_path / "model.safetensors", dtype="bfloat16")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(pipe.params)} == {"bfloat16"}
    with pytest.raises(ValueError, match="dtype='int8': choose float32 or bfloat16"):
        ldm_jax.load(dtype="int8")


def test_an_unknown_layout_lists_the_known(stable, tmp_path):
    with pytest.raises(ValueError, match="layout='onnx': choose one of single_file, compvis"):
        stable.save(tmp_path / "x", layout="onnx")
