# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Draw with a latent diffusion model
#
# In Colab, choose a TPU or a GPU under *Runtime → Change runtime type*; a CPU works as well.
# The first cell installs what is needed and shows the device.

# %%
REPOSITORY = "https://github.com/OWNER/ldm_jax"  # where this notebook comes from
EXTRA = "[tpu]"  # "[cuda13]" for a GPU, "" for a CPU

# !test -e ldm_jax/requirements.txt || git clone -q {REPOSITORY} ldm_jax
# %cd ldm_jax
# %pip install -q "jax{EXTRA}>=0.10,<0.13" -r requirements.txt
import jax

import ldm_jax

print("ldm_jax", ldm_jax.__version__, "jax", jax.__version__, "on", jax.devices())

# %% [markdown]
# `load()` opens the bundled model, which knows 120 kinds of object on white. `load(PATH)` opens a workdir, a
# `.safetensors`, a `.ckpt` or a folder of diffusers.

# %%
pipe = ldm_jax.load()

# %% [markdown]
# The first call compiles; later ones with as many pictures and steps do not.

# %%
from PIL import Image

from ldm_jax.pictures import image_grid, to_uint8

PROMPTS = ["a cat left of a star", "three tulips", "a rocket above a house"]
images = pipe(PROMPTS, n=4, guidance=4.0, steps=50, seed=0)  # (12, 64, 64, 3) in [0, 1]
Image.fromarray(image_grid(to_uint8(images), 4)).resize((1056, 792))
