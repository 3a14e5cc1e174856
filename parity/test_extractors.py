"""Extractors, resizing and metrics of pictures, against the packages of published numbers.

Weights are random, and go through a file: pytorch-fid's Inception-v3 (on torchvision), the same of
torch-fidelity with TensorFlow's resizing, and transformers' DINOv2 and CLIP in their own names and
in their authors'.
Features agree to 1e-4 of their norm; clean-fid's resizing to the last bit.
"""

import importlib
import pickle
import sys
import types

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from pytorch_fid import inception as fid
from safetensors.torch import load_file, save_file
from scipy.spatial.distance import cdist
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from ldm_jax.interop.diffusers.tokenizers import write_tokenizer
from ldm_jax.metrics.clip_score import load_clip
from ldm_jax.metrics.distance import frechet_distance, kernel_distance
from ldm_jax.metrics.extractors import load_extractor
from ldm_jax.metrics.image import ms_ssim
from ldm_jax.metrics.lpips import load_lpips
from ldm_jax.metrics.manifold import inception_score, manifold_metrics
from ldm_jax.metrics.resizing import ON_DEVICE, clean
from ldm_jax.models.lpips import lpips
from ldm_jax.pictures import cubic_matrix

FEATURES = 1e-4
DINO_NORM = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_NORM = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def pictures(count: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (count, height, width, 3), np.uint8)


def nchw(images: np.ndarray) -> torch.Tensor:
    return torch.tensor(np.float32(images)).movedim(-1, 1)


def randomise(model: torch.nn.Module) -> torch.nn.Module:
    """Weights of unit gain, norms near one, positive variances; the same each time."""
    random = np.random.default_rng(0)
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        draws = random.standard_normal(tensor.shape, np.float32)
        if tensor.ndim > 1:
            draws *= (2 / tensor[0].numel()) ** 0.5
        elif name.endswith(("weight", "running_var", "gamma", "lambda1")):
            draws = 1 + np.abs(draws) / 4
        else:
            draws /= 10
        tensor.copy_(torch.tensor(draws))
    return model.eval()


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """pytorch-fid's network with random weights, the same less its resizing, and a file of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fid, "load_state_dict_from_url", lambda url, progress: {})
        patch.setattr(torch.nn.Module, "load_state_dict", lambda module, state: None)
        bare = randomise(fid.fid_inception_v3())
    path = tmp_path_factory.mktemp("inception") / "pt_inception-2015-12-05-6726825d.pth"
    torch.save(bare.state_dict(), path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fid, "fid_inception_v3", lambda: bare)
        return fid.InceptionV3().eval(), bare, path


@pytest.mark.parametrize("size", [(64, 64), (40, 330)])
def test_inception_as_pytorch_fid(inception, near, size):
    network, _, path = inception
    images = pictures(2, *size)
    with torch.no_grad():
        theirs = network(nchw(images) / 255)[0][:, :, 0, 0].numpy()
    ours = load_extractor(path, "legacy", batch_size=2)(images)
    near("outputs", {"features": ours}, {"features": theirs}, FEATURES)


def test_inception_as_torch_fidelity(inception, near):
    """TensorFlow's resizing, and the logits of the Inception score."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    _, bare, path = inception
    wanted = ["2048", "logits_unbiased"]
    theirs = FeatureExtractorInceptionV3("x", wanted, feature_extractor_weights_path=str(path))
    images = pictures(2, 64, 64)
    with torch.no_grad():
        features, logits = theirs(nchw(images).to(torch.uint8))
    ours = load_extractor(path, "adm", batch_size=2).measure(images)
    found = {"features": features.numpy(), "logits": logits.numpy()}
    near("outputs", dict(zip(found, ours, strict=True)), found, FEATURES)


LAYER = {"conv": {"weight": "kernel"}}
LAYER["bn"] = dict(weight="scale", bias="bias", running_mean="mean", running_var="var")


