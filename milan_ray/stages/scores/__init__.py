"""Scores of descriptions and exemplars (docs/scores.md)."""

from milan_ray.stages.scores.inputs import Described, ScoreConfig, class_layers, described_layers
from milan_ray.stages.scores.stage import run_scores, score_stages

__all__ = ["Described", "ScoreConfig", "class_layers", "described_layers", "run_scores", "score_stages"]
