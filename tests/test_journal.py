"""Appended records are durable: after crashes at every byte, full disks, changed bytes and real kills. Real files."""

import errno
import inspect
import logging
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT
from fed_run import wait_until
from hypothesis import given, settings
from hypothesis import strategies as st

from wsft.errors import UserError
from wsft.rollouts import journal
from wsft.rollouts.journal import Journal, JournalDamaged

HEADER = 28
BODIES = {0: b"a" * 30, 2: b"b" * 28, 3: b"wsfJ" * 9, 7: bytes(range(60)), 8: b"e" * 41, 9: b"last" * 4}
SEGMENTS = {"000000000000.journal": [0, 2], "000000000003.journal": [3, 7], "000000000008.journal": [8, 9]}
FIRST, MIDDLE, LAST = SEGMENTS
LENGTH = {number: HEADER + len(body) for number, body in BODIES.items()}
START = {number: 0 if number == numbers[0] else LENGTH[numbers[0]] for numbers in SEGMENTS.values() for number in numbers}
NAME = {number: name for name, numbers in SEGMENTS.items() for number in numbers}


@pytest.fixture(autouse=True)
def small_segments(monkeypatch):
    monkeypatch.setattr(journal, "SEGMENT_BYTES", 75)  # two records of BODIES


@pytest.fixture
def folder(tmp_path):
    """A closed journal of BODIES in three SEGMENTS."""
    append_to(tmp_path / "journal", BODIES)
    return tmp_path / "journal"


def append_to(folder, bodies):
    opened = Journal(folder)
    for number, body in bodies.items():
        opened.append(number, body)
    return opened


def bodies_of(opened):
    return {number: opened.read(number) for number in opened.numbers}


def files_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def without(numbers):
    return {number: body for number, body in BODIES.items() if number not in numbers}


def flip(path, at, mask=0xFF):
    data = bytearray(path.read_bytes())
    data[at] ^= mask
    path.write_bytes(data)


# -- what was appended is there ---------------------------------------------------------------------------------------


def test_what_was_appended_is_read_back_before_and_after_reopening(tmp_path):
    first = append_to(tmp_path / "new" / "journal", BODIES)
    for opened in (first, Journal(first._folder), Journal(first._folder, read_only=True)):
        assert opened.numbers == list(BODIES) and bodies_of(opened) == BODIES and opened.torn == 0
        assert 7 in opened and 1 not in opened
        assert opened.size == sum(map(len, files_of(first._folder).values()))
        with pytest.raises(KeyError):
            opened.read(1)


def test_segments_begin_where_the_one_before_is_full(folder):
    sizes = {name: len(data) for name, data in files_of(folder).items()}
    assert sizes == {name: LENGTH[first] + LENGTH[second] for name, (first, second) in SEGMENTS.items()}


def test_appending_continues_after_reopening(tmp_path):
    for number, body in BODIES.items():
        Journal(tmp_path).append(number, body)
    assert bodies_of(Journal(tmp_path)) == BODIES
    assert list(files_of(tmp_path)) == list(SEGMENTS)


@pytest.mark.parametrize("number", [9, 8, 4, 0])
def test_numbers_ascend(folder, number):
    opened = Journal(folder)
    with pytest.raises(ValueError, match=rf"record {number} .* record 9"):
        opened.append(number, b"")
    assert bodies_of(Journal(folder)) == BODIES


def test_a_number_of_more_than_twelve_digits_keeps_its_place(tmp_path):
    bodies = {10**12 - 1: b"a" * 60, 10**12: b"b" * 60, 2**64 - 1: b"c"}
    append_to(tmp_path, bodies)
    assert bodies_of(Journal(tmp_path)) == bodies


def test_files_and_folder_are_the_users_alone_whatever_the_umask(tmp_path):
    before = os.umask(0)
    try:
        append_to(tmp_path / "journal", BODIES)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "journal").stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "journal").iterdir()} == {0o600}


def test_other_files_in_the_folder_are_let_alone(folder):
    for name in ("notes.txt", "8.journal", "000000000005.journal.bak", "copy of 000000000005.journal"):
        (folder / name).write_bytes(b"mine")
    before = files_of(folder)
    opened = Journal(folder)
    assert bodies_of(opened) == BODIES and files_of(folder) == before
    opened.prune(100)
    assert len(files_of(folder)) == 4


