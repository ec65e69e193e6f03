"""Embeddings for any transformers model, and folders that everything else can open."""
