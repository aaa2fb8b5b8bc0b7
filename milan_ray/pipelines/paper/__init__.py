"""The paper's experiments on the built-in world, one module each (``jobs.paper``)."""
