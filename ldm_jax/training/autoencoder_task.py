"""Stage 1: the autoencoder with LDM's complete loss (Rombach et al. 2022, §G; Esser et al. 2021).

    L = Σ|x − x̂| + λ_p·LPIPS(x, x̂)·CHW + R + λ_d·λ_adaptive·L_GAN

summed over each image, averaged over the batch. R, the regulariser of the latents, is
λ_KL·KL(q(z|x) ‖ N(0, I)), or for a codebook λ_c·CHW times the loss of `VectorQuantizer` (the
originals divide all of L by CHW there) and `loss.revival_weight` times `revival_loss` (0 in the
originals). The discriminator is trained on the reconstruction of the same forward pass (the
originals run a second one with a new posterior sample for it).
"""

import dataclasses
import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.data.loader import batches_once
from ldm_jax.data.sources import sample
from ldm_jax.diffusion.noise import per_example
from ldm_jax.metrics.extractors import load_extractor
from ldm_jax.metrics.reconstruction import reconstruction_quality
from ldm_jax.models.autoencoder import AutoencoderKL
from ldm_jax.models.build import Autoencoder, make_autoencoder
from ldm_jax.models.discriminator import PatchDiscriminator
from ldm_jax.models.lpips import lpips
from ldm_jax.models.vq import VQModel, revival_loss
from ldm_jax.pictures import image_grid, to_signed, to_uint8, to_unit
from ldm_jax.runtime.mesh import spread, to_host
from ldm_jax.training.accumulation import in_parts
from ldm_jax.training.batches import Prepare, about_data, training_loader
from ldm_jax.training.evaluators import options_of
from ldm_jax.training.precision import compute_type
from ldm_jax.training.state import Params
from ldm_jax.training.summary import first_pictures, log_summary
from ldm_jax.training.trainable import like, merge, split
from ldm_jax.training.workdir import config_dict

log = logging.getLogger(__name__)


def kl_divergence(mean: jax.Array, logvar: jax.Array) -> jax.Array:
    """KL(N(mean, exp(logvar)) ‖ N(0, I)) = ½Σ(μ² + σ² − 1 − log σ²) per image, (B,)."""
    terms = jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar
    return 0.5 * jnp.sum(terms, axis=(1, 2, 3))


def hinge_loss(real: jax.Array, fake: jax.Array) -> jax.Array:
    """½[E max(0, 1 − D(x)) + E max(0, 1 + D(x̂))] (Lim & Ye 2017)."""
    return 0.5 * (jnp.mean(jax.nn.relu(1.0 - real)) + jnp.mean(jax.nn.relu(1.0 + fake)))


def vanilla_loss(real: jax.Array, fake: jax.Array) -> jax.Array:
    """½[E log(1 + e^−D(x)) + E log(1 + e^D(x̂))], cross-entropy (Goodfellow et al. 2014)."""
    return 0.5 * (jnp.mean(jax.nn.softplus(-real)) + jnp.mean(jax.nn.softplus(fake)))


def noisy_latents(latents: jax.Array, level: jax.Array | float, key: jax.Array) -> jax.Array:
    """Latents (B, h, w, c) with the kind of error that a diffusion model's have.

    The noise of an image has the standard deviation |n|·`level`, n ~ N(0, 1), in units of the
    standard deviation of the batch's latents. Half of its variance is the same at all positions,
    as what is drawn is often tinted as a whole. A decoder that is trained on such latents draws
    what they are near to, and not their errors (Zheng et al. 2025, arXiv 2510.11690, train theirs
    on independent noise).
    """
    size, channels = len(latents), latents.shape[-1]
    keys = jax.random.split(key, 3)
    shapes = (size, 1, 1, 1), latents.shape, (size, 1, 1, channels)
    n, own, common = map(functools.partial(per_example, jax.random.normal), keys, shapes)
    spread = jax.lax.stop_gradient(jnp.std(latents))
    return latents + spread * level * jnp.abs(n) * (own + common) / np.sqrt(2.0)


DISCRIMINATOR_LOSSES = {"hinge": hinge_loss, "vanilla": vanilla_loss}


