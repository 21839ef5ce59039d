import json
import signal
import threading

import pytest

from perturbdiff.training import signals as interrupt
from perturbdiff.training.run_folder import stoppable
from perturbdiff.training.signals import ECHO, SIGNALS, Stopped, StopRequest


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when told."""
    now = [1000.0]
    monkeypatch.setattr(interrupt.time, "monotonic", lambda: now[0])
    return now


def handlers():
    return [signal.getsignal(signal.Signals[name]) for name in SIGNALS]


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_asks_to_stop_and_interrupts_nothing(name):
    with StopRequest() as stop:
        assert stop.signal_name is None
        signal.raise_signal(signal.Signals[name])
        assert stop.signal_name == name


@pytest.mark.parametrize("second", ["SIGTERM", "SIGUSR1"])
def test_the_first_signal_names_the_reason_and_those_after_it_do_nothing(clock, second):
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGUSR1)
        clock[0] += 100 * ECHO
        signal.raise_signal(signal.Signals[second])
        assert stop.signal_name == "SIGUSR1"


@pytest.mark.parametrize("first", SIGNALS)
def test_a_ctrl_c_that_the_launcher_passes_on_is_an_echo_and_one_later_interrupts(clock, first):
    with StopRequest() as stop:
        signal.raise_signal(signal.Signals[first])
        for _ in range(2):
            clock[0] += ECHO / 2
            signal.raise_signal(signal.SIGINT)
        clock[0] += 0.01
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert stop.signal_name == first


def test_handlers_are_those_of_before_afterwards_also_after_an_error():
    before = handlers()

    def fail():
        with StopRequest():
            assert all(handler not in before for handler in handlers())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert handlers() == before


def test_handlers_of_others_are_restored():
    seen = []
    previous = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGUSR1)
        assert (stop.signal_name, seen) == ("SIGUSR1", [])
        signal.raise_signal(signal.SIGUSR1)
        assert seen == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, previous)


def test_outside_the_main_thread_no_handler_is_set():
    """There Python refuses it; training in a thread goes without."""
    before, failed = handlers(), []

    def work():
        try:
            with StopRequest() as stop:
                assert stop.signal_name is None
                assert handlers() == before
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert failed == []


def test_what_was_asked_before_is_asked_of_one_that_is_entered_later():
    with StopRequest():
        signal.raise_signal(signal.SIGUSR1)
        with StopRequest() as stop:
            assert stop.signal_name == "SIGUSR1"
    with StopRequest() as stop:
        assert stop.signal_name is None


def raised_within(out, name, early):
    """A signal that comes before, or while, what has nothing to save is done."""
    number = signal.Signals[name]
    with StopRequest():
        if early:
            signal.raise_signal(number)
        with stoppable(out):
            assert not early
            signal.raise_signal(number)
            raise AssertionError("the signal ends it")


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_where_nothing_is_to_be_saved_a_signal_ends_in_order_and_leaves_the_marker(tmp_path, capsys, name, early):
    before = handlers()
    (tmp_path / "run" / "states" / "step_00000012").mkdir(parents=True)
    with pytest.raises(Stopped) as stopped:
        raised_within(tmp_path / "run", name, early)
    assert stopped.value.code is None  # status 0
    assert json.loads((tmp_path / "run" / "stopped.json").read_text()) == {"stopped_by": name, "step": 12}
    assert f"stopped     by {name} outside of training; the same command goes on\n" in capsys.readouterr().out
    assert handlers() == before


@pytest.mark.parametrize("early", [True, False])
def test_a_ctrl_c_interrupts_what_has_nothing_to_save(tmp_path, early):
    before = handlers()
    with pytest.raises(KeyboardInterrupt):
        raised_within(tmp_path / "run", "SIGINT", early)
    assert list(tmp_path.iterdir()) == []
    assert handlers() == before


def test_signals_after_the_one_that_ends_it_do_not_disturb_the_end(tmp_path):
    done = []

    def end():
        try:
            with stoppable(tmp_path):
                try:
                    signal.raise_signal(signal.SIGUSR1)
                finally:
                    signal.raise_signal(signal.SIGTERM)
                    done.append(True)
        finally:
            done.append(True)

    with pytest.raises(Stopped):
        end()
    assert done == [True, True]
