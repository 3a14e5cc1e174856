"""Unpublished models: the originals' YAML with a file, and contradictions between the two."""

import copy

import numpy as np
import pytest
import yaml

from ldm_jax.diffusion.schedule import make_schedule
from ldm_jax.interop import compvis
from ldm_jax.interop.files import open_state, write_safetensors
from ldm_jax.interop.opening import open_any, read_any
from tests.interop.systems import random_params, system
from tests.interop.test_compvis import same

BUFFERS = ("betas", "alphas_cumprod", "scale_factor")


def section(target, **params):
    return dict(target=target, params=params)


def unet(**fields):
    sizes = dict(model_channels=64, channel_mult=[1, 2], num_res_blocks=1, use_checkpoint=True)
    options = dict(image_size=8, legacy=False)
    name = "ldm.modules.diffusionmodules.openaimodel.UNetModel"
    return section(name, **sizes | options | fields)


def stage(kind="AutoencoderKL", z=4, **params):
    sizes = dict(double_z=kind == "AutoencoderKL", resolution=256, in_channels=3, out_ch=3, ch=32)
    more = dict(z_channels=z, ch_mult=[1, 2], num_res_blocks=1, attn_resolutions=[], dropout=0.0)
    loss = dict(target="torch.nn.Identity")
    name = f"ldm.models.autoencoder.{kind}"
    return section(name, ddconfig=sizes | more, embed_dim=z, lossconfig=loss, **params)


def latent(unet, stage, condition, **params):
    parts = dict(unet_config=unet, first_stage_config=stage, cond_stage_config=condition)
    common = dict(log_every_t=200, monitor="val/loss", image_size=8)
    name = "ldm.models.diffusion.ddpm.LatentDiffusion"
    model = section(name, **common | parts | params) | dict(base_learning_rate=1.0e-4)
    return dict(model=model, data=dict(target="main.DataModuleFromConfig"))


ATTENTION = dict(in_channels=4, out_channels=4, attention_resolutions=[2, 1])
ENCODERS = "ldm.modules.encoders.modules."
CELEBA = latent(
    unet(in_channels=3, out_channels=3, attention_resolutions=[2], num_heads=2),
    stage("VQModelInterface", 3, n_embed=16),
    "__is_unconditional__",
    linear_start=0.001,
    linear_end="3e-2",  # which YAML takes for text
    timesteps=500,
    parameterization="x0",
)
STABLE = latent(
    unet(
        **ATTENTION | dict(attention_resolutions=[1]),
        num_heads=8,
        use_spatial_transformer=True,
        transformer_depth=1,
        context_dim=64,
    ),
    stage(),
    section(f"{ENCODERS}FrozenCLIPEmbedder"),
    linear_start=0.00085,
    linear_end=0.012,
    scale_factor=0.18215,
    conditioning_key="crossattn",
)
SGM = "sgm.modules.diffusionmodules."
XL = dict(
    model=section(
        "sgm.models.diffusion.DiffusionEngine",
        scale_factor=0.13025,
        disable_first_stage_autocast=True,
        denoiser_config=section(
            f"{SGM}denoiser.DiscreteDenoiser",
            num_idx=1000,
            scaling_config=dict(target=f"{SGM}denoiser_scaling.EpsScaling"),
            discretization_config=dict(target=f"{SGM}discretizer.LegacyDDPMDiscretization"),
        ),
        network_config=section(
            f"{SGM}openaimodel.UNetModel",
            **dict(adm_in_channels=1664, num_classes="sequential", use_checkpoint=True),
            **dict(in_channels=4, out_channels=4, model_channels=64, attention_resolutions=[4, 2]),
            **dict(num_res_blocks=1, channel_mult=[1, 2, 2], num_head_channels=32),
            **dict(use_linear_in_transformer=True, transformer_depth=[1, 1, 2], context_dim=192),
            spatial_transformer_attn_type="softmax-xformers",
        ),
        conditioner_config=section(
            "sgm.modules.GeneralConditioner",
            emb_models=[
                section("sgm.modules.encoders.modules.FrozenCLIPEmbedder", layer="hidden"),
                section(
                    "sgm.modules.encoders.modules.FrozenOpenCLIPEmbedder2",
                    **dict(arch="ViT-bigG-14", legacy=False, layer="penultimate"),
                ),
                *[section("sgm.modules.encoders.modules.ConcatTimestepEmbedderND", outdim=256)] * 3,
            ],
        ),
        first_stage_config=stage("AutoencoderKLInferenceWrapper", monitor="val/rec_loss"),
        sampler_config=section(
            "sgm.modules.diffusionmodules.sampling.EulerEDMSampler",
            num_steps=50,
            guider_config=section(f"{SGM}guiders.VanillaCFG", scale=7.0),
        ),
    )
)


