"""
The gateway of a configuration without what `suiron serve` adds to it: no ledger, nothing printed.

    python -m tests.bench.foundation gateway.yaml

Keys, the contract, metrics and log lines are as ever: what a relayed request costs at least.
"""

import sys
from pathlib import Path

from gateway import server
from gateway.api.shutdown import Shutdown
from gateway.app import create_app
from gateway.settings import load
from gateway.telemetry import Telemetry
from gateway.telemetry.log import to_stderr


def main() -> None:
    settings, shutdown = load(Path(sys.argv[1])), Shutdown()
    log = to_stderr("json")
    app = create_app(settings, telemetry=Telemetry(settings, log=log), shutdown=shutdown)
    server.run(app, server.listen(settings.server), settings.server, shutdown)
    log.close()


if __name__ == "__main__":
    main()
