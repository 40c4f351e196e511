"""The recipe: schema, loading with overrides, and every number derived from it."""
