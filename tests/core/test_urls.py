"""Secrets in addresses: refused where they are typed, taken from the environment, and never shown."""

import re

import pytest

from d3po_core.config import CampaignConfig, ScoringConfig
from d3po_core.errors import D3POError
from d3po_core.scorers.finding import load_scorer
from d3po_core.urls import filled_in, inline_secret, masked, without_login

SECRET = {
    "http://ann:s3cret@host/score?api_key=k3y&size=4": ("ann", "s3cret", "k3y"),
    "https://t0ken@host:9000/score": ("t0ken",),
    "http://host/score?access_token=t0ken#part": ("t0ken",),
    "postgresql+psycopg2://ann:s3%40cret@host/mlflow": ("ann", "s3%40cret"),
    "http://host/?PASSWORD=s3cret&sig=x1y2": ("s3cret", "x1y2"),
    "http://ann:${PASSWORD}@host/": ("ann",),
    "http://host/?api_key=k3y${NAME}": ("k3y",),
}
NAMED = ("http://${LOGIN}@host/score?api_key=${KEY}", "http://${USER}:${PW}@host/", "http://host/score?size=4&x=")


@pytest.mark.parametrize(("url", "secrets"), SECRET.items())
def test_a_secret_in_an_address_is_neither_shown_nor_taken(url: str, secrets: tuple[str, ...]) -> None:
    shown = masked(f"trouble with {url} (and {url})")
    assert "host" in shown
    assert not [secret for secret in secrets if secret in shown]
    if url.startswith("http"):
        assert inline_secret(url)
        with pytest.raises(D3POError, match=r"scoring.models.taste is .* put it in the environment") as error:
            load_scorer("taste", ScoringConfig(models={"taste": url}))
        assert not [secret for secret in secrets if secret in str(error.value)]


@pytest.mark.parametrize("url", NAMED)
def test_names_of_the_environment_are_shown_and_taken(url: str) -> None:
    assert masked(url) == url
    assert inline_secret(url) is None


def test_what_the_server_is_asked_has_the_environment_s_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGIN", "ann:s3/cret@")
    monkeypatch.setenv("KEY", "a&b")
    url = "http://${LOGIN}@host/score?api_key=${KEY}"
    assert filled_in(url, "x") == "http://ann:s3%2Fcret%40@host/score?api_key=a%26b"
    monkeypatch.delenv("KEY")
    with pytest.raises(D3POError, match=r"KEY is not set in the environment; type `export KEY"):
        load_scorer("taste", ScoringConfig(models={"taste": url}))


def test_a_server_is_known_without_its_login() -> None:
    assert without_login("https://ann:pw@host:5000/mlflow/?token=x") == "https://host:5000/mlflow"


def test_other_texts_stay_as_they_are() -> None:
    for text in ("a prompt?key=none of that", "stabilityai/sd", "http://127.0.0.1:9000/score", "ann@host says"):
        assert masked(text) == text


@pytest.mark.parametrize("url", [*SECRET, *NAMED, "stabilityai/sd", "/a/folder?key=value"])
def test_the_schema_that_prefect_checks_says_the_same(url: str) -> None:
    schema = CampaignConfig.model_json_schema()["$defs"]["ScoringConfig"]["properties"]["models"]
    allowed = re.match(schema["additionalProperties"]["pattern"], url) is not None
    assert allowed == (not url.startswith("http") or inline_secret(url) is None)
