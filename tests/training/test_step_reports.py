"""What steps report, and when it is read."""

import pytest
import torch

from eit.data.workers import STOP_SIGNALS
from eit.training.step_reports import StepReport, StepReports, from_host, share_step

CPU = torch.device("cpu")
NUMBERS = [0.25, 3.0, 1024.0, 5.0, 1.0, 0.0, 0.0, 1.0, 0.0]


def numbers(loss):
    return torch.tensor([loss, *NUMBERS[1:]])


def report(step, loss):
    return StepReport(step, loss, 3.0, 1024.0, 5.0, 1.0, 0.0, (0.0, 1.0, 0.0))


def test_what_a_rank_shares_comes_back_under_its_name():
    shared = share_step(
        *torch.tensor([0.25, 3.0, 1024.0]),
        unreadable_images=5,
        writer_failed=True,
        save_is_due=False,
        signals=[float(signum == STOP_SIGNALS[1]) for signum in STOP_SIGNALS],
    )
    assert shared.tolist() == NUMBERS
    found = StepReports(immediate=True).add(7, shared)
    assert found == report(7, 0.25)
    assert (found.step, found.loss, found.gradient_norm, found.loss_scale) == (7, 0.25, 3.0, 1024.0)
    assert (found.unreadable_images, found.writer_failed, found.save_is_due) == (5.0, 1.0, 0.0)
    assert dict(zip(STOP_SIGNALS, found.signals, strict=True)) == dict(zip(STOP_SIGNALS, (0, 1, 0), strict=True))


def test_a_report_is_read_when_the_next_step_reports_and_the_last_one_when_asked():
    reports = StepReports(immediate=False)
    assert reports.flush() is None
    assert reports.add(4, numbers(1.0)) is None
    assert reports.add(5, numbers(2.0)) == report(4, 1.0)
    assert reports.flush() == report(5, 2.0)
    assert reports.flush() is None  # once each


def test_a_report_is_read_in_its_own_step_where_an_update_cannot_be_skipped():
    reports = StepReports(immediate=True)
    for step in range(2):
        assert reports.add(step, numbers(0.5)) == report(step, 0.5)
    assert reports.flush() is None


@pytest.mark.parametrize("immediate", [True, False])
def test_what_a_report_makes_the_caller_raise_ends_the_step_that_reads_it_and_is_raised_once(immediate):
    def handle_report(report):
        if report is not None:
            raise FloatingPointError(report.step)

    reports = StepReports(immediate)
    with pytest.raises(FloatingPointError, match="7"):
        handle_report(reports.add(7, numbers(0.0)))
        handle_report(reports.add(8, numbers(0.0)))
        pytest.fail("it went on")
    assert reports.flush() == (None if immediate else report(8, 0.0))


def test_numbers_of_the_device_are_read_when_their_copy_has_arrived(monkeypatch):
    """Not before, and nothing else is waited for."""
    happened = []

    class OnGpu:
        """Stands for a tensor on CUDA."""

        device, shape, dtype = torch.device("cuda"), (9,), torch.float32

    class Pinned:
        def copy_(self, source, non_blocking):
            happened.append(("copy", non_blocking))

        def tolist(self):
            happened.append("read")
            return NUMBERS

    class Event:
        def record(self):
            happened.append("record")

        def synchronize(self):
            happened.append("wait")

    monkeypatch.setattr(torch, "empty", lambda shape, dtype, pin_memory: Pinned() if pin_memory else None)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    reports = StepReports(immediate=False)
    assert reports.add(0, OnGpu()) is None
    assert happened == [("copy", True), "record"]
    assert reports.flush() == report(0, 0.25)
    assert happened[2:] == ["wait", "read"]


def test_numbers_of_the_host_are_the_same_on_the_device():
    numbers = from_host([1, True, 0.0], CPU)
    assert numbers.dtype == torch.float32 and numbers.tolist() == [1, 1, 0]
