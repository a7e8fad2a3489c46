"""Run by Alembic: migrates the connection that storage.database.migrate hands over, in its transaction."""

from __future__ import annotations

from alembic import context

from storage.models import VERSION_TABLE, Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    version_table=VERSION_TABLE,
)
with context.begin_transaction():
    context.run_migrations()
