"""A model's directory on this machine: a local path, or a hub id downloaded into Hugging Face's own cache."""

import os
from pathlib import Path

from jaxft.checkpoint.errors import CheckpointError

WANTED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
# Second copies of the weights, in other layouts. Pickles are wanted by nobody.
UNWANTED = ("consolidated*", "original/*", "onnx/*", "openvino/*", "coreml/*", "*.bin", "*.pt", "*.pth", "*.ckpt")


def directory(source: str | os.PathLike[str], revision: str | None = None, weights: bool = True) -> Path:
    """The local directory of a path or hub id; ``revision`` is a branch, tag or commit of the hub.

    ``weights=False`` downloads the config and tokenizer alone. Raises CheckpointError with what can be done if there
    is neither."""
    text = os.fspath(source)
    path = Path(text).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        return _file(path)
    if not _is_hub_id(text):
        remedy = f"Check the path; the working directory is {Path.cwd()}."
        raise CheckpointError(
            text, "a path that does not exist", "a model's directory, or a hub id like org/name", remedy
        )
    return _download(text, revision, weights)


def _file(path: Path) -> Path:
    """Refuses a single file, saying what to give instead."""
    if path.suffix == ".gguf":
        raise gguf(path)
    raise CheckpointError(path, "a file", "the directory that holds config.json", f"Give {path.parent} instead.")


def gguf(path: Path) -> CheckpointError:
    """The refusal of a GGUF file."""
    remedy = (
        "GGUF is a format for inference: fine-tune the safetensors checkpoint that it was made from "
        "(its model card names it)."
    )
    return CheckpointError(path, "a GGUF file", "safetensors", remedy)


def _is_hub_id(text: str) -> bool:
    """Whether a string that is no local path could be a hub id: ``name`` or ``org/name``."""
    pathlike = text.startswith((".", "/", "~", "\\")) or text.count("/") > 1 or text.endswith("/") or "\\" in text
    return not pathlike and not text.endswith((".safetensors", ".gguf", ".bin", ".json"))


def _download(repo: str, revision: str | None, weights: bool) -> Path:
    """snapshot_download, its errors in plain words."""
    import huggingface_hub
    from huggingface_hub import errors

    where = f"'{repo}'" + (f" at revision '{revision}'" if revision else "")
    unwanted = [*UNWANTED, *([] if weights else ["*.safetensors"])]
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repo, revision=revision, allow_patterns=list(WANTED), ignore_patterns=unwanted
            )
        )
    except errors.GatedRepoError:
        page = f"https://huggingface.co/{repo}"
        remedy = f"Accept the conditions on {page}, then run `hf auth login` (or set HF_TOKEN) and try again."
        raise CheckpointError(where, "a gated hub repository", "one you have access to", remedy) from None
    except errors.RevisionNotFoundError:
        remedy = "Give a branch, tag or commit that the repository's page lists."
        raise CheckpointError(where, "no such revision on the hub", "an existing one", remedy) from None
    except errors.RepositoryNotFoundError:
        remedy = "Check the spelling; if the repository is private, run `hf auth login` (or set HF_TOKEN) first."
        raise CheckpointError(where, "no such directory here and no such hub repository", "either", remedy) from None
    except errors.HFValidationError as error:
        raise CheckpointError(where, f"no such directory here, and not a hub id: {error}", "org/name", "") from None
    # No network, offline mode, or a half-filled cache.
    except (OSError, errors.HTTPError) as error:  # pyright: ignore[reportPrivateImportUsage]
        raise _unreachable(where, repo, error) from None


def _unreachable(where: str, repo: str, error: Exception) -> CheckpointError:
    """What to do when the hub does not answer and the cache does not have the model."""
    offline = os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE")
    got = "no such directory here, not in the local hub cache, and "
    got += "HF_HUB_OFFLINE is set" if offline else f"the hub cannot be reached ({type(error).__name__})"
    remedy = f"On a machine with network run `hf download {repo}`, copy the directory here, and give its path"
    remedy += "; or unset HF_HUB_OFFLINE." if offline else "; or check the network (a proxy goes into HTTPS_PROXY)."
    return CheckpointError(where, got, "a model's directory or a reachable hub id", remedy)
