"""diffusers with torch: eager, as its users run it on a CPU; what trains or draws in bfloat16, for
a GPU, with torch.compile."""

import diffusers
import numpy as np
import torch

from benchmarks.peers.worker import serve

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
diffusers.utils.logging.disable_progress_bar()


def _pipeline(folder, dtype=torch.float32):
    made = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype)
    made.set_progress_bar_config(disable=True)
    return made.to(DEVICE)


def _tensor(array, dtype=torch.float32):
    return torch.from_numpy(np.ascontiguousarray(array)).to(DEVICE, dtype)


def _channels_first(array, dtype=torch.float32):
    return _tensor(array.transpose(0, 3, 1, 2), dtype)


def _channels_last(tensor):
    return tensor.float().cpu().numpy().transpose(0, 2, 3, 1)


def _denoise(unet, inputs, dtype=torch.float32):
    x, context = _channels_first(inputs["x"], dtype), _tensor(inputs["context"], dtype)
    t = _tensor(inputs["t"])
    return lambda: unet(x, t, context).sample


def forward(folder, inputs, dtype=torch.float32):
    denoise = _denoise(_pipeline(folder, dtype).unet.eval(), inputs, dtype)

    def work():
        with torch.inference_mode():
            return _channels_last(denoise())

    return work


def forward_bfloat16(folder, inputs):
    return forward(folder, inputs, torch.bfloat16)


def step(folder, inputs, dtype=None):
    """Parameters are float32; with a `dtype` the network is compiled and computes in it."""
    unet = _pipeline(folder).unet.train()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, weight_decay=0.01)
    average = [parameter.detach().clone() for parameter in unet.parameters()]
    called = torch.compile(unet.to(memory_format=torch.channels_last)) if dtype else unet
    denoise, noise = _denoise(called, inputs), _channels_first(inputs["noise"])

    def work():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(DEVICE, dtype, enabled=dtype is not None):
            predicted = denoise()
        loss = torch.nn.functional.mse_loss(predicted.float(), noise)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, [*unet.parameters()], 0.001)
        return loss.detach().cpu().numpy()

    return work


def step_bfloat16(folder, inputs):
    return step(folder, inputs, torch.bfloat16)


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


def sample(folder, inputs, pipeline=None):
    pipeline = pipeline or _pipeline(folder)
    latents = _channels_first(inputs["noise"][:1], pipeline.dtype)
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
    side, steps = 8 * latents.shape[-1], int(inputs["steps"])
    options = dict(num_inference_steps=steps, guidance_scale=7.5, height=side, width=side)
    return lambda: pipeline("a red apple", latents=latents, output_type="np", **options).images


def sample_bfloat16(folder, inputs):
    pipeline = _pipeline(folder, torch.bfloat16)
    pipeline.unet.to(memory_format=torch.channels_last)
    pipeline.unet = torch.compile(pipeline.unet, mode="max-autotune", fullgraph=True)
    pipeline.vae.decode = torch.compile(pipeline.vae.decode, mode="max-autotune")
    return sample(folder, inputs, pipeline)


if __name__ == "__main__":
    versions = f"diffusers {diffusers.__version__}, torch {torch.__version__}"
    works = (forward, forward_bfloat16, step, step_bfloat16, encode, decode, sample)
    works = {work.__name__: work for work in (*works, sample_bfloat16)}
    serve(versions, works, torch.cuda.max_memory_allocated if DEVICE == "cuda" else None)
