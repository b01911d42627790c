"""Training: what the loop in trainers.py calls. Evaluation, optimizers, token budget, metrics, the
first step's checks.
"""
