import signal

import pytest

from k2train.checkpoint import SaveError
from k2train.train import faults as module
from k2train.train.faults import PatientSaver, StopRequest

FULL = SaveError("the checkpoint was not saved: the disk is full")


class Disk:
    """A Saver whose writing, as told, works or not; what fails is known at the next ``wait`` or ``check``."""

    def __init__(self, *works: bool) -> None:
        self.works, self.saved, self.error, self.tries = list(works), 0, None, 0

    def save(self) -> None:
        self.wait()
        self.tries += 1
        works = self.works.pop(0) if self.works else False
        self.saved += works
        self.error = None if works else FULL

    def wait(self) -> None:
        error, self.error = self.error, None
        if error:
            raise error

    check = wait


@pytest.fixture
def told():
    return []


def patient(disk, told, *, every=5, within=0.0) -> PatientSaver:
    return PatientSaver(disk, save=disk.save, every=every, within=within, say=told.append)


def test_a_disk_that_refuses_is_told_and_tried_again(told):
    disk = Disk(False, False, True)
    saver = patient(disk, told)
    saver.save(5)
    saver.check(6)
    assert told == [f"{FULL}; the run goes on, and saves again at step 10"]
    saver.save(10)
    saver.save(15)  # the failure before is found only here, and does not keep this one from being written
    assert told[1:] == [f"{FULL}; the run goes on, and saves again at step 20"]
    saver.check(16)
    assert (disk.saved, len(told)) == (1, 2)


def test_the_last_save_is_tried_for_a_while(told, monkeypatch):
    pauses = []
    monkeypatch.setattr(module.time, "sleep", pauses.append)
    disk = Disk(False, False, True)
    patient(disk, told, within=30).save_last()
    assert (disk.saved, pauses) == (1, [10, 10])
    assert told[0] == f"{FULL}; trying again every 10 s, 3 times at most"
    disk = Disk()
    with pytest.raises(SaveError, match="the disk is full"):
        patient(disk, told, within=30).save_last()
    assert disk.tries == 4


def test_who_is_asked_to_stop_has_no_time_to_wait(told):
    stopped = patient(Disk(True), told).stop(signal.SIGTERM, 7)
    assert (stopped.status, stopped.told) == (143, True)
    assert told.pop() == "stopped by SIGTERM after step 7, which is saved: the same command goes on from there"
    disk = Disk(False)
    assert patient(disk, told, within=100).stop(signal.SIGUSR1, 7).status == 75
    assert disk.tries == 1
    assert told == [f"stopped by SIGUSR1 after step 7. {FULL}; the same command goes on from the one before"]


def test_a_signal_is_answered_after_the_step_in_which_it_was_asked_for():
    received = [0]
    stop = StopRequest(lambda: received[0])
    assert stop.answer() == 0
    stop.ask()
    received[0] = signal.SIGTERM  # comes during the update: the next step's question
    assert stop.answer() == 0
    stop.ask()
    assert stop.answer() == signal.SIGTERM
