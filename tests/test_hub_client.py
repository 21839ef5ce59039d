"""Every way in which the Hub's client fails becomes one line of ours, which holds no secret."""

import contextlib
import logging
import socket
import traceback
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download

from perturbdiff.hub_client import check_connection, clean, hub_errors, without_secrets
from tests.localhub.client import TOKEN, led_to
from tests.localhub.client import without_secrets as assert_no_secrets
from tests.localhub.repos import Refused
from tests.localhub.server import SIGNATURE, Fault, LocalHub, Repo

# The client passes file objects in a way that its own HTTP library warns about.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")

NAME = "lab/kang"
WEIGHTS = "model.safetensors"


@pytest.fixture
def hub(tmp_path):
    with LocalHub(write_token=TOKEN, redirects=True) as hub, led_to(hub, tmp_path / "home"):
        hub.models[NAME] = Repo()
        hub.models[NAME].add({"config.json": b"{}", WEIGHTS: bytes(1000)})
        yield hub


class Gated(Repo):
    """One whose terms the user has not accepted."""

    def resolve(self, revision: str) -> str:
        raise Refused(403, "GatedRepo", f"Access to model {NAME} is restricted.")


def failure(call) -> OSError | ValueError:
    """What `call` raises below hub_errors; the one line, and its whole traceback holds no secret."""
    with pytest.raises((OSError, ValueError)) as caught, hub_errors(f"model {NAME!r}"):
        call()
    assert type(caught.value) in (FileNotFoundError, PermissionError, ConnectionError, ValueError)
    assert_no_secrets("".join(traceback.format_exception(caught.value)))
    assert str(caught.value).startswith(f"model {NAME!r}")
    assert str(caught.value).isprintable()
    return caught.value


def push() -> None:
    HfApi().upload_file(path_or_fileobj=b"weights", path_in_repo=WEIGHTS, repo_id=NAME)


# ---------------------------------------------------------------- each class of error


@pytest.mark.parametrize("token", [TOKEN, None])
def test_a_repo_that_is_not_there_or_hidden(hub, tmp_path, token):
    hub.models["lab/hidden"] = Repo(private=True)
    with led_to(hub, tmp_path / "home", token):
        error = failure(lambda: HfApi().model_info("lab/nothing"))
        assert isinstance(error, FileNotFoundError)
        assert "check the name, or log in" in str(error)
        if token is None:
            assert "log in" in str(failure(lambda: snapshot_download("lab/hidden")))


def test_a_revision_or_a_file_that_is_not_there(hub):
    error = failure(lambda: snapshot_download(NAME, revision="v9"))
    assert isinstance(error, FileNotFoundError)
    assert "has no such revision" in str(error)
    error = failure(lambda: hf_hub_download(NAME, "genes.json"))
    assert isinstance(error, FileNotFoundError)
    assert "lacks a file" in str(error)


def test_a_gated_repo(hub):
    hub.models[NAME] = Gated()
    error = failure(lambda: snapshot_download(NAME))
    assert isinstance(error, PermissionError)
    assert "accept its terms" in str(error)


@pytest.mark.parametrize("status", [401, 403])
def test_a_token_that_may_not(hub, status):
    hub.faults["preupload", NAME] = Fault(status=status)
    error = failure(push)
    assert isinstance(error, PermissionError)
    assert "log in with one that may" in str(error)


def test_no_token_where_one_is_asked_for(hub, tmp_path):
    with led_to(hub, tmp_path / "home", token=None):
        error = failure(lambda: HfApi(token=True).whoami())
    assert isinstance(error, PermissionError)
    assert "needs a token" in str(error)


@pytest.mark.parametrize("name", ["a/b/c", "../a", "a b/c", "lab/--", "", "lab/kang\x1b[31m"])
def test_what_is_no_name_of_a_repo(hub, name):
    error = failure(lambda: HfApi().model_info(name))
    assert type(error) is ValueError
    assert "write owner/name" in str(error)


@pytest.mark.parametrize(
    "fault", [Fault(status=500), Fault(status=418), Fault(drops=True), Fault(cut_after=3), Fault(content=b"<html>")]
)
def test_a_hub_that_does_not_answer_as_it_should(hub, fault):
    hub.faults["info", NAME] = fault
    error = failure(lambda: HfApi().model_info(NAME))
    assert type(error) is ConnectionError
    assert "did not answer as it should" in str(error)


@pytest.mark.parametrize("content", [b"[]", b"7", b'"text"', b"null", b'{"siblings": 3}', b"[" * 100_000])
def test_an_answer_of_another_form(hub, content):
    hub.faults["info", NAME] = Fault(content=content)
    error = failure(lambda: HfApi().model_info(NAME))
    assert type(error) is ConnectionError
    assert "did not answer as it should" in str(error)


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:notaport", "no-address", "http://[::1"])
def test_an_address_that_is_none(hub, monkeypatch, endpoint):
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    error = failure(lambda: HfApi().model_info(NAME))
    assert type(error) is ConnectionError


