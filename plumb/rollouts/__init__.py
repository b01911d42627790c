"""Rollouts: prompts in, the policy's own responses out."""
