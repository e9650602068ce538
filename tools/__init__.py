"""Programs that make what is committed: assets and generated pages."""
