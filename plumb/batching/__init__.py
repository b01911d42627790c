"""Batching: examples in, tensors of a step out.

Examples are cut into microbatches by their tokens and laid out as prompt-shared rows, ahead of the
step that needs them. The order of the examples is in data/order.py; what a model makes of a batch
is in models/.
"""
