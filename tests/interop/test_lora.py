"""LoRAs of every spelling change what they should, exactly; those of other models are refused."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file

from ldm_jax.interop.changes import Factors, delta, merge
from ldm_jax.interop.layout import shapes
from ldm_jax.interop.lora import read_lora

TEXT = dict(vocab_size=20, width=8, depth=2, heads=2, max_length=7)
CONFIG = {
    "unet": dict(
        model_channels=8,
        channel_mult=[1, 2],
        num_res_blocks=1,
        attention_resolutions=[1, 2],
        num_heads=2,
        context_dim=768,
        num_classes="sequential",
        adm_in_channels=10,
        groups=4,
    ),
    "conditioning": {
        "text": dict(kind="clip", network=TEXT),
        "text_2": dict(kind="clip", network=TEXT | dict(projection=6)),
    },
}
# By hand: what files call factors and layers, and our path of the kernel.
KOHYA = ("lora_{}.lora_down.weight", "lora_{}.lora_up.weight")
PEFT = ("{}.lora_A.weight", "{}.lora_B.weight")
NAMED = ("{}.lora_A.default.weight", "{}.lora_B.default.weight")
OLDER = ("{}.lora.down.weight", "{}.lora.up.weight")
PROCESSOR = ("{}_lora.down.weight", "{}_lora.up.weight")
TEXT_OLDER = ("{}.lora_linear_layer.down.weight", "{}.lora_linear_layer.up.weight")
UNET, DEEP = "unet/input_blocks_1_1/transformer_blocks_0", "unet/middle_block_1"
DOWN = "down_blocks.0.attentions.0.transformer_blocks.0"
LAYERS = "text_model.encoder.layers"
KOHYA_DOWN, KOHYA_LAYERS = DOWN.replace(".", "_"), LAYERS.replace(".", "_")
FIRST = f"{KOHYA_DOWN}_attn1_to_q"
WIDTH = f"unet_{KOHYA_DOWN}_attn2_to_k"
FILES = {
    "kohya": {
        KOHYA: {
            f"unet_{KOHYA_DOWN}_attn1_to_q": f"{UNET}/attn1/to_q",
            f"unet_{KOHYA_DOWN}_attn2_to_k": f"{UNET}/attn2/to_k",
            f"unet_{KOHYA_DOWN}_attn1_to_out_0": f"{UNET}/attn1/to_out",
            f"unet_{KOHYA_DOWN}_ff_net_0_proj": f"{UNET}/ff/proj_in",
            f"unet_{KOHYA_DOWN}_ff_net_2": f"{UNET}/ff/proj_out",
            "unet_mid_block_attentions_0_proj_in": f"{DEEP}/proj_in",
            "unet_mid_block_resnets_1_conv2": "unet/middle_block_2/out_layers_3",
            "unet_mid_block_resnets_0_time_emb_proj": "unet/middle_block_0/emb_layers_1",
            "unet_up_blocks_0_resnets_1_conv1": "unet/output_blocks_1_0/in_layers_2",
            "unet_up_blocks_0_resnets_0_conv_shortcut": "unet/output_blocks_0_0/skip_connection",
            "unet_up_blocks_0_upsamplers_0_conv": "unet/output_blocks_1_2",
            "unet_down_blocks_0_downsamplers_0_conv": "unet/input_blocks_2_0",
            "unet_time_embedding_linear_1": "unet/time_embed_0",
            f"te_{KOHYA_LAYERS}_1_self_attn_q_proj": "text/layers_1/self_attn/q_proj",
            f"te1_{KOHYA_LAYERS}_0_mlp_fc1": "text/layers_0/mlp/fc1",
            f"te2_{KOHYA_LAYERS}_0_self_attn_out_proj": "text_2/layers_0/self_attn/out_proj",
        },
    },
    "kohya for SDXL": {
        KOHYA: {
            "unet_input_blocks_1_1_transformer_blocks_0_attn2_to_v": f"{UNET}/attn2/to_v",
            "unet_input_blocks_1_1_transformer_blocks_0_attn1_to_out_0": f"{UNET}/attn1/to_out",
            "unet_input_blocks_2_0_op": "unet/input_blocks_2_0",
            "unet_middle_block_1_proj_out": f"{DEEP}/proj_out",
            "unet_output_blocks_1_2_conv": "unet/output_blocks_1_2",
            "unet_output_blocks_0_0_skip_connection": "unet/output_blocks_0_0/skip_connection",
            "unet_time_embed_2": "unet/time_embed_2",
            "unet_label_emb_0_0": "unet/label_emb_0_0",
            "unet_out_2": "unet/out_2",
        },
    },
    "peft": {
        PEFT: {
            f"unet.{DOWN}.attn2.to_q": f"{UNET}/attn2/to_q",
            "unet.add_embedding.linear_2": "unet/label_emb_0_2",
            f"text_encoder.{LAYERS}.0.mlp.fc2": "text/layers_0/mlp/fc2",
            "text_encoder.encoder.layers.1.mlp.fc2": "text/layers_1/mlp/fc2",
            "text_encoder_2.text_projection": "text_2/text_projection",
        },
        NAMED: {"unet.down_blocks.1.resnets.0.conv1": "unet/input_blocks_3_0/in_layers_2"},
    },
    "diffusers": {
        OLDER: {f"unet.{DOWN}.attn1.to_out.0": f"{UNET}/attn1/to_out"},
        PROCESSOR: {
            f"unet.{DOWN}.attn2.processor.to_q": f"{UNET}/attn2/to_q",
            f"unet.{DOWN}.attn2.processor.to_out": f"{UNET}/attn2/to_out",
            f"text_encoder.{LAYERS}.0.self_attn.to_v": "text/layers_0/self_attn/v_proj",
            f"text_encoder.{LAYERS}.1.self_attn.to_out": "text/layers_1/self_attn/out_proj",
        },
        TEXT_OLDER: {f"text_encoder.{LAYERS}.0.self_attn.k_proj": "text/layers_0/self_attn/k_proj"},
    },
    "processors": {PROCESSOR: {f"{DOWN}.attn1.processor.to_k": f"{UNET}/attn1/to_k"}},
    "CompVis": {PEFT: {"diffusion_model.middle_block.1.proj_in": f"{DEEP}/proj_in"}},
}


@pytest.fixture(scope="module")
def leaves():
    """Shape of every leaf of the model."""
    sections = CONFIG["conditioning"]
    networks = {name: shapes("clip", sections[name]["network"]) for name in ("text", "text_2")}
    networks["unet"] = shapes("unet", CONFIG["unet"])
    return {f"{name}/{path}": shape for name in networks for path, shape in networks[name].items()}


def integers(rng, *shape, dtype=np.float32):
    """Numbers of which sums and products are exact."""
    return rng.integers(-3, 4, shape).astype(dtype)


def factors(rng, shape, rank=2, dtype=np.float32):
    """torch's factors of a kernel (…, in, out)."""
    *space, inputs, outputs = shape
    down = integers(rng, rank, inputs, *space, dtype=dtype)
    return down, integers(rng, outputs, rank, *[1] * len(space), dtype=dtype)


