import json
from pathlib import Path
from typing import Any

import pytest
import typer

from pushforward.cli import app
from pushforward.errors import UsageError
from pushforward.settings import PREFIX, Settings, load_settings


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(PREFIX + name.upper(), raising=False)


# Of every setting, a value that is not its default.
EXAMPLES: dict[str, Any] = {
    "config": "settings.toml",
    "store": "/srv/models",
    "cache": "/srv/copies",
    "cache_mb": 500,
    "host": "0.0.0.0",
    "port": 9000,
    "admin_port": 9001,
    "keys": "/srv/keys.json",
    "insecure": True,
    "broker": "redis://localhost",
    "lease_s": 2.5,
    "device": "cpu,cuda:1",
    "workers": 3,
    "stall_s": 2.5,
    "slots": 64,
    "step_budget_ms": 2.5,
    "chunk_rows": 100,
    "interactive_rows": 10,
    "load": "first-use",
    "versions": "wine/2,moons/1",
    "watch_s": 0.5,
    "model_memory_mb": 100,
    "canary_share": 0.25,
    "max_body_bytes": 4096,
    "max_connections": 100,
    "header_timeout_s": 2.5,
    "max_rows": 500,
    "max_samples": 600,
    "max_queue_rows": 700,
    "max_queue_bytes": 8192,
    "timeout_ms": 1000,
    "max_timeout_ms": 40_000,
    "drain_s": 1.25,
    "log_level": "debug",
    "log_format": "json",
    "tracing": True,
}


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Writes a file of settings."""

    def write(text: str) -> Path:
        file = tmp_path / "settings.toml"
        file.write_text(text)
        return file

    return write


def parsed(*arguments: str) -> dict[str, Any]:
    """The flags of ``pushforward serve``, as the command gets them."""
    command = typer.main.get_command(app)
    serve = command.get_command(typer.Context(command), "serve")  # type: ignore[attr-defined]
    return dict(serve.make_context("serve", list(arguments)).params)


def test_there_is_an_example_of_every_setting() -> None:
    assert EXAMPLES.keys() == Settings.model_fields.keys()


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_setting_can_be_set_by_a_flag_a_variable_and_a_file_in_this_order(
    name: str, monkeypatch: pytest.MonkeyPatch, write: Any
) -> None:
    default, value = getattr(Settings(), name), EXAMPLES[name]
    expected = Path(value) if name in ("config", "cache") else value
    flag, variable, other = f"--{name.replace('_', '-')}", PREFIX + name.upper(), write("").with_name("other")
    other.write_text("")
    assert expected != default
    assert getattr(load_settings(**parsed()), name) == default
    if name == "config":
        monkeypatch.chdir(other.parent)
        overridden = str(other)
    else:
        overridden = str(value * 2 if default is None else default)
        file = write(f"{name} = {json.dumps(value)}")
        assert getattr(load_settings(**parsed("--config", str(file))), name) == expected
        monkeypatch.setenv("PUSHFORWARD_CONFIG", str(file))
        assert getattr(load_settings(**parsed()), name) == expected
        write(f"{name} = {json.dumps(type(value)(overridden))}")
    monkeypatch.setenv(variable, str(value))
    assert getattr(load_settings(**parsed()), name) == expected
    monkeypatch.setenv(variable, overridden)
    assert getattr(load_settings(**parsed()), name) != expected
    assert getattr(load_settings(**parsed(flag, *([] if value is True else [str(value)]))), name) == expected


def test_a_flag_that_is_none_was_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PUSHFORWARD_PORT", "9000")
    assert load_settings(port=None).port == 9000
    monkeypatch.setenv("pushforward_port", "9001")
    monkeypatch.delenv("PUSHFORWARD_PORT")
    assert load_settings().port == 9001


def test_a_store_is_a_path_or_a_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PUSHFORWARD_STORE", "/srv/models")
    assert load_settings().store == "/srv/models"
    assert load_settings(store=Path("models")).store == "models"
    assert load_settings(store="s3://bucket/models").store == "s3://bucket/models"


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("port", "70000", "less than or equal to 65535"),
        ("port", "http", "valid integer"),
        ("slots", "0", "greater than or equal to 1"),
        ("load", "later", "'start' or 'first-use'"),
        ("broker", "", "at least 1 character"),
        ("log_level", "loud", "'debug', 'info', 'warning' or 'error'"),
        ("max_body_bytes", "1", "greater than or equal to 1024"),
        ("drain_s", "-1", "greater than or equal to 0"),
    ],
)
def test_a_bad_value_is_refused_with_its_name_and_what_is_allowed(
    monkeypatch: pytest.MonkeyPatch, write: Any, name: str, value: str, allowed: str
) -> None:
    variable = PREFIX + name.upper()
    monkeypatch.setenv(variable, value)
    with pytest.raises(UsageError) as caught:
        load_settings()
    assert f"{variable}: the value {value!r} is not allowed" in caught.value.message
    assert allowed in caught.value.message
    monkeypatch.delenv(variable)
    with pytest.raises(UsageError, match=f"--{name.replace('_', '-')}: the value"):
        load_settings(**{name: value})
    file = write(f"{name} = {json.dumps(value)}")
    with pytest.raises(UsageError) as caught:
        load_settings(config=file)
    assert f"{file}: {name}: the value {value!r} is not allowed" in caught.value.message
    assert allowed in caught.value.message


def test_every_bad_value_is_named_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        load_settings(port=-1, slots=0)
    assert "--port" in caught.value.message
    assert "--slots" in caught.value.message


def test_a_misspelt_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PUSHFORWARD_PROT", "9000")
    with pytest.raises(UsageError, match="PUSHFORWARD_PROT is not a setting: did you mean PUSHFORWARD_PORT"):
        load_settings()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("prot = 9000", "prot is not a setting: did you mean port?"),
        ("zzz = 1", "zzz is not a setting: the settings are"),
        ("[serve]\nport = 9000", "serve is not a setting"),
        ('config = "other.toml"', "config is not a setting"),
        ("port = [9000]", "port: the value [9000] is not allowed. Input should be a valid integer"),
        ("port: 9000", "is not in TOML"),
        ("port = 9000\nport = 9001", "is not in TOML"),
    ],
)
def test_a_file_that_says_nothing_useful_is_refused(write: Any, text: str, says: str) -> None:
    file = write(text)
    with pytest.raises(UsageError) as caught:
        load_settings(config=file)
    assert str(file) in caught.value.message
    assert says in caught.value.message


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.toml cannot be read: No such file"):
        load_settings(config=tmp_path / "none.toml")
    with pytest.raises(UsageError, match="cannot be read: Is a directory"):
        load_settings(config=tmp_path)
    (tmp_path / "latin").write_bytes(b"host = '\xe4'")
    with pytest.raises(UsageError, match="latin is not in TOML"):
        load_settings(config=tmp_path / "latin")


def test_the_default_deadline_cannot_be_above_the_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PUSHFORWARD_MAX_TIMEOUT_MS", "1000")
    with pytest.raises(UsageError, match="PUSHFORWARD_MAX_TIMEOUT_MS = 1000"):
        load_settings()


def test_every_setting_says_what_it_does() -> None:
    for name, field in Settings.model_fields.items():
        assert field.description, name


def test_the_table_of_settings_in_the_docs_is_this(checkout: Path) -> None:
    text = (checkout / "docs" / "operations.md").read_text()
    for name, field in Settings.model_fields.items():
        default = "" if field.default is None else f"`{field.default}`"
        assert f"| `PUSHFORWARD_{name.upper()}` | {default} | {field.description} |" in text
