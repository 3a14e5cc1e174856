"""LoRA, DoRA, LoHa and LoKr files against diffusers and peft: into their networks and into ours."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.training_utils import _collate_lora_metadata
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from peft import (
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

from ldm_jax.interop import names
from ldm_jax.interop.changes import merge, scale_of, separated
from ldm_jax.interop.layout import read_params, slots
from ldm_jax.interop.lora import read_lora
from ldm_jax.interop.lora_writer import write_lora
from ldm_jax.models import low_rank
from ldm_jax.models.clip import CLIPText
from ldm_jax.models.unet import UNet

RANK, WIDTH = 4, 24
TEXT = dict(vocab_size=30, width=16, depth=2, heads=2, max_length=9, activation="gelu")
FIELDS = dict(
    model_channels=32,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(2,),
    num_heads=2,
    context_dim=WIDTH,
    use_linear_in_transformer=True,
    groups=8,
)
CONFIG = {"unet": FIELDS, "conditioning": {"text": {"kind": "clip", "network": TEXT}}}
PEFT_LAYERS = [
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "time_emb_proj", "conv_in", "conv_out", "linear_1"),
    *("downsamplers.0.conv", "upsamplers.0.conv"),
]
BLOCK, UP = "transformer_blocks", "up_blocks.0.attentions"
# Layers by CompVis' names, as kohya's scripts write SDXL's, and by diffusers'.
LAYERS = {
    "input_blocks_0_0": "conv_in",
    "input_blocks_2_0_op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks_3_0_in_layers_2": "down_blocks.1.resnets.0.conv1",
    "input_blocks_3_0_emb_layers_1": "down_blocks.1.resnets.0.time_emb_proj",
    "input_blocks_3_0_skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
    f"input_blocks_3_1_{BLOCK}_0_attn1_to_q": f"down_blocks.1.attentions.0.{BLOCK}.0.attn1.to_q",
    f"input_blocks_3_1_{BLOCK}_0_attn2_to_k": f"down_blocks.1.attentions.0.{BLOCK}.0.attn2.to_k",
    "middle_block_1_proj_in": "mid_block.attentions.0.proj_in",
    "middle_block_2_out_layers_3": "mid_block.resnets.1.conv2",
    f"output_blocks_0_1_{BLOCK}_0_attn2_to_v": f"{UP}.0.{BLOCK}.0.attn2.to_v",
    f"output_blocks_0_1_{BLOCK}_0_attn1_to_out_0": f"{UP}.0.{BLOCK}.0.attn1.to_out.0",
    f"output_blocks_1_1_{BLOCK}_0_ff_net_0_proj": f"{UP}.1.{BLOCK}.0.ff.net.0.proj",
    f"output_blocks_1_1_{BLOCK}_0_ff_net_2": f"{UP}.1.{BLOCK}.0.ff.net.2",
    "output_blocks_1_1_proj_out": f"{UP}.1.proj_out",
    "output_blocks_2_0_in_layers_2": "up_blocks.1.resnets.0.conv1",
    "out_2": "conv_out",
}
TEXT_LAYERS = ["encoder.layers.0.self_attn.q_proj", "encoder.layers.1.self_attn.out_proj"]
TEXT_LAYERS += ["encoder.layers.0.mlp.fc1", "encoder.layers.1.mlp.fc2"]


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
        use_linear_projection=True,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval()


def params(network, fields, module, prefix=""):
    state = {prefix + key: value.numpy() for key, value in module.state_dict().items()}
    read, report = read_params(state, slots(network, fields, "diffusers"))
    assert not report.missing
    return read


def factors(module, name, prefix, alpha=2.0):
    """A LoRA of a layer of `module`, by kohya's keys."""
    weight = module.get_submodule(name).weight
    outputs, inputs, *window = weight.shape
    down = 0.1 * torch.randn(RANK, inputs, *window)
    up = 0.1 * torch.randn(outputs, RANK, *(1 for _ in window))
    named = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(alpha)}
    return {f"{prefix}.{key}": value for key, value in named.items()}


def compare(near, unet, ours):
    """Both UNets on the same input, theirs with what was loaded into it."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, 4, 8, 8)).astype(np.float32)
    context = rng.standard_normal((2, 5, WIDTH)).astype(np.float32)
    t = np.array([10, 500])
    with torch.no_grad():
        theirs = unet(*map(torch.from_numpy, (x, t, context))).sample.numpy()
    found = UNet(**FIELDS).apply({"params": ours}, x.transpose(0, 2, 3, 1), t, context)
    near("outputs", {"y": found.transpose(0, 3, 1, 2)}, {"y": theirs}, 5e-5)


@pytest.mark.parametrize("method", ["lora", "rslora", "dora"])
def test_saved_by_diffusers(unet, method, near, tmp_path):
    """Matrices and convolutions, with ranks, alphas and their exceptions in the file's header."""
    before = params("unet", FIELDS, unet)
    alphas = {"attn1.to_q": 3, "conv1": 12}
    options = dict(lora_alpha=6, alpha_pattern=alphas, rank_pattern={"proj_in": 2})
    options |= dict(use_rslora=method == "rslora", use_dora=method == "dora")
    unet.add_adapter(
        LoraConfig(r=RANK, target_modules=PEFT_LAYERS, init_lora_weights=False, **options)
    )
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "magnitude" in name:
                parameter.mul_(torch.empty_like(parameter).uniform_(0.7, 1.3))
            elif "lora_" in name:
                parameter.normal_(std=0.1)
    header = _collate_lora_metadata({"unet": unet})
    layers = get_peft_model_state_dict(unet)
    StableDiffusionXLPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers, **header)
    lora = read_lora(tmp_path, CONFIG)
    assert len(lora) == len(layers) // (3 if method == "dora" else 2)
    compare(near, unet, merge({"unet": before}, lora)["unet"])


