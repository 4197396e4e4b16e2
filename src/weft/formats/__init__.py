"""Bytes on disk -> specs; nothing here reads a weight."""
