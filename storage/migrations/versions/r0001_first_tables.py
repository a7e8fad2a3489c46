"""The first tables."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "longrope_studies",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("settings", sa.Text(), nullable=False),
        sa.Column("profile", sa.Text()),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("result", sa.Text()),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("lease_token", sa.String(32)),
        sa.Column("lease_owner", sa.Text()),
        sa.Column("lease_version", sa.Integer(), nullable=False),
        sa.Column("lease_heartbeat_at", sa.DateTime(timezone=True)),
        sa.PrimaryKeyConstraint("id", name="pk_longrope_studies"),
        sa.UniqueConstraint("name", name="uq_longrope_studies_name"),
    )
    op.create_table(
        "longrope_candidates",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("study_id", sa.Integer(), nullable=False),
        sa.Column("stage", sa.Integer(), nullable=False),
        sa.Column("part", sa.String(16), nullable=False),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.Column("child", sa.Integer(), nullable=False),
        sa.Column("origin", sa.Text(), nullable=False),
        sa.Column("lambdas", sa.Text(), nullable=False),
        sa.Column("n_hat", sa.Integer(), nullable=False),
        sa.Column("attention_factor", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_longrope_candidates"),
        sa.ForeignKeyConstraint(
            ["study_id"], ["longrope_studies.id"], name="fk_longrope_candidates_study_id", ondelete="CASCADE"
        ),
        sa.UniqueConstraint("study_id", "stage", "part", "generation", "child", name="uq_longrope_candidates_study_id"),
    )
    op.create_table(
        "longrope_units",
        sa.Column("candidate_id", sa.Integer(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False, autoincrement=False),
        sa.Column("document_name", sa.Text(), nullable=False),
        sa.Column("document_sha256", sa.String(64), nullable=False),
        sa.Column("document_length", sa.Integer(), nullable=False),
        sa.Column("key", sa.String(64), nullable=False),
        sa.Column("failure", sa.Text()),
        sa.PrimaryKeyConstraint("candidate_id", "position", name="pk_longrope_units"),
        sa.ForeignKeyConstraint(
            ["candidate_id"], ["longrope_candidates.id"], name="fk_longrope_units_candidate_id", ondelete="CASCADE"
        ),
    )
    op.create_index("ix_longrope_units_key", "longrope_units", ["key"])
    op.create_table(
        "longrope_evaluations",
        sa.Column("key", sa.String(64), nullable=False),
        sa.Column("nll", sa.Double()),
        sa.Column("reason", sa.Text()),
        sa.Column("tokens", sa.Integer(), nullable=False),
        sa.Column("seconds", sa.Double(), nullable=False),
        sa.Column("worker", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("key", name="pk_longrope_evaluations"),
    )
