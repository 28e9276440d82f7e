"""The `qefficient` command."""
