"""A matrix -> factors of low rank, and how far they are from it: algebra without files or names."""
