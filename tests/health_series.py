"""Series of metrics and records for the tests of warnings."""

from extensions.tasks import TASKS

COLA, SST2, STSB = TASKS["cola"], TASKS["sst2"], TASKS["stsb"]


def record(answer, gold="1", task="cola"):
    return {"task": task, "answer": answer, "gold": gold}


def warnings_of(watch, series):
    """(iteration from 1, warning) of a series of (metrics, records)."""
    return [
        (k, text)
        for k, (metrics, records) in enumerate(series, 1)
        for text in watch.step({"step": k} | metrics, records)
    ]


def iterations(watch, series):
    return [k for k, _ in warnings_of(watch, series)]


def metrics_of(**series):
    """A series of metrics without records, from the values of each."""
    return [(dict(zip(series, values, strict=True)), []) for values in zip(*series.values(), strict=True)]


def batches(pairs, batch=16):
    """(answer, gold) pairs of CoLA as a series."""
    records = [record(answer, gold) for answer, gold in pairs]
    return [({}, records[k : k + batch]) for k in range(0, len(records), batch)]


def answers(*runs, batch=16):
    """A series from (number, how many of them have a wrong format): the right ones come first."""
    return batches([(None if k >= n - wrong else "1", "1") for n, wrong in runs for k in range(n)], batch)
