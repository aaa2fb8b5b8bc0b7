"""The built-in world: drawn scenes, networks and annotators whose truth is known.

Nothing else in the system knows it: :mod:`milan_ray.world.plugin` registers its models, probes and encoder as a user's
plug-in would.
"""
