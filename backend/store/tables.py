"""The tables, in SQLAlchemy Core. Migrations in `migrations/versions` make them; a test compares the two."""

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    false,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
    }
)

datasets = Table(
    "datasets",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("name", String(200), nullable=False),
    Column("format", String(40), nullable=False),
    Column("rows", Integer, nullable=False),
    Column("rejected_rows", Integer, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("columns", JSON, nullable=False),
    Column("warnings", JSON, nullable=False),
    Column("created_at", String(32), nullable=False),
)

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("sequence", Integer, nullable=False, unique=True),
    Column("name", String(200), nullable=False),
    Column("state", String(20), nullable=False, index=True),
    Column("priority", Integer, nullable=False),
    Column("idempotency_key", String(200), unique=True),
    Column("request_sha256", String(64), nullable=False),
    Column("model_id", String(200), nullable=False),
    Column("revision", String(200)),
    Column("loaded_model_id", String(40)),
    Column("load_options", JSON, nullable=False, server_default="{}"),
    Column("algorithm", String(20), nullable=False),
    Column("config", JSON, nullable=False),
    Column("dataset_id", String(40), ForeignKey("datasets.id"), nullable=False),
    Column("validation_dataset_id", String(40), ForeignKey("datasets.id")),
    Column("validation_fraction", String(32), nullable=False),
    Column("progress", JSON, nullable=False),
    Column("result", JSON, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("stalls", Integer, nullable=False, server_default="0"),
    Column("gpus", Integer, nullable=False, server_default="1"),
    Column("resumed_from", String(100)),
    Column("initial_adapter_id", String(40)),
    # Databases of earlier versions have this name; the key is the name in Python.
    Column("cancel_wish", String(20), key="cancel_request"),
    Column("adapter_id", String(40)),
    Column("error", JSON),
    Column("openai_request", JSON(none_as_null=True)),
    Column("created_at", String(32), nullable=False),
    Column("started_at", String(32)),
    Column("finished_at", String(32)),
)

job_events = Table(
    "job_events",
    metadata,
    Column("job_id", String(40), ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("sequence", Integer, primary_key=True),
    Column("kind", String(40), nullable=False),
    Column("data", JSON, nullable=False),
    Column("created_at", String(32), nullable=False),
)

adapters = Table(
    "adapters",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("name", String(200), nullable=False),
    Column("base_model_id", String(200), nullable=False),
    Column("base_revision", String(200)),
    Column("algorithm", String(20), nullable=False),
    Column("config", JSON),
    Column("job_id", String(40)),
    Column("dataset_sha256", String(64)),
    Column("metrics", JSON, nullable=False),
    Column("path", Text, nullable=False),
    Column("created_at", String(32), nullable=False),
    Column("version", Integer, nullable=False, server_default="1"),
    Column("source", JSON, nullable=False),
)

files = Table(
    "files",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("filename", String(200), nullable=False),
    Column("purpose", String(40), nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("status", String(20), nullable=False),
    Column("status_details", Text),
    Column("created_at", String(32), nullable=False),
    Column("expires_at", String(32)),
)

exports = Table(
    "exports",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("sequence", Integer, nullable=False, unique=True),
    Column("adapter_id", String(40), nullable=False, index=True),
    Column("kind", String(20), nullable=False),
    Column("settings", JSON, nullable=False),
    Column("state", String(20), nullable=False, index=True),
    Column("attempts", Integer, nullable=False),
    # As in `jobs`.
    Column("cancel_wish", Boolean, key="cancel_request", nullable=False, server_default=false()),
    Column("history", JSON, nullable=False),
    Column("result", JSON),
    Column("error", JSON),
    Column("created_at", String(32), nullable=False),
    Column("started_at", String(32)),
    Column("finished_at", String(32)),
)

Index("ix_adapters_base_model_id", adapters.c.base_model_id)