def test_inception_in_the_pickle_of_jax_fid(inception, tmp_path):
    """The same weights nested as jax-fid has them, with and without the classifier: every bit."""
    _, bare, path = inception
    state = bare.state_dict()
    tree = {"fc": {"kernel": state["fc.weight"].numpy().T, "bias": state["fc.bias"].numpy()}}
    for name, tensor in state.items():
        *layers, kind, leaf = name.split(".")
        if leaf not in LAYER.get(kind, {}) or layers[0] == "AuxLogits":
            continue
        node = tree
        for key in (*layers, kind):
            node = node.setdefault(key, {})
        array = tensor.numpy()
        node[LAYER[kind][leaf]] = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array
    pickled = tmp_path / "inception_v3_weights_fid.pickle"
    pickled.write_bytes(pickle.dumps(tree))
    images = pictures(2, 64, 64)
    expected = load_extractor(path, "legacy", batch_size=2).measure(images)
    found = load_extractor(pickled, "legacy", batch_size=2).measure(images)
    assert all(np.array_equal(x, y) for x, y in zip(found, expected, strict=True))
    del tree["fc"]
    pickled.write_bytes(pickle.dumps(tree))
    features, logits = load_extractor(pickled, "legacy", batch_size=2).measure(images)
    assert logits is None and np.array_equal(features, expected[0])


@pytest.mark.parametrize("size", [(64, 64), (40, 330), (400, 512)])
def test_resizing(size, agree):
    images = pictures(1, *size)
    func = torch.nn.functional.interpolate
    theirs = func(nchw(images), (299, 299), mode="bilinear", align_corners=False)
    agree(ON_DEVICE["legacy"](np.float32(images), 299), theirs.movedim(1, -1).numpy())
    func = interpolate_bilinear_2d_like_tensorflow1x
    theirs = func(nchw(images), (299, 299), align_corners=False)
    agree(ON_DEVICE["adm"](np.float32(images), 299), theirs.movedim(1, -1).numpy())


@pytest.mark.parametrize("size", [(64, 64), (40, 330), (400, 512), (299, 299)])
def test_clean_resizing_to_the_last_bit(size):
    resize = importlib.import_module("cleanfid.resize")
    theirs = resize.make_resizer("PIL", False, "bicubic", (299, 299))
    images = pictures(1, *size)
    np.testing.assert_array_equal(clean(np.float32(images), 299)[0], theirs(images[0]))


@pytest.mark.parametrize(("before", "after"), [(37, 16), (4, 16), (16, 16)])
@pytest.mark.parametrize("antialias", [False, True])
def test_bicubic_positions(before, after, antialias, agree):
    grid = np.random.default_rng(0).standard_normal((1, 3, before, before), np.float32)
    options = dict(mode="bicubic", antialias=antialias)
    theirs = torch.nn.functional.interpolate(torch.tensor(grid), (after, after), **options)
    matrix = cubic_matrix(before, after, antialias=antialias)
    agree(np.einsum("Hh,Ww,bchw->bcHW", matrix, matrix, grid), theirs.numpy())
    if not antialias:
        factor = (after + 0.1) / before
        theirs = torch.nn.functional.interpolate(
            torch.tensor(grid), scale_factor=(factor, factor), **options
        )
        matrix = cubic_matrix(before, after, before / (after + 0.1))
        agree(np.einsum("Hh,Ww,bchw->bcHW", matrix, matrix, grid), theirs.numpy())


