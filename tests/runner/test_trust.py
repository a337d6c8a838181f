"""Whose compiled programs are run: the rule for directories, the files in them and the directories above."""

from __future__ import annotations

import os
import pathlib

import pytest

from jaxserve.programs.aot import trust
from jaxserve.programs.aot.trust import UntrustedError, check_directory, read_own


@pytest.fixture
def directory(tmp_path: pathlib.Path) -> pathlib.Path:
    found = tmp_path / "above" / "own"
    found.mkdir(parents=True, mode=0o755)
    (found / "file").write_bytes(b"x")
    (found / "file").chmod(0o644)
    return found


def test_what_is_this_users_alone_is_trusted(directory):
    for mode in (0o700, 0o755, 0o555):
        directory.chmod(mode)
        check_directory(directory)
    for mode in (0o600, 0o644, 0o444):
        (directory / "file").chmod(mode)
        assert read_own(directory / "file") == b"x"


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o757, 0o1777, 0o722])
def test_fault_35_a_directory_that_others_may_write_to_is_not(directory, mode):
    directory.chmod(mode)
    with pytest.raises(UntrustedError, match=rf"^has the mode {mode:04o}: others may write to it; chmod 700 it$"):
        check_directory(directory)


@pytest.mark.parametrize("mode", [0o666, 0o664, 0o646])
def test_fault_35_nor_is_such_a_file(directory, mode):
    (directory / "file").chmod(mode)
    with pytest.raises(UntrustedError, match=rf"^has the mode {mode:04o}: others may write to it; chmod go-w it$"):
        read_own(directory / "file")


def test_nor_is_what_others_may_replace(directory):
    above = directory.parent
    for mode in (0o777, 0o757):
        above.chmod(mode)
        with pytest.raises(
            UntrustedError, match=rf"^lies in {above}, which has the mode {mode:04o}: others may replace"
        ):
            check_directory(directory)
    above.chmod(0o1777)  # as /tmp has it
    check_directory(directory)


def test_a_directory_above_may_be_written_to_by_the_owners_own_group_alone(directory, monkeypatch):
    above = directory.parent
    above.chmod(0o775)
    status = above.stat()
    monkeypatch.setattr(trust, "_private_group", lambda status: False)
    with pytest.raises(UntrustedError, match="has the mode 0775: others may replace it; chmod go-w that directory"):
        check_directory(directory)
    monkeypatch.undo()

    def with_group(number: int, mode: int = status.st_mode) -> os.stat_result:
        fields = list(status)
        fields[0], fields[5] = mode, number
        return os.stat_result(fields)

    assert trust._private_group(with_group(status.st_uid))
    assert not trust._private_group(with_group(status.st_uid + 1))
    assert not trust._private_group(with_group(status.st_uid, status.st_mode | 0o002))


def test_fault_35_nor_is_what_belongs_to_another_user(directory, monkeypatch):
    owner = directory.stat().st_uid
    monkeypatch.setattr(trust.os, "getuid", lambda: owner + 1)
    for check, path in ((check_directory, directory), (read_own, directory / "file")):
        with pytest.raises(UntrustedError, match=rf"^belongs to user {owner}, not to {owner + 1}$"):
            check(path)


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away")
def test_nor_is_what_lies_in_another_users_directory(directory):
    os.chown(directory.parent, 12345, 12345)
    with pytest.raises(UntrustedError, match=rf"^lies in {directory.parent}, which belongs to user 12345$"):
        check_directory(directory)
    os.chown(directory.parent, 0, 0)
    os.chown(directory, 12345, 12345)
    with pytest.raises(UntrustedError, match=r"^belongs to user 12345, not to 0$"):
        check_directory(directory)


def test_a_link_is_followed_and_what_leads_to_it_counts(tmp_path, directory):
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    link = open_to_all / "link"
    link.symlink_to(directory)
    check_directory(link)
    open_to_all.chmod(0o777)
    with pytest.raises(UntrustedError, match=rf"^lies in {open_to_all}, which has the mode 0777"):
        check_directory(link)
    open_to_all.chmod(0o755)
    directory.parent.chmod(0o777)
    with pytest.raises(UntrustedError, match=rf"^lies in {directory.parent}, which has the mode 0777"):
        check_directory(link)
