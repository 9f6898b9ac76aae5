"""Layouts of reward models on disk: detection, reading and writing of each."""
