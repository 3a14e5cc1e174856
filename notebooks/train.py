# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Train on your own pictures
#
# In Colab, choose a TPU or a GPU under *Runtime → Change runtime type*; a CPU works as well.
# `PICTURES` is a folder, for instance of a mounted drive; the caption of `one.jpg` is in `one.txt`, or it is the
# name of the sub-folder. Both runs go on where they stopped if their cells are run again.

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
PICTURES, RUNS = "pictures", "runs"
SIZE = 64
STEPS = {"autoencoder": 7500, "txt2img": 9000}
PROMPT = "a sparrow"

# %% [markdown]
# First the autoencoder. The log says what was found, and what was left out and why.

# %%
from configs import autoencoder, txt2img
from ldm_jax.runtime.console import log_to_console

log_to_console()
config = autoencoder.get_config()
config.data.update(source="folder", path=PICTURES, image_size=SIZE)
config.autoencoder.resolution = SIZE
config.train.steps = STEPS["autoencoder"]
ldm_jax.train(config, f"{RUNS}/autoencoder")

# %% [markdown]
# Then the text-to-image model, on its latents.

# %%
config = txt2img.get_config()
config.first_stage = f"{RUNS}/autoencoder"
config.data.update(source="folder", path=PICTURES, image_size=SIZE)
config.conditioning.text.vocabulary = "bert"  # any English
config.sampling.prompts = (PROMPT,)
config.train.steps = STEPS["txt2img"]
ldm_jax.train(config, f"{RUNS}/txt2img")

# %%
from PIL import Image

from ldm_jax.pictures import image_grid, to_uint8

pipe = ldm_jax.load(f"{RUNS}/txt2img")
Image.fromarray(image_grid(to_uint8(pipe(PROMPT, n=8, seed=0)), 4))