def keyed(keys, name, pair):
    """The two factors as a file has them."""
    return {key.format(name): part for key, part in zip(keys, pair, strict=True)}


def change(down, up):
    """Their product as our kernel."""
    product = np.einsum("or,ri...->oi...", np.float32(up.reshape(len(up), -1)), np.float32(down))
    return product.transpose(*range(2, product.ndim), 1, 0)


@pytest.fixture
def write(tmp_path):
    def write(tensors, **header):
        path = tmp_path / "lora.safetensors"
        tensors = {key: np.asarray(value) for key, value in tensors.items()}
        save_file(tensors, path, {key: json.dumps(value) for key, value in header.items()})
        return path

    return write


@pytest.mark.parametrize("style", FILES)
def test_each_layer_is_found_under_its_name(style, leaves, write):
    rng, tensors, expected = np.random.default_rng(0), {}, {}
    named = [(keys, *item) for keys, layers in FILES[style].items() for item in layers.items()]
    for keys, name, path in named:
        pair = factors(rng, leaves[f"{path}/kernel"], dtype=np.float16)
        if keys is KOHYA:
            tensors[f"lora_{name}.alpha"] = np.float16(1.0)
        tensors |= keyed(keys, name, pair)
        expected[f"{path}/kernel"] = change(*pair) * (0.5 if keys is KOHYA else 1.0)
    lora = read_lora(write(tensors), CONFIG)
    assert lora.keys() == expected.keys()
    for path, (down, up) in lora.items():
        assert (down.dtype, up.dtype) == (np.float32, np.float32)
        assert (*down.shape[:-1], up.shape[-1]) == leaves[path]
        np.testing.assert_array_equal(down @ up, expected[path], err_msg=path)


