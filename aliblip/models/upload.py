"""A model's folder on the Hub: its files and its card, in one commit; while training, in the background.

Checkpoints, evaluations, logs and lists of rows stay here. A failed upload is told and never ends a run.
"""

from __future__ import annotations

import os
import shlex
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import disable_progress_bars, validate_repo_id
from tqdm.auto import tqdm

from aliblip.models.card import CARD, write_card
from aliblip.runtime.arguments import option
from aliblip.runtime.files import read_json
from aliblip.runtime.mistakes import UsageError, first_line, usage_errors
from aliblip.runtime.retries import WAITS, may_pass, retried, trouble_of

REQUIRED = {
    "config.json": ("config.json",),
    "weights": ("model.safetensors", "model.safetensors.index.json"),
    "processor": ("processor_config.json",),
    "tokenizer": ("tokenizer.json",),
    "code": ("modeling_aliblip.py",),
}
# What is uploaded. A file of these names that the model no longer has (a shard of before) is deleted on the Hub.
MODEL_FILES = (
    *("config.json", "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"),
    *("processor_config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.txt", "*_aliblip.py", CARD),
)
# How long the end of a run waits for its last upload; a launcher kills a run 30 s after it has told it to stop.
SECONDS_AT_THE_END = 3600.0
SECONDS_AFTER_A_STOP = 10.0
SECONDS_BETWEEN_NEWS = 30.0
WRITE = "write permission"

T = TypeVar("T")


@dataclass
class HubArguments:
    """Where on the Hub to publish. Kept apart from what a run records: the token is a secret."""

    hub_model_id: str | None = option(None, "Repository on the Hub, me/name; it is made if it is not there.")
    hub_private_repo: bool = option(False, "Make a new repository private, whatever your account says.")
    hub_token: str | None = option(None, "Token with write permission (default: HF_TOKEN, or that of hf auth login).")
    hub_license: str | None = option(None, "License of the weights for the card, as the Hub calls it: apache-2.0.")


# --- the folder -------------------------------------------------------------------------------------------------------


def model_files(folder: Path) -> list[str]:
    """Names of the files of a model's folder that are uploaded."""
    return sorted(path.name for path in folder.iterdir() if path.is_file() and _is_of_a_model(path.name))


def _is_of_a_model(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in MODEL_FILES)


def check_folder(folder: Path) -> None:
    """Refuse a folder that could not be loaded from the Hub.

    Raises:
        UsageError: it is not there, is incomplete, or holds another model.
    """
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}: give a trained model, such as outputs/mine/best")
    missing = [what for what, names in REQUIRED.items() if not any((folder / name).is_file() for name in names)]
    if missing == ["code"]:
        raise UsageError(
            f"{folder} has no modeling_aliblip.py beside its weights, and the Hub could not run it: write a folder "
            f"that has it, python -m aliblip.convert --model_name_or_path {folder} --output_dir {folder}-complete"
        )
    if missing:
        raise UsageError(
            f"{folder} is not a model of AliBLIP, it has no {', no '.join(missing)}: give the folder best or last of "
            "a run"
        )
    with usage_errors(OSError, ValueError, told=f"{folder / 'config.json'} can't be read ({{}}): give a trained model"):
        model_type = read_json(folder / "config.json").get("model_type")
    if model_type != "aliblip":
        raise UsageError(f"{folder} holds a model of type {model_type!r}: convert it first, with aliblip.convert")
    # Half of one would be published, and nobody could load the model.
    for file in (folder / name for name in model_files(folder) if name.endswith(".json")):
        with usage_errors(OSError, ValueError, told=f"{file} can't be read ({{}}): save the model again"):
            read_json(file)


# --- the Hub ----------------------------------------------------------------------------------------------------------


def check_hub_arguments(args: HubArguments) -> None:
    """Check what can be checked without asking the Hub.

    Raises:
        UsageError: no name of a repository, or not a valid one.
    """
    if args.hub_model_id is None:
        raise UsageError("--hub_model_id is missing: name the repository, such as me/my-model")
    with usage_errors(HFValidationError, told=f"--hub_model_id {args.hub_model_id}: {{}}"):
        validate_repo_id(args.hub_model_id)