def changed(tree, path, value):
    """A copy with a value at "a/b/c" below model.params; "absent" takes it away."""
    tree = copy.deepcopy(tree)
    *above, last = path.split("/")
    place = tree["model"]["params"]
    for key in above:
        place = place[key]
    if value == "absent":
        del place[last]
    else:
        place[last] = value
    return tree


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """A file of a system, and what it holds, written once; without its buffers if so asked."""
    folder, made = tmp_path_factory.mktemp("files"), {}

    def make(name, buffers=False):
        if (name, buffers) not in made:
            config = system(name)
            params = random_params(config)
            path = folder / f"{name}{buffers}.safetensors"
            compvis.write(path, config, params)
            if not buffers:
                tensors = open_state(path)
                kept = {n: t for n, t in tensors.items() if n not in BUFFERS}
                write_safetensors(path, kept)
            made[name, buffers] = path, config, params
        return made[name, buffers]

    return make


@pytest.fixture
def write(tmp_path):
    def write(tree):
        path = tmp_path / "model.yaml"
        path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
        return path

    return write


def test_a_model_of_ones_own_is_what_its_yaml_says(make, write):
    path, config, params = make("ldm-celebahq-256")
    found = open_any(path, config=write(CELEBA))
    same(found.params, params)
    fields = {k: v for k, v in config["unet"].items() if k != "num_head_channels"}
    assert found.config["unet"] == fields | dict(num_heads=2, context_dim=None)
    schedule = dict(name="linear", timesteps=500, start=0.001, end=0.03, zero_terminal_snr=False)
    assert found.config["diffusion"]["schedule"] == schedule
    assert found.config["diffusion"]["parameterization"] == "x0"
    assert found.config["autoencoder"] == config["autoencoder"]
    assert found.config["image_size"] == 16  # 8 latents of twice the side
    assert found.config["sampling"]["guidance"] == 1.0
    assert found.about.startswith("model of model.yaml")


@pytest.mark.parametrize("condition", ["__is_first_stage__", section("torch.nn.Identity")])
def test_what_the_caller_brings_has_no_network(condition, make, write):
    path, *_ = make("ldm-celebahq-256")
    found = open_any(path, config=write(changed(CELEBA, "cond_stage_config", condition)))
    assert found.config["conditioning"] == {}


@pytest.mark.parametrize("buffers", [False, True])
def test_the_yaml_of_a_published_model_says_what_is_known_of_it(buffers, make, write):
    path, config, params = make("stable-diffusion-1", buffers)
    found = open_any(path, config=write(STABLE))
    same(found.params, params)
    assert found.config == config | dict(image_size=16)


def test_a_yaml_of_generative_models(make, write):
    path, config, params = make("stable-diffusion-xl-base")
    found = open_any(path, config=write(XL))
    same(found.params, params)
    assert found.config["unet"]["num_head_channels"] == 32
    assert found.config["sampling"]["guidance"] == 7.0
    alike = ("conditioning", "autoencoder", "diffusion", "image_size")
    assert {key: found.config[key] for key in alike} == {key: config[key] for key in alike}
    other = changed(XL, "denoiser_config/params/scaling_config/target", "a.VScaling")
    assert open_any(path, config=write(other)).config["diffusion"]["parameterization"] == "v"


def test_what_the_yaml_adds_to_conditioners(make, write):
    name = "semantic_synthesis256"
    path, config, _ = make(name)
    tree = latent(
        unet(in_channels=6, out_channels=3, attention_resolutions=[], num_heads=8),
        stage("VQModelInterface", 3, n_embed=16),
        section(f"{ENCODERS}SpatialRescaler", n_stages=3, in_channels=182, out_channels=3),
        conditioning_key="concat",
    )
    tree["model"]["params"]["first_stage_config"]["params"]["ddconfig"]["attn_resolutions"] = [128]
    found = open_any(path, config=write(tree)).config
    expected = config["conditioning"]["segmentation"]
    expected["network"]["n_stages"] = 3
    assert found["conditioning"]["segmentation"] == expected