def test_a_folder_that_cannot_be_opened_is_an_error(tmp_path):
    (tmp_path / "journal").write_bytes(b"")
    with pytest.raises(UserError, match=r"journal .*/journal cannot be opened: .*File exists"):
        Journal(tmp_path / "journal")


# -- a torn end -------------------------------------------------------------------------------------------------------


def assert_only_the_last_is_lost(folder, caplog, lost):
    """Opening truncates the incomplete record and logs it once; read_only reads the same and changes nothing."""
    left, before = without([9]), files_of(folder)
    looked_at = Journal(folder, read_only=True)
    assert bodies_of(looked_at) == left and looked_at.torn == 0 and files_of(folder) == before
    caplog.clear()
    opened = Journal(folder)
    assert bodies_of(opened) == left and opened.torn == (1 if lost else 0)
    output = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(output) == opened.torn
    assert all(f"cut {lost} bytes off the end of {folder}/{LAST}: " in words and "is lost" in words for words in output)
    opened.append(9, BODIES[9])
    again = Journal(folder)
    assert bodies_of(again) == BODIES and again.torn == 0


def test_a_crash_at_any_byte_of_the_last_record_costs_that_record_alone(folder, caplog):
    for size in range(LENGTH[9]):
        os.truncate(folder / LAST, START[9] + size)
        assert_only_the_last_is_lost(folder, caplog, lost=size)


def test_a_crash_at_any_byte_of_the_first_record_of_a_segment_leaves_the_segments_before(folder):
    last = folder / LAST
    whole = last.read_bytes()
    for size in range(LENGTH[8]):
        last.write_bytes(whole[:size])
        assert Journal(folder, read_only=True).numbers == [0, 2, 3, 7] and last.exists()
        opened = Journal(folder)
        assert bodies_of(opened) == without([8, 9]) and opened.torn == (size > 0) and not last.exists()


@pytest.mark.parametrize("zeros", [1, HEADER, 5000])
def test_zeros_behind_the_last_record_are_cut_off(folder, caplog, zeros):
    os.truncate(folder / LAST, START[9])
    os.truncate(folder / LAST, START[9] + zeros)
    assert_only_the_last_is_lost(folder, caplog, lost=zeros)


@pytest.mark.parametrize("more", [0, 100])
def test_a_last_record_whose_pages_were_not_all_written_is_cut_off(folder, caplog, more):
    whole, size = (folder / LAST).read_bytes(), LENGTH[9]
    for cut in range(1, size):
        for written in (whole[START[9] :][:cut] + bytes(size - cut), bytes(cut) + whole[START[9] + cut :]):
            (folder / LAST).write_bytes(whole[: START[9]] + written + bytes(more))
            assert_only_the_last_is_lost(folder, caplog, lost=size + more)


def test_a_changed_byte_in_the_last_record_is_taken_for_a_torn_one(folder, caplog):
    for at in range(LENGTH[9]):
        flip(folder / LAST, START[9] + at)
        assert_only_the_last_is_lost(folder, caplog, lost=LENGTH[9])


def test_a_torn_body_may_hold_what_looks_like_a_record(tmp_path, folder):
    inner = (folder / FIRST).read_bytes()
    append_to(tmp_path / "outer", {0: b"first", 1: inner * 2})
    path = tmp_path / "outer" / FIRST
    os.truncate(path, path.stat().st_size - 1)
    assert bodies_of(Journal(tmp_path / "outer")) == {0: b"first"}


# -- damage -----------------------------------------------------------------------------------------------------------


def assert_damaged(folder, name, at):
    """Both ways of opening report file, byte and what to do, and leave every file unchanged."""
    before = files_of(folder)
    for read_only in (True, False):
        with pytest.raises(JournalDamaged, match=re.escape(f"{folder}/{name} is damaged at byte {at}: ")) as caught:
            Journal(folder, read_only)
        assert "--resume" in str(caught.value)
    assert files_of(folder) == before


