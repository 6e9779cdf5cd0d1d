"""What the operations answer: the engine's numbers, whole, in the order of the request."""

from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from pushforward.engine.request import Kind
from pushforward.loading import LoadedModel, default_chunk, load_model, run_chunk
from pushforward.noise import standard_normal
from pushforward.scoring.calibration import Calibration, benjamini_hochberg

X = [[1.0, 1.0], [0.0, 0.5], [-1.5, 0.25]]
AWAY = [1e300, 0.0]  # overflows in the field: a row that cannot be solved


@pytest.fixture(scope="session")
def pair(store: Path) -> LoadedModel:
    return load_model(store / "pair" / "2")


def ask(client: httpx.Client, path: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = client.post(f"/v1/models/{path}", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/json"
    return answer.json()


def test_log_densities_are_those_of_the_engine_bit_for_bit(client: httpx.Client, pair: LoadedModel) -> None:
    answer = ask(client, "pair/log_density", {"x": X})
    expected = run_chunk(pair, default_chunk(pair.manifest.solver, np.array(X), None))
    assert answer["log_density"] == expected.log_density.tolist()
    assert answer["error_estimate"] == expected.error_estimate.tolist()
    assert answer["steps"] == expected.steps.tolist()
    assert answer["nfe"] == expected.nfe.tolist()
    assert answer["status"] == ["ok"] * 3
    assert (answer["model"], answer["version"], answer["exact"]) == ("pair", 2, True)


def test_rows_may_name_their_numbers_in_any_order(client: httpx.Client) -> None:
    named = [{"dose": dose, "age": age} for age, dose in X]
    by_name = ask(client, "pair/log_density", {"rows": named})
    assert by_name == ask(client, "pair/log_density", {"x": X})


def test_a_context_may_be_one_row_for_all_or_one_for_each_or_named(client: httpx.Client) -> None:
    x = [[0.0, 0.0], [1.0, 1.0]]
    shared = ask(client, "given/log_density", {"x": x, "context": [[0.5]]})
    assert shared == ask(client, "given/log_density", {"x": x, "context": [[0.5], [0.5]]})
    assert shared == ask(client, "given/log_density", {"x": x, "context": [{"shift": 0.5}]})
    assert shared != ask(client, "given/log_density", {"x": x, "context": [[0.5], [2.0]]})


def test_options_reach_the_solver(client: httpx.Client) -> None:
    default = ask(client, "pair/log_density", {"x": X})
    loose = ask(client, "pair/log_density", {"x": X, "rtol": 1e-2, "atol": 1e-2, "logp_atol": 1e-2})
    exact = ask(client, "pair/log_density", {"x": X, "rtol": 1e-9, "atol": 1e-9, "precision": "float64"})
    assert sum(loose["steps"]) < sum(default["steps"]) < sum(exact["steps"])
    assert default["log_density"] == pytest.approx(exact["log_density"], abs=1e-2)


def test_a_version_is_addressed_by_number_by_label_or_by_default(client: httpx.Client) -> None:
    assert ask(client, "pair/versions/1/log_density", {"x": X})["version"] == 1
    assert ask(client, "pair/versions/old/log_density", {"x": X})["version"] == 1
    assert ask(client, "pair/log_density", {"x": X})["version"] == 2


def test_a_row_that_fails_is_null_and_its_neighbours_are_untouched(client: httpx.Client) -> None:
    with_failure = ask(client, "pair/log_density", {"x": [X[0], AWAY, *X[1:]]})
    without = ask(client, "pair/log_density", {"x": X})
    assert with_failure["status"] == ["ok", "nonfinite", "ok", "ok"]
    assert with_failure["log_density"][1] is None
    assert with_failure["error_estimate"][1] is None
    (failure,) = with_failure["failures"]
    assert (failure["row"], failure["status"]) == (1, "nonfinite")
    assert "too far from the model's data" in failure["detail"]
    for name in ("log_density", "error_estimate", "steps", "nfe"):
        del with_failure[name][1]
        assert with_failure[name] == without[name]


def test_a_row_that_needs_more_steps_says_which_option_to_change(client: httpx.Client) -> None:
    answer = ask(client, "pair/log_density", {"x": X, "max_steps": 2})
    assert answer["status"] == ["max_steps"] * 3
    assert answer["log_density"] == [None] * 3
    assert answer["steps"] == [2] * 3
    assert "rtol" in answer["failures"][0]["detail"]
    assert 0 < answer["failures"][0]["t"] < 1


def test_a_row_outside_the_support_has_density_zero_and_is_an_anomaly(client: httpx.Client) -> None:
    answer = ask(client, "positive/anomaly", {"x": [[1.0, 1.0], [-1.0, 1.0]], "explain": True})
    assert answer["status"] == ["ok", "outside_support"]
    assert answer["log_density"][1] is None
    assert answer["score"][1] is None
    assert answer["p_value"][1] == answer["smallest_p_value"]
    assert answer["is_anomaly"] == [False, True]
    assert answer["attributions"][1] == [None, 0.0]  # only the first feature is to blame, without bound


def test_scores_are_conformal_p_values_of_the_log_densities(client: httpx.Client, store: Path) -> None:
    x = [*X, [40.0, 0.5]]
    answer = ask(client, "pair/anomaly", {"x": x, "alpha": 0.05})
    calibration = Calibration.load(store / "pair" / "2" / "calibration.safetensors")
    expected = calibration.p_values(np.array(answer["log_density"]))
    assert answer["log_density"] == ask(client, "pair/log_density", {"x": x})["log_density"]
    assert answer["score"] == [-value for value in answer["log_density"]]
    assert answer["p_value"] == expected.tolist()
    assert answer["is_anomaly"] == (expected <= 0.05).tolist()
    assert answer["is_anomaly"][3] is True
    assert (answer["alpha"], answer["fdr"]) == (0.05, None)
    two_sided = ask(client, "pair/anomaly", {"x": x, "two_sided": True})
    both = calibration.p_values(np.array(answer["log_density"]), two_sided=True)
    assert two_sided["p_value"] == both.tolist()


def test_a_false_discovery_rate_flags_over_the_batch(client: httpx.Client) -> None:
    x = [*X, *([[40.0, 0.5]] * 5)]
    answer = ask(client, "pair/anomaly", {"x": x, "fdr": 0.1})
    assert answer["is_anomaly"] == benjamini_hochberg(answer["p_value"], 0.1).tolist()
    assert (answer["alpha"], answer["fdr"]) == (None, 0.1)


def test_an_explanation_points_at_the_odd_feature_and_changes_nothing_else(client: httpx.Client) -> None:
    x = [[40.0, 0.5], [0.0, 40.0]]
    explained = ask(client, "pair/anomaly", {"x": x, "explain": True})
    plain = ask(client, "pair/anomaly", {"x": x})
    first, second = explained.pop("attributions")
    assert explained.pop("features") == ["age", "dose"]
    assert explained == plain
    assert first[0] > first[1]
    assert second[1] > second[0]


def test_an_explanation_of_rows_with_contexts_is_that_of_each_alone(client: httpx.Client) -> None:
    x, contexts = [[3.0, 0.0], [0.0, 3.0]], [[0.5], [2.0]]
    together = ask(client, "given/anomaly", {"x": x, "context": contexts, "explain": True})
    for row in range(2):
        alone = ask(client, "given/anomaly", {"x": [x[row]], "context": [contexts[row]], "explain": True})
        assert alone["attributions"][0] == together["attributions"][row]


def test_samples_are_the_same_however_many_are_asked_for(client: httpx.Client) -> None:
    many = ask(client, "pair/sample", {"n": 700, "seed": 7, "return_log_density": True})
    few = ask(client, "pair/sample", {"n": 3, "seed": 7, "return_log_density": True})
    assert len(many["x"]) == 700
    assert many["x"][:3] == few["x"]
    assert many["log_density"][:3] == few["log_density"]
    assert many["x"] != ask(client, "pair/sample", {"n": 700, "seed": 8, "return_log_density": True})["x"]
    assert many["features"] == ["age", "dose"]


def test_the_log_density_of_a_sample_is_that_of_its_point(client: httpx.Client) -> None:
    drawn = ask(client, "pair/sample", {"n": 20, "seed": 1, "return_log_density": True})
    scored = ask(client, "pair/log_density", {"x": drawn["x"]})
    assert drawn["log_density"] == pytest.approx(scored["log_density"], abs=5e-3)


def test_a_fresh_seed_is_told_and_can_be_asked_for_again(client: httpx.Client) -> None:
    first = ask(client, "pair/sample", {"n": 2})
    again = ask(client, "pair/sample", {"n": 2, "seed": first["seed"]})
    assert first == again
    assert first["seed"] != ask(client, "pair/sample", {"n": 2})["seed"]


def test_temperature_scales_the_base_noise(client: httpx.Client, pair: LoadedModel) -> None:
    cold = ask(client, "pair/sample", {"n": 4, "seed": 3, "temperature": 0.25})
    chunk = default_chunk(pair.manifest.solver, 0.25 * standard_normal(3, 0, 4, 2), None)
    chunk.kind, chunk.density = Kind.DECODE, False
    assert cold["x"] == run_chunk(pair, chunk).value.tolist()


def test_transport_goes_there_and_back(client: httpx.Client) -> None:
    there = ask(client, "pair/transport", {"x": X, "return_log_density": True})
    assert there["log_density"] == ask(client, "pair/log_density", {"x": X})["log_density"]
    back = ask(client, "pair/transport", {"z": there["z"], "return_log_density": True})
    assert np.array(back["x"]) == pytest.approx(np.array(X), abs=1e-3)
    assert back["log_density"] == pytest.approx(there["log_density"], abs=5e-3)
    assert "x" not in there
    assert "z" not in back


def test_a_path_starts_and_ends_where_transport_does(client: httpx.Client) -> None:
    answer = ask(client, "pair/transport", {"x": X, "times": [1.0, 0.5, 0.0]})
    ends = ask(client, "pair/transport", {"x": X})
    path = np.array(answer["path"])
    assert path.shape == (3, 3, 2)
    assert path[:, 2] == pytest.approx(np.array(ends["z"]), abs=1e-12)
    assert answer["times"] == [1.0, 0.5, 0.0]
    assert answer["status"] == [["ok"] * 3] * 3


def test_a_point_of_a_path_does_not_depend_on_the_other_times(client: httpx.Client) -> None:
    times = np.linspace(0, 1, 9).tolist()
    together = ask(client, "pair/transport", {"z": X, "times": times})
    for number, time in enumerate(times):
        alone = ask(client, "pair/transport", {"z": X, "times": [time]})
        assert [row[number] for row in together["path"]] == [row[0] for row in alone["path"]]


def test_a_path_that_fails_is_null_for_its_row_alone(client: httpx.Client) -> None:
    answer = ask(client, "pair/transport", {"x": [X[0], AWAY], "times": [0.5, 0.0]})
    assert answer["status"] == [["ok", "ok"], ["nonfinite", "nonfinite"]]
    assert answer["path"][1] == [None, None]
    assert [(f["row"], f["time"]) for f in answer["failures"]] == [(1, 0), (1, 1)]
    assert answer["path"][0] == ask(client, "pair/transport", {"x": [X[0]], "times": [0.5, 0.0]})["path"][0]


def test_large_answers_are_whole(client: httpx.Client) -> None:
    """Matrices beyond a size are written in pieces."""
    answer = ask(client, "pair/sample", {"n": 20_000, "seed": 2, "rtol": 0.1, "atol": 0.1})
    assert np.array(answer["x"]).shape == (20_000, 2)
    assert answer["x"][:5] == ask(client, "pair/sample", {"n": 5, "seed": 2, "rtol": 0.1, "atol": 0.1})["x"]


def test_the_models_are_listed_and_described(client: httpx.Client) -> None:
    listed = {model["name"]: model for model in client.get("/v1/models").json()["models"]}
    assert list(listed) == ["given", "pair", "positive"]
    versions = [(one["version"], one["labels"]) for one in listed["pair"]["versions"]]
    assert versions == [(1, ["old"]), (2, [])]
    assert listed["pair"]["version"] == 2
    described = client.get("/v1/models/pair/versions/old").json()
    assert described["version"] == 1
    assert described["features"] == ["age", "dose"]
    assert described["solver"]["method"] == "dopri5"
    assert described["certificate"]["p50"] > 0
    assert client.get("/v1/models/pair").json()["version"] == 2


def test_a_request_keeps_the_id_it_came_with(client: httpx.Client) -> None:
    body = {"x": X}
    given = client.post("/v1/models/pair/log_density", json=body, headers={"x-request-id": "batch-7/3"})
    assert given.headers["x-request-id"] == "batch-7/3"
    odd = client.post("/v1/models/pair/log_density", json=body, headers={"x-request-id": "a b"})
    assert odd.headers["x-request-id"] not in ("a b", "")
