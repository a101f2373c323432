"""Thin Prefect tasks: open files, call d3po_core, log, return a small record."""
