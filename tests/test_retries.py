"""Trying again: what may pass, how often, after which waits, and what is told."""

import errno
import json
import ssl

import pytest
from helpers import instead_of_sleep
from huggingface_hub import errors, hf_api
from huggingface_hub.utils import httpx

from aliblip.runtime import retries
from aliblip.runtime.retries import WAITS, GaveUp, Tries, may_pass, retried, sleep_about, trouble_of


def of_the_hub(status):
    request = httpx.Request("GET", "https://localhost/x")
    return errors.HfHubHTTPError(f"{status} of the Hub", response=httpx.Response(status, request=request))


def caused(error, cause):
    error.__cause__ = cause
    return error


def raised_in(module, error):
    """The error as it is when code of that module has raised it."""
    code = compile("def fail(error):\n    raise error", "x.py", "exec")
    names = {"__name__": module.__name__}
    exec(code, names)
    with pytest.raises(type(error)):
        names["fail"](error)
    return error


MAY_PASS = {
    "503": of_the_hub(503),
    "429": of_the_hub(429),
    "408": of_the_hub(408),
    "a reset connection": ConnectionResetError("gone"),
    "a timeout": TimeoutError(),
    "no route": OSError(errno.ENETUNREACH, "no route"),
    "a slow answer": httpx.ReadTimeout("slow"),
    "a busy proxy": json.JSONDecodeError("no JSON", "<html>", 0),
    "a large file's upload": caused(RuntimeError("Error while uploading"), of_the_hub(502)),
    "the uploader in native code": raised_in(hf_api, RuntimeError("CAS service error")),
}
FOR_GOOD = {
    "401": of_the_hub(401),
    "404": of_the_hub(404),
    "a large file that is refused": caused(RuntimeError("Error while uploading"), of_the_hub(403)),
    "a full disk": OSError(errno.ENOSPC, "No space left on device"),
    "no such file": FileNotFoundError("x"),
    "no permission": PermissionError("x"),
    "no token": errors.LocalTokenNotFoundError("none"),
    "offline": errors.OfflineModeIsEnabled("offline"),
    "a wrong certificate": caused(ConnectionError("failed"), ssl.SSLCertVerificationError("expired")),
    "given up": GaveUp("tried 8 times"),
    "our own bug": raised_in(retries, RuntimeError("x")),
    "our own other bug": ValueError("x"),
}


@pytest.mark.parametrize("name", MAY_PASS)
def test_what_may_pass(name):
    assert may_pass(MAY_PASS[name]) and trouble_of(MAY_PASS[name]).reason


@pytest.mark.parametrize("name", FOR_GOOD)
def test_what_is_for_good(name):
    assert not may_pass(FOR_GOOD[name])


def test_errors_that_cause_each_other_are_judged():
    one, other = ValueError("x"), KeyError("y")
    one.__cause__, other.__cause__ = other, one
    assert not may_pass(one)


class Failing:
    def __init__(self, times, error):
        self.times, self.error, self.calls = times, error, 0

    def __call__(self):
        self.calls += 1
        if self.calls <= self.times:
            raise self.error
        return "done"


@pytest.mark.parametrize("times", range(5))
def test_it_is_called_until_it_succeeds(times):
    call, waited, told = Failing(times, ConnectionResetError("gone")), [], []
    assert retried(call, wait=waited.append, what="the upload", tell=told.append) == "done"
    assert call.calls == times + 1 and tuple(waited) == WAITS[:times]
    assert told == ["the upload: gone; trying again, up to 4 times"][:times]  # one line, however often


def test_the_last_failure_is_raised():
    call, waited = Failing(5, of_the_hub(503)), []
    with pytest.raises(errors.HfHubHTTPError, match="503"):
        retried(call, wait=waited.append, what="the upload", tell=lambda line: None)
    assert call.calls == 5 and tuple(waited) == WAITS


def test_what_is_for_good_is_raised_at_once():
    call = Failing(1, of_the_hub(403))
    with pytest.raises(errors.HfHubHTTPError, match="403"):
        retried(call, wait=lambda seconds: pytest.fail("waited"), what="the upload", tell=pytest.fail)
    assert call.calls == 1


def test_a_wait_can_end_the_tries():
    call = Failing(2, ConnectionResetError("gone"))
    with pytest.raises(ConnectionResetError):
        retried(call, wait=lambda seconds: True, what="the upload", tell=lambda line: None)
    assert call.calls == 1


def test_a_success_starts_the_count_anew():
    waited, told = [], []
    tries = Tries((1.0, 2.0), what="it", wait=waited.append, tell=told.append)
    for _ in range(3):
        assert tries.again(ConnectionResetError("gone")) and tries.again(ConnectionResetError("gone"))
        tries.succeeded()
    assert waited == [1.0, 2.0] * 3 and len(told) == 3
    assert [tries.again(ConnectionResetError("gone")) for _ in range(3)] == [True, True, False]
    assert tries.failures == 3


def test_processes_do_not_come_back_together(monkeypatch):
    waited = []
    instead_of_sleep(monkeypatch, waited.append)
    for _ in range(50):
        sleep_about(10.0)
    assert len(set(waited)) > 40 and all(5 <= seconds <= 10 for seconds in waited)
