"""The objectives against closed forms, and the adjoint against differentiation through the solver."""

import itertools
import weakref

import pytest
import torch

from pushforward.flows.fields import MLP, Linear, VectorField
from pushforward.training.objectives import flow_matching, log_density, maximum_likelihood, optimal_pairs

SIGMA = 0.1


class ToPoint(VectorField):
    """The exact field of flow matching when all data are one point: p_t = N(t x₁, (1 − (1 − σ) t)²)."""

    def __init__(self, point):
        super().__init__()
        self.point, self.dim, self.context_dim, self.exactness = point, len(point), 0, "closed_form"
        self.condition_widths, self.saved_widths = ((1,),), (1,)

    def condition(self, t, c):
        return (t,)

    def stage(self, z, conditions):
        (t,) = conditions
        slope = -(1 - SIGMA) / (1 - (1 - SIGMA) * t)
        return self.point + slope * (z - t * self.point), (slope,)

    def divergence(self, saved, conditions):
        return self.dim * saved


def test_flow_matching_is_zero_at_the_exact_field_and_not_beside_it():
    point = torch.tensor([1.0, -2.0])
    x0, t = torch.randn(64, 2), torch.rand(64, 1)
    x1 = point.expand(64, 2)
    assert flow_matching(ToPoint(point), x0, x1, t, noise=SIGMA) < 1e-10
    assert flow_matching(ToPoint(point + 0.1), x0, x1, t, noise=SIGMA) > 1e-3


def test_the_exact_field_carries_the_base_to_the_smoothed_data():
    point = torch.tensor([1.0, -2.0]).double()
    x = point + SIGMA * torch.randn(10, 2).double()
    expected = torch.distributions.Normal(point, SIGMA).log_prob(x).sum(1, keepdim=True)
    torch.testing.assert_close(log_density(ToPoint(point), x, steps=256), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("ends", [(0.0, 1.0), (1.0, 0.0), (0.2, 3.0)])
def test_the_log_density_of_a_linear_field_has_a_closed_form(ends):
    field = Linear(2).double()
    with torch.no_grad():
        field.weight.copy_(torch.tensor([[0.3, -0.5], [0.2, 0.4]]))
    t_base, t_data = ends
    x = torch.randn(7, 2).double()
    grow = torch.linalg.matrix_exp(field.weight.detach() * (t_data - t_base))
    expected = torch.distributions.MultivariateNormal(torch.zeros(2).double(), grow @ grow.T).log_prob(x)
    found = log_density(field, x, t_base=t_base, t_data=t_data, steps=128)
    torch.testing.assert_close(found[:, 0], expected, atol=1e-7, rtol=0)


def test_optimal_pairs_are_the_best_of_all_permutations_and_shorten_paths():
    x0, x1 = torch.randn(6, 2), torch.randn(6, 2) + 1
    best = min((x1 - x0[list(order)]).square().sum().item() for order in itertools.permutations(range(6)))
    index = optimal_pairs(x0, x1)
    assert sorted(index.tolist()) == list(range(6))
    assert (x1 - x0[index]).square().sum().item() == pytest.approx(best, rel=1e-5)
    many0, many1 = torch.randn(256, 2), torch.randn(256, 2)
    energy = (many1 - many0).square().mean()
    assert (many1 - many0[optimal_pairs(many0, many1)]).square().mean() < 0.3 * energy


def test_groups_are_paired_apart():
    x0, x1 = torch.randn(50, 2), torch.randn(50, 2)
    index = optimal_pairs(x0, x1, group=20)
    for start in (0, 20, 40):
        part = index[start : start + 20]
        assert sorted(part.tolist()) == list(range(start, start + len(part)))


def test_optimal_pairs_stay_within_a_context():
    context = torch.arange(40)[:, None].float() % 4
    x0, x1 = torch.randn(40, 2), torch.randn(40, 2) + context
    index = optimal_pairs(x0, x1, context)
    torch.testing.assert_close(context[index], context)
    assert (x1 - x0[index]).square().sum() < (x1 - x0).square().sum()


def _perturbed(**options):
    torch.manual_seed(0)
    field = MLP(2, (16, 16), **options).double()
    with torch.no_grad():
        for parameter in field.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return field


@pytest.mark.parametrize("options", [{}, {"context_dim": 1, "gate": True, "activation": "tanh"}])
def test_the_adjoint_gives_the_gradients_of_backpropagation_through_the_solver(options):
    field = _perturbed(**options)
    x = torch.randn(5, 2).double()
    context = torch.randn(5, 1).double() if options else None
    gradients = []
    for adjoint in (True, False):
        loss = maximum_likelihood(field, x, context, steps=64, adjoint=adjoint)
        gradients.append(torch.autograd.grad(loss, list(field.parameters())))
    for by_adjoint, by_backpropagation in zip(*gradients, strict=True):
        torch.testing.assert_close(by_adjoint, by_backpropagation, atol=1e-7, rtol=1e-5)


def _peak_bytes(steps, adjoint):
    """The most that autograd keeps at any moment for the backward pass."""
    live = peak = 0

    class Kept:
        def __init__(self, tensor):
            self.tensor = tensor.detach()  # with its history it would keep the graph alive

    def drop(size):
        nonlocal live
        live -= size

    def pack(tensor):
        nonlocal live, peak
        kept, size = Kept(tensor), tensor.nbytes
        weakref.finalize(kept, drop, size)
        live += size
        peak = max(peak, live)
        return kept

    field = _perturbed()
    x = torch.randn(8, 2).double()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        maximum_likelihood(field, x, steps=steps, adjoint=adjoint).backward()
    return peak


def test_the_memory_of_the_adjoint_does_not_grow_with_the_steps():
    assert _peak_bytes(40, adjoint=True) == _peak_bytes(10, adjoint=True)
    assert _peak_bytes(40, adjoint=False) > 3.5 * _peak_bytes(10, adjoint=False)
