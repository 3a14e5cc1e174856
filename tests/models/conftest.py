"""Agreement of our networks with the originals, whose numbers `scripts/write_goldens.py` wrote."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scripts.write_goldens import GOLDEN, lpips_weights, random_weights, uniform
from tests.models.torch_layout import convert, leaves, to_flax


@pytest.fixture(autouse=True)
def full_precision():
    """Accelerators multiply in fewer bits by default."""
    with jax.default_matmul_precision("highest"):
        yield


def distance(ours, reference) -> float:
    """Relative: ‖ours − reference‖ / ‖reference‖."""
    assert ours.shape == reference.shape
    difference = np.asarray(ours, np.float64) - reference
    return float(np.linalg.norm(difference) / np.linalg.norm(reference))


@pytest.fixture
def agrees():
    """Asserts that a network computes what a golden says, and so do its gradients."""

    def agrees(name, rules, init, apply, tolerance, gradient_tolerance=1e-4):
        """Args:
        name: of the golden.
        rules: of `torch_layout`.
        init: function of the inputs to the parameters' shapes.
        apply: function of parameters and inputs to outputs by name.
        """
        with np.load(GOLDEN / f"{name}.npz") as file:
            about = json.loads(str(file["about"]))
            golden = {key: file[key] for key in file if key != "about"}

        def part(kind):
            prefix = f"{kind}/"
            return {k.removeprefix(prefix): golden[k] for k in golden if k.startswith(prefix)}

        inputs, outputs = part("input"), part("output")
        draw = lpips_weights if name == "lpips" else random_weights
        like = jax.eval_shape(lambda inputs: init(**inputs), inputs)
        params = to_flax(draw(about["shapes"]), rules, like)
        floats = {key: array for key, array in inputs.items() if array.dtype == np.float32}
        integers = {key: jnp.asarray(inputs[key]) for key in inputs.keys() - floats.keys()}
        cotangents = {k: uniform(f"cotangent/{k}", a.shape) for k, a in outputs.items()}

        @jax.jit
        def run(params, floats):
            def loss(params, floats):
                computed = apply(params, **floats, **integers)
                return sum(jnp.vdot(computed[k], cotangents[k]) for k in outputs), computed

            gradients, computed = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, floats)
            return computed, *gradients

        computed, gradients, input_gradients = run(params, floats)
        gradients = leaves(gradients)
        errors, gradient_errors = {}, {}
        for key, reference in outputs.items():
            errors[key] = distance(computed[key], reference)
        for key, reference in part("input_gradient").items():
            gradient_errors[key] = distance(input_gradients[key], reference)
        for key, reference in part("gradient").items():
            path, reference = convert(key, reference, rules)
            ours = gradients[path]
            gradient_errors[path] = distance(ours, reference.reshape(ours.shape))
        print(f"{name}: {errors}, gradients {gradient_errors}")  # shown by pytest -rP
        assert max(errors.values()) <= tolerance, errors
        assert max(gradient_errors.values()) <= gradient_tolerance, gradient_errors

    return agrees


@pytest.fixture
def size():
    """Function of a module and shapes of inputs to (millions of parameters, number of tensors)."""

    def size(module, *inputs):
        shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
        counts = [leaf.size for leaf in jax.tree.leaves(shapes)]
        return sum(counts) / 1e6, len(counts)

    return size
