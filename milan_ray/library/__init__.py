"""Calls for Python users, in the caller's process and without Ray. Whole models over large probes are for the jobs.

| For those who have | Call of ``milan_ray`` | Module |
|---|---|---|
| exemplars of units: images and masks | ``load(captioner).describe(images, masks)`` | ``captioner`` |
| a network and images | ``dissect(model, images, layers)`` | ``dissect`` |
| a run directory or a published set | ``open_exemplars(source).lookup(layer, unit)`` | ``run_directory`` |
| descriptions: a run directory or a frame | ``search(source, query)``, ``diff(source, model, other)`` | ``search`` |
"""