def test_the_order_of_attention_is_in_the_yaml_or_an_argument(make, write, tmp_path):
    path, _, params = make("ldm-celebahq-256")
    tensors = dict(open_state(path))
    for name in tensors:
        if ".qkv." in name:  # two heads of (q, k, v) each
            by_head = tensors[name].reshape(2, 3, -1, *tensors[name].shape[1:])
            tensors[name] = by_head.swapaxes(0, 1).reshape(tensors[name].shape)
    turned = tmp_path / "turned.safetensors"
    write_safetensors(turned, tensors)
    tree = changed(CELEBA, "unet_config/params/use_new_attention_order", True)
    same(open_any(turned, config=write(tree)).params, params)
    found = open_any(turned, config=write(CELEBA), new_attention_order=True)
    same(found.params, params)
    other = open_any(turned, config=write(CELEBA)).params["unet"]["middle_block_1"]["qkv"]["kernel"]
    assert not np.array_equal(other, params["unet"]["middle_block_1"]["qkv"]["kernel"])


def test_an_autoencoder_alone(make, write):
    path, config, params = make("sd-vae")
    tree = dict(model=stage())
    tree["model"]["params"]["ddconfig"]["ch_mult"] = [1, 1, 2, 2]
    found = open_any(path, config=write(tree))
    assert found.config == config
    same(found.params, params)
    tree["model"]["params"]["ddconfig"]["ch"] = 64
    with pytest.raises(ValueError, match=r"has autoencoder.ch 32, but .*model.yaml says 64"):
        open_any(path, config=write(tree))
    with pytest.raises(
        ValueError, match=r"is a KL autoencoder, but .*model.yaml is of another kind"
    ):
        open_any(path, config=write(STABLE))


def test_a_model_of_pixels(make, write, tmp_path):
    path, _, params = make("ldm-celebahq-256")
    tensors = open_state(path)
    part = tmp_path / "pixels"
    write_safetensors(part, {n: t for n, t in tensors.items() if n.startswith(compvis.UNET)})
    identity = section("ldm.models.autoencoder.IdentityFirstStage")
    found = open_any(part, config=write(changed(CELEBA, "first_stage_config", identity)))
    assert found.config["autoencoder"] == dict(kind="identity", in_channels=3, scale_factor=1.0)
    assert found.config["image_size"] == 8
    same(found.params["unet"], params["unet"])


AT = r"safetensors has "
SAYS = r", but .*model\.yaml says "
UNET, DD = "unet_config/params", "first_stage_config/params/ddconfig"
CONTRADICTIONS = [
    (f"{UNET}/model_channels", 32, rf"{AT}unet.model_channels 64{SAYS}32"),
    (f"{UNET}/channel_mult", [1, 3], rf"{AT}unet.channel_mult \(1, 2\){SAYS}\(1, 3\)"),
    (f"{UNET}/num_res_blocks", 2, rf"{AT}unet.num_res_blocks 1{SAYS}2"),
    (f"{UNET}/context_dim", 96, rf"{AT}unet.context_dim 64{SAYS}96"),
    (f"{UNET}/transformer_depth", 2, rf"{AT}unet.transformer_depth \(1, 1\){SAYS}\(2, 2\)"),
    (f"{UNET}/in_channels", 9, rf"{AT}unet.in_channels 4{SAYS}9"),
    (f"{DD}/ch", 64, rf"{AT}autoencoder.ch 32{SAYS}64"),
    (f"{DD}/z_channels", 8, rf"{AT}autoencoder.z_channels 4{SAYS}8"),
    ("first_stage_config/target", "a.VQModel", rf"{AT}autoencoder.kind 'kl'{SAYS}'vq'"),
    ("cond_stage_config", "__is_unconditional__", rf"{AT}conditioners \['clip'\]{SAYS}\[\]"),
    ("cond_stage_config/target", "a.BERTEmbedder", rf"{AT}conditioners .*{SAYS}\['bert'\]"),
    ("conditioning_key", "concat", rf"{AT}unet.context_dim 64{SAYS}.*=concat"),
    ("linear_end", 0.02, rf"{AT}the schedule .*0.012.*{SAYS}.*0.02"),
    ("timesteps", 500, rf"{AT}the schedule .*1000.*{SAYS}.*500"),
    ("beta_schedule", "cosine", rf"{AT}the schedule .*'linear'.*{SAYS}.*'cosine'"),
    ("scale_factor", 0.2, rf"{AT}scale_factor 0.18215{SAYS}0.2"),
]


@pytest.mark.parametrize("path, value, message", CONTRADICTIONS)
def test_where_tensors_and_yaml_differ_both_are_named(path, value, message, make, write):
    file = make("stable-diffusion-1", buffers=True)[0]
    with pytest.raises(ValueError, match=message):
        open_any(file, config=write(changed(STABLE, path, value)))


