"""What an adapter that was trained here came from."""

from store.records import JobRecord


def lineage_of(job: JobRecord) -> dict[str, str]:
    """Return the adapter that a job continued as part of a `source`; nothing where it made a new one."""
    return {"initial_adapter_id": job.initial_adapter_id} if job.initial_adapter_id is not None else {}
