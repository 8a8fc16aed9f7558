"""What the ingress counts. Knows the metrics table and its own requests, no HTTP."""

from __future__ import annotations

from time import perf_counter

from trtllm_workers.ingress.answer import Answer
from trtllm_workers.observe.metrics import Counter, Histogram, Metrics

UNKNOWN = "unknown"
CLIENT_LEFT = "499"


class _ModelMeters:
    """The series of one served model, looked up once."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self.in_flight = metrics.gauge("trtllm_launch_in_flight_requests", model=model)
        self.first_token = metrics.histogram(
            "trtllm_launch_time_to_first_token_seconds", model=model
        )
        self.token_gap = metrics.histogram("trtllm_launch_inter_token_latency_seconds", model=model)
        self.prompt = metrics.counter("trtllm_launch_prompt_tokens_total", model=model)
        self.cached = metrics.counter("trtllm_launch_cached_prompt_tokens_total", model=model)
        self.output = metrics.counter("trtllm_launch_output_tokens_total", model=model)


class Meters:
    """Counts requests. Per token it costs nothing: a request is counted when it ends."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics
        self.events = metrics.counter("trtllm_launch_sse_events_total")
        self.worker_lost = metrics.counter("trtllm_launch_worker_lost_total")
        self.migrations = metrics.counter("trtllm_launch_migrations_total")
        self._models: dict[str, _ModelMeters] = {}
        self._statuses: dict[tuple[str, str, str], Counter] = {}
        self._seconds: dict[tuple[str, str], Histogram] = {}
        self.num_in_work = 0

    def model(self, model: str) -> _ModelMeters:
        """Return the series of one served model."""
        meters = self._models.get(model)
        if meters is None:
            meters = self._models[model] = _ModelMeters(self.metrics, model)
        return meters

    def status(self, endpoint: str, model: str, status: str) -> Counter:
        """Return the counter of requests that ended so."""
        key = (endpoint, model, status)
        counter = self._statuses.get(key)
        if counter is None:
            counter = self._statuses[key] = self.metrics.counter(
                "trtllm_launch_requests_total", endpoint=endpoint, model=model, status=status
            )
        return counter

    def seconds(self, endpoint: str, model: str) -> Histogram:
        """Return the histogram of how long requests took."""
        key = (endpoint, model)
        histogram = self._seconds.get(key)
        if histogram is None:
            histogram = self._seconds[key] = self.metrics.histogram(
                "trtllm_launch_request_seconds", endpoint=endpoint, model=model
            )
        return histogram

    def begin(self, endpoint: str) -> RequestMeter:
        """Count a request from its arrival on."""
        return RequestMeter(self, endpoint)


class RequestMeter:
    """One request. ``received`` and ``accepted`` mark its way; ``end`` is called once, always."""

    __slots__ = ("_accepted", "_endpoint", "_meters", "_received_s", "model", "num_events")

    def __init__(self, meters: Meters, endpoint: str) -> None:
        self._meters = meters
        self._endpoint = endpoint
        self._received_s = perf_counter()
        self._accepted: Answer | None = None
        self.model = UNKNOWN
        self.num_events = 0
        meters.num_in_work += 1

    def received(self) -> None:
        """The request is here in full: clocks start."""
        self._received_s = perf_counter()

    def accepted(self, answer: Answer) -> None:
        """The request is on its way to a worker."""
        self._accepted = answer
        self._meters.model(self.model).in_flight.add(1)

    def end(self, status: str) -> float:
        """Count the request under its status; return how long it took, in seconds."""
        self._meters.num_in_work -= 1
        took_s = perf_counter() - self._received_s
        self._meters.status(self._endpoint, self.model, status).add()
        answer = self._accepted
        if answer is not None:
            self._meters.seconds(self._endpoint, self.model).observe(took_s)
            self._count_tokens(answer)
        return took_s

    def _count_tokens(self, answer: Answer) -> None:
        meters = self._meters.model(self.model)
        meters.in_flight.add(-1)
        usage = answer.usage()
        meters.prompt.add(usage.prompt_tokens)
        meters.cached.add(usage.cached_tokens)
        meters.output.add(usage.completion_tokens)
        self._meters.events.add(self.num_events)
        for choice in answer.choices:
            if not choice.first_s:
                continue
            meters.first_token.observe(choice.first_s - self._received_s)
            gaps = choice.completion_tokens - 1
            if choice.finish_reason is not None and gaps > 0:
                meters.token_gap.observe((choice.last_s - choice.first_s) / gaps)
        if answer.cause:
            self._meters.metrics.counter(
                "trtllm_launch_aborted_requests_total", cause=answer.cause
            ).add()
