"""Processes of one command on several devices and machines: their settings, start, shared work and end."""
