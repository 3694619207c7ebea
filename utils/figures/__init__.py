"""Figures: features, distances, embeddings, and how they are drawn."""