SMALL = dict(hidden_size=128, num_hidden_layers=2, num_attention_heads=2, patch_size=14)
AUTHORS_DINO = (
    ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.", ""),
    ("encoder.layer.", "blocks."),
    ("attention.output.dense", "attn.proj"),
    ("layer_scale1.lambda1", "ls1.gamma"),
    ("layer_scale2.lambda1", "ls2.gamma"),
    ("layernorm", "norm"),
)
AUTHORS_CLIP = (
    ("visual_projection.weight", "visual.proj"),
    ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
    ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
    ("vision_model.embeddings.patch_embedding", "visual.conv1"),
    ("vision_model.pre_layrnorm", "visual.ln_pre"),
    ("vision_model.post_layernorm", "visual.ln_post"),
    ("vision_model.encoder.layers.", "visual.transformer.resblocks."),
    ("layer_norm", "ln_"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
    ("self_attn.out_proj", "attn.out_proj"),
)


def in_authors_names(state: dict, renames: tuple, attention: tuple[str, ...], fused: str) -> dict:
    """With one tensor of queries, keys and values."""
    state, renamed = dict(state), {}
    for name in [n for n in state if attention[0] in n]:
        parts = [state.pop(name.replace(attention[0], part)) for part in attention]
        state[name.replace(f"{attention[0]}.", fused)] = torch.cat(parts)
    for name, tensor in state.items():
        for there, here in renames:
            name = name.replace(there, here)
        renamed[name] = tensor.T.contiguous() if name == "visual.proj" else tensor.contiguous()
    return renamed


def resized(images: np.ndarray, side: int, mean: tuple, std: tuple) -> torch.Tensor:
    pixels = clean(np.float32(images), side) / 255
    return nchw((pixels - np.float32(mean)) / np.float32(std))


@pytest.mark.parametrize("image_size", [224, 518])
@pytest.mark.parametrize("registers", [0, 4])
def test_dino(tmp_path, near, image_size, registers):
    kind = "Dinov2WithRegisters" if registers else "Dinov2"
    options = SMALL | (dict(num_register_tokens=registers) if registers else {})
    config = getattr(transformers, f"{kind}Config")(image_size=image_size, **options)
    model = randomise(getattr(transformers, f"{kind}Model")(config))
    model.save_pretrained(tmp_path / "hub")
    images = pictures(2, 50, 50)
    with torch.no_grad():
        theirs = model(resized(images, 224, *DINO_NORM)).pooler_output.numpy()
    extract = load_extractor(tmp_path / "hub" / "model.safetensors", batch_size=2)
    near("outputs", {"features": extract(images)}, {"features": theirs}, FEATURES)
    heads = ("attention.attention.query", "attention.attention.key", "attention.attention.value")
    state = in_authors_names(
        load_file(tmp_path / "hub" / "model.safetensors"), AUTHORS_DINO, heads, "attn.qkv."
    )
    torch.save(state, tmp_path / "dinov2_vits14_pretrain.pth")
    extract = load_extractor(tmp_path / "dinov2_vits14_pretrain.pth", batch_size=2)
    if image_size == 518 and not registers:  # the authors' positions, a tenth of a patch wider
        positions = model.embeddings.position_embeddings
        grid = positions[:, 1:].reshape(1, 37, 37, -1).movedim(-1, 1)
        grid = torch.nn.functional.interpolate(grid, scale_factor=16.1 / 37, mode="bicubic")
        assert grid.shape[-2:] == (16, 16)
        grid = torch.cat([positions[:, :1], grid.flatten(2).mT], 1)
        model.embeddings.interpolate_pos_encoding = lambda *_: grid
        with torch.no_grad():
            theirs = model(resized(images, 224, *DINO_NORM)).pooler_output.numpy()
    near("outputs", {"features": extract(images)}, {"features": theirs}, FEATURES)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_clip(tmp_path, near, activation):
    options = dict(image_size=56, intermediate_size=96, projection_dim=24, hidden_act=activation)
    config = transformers.CLIPVisionConfig(**SMALL, **options)
    model = randomise(transformers.CLIPVisionModelWithProjection(config))
    model.save_pretrained(tmp_path / "hub")
    images = pictures(2, 50, 70)
    with torch.no_grad():
        theirs = model(resized(images, 56, *CLIP_NORM)).image_embeds.numpy()
    extract = load_extractor(tmp_path / "hub" / "model.safetensors", batch_size=2)
    near("outputs", {"features": extract(images)}, {"features": theirs}, FEATURES)
    heads = tuple(f"self_attn.{k}_proj" for k in "qkv")
    state = in_authors_names(
        load_file(tmp_path / "hub" / "model.safetensors"), AUTHORS_CLIP, heads, "attn.in_proj_"
    )
    if activation == "quick_gelu":  # as OpenAI's own files
        state["input_resolution"] = torch.tensor(56)
    state = {n.removesuffix("_ids"): t for n, t in state.items() if "position_ids" not in n}
    save_file(state, tmp_path / "open_clip_model.safetensors")
    extract = load_extractor(tmp_path / "open_clip_model.safetensors", batch_size=2)
    near("outputs", {"features": extract(images)}, {"features": theirs}, FEATURES)


CAPTIONS = ["a red apple left of two cats", "It's 42 o'clock!", " ".join(["very"] * 90) + " end"]
AUTHORS_TEXT = (
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.embeddings.", ""),
    ("text_model.encoder.layers.", "transformer.resblocks."),
    ("text_model.final_layer_norm", "ln_final"),
    ("text_projection.weight", "text_projection"),
)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_clip_score(tmp_path, agree, activation):
    """transformers' whole CLIP, with its own preprocessing and tokenizer, and in OpenCLIP's names.

    A picture's sides are odd, so that the middle is not exact; a caption is longer than the text.
    """
    text = dict(hidden_size=128, num_attention_heads=2, num_hidden_layers=3, intermediate_size=160)
    vision = SMALL | dict(image_size=56, intermediate_size=96)
    config = transformers.CLIPConfig(
        text_config=text | dict(hidden_act=activation, vocab_size=49408),
        vision_config=vision | dict(hidden_act=activation),
        projection_dim=24,
    )
    model = randomise(transformers.CLIPModel(config))
    model.save_pretrained(tmp_path / "hub")
    write_tokenizer(tmp_path / "tokens", dict(kind="clip", vocabulary="clip"), 77)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tmp_path / "tokens")
    size = dict(size=dict(shortest_edge=56), crop_size=dict(height=56, width=56))
    processor = transformers.CLIPImageProcessorPil(**size)
    images = pictures(3, 50, 83)
    pixels = processor([Image.fromarray(i) for i in images], return_tensors="pt")["pixel_values"]
    options = dict(padding="max_length", truncation=True, max_length=77, return_tensors="pt")
    ids = tokenizer(CAPTIONS, **options)["input_ids"]
    with torch.no_grad():
        found = model(input_ids=ids, pixel_values=pixels)
    image, caption = found.image_embeds.numpy(), found.text_embeds.numpy()
    cosines = (image * caption).sum(axis=1)
    clip = load_clip(tmp_path / "hub", batch_size=2)
    agree(clip.images(images), image, 1e-4)
    agree(clip.texts(CAPTIONS), caption, 1e-4)
    agree(clip(images, CAPTIONS) / 100, np.maximum(cosines, 0), 1e-4)
    assert len(clip.cut(CAPTIONS)) == 1 and (cosines > 0.01).any()
    heads = tuple(f"self_attn.{k}_proj" for k in "qkv")
    state = in_authors_names(
        load_file(tmp_path / "hub" / "model.safetensors"),
        AUTHORS_TEXT + AUTHORS_CLIP,
        heads,
        "attn.in_proj_",
    )
    state["text_projection"] = state["text_projection"].T.contiguous()
    if activation == "quick_gelu":  # as OpenAI's own files
        state |= {"input_resolution": torch.tensor(56), "context_length": torch.tensor(77)}
        state["vocab_size"] = torch.tensor(49408)
    torch.save(state, tmp_path / "open_clip_pytorch_model.bin")
    scripted(state).save(str(tmp_path / "ViT.pt"))
    for name in ("open_clip_pytorch_model.bin", "ViT.pt"):
        clip = load_clip(tmp_path / name, batch_size=2)
        agree(clip(images, CAPTIONS) / 100, np.maximum(cosines, 0), 1e-4)


