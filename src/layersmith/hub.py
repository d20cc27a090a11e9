"""Upload a child's folder, with its model card, to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from layersmith.errors import InputError, UsageError, whole_reason
from layersmith.heterogeneous.checkpoint import check_files


def push(child: str | Path, repo: str, *, private: bool = True, token: str | None = None, message: str = "") -> str:
    """Upload a child with its tokenizer, model card and modelling file to the Hub.

    Args:
        child: Folder of a child, e.g. ``RUN/child``.
        repo: Name of the repository, ``user/name``; it is created if it does not exist.
        private: Whether a new repository is private.
        token: Access token; default: the one of ``hf auth login`` or ``HF_TOKEN``.
        message: Message of the commit.

    Returns:
        The address of the repository.

    Raises:
        UsageError: ``repo`` is not a repository's name.
        InputError: No token is known, the folder is not a checkpoint, or the Hub refuses the upload.
    """
    token = check_push(repo, token)
    check_files(child)
    api = HfApi(token=token)
    try:
        made = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo, folder_path=str(child), commit_message=message or "Upload a model made with layersmith"
        )
    except HFValidationError as error:
        raise UsageError(f"{repo}: not a name of a repository on the Hub ({whole_reason(error)}).") from error
    except (HfHubHTTPError, OSError) as error:
        raise InputError(f"{repo}: the Hub cannot be reached or refuses the upload ({whole_reason(error)}).") from error
    return str(made)


def check_push(repo: str, token: str | None = None) -> str:
    """The access token; called before long work too, so that it is not done in vain.

    Raises:
        UsageError: ``repo`` is not ``user/name``.
        InputError: No token is known.
    """
    if repo.count("/") != 1 or not all(repo.split("/")):
        raise UsageError(f"{repo}: give the repository as user/name.")
    token = token or get_token()
    if token is None:
        raise InputError("no access token of the Hub is known. Run `hf auth login`, or set HF_TOKEN.")
    return token
