"""Training: what the loop in trainers.py calls. Evaluation, optimizers, token budget, metrics,
checks of the first step.
"""
