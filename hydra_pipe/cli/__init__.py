"""The command line, made with Typer, and nothing else."""
