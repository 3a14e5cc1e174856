"""Reading and writing of diffusers' folders: a pipeline, or an autoencoder or UNet alone.

A pipeline is a `model_index.json`, which names the class of each component, and a folder for each
component, with its JSON and its weights. The class of a component determines how it is read; the
networks of a model, not the name of the pipeline, determine its conditions.
"""

from ldm_jax.interop.diffusers.reading import read, read_component
from ldm_jax.interop.diffusers.writing import write

__all__ = ["read", "read_component", "write"]
