"""Uploading a folder to the Hugging Face hub, its errors in plain words."""

import os
from pathlib import Path

from jaxft.border.errors import ConfigError


class PushError(RuntimeError):
    """The hub cannot be written to; what is wrong and what to do."""


def check(repo: str) -> None:
    """Refuses what cannot work before anything is computed: offline mode, no token. Raises PushError."""
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
        raise PushError(
            f"cannot push to '{repo}': HF_HUB_OFFLINE is set. Unset it, or write a folder with --out and upload it "
            f"where there is network: hf upload {repo} FOLDER"
        )
    if not huggingface_hub.get_token():
        raise PushError(f"cannot push to '{repo}': not logged in. Run `hf auth login`, or set HF_TOKEN")
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"--push-to-hub {repo}: {error}") from None


def folder(path: Path, repo: str, private: bool) -> str:
    """Uploads a folder to a model repository, made if needed; its address. Raises PushError."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    api = huggingface_hub.HfApi()
    try:
        name = api.create_repo(repo, private=private, exist_ok=True).repo_id
        api.upload_folder(folder_path=path, repo_id=name, commit_message="Upload from jaxft")
    except HfHubHTTPError as error:
        raise PushError(f"cannot push to '{repo}': {error}. Check that your token may write there") from None
    except (
        Exception
    ) as error:  # the transport's own errors are no OSErrors, and its package has changed its name before
        if not isinstance(error, OSError) and not type(error).__module__.startswith("httpx"):
            raise
        raise PushError(
            f"cannot push to '{repo}': the hub cannot be reached ({type(error).__name__}). Write a folder with --out "
            f"and upload it where there is network: hf upload {repo} FOLDER"
        ) from None
    return f"https://huggingface.co/{name}"
