"""Power meters, one module per kind of sensor."""
