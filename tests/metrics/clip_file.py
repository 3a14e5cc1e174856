"""A tiny CLIP of random weights in transformers' and OpenCLIP's names, with CLIP's vocabulary."""

import numpy as np

from ldm_jax.interop.layout import slots
from scripts.write_goldens import random_weights

WIDTH, JOINT, SIDE, PATCH = 64, 24, 32, 16
TEXT = dict(width=WIDTH, depth=2, heads=1, max_length=12, projection=JOINT)


def text_tower(layout: str) -> dict[str, tuple[int, ...]]:
    """Shapes by name; layout: "compvis", which has transformers' names, or "openclip"."""
    table = slots("clip", TEXT, layout).values()
    return {name: slot.foreign for slot in table for name in slot.names}


def image_tower() -> dict[str, tuple[int, ...]]:
    shapes = {
        "embeddings.patch_embedding.weight": (WIDTH, 3, PATCH, PATCH),
        "embeddings.position_embedding.weight": (1 + (SIDE // PATCH) ** 2, WIDTH),
        "embeddings.class_embedding": (WIDTH,),
    }
    for norm in ("pre_layrnorm", "post_layernorm"):
        shapes |= {f"{norm}.weight": (WIDTH,), f"{norm}.bias": (WIDTH,)}
    layer = {"layer_norm1": (WIDTH,), "layer_norm2": (WIDTH,)}
    layer |= {f"self_attn.{name}": (WIDTH, WIDTH) for name in ("q_proj", "k_proj", "v_proj")}
    layer |= {"self_attn.out_proj": (WIDTH, WIDTH)}
    layer |= {"mlp.fc1": (2 * WIDTH, WIDTH), "mlp.fc2": (WIDTH, 2 * WIDTH)}
    for name, shape in layer.items():
        shapes |= {f"encoder.layers.0.{name}.weight": shape}
        shapes |= {f"encoder.layers.0.{name}.bias": shape[:1]}
    named = {f"vision_model.{name}": shape for name, shape in shapes.items()}
    return named | {"visual_projection.weight": (JOINT, WIDTH)}


def in_transformers_names() -> dict[str, np.ndarray]:
    shapes = image_tower() | text_tower("compvis")
    return random_weights(shapes) | {"logit_scale": np.float32([4.6])}


# transformers' name of a part → OpenCLIP's.
RENAMED = (
    ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
    ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
    ("vision_model.embeddings.patch_embedding", "visual.conv1"),
    ("vision_model.pre_layrnorm", "visual.ln_pre"),
    ("vision_model.post_layernorm", "visual.ln_post"),
    ("vision_model.encoder.layers", "visual.transformer.resblocks"),
    ("visual_projection.weight", "visual.proj"),
    ("text_model.embeddings.token_embedding", "token_embedding"),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.final_layer_norm", "ln_final"),
    ("text_model.encoder.layers", "transformer.resblocks"),
    ("text_projection.weight", "text_projection"),
    ("layer_norm", "ln_"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
    ("self_attn.", "attn."),
)


def in_open_clip_names(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same network: one tensor of queries, keys and values, and projections from the right."""
    renamed, parts = {}, {}
    for name, tensor in state.items():
        for theirs, open_clip in RENAMED:
            name = name.replace(theirs, open_clip)
        if name in ("visual.proj", "text_projection"):
            tensor = np.ascontiguousarray(tensor.T)
        for i, letter in enumerate("qkv"):
            if f".{letter}_proj." in name:
                joined = name.replace(f".{letter}_proj.", ".in_proj_")
                parts.setdefault(joined, [None] * 3)[i] = tensor
                break
        else:
            renamed[name] = tensor
    return renamed | {name: np.concatenate(three) for name, three in parts.items()}
