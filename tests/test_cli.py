"""The commands as users run them: processes with arguments, files, a status and what they print."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tests.server import until

import pushforward
from pushforward.loading import default_chunk, load_model, run_chunk
from pushforward.scoring.calibration import Calibration, benjamini_hochberg
from pushforward.tables import read_table, writing

LIMIT_S = 300  # for what takes seconds
X = np.random.default_rng(0).normal(size=(300, 2))


def run(*arguments: object, status: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "pushforward.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200", **environment},
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="session")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CSV with more columns than the model knows, in another order."""
    path = tmp_path_factory.mktemp("tables") / "patients.csv"
    with writing(path) as add:
        add({"id": np.arange(300.0), "dose": X[:, 1], "age": X[:, 0]})
    return path


def test_scores_are_those_of_the_engine(store: Path, table: Path, tmp_path: Path) -> None:
    run("score", table, "--model", "pair", "--store", store, "--output", tmp_path / "scores.parquet")
    names, columns = read_table(tmp_path / "scores.parquet")
    assert names == ["log_density", "score", "p_value", "is_anomaly", "status"]
    model = load_model(store / "pair" / "2")
    expected = run_chunk(model, default_chunk(model.manifest.solver, X, None)).log_density
    p = Calibration.load(store / "pair" / "2" / "calibration.safetensors").p_values(expected)
    for column, values in zip(columns, (expected, -expected, p, p <= 0.01, ["ok"] * 300), strict=True):
        assert column.tolist() == list(values)


@pytest.mark.parametrize("ending", [".csv", ".npy"])
def test_every_format_says_the_same(store: Path, table: Path, tmp_path: Path, ending: str) -> None:
    np.save(tmp_path / "x.npy", X)
    common = ("--model", "pair", "--store", store, "--version", 1)
    run("score", tmp_path / "x.npy", *common, "-o", tmp_path / f"scores{ending}")
    run("score", table, *common, "-o", tmp_path / "scores.parquet")
    _, expected = read_table(tmp_path / "scores.parquet")
    if ending == ".csv":
        _, columns = read_table(tmp_path / "scores.csv")
    else:
        written = np.load(tmp_path / "scores.npy")
        columns = [written[name] for name in written.dtype.names]
    assert [column.tolist() for column in columns] == [column.tolist() for column in expected]


def test_scores_go_to_standard_output_unless_told_otherwise(store: Path, table: Path) -> None:
    done = run("score", table, "-m", "pair", "--store", store, "--explain", "--alpha", "0.2")
    head, *lines = done.stdout.splitlines()
    assert head == (
        '"log_density","score","p_value","is_anomaly","status","attribution_age","attribution_dose"'
    )
    assert len(lines) == 300
    assert {line.split(",")[4] for line in lines} == {'"ok"'} or {line.split(",")[4] for line in lines} == {
        "ok"
    }


def test_a_false_discovery_rate_is_that_of_the_whole_file(store: Path, tmp_path: Path) -> None:
    x = np.concatenate([np.tile(X, (40, 1)), X[:1000] + 20])  # more rows than are scored in one piece
    np.save(tmp_path / "x.npy", x)
    common = ("score", tmp_path / "x.npy", "-m", "pair", "--store", store, "-o", tmp_path / "s.npy")
    run(*common, "--fdr", 0.05)
    scores = np.load(tmp_path / "s.npy")
    assert len(scores) == len(x)
    expected = benjamini_hochberg(scores["p_value"], 0.05)
    assert scores["is_anomaly"].tolist() == expected.tolist()
    assert expected[-300:].all()


def test_a_context_comes_from_its_columns(store: Path, tmp_path: Path) -> None:
    with writing(tmp_path / "t.csv") as add:
        add({"shift": X[:, 0], "x0": X[:, 0], "x1": X[:, 1]})
    run("score", tmp_path / "t.csv", "-m", "given", "--store", store, "-o", tmp_path / "s.npy")
    model = load_model(store / "given" / "1")
    expected = run_chunk(model, default_chunk(model.manifest.solver, X, X[:, :1])).log_density
    assert np.load(tmp_path / "s.npy")["log_density"].tolist() == expected.tolist()


def test_rows_outside_the_support_are_minus_infinity(store: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([[1.0, 1.0], [-1.0, 1.0]]))
    run("score", tmp_path / "x.npy", "-m", "positive", "--store", store, "-o", tmp_path / "s.npy")
    scores = np.load(tmp_path / "s.npy")
    assert scores["log_density"][1] == -np.inf
    assert scores["is_anomaly"].tolist() == [False, True]
    assert scores["status"].tolist() == ["ok", "outside_support"]


