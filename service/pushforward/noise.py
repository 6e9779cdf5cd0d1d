"""Base noise: standard normal rows that depend on (seed, row number) and on nothing else.

Row i of seed s has w = 4⌈D/4⌉ draws of its own from the counter-based generator Philox4x64-10
(Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), one counter for every four of them:

    (k_{i,4b}, …, k_{i,4b+3}) = Philox(counter = 1 + i·w/4 + b, key = s),      b = 0 … w/4 − 1
    u_{ij} = (⌊k_{ij} / 2¹²⌋ + ½) · 2⁻⁵²,       uniform on (0, 1), exact in float64
    z_{ij} = Φ⁻¹(u_{ij}),                       j = 0 … D − 1; the other w − D draws are not used

One draw makes one number, so no row depends on how many were asked for before it. Φ⁻¹ is algorithm
AS 241 (Wichura 1988; relative error about 1e-15) computed with +, −, ×, ÷ and sqrt only. Those are
correctly rounded everywhere, whereas the log and cos of numerical libraries differ in their last bits
from one processor, and from one position in a vector, to the next. So equal seeds give equal bits on
every machine, in every chunk.
"""

from __future__ import annotations

import math
import secrets
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pushforward.errors import InvalidInput

__all__ = ["MAX_SEED", "fresh_seed", "standard_normal"]

MAX_SEED: Final = 2**64 - 1

_BLOCK = 4  # 64-bit draws per counter of Philox4x64
_UINT52 = 2.0**-52


def _table(text: str) -> NDArray[np.float64]:
    return np.array(text.split(), dtype=np.float64).reshape(2, 8)


# AS 241: numerator and denominator of Φ⁻¹, highest power first, in three ranges of u.
_CENTRE = _table(
    """
    2.5090809287301226727e3 3.3430575583588128105e4 6.7265770927008700853e4 4.5921953931549871457e4
    1.3731693765509461125e4 1.9715909503065514427e3 1.3314166789178437745e2 3.3871328727963666080e0
    5.2264952788528545610e3 2.8729085735721942674e4 3.9307895800092710610e4 2.1213794301586595867e4
    5.3941960214247511077e3 6.8718700749205790830e2 4.2313330701600911252e1 1
    """
)
_SHOULDER = _table(
    """
    7.7454501427834140764e-4 2.27238449892691845833e-2 2.41780725177450611770e-1
    1.27045825245236838258e0 3.64784832476320460504e0 5.76949722146069140550e0 4.63033784615654529590e0
    1.42343711074968357734e0
    1.05075007164441684324e-9 5.47593808499534494600e-4 1.51986665636164571966e-2
    1.48103976427480074590e-1 6.89767334985100004550e-1 1.67638483018380384940e0
    2.05319162663775882187e0 1
    """
)
_TAIL = _table(
    """
    2.01033439929228813265e-7 2.71155556874348757815e-5 1.24266094738807843860e-3
    2.65321895265761230930e-2 2.96560571828504891230e-1 1.78482653991729133580e0
    5.46378491116411436990e0 6.65790464350110377720e0
    2.04426310338993978564e-15 1.42151175831644588870e-7 1.84631831751005468180e-5
    7.86869131145613259100e-4 1.48753612908506148525e-2 1.36929880922735805310e-1
    5.99832206555887937690e-1 1
    """
)


def fresh_seed() -> int:
    """A seed nobody can guess, below 2⁵³ so that every JSON reader keeps all its digits."""
    return secrets.randbits(53)


def standard_normal(seed: int, start: int, count: int, dim: int) -> NDArray[np.float64]:
    """Rows start … start + count − 1 of the noise of a seed.

    Args:
        seed: 0 … 2⁶⁴ − 1.
        start: number of the first row, from 0.
        count: how many rows.
        dim: D, the width of a row.

    Returns:
        z [count, D], float64.

    Raises:
        InvalidInput: when an argument is out of its range.

    >>> whole = standard_normal(seed=7, start=0, count=5, dim=3)
    >>> bool((whole[2:4] == standard_normal(seed=7, start=2, count=2, dim=3)).all())
    True
    """
    ranges = {
        "seed": (seed, 0, MAX_SEED),
        "start": (start, 0, 2**63),
        "count": (count, 0, 2**63),
        "dim": (dim, 1, 2**31),
    }
    for where, (value, least, most) in ranges.items():
        if not least <= value <= most:
            raise InvalidInput(f"{where} must be a whole number from {least} to {most}.", where=where)
    blocks = -(-dim // _BLOCK)
    # NumPy raises the counter before it uses it: hence the 1 in the equation.
    draws = np.random.Philox(key=seed, counter=start * blocks).random_raw(count * blocks * _BLOCK)
    used = draws.reshape(count, blocks * _BLOCK)[:, :dim]
    return _inverse_normal_cdf(((used >> np.uint64(12)).astype(np.float64) + 0.5) * _UINT52)


def _inverse_normal_cdf(u: NDArray[np.float64]) -> NDArray[np.float64]:
    """Φ⁻¹(u) for u in (0, 1), elementwise, in correctly rounded operations."""
    q = u - 0.5
    z = q * _ratio(_CENTRE, 0.180625 - q * q)
    outside = np.abs(q) > 0.425
    if outside.any():
        side = q[outside]
        r = np.sqrt(-_log(0.5 - np.abs(side)))  # exact: u is a multiple of 2⁻⁵³
        far = r > 5.0
        size = np.where(far, _ratio(_TAIL, r - 5.0), _ratio(_SHOULDER, r - 1.6))
        z[outside] = np.copysign(size, side)
    return z


def _ratio(coefficients: NDArray[np.float64], r: NDArray[np.float64]) -> NDArray[np.float64]:
    """Quotient of two polynomials of degree 7 in r, by Horner's rule."""
    columns = coefficients.reshape(2, 8, *(1 for _ in r.shape))
    value = columns[:, 0] * r
    for power in range(1, 7):
        value = (value + columns[:, power]) * r
    value = value + columns[:, 7]
    quotient: NDArray[np.float64] = value[0] / value[1]
    return quotient


def _log(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Natural logarithm of normal positive numbers: x = m·2^e, log m = 2·artanh((m − 1)/(m + 1))."""
    m, e = np.frexp(x)
    low = m < math.sqrt(0.5)
    m, e = np.where(low, 2.0 * m, m), np.where(low, e - 1, e)
    s = (m - 1.0) / (m + 1.0)  # |s| ≤ 0.172: eleven terms of the series reach 1e-17
    square = s * s
    series = np.full_like(s, 1 / 21)
    for k in range(19, 0, -2):
        series = series * square + 1 / k
    return 2.0 * s * series + e * math.log(2.0)
