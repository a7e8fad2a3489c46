"""An extension has stages, and what these leave: checkpoints and training logs."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.create_table(
        "longrope_stages",
        sa.Column("study_id", sa.Integer(), nullable=False),
        sa.Column("stage", sa.Integer(), nullable=False, autoincrement=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("settings", sa.Text(), nullable=False),
        sa.Column("profile", sa.Text()),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("result", sa.Text()),
        sa.Column("started_at", sa.DateTime(timezone=True)),
        sa.Column("finished_at", sa.DateTime(timezone=True)),
        sa.PrimaryKeyConstraint("study_id", "stage", name="pk_longrope_stages"),
        sa.ForeignKeyConstraint(
            ["study_id"], ["longrope_studies.id"], name="fk_longrope_stages_study_id", ondelete="CASCADE"
        ),
    )
    _of_a_stage(
        "longrope_checkpoints",
        sa.Column("step", sa.Integer(), nullable=False, autoincrement=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        key=["step"],
    )
    _of_a_stage(
        "longrope_training_logs",
        sa.Column("step", sa.Integer(), nullable=False, autoincrement=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("value", sa.Double()),
        key=["step", "name"],
    )


def _of_a_stage(table: str, *columns: sa.Column[object], key: list[str]) -> None:
    op.create_table(
        table,
        sa.Column("study_id", sa.Integer(), nullable=False, autoincrement=False),
        sa.Column("stage", sa.Integer(), nullable=False, autoincrement=False),
        *columns,
        sa.PrimaryKeyConstraint("study_id", "stage", *key, name=f"pk_{table}"),
        sa.ForeignKeyConstraint(
            ["study_id", "stage"],
            ["longrope_stages.study_id", "longrope_stages.stage"],
            name=f"fk_{table}_study_id",
            ondelete="CASCADE",
        ),
    )
