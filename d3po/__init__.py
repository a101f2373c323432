"""The installed name of the project: ``d3po.flows`` and ``d3po.tasks``, links to the folders beside this one.

A wheel installs them under this name, so they cannot collide with another project's top-level ``flows`` or ``tasks``.
"""
