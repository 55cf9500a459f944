"""Scores of finished runs on held-out captions, and music generated from prompts."""
