"""`python -m gateway` is `suiron`."""

from gateway.cli import main

main()
