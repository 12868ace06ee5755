"""The stream: frames in (frames, source), windows over them (windows), decisions out (sinks), and the loop between."""
