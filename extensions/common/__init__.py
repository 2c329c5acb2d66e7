"""Shared by all rooms: errors, durable files, console output, environment, versions."""
