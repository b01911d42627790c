"""Processes, and tensors spread over them: launching, signals, collectives, sharding, tensor
parallelism.

Takes modules and tensors of any model; what a model computes does not belong here.
"""
