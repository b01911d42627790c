"""Settings: what a user may set and how it is checked; the command line.

Only these modules, planning/, train.py and the trainers' constructors see the whole config.
"""
