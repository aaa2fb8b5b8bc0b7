"""The built-in world: synthetic scenes, networks and annotators with known ground truth.

No other module depends on it: :mod:`milan_ray.world.plugin` registers its models, probes and encoder as a user's
plug-in would.
"""
