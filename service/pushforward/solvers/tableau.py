"""Explicit Runge–Kutta methods as data.

One step of size h from (t, y) evaluates the stages

    kᵢ = f(t + cᵢ h, y + h Σ_{j<i} aᵢⱼ kⱼ),        i = 1 … s,

and ends in y₁ = y + h Σ bᵢ kᵢ.  Every method here is written in FSAL form: a last stage
k_{s+1} = f(t + h, y₁) is appended, which is the first stage of the next step, so that every method
costs s evaluations an attempted step and the first one is paid at admission.  Embedded methods
estimate the local error of y₁ as h Σ eᵢ kᵢ over those s + 1 stages.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

__all__ = ["METHODS", "Tableau"]


Tree = tuple["Tree", ...]
"""A rooted tree, as the sorted tuple of its root's branches; each is one order condition (Butcher 1963)."""


@functools.cache
def _trees(order: int) -> frozenset[Tree]:
    """All rooted trees of ``order`` nodes: the smaller ones with a leaf added anywhere."""

    def grown(tree: Tree) -> Iterator[Tree]:
        yield tuple(sorted([*tree, ()]))
        for i, branch in enumerate(tree):
            yield from (tuple(sorted([*tree[:i], more, *tree[i + 1 :]])) for more in grown(branch))

    return frozenset({()} if order == 1 else (more for tree in _trees(order - 1) for more in grown(tree)))


def _nodes(tree: Tree) -> int:
    return 1 + sum(map(_nodes, tree))


def _density(tree: Tree) -> int:
    """γ: its nodes, times the γ of its branches."""
    return _nodes(tree) * math.prod(map(_density, tree))


def _dot(weights: Sequence[float], values: Sequence[float]) -> float:
    return math.fsum(w * v for w, v in zip(weights, values, strict=False))


@dataclass(frozen=True)
class Tableau:
    """An explicit Runge–Kutta method that has checked itself.

    Args:
        name: what requests and manifests call it.
        order: order of y₁.
        a: strictly lower triangular rows 2 … s (row i has i − 1 entries).
        b: the s weights of y₁.
        e: the s + 1 error weights b − b̂ (last one: of the FSAL stage); empty for a fixed-step method.
        exponent: the step factor is safety · ratio^−exponent.  The textbook value is 1/k, with k the
            order of the error estimate plus one; here it is the nearest sixteenth, because
            sixteenth roots are chains of ``sqrt``, which is correctly rounded on every machine,
            and ``pow`` is not.

    Raises:
        ValueError: when the coefficients are not those of a method of the given order.
    """

    name: str
    order: int
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    e: tuple[float, ...] = ()
    exponent: float = 0.0

    def __post_init__(self) -> None:
        """Hold the coefficients to the order conditions, so that a typing error cannot survive import."""

        def check(residual: float, what: str) -> None:
            if not abs(residual) < 1e-10:
                raise ValueError(f"tableau {self.name}: {what} is off by {residual:.1e}")

        if [len(row) for row in self.a] != list(range(1, len(self.b))):
            raise ValueError(f"tableau {self.name}: a must have rows of length 1 … {len(self.b) - 1}")
        if self.e and len(self.e) != len(self.b) + 1:
            raise ValueError(f"tableau {self.name}: e must have {len(self.b) + 1} entries, has {len(self.e)}")
        rows = ((), *self.rows)

        def elementary(tree: Tree) -> list[float]:
            """Φ of a tree at every stage: the product over its branches of Σ aᵢⱼ Φⱼ."""
            inner = [elementary(branch) for branch in tree]
            return [math.prod(_dot(row, values) for values in inner) for row in rows]

        estimated = round(1 / self.exponent) - 1 if self.e else 0
        for order in range(1, self.order + 1):
            for tree in _trees(order):
                values = elementary(tree)
                check(_dot(self.b, values) - 1 / _density(tree), f"Σ b Φ of {tree}")
                if order <= estimated:
                    check(_dot(self.e, values), f"Σ e Φ of {tree}")

    @property
    def c(self) -> tuple[float, ...]:
        """The s + 1 nodes: row sums of a, and 1 for the FSAL stage."""
        return (0.0, *(math.fsum(row) for row in self.a), 1.0)

    @property
    def rows(self) -> tuple[tuple[float, ...], ...]:
        """Rows 2 … s + 1 of the FSAL form: a, then b."""
        return (*self.a, self.b)

    @property
    def stages(self) -> int:
        """Field evaluations per attempted step."""
        return len(self.b)

    @property
    def adaptive(self) -> bool:
        """Whether the method estimates its error, and so may choose its step."""
        return bool(self.e)


