"""Everything that touches a model or a device: loading, the rotation, scoring, the pool of workers."""