def test_samples_are_the_same_for_a_seed_and_a_prefix_for_fewer(store: Path, tmp_path: Path) -> None:
    common = ("sample", "-m", "pair", "--store", store, "--seed", 7, "--log-density")
    run(*common, "-n", 10_000, "-o", tmp_path / "many.npy")
    run(*common, "-n", 20, "-o", tmp_path / "few.npy")
    many = np.load(tmp_path / "many.npy")
    assert many.shape == (10_000, 3)
    assert many[:20].tolist() == np.load(tmp_path / "few.npy").tolist()
    assert run(*common, "-n", 2).stdout.startswith('"age","dose","log_density"\n')


def test_a_fresh_seed_is_told(store: Path) -> None:
    first = run("sample", "-m", "pair", "--store", store, "-n", 2)
    seed = first.stderr.split()[1]
    assert run("sample", "-m", "pair", "--store", store, "-n", 2, "--seed", seed).stdout == first.stdout


def test_a_conditional_model_is_sampled_with_its_context(store: Path) -> None:
    done = run("sample", "-m", "given", "--store", store, "-n", 200, "--seed", 1, "--context", "shift=3")
    drawn = np.array([line.split(",") for line in done.stdout.splitlines()[1:]], float)
    assert drawn.mean(0) == pytest.approx([3, 3], abs=0.5)


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["score", "no.csv", "-m", "pair"], 1, "There is no file no.csv"),
        (["score", "{table}", "-m", "pear"], 1, "There is no model 'pear'"),
        (["score", "{table}", "-m", "pair", "--version", "9"], 1, "has no version or label '9'"),
        (["score", "{table}", "-m", "given"], 1, "patients.csv has no column 'x0', which model given needs"),
        (["score", "{narrow}", "-m", "pair"], 1, "has 1 columns without names; model pair takes 2"),
        (["score", "{empty}", "-m", "pair"], 1, "empty.csv has no rows to score"),
        (["score", "{holes}", "-m", "pair"], 1, "column 'x1' has no value in row 2"),
        (
            ["score", "{table}", "-m", "pair", "-o", "s.xls"],
            2,
            "s.xls has to end in one of .csv, .parquet, .npy",
        ),
        (["score", "{table}", "-m", "pair", "--alpha", "2"], 2, "Invalid value for '--alpha'"),
        (["score", "{table}", "-m", "pair", "--rtol", "0"], 2, "--rtol: the value 0.0 is not allowed"),
        (["score", "{table}", "-m", "pair", "--precision", "half"], 2, "--precision: the value 'half'"),
        (["score", "{table}"], 2, "Missing option '--model'"),
        (["sample", "-m", "given", "--seed", "1"], 1, "no value for 'shift'"),
        (
            ["sample", "-m", "pair", "--seed", "1", "--context", "a=1"],
            1,
            "names 'a', which the model does not know",
        ),
        (["sample", "-m", "given", "--context", "shift"], 2, "must be name=value, with a number"),
        (["sample", "-m", "pair", "-n", "0"], 2, "Invalid value for '--number'"),
        (["models", "show", "pear"], 1, "There is no model 'pear'"),
        (["models", "label", "pair", "1x", "1"], 1, "must begin with a letter"),
        (
            ["models", "label", "pair", "new"],
            2,
            "Give the version that the label is to point at, or --remove",
        ),
        (["models", "--store", "nowhere"], 1, "There is no model store at nowhere"),
        (["serve", "--store", "nowhere"], 1, "There is no model store at nowhere"),
        (["serve", "--port", "99999"], 2, "--port: the value 99999 is not allowed"),
        (["serve", "--host", "256.1.1.1"], 2, "Cannot listen on --host 256.1.1.1 --port 8000"),
        (["serve", "--host", "0.0.0.0"], 2, "--host 0.0.0.0 can be reached from other machines"),
        (["serve", "--host", "::"], 2, "serve with --keys FILE (PUSHFORWARD_KEYS), or say with --insecure"),
        (["serve", "--keys", "nowhere.json"], 2, "There are no keys at nowhere.json: make the first with"),
        (["serve", "--keys", "ftp://x"], 2, "ftp://x is no address of a Redis server"),
        (
            ["keys", "list"],
            2,
            "Say where the keys are kept: --keys FILE, --keys redis://… or PUSHFORWARD_KEYS",
        ),
        (["keys", "list", "--keys", "nowhere.json"], 2, "There are no keys at nowhere.json"),
        (
            ["keys", "create", "--keys", "k", "--scope", "root"],
            2,
            "the scopes are infer, jobs, metrics, admin",
        ),
        (["keys", "create", "--keys", "k", "--burst-rows", "5"], 2, "--rows-per-second may be saved up"),
        (["keys", "create", "--keys", "/nowhere/k"], 1, "cannot be written: No such file or directory"),
        (["keys", "create", "--keys", "redis://127.0.0.1:1"], 1, "redis://127.0.0.1:1 cannot be reached"),
        (["serve", "--lod", "start"], 2, "No such option"),
        (["bake"], 2, "No such command 'bake'"),
    ],
)
def test_what_is_wrong_is_one_clear_message(
    store: Path, table: Path, tmp_path: Path, arguments: list[str], status: int, says: str
) -> None:
    np.save(tmp_path / "narrow.npy", X[:, :1])
    np.save(tmp_path / "holes.npy", np.array([[1, 2], [3, np.nan]]))
    (tmp_path / "empty.csv").write_text("age,dose\n")
    places = {name: tmp_path / f"{name}.npy" for name in ("narrow", "holes")}
    places |= {"table": table, "empty": tmp_path / "empty.csv"}
    done = run(*(text.format(**places) for text in arguments), status=status, PUSHFORWARD_STORE=str(store))
    assert says in " ".join(done.stderr.split())