@dataclasses.dataclass(frozen=True)
class AutoencoderTask:
    """See `ldm_jax.training.state.Task`. `perceptual`: LPIPS parameters, or None."""

    config: Any
    frozen: Params
    loaded: Params
    source: Any
    held_out: Any
    perceptual: dict[str, jax.Array] | None

    ema_networks = ("autoencoder",)

    def replace(self, **fields: Any) -> "AutoencoderTask":
        """This task with other `fields`."""
        return dataclasses.replace(self, **fields)

    @property
    def model(self) -> Autoencoder:
        remat = self.config.train.get("remat", "")
        return make_autoencoder(self.config.autoencoder, compute_type(self.config), remat=remat)

    @property
    def discriminator(self) -> PatchDiscriminator:
        return PatchDiscriminator(**self.config.discriminator, dtype=compute_type(self.config))

    def init(self, key, loaded):
        return split(merge(self.fresh(key), loaded), self.config.trainable)[0]

    def fresh(self, key: jax.Array) -> Params:
        """Random parameters of both networks."""
        size = self.config.data.image_size
        images = jnp.zeros((1, size, size, self.model.in_channels))
        model_key, discriminator_key = jax.random.split(key)
        autoencoder = self.model.init(model_key, images)["params"]
        if isinstance(self.model, AutoencoderKL):
            # 0 in the originals, where posterior noise dominates the first thousand steps.
            quant = self.model.use_quant_conv
            last = autoencoder["quant_conv"] if quant else autoencoder["encoder"]["conv_out"]
            logvar = slice(self.model.embed_dim, None)
            last["bias"] = last["bias"].at[logvar].set(self.config.loss.logvar_init)
        return {
            "autoencoder": autoencoder,
            "discriminator": self.discriminator.init(discriminator_key, images)["params"],
        }

    def phase(self, step):
        """Whether the discriminator is used in a step: the originals' hard switch.

        Two programs instead of a branch in one: XLA:CPU computes the gradients of convolutions
        fifty times slower inside lax.cond.
        """
        return step >= self.config.loss.disc_start

    def gradients(self, params, frozen, batch, key, phase):
        trained, params = params, merge(frozen, params)
        loss_config, model = self.config.loss, self.model
        x = to_signed(batch["image"])
        batch_size, pixels = x.shape[0], x[0].size
        layer = params["autoencoder"]["conv_out"]
        # The discriminator's statistics and its adaptive weight are of the whole batch, so only the
        # large networks work in parts.
        parts = functools.partial(in_parts, parts=self.config.train.get("accumulate", 1))

        def forward(autoencoder):
            """The inputs of the last layer and the regulariser R; and metrics."""
            variables = {"params": autoencoder}
            encode = model.prequant if isinstance(model, VQModel) else model.moments
            encoded = parts(lambda x: model.apply(variables, x, method=encode))(x)
            if isinstance(model, VQModel):
                z = encoded
                quantized = model.apply(variables, z, method=model.nearest)
                codebook_loss = quantized.loss
                if loss_config.get("revival_weight"):
                    table = autoencoder["quantize"]["embedding"]["embedding"]
                    revival = revival_loss(table, z, quantized.indices)
                    codebook_loss += loss_config.revival_weight * revival
                z, cost = quantized.latents, loss_config.codebook_weight * pixels * codebook_loss
                used = {"perplexity": quantized.perplexity, "codebook_usage": quantized.usage}
                metrics = {"codebook_loss": quantized.loss} | used
            else:
                mean, logvar = encoded
                z = mean + jnp.exp(0.5 * logvar) * per_example(jax.random.normal, key, mean.shape)
                kl = jnp.mean(kl_divergence(mean, logvar))
                cost, metrics = loss_config.kl_weight * kl, {"kl": kl}
            if loss_config.get("latent_noise"):
                z = noisy_latents(z, loss_config.latent_noise, jax.random.fold_in(key, 1))
            features = parts(lambda z: model.apply(variables, z, method=model.features))(z)
            return (features, cost), metrics

        def last_layer(layer, features):
            variables = {"params": {**params["autoencoder"], "conv_out": layer}}
            return model.apply(variables, features, method=model.last_layer)

        def reconstruction(x_hat):
            absolute = jnp.sum(jnp.abs(x - x_hat)) / batch_size
            if self.perceptual is None:
                return absolute, {"rec_loss": absolute / pixels}
            distance = jnp.mean(parts(functools.partial(lpips, self.perceptual))(x, x_hat))
            total = absolute + loss_config.perceptual_weight * distance * pixels
            return total, {"rec_loss": absolute / pixels, "lpips": distance}

        # One forward pass, then the gradients of the losses: to the image, through the last layer
        # (whose gradients balance the two losses), and once through all other layers.
        (features, cost), backward, latent_metrics = jax.vjp(
            forward, params["autoencoder"], has_aux=True
        )
        x_hat, last_backward = jax.vjp(last_layer, layer, features)
        (nll, metrics), nll_to_image = jax.value_and_grad(reconstruction, has_aux=True)(x_hat)
        nll_to_layer, _ = last_backward(nll_to_image)

        metrics |= latent_metrics | {"loss": nll + cost}
        d_grads = jax.tree.map(jnp.zeros_like, params["discriminator"])
        to_image = nll_to_image
        if phase:
            g_to_image, d_grads, gan_metrics = self._adversarial(params["discriminator"], x, x_hat)
            g_to_layer, _ = last_backward(g_to_image)
            norms = (jnp.linalg.norm(g["kernel"]) for g in (nll_to_layer, g_to_layer))
            nll_norm, g_norm = norms
            weight = loss_config.disc_weight * jnp.clip(nll_norm / (g_norm + 1e-4), 0.0, 1e4)
            to_image += weight * g_to_image
            metrics |= gan_metrics | {"d_weight": weight}

        layer_grads, to_features = last_backward(to_image)
        (grads,) = backward((to_features, jnp.ones_like(cost)))
        # `forward` stops before the last layer, so its own gradient for it is zero.
        grads = {"autoencoder": {**grads, "conv_out": layer_grads}, "discriminator": d_grads}
        return like(grads, trained), metrics

    def _adversarial(self, discriminator, x, x_hat):
        """Gradients of the generator's loss by the image and of the discriminator; metrics."""

        def generator_loss(x_hat):
            return -jnp.mean(self.discriminator.apply({"params": discriminator}, x_hat))

        def discriminator_loss(discriminator):
            real = self.discriminator.apply({"params": discriminator}, x)
            fake = self.discriminator.apply({"params": discriminator}, x_hat)
            loss = DISCRIMINATOR_LOSSES[self.config.loss.disc_loss](real, fake)
            return loss, (jnp.mean(real), jnp.mean(fake))

        g_loss, g_to_image = jax.value_and_grad(generator_loss)(x_hat)
        (d_loss, (real, fake)), d_grads = jax.value_and_grad(discriminator_loss, has_aux=True)(
            discriminator
        )
        logits = {"logits_real": real, "logits_fake": fake}
        return g_to_image, d_grads, {"g_loss": g_loss, "d_loss": d_loss} | logits

    def batches(self, start):
        prepare = Prepare(self.config.data.augment, ())
        loader = training_loader(self.config, self.source, prepare, ("image",))
        for step, batch in loader.iterate(start):
            yield step, {"image": batch["image"]}

    def summary(self):
        log_summary(self.source, self.held_out)

    def first_batch_picture(self, start):
        prepare = Prepare(self.config.data.augment, ())
        return first_pictures(self.config, self.source, prepare, start)

    def evaluate(self, ema):
        if not len(self.held_out):
            return {}
        whole = merge(self.frozen, ema)
        wanted = options_of(self.config, "reconstruction")["rfd"]
        return reconstruction_quality(
            lambda x: self._drawn(whole, x),
            self.held_out,
            self.perceptual,
            load_extractor() if wanted else None,
        )

    def preview(self, ema):
        """Held-out pictures, each row above its reconstructions."""
        source = self.held_out if len(self.held_out) else self.source
        images = next(batches_once(source, 32, entries=("image",)))["image"]
        pairs = np.stack([images, to_uint8(self._drawn(merge(self.frozen, ema), images))])
        rows = pairs.reshape(2, 2, 16, *images.shape[1:]).swapaxes(0, 1)
        return image_grid(rows.reshape(64, *images.shape[1:]), columns=16)

    def export(self, ema):
        """Measures `scale_factor`: 1/std over all latents of all training pictures (LDM, §G), or of
        the first of an endless source. If the encoder did not train, it stays."""
        about = {"task": "autoencoder", "data": about_data(self.config)}
        first_stage = config_dict(self.config)["autoencoder"]
        if not {"encoder", "quant_conv"} & ema.get("autoencoder", {}).keys():
            return about | {"autoencoder": first_stage}, merge(self.frozen, ema)
        ema, count, total, square = merge(self.frozen, ema), 0.0, 0.0, 0.0
        for batch in batches_once(sample(self.source), 32, entries=("image",)):
            mean, logvar = (
                np.float64(a[batch["valid"]]) for a in self._moments(ema, batch["image"])
            )
            count += mean.size
            total += mean.sum()
            square += (mean**2 + np.exp(logvar)).sum()
        scale = float((square / count - (total / count) ** 2) ** -0.5)
        log.info("scale_factor %.5f, over %d latents", scale, count)
        return about | {"autoencoder": first_stage | {"scale_factor": scale}}, ema

    def _drawn(self, params: Params, images: np.ndarray) -> np.ndarray:
        """Reconstructions in [0, 1], on the host; each device computes its share."""
        return to_host(self._reconstruct(params, spread(images)))

    @functools.cached_property
    def _reconstruct(self):
        @jax.jit
        def reconstruct(ema, images):
            decoded = self.model.apply({"params": ema["autoencoder"]}, to_signed(images))
            return to_unit(decoded)

        return reconstruct

    @functools.cached_property
    def _moments(self):
        model = make_autoencoder(self.config.autoencoder)  # float32, as the exported model

        @jax.jit
        def moments(ema, images):
            variables = {"params": ema["autoencoder"]}
            return model.apply(variables, to_signed(images), method="moments")

        return lambda ema, images: to_host(moments(ema, spread(images)))