@pytest.mark.parametrize("config", [
    LoHaConfig(r=RANK, alpha=6, target_modules=PEFT_LAYERS),
    LoHaConfig(r=RANK, alpha=6, target_modules=PEFT_LAYERS, use_effective_conv2d=True),
    LoKrConfig(r=RANK, alpha=6, target_modules=PEFT_LAYERS),
    LoKrConfig(r=2, alpha=6, target_modules=PEFT_LAYERS, use_effective_conv2d=True,
        decompose_both=True, decompose_factor=4),
], ids=["loha", "loha with cores", "lokr", "lokr with cores"])  # fmt: skip
def test_other_products(unet, config, near, tmp_path):
    """peft keeps alpha beside the file; its scale is alpha/rank even where no factor has one."""
    before = params("unet", FIELDS, unet)
    inject_adapter_in_model(config, unet)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "hada" in name or "lokr" in name:
                parameter.normal_(std=0.3 if "hada" in name else 0.1)
    state = get_peft_model_state_dict(unet)
    assert any("_t2" in key for key in state) == config.use_effective_conv2d
    ranked, tensors = {}, {}
    for key, tensor in state.items():
        layer, _, part = key.rpartition(".")
        tensors[f"unet.{key}"] = tensor.contiguous()
        ranked.setdefault(layer, {})[part] = tensor
    for layer, parts in ranked.items():
        if parts.keys() == {"lokr_w1", "lokr_w2"}:
            tensors[f"unet.{layer}.lokr_w1"] = parts["lokr_w1"] * config.alpha / config.r
        tensors[f"unet.{layer}.alpha"] = torch.tensor(float(config.alpha))
    path = tmp_path / "products.safetensors"
    save_file(tensors, path)
    lora = read_lora(path, CONFIG)
    assert len(lora) == len(ranked)
    compare(near, unet, merge({"unet": before}, lora)["unet"])


@pytest.mark.parametrize("spelling", ["CompVis", "diffusers"])
def test_written_by_kohya(unet, spelling, near, tmp_path):
    before = params("unet", FIELDS, unet)
    tensors = {}
    for compvis, name in LAYERS.items():
        called = compvis if spelling == "CompVis" else name.replace(".", "_")
        tensors |= factors(unet, name, f"lora_unet_{called}")
    path = tmp_path / "lora.safetensors"
    save_file(tensors, path)
    lora = read_lora(path, CONFIG)
    assert len(lora) == len(LAYERS)

    state, alphas = StableDiffusionXLPipeline.lora_state_dict(path, unet_config=unet.config)
    unet.load_lora_adapter(state, prefix="unet", network_alphas=alphas)
    compare(near, unet, merge({"unet": before}, lora)["unet"])