def test_models_are_listed_shown_verified_and_labelled(store: Path, tmp_path: Path) -> None:
    copy = tmp_path / "store"
    shutil.copytree(store, copy)
    listed = run("models", "--store", copy).stdout
    assert run("models", "list", "--store", copy).stdout == listed
    assert run("models", "--store", copy, "list").stdout == listed
    for text in ("pair", "1, 2", "old = 1", "shift"):
        assert text in listed
    shown = json.loads(run("models", "show", "pair", "--version", "old", "--store", copy).stdout)
    assert (shown["name"], shown["version"]) == ("pair", 1)
    run("models", "label", "pair", "stable", 1, "--store", copy)
    assert json.loads(run("models", "show", "pair", "--store", copy).stdout)["version"] == 1
    run("models", "label", "pair", "stable", "--remove", "--store", copy)
    assert json.loads(run("models", "show", "pair", "--store", copy).stdout)["version"] == 2
    assert run("models", "verify", "pair", "--store", copy).stdout == "pair 1: sound\npair 2: sound\n"
    program = next((copy / "pair" / "2" / "programs").glob("step_density_*"))
    program.write_bytes(program.read_bytes() + b" ")
    done = run("models", "verify", "--store", copy, status=1)
    assert "pair 1: sound" in done.stdout
    assert f"pair 2: pair/2/programs/{program.name} has" in done.stdout


