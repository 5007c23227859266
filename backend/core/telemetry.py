"""What the service counts and times, in Prometheus' terms. `GET /metrics` shows it."""

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

REGISTRY = CollectorRegistry()
CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
ProcessCollector(registry=REGISTRY)

# A cached answer takes a few milliseconds, a model's details from a slow Hub half a minute.
_HTTP_BUCKETS_S = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 15, 60)
# From a tiny model on a GPU to a large batch on a laptop.
_STEP_BUCKETS_S = (0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_WAIT_BUCKETS_S = (1, 10, 60, 600, 3600, 6 * 3600, 24 * 3600)

http_request_seconds = Histogram(
    "peft_studio_http_request_seconds",
    "Time to the first byte of an answer.",
    ["method", "route", "status"],
    buckets=_HTTP_BUCKETS_S,
    registry=REGISTRY,
)
jobs = Gauge("peft_studio_jobs", "Training jobs by state.", ["state"], registry=REGISTRY)
job_queue_seconds = Histogram(
    "peft_studio_job_queue_seconds",
    "Time from a job's creation to its first start.",
    buckets=_WAIT_BUCKETS_S,
    registry=REGISTRY,
)
job_interruptions = Counter(
    "peft_studio_job_interruptions_total",
    "Runs that did not reach their end, by class.",
    ["error_class"],
    registry=REGISTRY,
)
step_seconds = Histogram(
    "peft_studio_training_step_seconds",
    "Time of an optimizer step.",
    ["algorithm"],
    buckets=_STEP_BUCKETS_S,
    registry=REGISTRY,
)
tokens = Counter("peft_studio_training_tokens_total", "Tokens trained on.", ["algorithm"], registry=REGISTRY)
engine_starts = Counter("peft_studio_engine_starts_total", "Engine processes started.", registry=REGISTRY)
engine_deaths = Counter(
    "peft_studio_engine_deaths_total", "Engine processes that ended unasked, by how.", ["how"], registry=REGISTRY
)
model_memory_bytes = Gauge(
    "peft_studio_model_memory_bytes",
    "Memory of a loaded base with its adapters.",
    ["model", "device"],
    registry=REGISTRY,
)
warm_engine_memory_bytes = Gauge(
    "peft_studio_warm_engine_memory_bytes",
    "Host memory of the engines that are kept ready and that hold nothing.",
    registry=REGISTRY,
)
hub_requests = Counter(
    "peft_studio_hub_requests_total",
    "Requests sent to the Hub, by status (0: no answer).",
    ["status"],
    registry=REGISTRY,
)
cache_lookups = Counter(
    "peft_studio_metadata_cache_lookups_total",
    "Lookups in the metadata cache: hit, stale (served although the Hub is away) or miss.",
    ["result"],
    registry=REGISTRY,
)


def exposition(jobs_by_state: Mapping[str, int], memory_bytes: Mapping[tuple[str, str], int], warm_bytes: int) -> bytes:
    """Write everything in Prometheus' text format.

    Args:
        jobs_by_state: How many jobs there are now in each state.
        memory_bytes: The memory of each loaded base, by model id and device.
        warm_bytes: The memory of the engines that are kept ready.
    """
    for state, count in jobs_by_state.items():
        jobs.labels(state).set(count)
    model_memory_bytes.clear()  # drops the models that were unloaded since
    for names, size in memory_bytes.items():
        model_memory_bytes.labels(*names).set(size)
    warm_engine_memory_bytes.set(warm_bytes)
    return generate_latest(REGISTRY)
