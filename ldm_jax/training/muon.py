"""Muon, orthogonalised momentum (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

`optax.contrib.muon` computes the same with ten products of every whole matrix, which on a CPU takes
longer than the gradients of a small network. Here there are two such products: the iteration runs
on the Gram matrix of the short side.
"""

import math

import jax
import jax.numpy as jnp
import optax

# p(s) = a·s + b·s³ + c·s⁵ of the singular values: the steepest at 0 of those that stay near 1.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrix: jax.Array, steps: int = 5) -> jax.Array:
    """U·S·Vᵀ for a matrix (m, n) with singular vectors U and V, and S between about 0.7 and 1.2.

    Directions far below the largest (under 1/1000 of the Frobenius norm) keep less; 0 stays 0.
    With X ← X·P and P = a + b·G + c·G² of the Gram matrix G = XᵀX, G itself becomes P·G·P, so X is
    needed at the beginning and at the end only.
    """
    if matrix.shape[0] < matrix.shape[1]:
        return orthogonalize(matrix.T, steps).T
    a, b, c = COEFFICIENTS
    matrix = matrix / (jnp.linalg.norm(matrix) + 1e-8)
    gram = matrix.T @ matrix
    identity = jnp.eye(len(gram), dtype=gram.dtype)
    product = identity
    for _ in range(steps):
        factor = a * identity + b * gram + c * gram @ gram
        product, gram = product @ factor, factor @ gram @ factor
    return matrix @ product


def scale_by_muon(
    momentum: float = 0.95, rms: float = 0.2, moments: str = "float32"
) -> optax.GradientTransformation:
    """Nesterov momentum of kernels, orthogonalised, with a root mean square of about `rms`.

    A kernel (…, n) is treated as the matrix from all its other axes to n. If `rms` is that of
    Adam's updates, Adam's learning rate and weight decay apply (Liu et al. 2025, eq. 4). The
    momentum is kept in the type `moments`.
    """

    def direction(update):
        matrix = update.reshape(-1, update.shape[-1])
        scale = rms * math.sqrt(max(matrix.shape))
        return (scale * orthogonalize(matrix)).reshape(update.shape)

    return optax.chain(
        optax.trace(momentum, nesterov=True, accumulator_dtype=moments),
        optax.stateless(lambda updates, params: jax.tree.map(direction, updates)),
    )
