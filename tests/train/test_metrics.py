import json

from k2train.train.metrics import MetricsFile


def test_a_resumed_file_drops_later_and_torn_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path, say=print)
    metrics.open(resume_at=0)
    for step in range(1, 6):
        metrics.write({"step": step, "loss": float("nan") if step == 2 else 1.0})
    metrics.finish(failed=False)
    with open(path, "a") as file:
        file.write('{"step": 6, "lo')  # killed here
    metrics = MetricsFile(path, say=print)
    metrics.open(resume_at=3)
    metrics.write({"step": 4, "loss": 2.0})
    metrics.finish(failed=False)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(r["step"], r["loss"]) for r in records] == [(1, 1.0), (2, None), (3, 1.0), (4, 2.0)]
