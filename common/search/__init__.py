"""The package of embed_search.py: make embeddings of texts, keep, search, compare and score them."""
