"""Scores of units by how much is lost without them, larger = keep: one file a criterion."""
