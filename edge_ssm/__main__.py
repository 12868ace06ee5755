"""Run the command ``edge-ssm`` as ``python -m edge_ssm``."""

from edge_ssm.cli.app import main

if __name__ == "__main__":
    main()
