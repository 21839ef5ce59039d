"""The Hub's client: what can go wrong with it, in one line that holds no secret."""

from __future__ import annotations

import json
import logging
import re
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from perturbdiff.files import printable

REPO_ID = re.compile(r"[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95}", re.ASCII)

# Addresses with a signature are as good as a password for an hour; so is one with user:password@.
_QUERY = re.compile(r"(https?://[^\s?'\"<>]+)\?[^\s'\"<>]*")
_USER = re.compile(r"(\w+://)[^\s/@'\"]+@")
_TOKEN = re.compile(r"\bhf_\w+|(?i:bearer)\s+[^\s'\"]+")

T = TypeVar("T")

MAX_CONNECT = 1.5  # s for a connection; the client itself would try for half a minute before it says that there is none
WAITS = (1, 2, 4, 8)  # s before a Hub that is busy is asked again
BUSY = (429, 503)

# What the client stumbles over in an answer that is not of the Hub's form, as the page of a captive portal.
_MISREAD = (json.JSONDecodeError, RecursionError, AttributeError, IndexError, KeyError, TypeError)


def name_and_revision(text: str) -> tuple[str, str | None]:
    """owner/name@v1 -> owner/name, v1; a folder has no revision, whatever its name. Raises as `refuse_address`."""
    refuse_address(text)
    name, _, revision = text.partition("@")
    return (text, None) if Path(text).is_dir() else (name, revision or None)


def refuse_address(name: str) -> None:
    """Raise ValueError where a repo is given as https://..., without what is secret in it."""
    if "://" in name:
        raise ValueError(f"{without_secrets(name)!r} is an address; give a folder, or owner/name of a repo on the Hub.")


def no_folder(name: str, error: OSError) -> OSError:
    """The error of a repo that was not found, where `name` may have been meant for a folder."""
    return type(error)(f"no such folder here ({printable(name)}), and {error}")


def asked_again(ask: Callable[[], T]) -> T:
    """What `ask` gives; a Hub that is busy is asked again, as the client does for files."""
    from huggingface_hub.errors import HfHubHTTPError

    for wait in WAITS:
        try:
            return ask()
        except HfHubHTTPError as error:
            if error.response.status_code not in BUSY:
                raise
            time.sleep(wait)
    return ask()


def check_connection(what: str) -> None:
    """Refuse within two seconds where nothing takes a connection. Raises ConnectionError, with HF_HUB_OFFLINE too."""
    import httpx2
    from huggingface_hub import constants, get_session
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        get_session().head(constants.ENDPOINT, timeout=MAX_CONNECT)
    except (httpx2.ConnectError, httpx2.ConnectTimeout, OfflineModeIsEnabled) as error:
        raise ConnectionError(f"{what}: the Hub cannot be reached ({clean(error)}).") from None
    except (httpx2.HTTPError, httpx2.InvalidURL):
        return  # whoever asks it something will be told


def clean(error: BaseException) -> str:
    """The first line of a message, cut and printable; without secrets."""
    return printable(without_secrets((str(error).strip().splitlines() or [type(error).__name__])[0]))[:200]


def without_secrets(text: str) -> str:
    """A text without tokens and the secret parts of addresses."""
    return _TOKEN.sub("***", _USER.sub(r"\1", _QUERY.sub(r"\1", text)))


class _WithoutSecrets(logging.Filter):
    """For the client's own log: where it retries, it writes whole addresses, signatures included."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = without_secrets(record.getMessage()), ()
        return True


_REDACT = _WithoutSecrets()


def _refuse_paths(response: Any) -> None:
    # The client names files of its cache by these headers, wherever they would lead.
    import httpx2

    for header in ("ETag", "X-Linked-Etag", "X-Repo-Commit"):
        value = response.headers.get(header, "")
        if not re.fullmatch(r'(W/)?"?[\w.-]*"?', value) or ".." in value:
            raise httpx2.RemoteProtocolError(f"it answers with a {header} that is no hash")


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Turn the client's errors into ours; `what` is the repo with its revision, as "model 'owner/name'".

    Raises
    ------
    FileNotFoundError
        No such repo, revision or file; not in the cache where the Hub cannot be reached.
    PermissionError
        It needs a token, another token, or consent to its terms.
    ValueError
        Not a repo id.
    ConnectionError
        The Hub does not answer as it should.
    OSError
        The disk has not enough space.
    """
    import httpx2
    from huggingface_hub import errors, get_session

    session = get_session()
    if _refuse_paths not in session.event_hooks["response"]:
        session.event_hooks = {**session.event_hooks, "response": [*session.event_hooks["response"], _refuse_paths]}
    for handler in logging.getLogger("huggingface_hub").handlers:
        handler.addFilter(_REDACT)  # once, however often it is added
    try:
        with warnings.catch_warnings():
            # Rather than after hours of download.
            warnings.filterwarnings("error", "Not enough free disk space", UserWarning)
            yield
    # Raised `from None`: a traceback would print the client's own messages, with their addresses.
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise FileNotFoundError(
            f"{what} is not, or not whole, in the cache of the Hub, and the Hub cannot be reached ({clean(error)}); "
            "connect, or copy a folder here and give its path."
        ) from None
    except errors.GatedRepoError as error:
        raise PermissionError(
            f"{what} is gated ({clean(error)}); accept its terms on its page, then log in with `hf auth login` or "
            "HF_TOKEN."
        ) from None
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"{what} has no such revision ({clean(error)}); give a branch, tag or commit."
        ) from None
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{what} is not on the Hub, or is private ({clean(error)}); check the name, or log in with `hf auth login` "
            "or HF_TOKEN."
        ) from None
    except errors.EntryNotFoundError as error:
        raise FileNotFoundError(f"{what} lacks a file ({clean(error)}).") from None
    except errors.HFValidationError as error:
        raise ValueError(f"{what} is no name of a repo ({clean(error)}); write owner/name.") from None
    except errors.LocalTokenNotFoundError as error:
        raise PermissionError(
            f"{what} needs a token ({clean(error)}); log in with `hf auth login` or HF_TOKEN."
        ) from None
    except (httpx2.HTTPError, errors.FileMetadataError) as error:
        status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
        if status in (401, 403):
            raise PermissionError(
                f"{what} may not be used so with this token ({clean(error)}); log in with one that may (HF_TOKEN, "
                "`hf auth login`)."
            ) from None
        raise ConnectionError(f"{what}: the Hub did not answer as it should ({clean(error)}); try again.") from None
    except UserWarning as warning:
        raise OSError(f"{what}: {clean(warning)}") from None
    except (httpx2.InvalidURL, *_MISREAD) as error:
        reason = f"{type(error).__name__}: {clean(error)}"
        raise ConnectionError(
            f"{what}: the Hub did not answer as it should ({reason}); see that HF_ENDPOINT is the address of a Hub."
        ) from (None if isinstance(error, httpx2.InvalidURL) else error)  # it may be our own mistake: --debug shows it
    except OSError as error:
        sizes = re.search(r"should be of size \d+ but has size \d+", str(error))
        if type(error) is not OSError or sizes is None:  # ours, or the disk's
            raise
        # The rest of the message is the end of an address, where the signature is.
        raise ConnectionError(f"{what}: a file that came {sizes[0]}; try again.") from None
    except (RuntimeError, errors.XetDownloadError) as error:  # of the client's threads that move files
        cause = error.__cause__ or error
        raise ConnectionError(f"{what}: a file could not be moved ({clean(cause)}); try again.") from None
