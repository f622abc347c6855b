"""Hub ids: found in Hugging Face's cache, or a clear message about what can be done."""

import importlib

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from jaxft.checkpoint import hf, hub
from jaxft.checkpoint.errors import CheckpointError
from tests.models import tiny

http = importlib.import_module(errors.HTTPError.__module__.partition(".")[0])  # httpx, or what followed it
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def refused(source, *parts, revision=None):
    with pytest.raises(CheckpointError) as caught:
        hub.directory(source, revision)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


@pytest.mark.parametrize("source", ["./absent", "/absent/model", "~/absent", "a/b/c", "models/", "weights.safetensors"])
def test_an_absent_path_is_said_to_be_absent(source, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    refused(source, source, "a path that does not exist", "working directory")


def test_offline_without_the_model_in_the_cache(monkeypatch, tmp_path):
    """The real client, in the offline mode that the tests run under."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    refused("org/name", "'org/name'", "not in the local hub cache, and HF_HUB_OFFLINE is set", "hf download org/name")


def test_a_model_in_the_cache_loads_offline(monkeypatch, tmp_path):
    repo = tmp_path / "models--org--name"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    tiny.save("llama", repo / "snapshots" / COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert hf.load("org/name").config.hidden_size == 32
    assert hub.directory("org/name", COMMIT) == repo / "snapshots" / COMMIT


def test_an_id_that_cannot_be_one():
    refused("no such model!", "'no such model!'", "not a hub id")


def _http(kind, status):
    request = http.Request("GET", "https://huggingface.co/api/models/org/name")
    return kind("refused", response=http.Response(status, request=request))


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        (lambda: _http(errors.RepositoryNotFoundError, 404), ("no such hub repository", "spelling", "hf auth login")),
        (lambda: _http(errors.GatedRepoError, 403), ("gated", "https://huggingface.co/org/name", "hf auth login")),
        (lambda: _http(errors.RevisionNotFoundError, 404), ("at revision 'v9'", "no such revision")),
        (lambda: http.ConnectError("[Errno -2] Name or service not known"), ("cannot be reached", "HTTPS_PROXY")),
        (lambda: errors.LocalEntryNotFoundError("no cache, no network"), ("cannot be reached", "hf download org/name")),
        (lambda: _http(errors.HfHubHTTPError, 500), ("cannot be reached",)),
    ],
)
def test_what_the_client_raises_is_said_plainly(error, parts, monkeypatch):
    def download(*_, **__):
        raise error()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    refused("org/name", "org/name", *parts, revision="v9")


def test_pickles_and_second_copies_are_not_downloaded(monkeypatch, tmp_path):
    """Of a repository's files, those that the client would fetch with our patterns."""
    asked = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **options: asked.update(options) or tmp_path)
    hub.directory("org/name")
    files = [
        "README.md",
        "additional_chat_templates/tools.jinja",
        "chat_template.jinja",
        "config.json",
        "consolidated.safetensors",
        "merges.txt",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "onnx/model.onnx",
        "original/consolidated.00.pth",
        "original/params.json",
        "pytorch_model.bin",
        "tokenizer.json",
        "tokenizer.model",
    ]
    patterns = {name: asked[name] for name in ("allow_patterns", "ignore_patterns")}
    assert list(huggingface_hub.utils.filter_repo_objects(files, **patterns)) == [
        "additional_chat_templates/tools.jinja",
        "chat_template.jinja",
        "config.json",
        "merges.txt",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer.model",
    ]


def test_the_tokenizer_alone_can_be_asked_for(monkeypatch, tmp_path):
    asked = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **options: asked.update(options) or tmp_path)
    hub.directory("org/name", weights=False)
    found = huggingface_hub.utils.filter_repo_objects(
        ["model-00001-of-00002.safetensors", "tokenizer.json", "config.json"],
        allow_patterns=asked["allow_patterns"],
        ignore_patterns=asked["ignore_patterns"],
    )
    assert list(found) == ["tokenizer.json", "config.json"]
