"""Folders of diffusers: a pipeline, or an autoencoder or UNet by itself, read and written.

A pipeline is a `model_index.json`, which names the class of each component, and a folder for each,
with its JSON and its weights. What a component means follows from its class; what a model can do
from its networks, not from the name of the pipeline.
"""

from ldm_jax.interop.diffusers.reading import read, read_component
from ldm_jax.interop.diffusers.writing import write

__all__ = ["read", "read_component", "write"]