def test_text_encoder_by_kohya(near, tmp_path):
    torch.manual_seed(0)
    size = dict(hidden_size=16, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    rest = dict(vocab_size=30, max_position_embeddings=9, hidden_act="gelu")
    encoder = CLIPTextModel(CLIPTextConfig(**size, **rest)).eval()
    before = params("clip", TEXT, encoder)
    tensors = {}
    for name in TEXT_LAYERS:
        called = f"text_model.{name}".replace(".", "_")
        tensors |= factors(encoder, name, f"lora_te1_{called}")
    path = tmp_path / "lora.safetensors"
    save_file(tensors, path)
    lora = read_lora(path, CONFIG)
    assert len(lora) == len(TEXT_LAYERS)

    pipeline = StableDiffusionXLPipeline
    state, alphas = pipeline.lora_state_dict(path)
    pipeline.load_lora_into_text_encoder(state, alphas, encoder, prefix="text_encoder")
    tokens = np.arange(18).reshape(2, 9) + 3
    with torch.no_grad():
        theirs = encoder(torch.from_numpy(tokens)).last_hidden_state.numpy()
    found = CLIPText(**TEXT).apply({"params": merge({"text": before}, lora)["text"]}, tokens)
    near("outputs", {"hidden": found.hidden}, {"hidden": theirs}, 5e-5)


def trained(params, kind, alpha):
    """Factors beside every kernel, as after some training."""
    rng, made = np.random.default_rng(2), {}
    for path, leaf in flatten_dict(params, sep="/").items():
        if not path.endswith("/kernel"):
            continue
        layer = path.removesuffix("kernel")
        down, up = (*leaf.shape[:-1], RANK), (RANK, leaf.shape[-1])
        for name, shape in ((low_rank.DOWN, down), (low_rank.UP, up)):
            made[layer + name] = 0.1 * rng.standard_normal(shape).astype(np.float32)
        made[layer + low_rank.SCALE] = scale_of(alpha, RANK, kind == "rslora")
        if kind == "dora":
            made[layer + low_rank.MAGNITUDE] = 1.1 * np.asarray(low_rank.norms(leaf))
    return unflatten_dict(made, sep="/")


@pytest.mark.parametrize("layout, kind", [
    ("kohya", "lora"), ("kohya", "rslora"),  # of DoRA, diffusers leaves out kohya's `dora_scale`
    ("peft", "lora"), ("peft", "rslora"), ("peft", "dora"),
])  # fmt: skip
def test_written_by_us(unet, layout, kind, near, tmp_path):
    """diffusers opens both layouts, and its UNet computes what ours does."""
    before, alpha, path = params("unet", FIELDS, unet), 6.0, tmp_path / "lora.safetensors"
    made = {"unet": trained(before, kind, alpha)}
    write_lora(path, made, CONFIG, alpha, kind == "rslora", layout)
    pipeline = StableDiffusionXLPipeline
    options = dict(unet_config=unet.config, return_lora_metadata=True)
    state, alphas, metadata = pipeline.lora_state_dict(path, **options)
    unet.load_lora_adapter(state, prefix="unet", network_alphas=alphas, metadata=metadata)
    ours = merge({"unet": before}, separated(made)[1])["unet"]
    compare(near, unet, ours)


@pytest.mark.parametrize("layout", ["kohya", "peft"])
def test_text_encoder_by_us(layout, near, tmp_path):
    torch.manual_seed(0)
    size = dict(hidden_size=16, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    rest = dict(vocab_size=30, max_position_embeddings=9, hidden_act="gelu")
    encoder = CLIPTextModel(CLIPTextConfig(**size, **rest)).eval()
    before, path = params("clip", TEXT, encoder), tmp_path / "lora.safetensors"
    made = {"text": trained(before, "lora", 6.0)}
    write_lora(path, made, CONFIG, 6.0, layout=layout)
    pipeline = StableDiffusionXLPipeline
    state, alphas, metadata = pipeline.lora_state_dict(path, return_lora_metadata=True)
    pipeline.load_lora_into_text_encoder(
        state, alphas, encoder, prefix="text_encoder", metadata=metadata
    )
    tokens = np.arange(18).reshape(2, 9) + 3
    with torch.no_grad():
        theirs = encoder(torch.from_numpy(tokens)).last_hidden_state.numpy()
    ours = merge({"text": before}, separated(made)[1])["text"]
    found = CLIPText(**TEXT).apply({"params": ours}, tokens)
    near("outputs", {"hidden": found.hidden}, {"hidden": theirs}, 5e-5)


@pytest.mark.parametrize("method", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("what", ["matrix", "convolution"])
def test_gradients(what, method, near):
    """Of a layer in training: peft's, and ours with factors beside the kernel."""
    torch.manual_seed(0)
    dense = what == "matrix"
    layer = torch.nn.Linear(6, 7) if dense else torch.nn.Conv2d(6, 7, 3, padding=1)
    options = dict(use_rslora=method == "rslora", use_dora=method == "dora")
    config = LoraConfig(r=RANK, lora_alpha=6, target_modules=["0"], **options)
    model = inject_adapter_in_model(config, torch.nn.Sequential(layer))
    weight, bias = (value.detach().numpy() for value in (layer.weight, layer.bias))
    kernel = names.to_flax(weight, (6, 7) if dense else (3, 3, 6, 7))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                parameter.normal_(std=0.3)
            elif "magnitude" in name:
                parameter.mul_(1.2)
    x = np.random.default_rng(0).standard_normal((5, 6) if dense else (2, 6, 4, 4))
    x = x.astype(np.float32)
    model(torch.from_numpy(x)).sin().mean().backward()
    parts = {
        "lora_A": (low_rank.DOWN, (*kernel.shape[:-1], RANK)),
        "lora_B": (low_rank.UP, (RANK, 7)),
    }
    found, theirs = {}, {}
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            continue
        part, shape = parts.get(name.split(".")[1], (low_rank.MAGNITUDE, None))
        for values, tensor in ((found, parameter.detach()), (theirs, parameter.grad)):
            array = tensor.numpy()
            values[part] = names.to_flax(array, shape) if shape else array.reshape(-1)
    fixed = {"kernel": kernel, "bias": bias, low_rank.SCALE: scale_of(6, RANK, method == "rslora")}
    module = nn.Dense(7) if dense else nn.Conv(7, (3, 3), padding=1)
    ours_x = x if dense else x.transpose(0, 2, 3, 1)

    def loss(factors):
        with low_rank.adding_factors():
            return jnp.mean(jnp.sin(module.apply({"params": fixed | factors}, ours_x)))

    near("gradients", jax.grad(loss)(found), theirs, 1e-5)
