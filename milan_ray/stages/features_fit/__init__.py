"""Feature sets that are fitted to a layer: components and sparse autoencoders.

probe ─► [actor pool: forward] ─► moments ─┬─► pca
                                           ├─► [passes of the pool: sums of a pass] ─► nmf
                                           └─► [a task or Ray Train: forward and steps] ─► sparse autoencoders
sets ─► [actor pool: forward once more] ─► features_fit, files
"""

from milan_ray.stages.features_fit.config import METHODS, FitConfig, FitJob
from milan_ray.stages.features_fit.stage import FeaturesFit, summary

__all__ = ["METHODS", "FeaturesFit", "FitConfig", "FitJob", "summary"]