def test_matrices_and_convolutions_of_one_pixel_may_have_their_ones_or_not(leaves, write):
    rng = np.random.default_rng(0)
    paths = {
        "unet_mid_block_attentions_0_proj_in": f"{DEEP}/proj_in/kernel",
        "unet_input_blocks_3_0_skip_connection": "unet/input_blocks_3_0/skip_connection/kernel",
    }
    matrices = {name: factors(rng, leaves[path][-2:]) for name, path in paths.items()}
    read = []
    for ones in [(), (1, 1)]:
        tensors = {}
        for name, pair in matrices.items():
            tensors |= keyed(KOHYA, name, [part.reshape(*part.shape, *ones) for part in pair])
        read.append(read_lora(write(tensors), CONFIG))
    for name, path in paths.items():
        expected = change(*matrices[name]).reshape(leaves[path])
        for lora in read:
            np.testing.assert_array_equal(np.matmul(*lora[path]), expected)


def test_merged_matrix_is_W_x_plus_scaled_up_of_down_of_x(leaves, write):
    rng, rank, alpha, scale = np.random.default_rng(1), 4, 8.0, 0.5
    path = f"{UNET}/attn1/to_q/kernel"
    inputs, outputs = leaves[path]
    down, up = factors(rng, (inputs, outputs), rank)
    tensors = keyed(KOHYA, f"unet_{FIRST}", (down, up))
    tensors[f"lora_unet_{FIRST}.alpha"] = np.float32(alpha)
    weight, x = integers(rng, outputs, inputs), integers(rng, 5, inputs)
    params = unflatten_dict({path: weight.T}, sep="/")

    merged = flatten_dict(merge(params, read_lora(write(tensors), CONFIG), scale), sep="/")[path]
    expected = x @ weight.T + scale * alpha / rank * (x @ down.T) @ up.T
    np.testing.assert_array_equal(x @ merged, expected)


def test_merged_convolution_is_that_of_W_plus_scaled_up_of_down(leaves, write):
    """down has the kernel's windows and up is 1×1, both applied by torch's layout."""
    rng, rank, alpha, scale = np.random.default_rng(2), 2, 1.0, 4.0
    path = "unet/input_blocks_2_0/kernel"
    *_, inputs, outputs = leaves[path]
    down, up = factors(rng, leaves[path], rank)
    assert down.shape == (rank, inputs, 3, 3) and up.shape == (outputs, rank, 1, 1)
    name = "unet_down_blocks_0_downsamplers_0_conv"
    tensors = keyed(KOHYA, name, (down, up))
    tensors[f"lora_{name}.alpha"] = np.float32(alpha)
    weight, x = integers(rng, outputs, inputs, 3, 3), integers(rng, 1, inputs, 6, 6)

    def conv(x, kernel, layout=("NCHW", "OIHW", "NCHW"), padding=1):
        edges = [(padding, padding)] * 2
        convolve = jax.lax.conv_general_dilated
        return convolve(x, kernel, (1, 1), edges, dimension_numbers=layout)

    params = unflatten_dict({path: weight.transpose(2, 3, 1, 0)}, sep="/")
    merged = flatten_dict(merge(params, read_lora(write(tensors), CONFIG), scale), sep="/")[path]
    ours = conv(x.transpose(0, 2, 3, 1), merged, ("NHWC", "HWIO", "NHWC"))
    expected = conv(x, weight) + scale * alpha / rank * conv(conv(x, down), up, padding=0)
    np.testing.assert_array_equal(ours.transpose(0, 3, 1, 2), expected)


LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
WINDOWS = {"matrix": f"{UNET}/attn2/to_k", "convolution": "unet/input_blocks_2_0"}
CALLED = {"matrix": WIDTH, "convolution": "unet_down_blocks_0_downsamplers_0_conv"}


def torch_shape(shape):
    return *shape[:-3:-1], *shape[:-2]


def loha(rng, out, inputs, *space, rank=2):
    """LyCORIS' parts and the change that they define, both in torch's layout."""
    parts, sides = {}, []
    for i in (1, 2):
        a, b = integers(rng, out, rank), integers(rng, rank, inputs * int(np.prod(space)))
        parts |= {f"hada_w{i}_a": a, f"hada_w{i}_b": b}
        sides.append((a @ b).reshape(out, inputs, *space))
    return parts, sides[0] * sides[1]


