"""Plumb's library: all machinery of the commands at the root, which import it; it imports nothing
of theirs.

Rooms, each of which imports only from those before it: errors, console, paths | losses, distributed
| data | batching, runs | models | scoring | rollouts | training, reports | planning | settings.
"""
