"""Power meters, one module for each kind of sensor."""