@pytest.mark.parametrize("number", list(BODIES)[:-1])
def test_a_changed_byte_in_a_header_is_damage_and_swallows_nothing(folder, number):
    for at in range(START[number], START[number] + HEADER):
        for mask in (0x01, 0x80, 0xFF):
            flip(folder / NAME[number], at, mask)
            assert_damaged(folder, NAME[number], START[number])
            flip(folder / NAME[number], at, mask)


@pytest.mark.parametrize("number", list(BODIES)[:-1])
def test_a_changed_byte_in_a_body_is_found_by_reading_it_and_hides_no_other(folder, number):
    path, others = folder / NAME[number], without([number])
    for at in range(START[number] + HEADER, START[number] + LENGTH[number]):
        flip(path, at)
        opened = Journal(folder)
        assert opened.numbers == list(BODIES) and opened.torn == 0
        with pytest.raises(JournalDamaged, match=rf"{path} is damaged at byte {START[number]}: the body of record {number} "):
            opened.read(number)
        assert {n: opened.read(n) for n in others} == others
        flip(path, at)


@pytest.mark.parametrize("name", [FIRST, MIDDLE])
def test_a_segment_before_the_last_that_was_cut_short_is_damage(folder, name):
    second, whole = SEGMENTS[name][1], (folder / name).read_bytes()
    for size in range(len(whole)):
        (folder / name).write_bytes(whole[:size])
        if size != START[second]:  # cut between two records, it looks like a gap in the numbers
            assert_damaged(folder, name, START[second] if size > START[second] else 0)


def test_anything_behind_a_segment_before_the_last_is_damage(folder):
    with (folder / FIRST).open("ab") as file:
        file.write(bytes(100))
    assert_damaged(folder, FIRST, START[2] + LENGTH[2])


def test_a_torn_end_behind_a_changed_body_is_damage(folder):
    """One crash tears one record. Bytes that are missing in the middle must not pass for it."""
    data = (folder / LAST).read_bytes()
    (folder / LAST).write_bytes(data[: HEADER + 3] + data[HEADER + 4 :])
    assert_damaged(folder, LAST, 0)


def test_a_segment_under_another_ones_name_is_damage(folder):
    (folder / MIDDLE).rename(folder / "000000000004.journal")
    assert_damaged(folder, "000000000004.journal", 0)


def test_numbers_that_do_not_ascend_are_damage(folder):
    data = files_of(folder)
    (folder / LAST).write_bytes(data[LAST] * 2)
    assert_damaged(folder, LAST, START[9] + LENGTH[9])
    (folder / LAST).write_bytes(data[LAST] + data[FIRST])
    assert_damaged(folder, LAST, START[9] + LENGTH[9])


def test_a_segment_that_is_gone_or_short_after_opening_is_damage(folder):
    opened = Journal(folder)
    (folder / MIDDLE).unlink()
    os.truncate(folder / LAST, 30)
    for number in (3, 7, 8, 9):
        with pytest.raises(JournalDamaged, match=f"{NAME[number]} is damaged at byte {START[number]}: .* {number} "):
            opened.read(number)


# -- pruning ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("below", range(11))
@pytest.mark.parametrize("reopened", [False, True])
def test_pruning_deletes_the_segments_that_are_wholly_below(folder, below, reopened):
    opened = Journal(folder)
    opened.prune(below)
    kept = [name for name, numbers in SEGMENTS.items() if numbers[-1] >= below]
    held = {number: BODIES[number] for name in kept for number in SEGMENTS[name]}
    assert list(files_of(folder)) == kept and bodies_of(opened) == held
    assert opened.size == sum(map(len, files_of(folder).values()))
    opened = Journal(folder) if reopened else opened
    opened.append(10, b"more")
    opened.append(11, b"and more")
    assert bodies_of(opened) == bodies_of(Journal(folder)) == held | {10: b"more", 11: b"and more"}