def loha_with_cores(rng, out, inputs, *space, rank=2):
    parts, sides = {}, []
    for i in (1, 2):
        a, b, t = (
            integers(rng, rank, out),
            integers(rng, rank, inputs),
            integers(rng, rank, rank, *space),
        )
        parts |= {f"hada_w{i}_a": a, f"hada_w{i}_b": b, f"hada_t{i}": t}
        sides.append(np.einsum("pq...,po,qi->oi...", t, a, b))
    return parts, sides[0] * sides[1]


def kronecker(outer, inner):
    """Of matrices, for every place of a window."""
    windows = inner.reshape(*inner.shape[:2], -1)
    product = np.stack([np.kron(outer, windows[..., i]) for i in range(windows.shape[-1])], axis=-1)
    return product.reshape(*product.shape[:2], *inner.shape[2:])


def lokr(left, right):
    """`left`: "whole" or "factors"; `right`, too, or "core"."""

    def make(rng, out, inputs, *space, rank=2):
        parts = {}
        if left == "whole":
            outer = parts["lokr_w1"] = integers(rng, 2, 4)
        else:
            parts |= dict(lokr_w1_a=integers(rng, 2, rank), lokr_w1_b=integers(rng, rank, 4))
            outer = parts["lokr_w1_a"] @ parts["lokr_w1_b"]
        shape = out // 2, inputs // 4
        if right == "whole":
            inner = parts["lokr_w2"] = integers(rng, *shape, *space)
        elif right == "factors":
            columns = shape[1] * int(np.prod(space))
            a, b = integers(rng, shape[0], rank), integers(rng, rank, columns)
            parts |= dict(lokr_w2_a=a, lokr_w2_b=b)
            inner = (a @ b).reshape(*shape, *space)
        else:
            a, b = (integers(rng, rank, n) for n in shape)
            t = integers(rng, rank, rank, *space)
            parts |= dict(lokr_w2_a=a, lokr_w2_b=b, lokr_t2=t)
            inner = np.einsum("pq...,po,qi->oi...", t, a, b)
        return parts, kronecker(outer, inner)

    return make


def locon(rng, out, inputs, *space, rank=2):
    """LoCon with a middle factor, as kohya's scripts and LyCORIS write it."""
    down, up = integers(rng, rank, inputs, 1, 1), integers(rng, out, rank, 1, 1)
    mid = integers(rng, rank, rank, *space)
    parts = {"lora_down.weight": down, "lora_up.weight": up, "lora_mid.weight": mid}
    return parts, np.einsum("pq...,op,qi->oi...", mid, up[..., 0, 0], down[..., 0, 0])


@pytest.mark.parametrize("kind, make", [
    *((kind, make) for kind in WINDOWS for make in (loha, lokr("whole", "whole"))),
    *((kind, lokr(left, "factors")) for kind in WINDOWS for left in ("whole", "factors")),
    *(("convolution", make) for make in (loha_with_cores, lokr("whole", "core"), locon)),
])  # fmt: skip
def test_each_method_makes_the_change_that_it_defines(kind, make, leaves, write):
    """Δ by hand in torch's layout; alpha over the rank, but where no factor has a rank."""
    path = f"{WINDOWS[kind]}/kernel"
    parts, expected = make(np.random.default_rng(0), *torch_shape(leaves[path]))
    tensors = {f"lora_{CALLED[kind]}.{part}": tensor for part, tensor in parts.items()}
    ranked = any(part.endswith(("_b", "weight")) for part in parts)
    (change,) = read_lora(write(tensors | {f"lora_{CALLED[kind]}.alpha": 4.0}), CONFIG).values()
    assert delta(change).shape == leaves[path]
    expected = expected.transpose(*range(2, expected.ndim), 1, 0) * (2.0 if ranked else 1.0)
    np.testing.assert_array_equal(delta(change), expected)
    kernel = integers(np.random.default_rng(1), *leaves[path])
    merged = merge(unflatten_dict({path: kernel}, sep="/"), {path: change}, 0.5)
    np.testing.assert_array_equal(flatten_dict(merged, sep="/")[path], kernel + 0.5 * expected)


