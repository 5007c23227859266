"""How the loaded model that a job names was loaded, to load the same again; the wish to cancel an export."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("jobs") as jobs:
        jobs.add_column(sa.Column("load_options", sa.JSON(), nullable=False, server_default="{}"))
    with op.batch_alter_table("exports") as exports:
        exports.add_column(sa.Column("cancel_wish", sa.Boolean(), nullable=False, server_default=sa.false()))


def downgrade() -> None:
    with op.batch_alter_table("jobs") as jobs:
        jobs.drop_column("load_options")
    with op.batch_alter_table("exports") as exports:
        exports.drop_column("cancel_wish")
