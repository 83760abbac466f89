"""Does what is under way survive its process?"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.journal import (
    HEAD_BYTES,
    INTENT_AT,
    MAX_INTENT,
    MAX_OUTCOME,
    OUTCOME_AT,
    SLOT_BYTES,
    CannotJournal,
    Found,
    Journal,
    JournalFull,
    Progress,
    adopt,
    create,
)

OWNER = b"o" * 32


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return create(tmp_path, OWNER, 8)


def crashed(journal: Journal) -> Journal:
    """The same file, as the next process finds it."""
    journal.shut()
    (found,), _ = adopt(journal.path.parent, OWNER)
    return found


def test_an_intent_is_found_with_the_progress_noted_last(journal: Journal) -> None:
    slot = journal.open(b"who and what")
    journal.note(slot, 10, 0, 1000)
    journal.note(slot, 10, 7, 2000)

    assert list(crashed(journal).found()) == [Found(slot, b"who and what", Progress(10, 7, 2000))]


def test_what_came_of_it_takes_the_place_of_the_intent(journal: Journal) -> None:
    slot = journal.open(b"intent")
    journal.note(slot, 1, 2, 3)
    journal.close(slot, b"outcome")

    assert list(crashed(journal).found()) == [Found(slot, b"outcome", None)]


def test_what_is_freed_is_gone_and_its_slot_is_the_next_to_be_used(journal: Journal) -> None:
    slots = [journal.open(b"x") for _ in range(8)]
    assert (slots, journal.room) == (list(range(8)), 0)
    with pytest.raises(JournalFull):
        journal.open(b"x")

    journal.free(5)
    journal.free(2)

    assert journal.room == 2
    assert [journal.open(b"new"), journal.open(b"newer")] == [2, 5]
    assert journal.room == 0


def test_a_slot_used_again_has_nothing_of_what_was_in_it(journal: Journal) -> None:
    slot = journal.open(b"a long intent of somebody else")
    journal.note(slot, 9, 9, 9)
    journal.close(slot, b"and what came of it")
    journal.free(slot)
    assert journal.open(b"mine") == slot

    assert list(crashed(journal).found()) == [Found(slot, b"mine", Progress(0, 0, 0))]


@given(intent=st.binary(min_size=1, max_size=MAX_INTENT), outcome=st.binary(min_size=1, max_size=MAX_OUTCOME))
def test_every_size_fits_beside_the_other(
    intent: bytes, outcome: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    journal = create(tmp_path_factory.mktemp("journal"), OWNER, 2)
    journal.open(b"below")
    slot = journal.open(intent)
    assert next(found for found in journal.found() if found.slot == slot).wire == intent
    journal.close(slot, outcome)

    found = list(journal.found())
    journal.shut(remove=True)

    assert [each.wire for each in found] == [b"below", outcome]


def test_half_an_outcome_does_not_count(journal: Journal) -> None:
    slot = journal.open(b"intent")
    journal.close(slot, b"outcome")
    path = journal.path
    journal.shut()
    with path.open("r+b") as file:
        file.seek(HEAD_BYTES + OUTCOME_AT)
        file.write(b"????")

    (found,), _ = adopt(path.parent, OWNER)

    assert list(found.found()) == [Found(slot, b"intent", Progress(0, 0, 0))]


def test_the_journal_of_a_living_process_is_left_alone(tmp_path: Path) -> None:
    create(tmp_path, OWNER, 8)
    code = (
        f"from pathlib import Path; from gateway.journal import adopt; print(adopt(Path({str(tmp_path)!r}), b'o' * 32))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "([], {})\n"


def test_a_journal_for_another_database_is_left_alone_and_named(journal: Journal) -> None:
    journal.shut()

    assert adopt(journal.path.parent, b"x" * 32) == ([], {journal.path: "holds records for another database"})


NO_JOURNAL = "is damaged, or no journal that we know"


@pytest.mark.parametrize("content", [b"", b"notes", b"\0" * (HEAD_BYTES + SLOT_BYTES)])
def test_what_is_no_journal_is_named_and_not_touched(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "other.journal"
    path.write_bytes(content)

    assert adopt(tmp_path, OWNER) == ([], {path: NO_JOURNAL})
    assert path.read_bytes() == content


def test_what_cannot_be_opened_as_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder.journal").mkdir()

    with pytest.raises(CannotJournal, match=r"folder\.journal: Is a directory"):
        adopt(tmp_path, OWNER)


def test_a_journal_that_was_cut_short_is_not_mapped(journal: Journal) -> None:
    journal.shut()
    os.truncate(journal.path, HEAD_BYTES + 3 * SLOT_BYTES)

    assert adopt(journal.path.parent, OWNER) == ([], {journal.path: NO_JOURNAL})


def test_a_slot_that_cannot_be_read_is_told_of_and_the_others_are_there(journal: Journal) -> None:
    broken, sound = journal.open(b"scrambled"), journal.open(b"sound")
    journal.shut()
    with journal.path.open("r+b") as file:
        file.seek(HEAD_BYTES + broken * SLOT_BYTES + INTENT_AT)
        file.write(b"?")

    (found,), _ = adopt(journal.path.parent, OWNER)

    assert [(left.slot, left.wire) for left in found.found()] == [(broken, b""), (sound, b"sound")]


def test_all_of_its_room_is_taken_from_the_disk_at_once(journal: Journal) -> None:
    assert journal.path.stat().st_blocks * 512 >= HEAD_BYTES + 8 * SLOT_BYTES


def test_a_disk_without_room_is_found_out_before_anything_begins(tmp_path: Path) -> None:
    code = f"""
import resource, signal
from pathlib import Path
from gateway.journal import create, CannotJournal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    create(Path({str(tmp_path)!r}), b"o" * 32, 8)
except CannotJournal as exc:
    print(exc)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == f"{tmp_path}: no room for 0 MiB of journal: File too large\n"
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CannotJournal, match="file/journal: "):
        create(tmp_path / "file" / "journal", OWNER, 8)
