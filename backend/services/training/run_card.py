"""The server's part of an adapter's card: the job and its data."""

from domain.protocol import AboutRun
from services.dataset_service import DatasetService
from store.records import JobRecord


def about_run(datasets: DatasetService, job: JobRecord) -> AboutRun:
    """Return what an adapter's card says of the job and its data."""
    validation = job.validation_dataset_id
    return AboutRun(
        name=job.name,
        job_id=job.id,
        algorithm=job.algorithm,
        resumed_from=job.resumed_from,
        initial_adapter_id=job.initial_adapter_id,
        dataset_sha256=datasets.get(job.dataset_id).sha256,
        dataset=datasets.describe(job.dataset_id),
        validation_dataset=datasets.describe(validation) if validation is not None else None,
    )
