"""Agreement of our networks with the originals, whose numbers `scripts/write_goldens.py` wrote."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from ldm_jax.models.layers import GroupNorm
from scripts.write_goldens import GOLDEN, lpips_weights, random_weights, uniform
from tests.models.torch_layout import convert, joined, leaves, to_flax


@pytest.fixture(autouse=True)
def full_precision():
    """Accelerators multiply in fewer bits by default."""
    with jax.default_matmul_precision("highest"):
        yield


def run_once(function, *args):
    """What jit of the function gives, compiled in half the time without LLVM's optimisation."""
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else {}
    return jax.jit(function).lower(*args).compile(options)(*args)


def distance(ours, reference) -> float:
    """Relative: ‖ours − reference‖ / ‖reference‖."""
    assert ours.shape == reference.shape
    difference = np.asarray(ours, np.float64) - reference
    return float(np.linalg.norm(difference) / np.linalg.norm(reference))


@pytest.fixture
def agrees():
    """Asserts that a network's outputs and gradients are those of a golden."""

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

        references = dict(convert(k, array, rules) for k, array in part("gradient").items())
        references |= part("input_gradient")
        known = {path: array for path, array in leaves(params).items() if path in references}

        def run(params, known, floats):
            def loss(known, floats):
                full = jax.tree_util.tree_map_with_path(
                    lambda path, leaf: known.get(joined(path), leaf), params
                )
                computed = apply(full, **floats, **integers)
                return sum(jnp.vdot(computed[k], cotangents[k]) for k in outputs), computed

            gradients, computed = jax.grad(loss, argnums=(0, 1), has_aux=True)(known, floats)
            return computed, gradients[0] | gradients[1]

        computed, gradients = run_once(run, params, known, floats)
        errors = {key: distance(computed[key], reference) for key, reference in outputs.items()}
        gradient_errors = {
            key: distance(gradients[key], reference.reshape(gradients[key].shape))
            for key, reference in references.items()
        }
        print(f"{name}: {errors}, gradients {gradient_errors}")  # shown by pytest -rP
        assert max(errors.values()) <= tolerance, errors
        assert max(gradient_errors.values()) <= gradient_tolerance, gradient_errors

    return agrees


@pytest.fixture
def fresh():
    """Function of a module and its inputs to its first output and its initial parameters."""

    def fresh(module, *inputs):
        key = jax.random.key(0, impl="rbg")  # quicker to compile than the default
        output, variables = run_once(module.init_with_output, key, *inputs)
        return output, variables["params"]

    return fresh


@pytest.fixture
def epsilons():
    """Function of a module and its inputs to {path of each normalisation: its epsilon}."""

    def epsilons(module, *inputs, **named):
        found = {}

        def note(call, args, kwargs, context):
            if isinstance(context.module, GroupNorm | nn.LayerNorm):
                found["/".join(context.module.path)] = context.module.epsilon
            return call(*args, **kwargs)

        with nn.intercept_methods(note):
            jax.eval_shape(module.init, jax.random.key(0), *inputs, **named)
        return found

    return epsilons


@pytest.fixture
def size():
    """Function of a module and its inputs to (millions of parameters, number of tensors)."""

    def size(module, *inputs, **named):
        shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs, **named)["params"]
        counts = [leaf.size for leaf in jax.tree.leaves(shapes)]
        return sum(counts) / 1e6, len(counts)

    return size