def scripted(state):
    """A TorchScript archive of these tensors, as OpenAI's of CLIP."""
    root = torch.nn.Module()
    for name, tensor in state.items():
        *path, leaf = name.split(".")
        at = root
        for part in path:
            if part not in dict(at.named_children()):
                at.add_module(part, torch.nn.Module())
            at = at.get_submodule(part)
        at.register_buffer(leaf, tensor)
    return torch.jit.script(root)


@pytest.mark.parametrize("net", ["vgg", "alex"])
def test_lpips(net, tmp_path, agree):
    """With the heads of the package, in torchvision's file and in the module's own."""
    package = importlib.import_module("lpips")
    theirs = randomise(package.LPIPS(net=net, pretrained=False, pnet_rand=True, verbose=False))
    theirs.scaling_layer = package.ScalingLayer()  # its constants are buffers
    for head in theirs.lins:
        head.model[1].weight.data.abs_()
    state = {f"lin{i}.model.1.weight": head.model[1].weight for i, head in enumerate(theirs.lins)}
    torch.save(state, tmp_path / "heads.pth")
    torch.save(theirs.state_dict(), tmp_path / "whole.pth")
    trunk = {
        f"features.{name.split('.', 2)[2]}": tensor
        for name, tensor in theirs.state_dict().items()
        if name.startswith("net.slice")
    }
    torch.save(trunk, tmp_path / "trunk.pth")
    x, y = (pictures(2, size, 64)[:, :48] / np.float32(127.5) - 1 for size in (48, 50))
    with torch.no_grad():
        expected = theirs(nchw(x), nchw(y)).numpy().reshape(-1)
    params = load_lpips(tmp_path / "trunk.pth", tmp_path / "heads.pth")
    agree(lpips(params, x, y) / expected, np.ones(2, np.float32))
    whole = load_lpips(tmp_path / "whole.pth")
    assert whole.keys() == params.keys()
    assert all(np.array_equal(whole[name], params[name]) for name in params)


