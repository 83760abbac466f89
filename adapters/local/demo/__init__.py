"""The demo model: a tiny chat model that ships with Suiron, and everything that made it."""
