"""Log-density solves with diffrax, jit-compiled, one step size per row under ``vmap``."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

from measure import HERE

jax.config.update("jax_compilation_cache_dir", str(HERE / ".cache" / "jax"))  # compile once a machine
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

Params = dict[str, jax.Array]


def parameters(weights: Mapping[str, np.ndarray]) -> Params:
    """The shared weights, the three biases as one affine map of the time features."""
    params = {f"w{i}": jnp.asarray(weights[f"weights.{i}.weight"]) for i in range(3)}
    params["time"] = jnp.concatenate([jnp.asarray(weights[f"biases.{i}.weight"]) for i in range(3)])
    params["constant"] = jnp.concatenate([jnp.asarray(weights[f"biases.{i}.bias"]) for i in range(3)])
    params["bracket"] = params["w1"] * (params["w0"] @ params["w2"]).T
    return params


def _biases(p: Params, t: jax.Array) -> list[jax.Array]:
    angle = t * jnp.arange(1, 9) * (jnp.pi / 2)
    b = p["time"] @ jnp.concatenate([jnp.sin(angle), jnp.cos(angle)]) + p["constant"]
    return jnp.split(b, np.cumsum([p["w0"].shape[0], p["w1"].shape[0]]))


def field(p: Params, t: jax.Array, z: jax.Array) -> jax.Array:
    """f(t, z) of one row [D]."""
    b = _biases(p, t)
    h = jax.nn.silu(p["w0"] @ z + b[0])
    h = jax.nn.silu(p["w1"] @ h + b[1])
    return p["w2"] @ h + b[2]


def autodiff(p: Params, t: jax.Array, z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The usual exact trace: one vector–Jacobian product per basis vector, as in diffrax's example."""
    dz, vjp = jax.vjp(lambda z: field(p, t, z), z)
    (jacobian,) = jax.vmap(vjp)(jnp.eye(z.size, dtype=z.dtype))
    return dz, jnp.trace(jacobian)


def forward_mode(p: Params, t: jax.Array, z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same with one Jacobian–vector product per basis vector."""
    dz, jvp = jax.linearize(lambda z: field(p, t, z), z)
    return dz, jnp.trace(jax.vmap(jvp)(jnp.eye(z.size, dtype=z.dtype)))


def closed_form(p: Params, t: jax.Array, z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """d₂ᵀ (W₂ ∘ (W₁ W₃)ᵀ) d₁."""
    b = _biases(p, t)

    def silu(a: jax.Array) -> tuple[jax.Array, jax.Array]:
        s = jax.nn.sigmoid(a)
        h = a * s
        return h, s + h * (1 - s)

    h, d1 = silu(p["w0"] @ z + b[0])
    h, d2 = silu(p["w1"] @ h + b[1])
    return p["w2"] @ h + b[2], d2 @ (p["bracket"] @ d1)


TRACES = {"autodiff": autodiff, "forward mode": forward_mode, "closed form": closed_form}


def compiled(weights: Mapping[str, np.ndarray], trace: str) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """solve(rows [n, D] float32, tolerance) → z at the base [n, D] and ℓ [n]; compiled once per n."""
    p = parameters(weights)
    divergence = TRACES[trace]

    def row(z: jax.Array, tolerance: jax.Array) -> tuple[jax.Array, jax.Array]:
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, _: divergence(p, t, y[0])),
            diffrax.Dopri5(),
            t0=1.0,
            t1=0.0,
            dt0=None,
            y0=(z, jnp.zeros(())),
            stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance),
            throw=False,
        )
        z1, ell = solution.ys
        return z1[-1], ell[-1]

    return jax.jit(jax.vmap(row, in_axes=(0, None)))
