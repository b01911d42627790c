"""Scoring: texts in; scores, verdicts, win rates and their intervals out."""
