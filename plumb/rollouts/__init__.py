"""Rollouts: prompts in, the policy's own responses out. For people (hf_engine, every mode of
decoding) and for training (engine, policy_engine: responses with their log-probabilities).
"""
