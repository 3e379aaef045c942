"""Pushes a folder to a repository on the hub in one commit: all of it arrives, or nothing changes.

`Push.check` comes before the export's work: does the hub accept the name, is there a token, may it write there, what is
already in the repository? A new repository is private unless `public`, and an existing one is written to only if its
visibility is the one asked for: what somebody takes for private mustn't turn out to be public. One that holds files is
written to only with `replace`; afterwards it holds the folder's files and no others.

The token is the one that huggingface_hub finds (HF_TOKEN, or `hf auth login`), the address is HF_ENDPOINT. The file
that marks deltaw's folders isn't pushed.

Rejected: deleting a repository that was made for a push which then failed: an empty one harms nobody, and a command
that deletes on the hub might.
"""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from deltaw.errors import InputError, RunError, first_line
from deltaw.shipping.target import MARK
from deltaw.show.progress import Display
from deltaw.show.text import counted

ALWAYS = {".gitattributes"}  # the hub puts it into an empty repository
LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


@dataclass(frozen=True)
class Push:
    """The repository to push to, and how."""

    repository: str
    public: bool = False
    replace: bool = False

    def check(self) -> None:
        """Raises InputError for what can't be pushed to, RunError where the hub doesn't answer."""
        from huggingface_hub import HfApi, get_token
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id

        try:
            validate_repo_id(self.repository)
        except HFValidationError as error:
            raise InputError(f"--push {self.repository}: {error}", fix="name it org/name") from None
        owner, slash, _ = self.repository.partition("/")
        if not slash:
            raise InputError(f"--push {self.repository} doesn't name an owner", fix="name it org/name")
        if not get_token():
            raise InputError(f"--push {self.repository}: there is no token for the hub", fix=LOGIN)
        api = HfApi()
        try:
            who = api.whoami()
        except Exception as error:
            self._failed(error)
        _check_rights(who, owner)
        self._check_repository(api)

    def run(self, folder: Path, display: Display) -> str:
        """Push the files of `folder`; returns the repository's address. Raises RunError."""
        from huggingface_hub import HfApi
        from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

        api = HfApi()
        display.say(f"pushing to {self.repository}")
        shown = not are_progress_bars_disabled()
        if display.quiet or not sys.stderr.isatty():
            disable_progress_bars()
        try:
            url = api.create_repo(self.repository, private=not self.public, exist_ok=True)
            api.upload_folder(
                repo_id=self.repository,
                folder_path=folder,
                ignore_patterns=[MARK],
                delete_patterns="*" if self.replace else None,
                commit_message="Upload by deltaw",
            )
        except Exception as error:
            self._failed(error, folder)
        finally:
            if shown:
                enable_progress_bars()
        return str(url)

    def _check_repository(self, api: Any) -> None:
        """Raise InputError unless the repository doesn't exist or is as asked for."""
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            info = api.model_info(self.repository)
        except RepositoryNotFoundError:
            return
        except Exception as error:
            self._failed(error)
        if info.private is self.public:
            visibility, wanted = ("private", "without --public") if info.private else ("public", "with --public")
            fix = f"push {wanted}, choose another name, or change it on the hub"
            raise InputError(f"--push {self.repository} exists already and is {visibility}", fix=fix)
        files = {file.rfilename for file in info.siblings or ()} - ALWAYS
        if files and not self.replace:
            what = f"--push {self.repository} exists already and holds {counted(len(files), 'file')}"
            raise InputError(what, fix="choose another name, or add --replace: then it holds the new files only")

    def _failed(self, error: Exception, folder: Path | None = None) -> NoReturn:
        """Raise the error that the hub or the connection gave. `folder`: already written, so it can be pushed later."""
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = first_line(error)
        what = f"--push {self.repository}"
        upload = shlex.join(["hf", "upload", self.repository, str(folder)])
        later = f"; the folder is whole, to push it later: {upload}" if folder else ""
        if status == 401:
            raise InputError(f"{what}: the hub doesn't take the token", fix=LOGIN + later) from None
        if status == 403:
            raise InputError(f"{what}: the token may not write there", fix="use one that may" + later) from None
        if status is not None:
            raise RunError(f"{what}: the hub answered {status}: {reason:.200}", fix="try again" + later) from None
        # Of what can go wrong on the way, the client's own errors aren't OSErrors.
        if isinstance(error, OSError) or type(error).__module__.startswith("httpx"):
            fix = "is the network up, and HF_HUB_OFFLINE not set?"
            raise RunError(f"{what}: the hub can't be reached: {reason:.200}", fix=fix + later) from None
        raise RunError(f"{what} failed: {type(error).__name__}: {reason:.200}", fix="try again" + later) from None


def _check_rights(who: dict[str, Any], owner: str) -> None:
    """Raise InputError unless the token may write for `owner`, as far as it tells; a fine-grained one doesn't."""
    token = (who.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise InputError("--push: the hub's token may only read", fix="make one with write access")
    owners = [who.get("name"), *(org.get("name") for org in who.get("orgs") or ())]
    if owner not in owners and token.get("role") != "fineGrained":
        names = ", ".join(name for name in owners if name)
        raise InputError(f"--push: the token's user can't write for {owner}", fix=f"it can for: {names}")
