# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Fine-tune a published checkpoint
#
# In Colab, choose a TPU or a GPU under *Runtime → Change runtime type*; a CPU works as well.
# `MODEL` is a folder of diffusers, a `.ckpt` or a `.safetensors`, such as Stable Diffusion 1.5; `PICTURES` is a
# folder of pictures with captions, in `one.txt` beside `one.jpg`. What trains is a LoRA of the UNet's attention.

# %%
REPOSITORY = "https://github.com/OWNER/ldm_jax"  # where this notebook comes from
EXTRA = "[tpu]"  # "[cuda13]" for a GPU, "" for a CPU

# !test -e ldm_jax/requirements.txt || git clone -q {REPOSITORY} ldm_jax
# %cd ldm_jax
# %pip install -q "jax{EXTRA}>=0.10,<0.13" -r requirements.txt
import jax

import ldm_jax

print("ldm_jax", ldm_jax.__version__, "jax", jax.__version__, "on", jax.devices())

# %%
MODEL, PICTURES, RUNS = "stable-diffusion-v1-5", "pictures", "runs"
STEPS, BATCH = 1000, 4
PROMPT = "a photo of a sparrow"

# %%
from configs import lora
from ldm_jax.runtime.console import log_to_console

log_to_console()
config = lora.get_config("sd15")
config.init_from = MODEL
config.data.path = PICTURES
config.precision = "bfloat16"  # arithmetic; parameters stay float32
config.sampling.prompts = (PROMPT,)
config.train.update(steps=STEPS, batch_size=BATCH)
ldm_jax.train(config, f"{RUNS}/lora")

# %% [markdown]
# Without the LoRA, with half of it, and with all of it. `lora.safetensors` in the run's folder is in kohya's
# format, which other programs open.

# %%
import numpy as np
from PIL import Image

from ldm_jax.pictures import image_grid, to_uint8

pipe = ldm_jax.load(MODEL)
rows = [
    changed(PROMPT, n=4, seed=0)
    for changed in (pipe, *(pipe.with_lora(f"{RUNS}/lora", scale=s) for s in (0.5, 1.0)))
]
Image.fromarray(image_grid(to_uint8(np.concatenate(rows)), 4))
