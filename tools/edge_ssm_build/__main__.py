"""Run the command ``edge-ssm-build`` as ``python -m edge_ssm_build``."""

from edge_ssm_build.cli.app import main

if __name__ == "__main__":
    main()
