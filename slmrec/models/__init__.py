"""Recommender models and the layers that a checkpoint may hold."""
