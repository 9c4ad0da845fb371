"""`python -m hydra_pipe`: the command line."""

from hydra_pipe.cli.app import main

if __name__ == "__main__":
    main()
