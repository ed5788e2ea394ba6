"""Folders that are put in place of others, when it goes wrong in between."""

import pytest

from common.files import replace_folder


def test_what_was_put_aside_stays_until_the_new_folder_stands_there(tmp_path):
    """After a kill between the two renames the one put aside is all that there is; a second one
    that fails must not take it.
    """
    (tmp_path / "step.old").mkdir()
    (tmp_path / "step.old" / "weights").write_text("whole")
    with pytest.raises(FileNotFoundError):
        replace_folder(tmp_path / "of a save that was killed", tmp_path / "step")
    assert (tmp_path / "step.old" / "weights").read_text() == "whole"
    (tmp_path / "fresh").mkdir()
    replace_folder(tmp_path / "fresh", tmp_path / "step")
    assert [path.name for path in tmp_path.iterdir()] == ["step"]