@pytest.mark.parametrize("kind", WINDOWS)
@pytest.mark.parametrize("norms", ["peft", "of outputs", "of inputs"])
def test_decomposed_kernels_have_the_norms_of_the_file(norms, kind, leaves, write):
    """m·(W + sΔ)/‖W + sΔ‖ (Liu et al. 2024): peft's norms are of outputs, LyCORIS' of either."""
    rng, path = np.random.default_rng(0), f"{WINDOWS[kind]}/kernel"
    out, inputs, *space = torch_shape(leaves[path])
    down, up = factors(rng, leaves[path])
    ones = [1] * len(space)
    shape = {"of outputs": (out, 1, *ones), "of inputs": (1, inputs, *ones)}.get(
        norms, (1, out, *ones)
    )
    magnitude = rng.uniform(0.5, 2.0, shape).astype(np.float32)
    if norms == "peft":
        magnitude = magnitude if space else magnitude[0]
        tensors = keyed(PEFT, f"unet.{DOWN}.attn2.to_k", (down, up))
        tensors = (
            tensors
            if not space
            else keyed(PEFT, "unet.down_blocks.0.downsamplers.0.conv", (down, up))
        )
        name = next(iter(tensors)).removesuffix(".lora_A.weight") + ".lora_magnitude_vector"
    else:
        tensors, name = keyed(KOHYA, CALLED[kind], (down, up)), f"lora_{CALLED[kind]}.dora_scale"
    lora = read_lora(write(tensors | {name: magnitude}), CONFIG)
    kernel = integers(rng, *leaves[path])
    merged = merge(unflatten_dict({path: kernel}, sep="/"), lora, 0.5)
    found = flatten_dict(merged, sep="/")[path]
    inner = kernel + 0.5 * change(down, up)
    kept = -2 if norms == "of inputs" else -1
    axes = tuple(i for i in range(inner.ndim) if i != inner.ndim + kept)
    shape = [1] * inner.ndim
    shape[kept] = -1
    expected = magnitude.reshape(shape) * inner / np.sqrt(np.sum(inner**2, axes, keepdims=True))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    lengths = np.sqrt(np.sum(np.square(found), axes))
    np.testing.assert_allclose(lengths, magnitude.reshape(-1), rtol=1e-5)


