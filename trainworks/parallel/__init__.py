"""Processes and devices: how a run is launched and spread."""
