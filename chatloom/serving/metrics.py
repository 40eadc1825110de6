"""What Prometheus reads at /metrics."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest

from chatloom.serving.served import Slot

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """One server's, in a registry of their own: two servers in a process do not mix."""

    def __init__(self, slot: Slot) -> None:
        registry = self._registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"chatloom_{name}", text, labels, registry=registry)

        def seconds(name: str, text: str, *labels: str) -> Histogram:
            return Histogram(f"chatloom_{name}_seconds", text, labels, buckets=SECONDS, registry=registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"chatloom_{name}", text, registry=registry)

        self.requests = counter("requests", "Requests answered", "path", "method", "status")
        self.seconds = seconds("request", "From a request to the end of its answer", "path")
        self.first_token = seconds("first_token", "From a request to its first token")
        self.tokens = counter("tokens", "Tokens read and made", "kind")
        self.unfinished = counter("unfinished", "Requests with an answer that was begun and not completed")
        self.swaps = counter("swaps", "New versions: served, or refused", "result")
        self.registry_up = gauge("registry_up", "Whether the registry answered when it was last asked")
        self.audit_failures = counter("audit_failures", "Audit lines that could not be written")
        in_flight = gauge("answers_in_flight", "Answers that wait or are made")
        in_flight.set_function(lambda: slot.current.scheduler.in_flight)
        places = gauge("answers_places", "Answers that can wait or be made")
        places.set_function(lambda: slot.current.scheduler.capacity)
        self._model = Info("chatloom_model", "What is served", registry=registry)
        self._slot = slot
        for result in ("served", "refused"):
            self.swaps.labels(result)
        for kind in ("prompt", "completion"):
            self.tokens.labels(kind)

    def text(self) -> bytes:
        served = self._slot.current
        self._model.info({"name": served.name, "version": served.version or ""})
        return generate_latest(self._registry)
