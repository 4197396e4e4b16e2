"""Blocks -> disk: shards, the files beside them, and the proof of what was done."""
