"""The part of the options table that concerns how processes find and reach each other. Resolves nothing."""

from __future__ import annotations

from pathlib import Path

from trtllm_workers.config.option import Option

_GROUP = "planes"


def _file(name: str, env: tuple[str, ...], text: str) -> Option:
    return Option(
        name=name,
        flag=f"--{name.replace('_', '-')}",
        env=env,
        default=None,
        default_text="none",
        kind=Path,
        metavar="FILE",
        help=text,
        group=_GROUP,
    )


def _secret(name: str, env: tuple[str, ...], text: str) -> Option:
    return Option(
        name=name,
        flag=None,
        env=env,
        default=None,
        default_text="none",
        kind=str,
        help=text,
        group=_GROUP,
        secret=True,
    )


PLANES_OPTIONS: tuple[Option, ...] = (
    Option(
        name="discovery",
        flag="--discovery",
        env=("DISCOVERY",),
        default=None,
        default_text="etcd if it is given, else a directory of this run",
        kind=str,
        metavar="URL",
        help="Where workers register: file:///absolute/directory or etcd://host:2379.",
        group=_GROUP,
    ),
    Option(
        name="etcd_endpoints",
        flag="--etcd-endpoints",
        env=("ETCD_ENDPOINTS",),
        default=None,
        default_text="none",
        kind=str,
        metavar="HOST:PORT,…",
        help="Discovery on etcd: its members, https:// in front for TLS.",
        group=_GROUP,
    ),
    Option(
        name="plane_host",
        flag="--plane-host",
        env=("PLANE_HOST",),
        default="127.0.0.1",
        kind=str,
        metavar="HOST",
        help="Address where processes reach each other; 0.0.0.0 lets other hosts in.",
        group=_GROUP,
    ),
    Option(
        name="namespace",
        flag="--namespace",
        env=("NAMESPACE", "DYN_NAMESPACE"),
        default="default",
        kind=str,
        metavar="NAME",
        help="Name of the deployment: under one discovery, each namespace sees only itself.",
        group=_GROUP,
    ),
    Option(
        name="etcd_username",
        flag="--etcd-username",
        env=("ETCD_USERNAME",),
        default=None,
        default_text="none",
        kind=str,
        metavar="NAME",
        help="User of etcd, where it asks for one.",
        group=_GROUP,
    ),
    _secret("etcd_password", ("ETCD_PASSWORD",), "Password of that user."),
    _file(
        "etcd_cacert",
        ("ETCD_CACERT", "ETCDCTL_CACERT"),
        "Authorities that etcd's certificate is checked by.",
    ),
    _file("etcd_cert", ("ETCD_CERT", "ETCDCTL_CERT"), "Certificate shown to etcd."),
    _file("etcd_key", ("ETCD_KEY", "ETCDCTL_KEY"), "Key of that certificate."),
    Option(
        name="nats_server",
        flag="--nats-server",
        env=("NATS_SERVER",),
        default=None,
        default_text="one of this run, where the prefill queue is asked for",
        kind=str,
        metavar="URL",
        help="NATS with JetStream for the prefill queue: nats://host:4222, tls:// for TLS.",
        group=_GROUP,
    ),
    Option(
        name="nats_user",
        flag="--nats-user",
        env=("NATS_USER",),
        default=None,
        default_text="none",
        kind=str,
        metavar="NAME",
        help="User of NATS, where it asks for one.",
        group=_GROUP,
    ),
    _secret("nats_password", ("NATS_PASSWORD",), "Password of that user."),
    _secret("nats_token", ("NATS_TOKEN",), "Token for NATS in place of user and password."),
    _file("nats_cacert", ("NATS_CACERT",), "Authorities that NATS's certificate is checked by."),
    _file("nats_cert", ("NATS_CERT",), "Certificate shown to NATS."),
    _file("nats_key", ("NATS_KEY",), "Key of that certificate."),
    _file(
        "plane_cacert",
        ("PLANE_CACERT",),
        "Encrypt the request plane: authority of all processes' certificates.",
    ),
    _file("plane_cert", ("PLANE_CERT",), "Certificate of this process on the request plane."),
    _file("plane_key", ("PLANE_KEY",), "Key of that certificate."),
    Option(
        name="cluster_secret",
        flag=None,
        env=("CLUSTER_SECRET",),
        default=None,
        default_text="kept beside discovery; of a run alone a fresh one",
        kind=str,
        help="Secret that authenticates the processes to each other, 16 characters or more.",
        group=_GROUP,
        secret=True,
    ),
)
