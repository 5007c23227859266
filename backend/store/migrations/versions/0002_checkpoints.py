"""Jobs go on from checkpoints: deaths since the last one, and where a job began."""

import json

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_NEW = {"checkpoint_every_steps": None, "checkpoint_every_minutes": 5.0, "keep_checkpoints": 2}


def upgrade() -> None:
    with op.batch_alter_table("jobs") as jobs:
        jobs.add_column(sa.Column("stalls", sa.Integer(), nullable=False, server_default="0"))
        jobs.add_column(sa.Column("resumed_from", sa.String(100)))
        jobs.add_column(sa.Column("cancel_wish", sa.String(20)))
    connection = op.get_bind()
    for name in ("jobs", "adapters"):
        table = sa.table(name, sa.column("id", sa.String), sa.column("config", sa.JSON))
        for row in connection.execute(sa.select(table.c.id, table.c.config)).all():
            config = row.config if isinstance(row.config, dict) else json.loads(row.config)
            connection.execute(table.update().where(table.c.id == row.id).values(config=_NEW | config))


def downgrade() -> None:
    with op.batch_alter_table("jobs") as jobs:
        jobs.drop_column("cancel_wish")
        jobs.drop_column("resumed_from")
        jobs.drop_column("stalls")
