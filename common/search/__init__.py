"""The wing of embed_search.py: vectors of texts, kept in a store, searched, mined and scored."""
