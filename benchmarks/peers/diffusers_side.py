"""diffusers with torch, eager, as its users run it on a CPU."""

import diffusers
import numpy as np
import torch

from benchmarks.peers.worker import serve

diffusers.utils.logging.disable_progress_bar()


def _pipeline(folder, dtype=torch.float32):
    made = diffusers.StableDiffusionPipeline.from_pretrained(
        folder, safety_checker=None, torch_dtype=dtype
    )
    made.set_progress_bar_config(disable=True)
    return made


def _channels_first(array):
    return torch.from_numpy(np.ascontiguousarray(array.transpose(0, 3, 1, 2)))


def _channels_last(tensor):
    return tensor.float().numpy().transpose(0, 2, 3, 1)


def _denoise(unet, inputs, dtype=torch.float32):
    x = _channels_first(inputs["x"]).to(dtype)
    t, context = torch.from_numpy(inputs["t"]), torch.from_numpy(inputs["context"]).to(dtype)
    return lambda: unet(x, t, context).sample


def forward(folder, inputs, dtype=torch.float32):
    denoise = _denoise(_pipeline(folder, dtype).unet.eval(), inputs, dtype)

    def work():
        with torch.inference_mode():
            return _channels_last(denoise())

    return work


def forward_bfloat16(folder, inputs):
    return forward(folder, inputs, torch.bfloat16)


def step(folder, inputs):
    unet = _pipeline(folder).unet.train()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, weight_decay=0.01)
    average = [parameter.detach().clone() for parameter in unet.parameters()]
    denoise, noise = _denoise(unet, inputs), _channels_first(inputs["noise"])

    def work():
        optimizer.zero_grad(set_to_none=True)
        loss = torch.nn.functional.mse_loss(denoise(), noise)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, [*unet.parameters()], 0.001)
        return loss.detach().numpy()

    return work


def encode(folder, inputs):
    vae, image = _pipeline(folder).vae, _channels_first(2 * inputs["image"] - 1)

    def work():
        with torch.inference_mode():
            return _channels_last(vae.encode(image).latent_dist.mean * vae.config.scaling_factor)

    return work


def decode(folder, inputs):
    vae, latents = _pipeline(folder).vae, _channels_first(inputs["latents"])

    def work():
        with torch.inference_mode():
            decoded = vae.decode(latents / vae.config.scaling_factor).sample
        return _channels_last((decoded / 2 + 0.5).clamp(0, 1))

    return work


def sample(folder, inputs):
    pipeline, latents = _pipeline(folder), _channels_first(inputs["noise"][:1])
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
    side = 8 * latents.shape[-1]
    options = dict(num_inference_steps=25, guidance_scale=7.5, height=side, width=side)
    return lambda: pipeline("a red apple", latents=latents, output_type="np", **options).images


if __name__ == "__main__":
    versions = f"diffusers {diffusers.__version__}, torch {torch.__version__}"
    works = (forward, forward_bfloat16, step, encode, decode, sample)
    serve(versions, {work.__name__: work for work in works})
