"""Distance of each context token to the nearest predicted token of its clip."""
