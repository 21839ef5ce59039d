"""report as it is typed: a file and 0, or one line and 2."""
# ruff: noqa: F811 (fixtures)

import pytest

from perturbdiff.cli.main import main
from tests.cli.test_main import assert_says, here, refused, run, screen  # noqa: F401 (fixtures)


def test_a_report_of_a_run_is_written_where_it_is_asked_for(run, screen, here, capsys):
    main(["report", str(run)])
    assert capsys.readouterr().out == f"written     {run / 'report.html'}\n"
    main(["report", str(run)])  # its own file is made anew
    main(["report", str(run), "-o", "mine.html", "--screen", str(screen), "--figures", "figures"])
    assert (here / "mine.html").read_bytes() == (run / "report.html").read_bytes()
    assert (here / "figures" / "scores.svg").is_file()
    main(["report", str(run), "-o", "mine.html", "--overwrite"])


def test_what_cannot_be_written_or_read_is_refused_in_one_line(run, refused, here):
    (here / "mine.html").write_text("mine")
    assert_says(refused("report", run, "-o", "mine.html"), "mine.html exists", "--overwrite")
    assert_says(refused("report", run, "-o", "mine.pdf"), "must end in .html")
    assert_says(refused("report", "none"), "none holds no config.yaml", "folder of a run")
    assert_says(refused("report", run, "-o", "other.html", "--screen", "none.h5ad"), "none.h5ad is not there")


def test_help_names_the_extra(capsys):
    with pytest.raises(SystemExit):
        main(["report", "--help"])
    assert "perturbdiff[plot]" in capsys.readouterr().out