def test_pruning_waits_for_the_append_under_way(tmp_path, monkeypatch):
    """A batch may arrive in its thread while a checkpoint prunes: its segment must not be deleted under it."""
    opened, under_way, on = append_to(tmp_path, {8: b""}), threading.Event(), threading.Event()

    def slow(file, sync=os.fsync):
        under_way.set()
        assert on.wait(60)
        sync(file)

    monkeypatch.setattr(os, "fsync", slow)
    appending, pruning = (threading.Thread(target=f, args=a) for f, a in ((opened.append, (9, b"x")), (opened.prune, (9,))))
    appending.start()
    assert under_way.wait(60)
    pruning.start()
    pruning.join(0.05)
    on.set()
    appending.join(60)
    pruning.join(60)
    assert bodies_of(opened) == bodies_of(Journal(tmp_path)) == {8: b"", 9: b"x"}


@settings(deadline=None, max_examples=40)
@given(
    ops=st.lists(
        st.one_of(
            st.tuples(st.just("append"), st.integers(1, 3), st.binary(max_size=90)),
            st.tuples(st.just("prune"), st.integers(-6, 2), st.just(b"")),
            st.tuples(st.just("tear"), st.integers(1, 40), st.binary(max_size=90)),
            st.tuples(st.just("open"), st.just(0), st.just(b"")),
        ),
        max_size=25,
    )
)
def test_any_course_of_appends_prunes_crashes_and_restarts_keeps_what_is_held(tmp_path_factory, ops):
    folder = tmp_path_factory.mktemp("journal")
    opened, held, number = Journal(folder), {}, 0
    for op, amount, body in ops:
        if op == "prune":
            opened.prune(number + amount)
            assert all(n in opened for n in held if n >= number + amount)
            held = {n: body for n, body in held.items() if n in opened}
        elif op == "open":
            opened = Journal(folder)
            assert opened.torn == 0
        else:
            number += min(amount, 3)
            opened.append(number, body)
            held[number] = body
        if op == "tear":
            last = max(folder.iterdir())
            os.truncate(last, last.stat().st_size - min(amount, HEADER + len(body)))
            opened = Journal(folder)
            assert opened.torn == (amount < HEADER + len(body))
            del held[number]
        assert opened.numbers == list(held) and bodies_of(opened) == held
    assert bodies_of(Journal(folder)) == held
    shutil.rmtree(folder)


# -- reading another run's --------------------------------------------------------------------------------------------


def test_read_only_makes_no_folder(tmp_path):
    opened = Journal(tmp_path / "missing", read_only=True)
    assert opened.numbers == [] and opened.size == 0 and 0 not in opened and not (tmp_path / "missing").exists()
    opened.prune(5)


def test_read_only_leaves_an_empty_segment(folder):
    (folder / "000000000010.journal").touch()
    assert bodies_of(Journal(folder, read_only=True)) == BODIES
    assert (folder / "000000000010.journal").exists()
    opened = Journal(folder)
    assert bodies_of(opened) == BODIES and opened.torn == 0 and not (folder / "000000000010.journal").exists()


# -- a disk that refuses ----------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs to be root and to mount a file system, to fill it")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.mark.parametrize("segment_bytes", [0, 10**6])
def test_a_full_disk_costs_one_batch_and_appending_continues_when_there_is_space(small_disk, segment_bytes, monkeypatch):
    monkeypatch.setattr(journal, "SEGMENT_BYTES", segment_bytes)
    (small_disk / "ballast").write_bytes(bytes(16384))
    folder = small_disk / "journal"
    opened = append_to(folder, {0: b"a" * 20_000})
    before = files_of(folder)
    for _ in range(2):
        with pytest.raises(UserError) as caught:
            opened.append(1, b"b" * 40_000)
        words = str(caught.value)
        for part in (f"{folder}/0000", "No space left on device", "just fetched is lost", "before it are whole", "--resume"):
            assert part in words
        assert files_of(folder) == before and opened.numbers == [0]
    assert bodies_of(Journal(folder)) == {0: b"a" * 20_000}
    (small_disk / "ballast").unlink()
    opened.append(1, b"c" * 30_000)
    assert bodies_of(opened) == bodies_of(Journal(folder)) == {0: b"a" * 20_000, 1: b"c" * 30_000}