def test_more_connections_than_files_are_refused(checkout: Path) -> None:
    command = f"ulimit -n 600; {sys.executable} -m pushforward.cli serve --port 0 --max-connections 100"
    done = subprocess.run(
        ["bash", "-c", command], cwd=checkout, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert done.returncode == 2
    assert "--max-connections 100 needs 612 open files, and this process may have 600" in done.stderr


def test_keys_are_made_listed_and_revoked(tmp_path: Path) -> None:
    place = {"PUSHFORWARD_KEYS": str(tmp_path / "keys.json")}
    flags = ("--name", "a [b]", "--scope", "admin", "--scope", "infer", "--days", 30, "--rows-per-second", 5)
    made = run("keys", "create", *flags, **place)
    token = made.stdout.strip()
    prefix, number, secret = token.split("_")
    assert prefix == "pf"
    listed = run("keys", "list", **place)
    for text in (number, "a [b]", "infer, admin", "50"):
        assert text in listed.stdout
    assert run("keys", "revoke", number, **place).stdout == ""
    assert number not in run("keys", "list", **place).stdout
    again = run("keys", "revoke", number, status=1, **place)
    assert f"There is no key with the id '{number}'" in again.stderr
    printed = made.stderr + listed.stdout + listed.stderr + again.stderr
    assert secret not in printed
    audits = [line for line in (made.stderr + again.stderr).splitlines() if "event=audit" in line]
    assert [line.rpartition("outcome=")[2] for line in audits] == ["done", "failed"]
    assert all(f"key={number}" in line and f"uid={os.getuid()}" in line for line in audits)


def test_commands_read_the_file_of_settings(store: Path, tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(f'store = "{store}"\n')
    listed = run("models", "--store", store).stdout
    assert run("models", "--config", file).stdout == listed
    assert run("models", "--config", file, "list").stdout == listed
    assert run("models", "list", PUSHFORWARD_CONFIG=str(file)).stdout == listed
    drawn = run("sample", "-m", "pair", "--seed", 1, "--config", file).stdout
    assert drawn == run("sample", "-m", "pair", "--seed", 1, "--store", store).stdout
    file.write_text("slosts = 3\n")
    done = run("serve", "--config", file, status=2)
    assert f"{file}: slosts is not a setting: did you mean slots?" in done.stderr.replace("\n", "")


def test_help_names_every_command_and_every_setting() -> None:
    commands = run("--help").stdout
    for command in ("serve", "train", "models", "score", "sample", "keys"):
        assert command in commands
    assert run("--version").stdout.strip() == pushforward.__version__
    settings = run("serve", "--help").stdout
    for option in ("--store", "--port", "--max-rows", "--drain-s", "--log-format", "--load"):
        assert option in settings
    assert "start|first-use" in settings
    assert "PUSHFORWARD_MAX_ROWS" in settings


def test_a_port_in_use_is_named(store: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run("serve", "--store", store, "--port", port, status=2)
    assert f"--port {port}: Address already in use" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_leaves_no_file_and_no_process(
    store: Path, tmp_path: Path, number: signal.Signals
) -> None:
    arguments = ["sample", "-m", "pair", "-n", "100000000", "--seed", "1", "--store", str(store)]
    process = subprocess.Popen(
        [sys.executable, "-m", "pushforward.cli", *arguments, "-o", str(tmp_path / "x.npy")],
        stderr=subprocess.PIPE,
        text=True,
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    assert until(
        lambda: children.read_text() != "" and any(path.stat().st_size for path in tmp_path.iterdir())
    )
    worker = int(children.read_text().split()[0])
    process.send_signal(number)
    _, printed = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 128 + number
    assert "Traceback" not in printed
    assert not list(tmp_path.iterdir())
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


def test_a_disk_that_is_full_is_named_and_leaves_no_file(store: Path, tmp_path: Path) -> None:
    arguments = f"sample -m pair -n 20000 --seed 1 --store {store} -o {tmp_path}/x.npy"
    command = f"ulimit -f 16; {sys.executable} -m pushforward.cli {arguments}"  # 16 KiB are the disk
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert done.returncode == 2
    assert f"{tmp_path}/x.npy cannot be written: File too large" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("missing", "arguments", "says"),
    [
        (
            "torch",
            ["train", "t.csv", "--name", "t"],
            "Training needs torch: pip install 'pushforward[train]'",
        ),
        ("pyarrow", ["score", "t.csv", "-m", "pair"], "need pyarrow: pip install 'pushforward[tables]'"),
        (
            "redis",
            ["serve", "--broker", "redis://127.0.0.1:1"],
            "A queue in Redis needs redis: pip install 'pushforward[redis]'",
        ),
        (
            "hiredis",
            ["worker", "--broker", "redis://127.0.0.1:1"],
            "A queue in Redis needs hiredis: pip install 'pushforward[redis]'",
        ),
    ],
)
def test_what_is_not_installed_is_named(
    store: Path, tmp_path: Path, missing: str, arguments: list[str], says: str
) -> None:
    (tmp_path / "t.csv").write_text("age,dose\n1,2\n")
    program = f"import sys; sys.modules[{missing!r}] = None; from pushforward.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments, "--store", str(store)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 2
    assert says in done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["worker"], "A worker needs a queue to work for: give --broker"),
        (["worker", "--broker", "redis://h", "--workers", "0"], "needs at least one process"),
        (["worker", "--broker", "http://h"], "http://h is no address of a Redis server"),
        (["serve", "--broker", "http://h"], "http://h is no address of a Redis server"),
        (["serve", "--broker", "redis://h", "--workers", "2"], "--workers is 2: leave it out, or give 0"),
        (["serve", "--workers", "0"], "--workers is 0, which needs a --broker"),
    ],
)
def test_a_queue_and_workers_that_do_not_fit_are_refused_at_the_start(
    store: Path, arguments: list[str], says: str
) -> None:
    assert says in run(*arguments, "--store", store, "--port", 0, status=2).stderr


def test_a_reader_that_has_had_enough_is_no_failure_to_speak_of(store: Path) -> None:
    command = (
        f"{sys.executable} -m pushforward.cli sample -m pair -n 50000 --seed 1 --store {store} | head -n 2"
    )
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert len(done.stdout.splitlines()) == 2
    assert "Traceback" not in done.stderr
    assert "error" not in done.stderr
