"""The `fastvit` command, installed as `fastvit_cli`; the only place that prints."""
