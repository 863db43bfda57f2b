"""Flower's ``flwr-clientapp`` without the imports that it never uses.

Flower's own entry imports the SuperNode, and with it a web framework and a database, once a message.
``flower.install_stub`` puts this before it on a SuperNode's PATH. It imports nothing of fedbraid: the
app is the one that the run's bundle holds.
"""

from __future__ import annotations

import argparse

from flwr.common.args import add_args_flwr_app_common, try_obtain_flwr_app_token
from flwr.supercore.tls import validate_and_resolve_root_certificates
from flwr.supernode.runtime.run_clientapp import run_clientapp


def main() -> None:
    """Run one ClientApp task, as Flower 1.41's command does."""
    parser = argparse.ArgumentParser(prog="flwr-clientapp")
    parser.add_argument("--runtime-api-address", required=True)
    add_args_flwr_app_common(parser=parser)
    given = parser.parse_args()
    run_clientapp(
        runtime_api_address=given.runtime_api_address,
        token=try_obtain_flwr_app_token(given),
        insecure=given.insecure,
        certificates=validate_and_resolve_root_certificates(
            given.root_certificates, given.insecure
        ),
        parent_pid=given.parent_pid,
        runtime_dependency_install=given.runtime_dependency_install,
    )


if __name__ == "__main__":
    main()
