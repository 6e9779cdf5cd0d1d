"""The fit: it learns, it repeats itself, it resumes, and it says what went wrong."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pushforward.errors import Conflict, InvalidInput, TrainingFailed
from pushforward.flows.transforms import Standardize
from pushforward.training.bundled import moons
from pushforward.training.data import build_transform
from pushforward.training.evaluate import log_density, mixture_log_density
from pushforward.training.fit import fit
from pushforward.training.progress import Watch
from pushforward.training.recipe import Recipe

QUICK = Recipe(hidden=(32, 32), steps=60, batch=64, warmup=10, average=0.9, checks=6)


LIKELIHOOD = {"objective": "maximum_likelihood", "steps": 6, "batch": 16, "hidden": (16,)}


@pytest.fixture(scope="module")
def rows():
    return moons(np.random.default_rng(1), 3000)


@pytest.fixture(scope="module")
def transform(rows):
    return build_transform(rows[:2500], ["x", "y"])


def fitted(rows, transform, recipe=QUICK, **options):
    return fit(rows[:2000], rows[2000:2500], transform, recipe=recipe, **options)


def weights(result):
    return {name: tensor.clone() for name, tensor in result.flow.field.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_it_learns_moons(rows, transform):
    recipe = Recipe(hidden=(64, 64), steps=800, batch=256, learning_rate=1e-2, average=0.98, sharpness=3)
    result = fitted(rows, transform, recipe)
    flow = log_density(result.flow, rows[2500:]).mean()
    gaussian = mixture_log_density(rows[:2000], rows[2500:], transform, components=1).mean()
    assert flow > gaussian + 0.7  # the Gaussian reaches −1.9, the truth is −0.3
    history = [check.held_out for check in result.history]
    assert len(history) == 12
    assert result.best.held_out == max(history) > history[0]


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"pairing": "optimal_transport"},
        LIKELIHOOD,
        {"gate": True, "activation": "tanh"},
    ],
)
def test_the_same_seed_gives_the_same_bits_and_another_seed_others(rows, transform, change):
    recipe = replace(QUICK, **change)
    first, second = fitted(rows, transform, recipe), fitted(rows, transform, recipe)
    assert same(weights(first), weights(second))
    assert first.history == second.history
    assert not same(weights(first), weights(fitted(rows, transform, replace(recipe, seed=1))))


def test_the_global_generator_is_left_alone(rows, transform):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    fitted(rows, transform)
    assert torch.equal(torch.rand(1), expected)


def test_maximum_likelihood_raises_the_log_density(rows):
    recipe = replace(QUICK, **LIKELIHOOD | {"steps": 30, "batch": 64}, learning_rate=3e-2, average=0.5)
    narrow = Standardize(torch.zeros(2), torch.full((2,), 3.0))  # there is a scale to be learnt
    result = fitted(rows, narrow, recipe)
    assert result.best.held_out > result.history[0].held_out + 0.5


class Interrupt(Watch):
    """Ctrl-C after a number of steps."""

    def __init__(self, after):
        self.after = after

    def step(self, step, loss):
        if step == self.after:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("after", "change"), [(10, {}), (37, {}), (10, {"pairing": "optimal_transport"}), (3, LIKELIHOOD)]
)
def test_a_resumed_fit_is_the_uninterrupted_one_bit_by_bit(rows, transform, tmp_path, after, change):
    recipe = replace(QUICK, **{"steps": 42, **change})
    whole = fitted(rows, transform, recipe, dequantize=np.array([0.1, 0.0]))
    checkpoint = tmp_path / "run" / "moons.safetensors"
    with pytest.raises(KeyboardInterrupt):
        fitted(
            rows,
            transform,
            recipe,
            dequantize=np.array([0.1, 0.0]),
            checkpoint=checkpoint,
            watch=Interrupt(after),
        )
    resumed = fitted(
        rows, transform, recipe, dequantize=np.array([0.1, 0.0]), checkpoint=checkpoint, resume=True
    )
    assert same(weights(whole), weights(resumed))
    assert whole.history == resumed.history
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


def test_a_checkpoint_of_another_run_is_refused(rows, transform, tmp_path):
    checkpoint = tmp_path / "moons.safetensors"
    fitted(rows, transform, checkpoint=checkpoint)
    with pytest.raises(Conflict, match="belongs to other data or other settings"):
        fitted(rows, transform, replace(QUICK, noise=0.1), checkpoint=checkpoint, resume=True)
    with pytest.raises(Conflict, match="belongs to other data or other settings"):
        fitted(rows + 0.01, transform, checkpoint=checkpoint, resume=True)
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(Conflict, match="is not a readable checkpoint"):
        fitted(rows, transform, checkpoint=checkpoint, resume=True)


def test_a_checkpoint_that_cannot_be_written_is_an_error_and_leaves_nothing(rows, transform, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TrainingFailed, match=r"moons.safetensors could not be written"):
        fitted(rows, transform, checkpoint=tmp_path / "file" / "moons.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_context_is_scaled_inside_and_taken_raw_outside(rng):
    """p(x | c) with x = c / 100 + noise, c around 1,000: the fitted flow follows c given in its own units."""
    c = rng.normal(1000.0, 100.0, size=(3000, 1))
    x = c / 100 + 0.3 * rng.normal(size=(3000, 1))
    transform = build_transform(x, ["x"])
    recipe = Recipe(hidden=(32, 32), steps=500, batch=128, learning_rate=5e-3, average=0.98)
    result = fit(
        x[:2000],
        x[2000:2300],
        transform,
        context=c[:2000],
        validation_context=c[2000:2300],
        recipe=recipe,
    )
    found = log_density(result.flow, x[2300:], c[2300:])
    truth = -0.5 * ((x - c / 100)[2300:, 0] / 0.3) ** 2 - np.log(0.3 * np.sqrt(2 * np.pi))
    assert found.mean() == pytest.approx(truth.mean(), abs=0.1)
    shuffled = log_density(result.flow, x[2300:], np.roll(c[2300:], 1, axis=0))
    assert shuffled.mean() < found.mean() - 3


def test_a_diverging_fit_says_so(transform, rows):
    with pytest.raises(TrainingFailed, match=r"The loss is .* Use a smaller learning rate"):
        fitted(rows * 1e30, transform)


@pytest.mark.parametrize(
    ("field", "value", "right"),
    [
        ("noise", 0.0, "above 0 and below 1"),
        ("steps", 0, "at least 1"),
        ("objective", "score_matching", "flow_matching or maximum_likelihood"),
        ("pairing", "sinkhorn", "independent or optimal_transport"),
        ("average", 1.0, "at least 0 and below 1"),
    ],
)
def test_a_senseless_recipe_is_refused(field, value, right):
    with pytest.raises(InvalidInput, match=f"{field} must be {right}, not") as refusal:
        Recipe(**{field: value})
    assert refusal.value.where == field


def test_the_learning_rate_warms_up_and_falls_to_two_per_cent():
    recipe = Recipe(steps=1000, warmup=200, learning_rate=1.0)
    assert recipe.learning_rate_at(0) == pytest.approx(1 / 200)
    assert recipe.learning_rate_at(199) == pytest.approx(1.0)
    assert recipe.learning_rate_at(600) == pytest.approx(0.51)
    assert recipe.learning_rate_at(1000) == pytest.approx(0.02)
    assert max(recipe.checks_at()) == 1000
