"""A detector's folder → a repository of the Hub, in one commit."""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_token,
)
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import validate_repo_id
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME, IMAGE_PROCESSOR_NAME

from .shared_card import card_changes
from .shared_files import CARD_NAME, files_to_share, is_adapter, own_code, read_json

# The folder whose files travel with the weights, and what they are loaded by.
CODE_FOLDER = Path(__file__).parents[1] / "model"
AUTO_MAPS = {
    CONFIG_NAME: {
        "AutoConfig": "configuration_dit_detection.DiTDetectionConfig",
        "AutoModelForObjectDetection": "modeling_dit_detection.DiTForObjectDetection",
    },
    IMAGE_PROCESSOR_NAME: {"AutoImageProcessor": "image_processing_dit_detection.DiTDetectionImageProcessor"},
}


def upload_plan(
    folder: str | Path,
    *,
    code: bool = True,
    repo_id: str | None = None,
    tags: Sequence[str] = (),
    base_model: str | None = None,
) -> dict[str, Path | bytes]:
    """
    Say what a push sends: [`files_to_share`], with the changes that make them right for others. Changes no file.

    Without `code` no `auto_map` points at code that is not there; with it, code that the folder lacks is this
    package's. Of the card see [`card_changes`]. An adapter names its base, or `base_model` in its place.

    Returns:
        `dict[str, Path | bytes]`: Path in the repository → file, or the content if it differs from the file's.

    Raises:
        FileNotFoundError, ValueError: As [`files_to_share`] and [`card_changes`]; for a bad `repo_id`; and if an
            adapter's base is of this machine only.
    """
    folder = Path(folder)
    if repo_id is not None:
        validate_repo_id(repo_id)
    plan: dict[str, Path | bytes] = {
        path.relative_to(folder).as_posix(): path for path in files_to_share(folder, code=code)
    }
    model_type = read_json(folder / CONFIG_NAME).get("model_type")
    if is_adapter(folder):
        adapter = read_json(folder / ADAPTER_CONFIG_NAME)
        base_model = base_model or adapter.get("base_model_name_or_path")
        check_base_model(base_model)
        if base_model != adapter.get("base_model_name_or_path"):
            plan[ADAPTER_CONFIG_NAME] = _as_json(adapter | {"base_model_name_or_path": base_model})
    elif base_model is not None:
        raise ValueError(f"base_model={base_model!r} is for adapters, and {folder} is none.")
    elif model_type != "dit_detection":
        raise ValueError(
            f"{folder / CONFIG_NAME} has the model_type {model_type!r}; only detectors of this package "
            "('dit_detection') can be pushed. `hf upload` takes others."
        )
    if code and own_code(folder) is None and set(AUTO_MAPS) & plan.keys():
        plan |= {path.name: path for path in CODE_FOLDER.glob("*.py") if path.name != "__init__.py"}
        plan |= {
            name: _as_json(read_json(folder / name) | {"auto_map": auto_map})
            for name, auto_map in AUTO_MAPS.items()
            if name in plan
        }
    elif not code:
        for name in AUTO_MAPS.keys() & plan.keys():
            config = read_json(folder / name)
            config.pop("auto_map", None)
            plan[name] = _as_json(config)
    plan |= card_changes(folder, repo_id or folder.resolve().name, code=code, tags=tags, base_model=base_model)
    return dict(sorted(plan.items()))


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    tags: Sequence[str] = (),
    git_tag: str | None = None,
    commit_message: str = "Upload detector",
    token: str | None = None,
    code: bool = True,
    base_model: str | None = None,
) -> CommitInfo:
    """
    Send a detector, or an adapter, to the Hub in one commit: others see all of it or nothing.

    Weights of an earlier push that this one does not replace are deleted in the same commit, because `from_pretrained`
    could prefer them. A card that only the repository has is left alone.

    Args:
        folder (`str` or `Path`): See [`files_to_share`].
        repo_id (`str`): `name` or `namespace/name`; made if it does not exist.
        private (`bool`, *optional*): For a repository that is made. One that is public is refused if `True`.
        revision (`str`, *optional*): Branch; made from `main` if it does not exist.
        tags (`Sequence[str]`): For the front matter of the card, beside those it has.
        git_tag (`str`, *optional*): Names the commit, so that others can pin it as their `revision`.
        commit_message (`str`): First line of the commit.
        token (`str`, *optional*): By default that of `hf auth login` or `HF_TOKEN`.
        code (`bool`): Whether the model's code travels, too. Without it others need this package.
        base_model (`str`, *optional*): Hub id of the detector that an adapter is for, if it names another place.

    Returns:
        `huggingface_hub.CommitInfo`: With `commit_url`, `repo_url` and `oid`.

    Raises:
        FileNotFoundError, ValueError: As [`upload_plan`]; and for a `git_tag` that exists.
        PermissionError: If there is no token, or it may not write there.
        ConnectionError: If the Hub cannot be reached, or the upload ends early: the files there are the old ones.
    """
    # What is wrong here needs no network to be told.
    upload_plan(folder, code=code, repo_id=repo_id, tags=tags, base_model=base_model)
    require_token(token)
    api = HfApi(token=token, library_name="dit_detection")
    with hub_errors(repo_id):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private and not api.model_info(repo_id).private:
            raise ValueError(
                f"{repo_id} exists and is public. Make it private in its settings, or push without private."
            )
        if git_tag is not None and git_tag in [ref.name for ref in api.list_repo_refs(repo_id).tags]:
            raise ValueError(f"{repo_id} has a tag {git_tag!r} already. Choose another name.")
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        there = api.list_repo_files(repo_id, revision=revision)
        plan = upload_plan(folder, code=code, repo_id=repo_id, tags=tags, base_model=base_model)
        if CARD_NAME in there and not (Path(folder) / CARD_NAME).is_file():
            del plan[CARD_NAME]
        commit = api.create_commit(
            repo_id,
            [
                *(CommitOperationDelete(name) for name in there if _would_be_loaded(name) and name not in plan),
                *(CommitOperationAdd(name, source) for name, source in plan.items()),
            ],
            commit_message=commit_message,
            revision=revision,
        )
        if git_tag is not None:
            api.create_tag(repo_id, tag=git_tag, revision=commit.oid)
    return commit