def test_a_full_disk_that_holds_nothing_yet(small_disk):
    (small_disk / "ballast").write_bytes(bytes(49_152))
    opened = Journal(small_disk / "journal")
    with pytest.raises(UserError, match=r"000000000004\.journal cannot be written .*No space left"):
        opened.append(4, b"b" * 40_000)
    assert files_of(small_disk / "journal") == {}
    opened.append(4, b"small")
    assert bodies_of(Journal(small_disk / "journal")) == {4: b"small"}


@pytest.mark.parametrize("held, sync_that_fails", [(5, 1), (4, 1), (4, 2)], ids=["segment", "new segment", "its name"])
def test_a_disk_that_fails_to_sync_leaves_no_record_behind(tmp_path, held, sync_that_fails, monkeypatch):
    """With four records, the next begins a segment. No file system here fails so on request."""
    folder, bodies = tmp_path / "journal", dict(list(BODIES.items())[:held])
    opened, sync, calls = append_to(folder, bodies), os.fsync, []

    def failing(file):
        calls.append(file)
        if len(calls) == sync_that_fails:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(file)

    before = files_of(folder)
    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(UserError, match="Input/output error"):
        opened.append(9, b"x" * 50)
    monkeypatch.setattr(os, "fsync", sync)
    assert files_of(folder) == before and bodies_of(opened) == bodies
    opened.append(9, b"y" * 10)
    assert bodies_of(opened) == bodies_of(Journal(folder)) == bodies | {9: b"y" * 10}


def test_a_record_that_could_not_be_taken_back_is_written_over(folder, monkeypatch):
    def failing(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    opened = Journal(folder)
    opened.prune(10)
    opened.append(10, b"first")
    with monkeypatch.context() as patch:
        patch.setattr(os, "truncate", failing)
        patch.setattr(os, "fsync", failing)
        with pytest.raises(UserError, match="Input/output error"):
            opened.append(11, b"x" * 50)
    opened.append(12, b"y" * 10)
    reopened = Journal(folder)
    assert bodies_of(opened) == bodies_of(reopened) == {10: b"first", 12: b"y" * 10} and reopened.torn == 1


def test_room_is_required_before_a_fetch(small_disk):
    opened = Journal(small_disk / "journal")
    opened.require_room(65536)
    with pytest.raises(UserError, match=r"0\.1 MiB free .* 3\.0 MiB.* not fetched: make room and start with --resume"):
        opened.require_room(3 * 2**20)


# -- real kills -------------------------------------------------------------------------------------------------------


def body_of(number):
    return b"%d " % number * (number * 104_729 % 500_000)


CHILD = f"""
import sys
from pathlib import Path
from wsft.rollouts import journal
{inspect.getsource(body_of)}
journal.SEGMENT_BYTES = 2**22
print("ready", flush=True)
sys.stdin.readline() or sys.exit()
opened = journal.Journal(Path(sys.argv[1]))
number = max(opened.numbers, default=-1)
while True:
    number += 1
    opened.append(number, body_of(number))
    print(number, flush=True)
    if number % 10 == 9:
        opened.prune(number - 20)
"""


def test_what_was_acknowledged_survives_a_kill_at_any_moment(tmp_path):
    dice, folder, acknowledged = random.Random(0), tmp_path / "journal", -1
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, folder], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(20)
    ]
    try:
        for child in children:
            assert child.stdout.readline() == "ready\n"
        for child in children:
            child.stdin.write("go\n")
            child.stdin.flush()
            if child is children[-1]:
                wait_until(lambda: len(Journal(folder, read_only=True).numbers) > 0)
            time.sleep(dice.random() * 0.1)
            child.send_signal(signal.SIGKILL)
            printed = child.communicate()[0].splitlines()
            acknowledged = int(printed[-1]) if printed else acknowledged
            opened = Journal(folder)
            newest = max(opened.numbers, default=-1)
            # one more than it reported may be durable, if it was killed just before reporting
            assert newest - acknowledged in ([0] if opened.torn else [0, 1])
            assert opened.numbers == list(range(min(opened.numbers, default=0), newest + 1))
            assert all(opened.read(number) == body_of(number) for number in opened.numbers)
            assert min(opened.numbers, default=0) <= max(0, acknowledged - 20)
            acknowledged = newest
    finally:
        for child in children:
            child.kill()
            child.communicate()
    assert acknowledged > 0, "the children wrote nothing"
