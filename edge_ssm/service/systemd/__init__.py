"""Integration with systemd: notifications, installation, units."""