def connect(args: HubArguments, make: bool = True) -> tuple[HfApi, str]:
    """Ask the Hub for all that an upload needs: a token, the permission, the license's name, and the repository, which
    is made if it is not there.

    Args:
        make: False changes nothing there: whether a repository that is missing may be made is then judged by the names
            of the user and the kind of the token, which says less of a fine-grained one.

    Returns:
        The Hub and the full name of the repository.

    Raises:
        UsageError: no or a wrong token, no permission, an unknown license, or the Hub can't be reached.
    """
    check_hub_arguments(args)
    api = HfApi(token=args.hub_token)
    token = "--hub_token" if args.hub_token is not None else "the token of HF_TOKEN or of `hf auth login`"
    name = args.hub_model_id
    user = "?"
    try:
        about = _ask(api.whoami)
        user = about["name"]
        if args.hub_license is not None:
            _check_license(args.hub_license)
        if make:
            name = _ask(lambda: api.create_repo(name, private=args.hub_private_repo or None, exist_ok=True)).repo_id
        else:
            name = name if "/" in name else f"{user}/{name}"
        if make or _ask(lambda: api.repo_exists(name)):
            _ask(lambda: api.auth_check(name, write=True))
        elif (reason := _why_not_made(about, name)) is not None:
            raise UsageError(_no_permission(reason, token, user, name))
    except UsageError:
        raise
    except Exception as error:  # each version of the library brings its HTTP client with errors of its own
        told = _refusal(error, api, token, user, name)
        if told is None:
            raise
        raise UsageError(told) from error
    return api, name


def _refusal(error: Exception, api: HfApi, token: str, user: str, name: str) -> str | None:
    """What to tell about an error of the Hub or on the way there; None: it is neither, so it is a bug."""
    rights = f"{WRITE} (https://huggingface.co/settings/tokens)"
    if isinstance(error, LocalTokenNotFoundError):
        return (
            f"there is no token for the Hub: `hf auth login`, or set HF_TOKEN, or give --hub_token; it needs {rights}"
        )
    if isinstance(error, OfflineModeIsEnabled):
        return f"the Hub is switched off by HF_HUB_OFFLINE: unset it{_LATER}"
    trouble = trouble_of(error)
    if trouble.status in (401, 403) and user == "?":
        return f"{token} is not accepted by {api.endpoint}: make one with {rights}"
    if trouble.status in (401, 403, 404):
        return _no_permission(first_line(error), token, user, name)
    if trouble.reason is None:
        return None
    return f"{api.endpoint} can't be used ({type(error).__name__}: {first_line(error)}): try again{_LATER}"


def _no_permission(reason: str, token: str, user: str, name: str) -> str:
    owner, _, own_name = name.rpartition("/")
    other = f", or another --hub_model_id, such as {user}/{own_name}" if owner not in ("", user) else ""
    return f"{token} (user {user}) may not write to {name} ({reason}): give a token with {WRITE}{other}"


def _why_not_made(about: dict, name: str) -> str | None:
    """Why a user, as `whoami` tells about them, can't make a repository; None: nothing speaks against it."""
    owner = name.partition("/")[0]
    owners = {about["name"], *(entry["name"] for entry in about.get("orgs", []))}
    if owner not in owners:
        return f"{owner} is neither the user nor an organization of theirs"
    role = about.get("auth", {}).get("accessToken", {}).get("role")
    return "the token may only read" if role == "read" else None


_LATER = "; to train without it, leave out --push_to_hub and publish the finished model with python -m aliblip.publish"


def _check_license(name: str) -> None:
    metadata = ModelCardData(license=name).to_yaml()
    try:
        _ask(ModelCard(f"---\n{metadata}\n---\n").validate)
    except ValueError as error:  # what the Hub says of a card that it does not take
        if may_pass(error):
            raise
        raise UsageError(
            f"--hub_license {name} is not accepted ({' '.join(str(error).split())}): give a name of "
            "https://huggingface.co/docs/hub/repositories-licenses"
        ) from error


def _ask(call: Callable[[], T]) -> T:
    """With few tries, since somebody is waiting."""
    return retried(call, WAITS[:2], what="the Hub")


def upload(api: HfApi, repo_id: str, folder: Path, message: str) -> str:
    """Make the repository hold exactly this model, in one commit. Other files there stay. Returns its address.

    Raises:
        Exception: of the Hub's client, which has many kinds; `aliblip.runtime.retries` judges them.
    """
    names = model_files(folder)
    there = api.list_repo_files(repo_id)
    gone = [CommitOperationDelete(name) for name in there if _is_of_a_model(name) and name not in names]
    added = [CommitOperationAdd(name, folder / name) for name in names]
    api.create_commit(repo_id, [*gone, *added], commit_message=message)
    return f"{api.endpoint}/{repo_id}"


def command(folder: Path, repo_id: str, license: str | None) -> str:
    """What to type to upload a folder."""
    words = ["python", "-m", "aliblip.publish", "--model_name_or_path", str(folder), "--hub_model_id", repo_id]
    return shlex.join([*words, *(["--hub_license", license] if license is not None else [])])


# --- while training ---------------------------------------------------------------------------------------------------