def check_base_model(base_model: str | None) -> None:
    """Raise `ValueError` if this is no Hub id, but a folder of this machine or nothing."""
    if not base_model or Path(base_model).exists() or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", base_model):
        raise ValueError(
            f"The adapter names {base_model!r} as its base, which no one else can load. Push the base first, and "
            "give its Hub id when you push the adapter: `dit-detect push ADAPTER REPO --base_model NAMESPACE/NAME`. "
            "Or merge the two and push a whole detector: `dit-detect convert ADAPTER MERGED`."
        )


def require_token(token: str | None) -> None:
    """Raise `PermissionError` if there is neither this token nor one that is stored."""
    if token is None and get_token() is None:
        raise PermissionError(
            "There is no token for the Hub. Run `hf auth login` with one that may write "
            "(https://huggingface.co/settings/tokens), or set HF_TOKEN."
        )


@contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """Say what to do about what the Hub, or the way to it, refuses."""
    try:
        yield
    except (HTTPError, RuntimeError) as error:  # a RuntimeError is what an upload through hf_xet ends in
        response = getattr(error, "response", None)
        status = None if response is None else response.status_code
        said = f"{error} {error.__cause__}" if isinstance(error, RuntimeError) and error.__cause__ else str(error)
        if status == 401:
            raise PermissionError(
                f"The Hub does not accept the token for {repo_id}. Run `hf auth login` with one that is valid, or "
                f"mend HF_TOKEN. It said: {said}"
            ) from error
        if status in (403, 404):
            raise PermissionError(
                f"The token may not write to {repo_id}. Take one with write permission for it "
                "(https://huggingface.co/settings/tokens) and run `hf auth login`, or name another repository. "
                f"The Hub said: {said}"
            ) from error
        if status is None or status >= 500:
            raise ConnectionError(
                f"{repo_id} could not be pushed: {said}. What was not finished changes nothing there: push again."
            ) from error
        raise


def _as_json(config: dict[str, Any]) -> bytes:
    """As transformers and peft write it."""
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


def _would_be_loaded(name: str) -> bool:
    """Whether `from_pretrained` could take this file of a repository's for the weights."""
    return "/" not in name and (
        name.endswith((".safetensors", ".safetensors.index.json")) or name == ADAPTER_CONFIG_NAME
    )