def _difference(b: tuple[float, ...], b_hat: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(x - y for x, y in zip((*b, 0.0), b_hat, strict=True))


_EULER = Tableau("euler", 1, a=(), b=(1.0,))

# Kutta 1901.
_RK4 = Tableau("rk4", 4, a=((1 / 2,), (0, 1 / 2), (0, 0, 1)), b=(1 / 6, 1 / 3, 1 / 3, 1 / 6))

# Bogacki and Shampine 1989, "A 3(2) pair of Runge-Kutta formulas", Appl. Math. Lett. 2(4).
_BOSH3 = Tableau(
    "bosh3",
    3,
    a=((1 / 2,), (0, 3 / 4)),
    b=(2 / 9, 1 / 3, 4 / 9),
    e=_difference((2 / 9, 1 / 3, 4 / 9), (7 / 24, 1 / 4, 1 / 3, 1 / 8)),
    exponent=5 / 16,
)

# Dormand and Prince 1980, "A family of embedded Runge-Kutta formulae", J. Comp. Appl. Math. 6(1), with their
# own error weights.  (torchdiffeq, diffrax and torchode use another estimate, exactly 2/3 of this one.)
_DOPRI5_B = (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)
_DOPRI5 = Tableau(
    "dopri5",
    5,
    a=(
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    ),
    b=_DOPRI5_B,
    e=_difference(_DOPRI5_B, (5179 / 57600, 0, 7571 / 16695, 393 / 640, -92097 / 339200, 187 / 2100, 1 / 40)),
    exponent=3 / 16,
)

# Tsitouras 2011, "Runge–Kutta pairs of order 5(4) satisfying only the first column simplifying assumption",
# Comput. Math. Appl. 62(2).  The paper prints the last error weight with the wrong sign; the check of
# Σ e = 0 above finds that.
_TSIT5 = Tableau(
    "tsit5",
    5,
    a=(
        (0.161,),
        (-0.008480655492356989, 0.335480655492357),
        (2.8971530571054935, -6.359448489975075, 4.3622954328695815),
        (5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525),
        (5.86145544294642, -12.92096931784711, 8.159367898576159, -0.071584973281401, -0.02826905039406838),
    ),
    b=(
        0.09646076681806523,
        0.01,
        0.4798896504144996,
        1.379008574103741762,
        -3.290069515436081,
        2.324710524099774,
    ),
    e=(
        0.00178001105222577714,
        0.0008164344596567469,
        -0.007880878010261995,
        0.1447110071732629,
        -0.5823571654525552,
        0.45808210592918697,
        -1 / 66,
    ),
    exponent=3 / 16,
)

# Prince and Dormand 1981, "High order embedded Runge-Kutta formulae", J. Comp. Appl. Math. 7(1): RK8(7)13M.
_DOPRI8_B = (
    14005451 / 335480064,
    0,
    0,
    0,
    0,
    -59238493 / 1068277825,
    181606767 / 758867731,
    561292985 / 797845732,
    -1041891430 / 1371343529,
    760417239 / 1151165299,
    118820643 / 751138087,
    -528747749 / 2220607170,
    1 / 4,
)
_DOPRI8 = Tableau(
    "dopri8",
    8,
    a=(
        (1 / 18,),
        (1 / 48, 1 / 16),
        (1 / 32, 0, 3 / 32),
        (5 / 16, 0, -75 / 64, 75 / 64),
        (3 / 80, 0, 0, 3 / 16, 3 / 20),
        (29443841 / 614563906, 0, 0, 77736538 / 692538347, -28693883 / 1125000000, 23124283 / 1800000000),
        (
            16016141 / 946692911,
            0,
            0,
            61564180 / 158732637,
            22789713 / 633445777,
            545815736 / 2771057229,
            -180193667 / 1043307555,
        ),
        (
            39632708 / 573591083,
            0,
            0,
            -433636366 / 683701615,
            -421739975 / 2616292301,
            100302831 / 723423059,
            790204164 / 839813087,
            800635310 / 3783071287,
        ),
        (
            246121993 / 1340847787,
            0,
            0,
            -37695042795 / 15268766246,
            -309121744 / 1061227803,
            -12992083 / 490766935,
            6005943493 / 2108947869,
            393006217 / 1396673457,
            123872331 / 1001029789,
        ),
        (
            -1028468189 / 846180014,
            0,
            0,
            8478235783 / 508512852,
            1311729495 / 1432422823,
            -10304129995 / 1701304382,
            -48777925059 / 3047939560,
            15336726248 / 1032824649,
            -45442868181 / 3398467696,
            3065993473 / 597172653,
        ),
        (
            185892177 / 718116043,
            0,
            0,
            -3185094517 / 667107341,
            -477755414 / 1098053517,
            -703635378 / 230739211,
            5731566787 / 1027545527,
            5232866602 / 850066563,
            -4093664535 / 808688257,
            3962137247 / 1805957418,
            65686358 / 487910083,
        ),
        (
            403863854 / 491063109,
            0,
            0,
            -5068492393 / 434740067,
            -411421997 / 543043805,
            652783627 / 914296604,
            11173962825 / 925320556,
            -13158990841 / 6184727034,
            3936647629 / 1978049680,
            -160528059 / 685178525,
            248638103 / 1413531060,
            0,
        ),
    ),
    b=_DOPRI8_B,
    e=_difference(
        _DOPRI8_B,
        (
            13451932 / 455176623,
            0,
            0,
            0,
            0,
            -808719846 / 976000145,
            1757004468 / 5645159321,
            656045339 / 265891186,
            -3867574721 / 1518517206,
            465885868 / 322736535,
            53011238 / 667516719,
            2 / 45,
            0,
            0,
        ),
    ),
    exponent=1 / 8,
)

METHODS: dict[str, Tableau] = {m.name: m for m in (_DOPRI5, _TSIT5, _BOSH3, _DOPRI8, _RK4, _EULER)}
