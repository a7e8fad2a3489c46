"""Evaluations may have a gradient beside their loss; candidates that racing left know where."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("longrope_evaluations", sa.Column("gradient", sa.Text()))
    op.add_column("longrope_candidates", sa.Column("seen", sa.Integer()))
