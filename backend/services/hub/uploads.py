"""What is written to the Hub: repositories are made, and files committed to them.

huggingface_hub's own functions do it, since an upload takes a protocol of several requests. Endpoint, token and errors
are those of every other request to the Hub. `limit_sessions` sets the time limits.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO

from core.errors import Rejected, StudioError
from domain.hub.repos import model_repo
from services.hub.errors import map_hub_error
from services.hub.http import HubHttp, hub_token, limit_sessions

if TYPE_CHECKING:
    from huggingface_hub import HfApi


class PushRejected(Rejected):
    """The Hub, or what is there already, does not allow the push as it stands."""

    slug, title = "push-rejected", "Push rejected"


class HubUploads:
    """Writes to repositories of models.

    Args:
        http: Knows the Hub's URL.
    """

    def __init__(self, http: HubHttp) -> None:
        self._http = http

    def url(self, repo_id: str) -> str:
        """Return the address of a repository's page."""
        return f"{self._http.endpoint}/{repo_id}"

    def make_repository(self, repo_id: str, *, private: bool) -> str:
        """Make a repository, or take the one that is there if it is as private as wanted.

        Returns:
            The repository's full id; a name without an owner is the token's own.

        Raises:
            PushRejected: It is there and more public, or more private; or the Hub refuses the request.
            AccessDenied, ModelNotFound, HubUnavailable: As the Hub says.
        """
        from huggingface_hub.errors import HfHubHTTPError

        with _mapped_errors(repo_id):
            api = self._api()
            try:
                return str(api.create_repo(repo_id, private=private).repo_id)
            except HfHubHTTPError as error:
                if error.response.status_code != 409:
                    raise
            there = api.model_info(repo_id)
        if bool(there.private) != private:
            state = "private" if there.private else "public"
            raise PushRejected(
                f"{there.id} is there already and {state}; push with private={str(there.private).lower()}."
            )
        return str(there.id)

    def commit(
        self, repo_id: str, files: Mapping[str, BinaryIO], message: str, before_commit: Callable[[], None]
    ) -> str:
        """Upload files, and commit them in one commit.

        Args:
            repo_id: The repository.
            files: By their paths in the repository. Each is read twice: for its sum, and to be sent.
            message: The commit's.
            before_commit: Called when every large file is uploaded, before the commit. It may raise.

        Returns:
            The commit's hash.

        Raises:
            PushRejected: The Hub refuses the content.
            AccessDenied, ModelNotFound, HubUnavailable: As the Hub says.
            StudioError: A file or `before_commit` raised it.
        """
        from huggingface_hub import CommitOperationAdd

        with _mapped_errors(repo_id):
            api = self._api()
            additions = [CommitOperationAdd(path, file) for path, file in files.items()]
            api.preupload_lfs_files(repo_id, additions, free_memory=False)
            before_commit()
            return str(api.create_commit(repo_id, additions, commit_message=message).oid)

    def _api(self) -> "HfApi":
        from huggingface_hub import HfApi
        from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

        disable_progress_bars()
        limit_sessions()
        return HfApi(endpoint=self._http.endpoint, token=hub_token())


@contextmanager
def _mapped_errors(repo_id: str) -> Iterator[None]:
    """Raise what huggingface_hub raises in this service's terms. An upload hides what happened in a cause."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while isinstance(cause, RuntimeError) and cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, StudioError):
            raise cause from None
        if isinstance(cause, ValueError) and not isinstance(cause, UnicodeError):
            raise PushRejected(f"{repo_id}: {str(cause)[:500]}") from error
        raise map_hub_error(cause if isinstance(cause, Exception) else error, model_repo(repo_id)) from error
