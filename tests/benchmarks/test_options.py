"""Options that several programs have."""

from __future__ import annotations

import argparse

import pytest

from benchmarks import options
from cce_numba.commands import UsageError


def parsed(*argv):
    parser = argparse.ArgumentParser()
    options.add_pace(parser)
    options.add_data(parser)
    options.add_record(parser)
    return parser.parse_args(argv)


def test_defaults_are_those_of_pace():
    arguments = parsed()
    assert options.Pace(arguments.rounds, arguments.burst) == options.Pace()
    assert options.archive_of(arguments) is None


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--rounds", "0"], "at least 1"),
        (["--rounds", "-1"], "at least 1"),
        (["--burst", "1.5"], "whole number"),
        (["--burst", "1234567890"], "at most 9 digits"),
        (["--record", "../name"], "plain name"),
        (["--record", ""], "plain name"),
    ],
)
def test_arguments_that_do_not_fit(argv, message, capsys):
    with pytest.raises(SystemExit):
        parsed(*argv)
    assert message in capsys.readouterr().err


def test_an_archive_is_read_or_told_why_not(archive, tmp_path):
    assert options.archive_of(parsed("--data", archive)).name == "layer.npz"
    with pytest.raises(UsageError, match=r"--data: absent\.npz: .*No such file"):
        options.archive_of(parsed("--data", "absent.npz"))
    (tmp_path / "text.npz").write_text("text")
    with pytest.raises(UsageError, match="is no npz file"):
        options.archive_of(parsed("--data", str(tmp_path / "text.npz")))
