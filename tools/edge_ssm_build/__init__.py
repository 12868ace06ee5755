"""edge-ssm-build: the host tool that trains, prunes and exports models. The only place that imports torch."""