class Publisher:
    """Uploads models in the background, for the main process of a run.

        publisher = Publisher(*connect(args), license=args.hub_license)
        publisher.push(output_dir / "best", "epoch 1")       # returns at once, never raises
        publisher.finish(SECONDS_AT_THE_END)

    A model is uploaded as it was when it was pushed, though its folder may be replaced meanwhile: its files are linked
    into a folder beside it. A model that still waits when the next one comes is not uploaded.

    Args:
        api, repo_id: of `connect`.
        license: for the card.
        tell: prints a line.
    """

    def __init__(
        self, api: HfApi, repo_id: str, license: str | None = None, tell: Callable[[str], object] = tqdm.write
    ):
        self.api, self.repo_id, self.license, self.tell = api, repo_id, license, tell
        self.folder: Path | None = None  # of the newest model
        self._count = 0  # of the newest model
        self._on_the_hub = 0  # the count of the model that the Hub has
        self._files: dict | None = None  # of the newest model
        self._waiting: tuple[int, Path, str] | None = None
        self._busy = False
        self._changed = threading.Condition()
        # A daemon: an upload that hangs must not keep a process that is done.
        self._thread = threading.Thread(target=self._work, name="publisher", daemon=True)
        disable_progress_bars()  # they would break through the bar of the run

    def push(self, folder: Path, message: str) -> None:
        """Upload a model in the background, unless it is the one that was pushed last and that has not failed."""
        copy = folder.parent / f".publish-{self._count + 1}.tmp"  # `repair` removes it after a kill
        try:
            if not write_card(folder, self.repo_id, self.license) and self.folder is None:
                self.tell(f"{folder / CARD} has been edited: it is uploaded as it is")
            files = {name: _identity(folder / name) for name in model_files(folder)}
            with self._changed:
                is_under_way = self._busy or self._waiting is not None or self._on_the_hub == self._count
            if files == self._files and is_under_way:
                return
            _link(folder, list(files), copy)
        except Exception as error:  # whatever is wrong with the folder
            shutil.rmtree(copy, ignore_errors=True)
            files = None
            self.tell(
                f"warning: {folder} can't be uploaded ({type(error).__name__}: {first_line(error)}): the run goes on"
            )
        self._count, self.folder, self._files = self._count + 1, folder, files
        if files is None:
            return
        with self._changed:
            if self._waiting is not None:
                shutil.rmtree(self._waiting[1], ignore_errors=True)
            self._waiting = (self._count, copy, message)
            self._changed.notify_all()
        if not self._thread.is_alive():
            self._thread.start()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None)
                (number, copy, message), self._waiting, self._busy = self._waiting, None, True
            problem = None
            try:
                retried(
                    lambda: upload(self.api, self.repo_id, copy, message),  # noqa: B023
                    wait=self._wait,
                    what=f"{message}, to {self.repo_id}",
                    tell=self.tell,
                )
            except Exception as error:
                problem = error
            shutil.rmtree(copy, ignore_errors=True)
            with self._changed:
                if problem is None:
                    self._on_the_hub = number
                elif self._waiting is None:  # else the next one takes its place
                    self.tell(
                        f"warning: {message} could not be uploaded to {self.repo_id} "
                        f"({type(problem).__name__}: {first_line(problem)}): the run goes on"
                    )
                self._busy = False
                self._changed.notify_all()

    def _wait(self, seconds: float) -> bool:
        """Wait before the next try. Returns whether a newer model has come, so that the try is not needed."""
        with self._changed:
            return self._changed.wait_for(lambda: self._waiting is not None, timeout=seconds)

    def finish(self, seconds: float) -> None:
        """Wait for the last upload, at most so many seconds, with news on the way. Tell where the model is, or how to
        upload it."""
        if self.folder is None:
            return
        start = time.monotonic()
        try:
            with self._changed:
                while self._busy or self._waiting is not None:
                    waited = time.monotonic() - start
                    if waited >= seconds:
                        break
                    self.tell(f"uploading {self.folder} to {self.repo_id} ({waited:.0f} s; Ctrl-C leaves it)")
                    self._changed.wait(min(SECONDS_BETWEEN_NEWS, seconds - waited))
        except KeyboardInterrupt:
            pass
        if self._on_the_hub == self._count:
            self.tell(f"published: {self.api.endpoint}/{self.repo_id}")
        else:
            self.tell(
                f"not on the Hub: {self.folder}; to upload it: {command(self.folder, self.repo_id, self.license)}"
            )
            self.tell = lambda text: None  # the thread may go on and fail, since its files are removed here
            for copy in self.folder.parent.glob(".publish-*.tmp"):
                shutil.rmtree(copy, ignore_errors=True)


def _identity(path: Path) -> tuple[int, int, int]:
    """What differs between two files that had the same name one after the other."""
    found = path.stat()
    return found.st_ino, found.st_mtime_ns, found.st_size


def _link(folder: Path, names: list[str], copy: Path) -> None:
    """Let `copy` hold these files of the folder; as links, where the file system has them."""
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir()
    for name in names:
        try:
            os.link(folder / name, copy / name)
        except OSError:
            shutil.copy2(folder / name, copy / name)


__all__ = [
    "SECONDS_AFTER_A_STOP",
    "SECONDS_AT_THE_END",
    "HubArguments",
    "Publisher",
    "check_folder",
    "check_hub_arguments",
    "command",
    "connect",
    "model_files",
    "upload",
]
