"""Ten of the kills of `scripts.kill_table`: between checkpoints, and while one is written."""

import pytest

from scripts.kill_table import LAYOUTS, make_kills, table


@pytest.mark.long
def test_killed_runs_end_as_whole_ones(tmp_path):
    log = tmp_path / "kills.jsonl"
    kills = make_kills(range(5, 15), log)
    assert len(kills) == 10 and sum(each["hit"] for each in kills) > 5
    assert {each["layout"] for each in kills} == set(map(str, LAYOUTS))
    assert max(each["waited"] for each in kills) < 60
    assert make_kills(range(5, 15), log) == kills  # read from the log
    assert len(table(kills).splitlines()) == 2 + len(LAYOUTS)