@pytest.mark.parametrize("side", [192, 256])
def test_ms_ssim(side, agree):
    """Of sides that halve without a rest; the package pads others."""
    package = importlib.import_module("pytorch_msssim")
    x, y = (pictures(2, s, 256)[:, :192] / np.float32(255) for s in (side, side + 1))
    y = 0.7 * x + 0.3 * y
    expected = package.ms_ssim(nchw(x), nchw(y), data_range=1.0, size_average=False).numpy()
    agree(ms_ssim(x, y), expected)


@pytest.mark.parametrize("k", [3, 5])
def test_precision_recall_density_coverage(k, monkeypatch):
    """prdc, with SciPy's distances for scikit-learn's."""
    kernels = types.ModuleType("sklearn.metrics")
    kernels.pairwise_distances = lambda x, y, **_: cdist(x, y)
    package = types.ModuleType("sklearn")
    package.metrics = kernels
    monkeypatch.setitem(sys.modules, "sklearn", package)
    monkeypatch.setitem(sys.modules, "sklearn.metrics", kernels)
    theirs = importlib.import_module("prdc.prdc").compute_prdc
    random = np.random.default_rng(k)
    real, drawn = random.normal(size=(300, 6)), random.normal(0.5, 0.8, (250, 6))
    ours = manifold_metrics(drawn, real, k)[0]
    assert ours == pytest.approx(theirs(real, drawn, k), abs=1e-12)


def test_inception_score():
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = np.random.default_rng(0).normal(0, 3, (105, 30))
    theirs = isc_features_to_metric(torch.tensor(logits))
    expected = theirs["inception_score_mean"], theirs["inception_score_std"]
    assert inception_score(logits) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("count", [40, 300])
def test_distances(count):
    """Fewer pictures than features, and more: pytorch-fid's and torch-fidelity's formulas."""
    from pytorch_fid.fid_score import calculate_frechet_distance
    from torch_fidelity.metric_kid import kid_features_to_metric

    random = np.random.default_rng(0)
    a, b = random.normal(size=(count, 64)), random.normal(0.3, 1.2, (count + 20, 64))
    moments = [(x.mean(0), np.cov(x, rowvar=False)) for x in (a, b)]
    theirs = calculate_frechet_distance(*moments[0], *moments[1])
    assert frechet_distance(a, b) == pytest.approx(theirs, rel=1e-5)
    one = dict(kid_subsets=1, kid_subset_size=count, verbose=False)  # the whole of both sets
    theirs = kid_features_to_metric(torch.tensor(a), torch.tensor(b[:count]), **one)
    expected = theirs["kernel_inception_distance_mean"]
    assert kernel_distance(a, b[:count]) == pytest.approx(expected, rel=1e-10)