def test_a_hub_that_is_gone(hub):
    hub.stop()
    assert type(failure(lambda: HfApi().model_info(NAME))) is ConnectionError
    error = failure(lambda: snapshot_download(NAME))
    assert isinstance(error, FileNotFoundError)
    assert "the Hub cannot be reached" in str(error)


def test_offline_and_not_in_the_cache(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for call in (lambda: snapshot_download(NAME), lambda: HfApi().model_info(NAME)):
        error = failure(call)
        assert isinstance(error, FileNotFoundError)
        assert "copy a folder here and give its path" in str(error)
    assert hub.log == []


@pytest.mark.parametrize("how", ["open", "refuses", "takes no connection", "offline"])
def test_whether_there_is_a_connection(hub, monkeypatch, how):
    if how == "open":
        check_connection("the list")  # whatever is answered
        assert [request.method for request in hub.log] == ["HEAD"]
        return
    with socket.socket() as full, contextlib.ExitStack() as waiting:
        full.bind(("127.0.0.1", 0))
        if how == "refuses":
            monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{full.getsockname()[1]}")
        elif how == "takes no connection":
            full.listen(0)
            for _ in range(2):  # what nobody accepts fills its queue
                client = waiting.enter_context(socket.socket())
                client.setblocking(False)
                client.connect_ex(full.getsockname())
            monkeypatch.setattr("perturbdiff.hub_client.MAX_CONNECT", 0.2)
            monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{full.getsockname()[1]}")
        else:
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(ConnectionError, match=r"^the list: the Hub cannot be reached \(.*\)\."):
            check_connection("the list")
    assert hub.log == []


def test_a_file_that_could_not_be_sent(hub):
    hub.faults["put", NAME] = Fault(status=403)
    error = failure(push)
    assert type(error) is ConnectionError
    assert "a file could not be moved" in str(error)
    assert "403" in str(error)


def test_a_file_that_comes_in_another_size(hub):
    hub.faults[WEIGHTS] = Fault(content=b"short")
    error = failure(lambda: snapshot_download(NAME))
    assert type(error) is ConnectionError
    assert "size 1000 but has size 5" in str(error)


def test_our_own_errors_pass_as_they_are():
    for mine in (FileExistsError("there"), PermissionError("public"), ValueError("changed"), OSError(28, "full")):
        with pytest.raises(type(mine)) as caught, hub_errors("model"):
            raise mine
        assert caught.value is mine


# ---------------------------------------------------------------- no secrets


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (f"GET https://cdn.hub/lfs/ab?X-Amz-{SIGNATURE}&b=2 failed", "GET https://cdn.hub/lfs/ab failed"),
        (f"for url 'http://a/b?{SIGNATURE}'", "for url 'http://a/b'"),
        (f"<http://a/b?{SIGNATURE}>", "<http://a/b>"),
        ("https://user:secret@mirror/api", "https://mirror/api"),
        (f"token {TOKEN} is", "token *** is"),
        (f"Authorization: Bearer {TOKEN}", "Authorization: ***"),
        ("{'authorization': 'bearer abc.def-ghi'}", "{'authorization': '***'}"),
        ("read model at https://hub/lab/kang", "read model at https://hub/lab/kang"),
    ],
)
def test_secrets_are_cut_out_of_a_text(said, shown):
    assert without_secrets(said) == shown


def test_a_message_is_one_printable_line_of_a_bearable_length():
    assert clean(ValueError(f"  first {TOKEN}\nsecond")) == "first ***"
    assert clean(ValueError("")) == "ValueError"
    assert clean(ValueError("a\x1b[31mb\u202ec\x00")) == r"a\x1b[31mb\u202ec\x00"
    assert len(clean(ValueError("a" * 10_000))) == 200
    assert SIGNATURE not in clean(ValueError("a" * 150 + f" https://{'b' * 40}/c?{SIGNATURE}"))


def test_what_the_hub_says_of_an_error_moves_no_cursor(hub):
    class Odd(Repo):
        def resolve(self, revision: str) -> str:
            raise Refused(400, None, "\x1b[2J\x1b]0;owned\x07")

    hub.models[NAME] = Odd()
    assert isinstance(failure(lambda: HfApi().model_info(NAME)), ConnectionError)


def test_the_clients_own_log_holds_no_signature(hub, tmp_path):
    # It writes whole addresses where it tries again.
    log, said = logging.getLogger("huggingface_hub"), []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    log.addHandler(handler)
    try:
        hub.faults[WEIGHTS] = Fault(times=1, cut_after=10)
        with hub_errors("model"):
            snapshot_download(NAME)
    finally:
        log.removeHandler(handler)
    assert any("Trying to resume download" in line for line in said)
    assert_no_secrets("".join(said))
    assert Path(hub.cdn_url).name in "".join(said)


def test_a_redacting_filter_is_added_once():
    for _ in range(3):
        with hub_errors("model"):
            pass
    for handler in logging.getLogger("huggingface_hub").handlers:
        assert len([f for f in handler.filters if type(f).__module__ == "perturbdiff.hub_client"]) == 1


def test_the_http_library_is_the_clients():
    # hub_errors names its classes.
    from huggingface_hub import errors

    assert issubclass(errors.HfHubHTTPError, httpx2.HTTPError)
