from pathlib import Path

import pytest

from pushforward.errors import UsageError
from pushforward.settings import PREFIX, Settings, load_settings


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(PREFIX + name.upper(), raising=False)


def test_a_flag_beats_a_variable_and_a_variable_beats_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings().port == 8000
    monkeypatch.setenv("PUSHFORWARD_PORT", "9000")
    assert load_settings().port == 9000
    assert load_settings(port=9001).port == 9001
    assert load_settings(port=None).port == 9000


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
        ("log_level", "loud", "'debug', 'info', 'warning' or 'error'"),
        ("max_body_bytes", "1", "greater than or equal to 1024"),
        ("drain_s", "-1", "greater than or equal to 0"),
    ],
)
def test_a_bad_value_is_refused_with_its_name_and_what_is_allowed(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, allowed: str
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


def test_every_bad_value_is_named_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        load_settings(port=-1, slots=0)
    assert "--port" in caught.value.message
    assert "--slots" in caught.value.message


def test_a_misspelt_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PUSHFORWARD_PROT", "9000")
    with pytest.raises(UsageError, match="PUSHFORWARD_PROT is not a setting: did you mean PUSHFORWARD_PORT"):
        load_settings()


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
