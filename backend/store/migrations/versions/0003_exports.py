"""Exports of adapters; adapters that came from elsewhere, and versions of a name."""

from collections import Counter
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_UNKNOWN_WHEN_IMPORTED: dict[str, sa.types.TypeEngine[Any]] = {
    "config": sa.JSON(),
    "job_id": sa.String(40),
    "dataset_sha256": sa.String(64),
}


def upgrade() -> None:
    op.create_table(
        "exports",
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("sequence", sa.Integer(), nullable=False),
        sa.Column("adapter_id", sa.String(40), nullable=False),
        sa.Column("kind", sa.String(20), nullable=False),
        sa.Column("settings", sa.JSON(), nullable=False),
        sa.Column("state", sa.String(20), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("history", sa.JSON(), nullable=False),
        sa.Column("result", sa.JSON()),
        sa.Column("error", sa.JSON()),
        sa.Column("created_at", sa.String(32), nullable=False),
        sa.Column("started_at", sa.String(32)),
        sa.Column("finished_at", sa.String(32)),
        sa.PrimaryKeyConstraint("id", name="pk_exports"),
        sa.UniqueConstraint("sequence", name="uq_exports_sequence"),
    )
    op.create_index("ix_exports_adapter_id", "exports", ["adapter_id"])
    op.create_index("ix_exports_state", "exports", ["state"])
    with op.batch_alter_table("adapters") as adapters:
        adapters.add_column(sa.Column("version", sa.Integer(), nullable=False, server_default="1"))
        adapters.add_column(sa.Column("source", sa.JSON()))
        for name, kind in _UNKNOWN_WHEN_IMPORTED.items():
            adapters.alter_column(name, existing_type=kind, nullable=True)
    _describe_adapters()
    with op.batch_alter_table("adapters") as adapters:
        adapters.alter_column("source", existing_type=sa.JSON(), nullable=False)


def _describe_adapters() -> None:
    """Number the adapters there are, and say that they were trained here."""
    columns = [sa.column(name, sa.String) for name in ("id", "name", "job_id", "created_at")]
    table = sa.table("adapters", *columns, sa.column("version", sa.Integer), sa.column("source", sa.JSON))
    connection, versions = op.get_bind(), Counter[str]()
    for row in connection.execute(sa.select(*columns).order_by(table.c.created_at)).all():
        versions[row.name] += 1
        values = {"version": versions[row.name], "source": {"kind": "training", "job_id": row.job_id}}
        connection.execute(table.update().where(table.c.id == row.id).values(**values))


def downgrade() -> None:
    op.drop_table("exports")
    connection = op.get_bind()
    connection.execute(sa.text("DELETE FROM adapters WHERE job_id IS NULL"))  # imported: the old tables have no place
    with op.batch_alter_table("adapters") as adapters:
        for name, kind in _UNKNOWN_WHEN_IMPORTED.items():
            adapters.alter_column(name, existing_type=kind, nullable=False)
        adapters.drop_column("source")
        adapters.drop_column("version")
