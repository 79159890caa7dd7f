"""The Hopfield codec: a code becomes the weights of a Hopfield network that remembers it, and a matrix becomes a code.

W(c) = c c^T - I stores one code c, int8 `[L]`. Its only fixed points under asynchronous updates are c and -c, and every
start converges to one of them, so decoding undoes encoding up to the global sign, and a damaged W still decodes to c.
The sum of the u-th superdiagonal of W is the aperiodic autocorrelation C_c(u).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoded:
    """What a batch of matrices decodes to.

    Attributes:
        codes: int8 `[B, L]`, first chip +1.
        margin: float32 `[B]`, min_i x_i h_i over the largest possible field: 1 for an encoded code, negative if x is
            no fixed point.
        fit: float32 `[B]`, |x^T W x| / (L |W|_F), in [0, 1]: how much of W the code explains.
    """

    codes: jax.Array
    margin: jax.Array
    fit: jax.Array


def encode(codes: jax.Array) -> jax.Array:
    """W = c c^T - I, float32 `[B, L, L]` of codes `[B, L]`; relaxed codes c give c c^T without its diagonal."""
    c = codes.astype(jnp.float32)
    return without_diagonal(c[:, :, None] * c[:, None, :])


def without_diagonal(matrices: jax.Array) -> jax.Array:
    """`[B, L, L]` with a zero diagonal."""
    return matrices * (1 - jnp.eye(matrices.shape[-1], dtype=matrices.dtype))[None]


def symmetric(matrices: jax.Array) -> jax.Array:
    """The Hopfield network nearest to any matrices `[B, L, L]`: symmetric, without self-coupling."""
    return without_diagonal((matrices + matrices.swapaxes(1, 2)) / 2)


def energy(weights: jax.Array, states: jax.Array) -> jax.Array:
    """E(x) = -1/2 x^T W x, float32 `[B]` of W `[B, L, L]` and states `[B, L]`."""
    x = states.astype(jnp.float32)
    return -0.5 * jnp.einsum("bi,bij,bj->b", x, weights, x)


@functools.partial(jax.jit, static_argnames="sweeps")
def relax(weights: jax.Array, states: jax.Array, sweeps: int = 100) -> jax.Array:
    """Asynchronous updates x_i <- sgn(h_i), i = 1 ... L, until none changes: int8 `[B, L]`.

    A zero field keeps its chip. The energy never rises, because W is symmetric without a diagonal; `sweeps` bounds the
    work on matrices that store nothing.
    """

    def update(i: jax.Array, x: jax.Array) -> jax.Array:
        row = jax.lax.dynamic_index_in_dim(weights, i, axis=1, keepdims=False)
        field = (row * x).sum(-1)
        chip = jnp.where(field == 0, x[:, i], jnp.sign(field))
        return x.at[:, i].set(chip)

    def sweep(carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        done, x, _ = carry
        after = jax.lax.fori_loop(0, x.shape[1], update, x)
        return done + 1, after, (after != x).any()

    def unfinished(carry: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        return carry[2] & (carry[0] < sweeps)

    start = (jnp.int32(0), states.astype(jnp.float32), jnp.bool_(True))
    return jax.lax.while_loop(unfinished, sweep, start)[1].astype(jnp.int8)


def leading_eigenvector(weights: jax.Array, steps: int = 60) -> jax.Array:
    """The eigenvector of the largest eigenvalue, float32 `[B, L]` of symmetric W `[B, L, L]`, by power iteration.

    W is shifted by its root-mean-square eigenvalue, so that no negative eigenvalue wins. The start is fixed and has a
    part along every code: row sums would vanish for balanced codes.
    """
    length = weights.shape[-1]
    shift = jnp.sqrt((weights * weights).sum((1, 2)) / length)[:, None]
    start = np.random.default_rng(0).standard_normal(length).astype(np.float32)

    def step(_: int, v: jax.Array) -> jax.Array:
        v = jnp.einsum("bij,bj->bi", weights, v) + shift * v
        return v / (jnp.linalg.norm(v, axis=1, keepdims=True) + 1e-30)

    return jax.lax.fori_loop(0, steps, step, jnp.broadcast_to(jnp.asarray(start)[None], weights.shape[:2]))


def sign(x: jax.Array) -> jax.Array:
    """+1 or -1, int8: the chip nearest to each relaxed chip; 0 becomes +1."""
    return jnp.where(x < 0, -1, 1).astype(jnp.int8)


@jax.jit
def decode(matrices: jax.Array) -> Decoded:
    """Codes of any real matrices `[B, L, L]`: symmetrise, start at the leading eigenvector's signs, relax."""
    weights = symmetric(matrices)
    codes = relax(weights, sign(leading_eigenvector(weights)))
    codes = codes * codes[:, :1]
    x = codes.astype(jnp.float32)
    support = x * jnp.einsum("bij,bj->bi", weights, x)
    length = x.shape[1]
    largest = jnp.abs(weights).sum(-1).max(-1)
    norm = jnp.linalg.norm(weights.reshape(weights.shape[0], -1), axis=1)
    # An encoded code has norm sqrt(L (L - 1)), so that its fit is 1.
    scale = norm * jnp.sqrt(length * (length - 1.0))
    return Decoded(codes, support.min(-1) / (largest + 1e-30), jnp.abs(support.sum(-1)) / (scale + 1e-30))


def superdiagonal_sums(matrices: jax.Array) -> jax.Array:
    """Sums of the superdiagonals u = 1 ... L-1, `[B, L-1]` of `[B, L, L]`; of W(c) they are C_c(u)."""
    return diagonal_sums(matrices)[:, matrices.shape[-1] :]


def diagonal_sums(matrices: jax.Array) -> jax.Array:
    """sum_i M[i, i + u] for u = -(L-1) ... L-1, `[B, 2L-1]` of `[B, L, L]`."""
    batch, length = matrices.shape[0], matrices.shape[-1]
    # L zeros before each row, read with one place more per row: row i moves by i places to the left, diagonals line up.
    padded = jnp.pad(matrices, ((0, 0), (0, 0), (length, 0))).reshape(batch, -1)
    skewed = jnp.pad(padded, ((0, 0), (0, length))).reshape(batch, length, 2 * length + 1)
    return skewed.sum(1)[:, 1 : 2 * length]


def retrieve(memories: jax.Array, queries: jax.Array, beta: float | jax.Array) -> jax.Array:
    """One update of a modern Hopfield network: X^T softmax(beta X q), float32 `[B, L]`.

    Args:
        memories: codes X `[P, L]`.
        queries: states q `[B, L]`.
        beta: inverse temperature. A large one returns the nearest memory; a small one blends those near the query.
    """
    overlaps = queries.astype(jnp.float32) @ memories.astype(jnp.float32).T
    return jax.nn.softmax(beta * overlaps, axis=-1) @ memories.astype(jnp.float32)
