"""Leases of a device between real processes, each told step by step what to do; and where a sweep takes them."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from pruning.device_sharing import yield_device
from search.trial.lease import Lease, lease_of  # no torch: the processes start faster without


def serve(folder: Path, pipe: Any) -> None:
    """Runs in a process: takes orders, and answers each when it is done."""
    lease = Lease(folder, "device")
    held: list[ExitStack] = []
    for order in iter(pipe.recv, "end"):
        if order == "leave":
            held.pop().close()
        elif order == "give way":
            yield_device()
        else:
            held.append(ExitStack())
            held[-1].enter_context(getattr(lease, order)())
        pipe.send("done")


class Process:
    def __init__(self, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(folder, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, order: str) -> None:
        self.pipe.send(order)

    def answers(self) -> bool:
        """Tells whether it did the eldest order that it has not answered yet."""
        return self.pipe.poll(30) and self.pipe.recv() == "done"

    def does(self, order: str) -> bool:
        self.ask(order)
        return self.answers()

    def waits(self) -> bool:
        """Tells whether it waits for a lock, as the kernel says; False once it has answered."""
        while not self.pipe.poll(0.005):
            lines = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
            if any(words[1:3] == ["->", "FLOCK"] and words[5] == str(self.process.pid) for words in lines):
                return True
        return False

    def kill(self) -> None:
        self.process.kill()  # SIGKILL
        self.process.join()
        self.pipe.close()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[], Process]]:
    """Starts a process; all of them share one device."""
    started: list[Process] = []

    def start() -> Process:
        started.append(Process(tmp_path / "leases"))
        return started[-1]

    yield start
    for process in started:
        process.kill()


def state(folder: Path, name: str = "device", part: str = "body") -> str:
    """Tells how a device is held now, by any process."""
    with open(folder / f"{name}.{part}", "ab") as file:
        for kind, meaning in ((fcntl.LOCK_EX, "free"), (fcntl.LOCK_SH, "shared")):
            try:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            return meaning
    return "exclusive"


def test_readers_share_the_device(start: Callable[[], Process], tmp_path: Path) -> None:
    assert start().does("shared")
    assert start().does("shared")
    assert state(tmp_path / "leases") == "shared"


@pytest.mark.parametrize("kind", ["shared", "exclusive"])
def test_a_writer_has_the_device_alone_until_it_leaves(kind: str, start: Callable[[], Process]) -> None:
    writer, other = start(), start()
    assert writer.does("exclusive")
    other.ask(kind)
    assert other.waits()
    assert writer.does("leave")
    assert other.answers()


def test_a_reader_that_comes_after_a_waiting_writer_goes_after_it(start: Callable[[], Process]) -> None:
    early, writer, late = start(), start(), start()
    assert early.does("shared")
    writer.ask("exclusive")
    assert writer.waits()
    late.ask("shared")
    assert late.waits()
    assert early.does("leave")
    assert writer.answers()
    assert late.waits()
    assert writer.does("leave")
    assert late.answers()


def test_give_way_lets_a_waiting_writer_in_and_returns_after_it(start: Callable[[], Process]) -> None:
    readers, writer = [start(), start()], start()
    assert all(reader.does("shared") for reader in readers)
    writer.ask("exclusive")
    assert writer.waits()
    readers[0].ask("give way")
    assert readers[0].waits()
    assert writer.waits()  # for the other
    readers[1].ask("give way")
    assert writer.answers()
    assert all(reader.waits() for reader in readers)
    assert writer.does("leave")
    assert all(reader.answers() for reader in readers)
    writer.ask("exclusive")
    assert writer.waits()  # both have it again


def test_give_way_keeps_the_lease_if_nobody_waits(start: Callable[[], Process], tmp_path: Path) -> None:
    reader, writer = start(), start()
    assert reader.does("shared")
    assert reader.does("give way")
    assert state(tmp_path / "leases") == "shared"
    writer.ask("exclusive")
    assert writer.waits()
    assert reader.does("leave")
    assert writer.answers()


@pytest.mark.parametrize("kind", ["shared", "exclusive"])
def test_a_killed_holder_frees_the_device(kind: str, start: Callable[[], Process]) -> None:
    holder, writer = start(), start()
    assert holder.does(kind)
    writer.ask("exclusive")
    assert writer.waits()
    holder.kill()
    assert writer.answers()


def test_a_writer_that_is_killed_while_it_waits_lets_readers_pass(start: Callable[[], Process]) -> None:
    reader, writer, late = start(), start(), start()
    assert reader.does("shared")
    writer.ask("exclusive")
    assert writer.waits()
    late.ask("shared")
    assert late.waits()
    writer.kill()
    assert late.answers()
    assert reader.does("give way")


def test_a_process_never_waits_for_itself(start: Callable[[], Process], tmp_path: Path) -> None:
    process = start()
    orders = ["shared", "shared", "exclusive", "exclusive", "shared", "give way"]
    assert all(process.does(order) for order in orders)
    assert state(tmp_path / "leases", part="gate") == "exclusive"
    states = [state(tmp_path / "leases")]
    for _ in range(5):
        assert process.does("leave")
        states.append(state(tmp_path / "leases"))
    assert states == ["exclusive"] * 3 + ["shared"] * 2 + ["free"]


def test_two_readers_that_both_want_the_device_alone_have_it_in_turn(start: Callable[[], Process]) -> None:
    first, second = start(), start()
    assert first.does("shared") and second.does("shared")
    first.ask("exclusive")
    assert first.waits()
    second.ask("exclusive")
    assert first.answers()
    assert second.waits()
    for _ in range(2):  # back to the shared lease, and out
        first.ask("leave")
    assert second.answers()
    for _ in range(2):
        second.ask("leave")
    assert all(process.answers() for process in (first, second) for _ in range(2))


def test_the_device_has_done_its_work_before_it_is_let_go(tmp_path: Path) -> None:
    seen: list[str] = []
    lease = Lease(tmp_path, "device", lambda: seen.append(state(tmp_path)))
    with lease.shared(), lease.exclusive():
        assert seen == ["shared"]
    assert seen == ["shared", "exclusive", "shared"]
    assert state(tmp_path) == "free"


def test_a_device_that_broke_is_let_go(tmp_path: Path) -> None:
    def broken() -> None:
        raise RuntimeError("device-side assert")

    lease = Lease(tmp_path, "device", broken)
    with pytest.raises(RuntimeError, match="assert"), lease.shared():
        pass
    assert state(tmp_path) == "free"


def test_another_device_is_another_lease(tmp_path: Path) -> None:
    with Lease(tmp_path, "one").exclusive(), Lease(tmp_path, "two").exclusive():
        assert state(tmp_path, "one") == state(tmp_path, "two") == "exclusive"


def test_the_files_may_be_removed_at_any_time(tmp_path: Path) -> None:
    lease = Lease(tmp_path / "leases", "device")
    for _ in range(2):
        with lease.shared():
            assert state(tmp_path / "leases") == "shared"
            for path in (tmp_path / "leases").iterdir():
                path.unlink()
        (tmp_path / "leases").rmdir()


def test_without_locks_work_goes_on_and_one_warning_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    lease = Lease(tmp_path / "file", "device")
    held = ExitStack()
    with pytest.warns(RuntimeWarning, match="VITFRONT_LEASES"):
        held.enter_context(lease.shared())
    with held, lease.exclusive():  # warnings are errors: a second would raise
        yield_device()
    with lease.shared():
        yield_device()


@pytest.mark.skipif(os.getuid() != 0, reason="gives a folder to another user")
def test_a_folder_of_another_user_is_not_trusted(tmp_path: Path) -> None:
    os.chown(tmp_path, 12345, -1)
    with pytest.warns(RuntimeWarning, match="another user"), Lease(tmp_path, "device").shared():
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_process_has_one_lease_of_a_device_in_the_folder_that_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VITFRONT_LEASES", str(tmp_path))
    lease = lease_of("device", lambda: None)
    assert lease_of("device", lambda: None) is lease
    assert lease_of("other", lambda: None) is not lease
    with lease.exclusive():
        assert state(tmp_path) == "exclusive"


# Where a sweep takes them. torch is imported within, so that the processes above do without.


@pytest.fixture
def leases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VITFRONT_LEASES", str(tmp_path))
    return tmp_path


def watch(model: Any, leases: Path) -> set[str]:
    """Collects how the CPU is held whenever the model runs."""
    seen: set[str] = set()
    model.register_forward_pre_hook(lambda *_: seen.add(state(leases, "cpu")))
    return seen


def test_models_are_timed_alone_and_all_else_is_shared(leases: Path) -> None:
    from pruning.model.anatomy import examine
    from pruning.model.surgery import keep_all_plan
    from search.trial.jobs import LOOK, Job, Looked, Rebuild, Workplace, run_job
    from search.trial.measure import measure
    from search.trial.prepare import Step
    from tests.search_tests import tiny
    from tests.search_tests.cluster.stores import DictStore

    def timer(dense: Any, models: list[Any], batch: Any, **options: Any) -> Any:
        for model in (dense, *models):
            model(batch)
        return tiny.timer(dense, models, batch, **options)

    config = tiny.config()
    inputs = tiny.inputs(config)
    workplace = Workplace(config=config, inputs=inputs, products={}, jobs=DictStore(), timer=timer)

    def do(job: Job) -> Any:
        with workplace.lease.shared():  # as a worker does
            workplace.products[job.id] = run_job(job, workplace)
        return workplace.products.get(job.id)

    in_preparation = watch(inputs.model.blocks[1], leases)
    looked = do(Job(id=LOOK, kind="look"))
    assert isinstance(looked, Looked) and looked.dense is not None
    do(Job(id="sensitivity-3", kind="step", subject=Step(kind="sensitivity", subject=3)))
    assert in_preparation == {"shared", "exclusive"}
    context = workplace.context()
    while_timed = watch(context.model, leases)
    other = tiny.model(1).eval()
    seen = watch(other, leases)
    plan = keep_all_plan(examine(other))
    with context.lease.shared():
        measure(context, other, plan)
    assert while_timed == {"exclusive"}
    assert seen == {"shared", "exclusive"}
    do(Job(id="timing", kind="time", needs=(LOOK,), subject=([plan], 6)))
    assert while_timed == {"exclusive"}
    in_preparation.clear()
    order = Rebuild(plan=plan, measured=looked.dense)
    do(Job(id="rebuild-dense", kind="rebuild", needs=(LOOK, "sensitivity-3"), subject=order))
    assert in_preparation == {"shared"}  # its speed is known
    assert state(leases, "cpu") == "free"


def test_a_loop_over_batches_lets_a_waiting_writer_in(leases: Path) -> None:
    from pruning.measure.accuracy import predict
    from tests.search_tests import tiny

    lease, writer = Lease(leases, "device"), Process(leases)
    with lease.shared():
        writer.ask("exclusive")
        writer.ask("leave")
        assert writer.waits()
        predict(tiny.model(), tiny.images(4), batch_size=2)
        assert writer.answers() and writer.answers()
        assert state(leases) == "shared"
    writer.kill()
