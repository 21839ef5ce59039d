import json

from perturbdiff.training.tracking import MetricsFile


def test_resuming_forgets_lines_after_the_state_and_half_written_ones(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "loss": 1.0}\n{"step": 4, "lo')
    metrics = MetricsFile(path, resume_step=2)
    metrics.write(step=3, loss=1.5)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 3, "loss": 1.5}]


def test_a_fresh_run_starts_an_empty_file(tmp_path):
    MetricsFile(tmp_path / "metrics.jsonl", resume_step=0)
    assert (tmp_path / "metrics.jsonl").read_text() == ""
