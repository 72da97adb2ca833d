"""How is one island's torchrun started so that it listens on loopback only and dies with the launcher?

torchrun's own store listens on every interface of the machine. A store on the same port that this process made before, on a
socket bound to 127.0.0.1, is used in its place, because both are multi-tenant.
"""

from __future__ import annotations

import os
import socket
import sys

from dtrain.launch import gpus
from dtrain.launch.processes import PARENT_VARIABLE, die_with_parent


def main() -> None:
    die_with_parent()
    os.environ[PARENT_VARIABLE] = str(os.getpid())
    import torch
    from torch._C._distributed_c10d import TCPStore
    from torch.distributed.run import main as torchrun

    gpus.see_own(torch.cuda.device_count)

    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    store = TCPStore(
        "127.0.0.1", port, is_master=True, wait_for_workers=False, multi_tenant=True, master_listen_fd=listener.detach()
    )
    torchrun(["--rdzv-backend=static", "--master-addr=127.0.0.1", f"--master-port={store.port}", *sys.argv[1:]])


if __name__ == "__main__":
    main()
