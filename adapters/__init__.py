"""One module for each dialect; the gateway loads them by the name in its configuration."""
