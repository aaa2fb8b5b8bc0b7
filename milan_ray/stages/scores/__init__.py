"""Scores of descriptions and exemplars (docs/scores.md)."""

from milan_ray.stages.scores.inputs import Described, ScoreConfig, class_layers, described_layers
from milan_ray.stages.scores.stage import run_scores, score_stages
from milan_ray.stages.scores.verdicts import Learning

__all__ = ["Described", "Learning", "ScoreConfig", "class_layers", "described_layers", "run_scores", "score_stages"]