def test_the_scale_that_was_measured_is_in_the_file(make, write):
    tree = changed(STABLE, "scale_by_std", True)
    found = open_any(make("stable-diffusion-1", buffers=True)[0], config=write(tree))
    assert found.config["autoencoder"]["scale_factor"] == 0.18215
    with pytest.raises(ValueError, match=r"has no scale_factor, .*model.yaml says scale_by_std"):
        open_any(make("stable-diffusion-1")[0], config=write(tree))


UNKNOWN = [
    (f"{UNET}/num_heads", "absent", r"num_heads=None .* a number, or num_head_channels"),
    (f"{UNET}/dims", 3, "unet_config.params.dims=3 is not supported: expected 2"),
    (f"{UNET}/width", 3, "unet_config.params.width=3 is not supported: expected no such key"),
    (f"{UNET}/num_res_blocks", [1, 2], "num_res_blocks=.* expected one number for all levels"),
    ("unet_config/target", "a.b.DiT", "unet_config.target='a.b.DiT' .* one of UNetModel"),
    ("unet_config", "absent", "unet_config=None .* expected a section"),
    ("first_stage_config/target", "a.NLayer", "'a.NLayer' is not supported: expected one of Auto"),
    ("first_stage_config/params/ddconfig", 3, "params.ddconfig=3 is not supported: .* a section"),
    ("cond_stage_config/target", "a.FrozenT5Embedder", "'a.FrozenT5Embedder' is not supported"),
    ("linear_start", "small", "model.params.linear_start='small' .* expected a number"),
    ("beta_schedule", "sigmoid", "beta_schedule='sigmoid' .* expected one of linear, sqrt_linear"),
    ("parameterization", "score", "parameterization='score' .* expected one of eps, x0, v"),
]


@pytest.mark.parametrize("path, value, message", UNKNOWN)
def test_what_we_do_not_know_is_refused_by_name(path, value, message, make, write):
    file = make("stable-diffusion-1")[0]
    with pytest.raises(ValueError, match=message) as caught:
        open_any(file, config=write(changed(STABLE, path, value)))
    assert "model.yaml: " in str(caught.value)


@pytest.mark.parametrize("path, value", [
    ("image_size", []), (f"{UNET}/out_channels", "absent"),
    ("first_stage_config/params/ddconfig/attn_resolutions", None),
])  # fmt: skip
def test_values_of_another_type_are_one_sentence(path, value, make, write):
    file = make("stable-diffusion-1")[0]
    with pytest.raises(ValueError, match="model.yaml lacks a value, or has one of another type: "):
        open_any(file, config=write(changed(STABLE, path, value)))


@pytest.mark.parametrize("text, message", [
    ("model: [1", "model.yaml is not YAML: while parsing"),
    ("3", "model.yaml: model=None is not supported: expected a section"),
    ("model: {target: cldm.cldm.ControlLDM}", "model.target='cldm.cldm.ControlLDM' .* LatentDiff"),
    ("model: !!python/object/apply:os.system [true]", "model.yaml is not YAML: could not deter"),
])  # fmt: skip
def test_a_file_that_is_no_such_yaml(text, message, make, write):
    with pytest.raises(ValueError, match=message):
        read_any(make("sd-vae")[0], config=write(text))


def test_where_a_yaml_says_nothing(make, tmp_path, write):
    with pytest.raises(FileNotFoundError, match="no YAML at .*nowhere.yaml"):
        read_any(make("sd-vae")[0], config=tmp_path / "nowhere.yaml")
    from ldm_jax.interop import native

    for options in (dict(config=write(STABLE)), dict(new_attention_order=True)):
        with pytest.raises(ValueError, match="contains its config: .* is for files of CompVis'"):
            read_any(native.BUNDLED, **options)


def test_the_schedules_that_a_yaml_can_name_are_ours():
    """latent-diffusion's make_beta_schedule, by its own names."""
    n, start, end = 7, 0.01, 0.2
    root = np.linspace(start**0.5, end**0.5, n)
    expected = dict(linear=root**2, sqrt_linear=np.linspace(start, end, n))
    expected["sqrt"] = np.linspace(start, end, n) ** 0.5
    for name, betas in expected.items():
        found = make_schedule(name=name, timesteps=n, start=start, end=end).alphas_cumprod
        np.testing.assert_allclose(found, np.cumprod(1 - betas))
