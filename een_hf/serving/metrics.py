"""The events of an engine as Prometheus metrics."""

from ..extras import named_extras
from .stages import EngineObserver


with named_extras():
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
    from prometheus_client.exposition import CONTENT_TYPE_LATEST


_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class PrometheusObserver(EngineObserver):
    """Counts the rows, waiting times and answers of one engine, in its own registry. Exits are counted from 1."""

    def __init__(self):
        self.registry = CollectorRegistry()

        def make(kind, name, text, labels=(), **settings):
            return kind(f"een_{name}", text, labels, registry=self.registry, **settings)

        self.requests = make(Counter, "requests", "Requests, by the status of their response.", ["status"])
        self.request_seconds = make(Histogram, "request_seconds", "From a request to its response.", buckets=_SECONDS)
        self.exited = make(Counter, "rows_exited", "Rows answered, by exit.", ["exit"])
        self.seconds = make(Histogram, "row_seconds", "From a request to the answer of a row.", buckets=_SECONDS)
        self.stage_rows = make(Histogram, "stage_rows", "Rows that ran a stage together.", ["exit"], buckets=_ROWS)
        self.waited = make(
            Histogram, "stage_wait_seconds", "How long rows waited before a stage.", ["exit"], buckets=_SECONDS
        )
        self.num_dropped = make(Counter, "rows_dropped", "Rows removed: their request was cancelled or has failed.")
        self.num_refused = make(Counter, "rows_refused", "Rows refused because the queue was full.")
        self.waiting = make(Gauge, "rows_waiting", "Rows accepted and not answered.")
        self.num_audited = make(Counter, "rows_audited", "Audited rows that have reached the last exit.")
        self.difference = make(Counter, "audited_difference", "Audited rows whose last exit answers otherwise.")
        self.alarm = make(Gauge, "audit_alarm", "1: audits say that the policy breaks its limit.")

    def stage_ran(self, exit_index, num_rows, waited):
        exit = str(exit_index + 1)
        self.stage_rows.labels(exit).observe(num_rows)
        histogram = self.waited.labels(exit)
        for seconds in waited:
            histogram.observe(seconds)

    def answered(self, exit_index, seconds):
        self.exited.labels(str(exit_index + 1)).inc()
        self.seconds.observe(seconds)

    def dropped(self, num_rows):
        self.num_dropped.inc(num_rows)

    def refused(self, num_rows):
        self.num_refused.inc(num_rows)

    def responded(self, status, seconds):
        self.requests.labels(str(status)).inc()
        self.request_seconds.observe(seconds)

    def audited(self, difference, alarm):
        self.num_audited.inc()
        self.difference.inc(difference)
        self.alarm.set(alarm)

    def exposition(self, num_waiting: int) -> tuple[bytes, int, dict, str]:
        """The response to a request for the metrics.

        Args:
            num_waiting: rows that have been accepted and not answered.

        Returns:
            body, status, headers and media type.
        """
        self.waiting.set(num_waiting)
        return generate_latest(self.registry), 200, {}, CONTENT_TYPE_LATEST
