"""Makes an etcd of our own ask every client for a password. Starts none."""

from __future__ import annotations

from trtllm_workers.config.outside import EtcdLogin, EtcdUrl
from trtllm_workers.planes.etcd_client import EtcdClient
from trtllm_workers.planes.etcd_errors import EtcdError

_CALL_TIMEOUT_S = 2.0


async def require_password(url: EtcdUrl, user: str, password: str) -> bool:
    """Switch authentication on; False when etcd does not answer yet. To be called on an empty etcd."""
    client = EtcdClient(url, EtcdLogin(), call_timeout_s=_CALL_TIMEOUT_S)
    rpc = client._rpc
    try:
        for method, request in (
            ("UserAdd", rpc.AuthUserAddRequest(name=user, password=password)),
            ("RoleAdd", rpc.AuthRoleAddRequest(name=user)),
            ("UserGrantRole", rpc.AuthUserGrantRoleRequest(user=user, role=user)),
            ("AuthEnable", rpc.AuthEnableRequest()),
        ):
            try:
                await client._call("Auth", method, request)
            except EtcdError as error:
                # An attempt before this one may have come that far.
                if "already exist" not in str(error) and "already granted" not in str(error):
                    return False
    finally:
        await client.close()
    return True
