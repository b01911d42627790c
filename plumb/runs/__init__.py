"""Runs: all that a run leaves on disk, and reading it back.

Run directory, status, checkpoints, their files and how they are written so that a crash damages
none, history.
"""
