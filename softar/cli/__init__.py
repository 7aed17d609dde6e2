"""The `softar` command."""
