"""Which targets, in which order? Who is healthy?"""

from gateway.routing.router import Router, Watch

__all__ = ["Router", "Watch"]