def test_merge_changes_nothing_else_and_keeps_types():
    lora = {"a/b/kernel": Factors(np.ones((2, 1), np.float32), np.full((1, 3), 2.0, np.float32))}
    other = np.arange(4.0)
    b = {"kernel": np.ones((2, 3), ml_dtypes.bfloat16), "bias": other}
    params = {"a": {"b": b, "none": {}}, "c": {"kernel": other}}
    merged = merge(params, lora, 0.5)
    assert merged["a"]["b"]["kernel"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(merged["a"]["b"]["kernel"].astype(np.float32), 2.0)
    assert merged["a"]["b"]["bias"] is other and merged["c"]["kernel"] is other
    assert merged["a"]["none"] == {}
    np.testing.assert_array_equal(params["a"]["b"]["kernel"].astype(np.float32), 1.0)


def test_strength_is_traced():
    lora = {"a/kernel": Factors(jnp.ones((2, 1)), jnp.ones((1, 2)))}
    traces = []

    @jax.jit
    def weights(params, lora, scale):
        traces.append(scale)
        return merge(params, lora, scale)["a"]["kernel"]

    params = {"a": {"kernel": jnp.zeros((2, 2))}}
    for scale in (0.0, 0.25, -1.0):
        np.testing.assert_array_equal(weights(params, lora, scale), np.full((2, 2), scale))
    assert len(traces) == 1


def test_merge_refuses_params_of_another_model():
    lora = {"a/kernel": Factors(np.ones((2, 1)), np.ones((1, 2)))}
    with pytest.raises(ValueError, match=r"a/kernel of shape \(2, 2\), which here is \(3, 2\)"):
        merge({"a": {"kernel": np.ones((3, 2))}}, lora)
    with pytest.raises(ValueError, match=r"a/kernel of shape \(2, 2\), which here is None"):
        merge({"b": {}}, lora)


def one_layer(leaves):
    pair = factors(np.random.default_rng(0), leaves[f"{UNET}/attn1/to_q/kernel"], 4)
    return keyed(KOHYA, f"unet_{FIRST}", pair)


@pytest.mark.parametrize(
    "header, scale",
    [
        ({}, 1.0),
        ({"unet.lora_alpha": 2}, 0.5),
        ({"unet.lora_alpha": 2, "unet.use_rslora": True}, 1.0),
        ({"unet.lora_alpha": 2, "unet.alpha_pattern": {"attn1.to_q": 16}}, 4.0),
        ({"unet.lora_alpha": 2, "unet.alpha_pattern": {"attn2.to_q": 16, "tn1.to_q": 16}}, 0.5),
    ],
)
def test_alpha_of_the_header_that_diffusers_writes(header, scale, leaves, write):
    """Of rank 4; what peft makes of lora_alpha, alpha_pattern and use_rslora."""
    down, up = factors(np.random.default_rng(0), leaves[f"{UNET}/attn1/to_q/kernel"], 4)
    tensors = keyed(PEFT, f"unet.{DOWN}.attn1.to_q", (down, up))
    lora = read_lora(write(tensors, lora_adapter_metadata=header), CONFIG)
    (found,) = lora.values()
    np.testing.assert_array_equal(np.matmul(*found), scale * change(down, up))


def test_alphas_that_are_kept_apart(leaves, write):
    path, name = write(one_layer(leaves)), f"lora_unet_{FIRST}"
    whole, half = (read_lora(path, CONFIG, alphas) for alphas in (None, {name: 2.0}))
    (whole,), (half,) = whole.values(), half.values()
    np.testing.assert_array_equal(half.up, 0.5 * whole.up)


def test_folder_that_diffusers_wrote_and_a_workdir(leaves, write):
    path = write(one_layer(leaves))
    assert len(read_lora(path.parent, CONFIG)) == 1
    path = path.rename(path.with_name("other.safetensors"))
    with pytest.raises(FileNotFoundError, match=r"looked for .*pytorch_lora_weights\.safetensors"):
        read_lora(path.parent, CONFIG)
    path.rename(path.with_name("pytorch_lora_weights.safetensors"))
    assert len(read_lora(path.parent, CONFIG)) == 1


@pytest.mark.parametrize(
    "key, method",
    [
        (f"lora_unet_{FIRST}.oft_blocks", "OFT"),
        (f"lora_unet_{FIRST}.on_input", "IA3"),
        (f"lora_unet_{FIRST}.a1.weight", "GLoRA"),
        (f"lora_unet_{FIRST}.w_norm", "norms"),
        (f"lora_unet_{FIRST}.diff", "not of low rank"),
        ("unet.conv_in.lora_B.bias", "LoRA with biases"),
    ],
)
def test_other_methods_are_refused_by_name(key, method, leaves, write):
    with pytest.raises(ValueError, match=f"{method}.*LoRA, LoHa, LoKr and DoRA can be read: {key}"):
        read_lora(write(one_layer(leaves) | {key: np.ones(1, np.float32)}), CONFIG)


def zeros(keys, name, down=(4, 8), up=(8, 4)):
    return keyed(keys, name, (np.zeros(down, np.float32), np.zeros(up, np.float32)))


ZEROS = np.zeros((4, 8), np.float32)
SDXL = "unet_input_blocks_7_1_transformer_blocks_{}_attn2_to_k"
WRONG = {  # tensors beside `one_layer`, which fits, and what is said
    "another key": ({"bundle_emb.cat": ZEROS}, "1 keys are part of no LoRA: bundle_emb.cat"),
    "rank 0": (
        zeros(KOHYA, "unet_out_2", (0, 8, 3, 3), (4, 0, 1, 1)),
        r"down \[0, 8, 3, 3\].* do not change unet/out_2/kernel, which here is "
        r"\[4, 8, 3, 3\]",
    ),
    "alpha alone": ({"lora_unet_out_2.alpha": ZEROS}, "1 keys are part of no LoRA: lora_unet_out"),
    "down alone": (
        {"lora_unet_time_embed_0.lora_down.weight": ZEROS},
        "lora_unet_time_embed_0 has down, and no 'up' beside it",
    ),
    "Stable Diffusion 2": (
        zeros(KOHYA, WIDTH, down=(4, 1024)),
        rf"lora_{WIDTH}: down \[4, 1024\], up \[8, 4\] do not change {UNET}/attn2/to_k/kernel, "
        r"which here is \[8, 768\]. It seems to be for Stable Diffusion 2; this model is Stable "
        "Diffusion 1",
    ),
    "SDXL": (
        {k: v for i in range(6) for k, v in zeros(KOHYA, SDXL.format(i), down=(4, 2048)).items()},
        "another model: 6 of its 7 layers are not in this one, lora_unet_input_blocks_7_1_.* and "
        "2 more. It seems to be for SDXL; this model is Stable Diffusion 1",
    ),
    "FLUX": (
        zeros(PEFT, "transformer.single_transformer_blocks.0.attn.to_q"),
        "another model: .*It seems to be for a transformer, such as those of FLUX",
    ),
    "two spellings of a layer": (
        zeros(KOHYA, "unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q"),
        f"changes {UNET}/attn1/to_q/kernel twice, the second time as lora_unet_",
    ),
    "two methods for a layer": (
        {f"lora_unet_{FIRST}.{part}": np.eye(8, dtype=np.float32) for part in LOHA},
        rf"lora_unet_{FIRST}: .*down \[4, 8\].* do not change {UNET}/attn1/to_q/kernel",
    ),
    "half a LoHa": (
        {f"lora_unet_time_embed_0.{part}": np.eye(32, 8, dtype=np.float32) for part in LOHA[:1]}
        | {f"lora_unet_time_embed_0.{part}": np.eye(8, dtype=np.float32) for part in LOHA[1:2]},
        "lora_unet_time_embed_0 has hada_w1_a and hada_w1_b, and no 'hada_w2_a' beside it",
    ),
    "norms alone": (
        {"unet.time_embedding.linear_1.lora_magnitude_vector": ZEROS},
        "unet.time_embedding.linear_1 has lora_magnitude_vector, and no 'up' beside it",
    ),
    "norms of another width": (
        zeros(KOHYA, "unet_time_embed_0", (1, 8), (32, 1))
        | {"lora_unet_time_embed_0.dora_scale": ZEROS},
        r"dora_scale \[4, 8\],.* do not change unet/time_embed_0/kernel, which here is \[32, 8\]",
    ),
    "a layer twice": (
        zeros(PEFT, f"unet.{DOWN}.attn1.to_q"),
        f"is there as lora_unet_{FIRST}.lora_(down|up).weight already",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused(case, leaves, write):
    tensors, message = WRONG[case]
    with pytest.raises(ValueError, match=rf"lora\.safetensors.*{message}"):
        read_lora(write(one_layer(leaves) | tensors), CONFIG)


def test_an_autoencoder_takes_no_lora(leaves, write):
    with pytest.raises(ValueError, match=r"lora\.safetensors: .*a UNet, and this one has none"):
        read_lora(write(one_layer(leaves)), {"task": "autoencoder", "autoencoder": {}})


def test_a_whole_model_is_no_lora(write):
    with pytest.raises(
        ValueError, match=r"lora\.safetensors holds no LoRA: its 1 keys are out.bias"
    ):
        read_lora(write({"out.bias": ZEROS}), CONFIG)


@pytest.mark.parametrize(
    "part, value, message",
    [
        ("dora_scale", np.full((8, 1), np.inf, np.float32), "holds NaN or infinity"),
        ("lora_up.weight", np.full((8, 4), np.nan, np.float32), "holds NaN or infinity"),
        ("alpha", np.float32(np.inf), "holds NaN or infinity"),
        ("alpha", np.ones(2, np.float32), r"has shape \[2\], but should be a number"),
    ],
)
def test_broken_factors_are_refused(part, value, message, leaves, write):
    key = f"lora_unet_{FIRST}.{part}"
    with pytest.raises(ValueError, match=rf"lora\.safetensors: {key} {message}"):
        read_lora(write(one_layer(leaves) | {key: value}), CONFIG)


@pytest.mark.parametrize("text", ["{", "[1]", '{"unet.alpha_pattern": {"(": 1}}'])
def test_broken_header_is_refused(text, leaves, tmp_path):
    path = tmp_path / "lora.safetensors"
    pair = factors(np.random.default_rng(0), leaves[f"{UNET}/attn1/to_q/kernel"])
    save_file(keyed(PEFT, f"unet.{DOWN}.attn1.to_q", pair), path, {"lora_adapter_metadata": text})
    with pytest.raises(ValueError, match=r"lora\.safetensors: lora_adapter_metadata"):
        read_lora(path, CONFIG)
