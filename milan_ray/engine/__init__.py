"""The only room that imports Ray: pools of actors, tasks, the cluster, the run log, status."""
